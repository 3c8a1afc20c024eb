"""The audit itself: plan, announce, run test by test, and keep the books."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from logit_reg.attacks import Attack, AttackWarning
from logit_reg.attacks.engine.attack import attack_inputs, within_bounds
from logit_reg.audit.bench import (
    BUDGETS,
    Bench,
    Control,
    Diagnostic,
    Outcome,
    Plan,
    median_margin,
)
from logit_reg.audit.estimate import estimate
from logit_reg.audit.geometry import GEOMETRY
from logit_reg.audit.other_attacks import OTHER_ATTACKS
from logit_reg.audit.preconditions import PRECONDITIONS, squeeze_diagnostics
from logit_reg.audit.records import DECISIVE, Audit, Cost, Curve, TestRecord, WorstCase
from logit_reg.audit.sanity import SANITY
from logit_reg.audit.strength import STRENGTH
from logit_reg.durations import in_words
from logit_reg.evaluation.ledger import attack_settings
from logit_reg.evaluation.run import GateError, content_hash, network_hash
from logit_reg.threat import ThreatModel
from logit_reg.version import __version__

DIAGNOSTICS = {
    diagnostic.number: diagnostic
    for diagnostic in (*PRECONDITIONS, *STRENGTH, *OTHER_ATTACKS, *SANITY, *GEOMETRY)
}

# Cheap ones first; those that look for what white-box attacks missed after these, and AutoAttack,
# which has a black box of its own, after them; the gate's record, test 4, when all attacks have
# passed through it.
_ORDER = (
    *(1, 5, 6, 27, 2, 33, 3, 8, 14, 24, 12, 11, 9, 23, 7, 13),
    *(16, 17, 15, 29, 30, 31, 28, 32, 25, 26, 10, 20, 22, 21, 19, 18, 4),
)
# Fractions of epsilon of the challenges' own steps: 0.01 of 0.3 on MNIST, 2 of 8 on CIFAR.
_MNIST_STEP_SHARE = 1 / 30
_STEP_SHARE = 1 / 4


def audit(
    logits_fn,
    threat: ThreatModel,
    images,
    labels,
    *,
    claim: float,
    claimed_by: str | None = None,
    controls: Sequence[Control] = (),
    budget: str = "quick",
    seed: int = 0,
    attacks: Mapping[str, Attack] | None = None,
    beta: float | None = None,
    collapse_threshold: float | None = None,
    batch_size: int = 200,
    settings: Mapping[str, Any] | None = None,
    state_dir: Path | str | None = None,
    announce: Callable[[str], None] | None = None,
    show_progress: bool = False,
) -> Audit:
    """Test whether a claim of robustness holds.

    Attacks with gradients run on logits in float64, so that no saturated softmax hides a
    gradient which the network has; see `logit_reg.audit.bench.precise`.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K); a Keras network is called
            in evaluation mode, any other callable as it is.
        threat: norm, epsilon and pixel range of the claim.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        claim: claimed robust accuracy: per cent, or a fraction if it is at most 1.
        claimed_by: the protocol or attack that the claim rests on, for the record.
        controls: models of which the truth is known; the quick budget does without.
        budget: "quick", "standard" or "full".
        seed: source of all random numbers.
        attacks: the claimant's own attacks by name. They count for the worst case and are
            themselves tested: against FGSM, where every ball holds the grey image, and where any
            image is allowed. They have to accept logits in float64.
        beta: weight of the logit penalty in training, where it is known.
        collapse_threshold: see `logit_reg.objectives.collapse_threshold`.
        batch_size: most images sent through a network at once.
        settings: further provenance for the record; JSON values.
        state_dir: where finished batches of attacks are kept, so that a killed audit goes on.
            Needs a Keras network, whose content is the key.
        announce: takes a line of text: the plan with its cost, then each test as it ends.
        show_progress: draw a progress bar for each attack.

    Returns:
        The `Audit`, with a record of every test, those that did not run included.

    Raises:
        ValueError: if an argument does not make sense, or the images are outside the bounds.
    """
    say = announce or (lambda line: None)
    bench = prepare(
        logits_fn,
        threat,
        images,
        labels,
        claim=claim,
        controls=controls,
        budget=budget,
        seed=seed,
        attacks=attacks,
        beta=beta,
        collapse_threshold=collapse_threshold,
        batch_size=batch_size,
        state_dir=state_dir,
        show_progress=show_progress,
    )
    plan = bench.plan
    running = [DIAGNOSTICS[number] for number in _ORDER if _is_in(DIAGNOSTICS[number], budget)]
    expected = estimate(bench, running)
    for line in _announcement(plan, running, expected):
        say(line)

    records: dict[int, TestRecord] = {}
    curves: list[Curve] = []
    with warnings.catch_warnings():
        # The tests judge for themselves what AutoAttack warns of.
        warnings.simplefilter("ignore", AttackWarning)
        for diagnostic in running:
            record, drawn = run_test(bench, diagnostic)
            records[diagnostic.number] = record
            curves += drawn
            say(
                f"test {record.number:2} {record.name}: {record.status_in_words}, {record.reason} "
                f"({record.cost.seconds:.0f} s)"
            )
    for number in DIAGNOSTICS.keys() - records.keys():
        needed = DIAGNOSTICS[number].budget
        records[number] = _record(
            DIAGNOSTICS[number], Outcome("skipped", f"needs the {needed} budget"), Cost()
        )
    return Audit(
        claim=bench.claim,
        claimed_by=claimed_by,
        num_classes=plan.num_classes,
        clean_accuracy=float(bench.clean.mean()),
        worst_case=WorstCase(bench.robust),
        accuracy_by_attack=dict(bench.accuracy_by_attack),
        tests=tuple(records[number] for number in sorted(records)),
        squeeze=bench.squeeze,
        curves=tuple(curves),
        budget=budget,
        seed=seed,
        settings=_settings(bench, logits_fn, expected, settings or {}),
        claimed_robust=bench.claimed_robust(),
    )


def prepare(
    logits_fn,
    threat: ThreatModel,
    images,
    labels,
    *,
    claim: float,
    controls: Sequence[Control] = (),
    budget: str = "quick",
    seed: int = 0,
    attacks: Mapping[str, Attack] | None = None,
    beta: float | None = None,
    collapse_threshold: float | None = None,
    batch_size: int = 200,
    state_dir: Path | str | None = None,
    show_progress: bool = False,
) -> Bench:
    """The workbench that the tests of `DIAGNOSTICS` run on, one by one; see `audit`."""
    images, labels, _ = attack_inputs(images, labels, None)
    _check(images, claim, budget, batch_size)
    images = within_bounds(images, threat.lower, threat.upper)
    if state_dir is not None and not isinstance(logits_fn, keras.Model):
        raise ValueError(
            "state_dir needs a Keras network: another function has no content to key it by."
        )
    bench = Bench(
        logits_fn,
        images,
        labels,
        seed=seed,
        batch_size=batch_size,
        state_dir=None if state_dir is None else Path(state_dir),
        show_progress=show_progress,
    )
    claimed = dict(attacks or {})
    bench.plan = Plan(
        threat=threat,
        budget=budget,
        num_classes=bench.outputs.shape[1],
        num_examples=len(images),
        image_shape=images.shape[1:],
        step_size=_step_size(threat, images.shape[1:], claimed),
        median_margin=median_margin(bench.logits),
        divisor=bench.divisor,
        claimed=claimed,
        controls=() if budget == "quick" else tuple(controls),
    )
    bench.claim = claim / 100 if claim > 1 else claim
    bench.squeeze = squeeze_diagnostics(bench, beta, collapse_threshold)
    return bench


def run_test(bench: Bench, diagnostic: Diagnostic) -> tuple[TestRecord, tuple[Curve, ...]]:
    """Run one test: its record, and what it has for figures."""
    bench.close_books()
    try:
        outcome = diagnostic.judge(bench)
    except GateError as error:
        bench.violations.append(str(error))
        outcome = Outcome("skipped", str(error))
    return _record(diagnostic, outcome, bench.close_books()), outcome.curves


def _record(diagnostic: Diagnostic, outcome: Outcome, cost: Cost) -> TestRecord:
    return TestRecord(
        number=diagnostic.number,
        name=diagnostic.name,
        group=diagnostic.group,
        figure=outcome.figure,
        criterion=diagnostic.criterion,
        threshold_origin=diagnostic.threshold_origin,
        status=outcome.status,
        reason=outcome.reason,
        decisive=diagnostic.number in DECISIVE,
        cost=cost,
    )


def _announcement(plan: Plan, running: Sequence[Diagnostic], expected: Cost) -> list[str]:
    numbers = sorted(diagnostic.number for diagnostic in running)
    left_out = [str(number) for number in sorted(DIAGNOSTICS.keys() - set(numbers))]
    lines = [
        f"audit: budget {plan.budget}, {plan.num_examples} images, {plan.threat.norm} epsilon "
        f"{plan.threat.epsilon:g} on [{plan.threat.lower:g}, {plan.threat.upper:g}]",
        f"tests: {', '.join(str(number) for number in numbers)}",
    ]
    if left_out:
        lines.append(f"left out by this budget: {', '.join(left_out)}")
    lines.append(f"estimate: about {in_words(expected.seconds)}, {expected.backwards:,} gradients")
    return lines


def _settings(bench: Bench, logits_fn, expected: Cost, given: Mapping[str, Any]) -> dict:
    plan = bench.plan
    return {
        **given,
        "threat": dataclasses.asdict(plan.threat),
        "data_sha256": content_hash(bench.images, bench.labels),
        "network_sha256": network_hash(logits_fn) if isinstance(logits_fn, keras.Model) else None,
        "batch_size": bench.batch_size,
        "step_size": plan.step_size,
        "claimed_attacks": {
            name: attack_settings(attack) if dataclasses.is_dataclass(attack) else repr(attack)
            for name, attack in plan.claimed.items()
        },
        "controls": [{"name": c.name, "kind": c.kind} for c in plan.controls],
        "estimate": dataclasses.asdict(expected),
        "version": __version__,
    }


def _step_size(threat: ThreatModel, image_shape, claimed: Mapping[str, Attack]) -> float:
    """The claimant's own, else the challenges'."""
    for attack in claimed.values():
        step_size = getattr(attack, "step_size", None)
        if step_size is not None and attack.threat == threat:
            return float(step_size)
    share = _MNIST_STEP_SHARE if image_shape == (28, 28, 1) else _STEP_SHARE
    return share * threat.epsilon


def _is_in(diagnostic: Diagnostic, budget: str) -> bool:
    return BUDGETS.index(diagnostic.budget) <= BUDGETS.index(budget)


def _check(images, claim, budget, batch_size):
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}.")
    if not (math.isfinite(claim) and 0 <= claim <= 100):
        raise ValueError(f"claim must be in per cent (or a fraction up to 1); got {claim}.")
    if not len(images):
        raise ValueError("an audit needs at least one image; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
