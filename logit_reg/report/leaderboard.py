"""A page that ranks networks by the cards that stand with their checkpoints."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from logit_reg.evaluation.ledger import Ledger, read_ledger
from logit_reg.evaluation.statistics import PairedDifference
from logit_reg.files import read_json, write_text
from logit_reg.report import html as html_page
from logit_reg.report.compare import right_under, shared_rows
from logit_reg.report.tables import NOT_MEASURED, Table, notices_of

_CARD = "model_card.json"
_INTRODUCTION = (
    "Networks ranked by what AutoAttack leaves of their accuracy. The claim is the lowest accuracy "
    "under any other attack of the same threat model: where it stands far above AutoAttack, a "
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
    """Ledgers of this very network that stand beside the card, with their `result.json`."""

    def evaluation_of(self, protocol: str | None) -> tuple[Ledger, dict] | None:
        """The ledger that the card's accuracy under a protocol comes from, if it is here."""
        listed = [found for found in self.card["evaluations"] if found["protocol"] == protocol]
        for ledger, result in self.evaluations:
            for found in listed:
                attacks = found.get("attacks")
                if (
                    protocol in _protocols(result)
                    and found["num_examples"] == len(ledger.index)
                    and isinstance(attacks, list)
                    and ledger.correct.keys() >= set(attacks)
                    and found.get("accuracy")
                    == round(100 * float(np.mean(right_under(ledger, attacks))), 4)
                ):
                    return ledger, result
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
            rows = shared_rows(claimed, strong)
        except ValueError:
            return None
        right = [
            right_under(ledger, self._attacks(protocol, ledger))[mine]
            for (ledger, _), protocol, mine in zip(
                (claimed, strong), (self.card["reported_protocol"], _AUTOATTACK), rows, strict=True
            )
        ]
        return PairedDifference.of(*right)

    def notices(self, protocol: str | None) -> list[str]:
        """What the evaluation under a protocol says of its own numbers."""
        found = self.evaluation_of(protocol)
        return [] if found is None else notices_of(found[1])

    def _attacks(self, protocol, ledger):
        (attacks,) = (
            found["attacks"]
            for found in self.card["evaluations"]
            if found["protocol"] == protocol and found["num_examples"] == len(ledger.index)
        )
        return attacks


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
    write_text(path, html_page.document("Leaderboard", "\n".join(parts)))


def _row(entry):
    card = entry.card
    extra = {None: "unknown", True: "yes", False: "no"}[card["additional_data"]]
    claimed_by = card["reported_protocol"]
    gap = entry.gap
    cell = NOT_MEASURED
    if gap is not None:
        value, low, high = (
            f"{100 * share:.1f}".replace("-", "−") for share in (gap.value, *gap.interval)
        )
        cell = f"{value} [{low}, {high}] (n = {gap.num_examples})"
    return (
        card["name"],
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
    words += [f"n = {size}" for size in sizes[:1]]
    mark = _MARK if entry.notices(protocol) else ""
    return f"{_show(accuracy)}{mark}" + (f" ({', '.join(words)})" if words else "")


def _notes(entries):
    return tuple(
        f"{_MARK} {entry.card['name']}, {protocol}: {notice}"
        for entry in entries
        for protocol in dict.fromkeys((entry.card["reported_protocol"], _AUTOATTACK))
        for notice in entry.notices(protocol)
    )


def _read_entry(path):
    card = _read_card(path)
    found = [read_ledger(result.parent) for result in sorted(path.parent.glob("*/result.json"))]
    key = card.get("network_sha256")
    return Entry(card, tuple(pair for pair in found if _network_of(pair[1]) == key is not None))


def _protocols(result):
    protocols = result.get("protocols")
    return protocols if isinstance(protocols, dict) else {}


def _network_of(result):
    settings = result.get("settings")
    return settings.get("network_sha256") if isinstance(settings, dict) else None


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
