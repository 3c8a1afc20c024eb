"""Tests 23 to 27: whether the accuracy behaves as it must at every epsilon and on controls."""

import dataclasses
import math
from typing import Any

import numpy as np

from logit_reg.attacks import PGD, Attack
from logit_reg.attacks.apgd import APGD
from logit_reg.audit.bench import Bench, Diagnostic, Outcome, Plan
from logit_reg.audit.decisions import decide, overall
from logit_reg.audit.records import Curve
from logit_reg.audit.strength import RISE, base_attack, strong_attacks
from logit_reg.evaluation.statistics import PairedDifference, Proportion
from logit_reg.threat import ThreatModel

_CURVE_STEPS = 40
_QUICK_SHARES = (0.5, 1.0, 1.5)
_SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_UNBOUNDED_STEPS = 100
# Accuracy that the audit's attacks may leave of a natural model, and of one known to be broken.
_NATURAL_ACCURACY = 0.01
_BROKEN_ACCURACY = 0.10
_REFERENCE_TOLERANCE = 0.005
# Best published robust accuracies: shape, classes, norm, epsilon as a fraction of the range.
_MNIST, _CIFAR = (28, 28, 1), (32, 32, 3)
_CEILINGS = (
    (_MNIST, 10, "linf", 0.3, 0.9634, "Gowal et al. 2020 (AutoAttack)"),
    (_CIFAR, 10, "linf", 8 / 255, 0.7371, "Bartoldson et al. 2024 (RobustBench)"),
    (_CIFAR, 10, "l2", 0.5, 0.8497, "Wang et al. 2023 (RobustBench)"),
    (_CIFAR, 10, "l2", 1.5, 0.33, "l2 adversarial training, interpolated (MadryLab)"),
    (_CIFAR, 100, "linf", 8 / 255, 0.4267, "Wang et al. 2023 (RobustBench)"),
)


def widened(attack: Attack, epsilon: float, *, step_size: float) -> Attack:
    """The same attack in a larger ball, from the image itself.

    A random start alone would fool a model in a large ball, whatever the attack does then.

    Args:
        attack: a frozen dataclass with a threat model; one around another attack is unwrapped.
        epsilon: radius of the ball, pixel units.
        step_size: length of a step, pixel units, where the attack has steps.
    """
    if hasattr(attack, "attack"):
        return widened(attack.attack, epsilon, step_size=step_size)
    names = {field.name for field in dataclasses.fields(attack)}  # type: ignore[arg-type]
    changes = {
        "threat": dataclasses.replace(attack.threat, epsilon=epsilon),
        "step_size": step_size,
        "num_steps": _UNBOUNDED_STEPS,
        "random_start": False,
        "early_stop": True,
    }
    known = {name: value for name, value in changes.items() if name in names}
    return dataclasses.replace(attack, **known)  # type: ignore[type-var]


def _reach(threat: ThreatModel, image_shape, share: float) -> float:
    """The epsilon that lets every value move by a share of the pixel range."""
    root = math.sqrt(math.prod(image_shape)) if threat.norm == "l2" else 1.0
    return share * (threat.upper - threat.lower) * root


def _iterative(plan: Plan) -> dict[str, Attack]:
    """The claimed attacks with more than one step, which must succeed in any larger ball."""
    return {
        name: attack
        for name, attack in plan.claimed.items()
        if dataclasses.is_dataclass(attack) and attack.cost()[1] > 1
    }


def _curve_attacks(plan: Plan) -> dict[str, Attack]:
    largest = _reach(plan.threat, plan.image_shape, 0.5)
    shares = plan.pick(_QUICK_SHARES, _SHARES, _SHARES)
    radii = [share * plan.threat.epsilon for share in shares]
    return {
        f"pgd{_CURVE_STEPS}-cw-eps-{radius:.4g}": PGD(
            dataclasses.replace(plan.threat, epsilon=radius),
            "cw",
            _CURVE_STEPS,
            radius / 10,
            early_stop=True,
        )
        for radius in (*(r for r in radii if r < largest), largest)
    }


def _claimed_in_grey_ball(plan: Plan) -> dict[str, Attack]:
    largest = _reach(plan.threat, plan.image_shape, 0.5)
    return {
        f"{name}-eps-{largest:.4g}": widened(attack, largest, step_size=largest / 10)
        for name, attack in _iterative(plan).items()
    }


def _all_curve_attacks(plan: Plan) -> dict[str, Attack]:
    return _curve_attacks(plan) | _claimed_in_grey_ball(plan)


def _epsilon_curve(bench: Bench) -> Outcome:
    plan, attacks = bench.plan, _curve_attacks(bench.plan)
    correct = {"clean": bench.clean} | bench.run(attacks)
    radii = (0.0, *(attack.threat.epsilon for attack in attacks.values()))
    accuracies = tuple(float(found.mean()) for found in correct.values())
    figure: dict[str, Any] = {"epsilon": list(radii), "accuracy": list(accuracies)}
    curve = Curve("epsilon", "epsilon (pixel units)", radii, accuracies, plan.threat.epsilon)

    found = list(correct.values())
    checks = {
        f"on the way to epsilon {radius:.3g} the accuracy rises by": decide(
            PairedDifference.of(larger, smaller), most=RISE
        )
        for radius, smaller, larger in zip(radii[1:], found[:-1], found[1:], strict=True)
    }
    # One answer for all images is right for those of one class.
    allowed = float(np.bincount(bench.labels).max() / len(bench.labels))
    figure["allowed_at_largest"] = allowed
    in_grey_ball = {"PGD": found[-1]} | bench.run_claimed(_claimed_in_grey_ball(plan))
    checks |= {
        f"where every ball holds the grey image, {name} leaves": decide(
            Proportion.of(stands), most=allowed
        )
        for name, stands in in_grey_ball.items()
    }
    status = overall(checks.values())
    reason = f"the accuracy falls to {100 * accuracies[-1]:.1f} % at epsilon {radii[-1]:.3g}"
    if status != "pass":
        reason = _listed(checks, status)
    return Outcome(status, reason, figure, (curve,))


def _unbounded_attacks(plan: Plan) -> dict[str, Attack]:
    radius = _reach(plan.threat, plan.image_shape, 1.0)
    plain: dict[str, Attack] = {
        f"pgd-{loss}": base_attack(plan, loss) for loss in ("cw", "xent")
    } | _iterative(plan)
    return {
        f"{name}-unbounded": widened(attack, radius, step_size=radius / 20)
        for name, attack in plain.items()
    }


def _unbounded(bench: Bench) -> Outcome:
    attacks = _unbounded_attacks(bench.plan)
    own = {name: attack for name, attack in attacks.items() if name.startswith("pgd-")}
    correct = bench.run(own)
    # The audit's two losses stand in for each other; a claimed attack answers for itself.
    left = {"PGD": np.all(list(correct.values()), axis=0)}
    left |= bench.run_claimed({n: a for n, a in attacks.items() if n not in own})
    figure = {"accuracy": {name: float(stands.mean()) for name, stands in left.items()}}
    weakest = max(left, key=lambda name: left[name].mean())
    if left[weakest].any():
        return Outcome(
            "fail",
            f"{weakest} leaves {100 * left[weakest].mean():.1f} % although any image is allowed",
            figure,
        )
    return Outcome("pass", "nothing stands where any image is allowed", figure)


def _control_attacks(plan: Plan) -> dict[str, Attack]:
    return {
        "pgd40-xent": base_attack(plan),
        "pgd40-cw": base_attack(plan, "cw"),
        **strong_attacks(plan),
    }


def _positive_control(bench: Bench) -> Outcome:
    plan = bench.plan
    natural = plan.controls_of("natural")
    if not natural:
        return Outcome("skipped", "needs a natural model as a control")
    figure: dict = {"natural": {}, "reference": {}}
    checks = {}
    for control in natural:
        found = bench.run_on_control(control, _control_attacks(plan)).values()
        left = Proportion.of(np.all(list(found), axis=0))
        figure["natural"][control.name] = left.value
        words = f"of the natural {control.name} the attacks leave"
        checks[words] = decide(left, most=_NATURAL_ACCURACY)
    for control in plan.controls_of("reference"):
        left = Proportion.of(
            bench.run_on_control(control, {"apgd-ce": APGD(plan.threat)})["apgd-ce"]
        )
        figure["reference"][control.name] = left.value
        published = control.published or 0.0
        checks[f"of {control.name} APGD-CE leaves"] = decide(
            left, least=published - _REFERENCE_TOLERANCE, most=published + _REFERENCE_TOLERANCE
        )
    return _of_controls(checks, figure)


def _negative_control(bench: Bench) -> Outcome:
    controls = bench.plan.controls_of("noise_only", "squeezed")
    if not controls:
        return Outcome("skipped", "needs a noise-only or a known-broken squeezed model")
    figure, checks = {}, {}
    for control in controls:
        found = bench.run_on_control(control, _control_attacks(bench.plan)).values()
        left = Proportion.of(np.all(list(found), axis=0))
        figure[control.name] = left.value
        words = f"of {control.name}, known to be broken, the attacks leave"
        checks[words] = decide(left, most=_BROKEN_ACCURACY)
    return _of_controls(checks, figure)


def _of_controls(checks, figure) -> Outcome:
    status = overall(checks.values())
    return Outcome(status, _listed(checks, status), figure)


def _listed(checks, status) -> str:
    """What the checks of a status found, by the words in front of each."""
    return "; ".join(
        f"{words} {found}" for words, found in checks.items() if found.status == status
    )


def _plausibility(bench: Bench) -> Outcome:
    threat, plan = bench.plan.threat, bench.plan
    share = threat.epsilon / (threat.upper - threat.lower)
    for shape, num_classes, norm, epsilon, ceiling, source in _CEILINGS:
        same = (shape, num_classes, norm) == (plan.image_shape, plan.num_classes, threat.norm)
        if same and math.isclose(share, epsilon, rel_tol=0.02):
            figure = {"ceiling": ceiling, "source": source}
            reason = f"the best published is {100 * ceiling:.1f} %: {source}"
            return Outcome("fail" if bench.claim > ceiling else "pass", reason, figure)
    return Outcome("not_applicable", "no published ceiling for this threat model is known here")


SANITY = (
    Diagnostic(
        23,
        "Accuracy against epsilon",
        "sanity",
        f"The accuracy rises nowhere with epsilon, by more than {100 * RISE:g} point, and where "
        f"every ball holds the grey image it is at most the share of the largest class.",
        "prop",
        "quick",
        _epsilon_curve,
        _all_curve_attacks,
    ),
    Diagnostic(
        24,
        "Unbounded attack",
        "sanity",
        "Where any image is allowed, PGD and the claimant's own attacks break every one.",
        "src",
        "quick",
        _unbounded,
        _unbounded_attacks,
    ),
    Diagnostic(
        25,
        "Positive control",
        "sanity",
        f"The same attacks leave at most {100 * _NATURAL_ACCURACY:g} % of a natural model, and "
        f"of a reference what was published, to {100 * _REFERENCE_TOLERANCE:g} points.",
        "src",
        "full",
        _positive_control,
        control_kinds=("natural", "reference"),
    ),
    Diagnostic(
        26,
        "Negative control",
        "sanity",
        f"The same attacks leave at most {100 * _BROKEN_ACCURACY:g} % of models known to be "
        f"broken.",
        "src",
        "full",
        _negative_control,
        control_kinds=("noise_only", "squeezed"),
    ),
    Diagnostic(
        27,
        "Plausibility ceiling",
        "sanity",
        "The claim is not above the best published robust accuracy.",
        "prop",
        "full",
        _plausibility,
    ),
)
