"""Intervals and tests of proportions, and of the difference of two on the same examples."""

import dataclasses
import math

import numpy as np

LEVEL = 0.95
"""Confidence of every interval."""
_Z = 1.959963984540054
_BISECTIONS = 60


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Args:
        successes: number of successes.
        total: number of trials, at least 1.

    Returns:
        Lower and upper end, fractions; exactly 0 without a success, exactly 1 without a failure.

    Source:
        Wilson 1927; the interval that Brown, Cai and DasGupta 2001 recommend.
    """
    share, z = successes / total, _Z
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / total / 2) ** 2)
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == total else min(1.0, center + half)
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Args:
        only_a: pairs in which A alone is right.
        only_b: pairs in which B alone is right.

    Returns:
        Probability, if each of these pairs were decided by a fair coin, of a count at least as
        far from the middle.

    Source:
        McNemar 1947, with the binomial distribution in place of its approximation.
    """
    num = only_a + only_b
    tail = sum(math.comb(num, i) for i in range(min(only_a, only_b) + 1))
    # Integers until here: 2^num is beyond a float from 1024 pairs on.
    return min(1.0, 2 * tail / 2**num)


def paired_interval(only_a: int, only_b: int, num_examples: int) -> tuple[float, float]:
    """95 % interval of the difference of two proportions on the same examples.

    It asks for nothing but the examples on which the two differ, as McNemar's test does, and
    keeps a width where they differ on none.

    Args:
        only_a: examples that A alone has right.
        only_b: examples that B alone has right.
        num_examples: number of examples, at least 1.

    Returns:
        Differences A - B, as fractions, that the score test does not reject.

    Source:
        Tango, "Equivalence test and confidence interval for the difference in proportions for
        the paired-sample design", Statistics in Medicine 17, 1998.
    """
    estimate = (only_a - only_b) / num_examples

    def end(outside):
        inside = estimate
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            if abs(_score(middle, only_a, only_b, num_examples)) < _Z:
                inside = middle
            else:
                outside = middle
        return inside

    return end(-1.0), end(1.0)


@dataclasses.dataclass(frozen=True)
class Proportion:
    """A number of successes among a number of examples."""

    successes: int
    num_examples: int
    """At least 1."""

    @classmethod
    def of(cls, right: np.ndarray) -> "Proportion":
        """Of (N,) bool."""
        return cls(int(np.sum(right)), len(right))

    @property
    def value(self) -> float:
        """A fraction."""
        return self.successes / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval, fractions."""
        return wilson_interval(self.successes, self.num_examples)

    @property
    def percent(self) -> float:
        """In per cent."""
        return 100 * self.successes / self.num_examples

    @property
    def percent_interval(self) -> tuple[float, float]:
        """95 % Wilson interval, in per cent."""
        low, high = self.interval
        return 100 * low, 100 * high

    def scaled(self, num_examples: int) -> "Proportion":
        """About the same share of another number of examples."""
        factor = num_examples / self.num_examples
        return Proportion(round(self.successes * factor), num_examples)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How many of N examples A and B have right, and each alone."""

    correct_a: int
    correct_b: int
    only_a: int
    """Examples that A has right and B wrong."""
    only_b: int
    num_examples: int
    """At least 1."""

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> "PairedDifference":
        """Of two (N,) bool about the same examples, in the same order."""
        only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
        return cls(int(np.sum(a)), int(np.sum(b)), only_a, only_b, len(a))

    @property
    def value(self) -> float:
        """Share that A has right minus that of B."""
        return (self.only_a - self.only_b) / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, fractions; see `paired_interval`."""
        return paired_interval(self.only_a, self.only_b, self.num_examples)

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar(self.only_a, self.only_b)

    def scaled(self, num_examples: int) -> "PairedDifference":
        """About the same shares of another number of examples."""
        factor = num_examples / self.num_examples
        return PairedDifference(
            round(self.correct_a * factor),
            round(self.correct_b * factor),
            round(self.only_a * factor),
            round(self.only_b * factor),
            num_examples,
        )


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of one number in [0, 1] for each example, such as a share of its pixels."""

    value: float
    stddev: float
    """Of the examples."""
    num_examples: int
    """At least 1."""

    @classmethod
    def of(cls, values: np.ndarray) -> "Mean":
        """Of (N,) float."""
        # Of a single example the deviation is unknown: more than numbers in [0, 1] can have.
        stddev = float(np.std(values, ddof=1)) if len(values) > 1 else 1.0
        return cls(float(np.mean(values)), stddev, len(values))

    @property
    def interval(self) -> tuple[float, float]:
        """Normal 95 % interval."""
        half = _Z * self.stddev / math.sqrt(self.num_examples)
        return self.value - half, self.value + half

    def scaled(self, num_examples: int) -> "Mean":
        """The same mean of another number of examples."""
        return dataclasses.replace(self, num_examples=num_examples)


def _score(difference, only_a, only_b, num):
    """The score statistic for a difference; standard normal if it is the true one."""
    gap = only_a - only_b - num * difference
    # Largest root of the likelihood equation for the share of pairs in which B alone is right.
    b = -only_a - only_b + (2 * num - only_a + only_b) * difference
    c = -only_b * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 8 * num * c, 0.0)) - b) / (4 * num)
    variance = num * (2 * share + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(variance)
