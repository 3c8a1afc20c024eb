"""The table of verdicts: audits of networks of which the truth is known, fakes among them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logit_reg.audit.records import OF_THE_EVALUATION, VERDICTS, overstates
from logit_reg.files import read_json
from logit_reg.report.tables import NOT_MEASURED, Table

# What has to be left of a network for it to count as robust.
_ROBUST = 0.5


def audit_folders(folder: Path) -> list[Path]:
    """The folders of the audits at or below one; those of `order.txt` first, in its order."""
    found = sorted(path.parent for path in folder.rglob("audit.json"))
    order = folder / "order.txt"
    named = [folder / name for name in order.read_text().split()] if order.exists() else []
    return [*named, *(path for path in found if path not in named)]


def verdicts_table(folders: Sequence[Path]) -> Table:
    """A row for each audit: what was claimed, what is known, the verdict and what decided it.

    Args:
        folders: with `audit.json`; a row is named after its folder.

    Raises:
        ValueError: if a file is no audit.
    """
    rows = [_row(folder.name, folder / "audit.json") for folder in folders]
    return Table(
        columns=(
            "audit",
            "kind",
            "claim",
            "by",
            "known",
            "worst case\nof the audit",
            "verdict",
            "decided by",
            "failed\ntests",
            "the verdict is",
        ),
        rows=tuple(rows),
        caption=(
            f"Accuracy in per cent. Known: what the strongest attack leaves, on a fake one that "
            f"follows what is hidden. A network is robust if that is at least {100 * _ROBUST:g} %, "
            f"a claim false if it lies more than 10 points above it or is more than twice as high; "
            f"a fake is a network with a planted mask and a false claim. Wrong are HOLDS and NOT "
            f"REFUTED of a false claim and REFUTED and SUSPECT of a true one."
        ),
    )


def _row(name: str, path: Path) -> tuple[str, ...]:
    try:
        return _cells(name, read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: this is no audit.json of audit.py: {error!r}.") from error


def _cells(name: str, audit: Mapping[str, Any]) -> tuple[str, ...]:
    claim, verdict, worst = audit["claim"], audit["verdict"], audit["worst_case"]
    if verdict not in VERDICTS:
        raise KeyError(verdict)
    known = audit["settings"].get("known_accuracy")
    is_false = known is not None and overstates(claim, known)
    is_fake = "fake" in audit["settings"] and is_false
    kind = NOT_MEASURED
    if known is not None:
        kind = "fake" if is_fake else "robust" if known >= _ROBUST else "not robust"
    return (
        name,
        kind,
        _per_cent(claim),
        audit["claimed_by"] or NOT_MEASURED,
        NOT_MEASURED if known is None else _per_cent(known),
        f"{_per_cent(worst['accuracy'])} (n = {audit['num_examples']:,})",
        verdict,
        _decided_by(audit),
        ", ".join(map(str, audit["failed"])) or "none",
        NOT_MEASURED if known is None else _judged(verdict, is_false),
    )


def _decided_by(audit: Mapping[str, Any]) -> str:
    if audit["verdict"] == "REFUTED":
        return f"the worst case, most by {audit['worst_case']['strongest_attack']}"
    if audit["verdict"] == "NOT REFUTED":
        return f"undecided: {', '.join(map(str, audit['undecided'])) or 'none'}"
    status = "fail" if audit["verdict"] == "SUSPECT" else "pass"
    tests = [
        f"{test['number']} {test['name']}"
        for test in audit["tests"]
        if test["decisive"] and test["status"] == status
        if test["number"] not in OF_THE_EVALUATION or status == "pass"
    ]
    return "; ".join(tests)


def _judged(verdict: str, is_false: bool) -> str:
    if is_false:
        return {"HOLDS": "wrong", "NOT REFUTED": "wrong: missed"}.get(verdict, "right")
    return {"REFUTED": "wrong", "SUSPECT": "wrong: false alarm"}.get(verdict, "right")


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"
