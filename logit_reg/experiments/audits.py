"""What an audit works on, and the audit from its announcement to the verdict."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.attacks import APGD, PGD, APGDTargeted, Attack, AttackWarning
from logit_reg.audit import Audit, Control, audit
from logit_reg.audit.evidence import CONTROL_KINDS
from logit_reg.audit.fakes import FAKES, Fake
from logit_reg.audit.run import check_audited
from logit_reg.evaluation import units
from logit_reg.evaluation.ledger import attack_settings, threat_word
from logit_reg.evaluation.protocols import PROTOCOLS, protocol_attacks, threat_of
from logit_reg.evaluation.run import content_hash, evaluate, network_hash
from logit_reg.evaluation.state import EvaluationState
from logit_reg.experiments.attack_choice import AttackChoice
from logit_reg.experiments.controls import (
    KINDS,
    LEAST_STEPS,
    control_settings,
    is_cheap,
    trained_controls,
)
from logit_reg.experiments.evaluations import network_name, refuse_other_settings
from logit_reg.experiments.own_models import OwnModel
from logit_reg.experiments.provenance import commit, versions
from logit_reg.experiments.sources import (
    RUNS,
    Model,
    find_model,
    load_split,
    num_examples,
)
from logit_reg.files import read_json, write_json
from logit_reg.messages import UsageError, notice, tell
from logit_reg.report.audit_page import write_audit_page
from logit_reg.threat import ThreatModel
from madry_compat.challenges import image_set
from madry_compat.data import to_pixels

# Of --controls, beside names of models: train what is missing, and train nothing.
_TRAIN, _NONE = "train", "none"

# Training images that a fake takes for reference.
_NUM_REFERENCES = 1000
# Passes that the attacks behind what is known of a randomised fake average over.
_EOT = 10


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """What is claimed, and how it is tested.

    Attributes:
        claim: claimed robust accuracy, a fraction; None for what the claimant's attacks leave of a
            fake.
        claimed_by: the protocol that the claim rests on; None if none was named.
        known_accuracy: what is known to be left of the network, a fraction; None if nothing is.
        fake: audit the network behind this one of `logit_reg.audit.fakes`; as it is if None.
        attack: the claimant's attack, and the threat model.
        budget: "quick", "standard" or "full".
        seed: of the attacks.
        controls: names of models as DIR, KIND:DIR or reference:PER CENT:PATH; "train" asks for
            those that are missing, "none" does without.
        control_steps: training steps of each trained control; the recipe's if None.
        num_examples: how many images, from the first; all if None.
        batch_size: images at once; the challenge's if None.
        output_dir: gets `audit.json` and `audit.html`; a folder of the model's if None.
        data_dir: where the data are.
        download: whether to download what is not there.
        show_progress: draw progress bars.
    """

    claim: float | None = None
    claimed_by: str | None = None
    known_accuracy: float | None = None
    fake: str | None = None
    attack: AttackChoice = AttackChoice()
    budget: str = "quick"
    seed: int = 0
    controls: tuple[str, ...] = ()
    control_steps: int | None = None
    num_examples: int | None = None
    batch_size: int | None = None
    output_dir: Path | None = None
    data_dir: str | None = None
    download: bool = False
    show_progress: bool = False

    def __post_init__(self):
        if self.fake is not None and self.fake not in FAKES:
            names = ", ".join(FAKES)
            raise UsageError(f"--fake={self.fake}: there is no such fake; choose from {names}.")


@dataclasses.dataclass(frozen=True)
class Audited:
    """A network with its images, its threat model and the claimant's attacks."""

    network: keras.Model | Fake
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


def audited_challenge(model: Model, name: str, settings: AuditSettings) -> Audited:
    """A model on its challenge's images.

    Args:
        model: to audit.
        name: of the data set.
        settings: claim and tests.
    """
    record = image_set(name)
    challenge = record.challenge
    dataset = load_split(name, "test", settings.data_dir, download=settings.download)
    count = num_examples(settings.num_examples, len(dataset.images))
    choice, claimed_by = settings.attack, settings.claimed_by
    threat = choice.threat(challenge)
    # Before controls are trained for it.
    check_audited(threat)
    is_described = choice.describes_attack or (settings.fake and not claimed_by)
    attacks = choice.attack(threat, challenge) if is_described else {}
    if claimed_by in PROTOCOLS:
        attacks |= protocol_attacks(claimed_by, challenge)
    elif claimed_by:
        _tell_record_only(claimed_by, f"none of this project's protocols, {', '.join(PROTOCOLS)}")
    folder = model.folder or RUNS / "audits" / network_name(model.path, model.network, name)
    best = record.published_ceiling(threat.norm, threat.epsilon)
    references = None
    if settings.fake and "references" in FAKES[settings.fake].takes:
        training = load_split(name, "train", settings.data_dir, download=settings.download)
        references = to_pixels(training.images[:_NUM_REFERENCES], name)
    audited = Audited(
        network=_behind(model.network, settings, threat, references),
        threat=threat,
        images=to_pixels(dataset.images[:count], name),
        labels=dataset.labels[:count],
        attacks=attacks,
        controls=_controls(model, name, settings),
        batch_size=settings.batch_size or challenge.eval_batch_size,
        output_dir=settings.output_dir
        or folder / "audits" / _name(settings, threat, threat_of("linf", challenge)),
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
    return dataclasses.replace(audited, beta=run.beta, collapse_threshold=run.collapse_threshold)


def audited_own(own: OwnModel, settings: AuditSettings) -> Audited:
    """A network on images of the user's own."""
    choice = settings.attack
    check_audited(own.threat)
    if settings.claimed_by:
        _tell_record_only(
            settings.claimed_by, "no protocol whose attacks are run on data of your own"
        )
    return Audited(
        network=_behind(own.network, settings, own.threat, None),
        threat=own.threat,
        images=own.images,
        labels=own.labels,
        attacks=choice.attack(own.threat, None) if choice.describes_attack or settings.fake else {},
        controls=_controls(None, None, settings),
        batch_size=settings.batch_size or 200,
        output_dir=settings.output_dir
        or RUNS / "audits" / own.name / _name(settings, own.threat, None),
        settings={"model": str(own.model), "dataset": str(own.data)},
    )


def _behind(network, settings: AuditSettings, threat: ThreatModel, references):
    """The network that is audited: as it is, or behind the fake that was asked for."""
    if settings.fake is None:
        return network
    kind = FAKES[settings.fake]
    if "references" in kind.takes and references is None:
        raise UsageError(
            f"--fake={settings.fake} needs training images, and your own data have none."
        )
    given = {"bounds": (threat.lower, threat.upper), "references": references}
    return kind.plant(network, **{name: given[name] for name in kind.takes})


def settings_of_fake(audited: Audited, settings: AuditSettings) -> AuditSettings:
    """The settings with what is claimed of a fake, and what is known to be left of it.

    The claimant's attacks follow the fake as it is, those behind the knowledge what is hidden.
    """
    fake = audited.network
    if not isinstance(fake, Fake):
        return settings
    examples = audited.images, audited.labels
    options: dict[str, Any] = {"batch_size": audited.batch_size, "seed": settings.seed}
    claim, known = settings.claim, settings.known_accuracy
    with warnings.catch_warnings():
        # The audit says itself what is amiss.
        warnings.simplefilter("ignore", AttackWarning)
        if claim is None:
            found = evaluate(fake, audited.attacks, *examples, **options)
            claim = float(found.robust.mean())
            print(f"claim: {100 * claim:.2f} % under {', '.join(audited.attacks)}", flush=True)
        if known is None:
            num_classes = fake.network.output_shape[-1]
            found = evaluate(
                fake,
                _that_see_through(audited.threat, num_classes),
                *examples,
                gradient_logits_fn=fake.followed,
                worst_case_only=True,
                eot=_EOT if fake.is_random else 1,
                **options,
            )
            known = float(found.robust.mean())
            print(f"known: {100 * known:.2f} % under attacks on what is hidden", flush=True)
    claimed_by = settings.claimed_by or ", ".join(audited.attacks)
    return dataclasses.replace(settings, claim=claim, claimed_by=claimed_by, known_accuracy=known)


def _that_see_through(threat: ThreatModel, num_classes: int) -> dict[str, Attack]:
    """Attacks for what a fake hides."""
    attacks: dict[str, Attack] = {
        "pgd100-cw": PGD(threat, "cw", 100, threat.epsilon / 10, early_stop=True),
        "apgd-ce": APGD(threat),
    }
    if num_classes >= 4:
        attacks["apgd-t"] = APGDTargeted(threat, min(num_classes - 1, 9))
    return attacks


def _name(settings: AuditSettings, threat: ThreatModel, usual: ThreatModel | None) -> str:
    """The folder of an audit: its budget, its threat model if not the usual one, and the fake."""
    name = settings.budget
    if threat != usual:
        name += f"-{threat_word(dataclasses.asdict(threat))}"
    return f"{name}-{settings.fake}" if settings.fake else name


def run_audit(audited: Audited, settings: AuditSettings) -> Audit:
    """Audit a model, write `audit.json` and print the verdict as the last line."""
    settings = settings_of_fake(audited, settings)
    if settings.claim is None:
        raise ValueError("an audit needs a claim; got none.")
    fake = audited.network.record if isinstance(audited.network, Fake) else None
    asked = {"fake": fake, "known_accuracy": settings.known_accuracy}
    shape = audited.images.shape[1:]
    # A protocol of the claim's may have another threat model than the audit.
    told = dict.fromkeys(
        (
            *units.claim_notices(100 * settings.claim),
            *units.threat_notices(audited.threat, shape),
            *units.attack_notices(audited.attacks.values(), shape),
        )
    )
    tell(told)
    _refuse_other_audit(audited, settings)
    state_dir = audited.output_dir / ".state"
    found = audit(
        audited.network,
        audited.threat,
        audited.images,
        audited.labels,
        claim=settings.claim,
        claimed_by=settings.claimed_by,
        controls=audited.controls,
        budget=settings.budget,
        seed=settings.seed,
        attacks=audited.attacks,
        beta=audited.beta,
        collapse_threshold=audited.collapse_threshold,
        ceiling=audited.ceiling,
        batch_size=audited.batch_size,
        settings={
            **audited.settings,
            **{name: value for name, value in asked.items() if value is not None},
            **({"notices": [dataclasses.asdict(found) for found in told]} if told else {}),
            "versions": versions(),
            "commit": commit(),
        },
        state_dir=state_dir,
        announce=lambda line: print(line, flush=True),
        show_progress=settings.show_progress,
    )
    path = audited.output_dir / "audit.json"
    write_json(path, found.to_json())
    page = path.with_suffix(".html")
    write_audit_page(found, page)
    EvaluationState(state_dir, "").clear()
    print(f"\naudit: {path}\npage:  {page}")
    _print_verdict(found)
    return found


def _refuse_other_audit(audited: Audited, asked: AuditSettings) -> None:
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
        "claim": asked.claim,
        "claimed_by": asked.claimed_by,
        "budget": asked.budget,
        "seed": asked.seed,
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


def _controls(
    audited: Model | None, dataset: str | None, settings: AuditSettings
) -> tuple[Control, ...]:
    """The controls that are named, and those that are trained.

    Args:
        audited: the audited model, if it is that of a challenge.
        dataset: the data set of the audit, if it is one of the project's.
        settings: say which.
    """
    values = [value.strip() for value in settings.controls]
    named = tuple(_control(value, audited) for value in values if value not in (_TRAIN, _NONE))
    if settings.budget not in KINDS or _NONE in values:
        return named
    if dataset is None:
        if _TRAIN in values:
            raise UsageError("--controls=train: your own data have no training images.")
        return named
    if _TRAIN not in values and (values or not is_cheap(dataset)):
        if not values:
            notice(
                f"controls: none, so the tests that need them are skipped; --controls=train trains "
                f"them on {dataset}, which may take hours."
            )
        return named
    given = {control.kind for control in named}
    return named + _missing_controls(audited, dataset, given, settings)


def _missing_controls(
    audited: Model | None, dataset: str, given: set[str], settings: AuditSettings
) -> tuple[Control, ...]:
    num_steps, data_dir = settings.control_steps, settings.data_dir
    if num_steps is not None and num_steps < LEAST_STEPS:
        raise UsageError(f"--control_steps must be at least {LEAST_STEPS}; got {num_steps}.")
    trained = control_settings(dataset, num_steps, audited.run if audited else None)
    return trained_controls(
        {kind: trained[kind] for kind in KINDS[settings.budget] if kind not in given},
        lambda: load_split(dataset, "train", data_dir, download=settings.download),
        data_dir=data_dir and str(Path(data_dir).resolve()),
        announce=lambda line: print(line, flush=True),
        show_progress=settings.show_progress,
    )


def _control(value: str, audited: Model | None) -> Control:
    kind, separator, path = value.partition(":")
    if separator and kind == "reference":
        return _reference(value, path)
    if separator and kind in CONTROL_KINDS:
        return Control(value, kind, _find(path).network)
    model = _find(value)
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
    return Control(path, "reference", _find(path).network, published)


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


def _find(path: str) -> Model:
    return find_model(path, f"--controls={path}")


def _tell_record_only(claimed_by: str, reason: str) -> None:
    notice(f"notice: --claimed_by={claimed_by} stands for the record only: it is {reason}.")
