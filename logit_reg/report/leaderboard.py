"""A page that ranks networks by the model cards beside their checkpoints."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from logit_reg.audit.decisions import with_interval
from logit_reg.evaluation.ledger import Ledger, mapping, read_ledger
from logit_reg.evaluation.statistics import PairedDifference
from logit_reg.files import read_json, write_text
from logit_reg.report import html as html_page
from logit_reg.report.compare import shared_rows
from logit_reg.report.tables import NOT_MEASURED, Table, notices_of

_CARD = "model_card.json"
_INTRODUCTION = (
    "Networks ranked by what AutoAttack leaves of their accuracy. The claim is the lowest accuracy "
    "under any other attack of the same threat model: where it is far above AutoAttack, a "
    "weaker attack flatters the network. Every number is counted from a per-example ledger; the "
    "difference of the two is that on the images which both attacks saw."
)
_MARK = "*"
_AUTOATTACK = "autoattack"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network of the leaderboard."""

    card: dict
    """Content of its `model_card.json`."""
    evaluations: tuple[tuple[Ledger, dict], ...] = ()
    """Ledgers of this very network from beside the card, with their `result.json`."""

    def evaluation_of(self, protocol: str | None) -> tuple[Ledger, dict, np.ndarray] | None:
        """The ledger that the card's accuracy under a protocol comes from, if it is here.

        Returns:
            The ledger, its `result.json`, and (N,) bool: right under the protocol's attacks.
        """
        listed = [found for found in self.card["evaluations"] if found["protocol"] == protocol]
        for ledger, result in self.evaluations:
            for found in listed:
                attacks = found.get("attacks")
                if (
                    protocol in mapping(result.get("protocols"))
                    and found["num_examples"] == len(ledger.index)
                    and isinstance(attacks, list)
                    and ledger.correct.keys() >= set(attacks)
                ):
                    right = ledger.right_under(attacks)
                    if found.get("accuracy") == round(100 * float(np.mean(right)), 4):
                        return ledger, result, right
        return None

    @property
    def gap(self) -> PairedDifference | None:
        """What AutoAttack takes of what the claim's protocol leaves, on the images of both.

        None where one of the ledgers is missing, or they have no image in common.
        """
        claimed = self.evaluation_of(self.card["reported_protocol"])
        strong = self.evaluation_of(_AUTOATTACK)
        if claimed is None or strong is None:
            return None
        try:
            rows, rows_strong = shared_rows(claimed[:2], strong[:2])
        except ValueError:
            return None
        return PairedDifference.of(claimed[2][rows], strong[2][rows_strong])

    def notices(self, protocol: str | None) -> list[str]:
        """What the evaluation under a protocol says of its own numbers."""
        found = self.evaluation_of(protocol)
        return [] if found is None else notices_of(found[1])


def read_cards(folder: Path | str) -> list[Entry]:
    """The model cards below a folder, as `export_checkpoint.py` writes them, and their ledgers.

    Args:
        folder: of checkpoints; each card is `NAME/model_card.json`, beside folders of evaluations.

    Returns:
        The networks by data set, then AutoAttack accuracy, the highest first, those without last.

    Raises:
        ValueError: if there is none, or one is not what this project writes.
    """
    paths = sorted(Path(folder).glob(f"*/{_CARD}"))
    if not paths:
        raise ValueError(f"{folder}: holds no */{_CARD}; export_checkpoint.py writes them.")
    entries = [_read_entry(path) for path in paths]
    return sorted(
        entries,
        key=lambda entry: (
            entry.card["dataset"],
            -_or(entry.card["autoattack_acc"], -1),
            -_or(entry.card["reported"], -1),
        ),
    )


def leaderboard_tables(entries: list[Entry]) -> list[tuple[str, Table]]:
    """A table for each threat model.

    Args:
        entries: from `read_cards`.

    Returns:
        Titles such as "mnist, Linf 0.3", and tables.
    """
    threats: dict[str, list[Entry]] = {}
    for entry in entries:
        card = entry.card
        title = f"{card['dataset']}, {card['norm']} {card['eps']:.4g} on [0, 1]"
        threats.setdefault(title, []).append(entry)
    columns = (
        "network",
        "clean",
        "claim",
        "AutoAttack",
        "claim − AutoAttack,\nsame images [95 %]",
        "extra data",
    )
    caption = (
        "Accuracy in per cent, n: number of images; the claim names its protocol. Brackets: paired "
        "score interval (Tango 1998) of the difference on the images that both attacks saw; "
        f"{NOT_MEASURED} where a ledger is missing or there are no such images."
    )
    return [
        (title, Table(columns, tuple(map(_row, of_threat)), caption, _notes(of_threat)))
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
    entries = read_cards(folder)
    parts = [html_page.heading("What is left under AutoAttack", _INTRODUCTION)]
    parts += [
        html_page.section(title, table.to_html()) for title, table in leaderboard_tables(entries)
    ]
    provenance = [
        html_page.details(entry.card["name"], html_page.json_block(entry.card)) for entry in entries
    ]
    parts.append(html_page.section("Cards", "\n".join(provenance)))
    write_text(path, html_page.document("Leaderboard", *parts))


def _row(entry):
    card = entry.card
    extra = {None: "unknown", True: "yes", False: "no"}[card["additional_data"]]
    claimed_by = card["reported_protocol"]
    gap = entry.gap
    cell = NOT_MEASURED if gap is None else f"{with_interval(gap)} (n = {gap.num_examples:,})"
    return (
        f"{card['name']}{_MARK if notices_of(card) else ''}",
        _show(card["clean_acc"]),
        _robust(entry, card["reported"], claimed_by, named=True),
        _robust(entry, card["autoattack_acc"], _AUTOATTACK),
        cell,
        extra,
    )


def _robust(entry, accuracy, protocol, *, named=False):
    """An accuracy with its number of images, marked where the evaluation has a notice."""
    if accuracy is None:
        return NOT_MEASURED
    sizes = [e["num_examples"] for e in entry.card["evaluations"] if e["protocol"] == protocol]
    words = [protocol] if named else []
    words += [f"n = {size:,}" for size in sizes[:1]]
    mark = _MARK if set(entry.notices(protocol)) - set(notices_of(entry.card)) else ""
    return f"{_show(accuracy)}{mark}" + (f" ({', '.join(words)})" if words else "")


def _notes(entries):
    notes = []
    for entry in entries:
        of_network = notices_of(entry.card)
        told = [("", notice) for notice in of_network]
        for protocol in dict.fromkeys((entry.card["reported_protocol"], _AUTOATTACK)):
            # What is said of a network is not said again of each evaluation.
            new = [notice for notice in entry.notices(protocol) if notice not in of_network]
            told += [(f", {protocol}", notice) for notice in new]
        notes += [f"{_MARK} {entry.card['name']}{where}: {notice}" for where, notice in told]
    return tuple(notes)


def _read_entry(path):
    card = _read_card(path)
    found = [read_ledger(result.parent) for result in sorted(path.parent.glob("*/result.json"))]
    key = card.get("network_sha256")
    of_network = (
        pair for pair in found if mapping(pair[1].get("settings")).get("network_sha256") == key
    )
    return Entry(card, tuple(of_network) if key is not None else ())


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
