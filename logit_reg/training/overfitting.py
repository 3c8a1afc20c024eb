"""Catastrophic overfitting, watched: accuracy under PGD on a few training images.

Training on single-step adversarial images can lose all robustness within a few hundred steps,
while its own accuracy rises (Wong et al. 2020, section 5.4). The images of training cannot show
that; those of an attack of several steps do.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from logit_reg.attacks.engine.examples import class_numbers
from logit_reg.attacks.engine.forward import Classifier
from logit_reg.attacks.pgd import PGD
from logit_reg.messages import notice
from logit_reg.threat import ThreatModel

if TYPE_CHECKING:
    from logit_reg.training.records import Records

ROBUSTNESS_COLUMNS = ("step", "clean_accuracy", "pgd_accuracy", "training_accuracy")
"""Accuracies are fractions: on `NUM_EXAMPLES` training images, under PGD on them, and on the images
that the step trained on, the adversary's."""
NUM_EXAMPLES = 200
"""Images that are attacked; 2,200 forwards and backwards at most, as many as in two steps of 7-step
adversarial training, or in eight of a single-step one, at a batch of 128."""
NUM_PROBE_STEPS = 10
"""Steps of PGD on them."""

# Chance is half of it with ten classes: what was never learned cannot be lost.
_LEAST_BEST = 0.2
_REMAINING_SHARE = 0.2
_LEARNED = 0.5
_NOTHING = 0.05

Row = Mapping[str, Any]


class RobustnessProbe:
    """PGD on some of the training images, always the same ones with the same random start.

    It has the full epsilon from the first step on, whatever the ramp of the adversary.
    """

    def __init__(self, network: keras.Model, images, labels, threat: ThreatModel):
        """Choose the images, evenly from the whole training set.

        Args:
            network: images (N, H, W, C) in pixel units -> logits (N, K); in training.
            images: (N, H, W, C) uint8, mapped from [0, 255] to the bounds of the threat model.
            labels: (N,) or (N, 1) int.
            threat: what PGD may do.
        """
        count = min(NUM_EXAMPLES, len(images))
        self._rows = np.linspace(0, len(images) - 1, count).astype(np.int64)
        self._images = threat.lower + images[self._rows].astype(np.float32) * (
            (threat.upper - threat.lower) / 255
        )
        self._labels = class_numbers(labels)[self._rows]
        self._network = network
        self._attack = PGD(
            threat, "xent", NUM_PROBE_STEPS, 2.5 * threat.epsilon / NUM_PROBE_STEPS, early_stop=True
        )

    def measure(self) -> dict[str, float]:
        """Accuracies of the network as it is now, fractions: clean, and at every iterate of PGD."""
        right = Classifier().predict(self._network, self._images) == self._labels
        robust = right.copy()
        if right.any():
            attacked = self._attack.run(
                self._network,
                self._images[right],
                self._labels[right],
                seed=0,
                indices=self._rows[right],
            )
            robust[right] = ~attacked.fooled
        return {"clean_accuracy": float(right.mean()), "pgd_accuracy": float(robust.mean())}


class OverfittingWatch:
    """Measures robustness while training goes on, writes it down, and warns."""

    def __init__(self, probe: RobustnessProbe, records: "Records"):
        """Go on after the rows that there are.

        Args:
            probe: what measures.
            records: have the rows of robustness.csv.
        """
        self._probe, self._records = probe, records
        self._has_warned = self._never_came = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Records.robustness`."""
        return self._records.robustness

    @property
    def best_step(self) -> int:
        """Of the highest accuracy under PGD."""
        best = best_row(self.rows)
        return best["step"] if best is not None else 0

    @property
    def is_overfitted(self) -> bool:
        """Whether robustness has fallen to nothing, or never came though it should have."""
        return is_overfitted(self.rows) or self._never_came

    def look(self, step: int, training_accuracy: float, *, is_late: bool) -> None:
        """Measure after a step; warn if robustness is lost since the last time, or never came.

        Args:
            step: number of finished steps.
            training_accuracy: on the adversary's images of this step.
            is_late: whether robustness should have come by now.
        """
        before = self.rows
        measured = self._probe.measure() | {"training_accuracy": training_accuracy}
        self._records.write_robustness({"step": step, **measured})
        is_lost = is_late and knows_only_its_adversary(self.rows[-1])
        self._never_came = is_lost and measured["pgd_accuracy"] < _NOTHING
        if is_overfitted(self.rows):
            if not is_overfitted(before):
                notice(f"warning: {fall_in_words(self.rows)}.")
        elif is_lost and not self._has_warned:
            self._has_warned = True
            notice(
                f"warning: at step {step:,} accuracy is {training_accuracy:.1%} on the adversary's "
                f"images and {measured['pgd_accuracy']:.1%} under PGD on {NUM_EXAMPLES} training "
                f"images: training has overfitted to its adversary."
            )


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row of the highest accuracy under PGD, the last one of several; None without rows."""
    return max(rows, key=_rank, default=None)


def _rank(row: Row):
    return row["pgd_accuracy"], row["step"]


def is_overfitted(rows: Sequence[Row]) -> bool:
    """Whether robustness, once learned, has fallen to nothing.

    Args:
        rows: `ROBUSTNESS_COLUMNS` of a training so far, in order.

    Returns:
        Whether accuracy under PGD is less than a fifth of the best before it, which was at least
        20 %: a network that has not learned yet, or during the ramp of epsilon, has lost nothing.
    """
    best = best_row(rows)
    if best is None or best["pgd_accuracy"] < _LEAST_BEST:
        return False
    return rows[-1]["pgd_accuracy"] < _REMAINING_SHARE * best["pgd_accuracy"]


def knows_only_its_adversary(row: Row) -> bool:
    """Whether the adversary's images are learned, and those of PGD are not.

    That is what overfitting looks like where robustness never came, as in single-step training
    whose epsilon is too large from the start.

    Args:
        row: of robustness.csv, of a training whose adversary has its full epsilon.
    """
    learned = row["training_accuracy"]
    return learned >= _LEARNED and row["pgd_accuracy"] < _REMAINING_SHARE * learned


def fall_in_words(rows: Sequence[Row]) -> str:
    """What has happened, where `is_overfitted` says that something has."""
    best, last = max(rows, key=_rank), rows[-1]
    return (
        f"catastrophic overfitting: accuracy under PGD on {NUM_EXAMPLES} training images was "
        f"{best['pgd_accuracy']:.1%} at step {best['step']:,} and is {last['pgd_accuracy']:.1%} at "
        f"step {last['step']:,}"
    )
