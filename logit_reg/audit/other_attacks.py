"""Tests 18 to 22: attacks of another kind, which must find nothing that gradients missed."""

from typing import Any

import numpy as np

from logit_reg.attacks import PGD, Attack, AutoAttack, HopSkipJump, Square
from logit_reg.attacks.random_noise import RandomNoise
from logit_reg.audit.bench import NUM_LEFT, Bench, Diagnostic, Outcome, Plan
from logit_reg.audit.decisions import decide, in_points
from logit_reg.audit.strength import NO_CONTROL, is_trained, margin_attacks, strong_attacks
from logit_reg.evaluation.statistics import PairedDifference

_BLACK_BOX_GAP = 0.002
_BLACK_BOX_GAP_OVER_CONTROL = 0.02
_TRANSFER_GAP = 0.002
_NUM_DRAWS = 10_000
_SQUARE_SHARES = (0.3, 0.8)
_SQUARE_QUERIES = 20_000
_TRANSFER_STEPS = 40


def _autoattack_attacks(plan: Plan) -> dict[str, Attack]:
    return {"autoattack": AutoAttack(plan.threat)}


def _autoattack(bench: Bench) -> Outcome:
    correct = bench.run(_autoattack_attacks(bench.plan))["autoattack"]
    accuracy = float(correct.mean())
    return Outcome(
        "report",
        f"AutoAttack leaves {100 * accuracy:.1f} % of {len(correct)} images",
        {"accuracy": accuracy},
    )


def _square_attacks(plan: Plan) -> dict[str, Attack]:
    return {f"square-p{p:g}": Square(plan.threat, _SQUARE_QUERIES, p) for p in _SQUARE_SHARES}


def _black_box(bench: Bench) -> Outcome:
    plan, before = bench.plan, bench.robust.copy()
    attacks = _square_attacks(plan)
    after = before & np.all(list(bench.run(attacks).values()), axis=0)
    gap = PairedDifference.of(before, after)
    figure: dict[str, Any] = {"white_box": float(before.mean())}
    reason = "of what the white-box attacks left, Square takes"
    allowed = _BLACK_BOX_GAP
    if plan.is_mnist:
        known = []
        for control in plan.controls_of("adversarial"):
            white = bench.run_on_control(control, strong_attacks(plan) | margin_attacks(plan))
            left = np.all(list(white.values()), axis=0)
            if is_trained(left):
                black = bench.run_on_control(control, attacks)
                known.append(float(np.mean(left & ~np.all(list(black.values()), axis=0))))
        if not known:
            figure["gap"] = decide(gap).to_json()
            return Outcome("report", f"{reason} {in_points(gap)}; {NO_CONTROL}", figure)
        allowed = max(known) + _BLACK_BOX_GAP_OVER_CONTROL
        figure["control_gap"] = max(known)
    decision = decide(gap, most=allowed)
    figure["gap"] = decision.to_json()
    return Outcome(decision.status, f"{reason} {decision}", figure)


def _transfer_attacks(plan: Plan) -> dict[str, Attack]:
    # The margin of the source goes on beyond its boundary: that of the target lies elsewhere.
    return {
        f"pgd40-{loss}": PGD(
            plan.threat,
            loss,
            _TRANSFER_STEPS,
            plan.threat.epsilon / 10,
            confidence=50.0 if loss == "cw" else 0.0,
            early_stop=True,
        )
        for loss in ("xent", "cw")
    }


def _sources(plan: Plan):
    return plan.controls_of("natural", "noise_only", "same_recipe")


def _transfer(bench: Bench) -> Outcome:
    controls = _sources(bench.plan)
    if not controls:
        return Outcome(
            "skipped", "needs controls: a natural, a noise-only or a model of the same recipe"
        )
    before = bench.robust.copy()
    after, accuracy = before.copy(), {}
    for control in controls:
        found = list(bench.run_transferred(control, _transfer_attacks(bench.plan)).values())
        after &= np.all(found, axis=0)
        accuracy[control.name] = float(np.mean(np.all(found, axis=0)))
    new = decide(PairedDifference.of(before, after), most=_TRANSFER_GAP)
    figure = {"accuracy": accuracy, "white_box": float(before.mean()), "new": new.to_json()}
    sources = "1 model" if len(controls) == 1 else f"{len(controls)} models"
    reason = f"of what the white-box attacks left, transfer from {sources} breaks {new}"
    return Outcome(new.status, reason, figure)


def _noise_attacks(plan: Plan) -> dict[str, Attack]:
    return {
        f"noise-{distribution}": RandomNoise(plan.threat, distribution, _NUM_DRAWS)
        for distribution in ("uniform", "sign")
    }


def _random_noise(bench: Bench) -> Outcome:
    return _finds_nothing_new(bench, _noise_attacks(bench.plan), "noise", {"draws": _NUM_DRAWS})


def _hard_label(bench: Bench) -> Outcome:
    attack = HopSkipJump(bench.plan.threat)
    queries = {"queries": attack.cost()[0]}
    return _finds_nothing_new(bench, {"hop-skip-jump": attack}, "HopSkipJump", queries)


def _finds_nothing_new(bench: Bench, attacks, what: str, effort: dict[str, int]) -> Outcome:
    """Attack the first images that the white-box attacks left; none may fall."""
    rows = np.flatnonzero(bench.robust)[:NUM_LEFT]
    if not len(rows):
        return Outcome("not_applicable", "the white-box attacks left nothing standing")
    found = bench.evaluate(bench.precise, attacks, rows=rows)
    bench.robust[rows] &= found.robust
    missed = int(np.sum(~found.robust))
    figure = {"images": len(rows), **effort, "newly_broken": missed}
    reason = (
        f"{missed} of the first {len(rows)} images that the white-box attacks left fall to {what}"
    )
    return Outcome("fail" if missed else "pass", reason, figure)


OTHER_ATTACKS = (
    Diagnostic(
        18,
        "AutoAttack",
        "attack strength",
        "No threshold: the headline is the worst case.",
        "src",
        "standard",
        _autoattack,
        _autoattack_attacks,
    ),
    Diagnostic(
        19,
        "Black box",
        "attack strength",
        f"Square takes at most {100 * _BLACK_BOX_GAP:g} points that the white-box attacks left "
        f"(MNIST: what it takes from the adversarially trained control and "
        f"{100 * _BLACK_BOX_GAP_OVER_CONTROL:g} points).",
        "ctl",
        "full",
        _black_box,
        _square_attacks,
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        20,
        "Transfer",
        "attack strength",
        f"Images made on the controls break at most {100 * _TRANSFER_GAP:g} points that the "
        f"white-box attacks left.",
        "src",
        "standard",
        _transfer,
        passes=lambda plan: 250.0 * plan.num_examples * len(_sources(plan)),
    ),
    Diagnostic(
        21,
        "Random noise",
        "attack strength",
        f"{_NUM_DRAWS:,} draws of uniform and of sign noise break none of the first {NUM_LEFT} "
        f"images that the white-box attacks left.",
        "src",
        "full",
        _random_noise,
        passes_each=lambda plan: 2.0 * _NUM_DRAWS,
    ),
    Diagnostic(
        22,
        "Hard label",
        "attack strength",
        f"HopSkipJump, which sees only the predicted class, breaks none of the first "
        f"{NUM_LEFT} images that the white-box attacks left.",
        "src",
        "full",
        _hard_label,
        passes_each=lambda plan: HopSkipJump(plan.threat).cost()[0],
    ),
)
