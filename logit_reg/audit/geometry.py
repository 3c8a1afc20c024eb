"""Tests 28 to 32: what the loss surface around the images looks like."""

import numpy as np

from logit_reg.analysis.landscape import Landscape
from logit_reg.attacks import FGSM, PGD, Attack
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.audit.bench import Bench, Diagnostic, LossGradient, Outcome, Plan
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


def _failure_attacks(plan: Plan) -> dict[str, Attack]:
    """The same attack with as many and with twice as many steps, all steps on all images."""
    return {
        f"pgd{steps}-cw-all-steps": PGD(plan.threat, "cw", steps, plan.step_size)
        for steps in (100, 200)
    }


def _indicators_of_failure(bench: Bench) -> Outcome:
    short, long = (
        bench.evaluate(bench.precise, {name: attack})
        for name, attack in _failure_attacks(bench.plan).items()
    )
    (record,) = short.records.values()
    silent = int(np.sum(record.correct_last_iterate & ~record.correct))
    survivors = np.flatnonzero(long.robust)
    unfinished = 0
    if len(survivors):
        labels = bench.labels[survivors]
        before, after = (
            clean_margin(bench.logits_of(found.adversarial[survivors]), labels)
            for found in (short, long)
        )
        clean = clean_margin(bench.logits[survivors], labels)
        unfinished = int(np.sum(before - after > _UNFINISHED * clean))
    rows = np.arange(min(len(bench.images), _SAMPLE))
    noisy = bench.logits_of(random_start(bench, rows)).argmax(axis=1)
    unstable = float(np.mean(noisy != bench.logits[rows].argmax(axis=1)))
    figure = {
        "successes_that_the_last_iterate_loses": silent,
        "survivors": len(survivors),
        "unfinished_survivors": unfinished,
        "unstable_predictions": unstable,
    }
    reason = (
        f"{unfinished} of {len(survivors)} survivors were still losing margin after 100 steps; "
        f"{100 * unstable:.1f} % of the predictions change under noise"
    )
    return Outcome("fail" if unfinished else "pass", reason, figure)


def _gradient_alignment(bench: Bench) -> Outcome:
    rows = np.arange(min(len(bench.images), _SAMPLE))
    alignment = _alignment(bench, rows, bench.precise)
    figure = {"alignment": alignment}
    reason = f"gradients at an image and at a random point of its ball have cosine {alignment:.2f}"
    controls = bench.plan.controls_of("adversarial")
    if not controls:
        return Outcome("report", reason, figure)
    known = min(_alignment(bench, rows, bench.precise_control(c)) for c in controls)
    figure["control"] = known
    status = "fail" if alignment < _LEAST_ALIGNMENT * known else "pass"
    return Outcome(status, f"{reason}, {known:.2f} for the control", figure)


def _alignment(bench, rows, logits_fn) -> float:
    here = bench.gradient("xent", bench.images[rows], rows, logits_fn).reshape(len(rows), -1)
    there = bench.gradient("xent", random_start(bench, rows), rows, logits_fn)
    there = there.reshape(len(rows), -1)
    lengths = np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1)
    cosine = np.sum(here * there, axis=1) / np.where(lengths > 0, lengths, 1.0)
    return float(np.mean(cosine))


def _linearity_attacks(plan: Plan) -> dict[str, Attack]:
    return {"fgsm-cw": FGSM(plan.threat, "cw")}


def _linearity(bench: Bench) -> Outcome:
    fgsm = bench.run(_linearity_attacks(bench.plan))["fgsm-cw"]
    threat, rows = bench.plan.threat, np.arange(len(bench.images))
    # Of the plain logits: the precise ones have a gradient of another length.
    gradient = np.concatenate(
        [
            LossGradient("cw")(
                bench.logits_fn,
                bench.images[i : i + bench.batch_size],
                bench.labels[i : i + bench.batch_size],
            )
            for i in range(0, len(rows), bench.batch_size)
        ]
    ).reshape(len(rows), -1)
    bench.spend(len(rows), len(rows))
    # The dual norm: by how much a step of length 1 changes the margin.
    slope = np.abs(gradient).sum(1) if threat.norm == "linf" else np.linalg.norm(gradient, axis=1)
    predicted = bench.clean & (clean_margin(bench.logits, bench.labels) > threat.epsilon * slope)
    figure = {"predicted": float(predicted.mean()), "fgsm": float(fgsm.mean())}
    return Outcome(
        "report",
        f"a linear model would leave {100 * predicted.mean():.1f} %, FGSM leaves "
        f"{100 * fgsm.mean():.1f} %",
        figure,
    )


def _loss_surface(bench: Bench) -> Outcome:
    landscape = Landscape(
        bench.plan.threat, extent=1.0, num_points=_GRID_POINTS, batch_size=bench.batch_size
    )
    count = min(len(bench.images), _GRID_IMAGES)
    found = landscape.run(
        bench.logits_fn, bench.images[:count], bench.labels[:count], seed=bench.seed
    )
    bench.spend(count * _GRID_POINTS**2 + count, count)
    figure = {
        "epsilons": [float(value) for value in found.coordinates],
        "cross_entropy": found.cross_entropy.mean(axis=0).astype(float).tolist(),
        "margin": found.margin.mean(axis=0).astype(float).tolist(),
    }
    return Outcome("report", f"mean over {count} images, random by FGSM direction", figure)


def _seeds(bench: Bench) -> Outcome:
    same = bench.plan.controls_of("same_recipe")
    if len(same) + 1 < _LEAST_SEEDS:
        return Outcome(
            "not_applicable",
            f"says something of {_LEAST_SEEDS} training seeds; give {_LEAST_SEEDS - 1} more as "
            f"controls",
        )
    attacks: dict[str, Attack] = {"pgd40-cw": base_attack(bench.plan, "cw")}
    accuracies = [float(bench.run(attacks)["pgd40-cw"].mean())]
    for control in same:
        accuracies.append(float(bench.run_on_control(control, attacks)["pgd40-cw"].mean()))
    spread = max(accuracies) - min(accuracies)
    return Outcome(
        "report",
        f"PGD leaves {100 * min(accuracies):.1f} to {100 * max(accuracies):.1f} % over "
        f"{len(accuracies)} seeds",
        {"accuracy": accuracies, "spread": spread},
    )


GEOMETRY = (
    Diagnostic(
        28,
        "Indicators of attack failure",
        "geometry",
        "No success is lost on the way, and no survivor still loses margin when the steps are "
        "doubled; unstable predictions are reported.",
        "src",
        "full",
        _indicators_of_failure,
        _failure_attacks,
    ),
    Diagnostic(
        29,
        "Gradient alignment",
        "geometry",
        f"The cosine is at least {_LEAST_ALIGNMENT:g} times that of the adversarially trained "
        f"control; without one it is reported.",
        "ctl",
        "full",
        _gradient_alignment,
        passes=lambda plan: 6 * min(plan.num_examples, _SAMPLE),
    ),
    Diagnostic(
        30,
        "Linearity",
        "geometry",
        "No threshold: agreement means that the model is locally linear.",
        "src",
        "full",
        _linearity,
        _linearity_attacks,
        passes=lambda plan: 3 * plan.num_examples,
    ),
    Diagnostic(
        31,
        "Loss surface",
        "geometry",
        "No threshold: a healthy surface is smooth and rises towards the FGSM direction.",
        "src",
        "full",
        _loss_surface,
        passes=lambda plan: (_GRID_POINTS**2 + 3) * min(plan.num_examples, _GRID_IMAGES),
    ),
    Diagnostic(
        32,
        "Training seeds",
        "geometry",
        f"No threshold: claimed differences must exceed the spread over {_LEAST_SEEDS} seeds.",
        "prop",
        "full",
        _seeds,
        control_kinds=("same_recipe",),
    ),
)
