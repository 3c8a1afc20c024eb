"""The one rule by which a test judges a proportion: by its interval, not by its estimate."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from logit_reg.evaluation.statistics import Mean, PairedDifference, Proportion

Found = Proportion | PairedDifference | Mean

# More images than any test set has.
_MOST_EXAMPLES = 10**7


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether what was found keeps to a threshold, for all that chance may have done."""

    found: Found
    least: float
    """Smallest value allowed, a fraction; minus infinity if there is none."""
    most: float
    """Largest value allowed, a fraction; infinity if there is none."""

    @property
    def status(self) -> str:
        """One of "pass", "fail" and "not_decided".

        It passes if the whole 95 % interval is allowed and fails if none of it is.
        """
        return self._status(self.found)

    @property
    def num_needed(self) -> int | None:
        """About how many images, if they were like these, would decide; None if none would.

        Two digits, rounded up; the number at hand where the test is decided already.
        """
        low = high = self.found.num_examples
        while self._status(self.found.scaled(high)) == "not_decided":
            low, high = high, 2 * high
            if high > _MOST_EXAMPLES:
                return None
        while high - low > max(1, high // 100):
            middle = (low + high) // 2
            if self._status(self.found.scaled(middle)) == "not_decided":
                low = middle
            else:
                high = middle
        if high == self.found.num_examples:
            return high
        unit = 10 ** max(0, len(str(high)) - 2)
        return -(-high // unit) * unit

    def __str__(self) -> str:
        """The estimate, its interval, what is allowed, and how many images would decide."""
        text = f"{in_points(self.found)}, {self._allowed()}"
        if self.status != "not_decided":
            return text
        needed = self.num_needed
        if needed is None:
            return f"{text}; no number of images like these would decide"
        return f"{text}; about {needed:,} images would decide"

    def to_json(self) -> dict:
        """The estimate and its interval, fractions, and how many images would decide."""
        low, high = self.found.interval
        value: dict = {"value": self.found.value, "low": low, "high": high}
        if self.status == "not_decided":
            value["images_to_decide"] = self.num_needed
        return value

    def _status(self, found):
        low, high = found.interval
        if self.least <= low and high <= self.most:
            return "pass"
        return "fail" if high < self.least or low > self.most else "not_decided"

    def _allowed(self):
        least, most = _number(self.least), _number(self.most)
        if math.isinf(self.least):
            return f"at most {most} allowed"
        return f"at least {least} needed" if math.isinf(self.most) else f"{least} to {most} allowed"


def decide(found: Found, *, least: float = -math.inf, most: float = math.inf) -> Decision:
    """Judge a proportion or a difference by the smallest and the largest value allowed."""
    return Decision(found, least, most)


def accuracies(correct: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Fractions of (N,) bool, by name."""
    return {name: float(np.mean(found)) for name, found in correct.items()}


def percent(share) -> str:
    """A fraction, or that of (N,) bool, in per cent."""
    return f"{100 * np.mean(share):.1f} %"


def as_points(share: float) -> str:
    """A difference of fractions in words, as a threshold is written."""
    return f"{100 * share:g} point{'s' if share != 0.01 else ''}"


def in_points(found: Found) -> str:
    """An estimate and its interval, in per cent or, for a difference, in points."""
    return with_interval(found, " points" if isinstance(found, PairedDifference) else " %")


def with_interval(found: Found, unit: str = "", *, sign: str = "") -> str:
    """An estimate, a unit and the interval, times 100; "+" as `sign` for one on every number."""
    # No minus in front of a zero.
    value, low, high = (
        f"{round(100 * share, 1) + 0.0:{sign}.1f}".replace("-", "−")
        for share in (found.value, *found.interval)
    )
    return f"{value}{unit} [{low}, {high}]"


def overall(decisions: Iterable[Decision]) -> str:
    """The status of a test of several: "fail" if one fails, "pass" if all pass."""
    statuses = {decision.status for decision in decisions}
    return next((s for s in ("fail", "not_decided") if s in statuses), "pass")


def _number(fraction):
    return f"{round(100 * fraction, 2):g}".replace("-", "−")
