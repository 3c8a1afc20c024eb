"""An evaluation on disk: `result.json` and the per-example `ledger.csv` it derives from."""

import csv
import dataclasses
import hashlib
import io
import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from logit_reg.attacks.engine.attack import Attack
from logit_reg.evaluation.run import NUM_VERDICT_PASSES, Evaluation
from logit_reg.evaluation.statistics import LEVEL, Proportion
from logit_reg.files import one_line, read_bytes, read_json, write_json, write_text

SCHEMA = 1
FLAGS_PROTOCOL = "flags"
"""Stands for a protocol where the attack was described by flags."""
_MAX_LEDGER_BYTES = 64 * 2**20
# Differences that a refusal lists.
_MOST_DIFFERENCES = 4
_SHA256_DIGITS = 64


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What `ledger.csv` holds: the verdict on each of N examples."""

    index: np.ndarray
    """(N,) int: places in the data set."""
    label: np.ndarray
    """(N,) int."""
    clean_prediction: np.ndarray
    """(N,) int."""
    robust: np.ndarray
    """(N,) bool: right under every attack."""
    broken_by: list[str]
    """"clean", the first attack that breaks the example, or ""."""
    distance: np.ndarray
    """(N,) float: distance of the worst-case image, pixel units."""
    correct: dict[str, np.ndarray]
    """(N,) bool for each attack."""

    @property
    def clean(self) -> np.ndarray:
        """(N,) bool: right without an attack."""
        return np.array([cause != "clean" for cause in self.broken_by])

    def right_under(self, attacks: Iterable[str]) -> np.ndarray:
        """(N,) bool: right without an attack and under each of these."""
        return np.all([self.clean, *(self.correct[name] for name in attacks)], axis=0)


def build_result(
    evaluation: Evaluation,
    protocols: Mapping[str, Mapping[str, Attack]],
    *,
    dataset: str,
    settings: dict,
    seed: int,
    first_example: int = 0,
) -> dict:
    """Everything that `result.json` says.

    Args:
        evaluation: of all attacks of the protocols.
        protocols: the attacks by protocol and name; names are those of the evaluation.
        dataset: name of the data set.
        settings: further provenance (network, versions, commit, ...).
        seed: of the evaluation.
        first_example: place of the first image in its data set.

    Returns:
        A JSON object; accuracies are fractions. "notices" holds the findings of the evaluation,
        each with "name", "message" and "value". Where repeated passes decide, "passes" has their
        number, the mean share of them that is right, and the share of images that is right in all.
    """
    planned = planned_result(
        protocols,
        dataset=dataset,
        num_examples=len(evaluation.labels),
        settings=settings,
        seed=seed,
        first_example=first_example,
    )
    low, high = Proportion.of(evaluation.robust).interval
    for protocol in planned["protocols"].values():
        correct = [evaluation.correct[name] for name in protocol["attacks"]]
        protocol["robust_accuracy"] = _share(np.all(correct, axis=0))
        for name, attack in protocol["attacks"].items():
            attack |= _numbers(evaluation.records[name])
    passes = {}
    if evaluation.share_right is not None:
        passes["passes"] = {
            "number": NUM_VERDICT_PASSES,
            **pass_shares(evaluation.share_right),
        }
    return {
        "schema": SCHEMA,
        **planned,
        **passes,
        "clean_accuracy": _share(evaluation.clean),
        "robust_accuracy": _share(evaluation.robust),
        "interval": {"level": LEVEL, "method": "wilson", "low": low, "high": high},
        "forwards": evaluation.forwards,
        "backwards": evaluation.backwards,
        "seconds": sum(record.seconds for record in evaluation.records.values()),
        "notices": [dataclasses.asdict(finding) for finding in evaluation.findings],
    }


def pass_shares(share_right: np.ndarray) -> dict[str, float]:
    """What "passes" of `result.json` says of the (N,) shares of repeated passes that are right."""
    return {"mean_right": _share(share_right), "always_right": _share(share_right == 1)}


def planned_result(
    protocols: Mapping[str, Mapping[str, Attack]],
    *,
    dataset: str,
    num_examples: int,
    settings: dict,
    seed: int,
    first_example: int = 0,
) -> dict:
    """What is known of `result.json` before the evaluation: all that decides its numbers.

    Args:
        protocols: the attacks by protocol and name.
        dataset: name of the data set.
        num_examples: how many images.
        settings: hashes of network, images and labels, what the attacks follow, ...
        seed: of the evaluation.
        first_example: place of the first image in its data set; above 0 in a slice.

    Returns:
        A part of what `build_result` gives, for `evaluation_identity` and `evaluation_name`.
    """
    return {
        "dataset": dataset,
        **({"first_example": first_example} if first_example else {}),
        "num_examples": num_examples,
        "protocols": {
            protocol: {
                "attacks": {
                    name: {"settings": attack_settings(attack)} for name, attack in attacks.items()
                }
            }
            for protocol, attacks in protocols.items()
        },
        "settings": settings,
        "seed": seed,
    }


def evaluation_identity(result: Mapping) -> dict:
    """Everything in a `result.json` that decides its numbers, by the name that people know.

    Two evaluations of the same identity are the same evaluation; what an older version did not
    write is left out.

    Args:
        result: content of `result.json`, or what `planned_result` gives.
    """
    settings = mapping(result.get("settings"))
    identity = {
        "dataset": result.get("dataset"),
        "first_eval_example": result.get("first_example", 0),
        "num_eval_examples": result.get("num_examples"),
        "random_seed": result.get("seed"),
        "network": settings.get("network_sha256"),
        "images": settings.get("images_sha256"),
        "labels": settings.get("labels_sha256"),
        "attack_dtype": settings.get("attack_dtype"),
        "worst_case_only": settings.get("worst_case_only"),
        "eot": settings.get("eot", 1),
        "attacks": " + ".join(attacks := _attacks_of(result)),
        "settings": attacks,
    }
    return {name: value for name, value in identity.items() if value is not None}


def evaluation_label(result: Mapping) -> str:
    """The protocols of an evaluation, with the threat model where it is the user's own.

    An attack of the flags is told by its settings, as "pgd40-xent-step0.01-linf0.1".

    Args:
        result: content of `result.json`, or what `planned_result` gives.
    """
    words = []
    is_own_data = "data" in mapping(result.get("settings"))
    for protocol, content in mapping(result.get("protocols")).items():
        attacks = mapping(mapping(content).get("attacks"))
        for name, attack in list(attacks.items())[:1]:
            settings = mapping(mapping(attack).get("settings"))
            threat = _threat(settings)
            if protocol == FLAGS_PROTOCOL:
                words += [name, *_step_words(settings), threat_word(threat)]
            elif is_own_data or name.endswith(threat_suffix(threat)):
                words += [protocol, threat_word(threat)]
            else:
                words.append(protocol)
    return "-".join(filter(None, words))


def threat_suffix(threat: Mapping) -> str:
    """What the name of a protocol's attack ends in where the threat model is not the protocol's.

    Args:
        threat: "norm" and "epsilon", pixel units.
    """
    epsilon = threat.get("epsilon")
    return f"-{threat.get('norm')}-{epsilon:g}" if isinstance(epsilon, int | float) else "-"


def evaluation_name(result: Mapping) -> str:
    """Name of the folder of an evaluation: its label, its number of images and what is unusual.

    That is a first image after that of the data set, a seed other than 0, the step of a network
    that is not trained to its end, an active set that attacks share, gradients averaged over
    passes, and another precision.

    Args:
        result: content of `result.json`, or what `planned_result` gives.
    """
    settings = mapping(result.get("settings"))
    words = [evaluation_label(result), f"n{result.get('num_examples')}"]
    if result.get("first_example"):
        words.append(f"from{result['first_example']}")
    if result.get("seed"):
        words.append(f"seed{result['seed']}")
    training = mapping(settings.get("training"))
    if training.get("steps_done") != training.get("steps_planned"):
        words.append(f"step{training.get('steps_done')}")
    if settings.get("worst_case_only"):
        words.append("worst-case-only")
    if settings.get("eot", 1) != 1:
        words.append(f"eot{settings['eot']}")
    if settings.get("attack_dtype", "float32") != "float32":
        words.append(str(settings["attack_dtype"]))
    return "-".join(words)


def told_differences(held: Mapping, wanted: Mapping) -> str:
    """The first few differences of two identities in words; empty if there are none.

    Args:
        held: settings of what is there, by name; what is unknown of it is left out.
        wanted: settings of what is to come.
    """
    found = _differences(held, json.loads(json.dumps(wanted)))
    more = len(found) - _MOST_DIFFERENCES
    return ", ".join(found[:_MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def _differences(held, wanted, prefix=""):
    found = []
    for name, value in wanted.items():
        before = held.get(name, value)
        if before == value:
            continue
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            found += _differences(before, value, f"{prefix}{name}.")
        elif isinstance(value, str) and len(value) == _SHA256_DIGITS:
            found.append(f"other {prefix}{name}")
        else:
            found.append(f"{prefix}{name} {before} -> {value}")
    return found


def mapping(value) -> Mapping:
    """What a file says where an object is expected; anything else counts as an empty one."""
    return value if isinstance(value, Mapping) else {}


def _attacks_of(result):
    return {
        f"{protocol}/{name}": mapping(attack).get("settings")
        for protocol, content in mapping(result.get("protocols")).items()
        for name, attack in mapping(mapping(content).get("attacks")).items()
    }


def _threat(settings) -> Mapping:
    """The threat model of an attack or of the one inside it, as with restarts."""
    found = [settings, *(value for value in settings.values() if isinstance(value, Mapping))]
    return next((mapping(value["threat"]) for value in found if "threat" in value), {})


def threat_word(threat: Mapping) -> str:
    """A threat model in a name of files, such as "linf0.1"; "" without an epsilon."""
    norm, epsilon = str(threat.get("norm")), threat.get("epsilon")
    # "l2-0.5", not "l20.5".
    dash = "-" if norm[-1:].isdigit() else ""
    return f"{norm}{dash}{epsilon:g}" if isinstance(epsilon, int | float) else ""


def _step_words(settings):
    """The settings of PGD that its name does not tell."""
    inner = settings if "num_steps" in settings else mapping(settings.get("attack"))
    words = []
    for name, word in (("step_size", "step"), ("confidence", "kappa")):
        if isinstance(value := inner.get(name), int | float) and value:
            words.append(f"{word}{value:g}")
    return words if inner.get("random_start", True) else [*words, "nostart"]


def write_ledger(directory: Path | str, evaluation: Evaluation, result: dict, indices) -> None:
    """Write `ledger.csv` and, last, `result.json`, each whole or not at all.

    Args:
        directory: made if need be.
        evaluation: what was found.
        result: from `build_result`; its file also gets the hash of the ledger.
        indices: (N,) int places of the examples in their data set.
    """
    cascades = {name: record for name, record in evaluation.records.items() if record.stages}
    stages = {
        # Two cascades have stages of the same name.
        f"standing_after_{stage if len(cascades) == 1 else f'{name}_{stage}'}": robust
        for name, record in cascades.items()
        for stage, robust in record.stages
    }
    columns = ["index", "label", "clean_prediction", "robust", "broken_by", "distance"]
    columns += [f"correct_{name}" for name in evaluation.correct] + list(stages)
    share_right = evaluation.share_right
    columns += [] if share_right is None else ["share_right"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for i, index in enumerate(indices):
        writer.writerow(
            [
                int(index),
                int(evaluation.labels[i]),
                int(evaluation.clean_prediction[i]),
                int(evaluation.robust[i]),
                evaluation.broken_by[i],
                f"{evaluation.distance[i]:.9g}",
                *(int(correct[i]) for correct in evaluation.correct.values()),
                *(int(robust[i]) for robust in stages.values()),
                *(() if share_right is None else [f"{share_right[i]:.9g}"]),
            ]
        )
    write_rows(directory, text.getvalue(), result)


def write_rows(directory: Path | str, text: str, result: dict) -> None:
    """Write the text of `ledger.csv` and, last, `result.json`; see `write_ledger`."""
    directory = Path(directory)
    write_text(directory / "ledger.csv", text)
    write_json(directory / "result.json", result | {"ledger_sha256": _sha256(text.encode())})


def read_rows(directory: Path | str) -> str:
    """The text of `ledger.csv`, as it is.

    Raises:
        ValueError: if it cannot be read.
    """
    return read_bytes(Path(directory) / "ledger.csv", _MAX_LEDGER_BYTES).decode()


def read_ledger(directory: Path | str) -> tuple[Ledger, dict]:
    """Read an evaluation back.

    Args:
        directory: holds `ledger.csv` and `result.json`.

    Returns:
        The ledger and the content of `result.json`.

    Raises:
        ValueError: if a file is missing or is not what this project writes, the two contradict
            each other, or the ledger was changed after it was written.
    """
    directory = Path(directory)
    result = read_json(directory / "result.json")
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"{directory / 'result.json'}: schema {result.get('schema')!r}, expected {SCHEMA}; "
            f"it is not a result of this version."
        )
    path = directory / "ledger.csv"
    content = read_bytes(path, _MAX_LEDGER_BYTES)
    try:
        text = io.StringIO(content.decode(), newline="")
        rows = list(csv.DictReader(text, strict=True))
        ledger = Ledger(
            index=_column(rows, "index", int),
            label=_column(rows, "label", int),
            clean_prediction=_column(rows, "clean_prediction", int),
            robust=_column(rows, "robust", _flag),
            broken_by=[str(row["broken_by"]) for row in rows],
            distance=_column(rows, "distance", float),
            correct={
                name.removeprefix("correct_"): _column(rows, name, _flag)
                for name in (rows[0] if rows else ())
                if name is not None and name.startswith("correct_")
            },
        )
    except (csv.Error, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a ledger of this project ({one_line(error)}).") from error
    # Results of the first version have no hash; `stamp_ledger` adds it.
    if result.get("ledger_sha256", digest := _sha256(content)) != digest:
        raise ValueError(
            f"{path} is not the file that result.json was made with: it was edited, or a later "
            f"evaluation was interrupted; evaluate again."
        )
    if len(rows) != result.get("num_examples") or not rows:
        raise ValueError(
            f"{path}: {len(rows)} rows, but result.json speaks of "
            f"{reprlib.repr(result.get('num_examples'))}."
        )
    for name, values in (("robust", ledger.robust), ("clean", ledger.clean)):
        stated = result.get(f"{name}_accuracy")
        if stated != _share(values):
            raise ValueError(
                f"{path}: {name} accuracy {_share(values)}, but result.json says "
                f"{reprlib.repr(stated)}; one of the two was changed by hand."
            )
    return ledger, result


def stamp_ledger(directory: Path | str) -> None:
    """Add the hash of `ledger.csv` to a `result.json` that has none.

    Raises:
        ValueError: as `read_ledger`, which checks the two first.
    """
    directory = Path(directory)
    _, result = read_ledger(directory)
    if "ledger_sha256" not in result:
        digest = _sha256(read_bytes(directory / "ledger.csv", _MAX_LEDGER_BYTES))
        write_json(directory / "result.json", result | {"ledger_sha256": digest})


def attack_settings(attack: Attack) -> dict:
    """The settings of an attack, its threat model included, with its class name as "attack".

    An attack around another one has the other's settings, with their name, as "attack", and its own
    name as "wrapper".
    """
    return json.loads(json.dumps(_named(attack)))


def is_same_attack(a, b) -> bool:
    """Whether two attacks of `result.json` are the same.

    Older files lack the names of wrappers and of what they wrap; that is no difference.

    Args:
        a: settings of an attack, as `attack_settings` gives them.
        b: of another one.
    """
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return a == b
    return (a.keys() ^ b.keys()) <= {"attack", "wrapper"} and all(
        is_same_attack(a[name], b[name]) for name in a.keys() & b.keys()
    )


def _named(value):
    """Records as dictionaries, attacks among them with the name of their class."""
    if isinstance(value, list | tuple):
        return [_named(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _named(part) for name, part in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    settings = {
        field.name: _named(getattr(value, field.name)) for field in dataclasses.fields(value)
    }
    if not hasattr(value, "run"):
        return settings
    return {"wrapper" if "attack" in settings else "attack": type(value).__name__, **settings}


def _numbers(record) -> dict:
    return {
        "accuracy": _share(record.correct),
        "accuracy_last_iterate": _share(record.correct_last_iterate),
        "forwards": record.forwards,
        "backwards": record.backwards,
        "seconds": record.seconds,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _share(values) -> float:
    return float(np.mean(values))


def _column(rows, name, kind):
    return np.array([kind(row[name]) for row in rows])


def _flag(text):
    if text not in ("0", "1"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return text == "1"
