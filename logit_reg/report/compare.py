"""Two evaluations on the same images: paired differences, their intervals, McNemar's test."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from logit_reg.audit.decisions import with_interval
from logit_reg.evaluation.ledger import Ledger, is_same_attack, mapping
from logit_reg.evaluation.statistics import PairedDifference
from logit_reg.report.runs import Run
from logit_reg.report.tables import Table, notices_of, shown_evaluations, strongest


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two evaluations, A and B, say of the images that both of them saw."""

    differences: dict[str, PairedDifference]
    """By what was measured: "clean", an attack, "worst case"."""
    num_a: int
    """Images of A, those that B did not see included."""
    num_b: int
    notices: tuple[str, ...] = ()
    """What the two say of their own numbers, with "A: " or "B: " in front."""

    @property
    def num_examples(self) -> int:
        """Images that both saw."""
        return self.differences["clean"].num_examples


def compare(a: tuple[Ledger, Mapping], b: tuple[Ledger, Mapping]) -> Comparison:
    """Paired differences between two evaluations, on the images that both saw.

    Args:
        a: ledger and content of `result.json`, as `read_ledger` returns them.
        b: the same of the other evaluation.

    Returns:
        Differences of the clean accuracy, under each attack that both ran with the same settings
        on all images that are right clean, and under the worst of these; where there is none, of
        what each is left with under all of its own attacks.

    Raises:
        ValueError: if the two have no image in common.
    """
    (ledger_a, result_a), (ledger_b, result_b) = a, b
    rows_a, rows_b = shared_rows(a, b)
    attacks_a, attacks_b = _attacks(result_a), _attacks(result_b)
    common = [
        name
        for name in ledger_a.correct
        if name in ledger_b.correct
        and attacks_a.get(name) is not None
        and is_same_attack(attacks_a[name], attacks_b.get(name))
    ]
    pairs = {"clean": (ledger_a.clean, ledger_b.clean)}
    pairs |= {name: (ledger_a.correct[name], ledger_b.correct[name]) for name in common}
    if len(common) > 1:
        pairs["worst case"] = (ledger_a.right_under(common), ledger_b.right_under(common))
    if not common:
        pairs["worst case, each of its own attacks"] = (ledger_a.robust, ledger_b.robust)
    return Comparison(
        differences={
            name: PairedDifference.of(right_a[rows_a], right_b[rows_b])
            for name, (right_a, right_b) in pairs.items()
        },
        num_a=len(ledger_a.index),
        num_b=len(ledger_b.index),
        notices=tuple(
            f"{name}: {notice}"
            for name, result in (("A", result_a), ("B", result_b))
            for notice in notices_of(result)
        ),
    )


def comparison_table(comparison: Comparison, dataset: str) -> Table:
    """The differences as a table, accuracies in per cent."""
    num_examples = comparison.num_examples
    rows = []
    for name, found in comparison.differences.items():
        shares = (100 * count / num_examples for count in (found.correct_a, found.correct_b))
        rows.append(
            (
                name,
                *(f"{share:.1f}" for share in shares),
                with_interval(found, sign="+"),
                str(found.only_a),
                str(found.only_b),
                f"{found.p_value:.2g}",
            )
        )
    images = f"the same {num_examples:,} images of {dataset}"
    if (comparison.num_a, comparison.num_b) != (num_examples, num_examples):
        images = (
            f"the {num_examples:,} images of {dataset} that both saw, of the "
            f"{comparison.num_a:,} of A and the {comparison.num_b:,} of B"
        )
    return Table(
        columns=(
            "attack",
            "A",
            "B",
            "A − B\n[95 %]",
            "right in\nA alone",
            "right in\nB alone",
            "p",
        ),
        rows=tuple(rows),
        caption=(
            f"Accuracy in per cent on {images}. Brackets: paired score interval (Tango 1998); p: "
            "McNemar's exact test. They speak of these two networks, not of other seeds of their "
            "training."
        ),
        notes=comparison.notices,
    )


def pair_to_compare(places: Sequence[tuple[Path, Run]]) -> list[Path] | None:
    """Two evaluations on the same images: the strongest of two runs, else two of one run.

    Args:
        places: the folder of each run, and the run.

    Returns:
        Their folders, if there are two.
    """
    strong = [
        (folder / name, evaluation, evaluation.label)
        for folder, run in places
        for name, evaluation in shown_evaluations(run).items()
        if strongest(run) is evaluation
    ]
    candidates = [strong]
    # Of one run, the attacks differ: each evaluation stands for its own.
    candidates += [
        [(folder / name, evaluation, "") for name, evaluation in shown_evaluations(run).items()]
        for folder, run in places
    ]
    for found in candidates:
        for (path_a, a, label_a), (path_b, b, label_b) in itertools.combinations(found, 2):
            on_same = a.dataset == b.dataset and np.array_equal(a.ledger.index, b.ledger.index)
            if on_same and label_a == label_b:
                return [path_a, path_b]
    return None


def shared_rows(a: tuple[Ledger, Mapping], b: tuple[Ledger, Mapping]):
    """Where two evaluations have the same images.

    Args:
        a: ledger and content of `result.json`.
        b: the same of the other evaluation.

    Returns:
        (M,) int rows of the first ledger and (M,) of the second, by the images' places in the
        data set.

    Raises:
        ValueError: if the two have no image in common, or are of different data.
    """
    (ledger_a, result_a), (ledger_b, result_b) = a, b
    if result_a.get("dataset") != result_b.get("dataset"):
        raise ValueError(
            f"A was evaluated on {result_a.get('dataset')}, B on {result_b.get('dataset')}; a "
            f"paired difference needs the same images."
        )
    fields = {"canonical": "one of them is not the original test set"}
    if np.array_equal(ledger_a.index, ledger_b.index):
        # A hash is of all images of an evaluation together.
        fields["images_sha256"] = "the pixels of the images differ"
    for name, meaning in fields.items():
        values = [mapping(result.get("settings")).get(name) for result in (result_a, result_b)]
        if None not in values and values[0] != values[1]:
            raise ValueError(f"A and B were evaluated on different images: {meaning}.")
    shared, rows_a, rows_b = np.intersect1d(ledger_a.index, ledger_b.index, return_indices=True)
    if not len(shared):
        raise ValueError(
            f"A has {len(ledger_a.index)} images and B {len(ledger_b.index)}, none of them in "
            f"common; evaluate both on the same part of the data set."
        )
    if (ledger_a.label[rows_a] != ledger_b.label[rows_b]).any():
        raise ValueError("A and B give the same images different labels; they are not the same.")
    return rows_a, rows_b


def _attacks(result):
    """Settings of each attack that saw every image that is right clean, by name."""
    if mapping(result.get("settings")).get("worst_case_only"):
        return {}
    try:
        eot = mapping(result.get("settings")).get("eot", 1)
        return {
            # Averaged over other numbers of passes it is another attack.
            name: {"eot": eot, "settings": attack["settings"]}
            for protocol in result["protocols"].values()
            for name, attack in protocol["attacks"].items()
            if attack["settings"] is not None
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "a result.json is not as this version writes it; evaluate again."
        ) from error
