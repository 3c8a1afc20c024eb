"""Tests 1 to 7 and 33: whether the model and the threat model can be audited at all."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks import PGD
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.attacks.engine.checks import SAME_LOGITS
from logit_reg.attacks.engine.random_numbers import uniform_in_ball
from logit_reg.audit.decisions import as_points, decide, overall, percent
from logit_reg.audit.evidence import (
    NUM_PASSES,
    NUM_SAMPLED,
    Diagnostic,
    Evidence,
    Outcome,
    finite,
    in_float64,
    is_within,
    normalised_spread,
    unit,
)
from logit_reg.evaluation.statistics import Mean, PairedDifference, Proportion
from logit_reg.evaluation.units import threat_notices

# Of a randomised network: passes of each of two means, and how much further apart than these the
# means of different batches may lie.
_NUM_MEAN_PASSES = 8
_MOST_OF_NOISE = 2.0
# Of ln K: the cross-entropy above which the logits say next to nothing.
_COLLAPSED = 0.9
_PRECISION_GAP = 0.005
_SIGN_AGREEMENT = 0.99
_PRECISION_STEPS = 20
# Share of the pixel range that images of one scale do not fill by far on another's.
_LEAST_SPAN = 0.05


def _logits_not_probabilities(evidence: Evidence) -> Outcome:
    figure = {
        "lowest_output": finite(evidence.outputs.min()),
        "highest_output": finite(evidence.outputs.max()),
    }
    if evidence.probabilities is not None:
        reason = "the outputs are probabilities; the audit goes on with their logarithm"
        return Outcome("fail", reason, figure)
    return Outcome("pass", "the outputs are no probabilities", figure)


def _determinism(evidence: Evidence) -> Outcome:
    spread = evidence.spread
    figure = {"spread": finite(spread), "eot": evidence.num_passes}
    if evidence.is_randomised:
        reason = (
            f"normalised logits of the same images differ by {spread:.1e} between passes: noise "
            f"or dropout is on at inference; attacks average over {evidence.num_passes} passes"
        )
        return Outcome("fail", reason, figure)
    return Outcome("pass", f"normalised logits differ by at most {spread:.1e}", figure)


def _nonzero_gradients(evidence: Evidence) -> Outcome:
    rows = np.flatnonzero(evidence.clean)[:NUM_SAMPLED]
    if not len(rows):
        return _nothing_right()
    zero = {}
    places = {"clean": evidence.images[rows], "start": random_start(evidence, rows)}
    for place, points in places.items():
        # Where an image is misclassified already, no gradient is needed.
        is_right = clean_margin(evidence.logits_of(points), evidence.labels[rows]) > 0
        for loss in _losses(evidence):
            flat = evidence.gradient(loss, points, rows).reshape(len(rows), -1)
            useless = ~np.any(flat, axis=1) | ~np.isfinite(flat).all(axis=1)
            zero[f"{loss}_{place}"] = int(np.sum(useless & is_right))
    worst = max(zero, key=zero.__getitem__)
    figure: dict[str, Any] = {"images": len(rows), "zero_gradients": zero}
    if zero[worst]:
        loss_and_place = worst.replace("_", ", ")
        reason = f"{zero[worst]} of {len(rows)} images have no gradient ({loss_and_place})"
        return Outcome("fail", reason, figure)
    if not evidence.is_randomised:
        twice = (evidence.gradient("cw", evidence.images[rows], rows) for _ in range(2))
        same = _agreement(*map(np.sign, twice)).value
        figure["sign_agreement"] = same
        if same < _SIGN_AGREEMENT:
            reason = (
                f"two gradients of the same images agree in {percent(same)} of their signs, "
                f"although the logits are the same: the backward pass is random"
            )
            return Outcome("fail", reason, figure)
    return Outcome("pass", f"all of {len(rows)} images have one, for every loss", figure)


def _threat_model(evidence: Evidence) -> Outcome:
    threat, span = evidence.threat, evidence.threat.upper - evidence.threat.lower
    figure: dict[str, Any] = {
        "epsilon": threat.epsilon,
        # What a value moves by: at most in linf, as a root mean square in l2.
        "share_of_range": threat.epsilon / evidence.reach(1.0),
        "image_low": float(evidence.images.min()),
        "image_high": float(evidence.images.max()),
    }
    notices = threat_notices(threat, evidence.images.shape[1:])
    problems = [notice.message for notice in notices]
    if figure["image_high"] - figure["image_low"] < _LEAST_SPAN * span:
        problems.append(
            f"the images span [{figure['image_low']:g}, {figure['image_high']:g}] of a pixel "
            f"range [{threat.lower:g}, {threat.upper:g}]: bounds of another scale?"
        )
    for name, attack in evidence.claimed.items():
        if not is_within(attack.threat, threat):
            problems.append(f"{name} attacks in {attack.threat}, not in the audited threat model")
    problems += evidence.violations
    figure["problems"] = problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Outcome("fail", problems[0] + more, figure)
    reason = "every adversarial image of every attack is finite and within epsilon and the range"
    return Outcome("pass", reason, figure)


def _clean_accuracy(evidence: Evidence) -> Outcome:
    found = Proportion.of(evidence.clean)
    low, high = found.interval
    num_examples = found.num_examples
    figure = {"accuracy": found.value, "low": low, "high": high, "examples": num_examples}
    decision = decide(found, least=evidence.claim)
    return Outcome(decision.status, f"on {num_examples} images {decision}", figure)


def _squeeze(evidence: Evidence) -> Outcome:
    found = evidence.squeeze
    # Of a confident network's few mistakes alone the mean is large.
    median = float(np.median(evidence.cross_entropy))
    figure = dataclasses.asdict(found) | {"median_cross_entropy": finite(median)}
    warnings = []
    num_broken = int(np.sum(~np.isfinite(evidence.logits).all(axis=1)))
    if num_broken:
        warnings.append(
            f"the logits of {num_broken} of {len(evidence.logits)} clean images are not finite, "
            f"which count as wrong"
        )
    elif median >= _COLLAPSED * found.log_num_classes:
        warnings.append(
            f"the median clean cross-entropy {median:.3f} is that of logits which say nothing "
            f"(ln K = {found.log_num_classes:.3f})"
        )
    beta, threshold = found.beta, found.collapse_threshold
    if beta is not None and threshold is not None and beta >= threshold:
        warnings.append(f"beta {beta:g} reaches the collapse threshold {threshold:.3f}")
    if warnings:
        return Outcome("fail", "warning: " + "; ".join(warnings), figure)
    cross_entropy = f"clean cross-entropy {found.clean_cross_entropy:.3g}"
    return Outcome("pass", f"median margin {found.median_margin:.3g}, {cross_entropy}", figure)


def _precision(evidence: Evidence) -> Outcome:
    network = evidence.given_logits_fn
    wide = in_float64(network) if isinstance(network, keras.Model) else None
    if wide is None or evidence.probabilities is not None:
        reason = "only a Keras network that ends in logits can be rebuilt in float64"
        return Outcome("skipped", reason)
    rows = np.flatnonzero(evidence.clean)
    if not len(rows):
        return _nothing_right()
    threat = evidence.threat
    # The margin, whose gradient no saturation takes away: what differs is the network's.
    step_size = 2.5 * threat.epsilon / _PRECISION_STEPS
    attacks = {"pgd20-cw": PGD(threat, "cw", _PRECISION_STEPS, step_size, early_stop=True)}
    functions = {"float32": evidence.logits_fn, "float64": wide}
    narrow, broad = (
        evidence.evaluate(function, attacks, rows=rows, precision=precision).robust
        for precision, function in functions.items()
    )
    gap = decide(PairedDifference.of(narrow, broad), least=-_PRECISION_GAP, most=_PRECISION_GAP)
    points = random_start(evidence, rows)
    signs = [np.sign(evidence.gradient("cw", points, rows, f)) for f in functions.values()]
    agreement = decide(_agreement(*signs), least=_SIGN_AGREEMENT)
    figure = {
        "accuracy": {"float32": float(narrow.mean()), "float64": float(broad.mean())},
        "gap": gap.to_json(),
        "sign_agreement": agreement.found.value,
    }
    reason = (
        f"PGD leaves {percent(narrow)} in float32 and {percent(broad)} in float64: {gap}; the "
        f"gradients' signs agree in {agreement}"
    )
    return Outcome(overall((gap, agreement)), reason, figure)


def _agreement(first: np.ndarray, second: np.ndarray) -> Mean:
    """Share of the signs that agree, of each of N gradients; two zeros do not count."""
    count = len(first)
    either = ((first != 0) | (second != 0)).reshape(count, -1)
    same = (first == second).reshape(count, -1) & either
    shares = same.sum(axis=1) / np.maximum(either.sum(axis=1), 1)
    return Mean.of(np.where(either.any(axis=1), shares, 1.0))


def _batch_independence(evidence: Evidence) -> Outcome:
    rows = np.arange(min(len(evidence.images), NUM_SAMPLED))
    images, labels = evidence.images[rows], evidence.labels[rows]
    # A fixed order: it need not be random, only another one.
    shuffled = np.random.default_rng(evidence.seed).permutation(len(rows))
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    batches = {
        "alone": [rows[i : i + 1] for i in rows],
        "shuffled": [shuffled],
        "own_class": by_class,
    }
    if evidence.is_randomised:
        return _batch_independence_of_means(evidence, images, batches)
    alone, together, own_class = (_in_parts(evidence, images, parts) for parts in batches.values())
    spreads = [normalised_spread(alone, other) for other in (together, own_class)]
    names = ("alone_or_shuffled", "alone_or_own_class")
    figure = dict(zip(names, map(finite, spreads), strict=True))
    spread = max(spreads)
    if not spread <= SAME_LOGITS:
        reason = (
            f"normalised logits of an image change by {spread:.1e} with its batch: batch "
            f"statistics are in use at inference"
        )
        return Outcome("fail", reason, figure)
    return Outcome("pass", f"normalised logits change by at most {spread:.1e}", figure)


def _batch_independence_of_means(evidence, images, batches) -> Outcome:
    """Of a randomised network: what the batch changes beyond what another pass changes."""
    halves = {
        name: [
            np.mean(
                [unit(_in_parts(evidence, images, parts)) for _ in range(_NUM_MEAN_PASSES)], axis=0
            )
            for _ in range(2)
        ]
        for name, parts in batches.items()
    }

    def apart(first, second):
        return float(np.linalg.norm(first - second, axis=1).mean())

    noise = {name: apart(*pair) for name, pair in halves.items()}
    pairs = {
        name: (apart(halves["alone"][0], halves[name][1]), np.hypot(noise["alone"], noise[name]))
        for name in ("shuffled", "own_class")
    }
    of_batches, of_passes = max(pairs.values(), key=lambda pair: pair[0] / (pair[1] or 1.0))
    of_passes = float(of_passes / np.sqrt(2))
    figure = {"between_batches": of_batches, "between_passes": of_passes}
    said = f"{of_batches:.1e} with the batch, {of_passes:.1e} from pass to pass"
    if of_batches > _MOST_OF_NOISE * of_passes:
        reason = f"mean normalised logits change by {said}: batch statistics are in use"
        return Outcome("fail", reason, figure)
    reason = f"the network is random (test 2); its mean normalised logits change by {said}"
    return Outcome("not_applicable", reason, figure)


def _in_parts(evidence, images, parts) -> np.ndarray:
    """Logits of images that go through the network in parts of these rows."""
    found = np.empty((len(images), evidence.num_classes), np.float64)
    for rows in parts:
        found[rows] = evidence.call(images[rows])
    return found


def random_start(evidence: Evidence, rows: np.ndarray) -> np.ndarray:
    """A point of the ball of each of some rows: (M,) int -> (M, H, W, C) float32."""
    draw = {
        "stream": tf.constant(evidence.seed, tf.int64),
        "indices": tf.constant(rows, tf.int64),
        "restart": tf.constant(0, tf.int64),
    }
    images = tf.convert_to_tensor(evidence.images[rows])
    return uniform_in_ball(evidence.threat, images, **draw).numpy()


def _losses(evidence: Evidence):
    return ("xent", "cw", "dlr") if evidence.num_classes >= 3 else ("xent", "cw")


def _nothing_right():
    return Outcome("not_applicable", "no image is classified right to begin with")


def _passes_of_gradients(evidence: Evidence) -> float:
    return min(evidence.num_examples, NUM_SAMPLED) * (6 + 2 * (1 + 3 * len(_losses(evidence))))


def _passes_of_precision(evidence: Evidence) -> float:
    # Twenty steps twice, where a pass in float64 takes as long as several in float32.
    return evidence.num_examples * 3 * _PRECISION_STEPS * 5


PRECONDITIONS = (
    Diagnostic(
        1,
        "Logits, not probabilities",
        "The outputs are not all in [0, 1] with each row summing to 1, nor a multiple of that, "
        "shifted.",
        _logits_not_probabilities,
        threshold_origin="src",
    ),
    Diagnostic(
        2,
        "Determinism and evaluation mode",
        f"Normalised logits differ by at most {SAME_LOGITS:g} over {NUM_PASSES} passes.",
        _determinism,
        threshold_origin="src",
        passes=lambda evidence: NUM_PASSES * min(evidence.num_examples, NUM_SAMPLED),
    ),
    Diagnostic(
        3,
        "Non-zero gradients",
        "No image has an exactly zero gradient of cross-entropy, margin or DLR (computed in "
        "float64), at the image or at a random start, and where logits are the same in two passes, "
        f"so are {100 * _SIGN_AGREEMENT:g} % of the gradients' signs.",
        _nonzero_gradients,
        threshold_origin="src",
        passes=_passes_of_gradients,
    ),
    Diagnostic(
        4,
        "Threat model",
        "Every adversarial image is finite, within epsilon and the pixel range, and epsilon, "
        "bounds and images are in the same units.",
        _threat_model,
        threshold_origin="src",
    ),
    Diagnostic(
        5,
        "Clean accuracy",
        "The claim is not above the clean accuracy; images misclassified clean count as failures.",
        _clean_accuracy,
        threshold_origin="src",
    ),
    Diagnostic(
        6,
        "Squeeze diagnostics",
        f"The median clean cross-entropy is below {_COLLAPSED:g} ln K, and beta below the collapse "
        f"threshold.",
        _squeeze,
    ),
    Diagnostic(
        7,
        "Precision",
        f"PGD in float64 and in float32 differ by at most {as_points(_PRECISION_GAP)}, and at "
        f"least {100 * _SIGN_AGREEMENT:g} % of the gradients' signs agree.",
        _precision,
        passes=_passes_of_precision,
    ),
    Diagnostic(
        33,
        "Independence of the batch",
        f"Normalised logits of an image alone, among its own class and in a shuffled batch differ "
        f"by at most {SAME_LOGITS:g}; of a randomised network, their means by at most "
        f"{_MOST_OF_NOISE:g} times what they differ by from pass to pass.",
        _batch_independence,
        passes=lambda evidence: 5 * min(evidence.num_examples, NUM_SAMPLED),
    ),
)
