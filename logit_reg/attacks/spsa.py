"""SPSA: ascent along gradients that are estimated from values of the loss alone."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.losses import is_fooled, margin
from logit_reg.attacks.engine.low_precision import query_fn
from logit_reg.attacks.engine.random_numbers import example_noise, random_stream, uniform_in_ball
from logit_reg.threat import ThreatModel

# Adam's own, as in the paper.
_BETA_1 = 0.9
_BETA_2 = 0.999
# Directions are drawn for this many pairs at once, whatever is sent forward at once, so that
# `images_per_forward` does not change them.
_PAIRS_PER_DRAW = 64
# A float32 drawn from [0, 1) has 23 random bits; each gives this many signs.
_SIGNS_PER_NUMBER = 16


@dataclasses.dataclass(frozen=True)
class SPSA(ActiveSetAttack):
    """Simultaneous perturbation stochastic approximation on the margin.

    The gradient is estimated from the margin at pairs of points on either side of the iterate, in
    random directions of signs that are drawn for each image, and followed by Adam. Needs forwards
    only; of a `gradient_logits_fn` a `LowPrecision` alone has a use, for the estimates. An image is
    left once it is fooled.

    Units:
        `delta` and `learning_rate` are fractions of the pixel range (upper - lower), so that the
        same settings mean the same on [0, 1] and on [0, 255].

    Source:
        Uesato et al. 2018, arXiv:1802.05666, section 4.2, which takes 8,192 samples. Deviations:
        Adam's epsilon is 0, so that neither the scale of the logits nor that of the pixels
        matters. The paper is about linf; in l2 a step goes along Adam's first moment, whose sign
        in each pixel would lead to the wrong point of the ball.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_steps: int = 100
    """Number of updates."""
    num_samples: int = 128
    """Points at which the margin is taken for one gradient: an even number, two for each
    direction."""
    delta: float = 0.01
    """How far the points are from the iterate in every value, as a fraction of the pixel range.
    They may leave it by as much, as published."""
    learning_rate: float = 0.01
    """Adam's, as a fraction of the pixel range; in l2 the root mean square over an image's values
    of what a step moves them by."""
    images_per_forward: int = 1024
    """Most images sent through the network at once, which bounds the memory; two of each example
    are the least. Changes the result by rounding only."""

    def __post_init__(self):
        self.threat.check_norm("SPSA", "linf", "l2")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1; got {self.num_steps}.")
        if self.num_samples < 2 or self.num_samples % 2:
            raise ValueError(f"num_samples must be even and at least 2; got {self.num_samples}.")
        for name in ("delta", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(
                    f"{name} must be above 0 and at most 1, a fraction of the pixel range; "
                    f"got {value}."
                )
        if self.images_per_forward < 2:
            raise ValueError(
                f"images_per_forward must be at least 2; got {self.images_per_forward}."
            )

    def _attack(self, active):
        rows, examples = active.rows, active.examples
        if not len(rows):
            return
        logits_fn, queried = active.logits_fn, query_fn(*active.functions)
        image, numbers = batch_spec(examples.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        start = compiled(self, "_start", (logits_fn,), (image, numbers, numbers, scalar, scalar))
        signature = (image, image, numbers, image, image, image, scalar)
        move = compiled(self, "_move", (logits_fn,), signature)
        parts = (examples.images, examples.labels, examples.indices)
        images, labels, indices = take(parts, rows)
        stream, restart = examples.stream(self, "start"), examples.restart
        current, fooled = start(images, labels, indices, stream, restart)
        mean = square = np.zeros_like(images)
        active.count(len(rows), forwards=1)
        for step in range(self.num_steps + 1):
            keep = active.record(rows, current.numpy(), fooled.numpy())
            state = (rows, images, labels, indices, current, mean, square)
            rows, images, labels, indices, current, mean, square = take(state, keep)
            if not len(rows) or step == self.num_steps:
                break
            gradient = self.estimate_gradient(
                queried,
                current,
                labels,
                seed=examples.seed,
                indices=indices,
                restart=restart,
                step=step,
            )
            current, mean, square, fooled = move(
                images, current, labels, mean, square, gradient, step
            )
            active.count(len(rows), forwards=self.num_samples + 1)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        return 2 + self.num_steps * (self.num_samples + 1), 0

    def estimate_gradient(
        self, logits_fn, images, labels, *, seed, indices, restart=0, step=0
    ) -> np.ndarray:
        """Estimate the gradient of the loss that is ascended, the negative margin.

        Args:
            logits_fn: images -> logits.
            images: (N, H, W, C) float32, pixel units.
            labels: (N,) int64.
            seed: source of the random directions.
            indices: (N,) int64 places of the images in their data set.
            restart: number of the restart, a further source of the directions.
            step: number of the update, another one.

        Returns:
            (N, H, W, C) float32, in logits per pixel unit: the mean over pairs of the difference
            quotient times the direction, which for a linear loss is the gradient on average.
        """
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, image, scalar, scalar, scalar)
        add_pairs = compiled(self, "_add_pairs", (logits_fn,), signature)
        num_pairs = self.num_samples // 2
        total = np.zeros_like(images)
        for first in range(0, num_pairs, _PAIRS_PER_DRAW):
            count = min(_PAIRS_PER_DRAW, num_pairs - first)
            stream = random_stream(seed, type(self).__name__, f"step {step} pairs {first}")
            total = add_pairs(images, labels, indices, total, stream, restart, count)
        return total.numpy() / num_pairs

    def _start(self, logits_fn, images, labels, indices, stream, restart):
        start = uniform_in_ball(
            self.threat, images, stream=stream, indices=indices, restart=restart
        )
        return start, is_fooled(call_logits(logits_fn, start), labels)

    def _add_pairs(self, logits_fn, images, labels, indices, total, stream, restart, num_pairs):
        """Add the difference quotients of some pairs, times their directions, to the total."""
        shape = images.shape[1:]
        num_values = math.prod(shape)
        numbers = example_noise(
            "unit",
            (_PAIRS_PER_DRAW, math.ceil(num_values / _SIGNS_PER_NUMBER)),
            stream=stream,
            indices=indices,
            restart=restart,
        )[:, :num_pairs]
        delta = self.delta * (self.threat.upper - self.threat.lower)
        num_examples = tf.shape(images, tf.int64)[0]
        chunk = tf.maximum(self.images_per_forward // (2 * num_examples), 1)

        def body(first, total):
            signs = _signs(numbers[:, first : first + chunk], num_values)
            signs = tf.reshape(signs, (num_examples, -1, *shape))
            points = images[:, None, None] + delta * tf.stack([signs, -signs], axis=1)
            return first + chunk, total + self._slopes(logits_fn, points, labels, signs, delta)

        _, total = tf.while_loop(
            lambda first, _: first < num_pairs, body, (tf.constant(0, tf.int64), total)
        )
        return total

    def _slopes(self, logits_fn, points, labels, signs, delta):
        num_each = tf.shape(signs)[1]
        flat = tf.reshape(points, (-1, *points.shape[3:]))
        # In float64: the margins of neighbours are all but equal.
        logits = tf.cast(call_logits(logits_fn, flat), tf.float64)
        margins = margin(logits, tf.repeat(labels, 2 * num_each))
        margins = tf.reshape(margins, (-1, 2, num_each))
        slopes = tf.cast((margins[:, 1] - margins[:, 0]) / (2 * delta), signs.dtype)
        # Where the network breaks down beside the image.
        slopes = tf.where(tf.math.is_finite(slopes), slopes, 0.0)
        return tf.einsum("np,nphwc->nhwc", slopes, signs)

    def _move(self, logits_fn, images, current, labels, mean, square, gradient, step):
        mean = _BETA_1 * mean + (1 - _BETA_1) * gradient
        square = _BETA_2 * square + (1 - _BETA_2) * tf.square(gradient)
        size = self.learning_rate * (self.threat.upper - self.threat.lower)
        if self.threat.norm == "linf":
            count = tf.cast(step + 1, mean.dtype)
            unbiased = tf.sqrt(1 - _BETA_2**count) / (1 - _BETA_1**count)
            change = size * unbiased * tf.math.divide_no_nan(mean, tf.sqrt(square))
        else:
            length = self.threat.distance_of(size, images.shape[1:])
            change = length * self.threat.ascent_direction(mean)
        current = self.threat.project(current + change, images)
        return current, mean, square, is_fooled(call_logits(logits_fn, current), labels)


def _signs(numbers, count):
    """Uniform numbers on [0, 1), (N, P, M) -> (N, P, count) signs, -1.0 or 1.0."""
    integers = tf.cast(numbers * 2**_SIGNS_PER_NUMBER, tf.int32)[..., None]
    bits = tf.bitwise.right_shift(integers, tf.range(_SIGNS_PER_NUMBER)) & 1
    bits = tf.reshape(bits, (*tf.unstack(tf.shape(numbers)[:2]), -1))[..., :count]
    return tf.cast(2 * bits - 1, tf.float32)
