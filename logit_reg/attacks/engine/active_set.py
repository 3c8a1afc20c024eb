"""The books of a run: who is misclassified clean, who still stands, what was found for the rest."""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.attack import (
    AttackResult,
    LogitsFn,
    batch_spec,
    call_logits,
    check_classes,
    compiled,
    forget_traces,
)

# Images whose logits tell whether a function is still the one that was traced.
_NUM_COMPARED = 4


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


def clean_logits(logits_fn: LogitsFn, images) -> np.ndarray:
    """Logits of a batch, compiled like an attack: (N, H, W, C) -> (N, K) float.

    Raises:
        ValueError: if there is not one row of logits an image.
    """
    logits = _compiled_forward(logits_fn, images)(images).numpy()
    if len(logits) != len(images):
        raise ValueError(
            f"logits_fn must return a row of logits for each image; it returns {len(logits)} for "
            f"{len(images)} images."
        )
    return logits


def count_classes(logits_fn: LogitsFn, images) -> int:
    """K of a network, from its trace; by a look at an image where that does not say."""
    traced = _compiled_forward(logits_fn, images).get_concrete_function()
    return traced.structured_outputs.shape[1] or clean_logits(logits_fn, images[:1]).shape[1]


def check_examples(logits_fn: LogitsFn, images, labels) -> None:
    """Refuse labels that are no class of a network.

    Args:
        logits_fn: images -> logits.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int.

    Raises:
        ValueError: if there is one, or the network gives no logits.
    """
    if len(images):
        check_classes(labels, count_classes(logits_fn, images))


def forget_if_changed(logits_fn: LogitsFn, images) -> None:
    """Drop all traces if a function computes something else than when it was traced.

    A trace follows the values of variables, but no layer whose activation is replaced or that is
    quantised, and no number or array of a Python object.

    Args:
        logits_fn: images -> logits.
        images: (N, H, W, C) float, pixel units.
    """
    traced = _compiled_forward(logits_fn, images)
    if not traced.experimental_get_tracing_count():
        return
    now = tf.function(
        functools.partial(_Forward()._logits, logits_fn),
        input_signature=traced.input_signature,
        autograph=False,
    )
    sample = images[:_NUM_COMPARED]
    if not np.array_equal(traced(sample), now(sample), equal_nan=True):
        forget_traces()


def forward_graph(logits_fn: LogitsFn, images) -> tf.Graph:
    """The graph of `clean_logits`, for images (N, H, W, C) of the same shape."""
    return _compiled_forward(logits_fn, images).get_concrete_function().graph


def _compiled_forward(logits_fn, images):
    signature = (batch_spec(images.shape[1:]),)
    return compiled(_Forward(), "_logits", (logits_fn,), signature)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """One look at some images."""

    def _logits(self, logits_fn, images):
        return call_logits(logits_fn, images)
