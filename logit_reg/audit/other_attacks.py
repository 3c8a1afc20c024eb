"""Tests 18 to 22: attacks of another kind, which must find nothing that gradients missed."""

import numpy as np

from logit_reg.attacks import PGD, Attack, AutoAttack, HopSkipJump, Square
from logit_reg.attacks.random_noise import RandomNoise
from logit_reg.audit.decisions import as_points, decide, percent
from logit_reg.audit.evidence import NUM_LEFT, Diagnostic, Evidence, Outcome
from logit_reg.audit.strength import WIDE, against_control, margin_attacks, strong_attacks
from logit_reg.evaluation.statistics import PairedDifference

_BLACK_BOX_GAP = 0.002
_BLACK_BOX_GAP_OVER_CONTROL = 0.02
_TRANSFER_GAP = 0.002
_NUM_DRAWS = 10_000
_SQUARE_SHARES = (0.3, 0.8)
_SQUARE_QUERIES = 20_000
_TRANSFER_STEPS = 40


def _autoattack_attacks(evidence: Evidence) -> dict[str, Attack]:
    return {"autoattack": AutoAttack(evidence.threat)}


def _autoattack(evidence: Evidence) -> Outcome:
    correct = evidence.run(_autoattack_attacks(evidence))["autoattack"]
    reason = f"AutoAttack leaves {percent(correct)} of {len(correct)} images"
    return Outcome("report", reason, {"accuracy": float(correct.mean())})


def _square_attacks(evidence: Evidence) -> dict[str, Attack]:
    shares = _SQUARE_SHARES
    return {f"square-p{p:g}": Square(evidence.threat, _SQUARE_QUERIES, p) for p in shares}


def _black_box(evidence: Evidence) -> Outcome:
    before, attacks = evidence.robust.copy(), _square_attacks(evidence)

    def takes_from(control):
        white = strong_attacks(evidence) | margin_attacks(evidence)
        left = np.all([*evidence.run_on_control(control, white).values()], axis=0)
        black = evidence.run_on_control(control, attacks)
        return PairedDifference.of(left, np.all([left, *black.values()], axis=0))

    gap = PairedDifference.of(before, np.all([before, *evidence.run(attacks).values()], axis=0))
    return against_control(
        evidence,
        gap,
        takes_from,
        "of what the white-box attacks left, Square",
        _BLACK_BOX_GAP,
        over_control=_BLACK_BOX_GAP_OVER_CONTROL,
        figure={"white_box": float(before.mean())},
    )


def _transfer_attacks(evidence: Evidence) -> dict[str, Attack]:
    # The margin of the source goes on beyond its boundary: that of the target lies elsewhere.
    step_size = evidence.threat.epsilon / 10
    return {
        f"pgd40-{loss}": PGD(
            evidence.threat, loss, _TRANSFER_STEPS, step_size, confidence=kappa, early_stop=True
        )
        for loss, kappa in (("xent", 0.0), ("cw", 50.0))
    }


def _sources(evidence: Evidence):
    return evidence.controls_of("natural", "noise_only", "same_recipe")


def _transfer(evidence: Evidence) -> Outcome:
    controls = _sources(evidence)
    if not controls:
        return Outcome(
            "skipped", "needs controls: a natural, a noise-only or a model of the same recipe"
        )
    before = evidence.robust.copy()
    after, accuracy = before.copy(), {}
    for control in controls:
        found = evidence.run_transferred(control, _transfer_attacks(evidence)).values()
        left = np.all([*found], axis=0)
        after &= left
        accuracy[control.name] = float(np.mean(left))
    new = decide(PairedDifference.of(before, after), most=_TRANSFER_GAP)
    figure = {"accuracy": accuracy, "white_box": float(before.mean()), "new": new.to_json()}
    sources = "1 model" if len(controls) == 1 else f"{len(controls)} models"
    reason = f"of what the white-box attacks left, transfer from {sources} breaks {new}"
    return Outcome(new.status, reason, figure)


def _random_noise(evidence: Evidence) -> Outcome:
    attacks = {
        f"noise-{distribution}": RandomNoise(evidence.threat, distribution, _NUM_DRAWS)
        for distribution in ("uniform", "sign")
    }
    return _finds_nothing_new(evidence, attacks, "noise", {"draws": _NUM_DRAWS})


def _hard_label(evidence: Evidence) -> Outcome:
    attack = HopSkipJump(evidence.threat)
    queries = {"queries": attack.cost()[0]}
    return _finds_nothing_new(evidence, {"hop-skip-jump": attack}, "HopSkipJump", queries)


def _finds_nothing_new(evidence: Evidence, attacks, what: str, effort: dict[str, int]) -> Outcome:
    """Attack the first images that the white-box attacks left; none may fall."""
    rows = np.flatnonzero(evidence.robust)[:NUM_LEFT]
    if not len(rows):
        return Outcome("not_applicable", "the white-box attacks broke every image")
    found = evidence.evaluate(evidence.precise, attacks, rows=rows)
    evidence.robust[rows] &= found.robust
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
        "No threshold: the headline is the worst case.",
        _autoattack,
        _autoattack_attacks,
        threshold_origin="src",
        budget="standard",
    ),
    Diagnostic(
        19,
        "Black box",
        f"Square takes at most {as_points(_BLACK_BOX_GAP)} that the white-box attacks left "
        f"({WIDE}: what it takes from the adversarially trained control and "
        f"{as_points(_BLACK_BOX_GAP_OVER_CONTROL)}).",
        _black_box,
        _square_attacks,
        threshold_origin="ctl",
        budget="full",
        control_kinds=("adversarial",),
    ),
    Diagnostic(
        20,
        "Transfer",
        f"Images made on the controls break at most {as_points(_TRANSFER_GAP)} that the white-box "
        f"attacks left.",
        _transfer,
        threshold_origin="src",
        budget="standard",
        passes=lambda evidence: 250.0 * evidence.num_examples * len(_sources(evidence)),
    ),
    Diagnostic(
        21,
        "Random noise",
        f"{_NUM_DRAWS:,} draws of uniform and of sign noise break none of the first {NUM_LEFT} "
        f"images that the white-box attacks left.",
        _random_noise,
        threshold_origin="src",
        budget="full",
        passes_each=lambda evidence: 2.0 * _NUM_DRAWS,
    ),
    Diagnostic(
        22,
        "Hard label",
        f"HopSkipJump, which sees only the predicted class, breaks none of the first "
        f"{NUM_LEFT} images that the white-box attacks left.",
        _hard_label,
        threshold_origin="src",
        budget="full",
        passes_each=lambda evidence: HopSkipJump(evidence.threat).cost()[0],
    ),
)
