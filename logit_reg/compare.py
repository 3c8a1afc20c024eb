"""Two evaluations on the same images: paired differences, their intervals, McNemar's test."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from logit_reg.ledger import Ledger
from logit_reg.report import Table

_Z = 1.959963984540054
_BISECTIONS = 60


@dataclasses.dataclass(frozen=True)
class Difference:
    """How many of N images two networks, A and B, have right, and each alone."""

    name: str
    """What was measured: "clean", an attack, "worst case"."""
    num_examples: int
    num_correct_a: int
    num_correct_b: int
    only_a: int
    """Images that A has right and B wrong."""
    only_b: int

    @property
    def percent(self) -> float:
        """Accuracy of A minus that of B, in points."""
        return 100 * (self.only_a - self.only_b) / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, in points."""
        low, high = paired_interval(self.only_a, self.only_b, self.num_examples)
        return 100 * low, 100 * high

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar(self.only_a, self.only_b)


def compare(a: tuple[Ledger, Mapping], b: tuple[Ledger, Mapping]) -> list[Difference]:
    """Paired differences between two evaluations.

    Args:
        a: ledger and content of `result.json`, as `read_ledger` returns them.
        b: the same of the other evaluation.

    Returns:
        Differences of the clean accuracy, under each attack that both ran with the same settings
        on all images that are right clean, and under the worst of these; where there is none, of
        what each is left with under all of its own attacks.

    Raises:
        ValueError: if the two are not about the same images.
    """
    (ledger_a, result_a), (ledger_b, result_b) = a, b
    _check_same_images(ledger_a, result_a, ledger_b, result_b)
    attacks_a, attacks_b = _attacks(result_a), _attacks(result_b)
    common = [
        name
        for name in ledger_a.correct
        if name in ledger_b.correct and attacks_a.get(name) == attacks_b.get(name) is not None
    ]
    pairs = [("clean", ledger_a.clean, ledger_b.clean)]
    pairs += [(name, ledger_a.correct[name], ledger_b.correct[name]) for name in common]
    if len(common) > 1:
        worst = [
            np.all([ledger.correct[name] for name in common], 0) for ledger in (ledger_a, ledger_b)
        ]
        pairs.append(("worst case", *worst))
    if not common:
        pairs.append(("worst case, each of its own attacks", ledger_a.robust, ledger_b.robust))
    return [
        Difference(
            name,
            len(right_a),
            int(right_a.sum()),
            int(right_b.sum()),
            int((right_a & ~right_b).sum()),
            int((right_b & ~right_a).sum()),
        )
        for name, right_a, right_b in pairs
    ]


def comparison_table(differences: list[Difference], dataset: str) -> Table:
    """The differences as a table, accuracies in per cent."""
    num_examples = differences[0].num_examples
    rows = []
    for found in differences:
        low, high = found.interval
        shares = (
            100 * count / num_examples for count in (found.num_correct_a, found.num_correct_b)
        )
        rows.append(
            (
                found.name,
                *(f"{share:.1f}" for share in shares),
                f"{found.percent:+.1f} [{low:+.1f}, {high:+.1f}]",
                str(found.only_a),
                str(found.only_b),
                f"{found.p_value:.2g}",
            )
        )
    return Table(
        columns=(
            "attack",
            "A",
            "B",
            "A - B\n[95 %]",
            "right in\nA alone",
            "right in\nB alone",
            "p",
        ),
        rows=tuple(rows),
        caption=(
            f"Accuracy in per cent on the same {num_examples} images of {dataset}. Brackets: "
            "paired score interval (Tango 1998); p: McNemar's exact test. They speak of these two "
            "networks, not of other seeds of their training."
        ),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Args:
        only_a: pairs in which A alone is right.
        only_b: pairs in which B alone is right.

    Returns:
        Probability, if each of these pairs were decided by a fair coin, of a count at least as
        far from the middle.
    """
    num = only_a + only_b
    tail = sum(math.comb(num, i) for i in range(min(only_a, only_b) + 1))
    # Integers until here: 2^num is beyond a float from 1024 pairs on.
    return min(1.0, 2 * tail / 2**num)


def paired_interval(only_a: int, only_b: int, num_examples: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares.

    Args:
        only_a: pairs in which A alone is right.
        only_b: pairs in which B alone is right.
        num_examples: number of pairs.

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


def _check_same_images(ledger_a, result_a, ledger_b, result_b):
    if result_a.get("dataset") != result_b.get("dataset"):
        raise ValueError(
            f"A was evaluated on {result_a.get('dataset')}, B on {result_b.get('dataset')}; a "
            f"paired difference needs the same images."
        )
    for name, meaning in (
        ("images_sha256", "the pixels of the images differ"),
        ("canonical", "one of them is not the original test set"),
    ):
        values = [_settings(result).get(name) for result in (result_a, result_b)]
        if None not in values and values[0] != values[1]:
            raise ValueError(f"A and B were evaluated on different images: {meaning}.")
    num_a, num_b = len(ledger_a.index), len(ledger_b.index)
    if num_a != num_b or (ledger_a.index != ledger_b.index).any():
        shared = len(np.intersect1d(ledger_a.index, ledger_b.index))
        raise ValueError(
            f"A has {num_a} images and B {num_b}, {shared} of them in common; evaluate both with "
            f"the same --num_eval_examples."
        )
    if (ledger_a.label != ledger_b.label).any():
        raise ValueError("A and B give the same images different labels; they are not the same.")


def _attacks(result):
    """Settings of each attack that saw every image that is right clean, by name."""
    if _settings(result).get("worst_case_only"):
        return {}
    try:
        return {
            name: attack["settings"]
            for protocol in result["protocols"].values()
            for name, attack in protocol["attacks"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "a result.json is not as this version writes it; evaluate again."
        ) from error


def _settings(result):
    settings = result.get("settings")
    return settings if isinstance(settings, dict) else {}
