"""Intervals of differences between two accuracies on the same images."""

import dataclasses
import math

import numpy as np

from logit_reg.evaluation import wilson_interval


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much of the accuracy under one attack another one takes, image by image."""

    value: float
    """Accuracy under the first minus accuracy under the second, a fraction."""
    low: float
    """Lower end of the paired 95 % interval."""
    high: float
    """Upper end of the paired 95 % interval."""

    def exceeds(self, threshold: float) -> bool:
        """Whether the gap is above a threshold for all that chance may have done."""
        return self.low > threshold

    def to_json(self) -> dict:
        """The three numbers by name."""
        return dataclasses.asdict(self)


def paired_gap(first: np.ndarray, second: np.ndarray) -> Gap:
    """The difference of two proportions measured on the same examples.

    Args:
        first: (N,) bool, such as who stands under the weaker attack.
        second: (N,) bool, such as who stands under the stronger one.

    Returns:
        The difference of their means with its 95 % interval.

    Source:
        Newcombe 1998, "Improved confidence intervals for the difference between binomial
        proportions based on paired data", method 10 (square-and-add of Wilson intervals). It
        stays honest with few examples and where an attack takes nothing at all.
    """
    total = len(first)
    both, only_first = int(np.sum(first & second)), int(np.sum(first & ~second))
    only_second, neither = int(np.sum(~first & second)), int(np.sum(~first & ~second))
    share_1, share_2 = (both + only_first) / total, (both + only_second) / total
    low_1, high_1 = wilson_interval(both + only_first, total)
    low_2, high_2 = wilson_interval(both + only_second, total)

    correlation = 0.0
    margins = (both + only_first) * (only_second + neither)
    margins *= (both + only_second) * (only_first + neither)
    if margins:
        association = both * neither - only_first * only_second
        # The continuity correction of the method.
        corrected = max(association - total / 2, 0.0) if association > 0 else association
        correlation = corrected / math.sqrt(margins)

    def length(a, b):
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    value = (only_first - only_second) / total
    low = value - length(share_1 - low_1, high_2 - share_2)
    high = value + length(high_1 - share_1, share_2 - low_2)
    return Gap(value, low, high)
