"""What `audit.py` works on, and the audit from its announcement to the verdict."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.attacks import Attack
from logit_reg.audit import Audit, Control, audit
from logit_reg.audit.evidence import CONTROL_KINDS
from logit_reg.commands import command_line
from logit_reg.commands.attack_flags import attack_from_flags, challenge_threat
from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.commands.flag_groups import THREAT_FLAGS, given_attack_flags
from logit_reg.evaluation import units
from logit_reg.evaluation.ledger import attack_settings
from logit_reg.evaluation.protocols import PROTOCOLS, protocol_attacks
from logit_reg.evaluation.run import content_hash, network_hash
from logit_reg.evaluation.state import EvaluationState
from logit_reg.experiments import flag_effects
from logit_reg.experiments.controls import (
    KINDS,
    LEAST_STEPS,
    control_settings,
    is_cheap,
    trained_controls,
)
from logit_reg.experiments.evaluations import network_name, refuse_other_settings
from logit_reg.experiments.own_models import load_own_model
from logit_reg.experiments.runs import commit, versions
from logit_reg.experiments.sources import (
    RUNS,
    Model,
    dataset_for,
    load_model,
    load_split,
)
from logit_reg.files import read_json, write_json
from logit_reg.objectives import collapse_threshold
from logit_reg.report.audit_page import write_audit_page
from logit_reg.threat import ThreatModel
from madry_compat.challenges import image_set
from madry_compat.data import to_pixels

# Of --controls, beside names of models: train what is missing, and train nothing.
_TRAIN, _NONE = "train", "none"


@dataclasses.dataclass(frozen=True)
class Audited:
    """A network with its images, its threat model and the claimant's attacks."""

    network: keras.Model
    threat: ThreatModel
    images: np.ndarray
    labels: np.ndarray
    attacks: dict[str, Attack]
    controls: tuple[Control, ...]
    batch_size: int
    output_dir: Path
    settings: dict[str, Any]
    beta: float | None = None
    collapse_threshold: float | None = None
    ceiling: tuple[float, str] | None = None


def audited_challenge() -> Audited:
    """The model of --model_dir on its challenge's images."""
    model = load_model(FLAGS.model_dir)
    name = dataset_for(model, FLAGS.dataset, FLAGS.data_dir or model.usable_data_dir)
    flag_effects.refuse_without_effect(flag_effects.AUDIT, dataset=name)
    record = image_set(name)
    challenge = record.challenge
    dataset = load_split(
        name, "test", FLAGS.data_dir or model.usable_data_dir, download=FLAGS.download
    )
    count = command_line.num_examples(FLAGS.num_eval_examples, len(dataset.images))
    threat = challenge_threat(challenge)
    attacks = {} if not _is_attack_given() else attack_from_flags(threat, challenge)
    if FLAGS.claimed_by in PROTOCOLS:
        attacks |= protocol_attacks(FLAGS.claimed_by, challenge)
    elif FLAGS.claimed_by:
        _tell_record_only(f"none of this project's protocols, {', '.join(PROTOCOLS)}")
    folder = model.folder or RUNS / "audits" / network_name(model.path, model.network, name)
    best = record.published_ceiling(threat.norm, threat.epsilon)
    audited = Audited(
        network=model.network,
        threat=threat,
        images=to_pixels(dataset.images[:count], name),
        labels=dataset.labels[:count],
        attacks=attacks,
        controls=_controls(model, name),
        batch_size=FLAGS.eval_batch_size or challenge.eval_batch_size,
        output_dir=Path(FLAGS.output_dir or folder / "audits" / FLAGS.budget),
        settings={
            "model": str(model.path),
            "method": model.run.description if model.run is not None else None,
            "release": model.release,
            "dataset": name,
        },
        ceiling=(best.accuracy, best.source) if best else None,
    )
    run = model.run
    if run is None or not run.beta:
        return audited
    threshold = collapse_threshold(
        run.training_batch_size,
        challenge.num_classes,
        reg=run.reg,
        smoothing=run.smoothing,
        reduction=run.loss_reduction,
    )
    return dataclasses.replace(audited, beta=run.beta, collapse_threshold=threshold)


def audited_own() -> Audited:
    """The network of --model on the images of --data."""
    own = load_own_model()
    if FLAGS.claimed_by:
        _tell_record_only("no protocol whose attacks are run on data of your own")
    default = RUNS / "audits" / own.name / FLAGS.budget
    return Audited(
        network=own.network,
        threat=own.threat,
        images=own.images,
        labels=own.labels,
        attacks=attack_from_flags(own.threat, None) if _is_attack_given() else {},
        controls=_controls(None, None),
        batch_size=FLAGS.eval_batch_size or 200,
        output_dir=Path(FLAGS.output_dir or default),
        settings={"model": FLAGS.model, "dataset": FLAGS.data},
    )


def run_audit(audited: Audited) -> Audit:
    """Audit a model, write `audit.json` and print the verdict as the last line."""
    shape = audited.images.shape[1:]
    # A protocol of the claim's may have another threat model than the audit.
    told = dict.fromkeys(
        (
            *units.claim_notices(FLAGS.claim),
            *units.threat_notices(audited.threat, shape),
            *units.attack_notices(audited.attacks.values(), shape),
        )
    )
    command_line.tell(told)
    _refuse_other_audit(audited)
    state_dir = audited.output_dir / ".state"
    found = audit(
        audited.network,
        audited.threat,
        audited.images,
        audited.labels,
        claim=FLAGS.claim / 100,
        claimed_by=FLAGS.claimed_by,
        controls=audited.controls,
        budget=FLAGS.budget,
        seed=FLAGS.random_seed,
        attacks=audited.attacks,
        beta=audited.beta,
        collapse_threshold=audited.collapse_threshold,
        ceiling=audited.ceiling,
        batch_size=audited.batch_size,
        settings={
            **audited.settings,
            **({"notices": [dataclasses.asdict(found) for found in told]} if told else {}),
            "versions": versions(),
            "commit": commit(),
        },
        state_dir=state_dir,
        announce=lambda line: print(line, flush=True),
        show_progress=FLAGS.progress,
    )
    path = audited.output_dir / "audit.json"
    write_json(path, found.to_json())
    page = path.with_suffix(".html")
    write_audit_page(found, page)
    EvaluationState(state_dir, "").clear()
    print(f"\naudit: {path}\npage:  {page}")
    _print_verdict(found)
    return found


def _refuse_other_audit(audited: Audited) -> None:
    """A folder holds one audit: the same command may write it again, and no other."""
    path = audited.output_dir / "audit.json"
    if not path.exists():
        return
    old = read_json(path)
    settings = old.get("settings", {})
    names = ("threat", "network_sha256", "data_sha256", "controls", "claimed_attacks")
    held: dict[str, Any] = {
        name: old.get(name) for name in ("claim", "claimed_by", "budget", "seed")
    }
    wanted: dict[str, Any] = {
        "num_eval_examples": len(audited.images),
        "claim": FLAGS.claim / 100,
        "claimed_by": FLAGS.claimed_by,
        "budget": FLAGS.budget,
        "seed": FLAGS.random_seed,
        "threat": dataclasses.asdict(audited.threat),
        "network_sha256": network_hash(audited.network),
        "data_sha256": content_hash(audited.images, audited.labels),
        "controls": [{"name": c.name, "kind": c.kind} for c in audited.controls],
        "claimed_attacks": {n: attack_settings(attack) for n, attack in audited.attacks.items()},
    }
    held |= {name: settings[name] for name in names if name in settings}
    for record in (held, wanted):
        record["attacks"] = sorted(record.get("claimed_attacks", ()))
    held["num_eval_examples"] = old.get("num_examples")
    refuse_other_settings(audited.output_dir, held, wanted, "--output_dir")


def _print_verdict(found: Audit) -> None:
    by_number = {test.number: test for test in found.tests}
    for number in found.failed:
        print(f"failed: test {number}, {by_number[number].name}: {by_number[number].reason}")
    for number in found.undecided:
        test = by_number[number]
        print(f"decisive, without a decision: test {number}, {test.name}: {test.reason}")
    low, high = found.worst_case.interval
    by = f" by {found.claimed_by}" if found.claimed_by else ""
    print(
        f"{found.verdict}: claimed {100 * found.claim:.2f} %{by}, worst case "
        f"{100 * found.worst_case.accuracy:.2f} % of {found.num_examples} images (95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f}), most by {found.strongest_attack}"
    )


def _controls(audited: Model | None, dataset: str | None) -> tuple[Control, ...]:
    """The controls that are named, and those that are trained.

    Args:
        audited: the audited model, if it is that of a challenge.
        dataset: the data set of the audit, if it is one of the project's.
    """
    values = [value.strip() for value in FLAGS.controls or ()]
    named = tuple(_control(value, audited) for value in values if value not in (_TRAIN, _NONE))
    if FLAGS.budget not in KINDS or _NONE in values:
        return named
    if dataset is None:
        if _TRAIN in values:
            raise UsageError("--controls=train: your own data have no training images.")
        return named
    if _TRAIN not in values and (values or not is_cheap(dataset)):
        if not values:
            command_line.notice(
                f"controls: none, so the tests that need them are skipped; --controls=train trains "
                f"them on {dataset}, which may take hours."
            )
        return named
    return named + _missing_controls(audited, dataset, {control.kind for control in named})


def _missing_controls(audited: Model | None, dataset: str, given: set[str]) -> tuple[Control, ...]:
    num_steps = FLAGS.control_steps
    if num_steps is not None and num_steps < LEAST_STEPS:
        raise UsageError(f"--control_steps must be at least {LEAST_STEPS}; got {num_steps}.")
    data_dir = FLAGS.data_dir or (audited.usable_data_dir if audited else None)
    settings = control_settings(dataset, num_steps, audited.run if audited else None)
    return trained_controls(
        {kind: settings[kind] for kind in KINDS[FLAGS.budget] if kind not in given},
        lambda: load_split(dataset, "train", data_dir, download=FLAGS.download),
        data_dir=data_dir and str(Path(data_dir).resolve()),
        announce=lambda line: print(line, flush=True),
        show_progress=FLAGS.progress,
    )


def _control(value: str, audited: Model | None) -> Control:
    kind, separator, path = value.partition(":")
    if separator and kind == "reference":
        return _reference(value, path)
    if separator and kind in CONTROL_KINDS:
        return Control(value, kind, load_model(path, "controls").network)
    model = load_model(value, "controls")
    known = _kind(model, audited)
    if known is None:
        raise UsageError(
            f"--controls={value}: neither a run nor a released model says what it is; write "
            f"KIND:{value} with a kind of {', '.join(CONTROL_KINDS)}."
        )
    return Control(value, known, model.network)


def _reference(value: str, rest: str) -> Control:
    """A control as reference:PERCENT:PATH."""
    accuracy, _, path = rest.partition(":")
    try:
        published = float(accuracy) / 100
    except ValueError:
        published = -1.0
    if not (0 <= published <= 1 and path):
        raise UsageError(
            f"--controls={value}: a reference needs its published accuracy under APGD-CE in per "
            f"cent, as reference:93.60:PATH."
        )
    return Control(path, "reference", load_model(path, "controls").network, published)


def _kind(model: Model, audited: Model | None) -> str | None:
    """What a control is known to be, from its training or its release."""
    if model.release is not None:
        return "natural" if model.release.endswith("/natural") else "adversarial"
    run = model.run
    if run is None:
        return None
    if run.adversary != "none":
        return "adversarial"
    if model.is_squeezed:
        own = audited.run if audited is not None else None
        same = own is not None and dataclasses.replace(run, random_seed=own.random_seed) == own
        return "same_recipe" if same else "squeezed"
    return "noise_only" if run.sigma else "natural"


def _tell_record_only(reason: str) -> None:
    command_line.notice(
        f"notice: --claimed_by={FLAGS.claimed_by} stands for the record only: it is {reason}."
    )


def _is_attack_given() -> bool:
    return not set(THREAT_FLAGS).issuperset(given_attack_flags())
