"""What `audit.py` works on, and the audit from its announcement to the verdict."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.attacks import Attack
from logit_reg.audit import Audit, Control, audit
from logit_reg.audit_page import write_audit_page
from logit_reg.evaluation import EvaluationState
from logit_reg.files import write_json
from logit_reg.objectives import collapse_threshold
from logit_reg.protocols import PROTOCOLS, protocol_attacks
from logit_reg.threat import ThreatModel
from logit_reg_scripts import command_line
from logit_reg_scripts.attack_flags import attack_from_flags, challenge_threat
from logit_reg_scripts.command_line import FLAGS, UsageError
from logit_reg_scripts.runs import commit, versions
from logit_reg_scripts.sources import (
    Model,
    dataset_for,
    load_keras,
    load_model,
    load_own_images,
    load_split,
)
from madry_compat.challenges import challenge_for
from madry_compat.data import to_pixels

# Flags that describe an attack, beyond the threat model that they share with the audit.
_ATTACK_FLAGS = ("num_steps", "step_size", "random_start", "loss_func", "confidence", "restarts")
_KINDS = ("natural", "noise_only", "adversarial", "same_recipe", "squeezed")


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


def audited_challenge() -> Audited:
    """The model of --model_dir on its challenge's images."""
    model = load_model(FLAGS.model_dir)
    name = dataset_for(model, FLAGS.dataset, FLAGS.data_dir or model.usable_data_dir)
    challenge = challenge_for(name)
    dataset = load_split(
        name, "test", FLAGS.data_dir or model.usable_data_dir, download=FLAGS.download
    )
    count = command_line.num_examples(FLAGS.num_eval_examples, len(dataset.images))
    threat = challenge_threat(challenge)
    attacks = {} if not _is_attack_given() else attack_from_flags(threat, challenge)
    if FLAGS.claimed_by in PROTOCOLS:
        family = "mnist" if challenge.name == "mnist" else "cifar"
        attacks |= protocol_attacks(FLAGS.claimed_by, family)
    elif FLAGS.claimed_by:
        command_line.notice(
            f"--claimed_by={FLAGS.claimed_by} is no protocol of this project and stands for the "
            f"record only; protocols: {', '.join(PROTOCOLS)}."
        )
    folder = model.path if model.run is not None else Path("runs/audits") / model.path.stem
    audited = Audited(
        network=model.network,
        threat=threat,
        images=to_pixels(dataset.images[:count], name),
        labels=dataset.labels[:count],
        attacks=attacks,
        controls=_controls(model),
        batch_size=FLAGS.eval_batch_size or challenge.eval_batch_size,
        output_dir=Path(FLAGS.output_dir or folder / "audits" / FLAGS.budget),
        settings={"model": str(model.path), "release": model.release, "dataset": name},
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
    needed = ("model", "data", "bounds", "epsilon")
    missing = [f"--{name}" for name in needed if not FLAGS[name].value]
    if missing:
        raise UsageError(
            f"your own model and data need --model, --data, --bounds and --epsilon together; "
            f"missing {', '.join(missing)}."
        )
    try:
        lower, upper = (float(value) for value in FLAGS.bounds)
    except ValueError as error:
        raise UsageError(
            f"--bounds must be two numbers, as 0,1; got {','.join(FLAGS.bounds)!r}."
        ) from error
    threat = ThreatModel(FLAGS.norm or "linf", FLAGS.epsilon, lower, upper)
    network = load_keras(command_line.existing_path("model", FLAGS.model))
    path = command_line.existing_path("data", FLAGS.data)
    images, labels = load_own_images(path, (lower, upper))
    if tuple(network.input_shape[1:]) != images.shape[1:]:
        raise UsageError(
            f"{path}: images have shape {images.shape[1:]}, the network takes "
            f"{tuple(network.input_shape[1:])}."
        )
    num_classes = network.output_shape[-1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(
            f"{path}: labels span {labels.min()} to {labels.max()}, the network has "
            f"{num_classes} classes."
        )
    count = command_line.num_examples(FLAGS.num_eval_examples, len(images))
    default = Path("runs/audits") / f"{Path(FLAGS.model).stem}-{path.stem}" / FLAGS.budget
    return Audited(
        network=network,
        threat=threat,
        images=images[:count],
        labels=labels[:count],
        attacks=attack_from_flags(threat, None) if _is_attack_given() else {},
        controls=_controls(None),
        batch_size=FLAGS.eval_batch_size or 200,
        output_dir=Path(FLAGS.output_dir or default),
        settings={"model": FLAGS.model, "dataset": FLAGS.data},
    )


def run_audit(audited: Audited) -> Audit:
    """Audit a model, write `audit.json` and print the verdict as the last line."""
    if audited.controls and FLAGS.budget == "quick":
        command_line.notice(
            "--controls: the quick budget does without; --budget=standard uses them"
        )
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
        batch_size=audited.batch_size,
        settings={**audited.settings, "versions": versions(), "commit": commit()},
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


def _controls(audited: Model | None) -> tuple[Control, ...]:
    return tuple(_control(value.strip(), audited) for value in FLAGS.controls)


def _control(value: str, audited: Model | None) -> Control:
    kind, separator, path = value.partition(":")
    if separator and kind in _KINDS:
        return Control(value, kind, load_model(path).network)
    model = load_model(value)
    known = _kind(model, audited)
    if known is None:
        raise UsageError(
            f"--controls={value}: neither a run nor a released model says what it is; write "
            f"KIND:{value} with a kind of {', '.join(_KINDS)}."
        )
    return Control(value, known, model.network)


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


def _is_attack_given() -> bool:
    return any(FLAGS[name].value is not None for name in _ATTACK_FLAGS)
