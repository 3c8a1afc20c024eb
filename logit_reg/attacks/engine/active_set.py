"""The active set: which examples are still robust, what was found for the others, the passes."""

from collections.abc import Iterator

import numpy as np

from logit_reg.attacks.engine.attack import Attack, AttackResult, ImageAttack, run_attack
from logit_reg.attacks.engine.examples import Examples, check_classes
from logit_reg.attacks.engine.forward import LogitsFn, clean_logits
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses


class ActiveSet:
    """The examples that are still robust, so that attacks work on nobody else.

    Rows are places in the batch. An attack keeps its own state for the rows it works on and
    drops the others from it, between calls of its compiled steps: `rows = rows[keep]`.

    Where `RepeatedPasses` judge, the first iterate that fools lies on the boundary, and as many
    further passes would be right on it as wrong. There nobody is dropped, so that an attack goes
    on to its last step, and of what is recorded that stays which further passes are worst on.
    """

    def __init__(
        self,
        adversarial: np.ndarray,
        logits_fn: LogitsFn | None = None,
        labels: np.ndarray | None = None,
    ):
        """Begin with all of N examples.

        Args:
            adversarial: (N, H, W, C) float32 what to return where nothing is recorded; written to.
            logits_fn: what judges; counts where it makes repeated passes.
            labels: (N,) int, of use with it.
        """
        self._repeated = logits_fn if isinstance(logits_fn, RepeatedPasses) else None
        self._labels = labels
        self._lowest = np.full(len(adversarial), np.inf)
        self.adversarial = adversarial
        """(N, H, W, C) float32: what was recorded last."""
        self.fooled = np.zeros(len(adversarial), bool)
        """(N,) bool."""
        self.last_iterate_fooled = np.zeros(len(adversarial), bool)
        """(N,) bool."""
        self.forwards = self.backwards = 0
        self.stages: list[tuple[str, np.ndarray]] = []
        """Of a cascade: see `AttackResult.stages`."""

    @property
    def rows(self) -> np.ndarray:
        """(M,) int rows of those that are still robust, in order."""
        return np.flatnonzero(~self.fooled)

    @property
    def is_repeated(self) -> bool:
        """Whether repeated passes judge."""
        return self._repeated is not None

    def record(self, rows, candidates, fooled, last_iterate_fooled=None) -> np.ndarray:
        """Take what was found for some rows.

        Args:
            rows: (M,) int rows that were still robust.
            candidates: (M, H, W, C) float32 what to return for them.
            fooled: (M,) bool whether it fools; where repeated passes judge, further ones decide.
            last_iterate_fooled: (M,) bool; `fooled` if None, as where an image is left once it is
                fooled.

        Returns:
            (M,) bool who goes on.
        """
        self.last_iterate_fooled[rows] = (
            fooled if last_iterate_fooled is None else last_iterate_fooled
        )
        if self.is_repeated:
            self._keep_lowest(rows, candidates)
            return np.ones(len(rows), bool)
        self.adversarial[rows] = candidates
        self.fooled[rows] = fooled
        return ~self.fooled[rows]

    def _keep_lowest(self, rows, candidates):
        if not len(rows) or self._repeated is None or self._labels is None:
            return
        margins = clean_margin(clean_logits(self._repeated, candidates), self._labels[rows])
        self.count(len(rows), forwards=1)
        is_lower = margins < self._lowest[rows]
        self.adversarial[rows[is_lower]] = candidates[is_lower]
        self._lowest[rows[is_lower]] = margins[is_lower]
        self.fooled[rows] = ~(self._lowest[rows] > 0)

    def add(self, rows: np.ndarray, found: AttackResult) -> None:
        """Record what an attack found for some rows, with its passes."""
        self.record(rows, found.adversarial, found.fooled, found.last_iterate_fooled)
        self.count(1, forwards=found.forwards, backwards=found.backwards)

    def count(self, num_images: int, *, forwards: int = 0, backwards: int = 0) -> None:
        """Count passes of each of `num_images` images."""
        self.forwards += num_images * forwards
        self.backwards += num_images * backwards

    def result(self) -> AttackResult:
        """All of it as an `AttackResult`."""
        return AttackResult(
            self.adversarial,
            self.fooled,
            self.last_iterate_fooled,
            self.forwards,
            self.backwards,
            tuple(self.stages),
        )


class ActiveExamples(ActiveSet):
    """The examples that an attack is to fool, those that are classified right at first."""

    def __init__(self, logits_fn: LogitsFn, examples: Examples):
        """Send the clean images through the network: who is misclassified there is done."""
        super().__init__(examples.images.copy(), logits_fn, examples.labels)
        self.logits_fn, self.examples = logits_fn, examples
        self.clean_logits = clean_logits(logits_fn, examples.images)
        """(N, K) float."""
        check_classes(examples.labels, self.num_classes)
        self.fooled = ~(clean_margin(self.clean_logits, examples.labels) > 0)
        self.last_iterate_fooled = self.fooled.copy()
        self.forwards = len(examples.images)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.clean_logits.shape[1]

    @property
    def functions(self) -> tuple[LogitsFn, LogitsFn]:
        """See `Examples.functions`."""
        return self.examples.functions(self.logits_fn)

    def run(self, attack: Attack, rows: np.ndarray) -> None:
        """Run another attack on some rows and record what it finds."""
        self.add(rows, run_attack(attack, self.logits_fn, self.examples.take(rows)))

    def targets(
        self, num_targets: int, distances: np.ndarray | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """One target class after the other, the wrong ones with the largest clean logits first.

        Args:
            num_targets: how many classes, cut to K - 1.
            distances: (N, K) float; if given, the classes with the smallest come first, and of
                those that are as far those with the largest logits.

        Yields:
            A name for random streams, and the (N,) int64 targets of that rank.

        Source:
            The targets of AutoAttack's APGD-T and FAB-T (Croce and Hein 2020).
        """
        lowest = -self.clean_logits.astype(np.float64)
        keys = [lowest] if distances is None else [lowest, distances]
        keys.append(np.arange(self.num_classes) == self.examples.labels[:, None])
        # The last key counts first: the true class comes last.
        order = np.lexsort(keys, axis=1).astype(np.int64)
        for rank in range(min(num_targets, self.num_classes - 1)):
            yield f"target {rank}", order[:, rank]


class ActiveSetAttack(ImageAttack):
    """An attack that works on the active set only: it leaves an image once it is fooled."""

    def _run(self, logits_fn, examples):
        active = ActiveExamples(logits_fn, examples)
        if active.is_repeated:
            # A few passes that are wrong on the image itself do not decide.
            active.fooled[:] = False
        self._attack(active)
        return active.result()

    def _attack(self, active: ActiveExamples) -> None:
        """Attack who is still robust, and record what is found."""
        raise NotImplementedError


def take(state, keep: np.ndarray) -> tuple[np.ndarray, ...]:
    """The kept rows of each tensor or array of a state."""
    return tuple(np.asarray(part)[keep] for part in state)


def clean_margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`margin` in numpy: (N, K), (N,) -> (N,); -inf where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    others = np.where(finite[:, None], logits, 0)
    true_logit = others[np.arange(len(labels)), labels]
    others[np.arange(len(labels)), labels] = -np.inf
    return np.where(finite, true_logit - others.max(axis=1), -np.inf)
