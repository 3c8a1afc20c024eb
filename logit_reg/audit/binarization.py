"""Test 34: whether an attack finds an adversarial example where one is known to exist."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks import APGD, APGDTargeted, Attack, RandomNoise, Restarts
from logit_reg.attacks.engine.examples import within_bounds
from logit_reg.attacks.engine.forward import Classifier, LogitsFn, batch_spec, clean_logits
from logit_reg.attacks.engine.inference_copy import copy_for_inference
from logit_reg.attacks.engine.random_numbers import example_noise, random_stream
from logit_reg.audit.decisions import decide, percent
from logit_reg.audit.evidence import Diagnostic, Evidence, Outcome, is_within, precise
from logit_reg.audit.features import features_of
from logit_reg.audit.strength import margin_attacks, strong_attacks
from logit_reg.evaluation.run import ThreatModelError, distances, evaluate
from logit_reg.evaluation.statistics import Proportion
from logit_reg.threat import ThreatModel

# The published constants; see `binarization_test`.
_LEAST_FOUND = 0.95
_NUM_INNER = 999
_INNER_RADIUS = 0.95
_CLOSENESS = 0.999
_MOST_DRAWS = 200
# Where random draws find more, the test is too easy to say anything. The paper asks for a low
# share and gives no number.
_MOST_AT_RANDOM = 0.5

# Images of the audit's test, of those at hand.
_SAMPLE = 200
# Images that one binary network holds: each point looks for its own among them.
_MOST_TOGETHER = 100
# Points whose logits tell the scale of a network's logits.
_NUM_SCALED = 100
# Balls that are no further apart than this share of epsilon count as touching.
_ROUNDING = 1e-3

_FIT_STEPS = 1000
_FIT_TOLERANCE = 1e-4
_CLASSIFIER = Classifier()


@dataclasses.dataclass(frozen=True)
class Binarization:
    """What attacks found in binary networks that are known to have adversarial examples."""

    is_set_up: np.ndarray
    """(N,) bool: whether a read-out exists that tells the image and its inner points from the
    boundary point; the others are left out, as published."""
    found_by: Mapping[str, np.ndarray]
    """(N,) bool for each attack; False where there is no read-out."""
    found_at_random: np.ndarray
    """(N,) bool: whether one of `num_draws` draws of uniform or of sign noise finds one."""
    num_inner: int
    """Inner points of each image."""
    num_draws: int
    """Draws of each kind of noise."""
    replaced: tuple[str, ...]
    """Attacks that have no meaning for two classes and ran on the cross-entropy instead."""
    forwards: int
    """Images sent forward through the network."""
    backwards: int
    """Images whose gradient was computed."""

    @property
    def found(self) -> np.ndarray:
        """(N,) bool: by any of the attacks."""
        return np.any([*self.found_by.values()], axis=0)

    @property
    def success(self) -> Proportion:
        """The share that the attacks together find, of the images with a read-out."""
        return Proportion.of(self.found[self.is_set_up])

    @property
    def random_success(self) -> Proportion:
        """The share that random draws find, of the images with a read-out."""
        return Proportion.of(self.found_at_random[self.is_set_up])


def binarization_test(
    network: keras.Model,
    threat: ThreatModel,
    attacks: Mapping[str, Attack],
    images,
    *,
    seed: int = 0,
    num_inner: int = _NUM_INNER,
    inner_radius: float = _INNER_RADIUS,
    closeness: float = _CLOSENESS,
    num_draws: int | None = None,
    batch_size: int = 200,
) -> Binarization:
    """Test attacks where they must succeed: on the network's features with a binary read-out.

    For each image, the last dense layer is replaced by a logistic regression that tells the image
    and `num_inner` random points well inside its ball from one random point on the boundary of the
    ball. An adversarial example exists, the boundary point, and an attack that works finds one. It
    passes at 95 %, if random draws do not do as well. Harder: more inner points, or an
    `inner_radius` nearer to 1.

    The binary networks of all images are one function, traced once: a point is judged by the
    read-out of the image whose ball it lies in. Images whose balls touch are attacked separately.

    Args:
        network: a functional or Sequential Keras network that ends in a dense layer of logits.
        threat: norm, epsilon and pixel range.
        attacks: by name, within `threat`. DLR, which needs three classes, is replaced by the
            cross-entropy, which for two classes is a function of the margin alone.
        images: (N, H, W, C) float, pixel units.
        seed: source of all random numbers.
        num_inner: inner points of each image, besides the image itself.
        inner_radius: fraction of epsilon within which they lie.
        closeness: where the decision boundary lies on the way from that of the logistic
            regression (0) to the boundary point (1).
        num_draws: draws of uniform and of sign noise by the random attacker, the control; as many
            as the costliest attack has forward passes, at most 200, if None.
        batch_size: most images sent through the network at once.

    Returns:
        A `Binarization`.

    Raises:
        ValueError: if the features of the network cannot be cut off, or an argument does not make
            sense.
        ThreatModelError: if an attack leaves its threat model.

    Source:
        Zimmermann, Brendel, Tramèr and Carlini 2022, arXiv:2206.13991, Algorithm 1, and its public
        code: 999 inner points and the image, uniform within 0.95 epsilon (in l2 at that distance),
        one boundary point, in linf a corner of the ball, closeness 0.999, logits scaled to the
        range of the network's own, a pass from 95 % on; robust networks also with 9,999 inner
        points, where 999 leave random draws too much. Deviations: the scale is taken from 100 of
        the points, and the features are divided by their spread before the fit.
    """
    settings = _Settings(threat, seed, num_inner, inner_radius, closeness, num_draws, batch_size)
    return _binarize(network, network, attacks, images, settings)


class _BinaryNetwork:
    """Images -> (N, 2) logits: a point's read-out is that of the image whose ball it lies in.

    The read-outs are variables, so that one trace serves all images.
    """

    def __init__(self, features: LogitsFn, threat: ThreatModel, shape, num_features: int):
        self._features, self._threat = features, threat
        self._images, self._weights, self._biases = (
            tf.Variable(
                tf.zeros((1, *rest), dtype), trainable=False, shape=tf.TensorShape((None, *rest))
            )
            for rest, dtype in (
                (shape, tf.float32),
                ((num_features,), tf.float64),
                ((), tf.float64),
            )
        )

    def hold(self, images, readouts) -> None:
        """Take images (M, H, W, C) and M read-outs, instead of those before."""
        self._images.assign(images)
        self._weights.assign(np.stack([readout.weights for readout in readouts]))
        self._biases.assign(np.array([readout.bias for readout in readouts]))

    def __call__(self, points):
        def distance(image):
            return self._threat.distance(tf.stop_gradient(points), image[None])

        # One image after the other: all at once would take many times the memory of the points.
        apart = tf.map_fn(distance, self._images, fn_output_signature=batch_spec(()))
        rows = tf.argmin(apart, axis=0)
        features = tf.cast(self._features(points), tf.float64)
        logit = tf.reduce_sum(features * tf.gather(self._weights, rows), axis=-1)
        logit = tf.cast(logit + tf.gather(self._biases, rows), tf.float32)
        return tf.stack([-logit, logit], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Readout:
    """A binary read-out and the adversarial example that it is known to have."""

    weights: np.ndarray
    """(F,) float64; the logit of the boundary's class is weights . features + bias, that of the
    interior the negative."""
    bias: float
    boundary: np.ndarray
    """(H, W, C) float32, pixel units: the boundary point."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """See `binarization_test`; also the random points of an image."""

    threat: ThreatModel
    seed: int = 0
    num_inner: int = _NUM_INNER
    inner_radius: float = _INNER_RADIUS
    closeness: float = _CLOSENESS
    num_draws: int | None = None
    batch_size: int = 200

    def __post_init__(self):
        for name in ("num_inner", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("inner_radius", "closeness"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1; got {getattr(self, name)}.")

    def points(self, image, index: int) -> np.ndarray:
        """The image, its inner points, the boundary point: (H, W, C) -> (M, H, W, C) float32."""
        inner = self._draw(image, index, "inner", self.num_inner)
        boundary = self._draw(image, index, "boundary", 1)
        epsilon = self.threat.epsilon
        if self.threat.norm == "linf":
            inner = self._at(image, epsilon * self.inner_radius * inner)
            boundary = self._at(image, epsilon * np.where(boundary < 0, -1.0, 1.0))
        else:
            inner = self._at_distance(image, inner, epsilon * self.inner_radius)
            boundary = self._at_distance(image, boundary, epsilon)
        return np.concatenate([image[None], inner, boundary])

    def _draw(self, image, index, name, count):
        kind = "uniform" if self.threat.norm == "linf" else "normal"
        return example_noise(
            kind,
            (count, *image.shape),
            stream=tf.constant(random_stream(self.seed, "binarization", name), tf.int64),
            indices=tf.constant([index], tf.int64),
            restart=tf.constant(0, tf.int64),
        ).numpy()[0]

    def _at(self, image, delta):
        images = np.broadcast_to(image, delta.shape)
        # Clipped before the ball is asked: what is clipped away takes no room in it.
        points = np.clip(images + delta, self.threat.lower, self.threat.upper)
        return self.threat.project(points.astype(np.float32), images).numpy()

    def _at_distance(self, image, directions, radius):
        """Points that are as far away as asked after they are clipped, where the range allows."""
        images = np.broadcast_to(image, directions.shape)
        delta = directions * 1e-3 * radius / np.abs(directions).max()
        # From below: the distance grows with the length, but slower and slower.
        for _ in range(20):
            points = np.clip(images + delta, self.threat.lower, self.threat.upper)
            factors = radius / np.maximum(distances(points, images, self.threat.norm), 1e-12)
            delta = delta * np.minimum(factors, 1e6).reshape(-1, 1, 1, 1)
        return self._at(image, delta)


def _binarize(
    network, logits_fn, attacks, images, settings, follow=lambda logits_fn: logits_fn
) -> Binarization:
    """See `binarization_test`.

    `logits_fn` gives the logits whose range the binary ones take, those of `network` or of what an
    audit makes of it; `follow` makes of the binary network what is attacked.
    """
    threat, num_draws, batch_size = settings.threat, settings.num_draws, settings.batch_size
    images = _checked(threat, attacks, images)
    if num_draws is None:
        num_draws = min(_MOST_DRAWS, max(attack.cost()[0] for attack in attacks.values()))
    cut = features_of(network)
    features = copy_for_inference(cut, images)
    readouts = [
        _fit(settings.points(image, index), features, logits_fn, settings)
        for index, image in enumerate(images)
    ]
    replacements = {name: _for_two_classes(attack) for name, attack in attacks.items()}
    at_random = {
        kind: RandomNoise(threat, kind, num_draws) for kind in ("uniform", "sign") if num_draws
    }
    binary = _BinaryNetwork(features, threat, images.shape[1:], cut.output_shape[-1])
    attacked = follow(binary)
    is_set_up = np.zeros(len(images), bool)
    found = {name: np.zeros(len(images), bool) for name in [*replacements, *at_random]}
    num_points = settings.num_inner + 2
    passes = np.array([len(images) * (num_points + min(_NUM_SCALED, num_points)), 0])
    with_readout = np.flatnonzero([readout is not None for readout in readouts])
    for rows in _apart(images, with_readout, threat, min(batch_size, _MOST_TOGETHER)):
        held = [readouts[row] for row in rows]
        binary.hold(images[rows], held)
        inside = np.zeros(len(rows), np.int64)
        boundary = np.stack([readout.boundary for readout in held])
        # Rounding may move a point over a decision boundary that is as near as this one.
        works = ~_CLASSIFIER.judge(attacked, images[rows], inside).fooled
        works &= _CLASSIFIER.judge(attacked, boundary, inside).fooled
        passes[0] += 2 * len(rows)
        rows, inside = rows[works], inside[works]
        if not len(rows):
            continue
        is_set_up[rows] = True
        result = evaluate(
            attacked,
            replacements | at_random,
            images[rows],
            inside,
            batch_size=batch_size,
            seed=settings.seed,
            indices=rows,
            with_checks=False,
        )
        for name, correct in result.correct.items():
            found[name][rows] = ~correct
        passes += (result.forwards, result.backwards)
    return Binarization(
        is_set_up=is_set_up,
        found_by={name: found[name] for name in replacements},
        found_at_random=np.any([np.zeros_like(is_set_up), *(found[k] for k in at_random)], axis=0),
        num_inner=settings.num_inner,
        num_draws=num_draws,
        replaced=tuple(name for name in attacks if attacks[name] is not replacements[name]),
        forwards=int(passes[0]),
        backwards=int(passes[1]),
    )


def _fit(points, features, logits_fn, settings) -> _Readout | None:
    """A read-out that tells the last point from all others; None where the fit finds none."""
    batch_size = settings.batch_size
    found = np.concatenate(
        [
            clean_logits(features, points[start : start + batch_size])
            for start in range(0, len(points), batch_size)
        ]
    ).astype(np.float64)
    if not np.isfinite(found).all():
        return None
    weights, bias = _logistic_regression(found)
    logits = found @ weights + bias
    if not (logits[-1] > 0 and np.all(logits[:-1] < 0)):
        return None
    own = clean_logits(logits_fn, points[-min(_NUM_SCALED, len(points)) :])
    own = own[np.isfinite(own).all(axis=1)]
    # Two logits, one the negative of the other, span twice the largest.
    span = float(np.ptp(own)) if own.size else 0.0
    factor = (span or 1.0) / (2 * np.abs(logits).max())
    return _Readout(factor * weights, factor * (bias - settings.closeness * logits[-1]), points[-1])


def _logistic_regression(features):
    """Weights (F,) and bias that tell the last of some features (N, F) from the others.

    Without a penalty, by L-BFGS, until the gradient is at most 1e-4, as scikit-learn does.
    """
    # Here, since the import takes as long as that of all the rest but TensorFlow.
    from scipy.optimize import minimize

    centre, spread = features.mean(axis=0), features.std() or 1.0
    inputs = np.hstack([(features - centre) / spread, np.ones((len(features), 1))])
    signs = np.where(np.arange(len(inputs)) == len(inputs) - 1, 1.0, -1.0)

    def loss_and_gradient(parameters):
        margins = signs * (inputs @ parameters)
        losses = np.logaddexp(0, -margins)
        return losses.sum(), -inputs.T @ (signs * np.exp(-margins - losses))

    found = minimize(
        loss_and_gradient,
        np.zeros(inputs.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": _FIT_TOLERANCE, "ftol": 0.0, "maxiter": _FIT_STEPS},
    )
    weights = found.x[:-1] / spread
    return weights, float(found.x[-1] - centre @ weights)


def _apart(images, rows, threat, most) -> Iterator[np.ndarray]:
    """Rows in groups of images whose balls do not touch, each with at most so many."""
    reach = 2 * threat.epsilon * (1 + _ROUNDING)
    left = list(rows)
    while left:
        group: list[int] = []
        for row in left:
            here = np.broadcast_to(images[row], (len(group), *images.shape[1:]))
            if len(group) < most and np.all(distances(images[group], here, threat.norm) > reach):
                group.append(row)
        left = [row for row in left if row not in set(group)]
        yield np.array(group)


def _for_two_classes(attack: Attack) -> Attack:
    """The same attack where DLR is none: for two classes the cross-entropy follows the margin."""
    if isinstance(attack, Restarts):
        inner = _for_two_classes(attack.attack)
        return attack if inner is attack.attack else dataclasses.replace(attack, attack=inner)
    if isinstance(attack, APGDTargeted):
        return APGD(attack.threat, "xent", attack.num_steps)
    if getattr(attack, "loss", None) == "dlr":
        return dataclasses.replace(attack, loss="xent")  # type: ignore[type-var]
    return attack


def _checked(threat, attacks, images):
    """The images as float32, within the bounds."""
    images = np.asarray(images)
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating) or not len(images):
        raise ValueError(
            f"images must be float (N, H, W, C) in pixel units, at least one; got {images.dtype} "
            f"{images.shape}."
        )
    if not attacks:
        raise ValueError("attacks must hold at least one attack, by name; got none.")
    for name, attack in attacks.items():
        if not is_within(attack.threat, threat):
            raise ValueError(f"{name} attacks in {attack.threat}, which is not within {threat}.")
    images = images.astype(np.float32, copy=False)
    return within_bounds(images, threat.lower, threat.upper)


def _binarization_attacks(evidence: Evidence) -> dict[str, Attack]:
    """The claimant's attacks, or the audit's own where none is known."""
    claimed = {
        name: attack
        for name, attack in evidence.claimed.items()
        if is_within(attack.threat, evidence.threat)
    }
    return claimed or margin_attacks(evidence) | strong_attacks(evidence)


def _binarization(evidence: Evidence) -> Outcome:
    attacks = _binarization_attacks(evidence)
    try:
        found = _binarize(
            evidence.given_logits_fn,
            evidence.logits_fn,
            attacks,
            evidence.images[:_SAMPLE],
            _Settings(evidence.threat, evidence.seed, batch_size=evidence.batch_size),
            follow=lambda binary: precise(binary, evidence.divisor),
        )
    except (ThreatModelError, ValueError) as error:
        return Outcome("skipped", str(error))
    evidence.spend(found.forwards, found.backwards)
    num_set_up = int(found.is_set_up.sum())
    figure: dict[str, Any] = {"images": len(found.is_set_up), "set_up": num_set_up}
    if not num_set_up:
        reason = "no read-out tells the points inside from the one on the boundary, for any image"
        return Outcome("not_applicable", reason, figure)
    decision = decide(found.success, least=_LEAST_FOUND)
    names = ", ".join(found.found_by)
    figure |= {
        "found": decision.to_json(),
        "found_by": {
            name: float(hit[found.is_set_up].mean()) for name, hit in found.found_by.items()
        },
        "found_at_random": found.random_success.value,
        "draws": found.num_draws,
        "inner_points": found.num_inner,
        "replaced": list(found.replaced),
    }
    at_random = f"random draws {percent(found.found_at_random[found.is_set_up])}"
    if decision.status != "fail" and found.random_success.value > _MOST_AT_RANDOM:
        reason = f"{at_random}: too easy to tell; {names} find {percent(found.success.value)}"
        return Outcome("report", reason, figure)
    reason = f"of {num_set_up} planted adversarial examples {names} find {decision}; {at_random}"
    if found.replaced:
        reason += f"; on the cross-entropy, for want of classes: {', '.join(found.replaced)}"
    return Outcome(decision.status, reason, figure)


def _passes(evidence: Evidence) -> float:
    attacks = sum(sum(attack.cost()) for attack in _binarization_attacks(evidence).values())
    per_image = _NUM_INNER + 2 + _NUM_SCALED + 2 * _MOST_DRAWS + min(attacks, _MOST_DRAWS)
    return per_image * min(evidence.num_examples, _SAMPLE)


BINARIZATION = Diagnostic(
    34,
    "Binarisation",
    f"On the features with a binary read-out, where an adversarial example is known to exist, the "
    f"claimant's attacks (the audit's where none is known) find one for at least "
    f"{100 * _LEAST_FOUND:g} % of the images. Where random draws find more than "
    f"{100 * _MOST_AT_RANDOM:g} % (a limit of ours), success says nothing.",
    _binarization,
    threshold_origin="src",
    budget="standard",
    passes=_passes,
)
