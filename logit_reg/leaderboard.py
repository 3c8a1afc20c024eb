"""A page that ranks networks by the cards that stand with their checkpoints."""

from collections.abc import Mapping
from pathlib import Path

from logit_reg import html_page
from logit_reg.files import read_json, write_text
from logit_reg.report import NOT_MEASURED, Table

_CARD = "model_card.json"
_INTRODUCTION = (
    "Networks ranked by what AutoAttack leaves of their accuracy. The claim is the lowest accuracy "
    "under any other attack of the same threat model: where it stands far above AutoAttack, a "
    "weaker attack flatters the network. Every number is counted from a per-example ledger that "
    "stands with the checkpoint."
)


def read_cards(folder: Path | str) -> list[dict]:
    """The model cards below a folder, as `export_checkpoint.py` writes them.

    Args:
        folder: of checkpoints; each card is `NAME/model_card.json`.

    Returns:
        The cards by data set, then AutoAttack accuracy, the highest first, those without last.

    Raises:
        ValueError: if there is none, or one is not what this project writes.
    """
    paths = sorted(Path(folder).glob(f"*/{_CARD}"))
    if not paths:
        raise ValueError(f"{folder}: holds no */{_CARD}; export_checkpoint.py writes them.")
    cards = [_read_card(path) for path in paths]
    return sorted(
        cards,
        key=lambda card: (
            card["dataset"],
            -_or(card["autoattack_acc"], -1),
            -_or(card["reported"], -1),
        ),
    )


def leaderboard_tables(cards: list[dict]) -> list[tuple[str, Table]]:
    """A table for each threat model.

    Args:
        cards: from `read_cards`.

    Returns:
        Titles such as "mnist, Linf 0.3", and tables.
    """
    threats: dict[str, list[dict]] = {}
    for card in cards:
        title = f"{card['dataset']}, {card['norm']} {card['eps']:.4g} on [0, 1]"
        threats.setdefault(title, []).append(card)
    columns = ("network", "clean", "claim", "AutoAttack", "claim -\nAutoAttack", "n", "extra data")
    caption = (
        "Accuracy in per cent; the claim names its protocol; n: images under AutoAttack, or under "
        "the claim's protocol where it was not run."
    )
    return [
        (title, Table(columns, tuple(map(_row, of_threat)), caption))
        for title, of_threat in threats.items()
    ]


def write_leaderboard(path: Path | str, folder: Path | str) -> None:
    """Write the page.

    Args:
        path: HTML file.
        folder: of checkpoints with their cards.

    Raises:
        ValueError: as `read_cards`.
    """
    cards = read_cards(folder)
    parts = [html_page.heading("What is left under AutoAttack", _INTRODUCTION)]
    parts += [
        html_page.section(title, table.to_html()) for title, table in leaderboard_tables(cards)
    ]
    provenance = [html_page.details(card["name"], html_page.json_block(card)) for card in cards]
    parts.append(html_page.section("Cards", "\n".join(provenance)))
    write_text(path, html_page.document("Leaderboard", "\n".join(parts)))


def _row(card):
    claim, strong = card["reported"], card["autoattack_acc"]
    gap = None if None in (claim, strong) else claim - strong
    named = f" ({card['reported_protocol']})" if claim is not None else ""
    wanted = "autoattack" if strong is not None else card["reported_protocol"]
    sizes = [e["num_examples"] for e in card["evaluations"] if e["protocol"] == wanted]
    extra = {None: "unknown", True: "yes", False: "no"}[card["additional_data"]]
    return (
        card["name"],
        _show(card["clean_acc"]),
        _show(claim) + named,
        _show(strong),
        _show(gap),
        str(sizes[0]) if sizes else NOT_MEASURED,
        extra,
    )


def _read_card(path):
    card = read_json(path)
    number = (int, float, type(None))
    kinds: Mapping[str, tuple[type, ...]] = {
        "name": (str,),
        "dataset": (str,),
        "norm": (str,),
        "eps": (int, float),
        "clean_acc": number,
        "reported": number,
        "autoattack_acc": number,
        "reported_protocol": (str, type(None)),
        "additional_data": (bool, type(None)),
        "evaluations": (list,),
    }
    for name, kind in kinds.items():
        if name not in card or not isinstance(card[name], kind):
            raise ValueError(
                f"{path}: {name} is {card.get(name)!r}; it is no card of export_checkpoint.py."
            )
    for entry in card["evaluations"]:
        if not isinstance(entry, dict) or not {"protocol", "num_examples"} <= entry.keys():
            raise ValueError(f"{path}: its evaluations are not those of export_checkpoint.py.")
    return card


def _show(value):
    return NOT_MEASURED if value is None else f"{value:.1f}"


def _or(value, default):
    return default if value is None else value
