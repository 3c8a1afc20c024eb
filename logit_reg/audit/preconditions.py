"""Tests 1 to 7 and 33: whether the model and the threat model can be audited at all."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks import PGD
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.attacks.engine.checks import SAME_LOGITS
from logit_reg.attacks.engine.forward import call_logits
from logit_reg.attacks.engine.random_numbers import uniform_in_ball
from logit_reg.audit.bench import (
    Bench,
    Diagnostic,
    Outcome,
    Plan,
    in_float64,
    is_within,
    median_margin,
)
from logit_reg.audit.decisions import decide, overall
from logit_reg.audit.records import SqueezeDiagnostics
from logit_reg.evaluation.statistics import Mean, PairedDifference, Proportion

_NUM_PASSES = 5
# Images that the tests look at which need no statistics.
_SAMPLE = 100
# Of ln K: the cross-entropy above which the logits say next to nothing.
_COLLAPSED = 0.9
_PRECISION_GAP = 0.005
_SIGN_AGREEMENT = 0.99
_PRECISION_STEPS = 20
# A linf ball below half of one of 256 levels, or an l2 ball whose root mean square is below a
# tenth of one, holds no image that a camera could tell apart.
_LEAST_LEVELS = {"linf": 0.5, "l2": 0.1}
# From half the range on, the ball of every image holds the grey one.
_LARGEST_SHARE = 0.5
# Share of the pixel range that images of one scale do not fill by far on another's.
_LEAST_SPAN = 0.05


def normalised_spread(first: np.ndarray, second: np.ndarray) -> float:
    """Largest l2 distance between two versions of the images' logits, each scaled to length 1.

    The mean of an image's logits, on which no decision depends, is taken off before: behind a
    large one a difference would not show.

    Args:
        first: (N, K) logits.
        second: (N, K) logits of the same images.
    """
    return float(np.linalg.norm(_unit(first) - _unit(second), axis=1).max(initial=0.0))


def squeeze_diagnostics(bench: Bench, beta=None, threshold=None) -> SqueezeDiagnostics:
    """The scale of the clean logits and what it does to the cross-entropy."""
    logits = bench.logits.astype(np.float64)
    cross_entropy = _cross_entropy(logits, bench.labels).mean()
    return SqueezeDiagnostics(
        mean_logit_norm=_finite(np.linalg.norm(logits, axis=1).mean()),
        median_margin=_finite(median_margin(logits)),
        clean_cross_entropy=_finite(cross_entropy),
        log_num_classes=math.log(logits.shape[1]),
        beta=beta,
        collapse_threshold=None if threshold is None or math.isinf(threshold) else threshold,
    )


def _cross_entropy(logits, labels):
    # log sum exp without overflow.
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.maximum(-log_softmax[np.arange(len(logits)), labels], 0.0)


def _logits_not_probabilities(bench: Bench) -> Outcome:
    figure = {
        "lowest_output": _finite(bench.outputs.min()),
        "highest_output": _finite(bench.outputs.max()),
    }
    if bench.probabilities is not None:
        return Outcome(
            "fail",
            "the outputs are probabilities; the audit goes on with their logarithm",
            figure,
        )
    return Outcome("pass", "the outputs are no probabilities", figure)


def _determinism(bench: Bench) -> Outcome:
    images = bench.images[:_SAMPLE]
    # Called as they are: what a trace would freeze is seen, too.
    passes = [_call(bench, images) for _ in range(_NUM_PASSES)]
    bench.spend(_NUM_PASSES * len(images))
    spread = max(normalised_spread(passes[0], other) for other in passes[1:])
    figure = {"passes": _NUM_PASSES, "spread": _finite(spread)}
    if not spread <= SAME_LOGITS:
        return Outcome(
            "fail",
            f"normalised logits of the same images differ by {spread:.1e} between passes: noise "
            f"or dropout is on at inference",
            figure,
        )
    return Outcome("pass", f"normalised logits differ by at most {spread:.1e}", figure)


def _nonzero_gradients(bench: Bench) -> Outcome:
    rows = np.flatnonzero(bench.clean)[:_SAMPLE]
    if not len(rows):
        return _nothing_stands()
    images = bench.images[rows]
    start = random_start(bench, rows)
    zero = {}
    for place, points in (("clean", images), ("start", start)):
        # Where an image is misclassified already, no gradient is needed.
        logits = bench.logits_of(points)
        stands = clean_margin(logits, bench.labels[rows]) > 0
        for loss in _losses(bench.plan):
            flat = bench.gradient(loss, points, rows).reshape(len(rows), -1)
            useless = ~np.any(flat, axis=1) | ~np.isfinite(flat).all(axis=1)
            zero[f"{loss}_{place}"] = int(np.sum(useless & stands))
    worst = max(zero, key=zero.__getitem__)
    figure = {"images": len(rows), "zero_gradients": zero}
    if zero[worst]:
        return Outcome(
            "fail",
            f"{zero[worst]} of {len(rows)} images have no gradient ({worst.replace('_', ', ')})",
            figure,
        )
    return Outcome("pass", f"all of {len(rows)} images have one, for every loss", figure)


def _threat_model(bench: Bench) -> Outcome:
    threat = bench.plan.threat
    problems: list[str] = []
    span = threat.upper - threat.lower
    num_values = math.prod(bench.plan.image_shape)
    # What a value moves by: at most in linf, as a root mean square in l2.
    per_value = threat.epsilon / (math.sqrt(num_values) if threat.norm == "l2" else 1.0)
    figure: dict[str, Any] = {
        "epsilon": threat.epsilon,
        "share_of_range": per_value / span,
        "image_low": float(bench.images.min()),
        "image_high": float(bench.images.max()),
    }
    if per_value < _LEAST_LEVELS[threat.norm] * span / 255:
        problems.append(
            f"epsilon {threat.epsilon:g} in {threat.norm} is next to nothing on the pixel range "
            f"[{threat.lower:g}, {threat.upper:g}]: is it in the units of [0, 1]?"
        )
    if per_value >= _LARGEST_SHARE * span:
        problems.append(
            f"epsilon {threat.epsilon:g} in {threat.norm} turns every image grey on the pixel "
            f"range [{threat.lower:g}, {threat.upper:g}]: is it in the units of [0, 255]?"
        )
    if figure["image_high"] - figure["image_low"] < _LEAST_SPAN * span:
        problems.append(
            f"the images span [{figure['image_low']:g}, {figure['image_high']:g}] of a pixel "
            f"range [{threat.lower:g}, {threat.upper:g}]: bounds of another scale?"
        )
    for name, attack in bench.plan.claimed.items():
        if not is_within(attack.threat, threat):
            problems.append(f"{name} attacks in {attack.threat}, not in the audited threat model")
    problems += bench.violations
    figure["problems"] = problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Outcome("fail", problems[0] + more, figure)
    return Outcome("pass", "every adversarial image of every attack passed the gate", figure)


def _clean_accuracy(bench: Bench) -> Outcome:
    found = Proportion.of(bench.clean)
    low, high = found.interval
    num_examples = found.num_examples
    figure = {"accuracy": found.value, "low": low, "high": high, "examples": num_examples}
    decision = decide(found, least=bench.claim)
    return Outcome(decision.status, f"on {num_examples} images {decision}", figure)


def _squeeze(bench: Bench) -> Outcome:
    found = bench.squeeze
    # Of a confident network's few mistakes alone the mean is large.
    median = float(np.median(_cross_entropy(bench.logits.astype(np.float64), bench.labels)))
    figure = {
        "mean_logit_norm": found.mean_logit_norm,
        "median_margin": found.median_margin,
        "clean_cross_entropy": found.clean_cross_entropy,
        "median_cross_entropy": _finite(median),
        "log_num_classes": found.log_num_classes,
        "beta": found.beta,
        "collapse_threshold": found.collapse_threshold,
    }
    warnings = []
    num_broken = int(np.sum(~np.isfinite(bench.logits).all(axis=1)))
    if num_broken:
        warnings.append(
            f"the logits of {num_broken} of {len(bench.logits)} clean images are not finite, which "
            f"count as wrong"
        )
    elif median >= _COLLAPSED * found.log_num_classes:
        warnings.append(
            f"the median clean cross-entropy {median:.3f} is that of logits which say nothing "
            f"(ln K = {found.log_num_classes:.3f})"
        )
    if (
        found.beta is not None
        and found.collapse_threshold is not None
        and found.beta >= found.collapse_threshold
    ):
        warnings.append(
            f"beta {found.beta:g} reaches the collapse threshold {found.collapse_threshold:.3f}"
        )
    if warnings:
        return Outcome("fail", "warning: " + "; ".join(warnings), figure)
    return Outcome(
        "pass",
        f"median margin {found.median_margin:.3g}, clean cross-entropy "
        f"{found.clean_cross_entropy:.3g}",
        figure,
    )


def _precision(bench: Bench) -> Outcome:
    network = bench.given_logits_fn
    wide = in_float64(network) if isinstance(network, keras.Model) else None
    if wide is None or bench.probabilities is not None:
        return Outcome(
            "skipped",
            "only a Keras network that ends in logits can be rebuilt in float64",
        )
    rows = np.flatnonzero(bench.clean)
    if not len(rows):
        return _nothing_stands()
    threat = bench.plan.threat
    # The margin, whose gradient no saturation takes away: what differs is the network's.
    attack = PGD(
        threat, "cw", _PRECISION_STEPS, 2.5 * threat.epsilon / _PRECISION_STEPS, early_stop=True
    )
    correct = {
        precision: bench.evaluate(function, {"pgd20-cw": attack}, rows=rows, precision=precision)
        for precision, function in (("float32", bench.logits_fn), ("float64", wide))
    }
    narrow, broad = correct["float32"].robust, correct["float64"].robust
    gap = decide(PairedDifference.of(narrow, broad), least=-_PRECISION_GAP, most=_PRECISION_GAP)
    points = random_start(bench, rows)
    signs_32 = np.sign(bench.gradient("cw", points, rows, bench.logits_fn))
    signs_64 = np.sign(bench.gradient("cw", points, rows, wide))
    agreement = decide(_agreement(signs_32, signs_64), least=_SIGN_AGREEMENT)
    accuracies = {"float32": float(narrow.mean()), "float64": float(broad.mean())}
    figure = {
        "accuracy": accuracies,
        "gap": gap.to_json(),
        "sign_agreement": agreement.found.value,
    }
    reason = (
        f"PGD leaves {100 * accuracies['float32']:.1f} % in float32 and "
        f"{100 * accuracies['float64']:.1f} % in float64: {gap}; the gradients' signs "
        f"agree in {agreement}"
    )
    return Outcome(overall((gap, agreement)), reason, figure)


def _agreement(first: np.ndarray, second: np.ndarray) -> Mean:
    """Share of the signs that agree, of each of N gradients; two zeros do not count."""
    count = len(first)
    either = ((first != 0) | (second != 0)).reshape(count, -1)
    same = (first == second).reshape(count, -1) & either
    shares = same.sum(axis=1) / np.maximum(either.sum(axis=1), 1)
    return Mean.of(np.where(either.any(axis=1), shares, 1.0))


def _batch_independence(bench: Bench) -> Outcome:
    rows = np.arange(min(len(bench.images), _SAMPLE))
    images, labels = bench.images[rows], bench.labels[rows]
    # A fixed order: it need not be random, only another one.
    shuffled = np.random.default_rng(bench.seed).permutation(len(rows))
    together = np.empty_like(bench.logits[rows])
    together[shuffled] = _call(bench, images[shuffled])
    alone = np.concatenate([_call(bench, images[i : i + 1]) for i in range(len(rows))])
    own_class = np.empty_like(together)
    for label in np.unique(labels):
        own_class[labels == label] = _call(bench, images[labels == label])
    bench.spend(3 * len(rows))
    figure = {
        "alone_or_shuffled": _finite(normalised_spread(alone, together)),
        "alone_or_own_class": _finite(normalised_spread(alone, own_class)),
    }
    spread = max(normalised_spread(alone, together), normalised_spread(alone, own_class))
    if not spread <= SAME_LOGITS:
        cause = "batch statistics are in use at inference"
        again = normalised_spread(_call(bench, images), _call(bench, images))
        if not again <= SAME_LOGITS:
            cause = "but they differ between passes of one batch, too (test 2)"
        return Outcome(
            "fail",
            f"normalised logits of an image change by {spread:.1e} with its batch: {cause}",
            figure,
        )
    return Outcome("pass", f"normalised logits change by at most {spread:.1e}", figure)


def _unit(logits):
    logits = logits.astype(np.float64)
    # What is not finite is another finding: here it differs from finite logits alone.
    logits = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, 0.0)
    logits = logits - logits.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(logits, axis=1, keepdims=True)
    return logits / np.where(lengths > 0, lengths, 1.0)


def _call(bench, images):
    """One eager call of the function as it was given."""
    return call_logits(bench.given_logits_fn, tf.convert_to_tensor(images)).numpy()


def random_start(bench: Bench, rows: np.ndarray) -> np.ndarray:
    """A point of the ball of each of some rows: (M,) int -> (M, H, W, C) float32."""
    draw = {
        "stream": tf.constant(bench.seed, tf.int64),
        "indices": tf.constant(rows, tf.int64),
        "restart": tf.constant(0, tf.int64),
    }
    images = tf.convert_to_tensor(bench.images[rows])
    return uniform_in_ball(bench.plan.threat, images, **draw).numpy()


def _losses(plan: Plan):
    return ("xent", "cw", "dlr") if plan.num_classes >= 3 else ("xent", "cw")


def _nothing_stands():
    return Outcome("not_applicable", "no image is classified right to begin with")


def _finite(value):
    """A float for JSON, or None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def _passes_of_gradients(plan: Plan) -> float:
    return min(plan.num_examples, _SAMPLE) * 2 * (1 + 3 * len(_losses(plan)))


def _passes_of_precision(plan: Plan) -> float:
    # Twenty steps twice, where a pass in float64 takes as long as several in float32.
    return plan.num_examples * 3 * _PRECISION_STEPS * 5


PRECONDITIONS = (
    Diagnostic(
        1,
        "Logits, not probabilities",
        "preconditions",
        "The outputs are not all in [0, 1] with each row summing to 1, nor a multiple of that, "
        "shifted.",
        "src",
        "quick",
        _logits_not_probabilities,
    ),
    Diagnostic(
        2,
        "Determinism and evaluation mode",
        "preconditions",
        f"Normalised logits differ by at most {SAME_LOGITS:g} over {_NUM_PASSES} passes.",
        "src",
        "quick",
        _determinism,
        passes=lambda plan: _NUM_PASSES * min(plan.num_examples, _SAMPLE),
    ),
    Diagnostic(
        3,
        "Non-zero gradients",
        "preconditions",
        "No image has an exactly zero gradient of cross-entropy, margin or DLR (computed in "
        "float64), at the image or at a random start.",
        "src",
        "quick",
        _nonzero_gradients,
        passes=_passes_of_gradients,
    ),
    Diagnostic(
        4,
        "Threat model",
        "preconditions",
        "Every adversarial image is finite, within epsilon and the pixel range, and epsilon, "
        "bounds and images are in the same units.",
        "src",
        "quick",
        _threat_model,
    ),
    Diagnostic(
        5,
        "Clean accuracy",
        "preconditions",
        "The claim is not above the clean accuracy; images misclassified clean count as failures.",
        "src",
        "quick",
        _clean_accuracy,
    ),
    Diagnostic(
        6,
        "Squeeze diagnostics",
        "preconditions",
        f"The median clean cross-entropy is below {_COLLAPSED:g} ln K, and beta below the collapse "
        f"threshold.",
        "prop",
        "quick",
        _squeeze,
    ),
    Diagnostic(
        7,
        "Precision",
        "preconditions",
        f"PGD in float64 and in float32 differ by at most {100 * _PRECISION_GAP:g} points, and at "
        f"least {100 * _SIGN_AGREEMENT:g} % of the gradients' signs agree.",
        "prop",
        "quick",
        _precision,
        passes=_passes_of_precision,
    ),
    Diagnostic(
        33,
        "Independence of the batch",
        "preconditions",
        f"Normalised logits of an image alone, among its own class and in a shuffled batch differ "
        f"by at most {SAME_LOGITS:g}.",
        "prop",
        "quick",
        _batch_independence,
        passes=lambda plan: 5 * min(plan.num_examples, _SAMPLE),
    ),
)
