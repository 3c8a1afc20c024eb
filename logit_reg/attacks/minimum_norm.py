"""Minimum norm: the closest adversarial image from several sides, by walks along the boundary."""

import dataclasses

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import take
from logit_reg.attacks.engine.closest import (
    NUM_CONFIRMATIONS,
    ClosestAttack,
    direction_of,
    farthest,
    keep_closer,
    look,
    num_looks,
    per_image,
    search_targets,
    start_of,
    towards,
)
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.hyperplane import boundary_step
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.low_precision import exact_gradient_fn, num_forwards
from logit_reg.attacks.engine.random_numbers import uniform_in_ball
from logit_reg.threat import ThreatModel

# Of a walk, as FAB's: the largest weight of the image's own projection, the overshoot across the
# linearised boundary, and the share of the perturbation that is kept after a success.
_ALPHA, _ETA, _BETA = 0.1, 1.05, 0.9
# Steps in a ball before another one is tried, and how far they go in all, in radii.
_BALL_STEPS, _TRAVEL = 10, 5.0
# A ball's radius is this share below the closest distance at first; half as much after each
# failure, down to the least.
_SHRINK, _LEAST_SHRINK = 0.1, 0.0005
# In the end the closest image goes straight back by up to this share; the way is halved so often.
_WAY_BACK, _HALVINGS = 0.1, 10


@dataclasses.dataclass(frozen=True)
class MinimumNorm(ClosestAttack):
    """Looks for the closest adversarial image of each target class from two sides.

    From the image it walks towards the linearised boundary and along it, back towards the image.
    Then PGD starts at a random point of a ball that reaches as far as the closest image found so
    far, or epsilon where there is none, and twice as far after each failure; what fools is
    followed into smaller balls. From the closest image of these balls it walks again. Failure in
    a ball says nothing about smaller or larger ones: the next is merely less ambitious.

    `run` returns the closest image where it is within epsilon, else the image itself; `closest`
    returns it and its distance anyway, which bounds the true one from above.

    Source:
        Carlini et al. 2019, arXiv:1902.06705, asks for accuracy against epsilon. The walk is that
        of Croce and Hein 2020, arXiv:1907.02044; the steps in a ball are those of Madry et al.
        2018, arXiv:1706.06083. Entering a ball at the closest image, as boundary attacks do
        (Brendel et al. 2018, arXiv:1712.04248), finds gradients where there are none around the
        image itself.
    """

    threat: ThreatModel
    """Norm, budget and pixel range. Epsilon bounds what `run` returns, not the search."""
    num_targets: int = 4
    """Number of target classes, see `search_targets`, cut to the number of wrong classes."""
    num_steps: int = 61
    """Number of updates of each of the two walks and of the search in balls, for each target. 61
    for each of 4 targets take 1,997 passes, forward and backward."""

    def __post_init__(self):
        for name in ("num_targets", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K.
        """
        searches = min(self.num_targets, num_classes - 1)
        looks = num_looks(self.num_targets, num_classes)
        forwards, backwards = (searches * passes + looks for passes in self._passes)
        return forwards + _HALVINGS + 1 + NUM_CONFIRMATIONS, backwards

    @property
    def _passes(self):
        """Forwards and backwards of the search for one target: a walk's step has two forwards."""
        return 5 * self.num_steps + 3, 3 * self.num_steps

    def _search(self, active):
        rows, given = active.rows, active.examples
        functions = (active.logits_fn, exact_gradient_fn(*active.functions))
        image, numbers = batch_spec(given.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        state = (image, numbers, numbers, numbers, image, batch_spec(()))
        # One trace for any number of steps and targets.
        alike = dataclasses.replace(self, num_steps=1, num_targets=1)
        approach = compiled(alike, "_approach", functions, (*state, scalar, scalar, scalar))
        passes = num_forwards(*functions)
        closest, distance = given.images[rows], np.full(len(rows), np.inf, np.float32)
        for name, targets in search_targets(active, self.threat, self.num_targets):
            taken = take((given.images, given.labels, targets, given.indices), rows)
            draw = (given.stream(self, name), given.restart)
            found = approach(*taken, closest, distance, *draw, self.num_steps)
            closest, distance = (tensor.numpy() for tensor in found)
            forwards, backwards = self._passes
            # Directions from another network: one more forward at each of the points seen.
            forwards += 3 * self.num_steps * (passes - 1)
            active.count(len(rows), forwards=forwards, backwards=backwards)
        back = compiled(alike, "_go_back", functions[:1], (image, numbers, image))
        closest = back(given.images[rows], given.labels[rows], closest).numpy()
        active.count(len(rows), forwards=_HALVINGS)
        active.adversarial[rows] = closest

    def _approach(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        targets,
        indices,
        closest,
        distance,
        stream,
        restart,
        num_steps,
    ):
        """The closest images that fool, and their distances, after the search for one target."""
        draw = {"indices": indices, "restart": restart}
        loss = towards(labels, targets)

        def see(points):
            functions = (logits_fn, gradient_logits_fn)
            return look(self.threat, functions, points, images, labels, loss)

        def judged(points, closest, distance):
            fooled = is_fooled(call_logits(logits_fn, points), labels)
            length = self.threat.distance(points, images)
            return *keep_closer(closest, distance, points, length, fooled), fooled

        def walk(start, closest, distance):
            current, *found = self._walk(see, judged, images, start, closest, distance, num_steps)
            return judged(current, *found)[:2]

        start = start_of(self.threat, images, stream=stream, **draw)
        closest, distance = walk(start, closest, distance)
        # `start_of` and `uniform_in_ball` draw from three streams.
        current, *found = self._try_balls(
            see, images, distance, num_steps, stream=stream + 1, **draw
        )
        other, reached, _ = judged(current, *found)
        is_found = per_image(tf.math.is_finite(reached))
        other, reached = walk(tf.where(is_found, other, closest), other, reached)
        return keep_closer(closest, distance, other, reached, True)

    def _go_back(self, logits_fn, images, labels, closest):
        """Points that still fool on the way from the closest images straight to the image."""

        def body(step, share, width):
            points = images + per_image(share - width) * (closest - images)
            fooled = is_fooled(call_logits(logits_fn, points), labels)
            return step + 1, tf.where(fooled, share - width, share), width / 2

        _, share, _ = tf.while_loop(
            lambda step, *_: step < _HALVINGS,
            body,
            (tf.constant(0), tf.ones_like(labels, images.dtype), tf.constant(_WAY_BACK / 2)),
        )
        return tf.where(
            per_image(share < 1), images + per_image(share) * (closest - images), closest
        )

    def _walk(self, see, judged, images, start, closest, distance, num_steps):
        """FAB's steps: the last point, the closest that fooled before it, and their distances."""
        threat = self.threat

        def body(step, current, closest, distance):
            seen = see(current)
            closest, distance = keep_closer(closest, distance, current, seen.length, seen.fooled)
            moved = boundary_step(
                threat, current, images, seen.loss, seen.gradient, alpha_max=_ALPHA, eta=_ETA
            )
            closest, distance, fooled = judged(moved, closest, distance)
            # The next gradient is that of the point on the way back: beyond the boundary, where
            # one pass could do both, a walk ends farther from the image.
            back = tf.where(per_image(fooled), images + _BETA * (moved - images), moved)
            return step + 1, back, closest, distance

        _, *found = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (tf.constant(0, tf.int64), start, closest, distance),
        )
        return found

    def _try_balls(self, see, images, distance, num_steps, *, stream, **draw):
        """PGD in balls: the last point, the closest that fooled before it, and their distances."""
        threat, limit = self.threat, farthest(self.threat, images)
        radius = tf.where(tf.math.is_finite(distance), distance, threat.epsilon)
        radius = tf.minimum(radius, limit)
        start = uniform_in_ball(
            threat, images, stream=stream, scale=per_image(radius / threat.epsilon), **draw
        )

        def body(step, current, radius, shrink, tries, closest, distance):
            seen = see(current)
            closer = tf.logical_and(seen.fooled, seen.length < distance)
            closest, distance = keep_closer(closest, distance, current, seen.length, seen.fooled)
            is_found = tf.math.is_finite(distance)
            tries = tf.where(closer, 0, tries + 1)
            is_over = tries >= _BALL_STEPS
            tries = tf.where(is_over, 0, tries)
            less = tf.maximum(shrink / 2, _LEAST_SHRINK)
            shrink = tf.where(tf.logical_and(is_over, is_found), less, shrink)
            wider = tf.where(is_over, 2 * radius, radius)
            radius = tf.where(is_found, (1 - shrink) * distance, tf.minimum(wider, limit))

            left = 1 - tf.cast(tries, radius.dtype) / _BALL_STEPS
            length = per_image(2 * _TRAVEL * radius / _BALL_STEPS * left)
            direction = direction_of(threat, seen.gradient, stream=stream + 2 + step, **draw)
            starts_anew = per_image(tf.logical_and(is_over, is_found))
            current = tf.where(starts_anew, closest, current + length * direction)
            current = threat.project(current, images, per_image(radius / threat.epsilon))
            return step + 1, current, radius, shrink, tries, closest, distance

        nothing = tf.zeros_like(distance)
        tries = tf.zeros_like(distance, tf.int32)
        state = (start, radius, nothing + _SHRINK, tries, images, nothing + np.inf)
        _, current, _, _, _, closest, distance = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (tf.constant(0, tf.int64), *state),
        )
        return current, closest, distance
