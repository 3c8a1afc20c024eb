"""Tests 8 to 17: a ladder of ever stronger attacks; no rung may take much that the last left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from logit_reg.attacks import (
    APGD,
    FGSM,
    MD,
    ODI,
    PGD,
    APGDTargeted,
    Attack,
    MultiTargeted,
    Restarts,
    ScaledPGD,
)
from logit_reg.audit.decisions import accuracies, as_points, decide, in_points, overall, percent
from logit_reg.audit.evidence import Control, Diagnostic, Evidence, Outcome
from logit_reg.audit.records import Curve
from logit_reg.evaluation.statistics import PairedDifference

# What an attack may leave more than a weaker one, a fraction: random starts differ by as much.
RISE = 0.01
# Fractions of accuracy that a rung may take.
_ITERATION_GAP = 0.005
_RESTART_GAP = 0.01
_STEP_SIZE_GAP = 0.01
_STEP_SIZE_GAP_WIDE = 0.03
_SCALE_GAP = 0.01
_LOSS_GAP = 0.05
_MARGIN_GAP = 0.03
_TARGETED_GAP = 0.01
_START_GAP = 0.01
_STAGE_GAP = 0.01

# Step sizes of the sweep, in epsilon. On jagged surfaces 0.4 to 0.65 find most.
_STEP_SHARES = (1 / 25, 1 / 10, 1 / 4, 1 / 2, 0.65, 1.0, 2.0)
_QUICK_STEP_SHARES = (1 / 10, 1 / 4, 0.65, 2.0)
# Logit scales, in units of the clean images' median margin.
_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_QUICK_SCALES = (0.1, 1.0, 10.0)

_BASE_STEPS = 40
# Accuracy under attack that makes a control adversarially trained; one that keeps less would
# excuse whatever is compared with it.
_LEAST_CONTROL = 0.5

WIDE = "with an epsilon as large as MNIST's"
_BEYOND = f"{WIDE}: beyond what it takes from the adversarially trained control"


def base_attack(evidence: Evidence, loss: str = "xent", num_steps: int = _BASE_STEPS) -> PGD:
    """The plain PGD that the ladder starts from."""
    return PGD(evidence.threat, loss, num_steps, evidence.step_size, early_stop=True)


def strong_attacks(evidence: Evidence) -> dict[str, Attack]:
    """APGD on cross-entropy and, where it is defined, on the targeted DLR."""
    num_steps = evidence.pick(50, 100, 100)
    attacks: dict[str, Attack] = {"apgd-ce": APGD(evidence.threat, "xent", num_steps)}
    if evidence.num_classes >= 4:
        num_targets = evidence.pick(3, 9, 9)
        attacks["apgd-t"] = APGDTargeted(evidence.threat, num_targets, num_steps)
    return attacks


def margin_attacks(evidence: Evidence) -> dict[str, Attack]:
    """The plain PGD on cross-entropy and on the margin."""
    return {"pgd40-xent": base_attack(evidence), "pgd40-cw": base_attack(evidence, "cw")}


def _iterative_attacks(evidence: Evidence) -> dict[str, Attack]:
    step_size = 2.5 * evidence.threat.epsilon / 20
    return {
        "fgsm": FGSM(evidence.threat),
        "pgd20": PGD(evidence.threat, "xent", 20, step_size, early_stop=True),
        **evidence.claimed,
    }


def _iterative_beats_single_step(evidence: Evidence) -> Outcome:
    attacks = _iterative_attacks(evidence)
    correct = evidence.run({name: attacks[name] for name in ("fgsm", "pgd20")})
    correct |= evidence.run_claimed(evidence.claimed)
    single = correct["fgsm"]
    rises = {
        name: decide(PairedDifference.of(found, single), most=RISE)
        for name, found in correct.items()
        if name != "fgsm"
    }
    figure = {
        "accuracy": accuracies(correct),
        "rise": {name: rise.to_json() for name, rise in rises.items()},
    }
    status = overall(rises.values())
    if status == "fail":
        weak = [f"{name}: {rise}" for name, rise in rises.items() if rise.status == "fail"]
        reason = f"more is robust than under one step of FGSM, a faulty attack: {'; '.join(weak)}"
        return Outcome(status, reason, figure)
    # The one that comes nearest to the limit.
    name = max(rises, key=lambda name: rises[name].found.interval[1])
    reason = f"{name} leaves {percent(correct[name])}, FGSM {percent(single)}"
    return Outcome(status, f"{reason}: {rises[name]}", figure)


def _iteration_attacks(evidence: Evidence) -> dict[str, PGD]:
    ladder = evidence.pick((10, 40, 80), (10, 40, 100, 200), (10, 40, 100, 200, 400))
    return {f"pgd{steps}-xent": base_attack(evidence, num_steps=steps) for steps in ladder}


def _iteration_convergence(evidence: Evidence) -> Outcome:
    attacks = _iteration_attacks(evidence)
    correct = evidence.run(attacks)
    *_, half, double = correct
    steps = [float(attack.num_steps) for attack in attacks.values()]
    curve = _curve("steps", "steps of PGD", steps, correct)
    what = f"doubling {attacks[half].num_steps} steps"
    return _convergence(evidence, attacks, (half, double), what, _ITERATION_GAP, curves=(curve,))


def _restart_attacks(evidence: Evidence) -> dict[str, Attack]:
    attack = base_attack(evidence, "cw")
    return {f"pgd40-cw-x{count}": Restarts(attack, count) for count in (10, 100)}


def _restart_convergence(evidence: Evidence) -> Outcome:
    what = "going from 10 to 100 restarts"
    attacks = _restart_attacks(evidence)
    return _convergence(evidence, attacks, tuple(attacks), what, _RESTART_GAP)


def _step_size_attacks(evidence: Evidence) -> dict[str, PGD]:
    shares = evidence.pick(_QUICK_STEP_SHARES, _STEP_SHARES, _STEP_SHARES)
    epsilon, plain = evidence.threat.epsilon, evidence.step_size
    return {
        "pgd40-xent" if size == plain else f"pgd40-xent-step-{size / epsilon:.3g}-eps": (
            PGD(evidence.threat, "xent", _BASE_STEPS, size, early_stop=True)
        )
        for size in sorted({plain, *(share * epsilon for share in shares)})
    }


def _step_size_sweep(evidence: Evidence) -> Outcome:
    attacks = _step_size_attacks(evidence)
    correct = evidence.run(attacks)
    best = min(correct, key=lambda name: correct[name].mean())
    sizes, plain = [attack.step_size for attack in attacks.values()], evidence.step_size
    curve = _curve("step_size", "step size of PGD (pixel units)", sizes, correct, plain)
    what = f"the best step size, {attacks[best].step_size:.3g} instead of {plain:.3g},"
    options: dict[str, Any] = {"without_control": _STEP_SIZE_GAP_WIDE, "curves": (curve,)}
    return _convergence(evidence, attacks, ("pgd40-xent", best), what, _STEP_SIZE_GAP, **options)


def _scale_attacks(evidence: Evidence) -> dict[str, Attack]:
    attacks: dict[str, Attack] = {"pgd40-xent": base_attack(evidence)}
    margin = evidence.median_margin
    for scale in evidence.pick(_QUICK_SCALES, _SCALES, _SCALES) if margin > 0 else ():
        attacks[f"pgd40-xent-scale-{scale:g}"] = ScaledPGD(
            evidence.threat, scale * evidence.divisor / margin, _BASE_STEPS, evidence.step_size
        )
    return attacks


def _logit_scale(evidence: Evidence) -> Outcome:
    attacks = _scale_attacks(evidence)
    correct = evidence.run(attacks)
    if len(attacks) == 1:
        return Outcome("fail", "half of the clean images have no margin to scale by")
    scaled = {name: found for name, found in correct.items() if name != "pgd40-xent"}
    best = min(scaled, key=lambda name: scaled[name].mean())
    gap = decide(PairedDifference.of(correct["pgd40-xent"], scaled[best]), most=_SCALE_GAP)
    label, margin = "median clean margin after scaling the logits", evidence.median_margin
    scales = [float(name.rpartition("-")[2]) for name in scaled]
    reason = (
        f"logits scaled to a median margin of {best.rpartition('-')[2]} leave "
        f"{percent(scaled[best])}, the model's own scale {percent(correct['pgd40-xent'])}: {gap}"
    )
    figure = {"accuracy": accuracies(correct), "gap": gap.to_json()}
    curve = _curve("logit_scale", label, scales, scaled, margin)
    return Outcome(gap.status, reason, figure, (curve,))


def _targeted_attacks(evidence: Evidence) -> dict[str, Attack]:
    attack = MultiTargeted(evidence.threat, _BASE_STEPS, evidence.step_size)
    return {"pgd40-cw": base_attack(evidence, "cw"), "multitargeted": attack}


def _odi_attacks(evidence: Evidence) -> dict[str, Attack]:
    attack = ODI(evidence.threat, num_steps=_BASE_STEPS, step_size=evidence.step_size)
    return {"pgd40-cw": base_attack(evidence, "cw"), "odi": attack}


def _stage_attacks(evidence: Evidence) -> dict[str, Attack]:
    threat, strong = evidence.threat, strong_attacks(evidence)
    return {name: strong[name] for name in strong if name == "apgd-t"} | {
        "md-label-first": MD(threat, "label"),
        "md-other-first": MD(threat, "other"),
        "mifpe": ScaledPGD(threat, None, 100, 2.5 * threat.epsilon / 100),
    }


def against_control(
    evidence: Evidence,
    gap: PairedDifference,
    takes_from: Callable[[Control], PairedDifference],
    what: str,
    threshold: float,
    *,
    over_control: float | None = None,
    without_control: float | None = None,
    figure: Mapping[str, Any] | None = None,
    curves: Sequence[Curve] = (),
) -> Outcome:
    """Judge a gap: in a wide ball relative to adversarially trained controls, else as it is.

    Args:
        evidence: of the audited model.
        gap: what a stronger attack took of what a weaker one left of the audited model.
        takes_from: the same of a control.
        what: the stronger attack in words.
        threshold: what it may take.
        over_control: what it may take in a wide ball beyond what it takes from the control;
            `threshold` if None.
        without_control: what it may take in a wide ball without a control; a report if None.
        figure: further measurements.
        curves: for figures.
    """
    measured = dict(figure or {})
    allowed: float | None = threshold
    if evidence.has_wide_ball:
        known = [
            found.value
            for found in map(takes_from, evidence.controls_of("adversarial"))
            if found.correct_a >= _LEAST_CONTROL * found.num_examples
        ]
        allowed = without_control
        if known:
            measured["control_gap"] = max(known)
            beyond = threshold if over_control is None else over_control
            allowed = beyond + max(0.0, *known)
    if allowed is None:
        measured["gap"] = decide(gap).to_json()
        reason = (
            f"{what} takes {in_points(gap)}; {WIDE} only an adversarially trained control tells, "
            f"one that keeps {100 * _LEAST_CONTROL:g} %"
        )
        return Outcome("report", reason, measured, tuple(curves))
    decision = decide(gap, most=allowed)
    measured["gap"] = decision.to_json()
    return Outcome(decision.status, f"{what} takes {decision}", measured, tuple(curves))


def _convergence(evidence, attacks, names, what, threshold, **options) -> Outcome:
    """Judge what the second named attack takes of what the first, or the same one, leaves."""
    pair = {name: attacks[name] for name in names}

    def gap(correct):
        return PairedDifference.of(*(correct[name] for name in names))

    return against_control(
        evidence,
        gap(evidence.run(pair)),
        lambda control: gap(evidence.run_on_control(control, pair)),
        what,
        threshold,
        **options,
    )


def _apart(attacks, threshold, least_classes=2, *, either_way=False):
    """A judge of how much less the second of two attacks leaves, or the stronger of the two."""

    def judge(evidence: Evidence) -> Outcome:
        if evidence.num_classes < least_classes:
            return _too_few_classes(least_classes)
        correct = evidence.run(attacks(evidence))
        weaker, stronger = correct
        # On a smooth surface both find the same.
        if either_way and correct[weaker].mean() < correct[stronger].mean():
            weaker, stronger = stronger, weaker
        gap = decide(PairedDifference.of(correct[weaker], correct[stronger]), most=threshold)
        leaves = f"{weaker} leaves {percent(correct[weaker])}"
        reason = f"{leaves}, {stronger} {percent(correct[stronger])}: {gap}"
        figure = {"accuracy": accuracies(correct), "gap": gap.to_json()}
        return Outcome(gap.status, reason, figure)

    return judge


def _added(attacks, before, threshold, least_classes=2):
    """A judge of what the other attacks take, image by image, of what one of them left."""

    def judge(evidence: Evidence) -> Outcome:
        if evidence.num_classes < least_classes:
            return _too_few_classes(least_classes)
        correct = evidence.run(attacks(evidence))
        left = correct[before]
        gap = decide(PairedDifference.of(left, np.all([*correct.values()], axis=0)), most=threshold)
        added = [name for name in correct if name != before]
        takes = "takes" if len(added) == 1 else "take"
        figure = {"accuracy": accuracies(correct), "added": gap.to_json()}
        return Outcome(
            gap.status, f"of what {before} left, {', '.join(added)} {takes} {gap}", figure
        )

    return judge


def _too_few_classes(least):
    return Outcome("not_applicable", f"needs at least {least} classes")


def _curve(name, label, x, correct, reported=None) -> Curve:
    return Curve(name, label, tuple(x), tuple(accuracies(correct).values()), reported)


STRENGTH = (
    Diagnostic(
        8,
        "Iterative beats single step",
        f"Under PGD with 20 steps, and under the claimant's own attacks, at most {as_points(RISE)} "
        f"more are robust than under FGSM.",
        _iterative_beats_single_step,
        _iterative_attacks,
    ),
    Diagnostic(
        9,
        "Iteration convergence",
        f"Doubling the steps takes at most {as_points(_ITERATION_GAP)} ({_BEYOND}).",
        _iteration_convergence,
        _iteration_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        10,
        "Restart convergence",
        f"Going from 10 to 100 restarts takes at most {as_points(_RESTART_GAP)} ({_BEYOND}).",
        _restart_convergence,
        _restart_attacks,
        budget="full",
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        11,
        "Step-size sweep",
        f"The best step size takes at most {as_points(_STEP_SIZE_GAP)} more than the plain one "
        f"({_BEYOND}, {as_points(_STEP_SIZE_GAP_WIDE)} without one).",
        _step_size_sweep,
        _step_size_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        12,
        "Logit scale",
        f"PGD on the cross-entropy of rescaled logits takes at most {as_points(_SCALE_GAP)} more "
        f"than on the model's own.",
        _logit_scale,
        _scale_attacks,
    ),
    Diagnostic(
        13,
        "Loss gap",
        f"APGD on the targeted DLR leaves at most {as_points(_LOSS_GAP)} less than on the "
        f"cross-entropy.",
        _apart(strong_attacks, _LOSS_GAP, 4),
        strong_attacks,
    ),
    Diagnostic(
        14,
        "Cross-entropy against margin",
        f"PGD on cross-entropy and on the margin differ by at most {as_points(_MARGIN_GAP)}.",
        _apart(margin_attacks, _MARGIN_GAP, either_way=True),
        margin_attacks,
    ),
    Diagnostic(
        15,
        "Targeted at all classes",
        f"MultiTargeted takes at most {as_points(_TARGETED_GAP)} that the untargeted margin left.",
        _added(_targeted_attacks, "pgd40-cw", _TARGETED_GAP, 3),
        _targeted_attacks,
        budget="standard",
    ),
    Diagnostic(
        16,
        "Output diversified start",
        f"ODI takes at most {as_points(_START_GAP)} that the uniform start left.",
        _added(_odi_attacks, "pgd40-cw", _START_GAP),
        _odi_attacks,
        budget="standard",
    ),
    Diagnostic(
        17,
        "Two stages and rescaled logits",
        f"MD and MIFPE take at most {as_points(_STAGE_GAP)} that APGD-T left.",
        _added(_stage_attacks, "apgd-t", _STAGE_GAP, 4),
        _stage_attacks,
        budget="standard",
    ),
)
