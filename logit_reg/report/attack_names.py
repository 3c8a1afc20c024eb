"""What attacks are called in figures, and the colour and place that each of them keeps."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from logit_reg.report.style import COLORS, LINE_STYLES

CLEAN = "clean"

_LOSSES = {"xent": "xent", "cw": "CW", "dlr": "DLR", "ce": "CE"}
_WORDS = {
    "autoattack": "AutoAttack",
    "autoattack-l2": "AutoAttack, l2",
    "autoattack-l1": "AutoAttack, l1",
    "autoattack-rand": "AutoAttack, rand",
    "adaptive": "adaptive",
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
}
# From the weakest to the strongest, as legends and tables list them.
_FAMILIES = (CLEAN, "FGSM", "PGD", "PGD, xent", "PGD, CW", "", "AutoAttack")


def attack_title(attacks: Sequence[str]) -> str:
    """What to call the worst case of some attacks.

    Args:
        attacks: their names in a ledger; none for the clean accuracy.

    Returns:
        Such as "FGSM", "PGD-40", "PGD-40, CW" or "AutoAttack"; names that are not the project's
        own stay as they are.
    """
    if not attacks:
        return CLEAN
    for pattern in (r"(fgsm)-(\w+)", r"(pgd\d{1,5})-(\w+)"):
        found = [re.fullmatch(pattern, name) for name in attacks]
        methods = {match[1] for match in found if match}
        if all(found) and len(methods) == 1 and {m[2] for m in found if m} == {"xent", "cw"}:
            return _method(methods.pop())
    return " + ".join(map(_one, attacks))


def in_order(titles: Iterable[str]) -> list[str]:
    """Titles from the weakest attack to the strongest, each once."""
    return sorted(dict.fromkeys(titles), key=lambda title: (_place(title), _numbers(title), title))


def line_styles(titles: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line style by title: those of a family are the same in every figure."""
    places: dict[str, int] = {}
    for title in in_order(titles):
        place = _place(title)
        # A second one of the same family takes the next that is free.
        while place in places.values() and len(places) < len(COLORS):
            place = (place + 1) % len(COLORS)
        places[title] = place
    return {
        title: (COLORS[place], LINE_STYLES[place % len(LINE_STYLES)])
        for title, place in places.items()
    }


def _method(name):
    return re.sub(r"(?<=[A-Z])(\d)", r"-\1", name.upper())


def _one(name):
    if name in _WORDS:
        return _WORDS[name]
    match = re.fullmatch(r"(?:(l2|madry)-)?(fgsm|pgd\d{1,5})-(xent|cw|dlr)(?:-x(\d{1,5}))?", name)
    if match is None:
        return name
    kind, method, loss, restarts = match.groups()
    words = [_method(method), _LOSSES[loss]]
    words += [f"{restarts} restarts"] if restarts else []
    words += [{"l2": "l2", "madry": "as Madry"}[kind]] if kind else []
    return ", ".join(words)


def _place(title):
    """Place of a title's family in `_FAMILIES`."""
    family = re.sub(r"-\d+", "", title)
    if family.startswith("AutoAttack"):
        family = "AutoAttack"
    return _FAMILIES.index(family if family in _FAMILIES else "")


def _numbers(title):
    return [int(number) for number in re.findall(r"\d+", title)]
