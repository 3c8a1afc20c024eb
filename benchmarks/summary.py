"""From the answers of the workers to numbers that can be compared."""

import dataclasses
import statistics
from collections.abc import Sequence

from benchmarks.cases import Case

# Accuracies of the same attack by two libraries, fractions.
_AGREEMENT = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
    """All repetitions of one contender, in the order of time."""

    contender: str
    seconds: tuple[float, ...]
    """Of each repetition."""
    first_seconds: float
    """Getting ready: imports, files, traces and a first batch."""
    peak_bytes: int
    """Most memory that its process held."""
    correct: tuple[bool, ...] | None = None
    """See `Outcome`."""
    correct_any_iterate: tuple[bool, ...] | None = None
    """See `Outcome`."""

    @property
    def median(self) -> float:
        """Seconds of the middle repetition."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the fastest and of the slowest repetition."""
        return min(self.seconds), max(self.seconds)

    @property
    def accuracy(self) -> float | None:
        """Fraction of images still right; None if the case attacks nothing."""
        return None if self.correct is None else statistics.fmean(self.correct)


def collect(contender: str, ready: dict, repetitions: Sequence[dict]) -> Measurement:
    """A worker's answers as one record; verdicts are those of the first repetition."""
    first = repetitions[0]
    return Measurement(
        contender=contender,
        seconds=tuple(repetition["seconds"] for repetition in repetitions),
        first_seconds=ready["seconds"],
        peak_bytes=max(repetition["peak_bytes"] for repetition in repetitions),
        correct=_tuple(first["correct"]),
        correct_any_iterate=_tuple(first["correct_any_iterate"]),
    )


def ratio(peer: Measurement, ours: Measurement) -> tuple[float, float, float]:
    """How many times as long as ours a peer takes.

    Args:
        peer: of the same case.
        ours: the measure.

    Returns:
        The ratio of the medians, and the smallest and the largest of the ratios of repetitions
        that stood side by side.
    """
    pairs = [theirs / own for theirs, own in zip(peer.seconds, ours.seconds, strict=True)]
    return peer.median / ours.median, min(pairs), max(pairs)


def share_of_peak(
    case: Case, measurement: Measurement, forward_flops: int, peak: float
) -> float | None:
    """Fraction of the machine's matrix peak that the gradients alone amount to.

    Args:
        case: None is returned unless all contenders take the same number of gradients.
        measurement: of that case.
        forward_flops: of one image; a gradient takes two times as many, forward pass included.
        peak: operations a second.
    """
    if not case.num_gradients:
        return None
    return 2 * forward_flops * case.num_gradients / measurement.median / peak


def num_different(peer: Measurement, ours: Measurement) -> int | None:
    """Images that one finds right and the other does not; None if nothing was attacked."""
    if peer.correct is None or ours.correct is None:
        return None
    return sum(a != b for a, b in zip(peer.correct, ours.correct, strict=True))


def disagreements(measurements: Sequence[Measurement]) -> list[str]:
    """Contenders whose accuracy is more than a point from ours: they did other work.

    Args:
        measurements: ours first. Of fewer than 100 images one may differ.

    Returns:
        A sentence for each.
    """
    ours, *peers = measurements
    if ours.correct is None or ours.accuracy is None:
        return []
    allowed = max(_AGREEMENT, 1 / len(ours.correct))
    found = []
    for peer in peers:
        # The last bits of fractions are not a difference.
        if peer.accuracy is None or abs(peer.accuracy - ours.accuracy) <= allowed + 1e-9:
            continue
        found.append(
            f"DISAGREE: {peer.contender} leaves {100 * peer.accuracy:.1f} %, {ours.contender} "
            f"{100 * ours.accuracy:.1f} %: more than {100 * allowed:.1f} points apart, so their "
            "times do not compare."
        )
    return found


def _tuple(values):
    return None if values is None else tuple(values)
