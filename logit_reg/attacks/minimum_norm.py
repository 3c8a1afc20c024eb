"""Minimum norm by bisection: how far the closest adversarial image is, for all epsilons at once."""

import dataclasses

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveExamples, take
from logit_reg.attacks.engine.attack import AttackResult, ImageAttack
from logit_reg.attacks.engine.examples import Examples
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.gradients import gradient_step, logits_and_gradient
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.low_precision import judged_logits, num_forwards
from logit_reg.attacks.engine.random_numbers import uniform_in_ball
from logit_reg.threat import ThreatModel

# How far the steps in a ball go in all, in radii.
_TRAVEL = 5.0
# Keeps rounding from pushing a point of the sphere of radius epsilon out of the ball.
_INSIDE = 1 - 1e-5


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


@dataclasses.dataclass(frozen=True)
class MinimumNorm(ImageAttack):
    """PGD on the difference of two logits, in a ball of its own radius for each image.

    The radius is doubled from epsilon, at most until the ball covers the pixel range, until
    something fools; then it is bisected between the largest radius that failed and the smallest
    distance that fooled. A ball is entered at the closest image found so far, projected, or at a
    random point where there is none. Target classes are taken one after the other, those with the
    largest clean logits first; all but the first only look for something closer.

    `run` returns the closest image where it is within epsilon, else the image itself; `closest`
    returns it and its distance anyway, which bounds the true one from above.

    Source:
        Carlini et al. 2019, arXiv:1902.06705, asks for accuracy against epsilon; the steps in a
        ball are those of Madry et al. 2018, arXiv:1706.06083, with lengths that fall linearly to
        0. Entering a ball at the closest image, as boundary attacks do (Brendel et al. 2018,
        arXiv:1712.04248), finds gradients where there are none around the image itself.
    """

    threat: ThreatModel
    """Norm, budget and pixel range. The search starts at epsilon and does not end there."""
    num_targets: int = 9
    """Number of target classes, cut to the number of wrong classes."""
    num_bisections: int = 20
    """Most balls to try for a target; an image needs as many only if nothing fools, or if its
    distance and epsilon differ by a large factor."""
    num_steps: int = 20
    """Number of updates in a ball."""
    tolerance: float = 0.01
    """The bisection ends where the radius that failed is this close to the distance that fooled,
    as a fraction of the distance."""

    def __post_init__(self):
        for name in ("num_targets", "num_bisections", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1; got {self.tolerance}.")

    def _run(self, logits_fn, examples):
        found = self._closest(logits_fn, examples)
        fooled = found.distance <= self.threat.epsilon
        adversarial = np.where(fooled[:, None, None, None], found.adversarial, examples.images)
        return AttackResult(adversarial, fooled, fooled.copy(), found.forwards, found.backwards)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        num_balls = self.num_targets * self.num_bisections
        return num_balls * (self.num_steps + 1) + 1, num_balls * self.num_steps

    def closest(self, logits_fn, images, labels, *, seed, **options) -> ClosestImages:
        """Look for the closest adversarial image of each image, within epsilon or not.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units, within the threat model's bounds.
            labels: (N,) int true classes.
            seed: source of the random starts.
            options: `indices`, `restart` and `gradient_logits_fn` as for `Attack.run`.

        Returns:
            A `ClosestImages`; `accuracy_curve` makes a curve of its distances.
        """
        return self._closest(logits_fn, Examples.checked(images, labels, seed=seed, **options))

    def _closest(self, logits_fn, examples):
        active = ActiveExamples(logits_fn, examples)
        adversarial = examples.images.copy()
        distance = np.where(active.fooled, 0.0, np.inf)
        for name, targets in active.targets(self.num_targets):
            stream = examples.stream(self, name)
            self._bisect(active, adversarial, distance, targets, stream=stream)
        return ClosestImages(adversarial, distance, active.forwards, active.backwards)

    def _bisect(self, active, adversarial, distance, targets, *, stream):
        """Look for closer images towards one target; updates `adversarial` and `distance`."""
        given, functions, images = active.examples, active.functions, active.examples.images
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, numbers, image, batch_spec(()), scalar, scalar)
        search = compiled(self, "_search", functions, signature)
        passes = num_forwards(*functions)
        # From one corner of the pixel range to the opposite one.
        largest = self.threat.distance_of(self.threat.upper - self.threat.lower, images.shape[1:])
        rows = active.rows
        failed = np.zeros(len(images))
        radius = np.where(
            np.isfinite(distance), (1 - self.tolerance) * distance, _INSIDE * self.threat.epsilon
        )
        for number in range(self.num_bisections):
            if not len(rows):
                return
            state = take((images, given.labels, targets, given.indices, adversarial, radius), rows)
            # Two streams a ball: `uniform_in_ball` takes the next one too.
            searched = search(*state, stream + 2 * number, given.restart)
            found, fooled, num_again = (tensor.numpy() for tensor in searched)
            forwards = self.num_steps * passes + 1
            active.count(len(rows), forwards=forwards, backwards=self.num_steps)
            active.count(int(num_again), forwards=1)
            reached = self.threat.distance(*(x.astype(np.float64) for x in (found, state[0])))
            closer = fooled & (reached.numpy() < distance[rows])
            # Without an image to enter a ball at, failing there says little.
            failed[rows[closer & np.isinf(distance[rows])]] = 0.0
            adversarial[rows[closer]] = found[closer]
            distance[rows[closer]] = reached.numpy()[closer]
            failed[rows[~fooled]] = radius[rows[~fooled]]

            is_found = np.isfinite(distance)
            radius = np.where(is_found, (failed + distance) / 2, np.minimum(2 * failed, largest))
            is_done = is_found & (distance - failed <= self.tolerance * distance)
            rows = rows[~is_done[rows]]

    def _search(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        targets,
        indices,
        closest,
        radius,
        stream,
        restart,
    ):
        """PGD in balls of these radii: the first iterate that fools, or the last, who fools, and
        the number of rechecks.
        """
        radius = tf.reshape(radius, (-1, 1, 1, 1))
        scale = radius / self.threat.epsilon
        start = uniform_in_ball(
            self.threat, images, stream=stream, indices=indices, restart=restart, scale=scale
        )
        is_found = tf.reduce_any(closest != images, axis=(1, 2, 3), keepdims=True)
        start = tf.where(is_found, self.threat.project(closest, images, scale), start)

        def step_length(step):
            left = 1 - tf.cast(step, radius.dtype) / self.num_steps
            return 2 * _TRAVEL * radius / self.num_steps * left

        def difference(logits):
            towards, away = (tf.gather(logits, x, batch_dims=1) for x in (targets, labels))
            return towards - away

        def judge(logits, current, found, fooled):
            keep = tf.reshape(fooled, (-1, 1, 1, 1))
            now = is_fooled(logits, labels)
            return tf.where(keep, found, current), tf.logical_or(fooled, now)

        def body(step, current, found, fooled, num_again):
            logits, gradient = logits_and_gradient(gradient_logits_fn, current, difference)
            logits, again = judged_logits(
                logits_fn, gradient_logits_fn, current, logits, labels, fooled
            )
            found, fooled = judge(logits, current, found, fooled)
            current = gradient_step(
                self.threat, current, gradient, images, step_length(step), scale
            )
            return step + 1, current, found, fooled, num_again + again

        _, current, found, fooled, num_again = tf.while_loop(
            lambda step, *_: step < self.num_steps,
            body,
            (0, start, start, tf.zeros_like(labels, tf.bool), 0),
        )
        return *judge(call_logits(logits_fn, current), current, found, fooled), num_again


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
