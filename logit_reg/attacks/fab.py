"""The fast adaptive boundary attack: small perturbations by projecting on linearised boundaries."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.closest import outermost
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient, usable_gradient
from logit_reg.attacks.engine.hyperplane import boundary_step, move_to_hyperplane
from logit_reg.attacks.engine.losses import is_fooled, target_difference
from logit_reg.attacks.engine.low_precision import exact_gradient_fn, num_forwards
from logit_reg.attacks.engine.random_numbers import random_direction
from logit_reg.threat import ThreatModel

# How many steps pass before images that are fooled are taken out.
_STEPS_PER_CHUNK = 20


class _FastBoundary(ActiveSetAttack):
    """Searches on the active set, one after the other; a `LowPrecision` has no use here."""

    threat: ThreatModel
    num_steps: int
    alpha_max: float
    eta: float
    beta: float
    early_stop: bool

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1; got {self.num_steps}.")
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"alpha_max must be in [0, 1]; got {self.alpha_max}.")
        if not self.eta >= 1:
            raise ValueError(f"eta must be at least 1; got {self.eta}.")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be between 0 and 1; got {self.beta}.")

    def _starts(self, active) -> Iterator[tuple[tuple[str, ...], np.ndarray, int | None]]:
        """For each search the names of its random stream, targets, and K to look at all classes."""
        raise NotImplementedError

    def _attack(self, active):
        closest = _Closest(active)
        for names, targets, num_classes in self._starts(active):
            search = _BoundarySearch(
                self.threat, self.num_steps, self.alpha_max, self.eta, self.beta, num_classes
            )
            stream = active.examples.stream(self, *names)
            search.run(closest, targets, stream=stream, early_stop=self.early_stop)
        closest.record(self.threat)


@dataclasses.dataclass(frozen=True)
class FAB(_FastBoundary):
    """Fast adaptive boundary attack towards the nearest linearised boundary of all classes.

    The returned image is the closest that fools, if it lies within epsilon; else the image
    itself. The first run starts at the image, restarts (`restart` above 0) at a random point
    half of epsilon away.

    Source:
        Croce and Hein 2020, arXiv:1907.02044, and its public code. Deviations: the nearest
        boundary is the one with the shortest move within the pixel range, where the publication
        compares distances without the range and misses minimal perturbations by up to 7 %; the
        projections are found by an exact line search instead of a sort; hyperplanes are
        normalised, so that the scale of the logits does not matter; random numbers belong to
        each image.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_steps: int = 100
    """Number of updates."""
    alpha_max: float = 0.1
    """Largest weight of the projection of the image itself."""
    eta: float = 1.05
    """Overshoot across the linearised boundary, at least 1."""
    beta: float = 0.9
    """Fraction of the perturbation to keep after a success."""
    early_stop: bool = False
    """Leave an image once it is fooled within epsilon, instead of looking for a closer one.
    `fooled` stays the same."""

    def _starts(self, active):
        yield (), active.examples.labels, active.num_classes

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K; each step takes the gradient of K - 1 differences of logits.
        """
        return 2 * self.num_steps + 1, (num_classes - 1) * self.num_steps


@dataclasses.dataclass(frozen=True)
class FABTargeted(_FastBoundary):
    """Fast adaptive boundary attack towards one target class after the other.

    Targets are the wrong classes with the largest clean logits. The returned image is the closest
    of all targets that fools, if it lies within epsilon; else the image itself.

    Source:
        FAB-T of AutoAttack: Croce and Hein 2020, arXiv:2003.01690, and its public code.
        Deviations as for `FAB`.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_targets: int = 9
    """Number of target classes, cut to the number of wrong classes."""
    num_steps: int = 100
    """Number of updates for each target."""
    alpha_max: float = 0.1
    """Largest weight of the projection of the image itself."""
    eta: float = 1.05
    """Overshoot across the linearised boundary, at least 1."""
    beta: float = 0.9
    """Fraction of the perturbation to keep after a success."""
    early_stop: bool = False
    """Leave an image once it is fooled within epsilon, instead of looking for a closer one.
    `fooled` stays the same."""

    def __post_init__(self):
        if self.num_targets < 1:
            raise ValueError(f"num_targets must be at least 1; got {self.num_targets}.")
        super().__post_init__()

    def _starts(self, active):
        for name, targets in active.targets(self.num_targets):
            yield (name,), targets, None

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        steps = self.num_targets * self.num_steps
        return 2 * steps + 1, steps


class _Closest:
    """The closest image that fools, for each image of a run."""

    def __init__(self, active):
        self.active = active
        self.images = active.examples.images.copy()
        self.distance = np.full(len(self.images), np.inf, np.float32)

    def record(self, threat):
        """Return the images that are close enough, the attacked ones elsewhere."""
        rows = self.active.rows
        fooled = self.distance[rows] <= threat.epsilon
        found = np.where(
            fooled[:, None, None, None], self.images[rows], self.active.adversarial[rows]
        )
        if self.active.is_repeated:
            found = outermost(threat, self.images[rows], self.active.examples.images[rows])
        self.active.record(rows, found, fooled)


@dataclasses.dataclass(frozen=True)
class _BoundarySearch:
    """The steps of the attack, towards a target or towards the nearest of `num_classes`."""

    threat: ThreatModel
    num_steps: int
    alpha_max: float
    eta: float
    beta: float
    num_classes: int | None

    def run(self, closest, targets, *, stream, early_stop):
        """Attack who is still robust; `targets` are those of all."""
        active, epsilon = closest.active, self.threat.epsilon
        rows, given = active.rows, active.examples
        if early_stop:
            rows = rows[closest.distance[rows] > epsilon]
        if not len(rows):
            return
        functions = (active.logits_fn, exact_gradient_fn(*active.functions))
        image, numbers = batch_spec(given.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        start = compiled(self, "_start", (), (image, numbers, scalar, scalar))
        signature = (image, numbers, numbers, image, image, batch_spec(()), scalar)
        advance = compiled(self, "_advance", functions, signature)
        parts = (given.images, given.labels, targets, given.indices)
        images, labels, targets, indices = take(parts, rows)
        current = images
        if given.restart:
            current = start(images, indices, stream, given.restart).numpy()
        passes = 1 + num_forwards(*functions)
        num_gradients = 1 if self.num_classes is None else self.num_classes - 1
        chunk = _STEPS_PER_CHUNK if early_stop else self.num_steps
        for begin in range(0, self.num_steps, chunk):
            steps = min(chunk, self.num_steps - begin)
            found = advance(
                images,
                labels,
                targets,
                current,
                closest.images[rows],
                closest.distance[rows],
                steps,
            )
            current, closest.images[rows], closest.distance[rows] = (
                tensor.numpy() for tensor in found
            )
            active.count(len(rows), forwards=steps * passes, backwards=steps * num_gradients)
            if early_stop:
                keep = closest.distance[rows] > epsilon
                state = take((rows, images, labels, targets, current), keep)
                rows, images, labels, targets, current = state
                if not len(rows):
                    return

    def _start(self, images, indices, stream, restart):
        draw = {"stream": stream, "indices": indices, "restart": restart}
        direction = random_direction(self.threat, images, **draw)
        return self._clip(images + 0.5 * self.threat.epsilon * direction)

    def _advance(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        targets,
        current,
        closest,
        distance,
        num_steps,
    ):

        def body(step, current, closest, distance):
            value, normal = self._hyperplane(
                logits_fn, gradient_logits_fn, current, labels, targets
            )
            current = boundary_step(
                self.threat,
                current,
                images,
                value,
                normal,
                alpha_max=self.alpha_max,
                eta=self.eta,
            )
            fooled = is_fooled(call_logits(logits_fn, current), labels)
            reached = self.threat.distance(current, images)
            closer = tf.logical_and(fooled, reached < distance)
            closest = tf.where(tf.reshape(closer, (-1, 1, 1, 1)), current, closest)
            distance = tf.where(closer, reached, distance)
            pulled_back = images + (current - images) * self.beta
            current = tf.where(tf.reshape(fooled, (-1, 1, 1, 1)), pulled_back, current)
            return step + 1, current, closest, distance

        _, current, closest, distance = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (tf.constant(0, tf.int64), current, closest, distance),
        )
        return current, closest, distance

    def _clip(self, points):
        return tf.clip_by_value(points, self.threat.lower, self.threat.upper)

    def _hyperplane(self, logits_fn, gradient_logits_fn, points, labels, targets):
        """Value (N,) and gradient (N, H, W, C) of wrong minus true logit, linearised."""

        def judged(logits):
            return logits if gradient_logits_fn is logits_fn else call_logits(logits_fn, points)

        if self.num_classes is None:

            def ahead(logits):
                return target_difference(logits, labels, targets)

            logits, normal = logits_and_gradient(gradient_logits_fn, points, ahead)
            return _finite(tf.cast(ahead(judged(logits)), points.dtype)), normal

        # Only the images are watched: gradients of the weights would double the cost.
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(points)
            logits = call_logits(gradient_logits_fn, points)
        is_label = tf.one_hot(labels, self.num_classes, dtype=logits.dtype)
        deciding = judged(logits)
        true_logit = tf.gather(deciding, labels, batch_dims=1)

        def gradient_towards(wrong):
            difference = tf.one_hot(wrong, self.num_classes, dtype=logits.dtype) - is_label
            unconnected = tf.UnconnectedGradients.ZERO
            gradient = tape.gradient(
                logits, points, output_gradients=difference, unconnected_gradients=unconnected
            )
            return usable_gradient(gradient)

        def body(wrong, nearest, value, normal):
            gradient = gradient_towards(wrong)
            difference = _finite(tf.cast(deciding[:, wrong] - true_logit, points.dtype))
            move, length = move_to_hyperplane(points, gradient, difference, self.threat)
            # 1 where the boundary is within the pixel range; else how far it is out of reach.
            missed = tf.abs(difference / tf.reduce_sum(gradient * move, axis=(1, 2, 3)))
            away = tf.where(tf.equal(labels, wrong), np.inf, length * missed)
            nearer = away < nearest
            return (
                wrong + 1,
                tf.where(nearer, away, nearest),
                tf.where(nearer, difference, value),
                tf.where(tf.reshape(nearer, (-1, 1, 1, 1)), gradient, normal),
            )

        nothing = tf.zeros_like(labels, points.dtype)
        _, _, value, normal = tf.while_loop(
            lambda wrong, *_: wrong < self.num_classes,
            body,
            (tf.constant(0, tf.int64), nothing + np.inf, nothing, tf.zeros_like(points)),
        )
        return value, normal


def _finite(values):
    """0 where a number is not finite: the image is misclassified there, and goes nowhere."""
    return tf.where(tf.math.is_finite(values), values, 0.0)
