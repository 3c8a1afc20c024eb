"""Tests 23 to 27: whether the accuracy behaves as it must at every epsilon and on controls."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from logit_reg.attacks import PGD, Attack
from logit_reg.attacks.apgd import APGD
from logit_reg.audit.decisions import accuracies, as_points, decide, overall, percent
from logit_reg.audit.evidence import Control, Diagnostic, Evidence, Outcome
from logit_reg.audit.records import Curve
from logit_reg.audit.strength import RISE, base_attack, margin_attacks, strong_attacks
from logit_reg.evaluation.statistics import PairedDifference, Proportion

_CURVE_STEPS = 40
_QUICK_SHARES = (0.5, 1.0, 1.5)
_SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_UNBOUNDED_STEPS = 100
# Accuracy that the audit's attacks may leave of a natural model, and of one known to be broken.
_NATURAL_ACCURACY = 0.01
_BROKEN_ACCURACY = 0.10
_REFERENCE_TOLERANCE = 0.005


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


def _iterative(evidence: Evidence) -> dict[str, Attack]:
    """The claimed attacks with more than one step, which must succeed in any larger ball."""
    return {
        name: attack
        for name, attack in evidence.claimed.items()
        if dataclasses.is_dataclass(attack) and attack.cost()[1] > 1
    }


def _curve_attacks(evidence: Evidence) -> dict[str, Attack]:
    largest = evidence.reach(0.5)
    shares = evidence.pick(_QUICK_SHARES, _SHARES, _SHARES)
    radii = [share * evidence.threat.epsilon for share in shares]
    return {
        f"pgd{_CURVE_STEPS}-cw-eps-{radius:.4g}": PGD(
            dataclasses.replace(evidence.threat, epsilon=radius),
            "cw",
            _CURVE_STEPS,
            radius / 10,
            early_stop=True,
        )
        for radius in (*(r for r in radii if r < largest), largest)
    }


def _claimed_in_grey_ball(evidence: Evidence) -> dict[str, Attack]:
    largest = evidence.reach(0.5)
    return {
        f"{name}-eps-{largest:.4g}": widened(attack, largest, step_size=largest / 10)
        for name, attack in _iterative(evidence).items()
    }


def _all_curve_attacks(evidence: Evidence) -> dict[str, Attack]:
    return _curve_attacks(evidence) | _claimed_in_grey_ball(evidence)


def _epsilon_curve(evidence: Evidence) -> Outcome:
    attacks = _curve_attacks(evidence)
    correct = {"clean": evidence.clean} | evidence.run(attacks)
    radii = (0.0, *(attack.threat.epsilon for attack in attacks.values()))
    shares = tuple(accuracies(correct).values())
    curve = Curve("epsilon", "epsilon (pixel units)", radii, shares, evidence.threat.epsilon)
    found = list(correct.values())
    checks = {
        f"on the way to epsilon {radius:.3g} the accuracy rises by": decide(
            PairedDifference.of(larger, smaller), most=RISE
        )
        for radius, smaller, larger in zip(radii[1:], found[:-1], found[1:], strict=True)
    }
    # One answer for all images is right for those of one class.
    allowed = float(np.bincount(evidence.labels).max() / evidence.num_examples)
    in_grey_ball = {"PGD": found[-1]} | evidence.run_claimed(_claimed_in_grey_ball(evidence))
    checks |= {
        f"where every ball holds the grey image, {name} leaves": decide(
            Proportion.of(robust), most=allowed
        )
        for name, robust in in_grey_ball.items()
    }
    figure: dict[str, Any] = {"epsilon": list(radii), "accuracy": list(shares)}
    figure["allowed_at_largest"] = allowed
    outcome = _of_checks(checks, figure)
    if outcome.status == "pass":
        reason = f"the accuracy falls to {percent(shares[-1])} at epsilon {radii[-1]:.3g}"
        return Outcome("pass", reason, figure, (curve,))
    return dataclasses.replace(outcome, curves=(curve,))


def _unbounded_attacks(evidence: Evidence) -> dict[str, Attack]:
    radius = evidence.reach(1.0)
    plain: dict[str, Attack] = {
        f"pgd-{loss}": base_attack(evidence, loss) for loss in ("cw", "xent")
    } | _iterative(evidence)
    return {
        f"{name}-unbounded": widened(attack, radius, step_size=radius / 20)
        for name, attack in plain.items()
    }


def _unbounded(evidence: Evidence) -> Outcome:
    attacks = _unbounded_attacks(evidence)
    own = {name: attack for name, attack in attacks.items() if name.startswith("pgd-")}
    # The audit's two losses stand in for each other; a claimed attack answers for itself.
    left = {"PGD": np.all([*evidence.run(own).values()], axis=0)}
    left |= evidence.run_claimed({n: a for n, a in attacks.items() if n not in own})
    figure = {"accuracy": accuracies(left)}
    weakest = max(left, key=lambda name: left[name].mean())
    if left[weakest].any():
        reason = f"{weakest} leaves {percent(left[weakest])} although any image is allowed"
        return Outcome("fail", reason, figure)
    return Outcome("pass", "every image falls where any image is allowed", figure)


def _left_of(evidence: Evidence, controls: Iterable[Control], attacks) -> dict[str, Proportion]:
    """What some attacks together leave of each control, by name."""
    return {
        control.name: Proportion.of(
            np.all([*evidence.run_on_control(control, attacks).values()], axis=0)
        )
        for control in controls
    }


def _positive_control(evidence: Evidence) -> Outcome:
    natural, references = evidence.controls_of("natural"), evidence.controls_of("reference")
    if not natural:
        return Outcome("skipped", "needs a natural model as a control")
    left = _left_of(evidence, natural, margin_attacks(evidence) | strong_attacks(evidence))
    checks = {
        f"of the natural {name} the attacks leave": decide(found, most=_NATURAL_ACCURACY)
        for name, found in left.items()
    }
    of_references = _left_of(evidence, references, {"apgd-ce": APGD(evidence.threat)})
    for control in references:
        published = control.published or 0.0
        checks[f"of {control.name} APGD-CE leaves"] = decide(
            of_references[control.name],
            least=published - _REFERENCE_TOLERANCE,
            most=published + _REFERENCE_TOLERANCE,
        )
    figure = {"natural": _values(left), "reference": _values(of_references)}
    return _of_checks(checks, figure)


def _negative_control(evidence: Evidence) -> Outcome:
    controls = evidence.controls_of("noise_only", "squeezed")
    if not controls:
        return Outcome("skipped", "needs a noise-only or a known-broken squeezed model")
    left = _left_of(evidence, controls, margin_attacks(evidence) | strong_attacks(evidence))
    checks = {
        f"of {name}, known to be broken, the attacks leave": decide(found, most=_BROKEN_ACCURACY)
        for name, found in left.items()
    }
    return _of_checks(checks, _values(left))


def _values(left):
    return {name: found.value for name, found in left.items()}


def _of_checks(checks, figure) -> Outcome:
    """The status of all checks, and what those of that status found."""
    status = overall(checks.values())
    found = (f"{words} {found}" for words, found in checks.items() if found.status == status)
    return Outcome(status, "; ".join(found), figure)


def _plausibility(evidence: Evidence) -> Outcome:
    if evidence.ceiling is None:
        return Outcome("not_applicable", "no best published accuracy is known for this claim")
    ceiling, source = evidence.ceiling
    reason = f"the best published is {percent(ceiling)}: {source}"
    status = "fail" if evidence.claim > ceiling else "pass"
    return Outcome(status, reason, {"ceiling": ceiling, "source": source})


SANITY = (
    Diagnostic(
        23,
        "Accuracy against epsilon",
        f"The accuracy rises nowhere with epsilon, by more than {as_points(RISE)}, and where every "
        f"ball holds the grey image it is at most the share of the largest class.",
        _epsilon_curve,
        _all_curve_attacks,
    ),
    Diagnostic(
        24,
        "Unbounded attack",
        "Where any image is allowed, PGD and the claimant's own attacks break every one.",
        _unbounded,
        _unbounded_attacks,
        threshold_origin="src",
    ),
    Diagnostic(
        25,
        "Positive control",
        f"The same attacks leave at most {100 * _NATURAL_ACCURACY:g} % of a natural model, and "
        f"of a reference what was published, to {as_points(_REFERENCE_TOLERANCE)}.",
        _positive_control,
        threshold_origin="src",
        budget="full",
        control_kinds=("natural", "reference"),
    ),
    Diagnostic(
        26,
        "Negative control",
        f"The same attacks leave at most {100 * _BROKEN_ACCURACY:g} % of models known to be "
        f"broken.",
        _negative_control,
        threshold_origin="src",
        budget="full",
        control_kinds=("noise_only", "squeezed"),
    ),
    Diagnostic(
        27,
        "Plausibility ceiling",
        "The claim is not above the best published robust accuracy.",
        _plausibility,
        budget="full",
    ),
)
