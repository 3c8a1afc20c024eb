"""Tests 8 to 17: a ladder of ever stronger attacks; no rung may take much that the last left."""

from collections.abc import Mapping
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
from logit_reg.audit.bench import Bench, Diagnostic, Outcome, Plan
from logit_reg.audit.decisions import decide, in_points, overall
from logit_reg.audit.records import Curve
from logit_reg.evaluation.statistics import PairedDifference

# What an attack may leave more than a weaker one, a fraction: random starts differ by as much.
RISE = 0.01
# Fractions of accuracy that a rung may take.
_ITERATION_GAP = 0.005
_RESTART_GAP = 0.01
_STEP_SIZE_GAP = 0.01
_STEP_SIZE_GAP_MNIST = 0.03
_SCALE_GAP = 0.01
_LOSS_GAP = 0.05
_MARGIN_GAP = 0.03
_TARGETED_GAP = 0.01
_START_GAP = 0.01
_STAGE_GAP = 0.01

# Step sizes of the sweep, in epsilon. Jagged surfaces are climbed with 0.4 to 0.65.
_STEP_SHARES = (1 / 25, 1 / 10, 1 / 4, 1 / 2, 0.65, 1.0, 2.0)
_QUICK_STEP_SHARES = (1 / 10, 1 / 4, 0.65, 2.0)
# Logit scales, in units of the clean images' median margin.
_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_QUICK_SCALES = (0.1, 1.0, 10.0)

_BASE_STEPS = 40
# Accuracy under attack that makes a control adversarially trained; one that keeps less would
# excuse whatever is compared with it.
_LEAST_CONTROL = 0.5


NO_CONTROL = (
    f"on MNIST only an adversarially trained control tells, one that keeps "
    f"{100 * _LEAST_CONTROL:g} %"
)


def is_trained(correct: np.ndarray) -> bool:
    """Whether a control that stands on (N,) bool of the images is one to compare with."""
    return float(np.mean(correct)) >= _LEAST_CONTROL


def base_attack(plan: Plan, loss: str = "xent", num_steps: int = _BASE_STEPS) -> PGD:
    """The plain PGD that the ladder starts from."""
    return PGD(plan.threat, loss, num_steps, plan.step_size, early_stop=True)


def strong_attacks(plan: Plan) -> dict[str, Attack]:
    """APGD on cross-entropy and, where it is defined, on the targeted DLR."""
    num_steps = plan.pick(50, 100, 100)
    attacks: dict[str, Attack] = {"apgd-ce": APGD(plan.threat, "xent", num_steps)}
    if plan.num_classes >= 4:
        num_targets = plan.pick(3, 9, 9)
        attacks["apgd-t"] = APGDTargeted(plan.threat, num_targets, num_steps)
    return attacks


def _iterative_attacks(plan: Plan) -> dict[str, Attack]:
    step_size = 2.5 * plan.threat.epsilon / 20
    return {
        "fgsm": FGSM(plan.threat),
        "pgd20": PGD(plan.threat, "xent", 20, step_size, early_stop=True),
        **plan.claimed,
    }


def _iterative_beats_single_step(bench: Bench) -> Outcome:
    attacks = _iterative_attacks(bench.plan)
    correct = bench.run({name: attacks[name] for name in ("fgsm", "pgd20")})
    correct |= bench.run_claimed(bench.plan.claimed)
    single = correct["fgsm"]
    rises = {
        name: decide(PairedDifference.of(found, single), most=RISE)
        for name, found in correct.items()
        if name != "fgsm"
    }
    figure = {
        "accuracy": _accuracies(correct),
        "rise": {name: rise.to_json() for name, rise in rises.items()},
    }
    status = overall(rises.values())
    if status == "fail":
        weak = {name: rise for name, rise in rises.items() if rise.status == "fail"}
        listed = "; ".join(f"{name}: {rise}" for name, rise in weak.items())
        return Outcome(
            status,
            f"more is left standing than by one step of FGSM, a faulty attack: {listed}",
            figure,
        )
    # The one that comes nearest to the limit.
    name = max(rises, key=lambda name: rises[name].found.interval[1])
    reason = f"{name} leaves {_percent(correct[name])}, FGSM {_percent(single)}"
    return Outcome(status, f"{reason}: {rises[name]}", figure)


def _iteration_attacks(plan: Plan) -> dict[str, PGD]:
    ladder = plan.pick((10, 40, 80), (10, 40, 100, 200), (10, 40, 100, 200, 400))
    return {f"pgd{steps}-xent": base_attack(plan, num_steps=steps) for steps in ladder}


def _iteration_convergence(bench: Bench) -> Outcome:
    attacks = _iteration_attacks(bench.plan)
    correct = bench.run(attacks)
    *_, half, double = correct
    curve = Curve(
        "steps",
        "steps of PGD",
        tuple(float(attack.num_steps) for attack in attacks.values()),
        _shares(correct),
    )
    outcome = _against_control(
        bench,
        {half: attacks[half], double: attacks[double]},
        PairedDifference.of(correct[half], correct[double]),
        _ITERATION_GAP,
        f"doubling {attacks[half].num_steps} steps",
    )
    return Outcome(outcome.status, outcome.reason, outcome.figure, (curve,))


def _restart_attacks(plan: Plan) -> dict[str, Attack]:
    attack = base_attack(plan, "cw")
    return {f"pgd40-cw-x{count}": Restarts(attack, count) for count in (10, 100)}


def _restart_convergence(bench: Bench) -> Outcome:
    attacks = _restart_attacks(bench.plan)
    few, many = bench.run(attacks).values()
    return _against_control(
        bench,
        attacks,
        PairedDifference.of(few, many),
        _RESTART_GAP,
        "going from 10 to 100 restarts",
    )


def _step_size_attacks(plan: Plan) -> dict[str, PGD]:
    shares = plan.pick(_QUICK_STEP_SHARES, _STEP_SHARES, _STEP_SHARES)
    epsilon = plan.threat.epsilon
    sizes = sorted({plan.step_size, *(share * epsilon for share in shares)})
    return {
        "pgd40-xent" if size == plan.step_size else f"pgd40-xent-step-{size / epsilon:.3g}-eps": (
            PGD(plan.threat, "xent", _BASE_STEPS, size, early_stop=True)
        )
        for size in sizes
    }


def _step_size_sweep(bench: Bench) -> Outcome:
    attacks = _step_size_attacks(bench.plan)
    correct = bench.run(attacks)
    best = min(correct, key=lambda name: correct[name].mean())
    curve = Curve(
        "step_size",
        "step size of PGD (pixel units)",
        tuple(attack.step_size for attack in attacks.values()),
        _shares(correct),
        reported=bench.plan.step_size,
    )
    gap = PairedDifference.of(correct["pgd40-xent"], correct[best])
    outcome = _against_control(
        bench,
        {"pgd40-xent": attacks["pgd40-xent"], best: attacks[best]},
        gap,
        _STEP_SIZE_GAP,
        f"the best step size, {attacks[best].step_size:.3g} instead of {bench.plan.step_size:.3g},",
        without_control=_STEP_SIZE_GAP_MNIST,
    )
    return Outcome(outcome.status, outcome.reason, outcome.figure, (curve,))


def _scale_attacks(plan: Plan) -> dict[str, Attack]:
    attacks: dict[str, Attack] = {"pgd40-xent": base_attack(plan)}
    if plan.median_margin > 0:
        for scale in plan.pick(_QUICK_SCALES, _SCALES, _SCALES):
            attacks[f"pgd40-xent-scale-{scale:g}"] = ScaledPGD(
                plan.threat, scale * plan.divisor / plan.median_margin, _BASE_STEPS, plan.step_size
            )
    return attacks


def _logit_scale(bench: Bench) -> Outcome:
    attacks = _scale_attacks(bench.plan)
    correct = bench.run(attacks)
    if len(attacks) == 1:
        return Outcome("fail", "half of the clean images have no margin to scale by")
    scaled = {name: found for name, found in correct.items() if name != "pgd40-xent"}
    best = min(scaled, key=lambda name: scaled[name].mean())
    gap = decide(PairedDifference.of(correct["pgd40-xent"], scaled[best]), most=_SCALE_GAP)
    curve = Curve(
        "logit_scale",
        "median clean margin after scaling the logits",
        tuple(float(name.rpartition("-")[2]) for name in scaled),
        _shares(scaled),
        reported=bench.plan.median_margin,
    )
    figure = {"accuracy": _accuracies(correct), "gap": gap.to_json()}
    scale = best.rpartition("-")[2]
    reason = (
        f"logits scaled to a median margin of {scale} leave {_percent(scaled[best])}, the "
        f"model's own scale {_percent(correct['pgd40-xent'])}: {gap}"
    )
    return Outcome(gap.status, reason, figure, (curve,))


def _loss_gap(bench: Bench) -> Outcome:
    if bench.plan.num_classes < 4:
        return _too_few_classes("the targeted DLR needs 4 classes")
    correct = bench.run(strong_attacks(bench.plan))
    return _gap(correct, "apgd-ce", "apgd-t", _LOSS_GAP)


def margin_attacks(plan: Plan) -> dict[str, Attack]:
    """The plain PGD on cross-entropy and on the margin."""
    return {"pgd40-xent": base_attack(plan), "pgd40-cw": base_attack(plan, "cw")}


def _margin_gap(bench: Bench) -> Outcome:
    correct = bench.run(margin_attacks(bench.plan))
    # Whichever of the two is the weaker: on a smooth surface both find the same.
    weaker, stronger = sorted(correct, key=lambda name: -correct[name].mean())
    return _gap(correct, weaker, stronger, _MARGIN_GAP)


def _targeted_attacks(plan: Plan) -> dict[str, Attack]:
    attack = MultiTargeted(plan.threat, _BASE_STEPS, plan.step_size)
    return {"pgd40-cw": base_attack(plan, "cw"), "multitargeted": attack}


def _targeted(bench: Bench) -> Outcome:
    if bench.plan.num_classes < 3:
        return _too_few_classes("there is only one wrong class")
    correct = bench.run(_targeted_attacks(bench.plan))
    return _added(correct, ["pgd40-cw"], ["multitargeted"], _TARGETED_GAP)


def _odi_attacks(plan: Plan) -> dict[str, Attack]:
    attack = ODI(plan.threat, num_steps=_BASE_STEPS, step_size=plan.step_size)
    return {"pgd40-cw": base_attack(plan, "cw"), "odi": attack}


def _odi(bench: Bench) -> Outcome:
    correct = bench.run(_odi_attacks(bench.plan))
    return _added(correct, ["pgd40-cw"], ["odi"], _START_GAP)


def _stage_attacks(plan: Plan) -> dict[str, Attack]:
    return {
        **strong_attacks(plan),
        "md-label-first": MD(plan.threat, "label"),
        "md-other-first": MD(plan.threat, "other"),
        "mifpe": ScaledPGD(plan.threat, None, 100, 2.5 * plan.threat.epsilon / 100),
    }


def _stages(bench: Bench) -> Outcome:
    if bench.plan.num_classes < 4:
        return _too_few_classes("the targeted DLR needs 4 classes")
    correct = bench.run(_stage_attacks(bench.plan))
    added = [name for name in correct if not name.startswith("apgd")]
    return _added(correct, ["apgd-t"], added, _STAGE_GAP)


def _against_control(
    bench: Bench,
    attacks: Mapping[str, Attack],
    gap: PairedDifference,
    threshold: float,
    what: str,
    without_control: float | None = None,
) -> Outcome:
    """Judge a gap: on MNIST relative to adversarially trained controls, elsewhere as it is.

    Args:
        bench: of the audited model.
        attacks: the weaker and the stronger one, for the controls.
        gap: what the stronger one took from the audited model.
        threshold: what it may take, beyond what it takes from the control on MNIST.
        what: the stronger attack in words.
        without_control: what it may take on MNIST where there is no control; a report if None.
    """
    figure: dict[str, Any] = {}
    allowed = threshold
    if bench.plan.is_mnist:
        known = [
            PairedDifference.of(weaker, stronger).value
            for weaker, stronger in (
                bench.run_on_control(control, attacks).values()
                for control in bench.plan.controls_of("adversarial")
            )
            if is_trained(weaker)
        ]
        if known:
            figure["control_gap"] = max(known)
            allowed = threshold + max(0.0, *known)
        elif without_control is None:
            figure["gap"] = decide(gap).to_json()
            return Outcome("report", f"{what} takes {in_points(gap)}; {NO_CONTROL}", figure)
        else:
            allowed = without_control
    decision = decide(gap, most=allowed)
    figure["gap"] = decision.to_json()
    return Outcome(decision.status, f"{what} takes {decision}", figure)


def _gap(correct, weaker, stronger, threshold) -> Outcome:
    """Judge the difference of the accuracies under two attacks."""
    gap = decide(PairedDifference.of(correct[weaker], correct[stronger]), most=threshold)
    reason = (
        f"{weaker} leaves {_percent(correct[weaker])}, {stronger} "
        f"{_percent(correct[stronger])}: {gap}"
    )
    figure = {"accuracy": _accuracies(correct), "gap": gap.to_json()}
    return Outcome(gap.status, reason, figure)


def _added(correct, before, added, threshold) -> Outcome:
    """Judge what some attacks take, image by image, of what others left."""
    left = np.all([correct[name] for name in before], axis=0)
    after = left & np.all([correct[name] for name in added], axis=0)
    gap = decide(PairedDifference.of(left, after), most=threshold)
    figure = {"accuracy": _accuracies(correct), "added": gap.to_json()}
    takes = "takes" if len(added) == 1 else "take"
    reason = f"of what {', '.join(before)} left, {', '.join(added)} {takes} {gap}"
    return Outcome(gap.status, reason, figure)


def _too_few_classes(why) -> Outcome:
    return Outcome("not_applicable", why)


def _accuracies(correct) -> dict[str, float]:
    return {name: float(np.mean(found)) for name, found in correct.items()}


def _shares(correct) -> tuple[float, ...]:
    return tuple(_accuracies(correct).values())


def _percent(correct) -> str:
    return f"{100 * np.mean(correct):.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:g} point{'s' if share != 0.01 else ''}"


STRENGTH = (
    Diagnostic(
        8,
        "Iterative beats single step",
        "attack strength",
        f"PGD with 20 steps, and the claimant's own attacks, leave at most {_points(RISE)} more "
        f"standing than FGSM.",
        "prop",
        "quick",
        _iterative_beats_single_step,
        _iterative_attacks,
    ),
    Diagnostic(
        9,
        "Iteration convergence",
        "attack strength",
        f"Doubling the steps takes at most {_points(_ITERATION_GAP)} (MNIST: beyond what it takes "
        f"from the adversarially trained control).",
        "prop",
        "quick",
        _iteration_convergence,
        _iteration_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        10,
        "Restart convergence",
        "attack strength",
        f"Going from 10 to 100 restarts takes at most {_points(_RESTART_GAP)} (MNIST: beyond what "
        f"it takes from the adversarially trained control).",
        "prop",
        "full",
        _restart_convergence,
        _restart_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        11,
        "Step-size sweep",
        "attack strength",
        f"The best step size takes at most {_points(_STEP_SIZE_GAP)} more than the plain one "
        f"(MNIST: beyond what it takes from the adversarially trained control, "
        f"{_points(_STEP_SIZE_GAP_MNIST)} without one).",
        "prop",
        "quick",
        _step_size_sweep,
        _step_size_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        12,
        "Logit scale",
        "attack strength",
        f"PGD on the cross-entropy of rescaled logits takes at most {_points(_SCALE_GAP)} more "
        f"than on the model's own.",
        "prop",
        "quick",
        _logit_scale,
        _scale_attacks,
    ),
    Diagnostic(
        13,
        "Loss gap",
        "attack strength",
        f"APGD on the targeted DLR leaves at most {_points(_LOSS_GAP)} less than on cross-entropy.",
        "prop",
        "quick",
        _loss_gap,
        strong_attacks,
    ),
    Diagnostic(
        14,
        "Cross-entropy against margin",
        "attack strength",
        f"PGD on cross-entropy and on the margin differ by at most {_points(_MARGIN_GAP)}.",
        "prop",
        "quick",
        _margin_gap,
        margin_attacks,
    ),
    Diagnostic(
        15,
        "Targeted at all classes",
        "attack strength",
        f"MultiTargeted takes at most {_points(_TARGETED_GAP)} that the untargeted margin left.",
        "prop",
        "standard",
        _targeted,
        _targeted_attacks,
    ),
    Diagnostic(
        16,
        "Output diversified start",
        "attack strength",
        f"ODI takes at most {_points(_START_GAP)} that the uniform start left.",
        "prop",
        "standard",
        _odi,
        _odi_attacks,
    ),
    Diagnostic(
        17,
        "Two stages and rescaled logits",
        "attack strength",
        f"MD and MIFPE take at most {_points(_STAGE_GAP)} that APGD-T left.",
        "prop",
        "standard",
        _stages,
        _stage_attacks,
    ),
)
