"""The closest adversarial images: what the attacks have in common that look for them."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveExamples, take
from logit_reg.attacks.engine.attack import AttackResult, ImageAttack
from logit_reg.attacks.engine.forward import Classifier, batch_spec, call_logits, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import is_fooled, margin, target_difference
from logit_reg.attacks.engine.low_precision import exact_gradient_fn, num_forwards
from logit_reg.attacks.engine.random_numbers import random_direction
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses
from logit_reg.attacks.engine.target_distances import MOST_CANDIDATES, class_distances
from logit_reg.threat import ThreatModel

# Length of the last step, as a share of the first.
_LAST_STEP = 0.01
# How much farther than where it was found a closest image may go to fool beyond doubt, as shares
# of its distance: the first at which it fools.
_OUTWARDS = (1e-5, 1e-4, 1e-3, 0.0)
NUM_CONFIRMATIONS = len(_OUTWARDS)
"""Most forwards that these take."""


@dataclasses.dataclass(frozen=True)
class ClosestImages:
    """The closest adversarial images that were found for N images."""

    adversarial: np.ndarray
    """(N, H, W, C) float32 pixel units; the image itself where none was found or needed."""
    distance: np.ndarray
    """(N,) float64 distances in the threat model's norm, pixel units: 0 where the image itself is
    misclassified, infinite where nothing was found."""
    forwards: int
    """Images sent forward through the network."""
    backwards: int
    """Images whose gradient was computed."""


class ClosestAttack(ImageAttack):
    """An attack that looks for the closest adversarial image, within epsilon or not."""

    def closest(self, logits_fn, images, labels, *, seed, **options) -> ClosestImages:
        """Look for the closest adversarial image of each image, within epsilon or not.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units, within the threat model's bounds.
            labels: (N,) int true classes.
            seed: source of all random numbers.
            options: `indices`, `restart` and `gradient_logits_fn` as for `Attack.run`.

        Returns:
            A `ClosestImages`, whose distances bound the true ones from above; `accuracy_curve`
            makes a curve of them.

        Raises:
            ValueError: if shapes or types do not fit, or an image is outside the bounds.
        """
        return self._closest(logits_fn, self._checked(images, labels, seed=seed, **options))

    def _run(self, logits_fn, examples):
        found = self._closest(logits_fn, examples)
        fooled = found.distance <= self.threat.epsilon
        adversarial = np.where(fooled[:, None, None, None], found.adversarial, examples.images)
        if isinstance(logits_fn, RepeatedPasses):
            adversarial = outermost(self.threat, found.adversarial, examples.images)
        return AttackResult(adversarial, fooled, fooled.copy(), found.forwards, found.backwards)

    def _closest(self, logits_fn, examples):
        active = ActiveExamples(logits_fn, examples)
        images, best = examples.images, active.adversarial
        if len(active.rows):
            self._search(active)
            self._confirm(active)
        distance = self.threat.distance(*(x.astype(np.float64) for x in (best, images))).numpy()
        is_found = (best != images).any(axis=(1, 2, 3))
        distance = np.where(is_found, distance, np.where(active.fooled, 0.0, np.inf))
        return ClosestImages(best, distance, active.forwards, active.backwards)

    def _confirm(self, active):
        """Move images off the boundary, where the verdict would hang on the rounding of a batch."""
        images, labels, best = active.examples.images, active.examples.labels, active.adversarial
        rows = np.flatnonzero((best != images).any(axis=(1, 2, 3)))
        for outwards in _OUTWARDS:
            if not len(rows):
                return
            moved = images[rows] + np.float32(1 + outwards) * (best[rows] - images[rows])
            moved = np.clip(moved, np.float32(self.threat.lower), np.float32(self.threat.upper))
            fooled = Classifier().judge(active.logits_fn, moved, labels[rows]).fooled
            active.count(len(rows), forwards=1)
            best[rows[fooled]] = moved[fooled]
            rows = rows[~fooled]
        best[rows] = images[rows]

    def _search(self, active: ActiveExamples) -> None:
        """Write the closest image that fools into `active.adversarial`, where one is found."""
        raise NotImplementedError


def outermost(threat, points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Points in the same directions from the images, as far out as the threat model allows.

    The closest image that fools lies on the boundary, where as many of repeated passes are right
    as wrong; beyond it more of them are wrong.

    Args:
        threat: norm, budget and pixel range.
        points: (N, H, W, C) float32, pixel units; one that is the image itself stays.
        images: (N, H, W, C) float32.
    """
    scale = tf.math.divide_no_nan(threat.epsilon, threat.distance(points, images))
    moved = images + per_image(tf.cast(scale, images.dtype)) * (points - images)
    return threat.project(moved, images).numpy()


def accuracy_curve(distance, epsilons) -> np.ndarray:
    """Accuracy at every epsilon, from the distances of adversarial images.

    Args:
        distance: (N,) float, as in `ClosestImages`.
        epsilons: (M,) float, in the same norm and pixel units.

    Returns:
        (M,) float shares of the images whose distance is above an epsilon, so they never rise
        with it; at 0 the clean accuracy.
    """
    distance, epsilons = np.asarray(distance), np.asarray(epsilons)
    return np.mean(distance[None, :] > epsilons[:, None], axis=1)


class Seen(NamedTuple):
    """What a network says of the points that a search is at, for N images."""

    length: tf.Tensor
    """(N,) distances from the images."""
    loss: tf.Tensor
    """(N,) the logit that is to win minus the true one."""
    gradient: tf.Tensor
    """(N, H, W, C) of the loss."""
    fooled: tf.Tensor
    """(N,) bool."""


def look(threat, functions, points, images, labels, loss) -> Seen:
    """Send the points of a search through the network, inside a trace.

    Args:
        threat: norm and pixel range.
        functions: the network that judges, and the one that gives directions.
        points: (N, H, W, C) float32, pixel units.
        images: (N, H, W, C) float32.
        labels: (N,) int64.
        loss: (N, K) logits -> (N,), what the search ascends.
    """
    logits_fn, gradient_logits_fn = functions
    logits, gradient = logits_and_gradient(gradient_logits_fn, points, loss)
    if gradient_logits_fn is not logits_fn:
        logits = call_logits(logits_fn, points)
    value = tf.cast(loss(logits), points.dtype)
    return Seen(threat.distance(points, images), value, gradient, is_fooled(logits, labels))


def keep_closer(closest, distance, points, length, fooled):
    """The closest images that fool, (N, H, W, C), and their distances, (N,), with these points."""
    closer = tf.logical_and(fooled, length < distance)
    return tf.where(per_image(closer), points, closest), tf.where(closer, length, distance)


def towards(labels, targets):
    """The loss of a search for a class: its logit minus the true one."""
    return lambda logits: target_difference(logits, labels, targets)


def search_targets(active, threat, num_targets: int):
    """Target classes of a search, see `ActiveExamples.targets`.

    The first is the one whose linearised boundary is nearest within the pixel range, so that a
    linear network needs no other; then come those with the largest clean logits, which on curved
    networks are closer than the next by linearised boundaries.
    """
    first = None
    if num_looks(num_targets, active.num_classes):
        distances = class_distances(active, threat, in_range=True)
        first = np.full(distances.shape, np.inf)
        rows = np.flatnonzero(np.isfinite(distances).any(axis=1))
        first[rows, np.argmin(distances[rows], axis=1)] = 0
    return active.targets(num_targets, first)


def num_looks(num_targets: int, num_classes: int) -> int:
    """The forwards, and backwards, that an image takes to find out which class is nearest."""
    return min(num_classes - 1, MOST_CANDIDATES) if num_targets < num_classes - 1 else 0


def farthest(threat, images):
    """(N,) distances from images to the farthest corner of the pixel range."""
    corner = tf.maximum(images - threat.lower, threat.upper - images)
    return threat.distance(corner, tf.zeros_like(corner))


def start_of(threat, images, *, stream, indices, restart):
    """Where a search starts: at the image, a restart half of epsilon away in some direction."""
    draw = {"stream": stream, "indices": indices, "restart": restart}

    def elsewhere():
        start = images + 0.5 * threat.epsilon * random_direction(threat, images, **draw)
        return tf.clip_by_value(start, threat.lower, threat.upper)

    return tf.cond(restart > 0, elsewhere, lambda: images)


def direction_of(threat, gradient, *, stream, indices, restart):
    """Unit steps of steepest ascent (N, H, W, C); random ones where the gradient vanishes."""
    is_zero = tf.reduce_all(tf.equal(gradient, 0), axis=(1, 2, 3), keepdims=True)

    def with_random():
        noise = random_direction(threat, gradient, stream=stream, indices=indices, restart=restart)
        return tf.where(is_zero, noise, threat.ascent_direction(gradient))

    return tf.cond(tf.reduce_any(is_zero), with_random, lambda: threat.ascent_direction(gradient))


def linear_distance(threat, seen: Seen):
    """(N,) how far the boundary is if the loss is linear; infinite where it has no slope."""
    slope = threat.slope(seen.gradient)
    return tf.where(slope > 0, tf.math.divide_no_nan(tf.abs(seen.loss), slope), np.inf)


def per_image(values):
    """(N,) -> (N, 1, 1, 1)."""
    return tf.reshape(values, (-1, 1, 1, 1))


@dataclasses.dataclass(frozen=True)
class RadiusSearch(ClosestAttack):
    """A search along the gradient, in a ball whose radius follows the boundary.

    It ascends the largest wrong logit minus the true one, or the logits of `num_targets` classes
    one after the other, from the start each time. Every iterate is judged, the last one too, and
    the closest that fools is kept. Where the gradient vanishes, a step goes in a random direction.
    """

    threat: ThreatModel
    """Norm, budget and pixel range. Epsilon bounds what `run` returns, not the search."""
    num_steps: int = 245
    """Number of updates of a search. 245 for each of 4 targets take 1,987 passes, forward and
    backward."""
    num_targets: int | None = 4
    """Target classes to search for, one after the other, see `search_targets`, cut to the number
    of wrong classes; None for one search, as published."""
    step_size: float = 2.0
    """Length of the first step, in radii; the last is a hundredth of it."""
    gamma: float = 0.05
    """Relative change of the radius in a step; FMN's falls to 0.001 in the last."""

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1; got {self.num_steps}.")
        if self.num_targets is not None and self.num_targets < 1:
            raise ValueError(f"num_targets must be at least 1, or None; got {self.num_targets}.")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be above 0; got {self.step_size}.")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1; got {self.gamma}.")

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K.
        """
        searches, looks = 1, 0
        if self.num_targets is not None:
            searches = min(self.num_targets, num_classes - 1)
            looks = num_looks(self.num_targets, num_classes)
        forwards = searches * (self.num_steps + 1) + looks + 1 + NUM_CONFIRMATIONS
        return forwards, searches * self.num_steps + looks

    def _first_radius(self, seen: Seen):
        """The radius of the first step: (N,) after what was seen at the start."""
        raise NotImplementedError

    def _next_radius(self, seen: Seen, radius, distance, share):
        """The radius of a later step.

        Args:
            seen: what the network says of the points that the step leaves.
            radius: (N,) of the last step.
            distance: (N,) of the closest image that fools, infinite where there is none.
            share: () what is left of the annealing, from 1 to 0.
        """
        raise NotImplementedError

    def _to_radius(self, points, images, radius):
        """Points (N, H, W, C) moved into the ball of a radius (N,) or onto its sphere."""
        raise NotImplementedError

    def _search(self, active):
        rows, given = active.rows, active.examples
        functions = (active.logits_fn, exact_gradient_fn(*active.functions))
        image, numbers = batch_spec(given.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, numbers, scalar, scalar, scalar)
        # One trace for any number of steps and targets.
        num_targets = None if self.num_targets is None else 1
        alike = dataclasses.replace(self, num_steps=1, num_targets=num_targets)
        follow = compiled(alike, "_follow", functions, signature)
        passes = num_forwards(*functions)
        searches = [("", given.labels)]
        if self.num_targets is not None:
            searches = search_targets(active, self.threat, self.num_targets)
        least = np.full(len(rows), np.inf, np.float32)
        for name, targets in searches:
            state = take((given.images, given.labels, targets, given.indices), rows)
            found = follow(*state, given.stream(self, name), given.restart, self.num_steps)
            closest, distance = (tensor.numpy() for tensor in found)
            forwards = (self.num_steps + 1) * passes
            active.count(len(rows), forwards=forwards, backwards=self.num_steps)
            closer = distance < least
            active.adversarial[rows[closer]] = closest[closer]
            least[closer] = distance[closer]

    def _follow(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        targets,
        indices,
        stream,
        restart,
        num_steps,
    ):
        """One search: the closest images that fool, and their distances, infinite if none does."""
        threat, draw = self.threat, {"indices": indices, "restart": restart}
        limit = farthest(threat, images)
        is_targeted = self.num_targets is not None
        loss = towards(labels, targets) if is_targeted else lambda z: -margin(z, labels)

        def body(step, current, radius, closest, distance):
            functions = (logits_fn, gradient_logits_fn)
            seen = look(threat, functions, current, images, labels, loss)
            closest, distance = keep_closer(closest, distance, current, seen.length, seen.fooled)
            angle = math.pi * tf.cast(step, tf.float32) / tf.cast(num_steps, tf.float32)
            share = (1 + tf.cos(angle)) / 2
            later = self._next_radius(seen, radius, distance, share)
            radius = tf.where(tf.equal(step, 0), self._first_radius(seen), later)
            radius = tf.minimum(radius, limit)
            direction = direction_of(threat, seen.gradient, stream=stream + 1 + step, **draw)
            length = self.step_size * radius * (_LAST_STEP + (1 - _LAST_STEP) * share)
            moved = current + per_image(length) * direction
            current = self._to_radius(moved, images, radius)
            current = tf.clip_by_value(current, threat.lower, threat.upper)
            return step + 1, current, radius, closest, distance

        nothing = tf.zeros_like(labels, images.dtype)
        _, current, _, closest, distance = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (
                tf.constant(0, tf.int64),
                start_of(threat, images, stream=stream, **draw),
                nothing,
                images,
                nothing + np.inf,
            ),
        )
        fooled = is_fooled(call_logits(logits_fn, current), labels)
        length = threat.distance(current, images)
        return keep_closer(closest, distance, current, length, fooled)
