"""The books of a run: who is misclassified clean, who still stands, what was found for the rest."""

import numpy as np

from logit_reg.attacks.engine.attack import AttackResult
from logit_reg.attacks.engine.examples import check_classes
from logit_reg.attacks.engine.forward import LogitsFn, clean_logits


class Standing:
    """The examples that an attack has left, so that it works on nobody else.

    Rows are places in the batch. An attack keeps its own state for the rows it works on and
    drops the others from it, between calls of its compiled steps: `rows = rows[keep]`.
    """

    def __init__(self, logits_fn: LogitsFn, images: np.ndarray, labels: np.ndarray):
        """Look at the clean images: whoever is misclassified there is broken already.

        Args:
            logits_fn: images -> logits.
            images: (N, H, W, C) float32, pixel units.
            labels: (N,) int64.
        """
        self.adversarial = images.copy()
        """(N, H, W, C) float32: what was recorded last, the image itself at first."""
        self.clean_logits = clean_logits(logits_fn, images)
        """(N, K) float."""
        check_classes(labels, self.clean_logits.shape[1])
        self.fooled = ~(clean_margin(self.clean_logits, labels) > 0)
        """(N,) bool."""
        self.forwards = len(images)
        self.backwards = 0

    @property
    def rows(self) -> np.ndarray:
        """(M,) int rows of those that still stand, in order."""
        return np.flatnonzero(~self.fooled)

    def record(self, rows: np.ndarray, candidates: np.ndarray, fooled: np.ndarray) -> np.ndarray:
        """Note what was found for some rows.

        Args:
            rows: (M,) int rows that still stood.
            candidates: (M, H, W, C) float32 what to return for them.
            fooled: (M,) bool whether it fools.

        Returns:
            (M,) bool who goes on.
        """
        self.adversarial[rows] = candidates
        self.fooled[rows] = fooled
        return ~fooled

    def count(self, num_images: int, *, forwards: int = 0, backwards: int = 0) -> None:
        """Add passes of each of `num_images` images to the books."""
        self.forwards += num_images * forwards
        self.backwards += num_images * backwards

    def result(self, stages: tuple = ()) -> AttackResult:
        """The books as an `AttackResult`; an image is left when it fools, so its last iterate
        is the one that fools.
        """
        return AttackResult(
            self.adversarial,
            self.fooled,
            self.fooled.copy(),
            self.forwards,
            self.backwards,
            stages,
        )


def take(state, keep: np.ndarray) -> tuple[np.ndarray, ...]:
    """The kept rows of each tensor or array of a state."""
    return tuple(np.asarray(part)[keep] for part in state)


def ranked_targets(logits: np.ndarray, labels: np.ndarray, num_targets: int) -> np.ndarray:
    """The wrong classes, likeliest first.

    Args:
        logits: (N, K) float of the clean images.
        labels: (N,) int.
        num_targets: how many classes, cut to K - 1.

    Returns:
        (N, min(num_targets, K - 1)) int64.

    Source:
        The targets of AutoAttack's APGD-T and FAB-T (Croce and Hein 2020).
    """
    others = logits.astype(np.float64)
    others[np.arange(len(labels)), labels] = -np.inf
    order = np.argsort(-others, axis=1, kind="stable")
    return order[:, : min(num_targets, logits.shape[1] - 1)].astype(np.int64)


def clean_margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`margin` in numpy: (N, K), (N,) -> (N,); -inf where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    others = np.where(finite[:, None], logits, 0)
    true_logit = others[np.arange(len(labels)), labels]
    others[np.arange(len(labels)), labels] = -np.inf
    return np.where(finite, true_logit - others.max(axis=1), -np.inf)
