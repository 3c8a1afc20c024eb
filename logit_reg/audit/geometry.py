"""Tests 28 to 32: what the loss surface around the images looks like."""

import numpy as np

from logit_reg.analysis.landscape import Landscape
from logit_reg.attacks import FGSM, PGD, Attack
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.audit.decisions import percent
from logit_reg.audit.evidence import Diagnostic, Evidence, Outcome
from logit_reg.audit.preconditions import random_start
from logit_reg.audit.strength import base_attack

_SAMPLE = 100
_GRID_IMAGES = 20
_GRID_POINTS = 11
# Fraction of its clean margin that a longer attack must still take from an image for the shorter
# one to count as unfinished.
_UNFINISHED = 0.05
# Of the adversarially trained control's alignment.
_LEAST_ALIGNMENT = 0.5
_LEAST_SEEDS = 3


def _failure_attacks(evidence: Evidence) -> dict[str, Attack]:
    """The same attack with as many and with twice as many steps, all steps on all images."""
    return {
        f"pgd{steps}-cw-all-steps": PGD(evidence.threat, "cw", steps, evidence.step_size)
        for steps in (100, 200)
    }


def _indicators_of_failure(evidence: Evidence) -> Outcome:
    short, long = (
        evidence.evaluate(evidence.precise, {name: attack})
        for name, attack in _failure_attacks(evidence).items()
    )
    (record,) = short.records.values()
    silent = int(np.sum(record.correct_last_iterate & ~record.correct))
    survivors = np.flatnonzero(long.robust)
    unfinished = 0
    if len(survivors):
        labels = evidence.labels[survivors]
        before, after = (
            clean_margin(evidence.logits_of(found.adversarial[survivors]), labels)
            for found in (short, long)
        )
        clean = clean_margin(evidence.logits[survivors], labels)
        unfinished = int(np.sum(before - after > _UNFINISHED * clean))
    rows = np.arange(min(len(evidence.images), _SAMPLE))
    noisy = evidence.logits_of(random_start(evidence, rows)).argmax(axis=1)
    unstable = float(np.mean(noisy != evidence.logits[rows].argmax(axis=1)))
    figure = {
        "successes_that_the_last_iterate_loses": silent,
        "survivors": len(survivors),
        "unfinished_survivors": unfinished,
        "unstable_predictions": unstable,
    }
    reason = (
        f"{unfinished} of {len(survivors)} survivors were still losing margin after 100 steps; "
        f"{percent(unstable)} of the predictions change under noise"
    )
    return Outcome("fail" if unfinished else "pass", reason, figure)


def _gradient_alignment(evidence: Evidence) -> Outcome:
    rows = np.arange(min(len(evidence.images), _SAMPLE))
    alignment = _alignment(evidence, rows, evidence.precise)
    figure = {"alignment": alignment}
    reason = f"gradients at an image and at a random point of its ball have cosine {alignment:.2f}"
    controls = evidence.controls_of("adversarial")
    if not controls:
        return Outcome("report", reason, figure)
    known = min(_alignment(evidence, rows, evidence.precise_control(c)) for c in controls)
    figure["control"] = known
    status = "fail" if alignment < _LEAST_ALIGNMENT * known else "pass"
    return Outcome(status, f"{reason}, {known:.2f} for the control", figure)


def _alignment(evidence, rows, logits_fn) -> float:
    here, there = (
        evidence.gradient("xent", points, rows, logits_fn).reshape(len(rows), -1)
        for points in (evidence.images[rows], random_start(evidence, rows))
    )
    lengths = np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1)
    cosine = np.sum(here * there, axis=1) / np.where(lengths > 0, lengths, 1.0)
    return float(np.mean(cosine))


def _linearity_attacks(evidence: Evidence) -> dict[str, Attack]:
    return {"fgsm-cw": FGSM(evidence.threat, "cw")}


def _linearity(evidence: Evidence) -> Outcome:
    fgsm = evidence.run(_linearity_attacks(evidence))["fgsm-cw"]
    threat, rows = evidence.threat, np.arange(len(evidence.images))
    # Of the plain logits: the precise ones have a gradient of another length.
    gradient = evidence.gradient("cw", evidence.images, rows, evidence.logits_fn)
    slope = threat.slope(gradient).numpy()
    predicted = evidence.clean & (
        clean_margin(evidence.logits, evidence.labels) > threat.epsilon * slope
    )
    figure = {"predicted": float(predicted.mean()), "fgsm": float(fgsm.mean())}
    reason = f"a linear model would leave {percent(predicted)}, FGSM leaves {percent(fgsm)}"
    return Outcome("report", reason, figure)


def _loss_surface(evidence: Evidence) -> Outcome:
    landscape = Landscape(
        evidence.threat, extent=1.0, num_points=_GRID_POINTS, batch_size=evidence.batch_size
    )
    count = min(len(evidence.images), _GRID_IMAGES)
    found = landscape.run(
        evidence.logits_fn, evidence.images[:count], evidence.labels[:count], seed=evidence.seed
    )
    evidence.spend(count * _GRID_POINTS**2 + count, count)
    figure = {
        "epsilons": [float(value) for value in found.coordinates],
        "cross_entropy": found.cross_entropy.mean(axis=0).astype(float).tolist(),
        "margin": found.margin.mean(axis=0).astype(float).tolist(),
    }
    return Outcome("report", f"mean over {count} images, random by FGSM direction", figure)


def _seeds(evidence: Evidence) -> Outcome:
    same = evidence.controls_of("same_recipe")
    if len(same) + 1 < _LEAST_SEEDS:
        return Outcome(
            "not_applicable",
            f"says something of {_LEAST_SEEDS} training seeds; give {_LEAST_SEEDS - 1} more as "
            f"controls",
        )
    attacks = {"pgd40-cw": base_attack(evidence, "cw")}
    found = [evidence.run(attacks), *(evidence.run_on_control(c, attacks) for c in same)]
    shares = [float(correct["pgd40-cw"].mean()) for correct in found]
    low, high = min(shares), max(shares)
    reason = f"PGD leaves {100 * low:.1f} to {percent(high)} over {len(shares)} seeds"
    return Outcome("report", reason, {"accuracy": shares, "spread": high - low})


GEOMETRY = (
    Diagnostic(
        28,
        "Indicators of attack failure",
        "No success is lost on the way, and no survivor still loses margin when the steps are "
        "doubled; unstable predictions are reported.",
        _indicators_of_failure,
        _failure_attacks,
        threshold_origin="src",
        budget="full",
    ),
    Diagnostic(
        29,
        "Gradient alignment",
        f"The cosine is at least {_LEAST_ALIGNMENT:g} times that of the adversarially trained "
        f"control; without one it is reported.",
        _gradient_alignment,
        threshold_origin="ctl",
        budget="full",
        passes=lambda evidence: 6 * min(evidence.num_examples, _SAMPLE),
    ),
    Diagnostic(
        30,
        "Linearity",
        "No threshold: agreement means that the model is locally linear.",
        _linearity,
        _linearity_attacks,
        threshold_origin="src",
        budget="full",
        passes=lambda evidence: 3 * evidence.num_examples,
    ),
    Diagnostic(
        31,
        "Loss surface",
        "No threshold: a healthy surface is smooth and rises towards the FGSM direction.",
        _loss_surface,
        threshold_origin="src",
        budget="full",
        passes=lambda evidence: (_GRID_POINTS**2 + 3) * min(evidence.num_examples, _GRID_IMAGES),
    ),
    Diagnostic(
        32,
        "Training seeds",
        f"No threshold: claimed differences must exceed the spread over {_LEAST_SEEDS} seeds.",
        _seeds,
        budget="full",
        control_kinds=("same_recipe",),
    ),
)
