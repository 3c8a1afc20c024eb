"""Model cards: what ledgers say of a network, under RobustBench's field names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.evaluation.ledger import read_ledger
from logit_reg.evaluation.run import network_hash
from logit_reg.experiments.evaluations import training_notices
from logit_reg.messages import UsageError
from madry_compat.challenges import Challenge
from madry_compat.tf1_checkpoints import tf1_names

_AUTOATTACK = "autoattack"


def build_card(
    network: keras.Model,
    challenge: Challenge,
    evaluations: list[Path],
    *,
    name: str,
    dataset: str | None,
    additional_data: bool | None,
    averaged_weights: bool | None = None,
    training: Mapping[str, int] | None = None,
    link: str | None = None,
) -> dict[str, Any]:
    """Describe a network by its ledgers; what no ledger says is null.

    Args:
        network: the network that the card is for.
        challenge: gives the threat model of the card: linf with the challenge's epsilon.
        evaluations: folders with `ledger.csv` and `result.json` of this very network.
        name: of the model.
        dataset: what it was trained on, which the ledgers must be about; None if unknown: then
            they must agree, and without any it is the challenge's.
        additional_data: whether other images were used in training; None if unknown.
        averaged_weights: whether its weights are averages over training; None if unknown.
        training: "steps_done" and "steps_planned" of its training; None if unknown.
        link: where it is described.

    Returns:
        A JSON object. `clean_acc`, `reported` and `autoattack_acc` are in per cent and `eps` is
        on the [0, 1] scale, as in RobustBench, but numbers where that has strings. `reported`
        is the lowest accuracy of all protocols in this threat model but AutoAttack's;
        `evaluations` lists what the numbers come from.

    Raises:
        UsageError: if a ledger is of another network or data set, or of images that the network
            was trained on.
        ValueError: if a folder holds no sound ledger.
    """
    key = network_hash(network)
    clean: list[dict[str, Any]] = []
    robust: dict[str, dict[str, Any]] = {}
    for folder in evaluations:
        ledger, result = read_ledger(folder)
        dataset = dataset or str(result.get("dataset"))
        _check_provenance(folder, result, key, dataset)
        entry = {"num_examples": len(ledger.label), "seed": result.get("seed")}
        clean.append({"accuracy": _per_cent(ledger.clean), **entry})
        for protocol, attacks in _protocols(folder, result, challenge).items():
            unknown = [attack for attack in attacks if attack not in ledger.correct]
            if unknown:
                raise UsageError(f"{folder}: its ledger.csv has no column correct_{unknown[0]}.")
            standing = np.all([ledger.correct[attack] for attack in attacks], axis=0)
            found = {"protocol": protocol, "attacks": attacks, "accuracy": _per_cent(standing)}
            found |= entry
            # Of two ledgers of a protocol the one with more images counts.
            if found["num_examples"] > robust.get(protocol, {}).get("num_examples", 0):
                robust[protocol] = found
    attacked = [found for protocol, found in robust.items() if protocol != _AUTOATTACK]
    reported = min(attacked, key=lambda found: found["accuracy"], default={})
    largest = max(clean, key=lambda found: found["num_examples"], default={})
    return {
        "name": name,
        "link": link,
        "dataset": dataset or challenge.name,
        "norm": "Linf",
        "eps": challenge.epsilon / (challenge.upper - challenge.lower),
        "architecture": _architecture(network),
        "additional_data": additional_data,
        "averaged_weights": averaged_weights,
        "number_forward_passes": 1,
        "clean_acc": largest.get("accuracy"),
        "reported": reported.get("accuracy"),
        "reported_protocol": reported.get("protocol"),
        "autoattack_acc": robust.get(_AUTOATTACK, {}).get("accuracy"),
        "evaluations": list(robust.values()),
        "network_sha256": key,
        "training": training,
        "notices": training_notices(training),
    }


def _check_provenance(folder: Path, result: dict, key: str, dataset: str) -> None:
    settings = result.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    theirs = settings.get("network_sha256")
    if theirs != key:
        raise UsageError(
            f"{folder}: evaluates the network {str(theirs)[:12]}, not this one, {key[:12]}; give "
            f"the ledgers of this network in --evaluations."
        )
    if result.get("dataset") != dataset:
        raise UsageError(
            f"{folder}: was made on {result.get('dataset')!r}, this card is for {dataset!r}; leave "
            f"it out."
        )
    if result.get("first_example"):
        raise UsageError(
            f"{folder}: is a slice of the data set; join all of it by eval_challenge.py --merge."
        )
    if settings.get("contaminated"):
        raise UsageError(
            f"{folder}: measured on images that the network was trained on; leave it out."
        )


def _protocols(folder: Path, result: dict, challenge: Challenge) -> dict[str, list[str]]:
    """Names of the attacks by protocol, of those in the challenge's own threat model."""
    try:
        return {
            protocol: list(content["attacks"])
            for protocol, content in result["protocols"].items()
            if all(
                _is_own_threat(attack["settings"], challenge)
                for attack in content["attacks"].values()
            )
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / 'result.json'}: its protocols are not as this version writes them; "
            f"evaluate again."
        ) from error


def _is_own_threat(settings: dict, challenge: Challenge) -> bool:
    # Restarts wrap the attack that has the threat model.
    threat = settings["threat"] if "threat" in settings else settings["attack"]["threat"]
    return threat["norm"] == "linf" and threat["epsilon"] == challenge.epsilon


def _architecture(network: keras.Model) -> str:
    names = tf1_names(network)
    if "logit/DW" not in names:
        return "MNIST challenge CNN"
    return f"WideResNet-32-{names['logit/DW'].shape[0] // 64}"


def _per_cent(correct: np.ndarray) -> float:
    return round(100 * float(np.mean(correct)), 4)
