"""Slices of one evaluation, made on several days or machines, joined to what one run gives."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from logit_reg.attacks.engine.checks import check_finite, check_square
from logit_reg.evaluation.ledger import (
    Ledger,
    evaluation_identity,
    mapping,
    pass_shares,
    read_ledger,
    read_rows,
    told_differences,
)
from logit_reg.evaluation.run import repeated_finding, unconfirmed_findings
from logit_reg.evaluation.statistics import Proportion
from logit_reg.files import one_line

BEFORE = "before"
"""Setting of a slice: hashes of the images and labels of the data set before it."""
UPTO = "upto"
"""Setting of a slice: hashes of the images and labels from the data set's first to its last."""
SLICE_NOTICE = "slice"
"""Name of the notice that a slice is a part of an evaluation."""

_DATA = ("images_sha256", "labels_sha256")
# What slices of one evaluation differ in.
_OWN = ("first_eval_example", "num_eval_examples", "images", "labels")
# Notices about all examples together: made anew from those of the joined ledger.
_OF_ALL = ("not_finite", "square_lowers", "repeated_passes", "unconfirmed")
# Those that stand after them: of the threat model, the steps and the training.
_LATE = ("budget_large", "budget_small", "step_size", "unfinished_run", "stopped_run")


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One part of an evaluation, read and checked."""

    folder: Path
    ledger: Ledger
    result: dict
    header: str
    rows: str

    @property
    def first(self) -> int:
        return int(self.ledger.index[0])

    @property
    def end(self) -> int:
        return self.first + len(self.ledger.index)

    @property
    def before(self):
        return self.result["settings"].get(BEFORE)

    @property
    def upto(self):
        settings = self.result["settings"]
        return settings.get(UPTO) or {name: settings.get(name) for name in _DATA}


def join_slices(folders: Sequence[Path]) -> tuple[str, dict]:
    """Join the ledgers of slices, in whichever order they are given.

    Args:
        folders: each with `ledger.csv` and `result.json`; together they hold the data set from its
            first image on, each image once.

    Returns:
        The text of the joined `ledger.csv`, row for row that of one run, and the content of
        `result.json`, but for the hash of that text. Passes and seconds are sums, in which the
        checks of each slice count; what else slices may differ in, such as versions, stands in
        "slices", and that of the first counts.

    Raises:
        ValueError: if a ledger is damaged, an image is missing or there twice, or two slices are of
            different evaluations.
    """
    parts = sorted(map(_read, folders), key=lambda part: part.first)
    _check_order(parts)
    for before, part in zip(parts, parts[1:], strict=False):
        _check_same(parts[0], part)
        if before.upto != part.before:
            raise ValueError(
                f"{part.folder}: the images before this slice are not those of {before.folder}; "
                f"both need the same data set."
            )
    try:
        return parts[0].header + "".join(part.rows for part in parts), _joined(parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{parts[0].folder / 'result.json'} and those of the other slices are not what this "
            f"version writes ({one_line(error)}); evaluate again."
        ) from error


def _read(folder) -> _Slice:
    ledger, result = read_ledger(folder)
    if "ledger_sha256" not in result:
        raise ValueError(
            f"{folder}: its result.json has no hash of the ledger; report.py --stamp adds it."
        )
    header, _, rows = read_rows(folder).partition("\n")
    first = int(ledger.index[0])
    is_whole = np.array_equal(ledger.index, first + np.arange(len(ledger.index)))
    if not is_whole or first != result.get("first_example", 0):
        raise ValueError(f"{folder}: its rows are not consecutive images; it is no slice.")
    if first and not isinstance(mapping(result.get("settings")).get(BEFORE), dict):
        raise ValueError(f"{folder}: does not say which images come before it; evaluate again.")
    return _Slice(folder, ledger, result, f"{header}\n", rows)


def _check_order(parts):
    if parts[0].first:
        raise ValueError(
            f"{_are(0, parts[0].first - 1)} missing: the first slice, {parts[0].folder}, begins at "
            f"{parts[0].first}."
        )
    for before, part in zip(parts, parts[1:], strict=False):
        if part.first > before.end:
            raise ValueError(
                f"{_are(before.end, part.first - 1)} missing between {before.folder} and "
                f"{part.folder}."
            )
        if part.first < before.end:
            last = min(before.end, part.end) - 1
            raise ValueError(
                f"{_are(part.first, last)} in {before.folder} and in {part.folder}; each may be "
                f"in one slice only."
            )


def _are(first, last):
    return f"image {first} is" if first == last else f"images {first} to {last} are"


def _check_same(one, other):
    identities = [
        {
            name: value
            for name, value in evaluation_identity(part.result).items()
            if name not in _OWN
        }
        for part in (one, other)
    ]
    # What one of the two does not say is a difference, too.
    names = {name: "unknown" for identity in identities for name in identity}
    differences = told_differences(*(names | identity for identity in identities))
    if not differences and one.header != other.header:
        differences = "other columns"
    if differences:
        raise ValueError(
            f"{other.folder} was made with other settings than {one.folder} ({differences}); all "
            f"slices need the same."
        )


def _joined(parts) -> dict:
    first, last = parts[0], parts[-1]
    text = io.StringIO(first.header + "".join(part.rows for part in parts))
    rows = list(csv.DictReader(text))
    columns = {
        name: np.array([row[name] == "1" for row in rows])
        for name in rows[0]
        if name == "robust" or name.startswith(("correct_", "standing_after_"))
    }
    clean = np.concatenate([part.ledger.clean for part in parts])
    robust = Proportion.of(columns["robust"])
    low, high = robust.interval
    result = {name: value for name, value in first.result.items() if name != "ledger_sha256"}
    settings = first.result["settings"] | last.upto
    differing = [
        name
        for name, value in settings.items()
        if name not in _DATA and any(part.result["settings"].get(name) != value for part in parts)
    ]
    result |= {
        "num_examples": len(rows),
        "clean_accuracy": float(np.mean(clean)),
        "robust_accuracy": float(np.mean(columns["robust"])),
        "interval": first.result["interval"] | {"low": low, "high": high},
        "protocols": {
            protocol: _joined_protocol(protocol, content, parts, columns)
            for protocol, content in first.result["protocols"].items()
        },
        "settings": settings,
        **_sums(part.result for part in parts),
        "slices": [entry for part in parts for entry in _entries(part, differing)],
    }
    share_right = None
    if "passes" in result:
        share_right = np.array([float(row["share_right"]) for row in rows])
        result["passes"] |= pass_shares(share_right)
    result["notices"] = _notices(parts, columns, clean, share_right)
    if differing:
        message = (
            f"the slices differ in {', '.join(differing)}: result.json has each one's own in "
            f'"slices".'
        )
        result["notices"].append(
            {"name": "slices_differ", "message": message, "value": len(differing)}
        )
    return result


def _joined_protocol(protocol, content, parts, columns):
    attacks = {}
    for name, attack in content["attacks"].items():
        theirs = [part.result["protocols"][protocol]["attacks"][name] for part in parts]
        # The ledger has no column of last iterates; shares of so many images are whole numbers.
        last = sum(
            round(their["accuracy_last_iterate"] * len(part.ledger.index))
            for their, part in zip(theirs, parts, strict=True)
        )
        correct = columns[f"correct_{name}"]
        attacks[name] = attack | {
            "accuracy": float(np.mean(correct)),
            "accuracy_last_iterate": last / len(correct),
            **_sums(theirs),
        }
    every = [columns[f"correct_{name}"] for name in attacks]
    robust = float(np.mean(np.all(every, axis=0)))
    return content | {"attacks": attacks, "robust_accuracy": robust}


def _sums(results: Iterable[dict]) -> dict:
    results = list(results)
    return {
        name: sum(result[name] for result in results)
        for name in ("forwards", "backwards", "seconds")
    }


def _entries(part, differing):
    """What is told of a slice, or of those that it was joined from."""
    own = {
        "first_eval_example": part.first,
        "num_eval_examples": len(part.ledger.index),
        "seconds": part.result["seconds"],
        "ledger_sha256": part.result["ledger_sha256"],
        **{name: part.result["settings"].get(name) for name in differing},
    }
    return part.result.get("slices") or [own]


def _notices(parts, columns, clean, share_right):
    kept: dict[tuple, dict] = {}
    counts = {"not_finite": 0, "unconfirmed": 0}
    for part in parts:
        for notice in part.result.get("notices", ()):
            if notice["name"] in counts:
                counts[notice["name"]] += int(notice["value"])
            elif notice["name"] not in (*_OF_ALL, SLICE_NOTICE):
                kept.setdefault((notice["name"], notice["message"]), notice)
    found = check_finite(np.arange(len(clean)) < counts["not_finite"])
    names = list(columns)
    for place, name in enumerate(names):
        if name.startswith("standing_after_") and name.endswith("square"):
            found += check_square(columns[names[place - 1]], [("square", columns[name])])
    if share_right is not None:
        found.append(repeated_finding(share_right))
        found += unconfirmed_findings(counts["unconfirmed"])
    early = [notice for notice in kept.values() if notice["name"] not in _LATE]
    late = [notice for notice in kept.values() if notice["name"] in _LATE]
    return [*early, *map(dataclasses.asdict, found), *late]
