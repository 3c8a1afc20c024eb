"""What an attacker may do: a norm, a budget and the pixel range, in one record."""

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

NORMS = ("linf", "l2", "l1")

# Below this length a vector has no usable direction; it also keeps 0 / 0 out.
_TINY = 1e-12
# Share of an image's values that a step moves in l1, unless an attack finds its own.
_SPARSITY = 0.05
# How far from the budget a sum in float64 may be, of the budget, and how long to try.
_SUM_SLACK = 1e-12
_MAX_STEPS = 120
# The largest float32 below 1: its distance from 1 has a logarithm.
_BELOW_ONE = 1 - 2.0**-24


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """A ball around each image, intersected with the pixel range.

    Units:
        Everything is in the model's own pixel units: [0, 1] for MNIST, [0, 255] for CIFAR. An
        l2 or l1 distance is over all pixels and channels of an image.
    """

    norm: str = "linf"
    """"linf", "l2" or "l1"."""
    epsilon: float = 0.3
    """Radius of the ball, above 0."""
    lower: float = 0.0
    """Lowest pixel value."""
    upper: float = 1.0
    """Highest pixel value."""

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be above 0, in pixel units; got {self.epsilon}.")
        if not (math.isfinite(self.lower) and math.isfinite(self.upper)):
            raise ValueError(f"bounds must be finite; got [{self.lower}, {self.upper}].")
        if not self.lower < self.upper:
            raise ValueError(f"bounds must be increasing; got [{self.lower}, {self.upper}].")

    def check_norm(self, what: str, *supported: str) -> None:
        """Refuse a norm in which something is not defined.

        Args:
            what: it, for the message.
            supported: the norms in which it is.

        Raises:
            ValueError: if the norm is another.
        """
        if self.norm not in supported:
            norms = " and ".join(supported)
            raise ValueError(f"{what} is defined in {norms}; got norm {self.norm!r}.")

    @property
    def start_noise(self) -> str:
        """What `random_start` takes: "uniform" on [-1, 1) or standard "normal" noise."""
        return "normal" if self.norm == "l2" else "uniform"

    def distance(self, a, b):
        """Distance between images, one by one.

        Args:
            a: (N, H, W, C) float, pixel units.
            b: (N, H, W, C) float, pixel units.

        Returns:
            (N,) float distances in `norm`.
        """
        delta = tf.reshape(a - b, (tf.shape(a)[0], -1))
        if self.norm == "linf":
            return tf.reduce_max(tf.abs(delta), axis=-1)
        if self.norm == "l1":
            return tf.reduce_sum(tf.abs(delta), axis=-1)
        return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=-1))

    def distance_of(self, change: float, shape: Sequence[int]) -> float:
        """How far an image is away of which every value has moved by as much.

        Args:
            change: of each value, pixel units.
            shape: (H, W, C).

        Returns:
            The distance in `norm`.
        """
        count = math.prod(shape)
        return change * {"linf": 1.0, "l2": math.sqrt(count), "l1": float(count)}[self.norm]

    def project(self, perturbed, images, scale=1.0):
        """Move onto the ball around `images`, within the pixel range.

        In linf and in l1 what results is the nearest point of both. In l2 it is the nearest point
        of the ball, clipped: clipping last stays in the ball, because the images themselves lie in
        the range.

        Args:
            perturbed: (N, H, W, C) float, pixel units.
            images: (N, H, W, C) float centres of the balls, within the bounds.
            scale: () or (N, 1, 1, 1) fraction of epsilon to allow.

        Returns:
            (N, H, W, C) float.

        Source:
            l1: Croce and Hein 2021, arXiv:2103.01208, Proposition 2.1.
        """
        epsilon = self.epsilon * scale
        if self.norm == "linf":
            perturbed = tf.clip_by_value(perturbed, images - epsilon, images + epsilon)
        elif self.norm == "l2":
            delta = perturbed - images
            perturbed = images + delta * tf.minimum(1.0, epsilon / _length(delta))
        else:
            delta = perturbed - images
            room = tf.where(delta > 0, self.upper - images, images - self.lower)
            perturbed = images + tf.sign(delta) * _shrunk(tf.abs(delta), room, epsilon)
        return tf.clip_by_value(perturbed, self.lower, self.upper)

    def ascent_direction(self, gradient, share=_SPARSITY):
        """The unit step of steepest ascent: the sign in linf, the normalised gradient in l2.

        In l1 a step along the largest entry alone would be the steepest. Attacks move more values
        at once, those with the largest entries, all by the same amount.

        Args:
            gradient: (N, H, W, C) float.
            share: in l1, () or (N,) float share of the values to move; at least one is, and all
                that are as large as the smallest of them.

        Returns:
            (N, H, W, C) float; zero where the gradient is zero.

        Source:
            l1: Tramer and Boneh 2019, arXiv:1904.13000 (SLIDE). Deviation: the share is rounded to
            the nearest number; the public code of Croce and Hein 2021, arXiv:2103.01208, rounds
            up, so that its Auto-PGD never gets from two values to one.
        """
        if self.norm == "linf":
            return tf.sign(gradient)
        if self.norm == "l2":
            return self.unit(gradient)
        flat = (tf.shape(gradient)[0], -1)
        size = tf.reshape(tf.abs(gradient), flat)
        count = tf.shape(size)[1]
        wanted = tf.cast(tf.round(share * tf.cast(count, tf.float32)), tf.int32)
        num_moved = tf.broadcast_to(tf.clip_by_value(wanted, 1, count), flat[:1])
        largest = tf.math.top_k(size, tf.reduce_max(num_moved)).values
        smallest = tf.gather(largest, num_moved - 1, batch_dims=1)
        is_large = tf.abs(gradient) >= tf.reshape(smallest, (-1, 1, 1, 1))
        return self.unit(tf.where(is_large, tf.sign(gradient), 0.0))

    def without_stopped(self, gradient, points, images):
        """In l1 the gradient without the values that the pixel range keeps where they are.

        These stand at its edge in the image itself, and the gradient pushes them out of it: to
        move them would waste a share of the step, half of it and more on black backgrounds.
        Values that an attack has brought to the edge stay in, or the projection would take them
        back.

        Args:
            gradient: (N, H, W, C) float at `points`.
            points: (N, H, W, C) float, pixel units.
            images: (N, H, W, C) float centres of the balls.

        Returns:
            (N, H, W, C) float; in other norms the gradient itself.

        Source:
            Croce and Hein 2021, arXiv:2103.01208, Proposition 2.2; their code leaves it out.
        """
        if self.norm != "l1":
            return gradient
        is_low = (tf.maximum(points, images) <= self.lower) & (gradient < 0)
        is_high = (tf.minimum(points, images) >= self.upper) & (gradient > 0)
        return tf.where(is_low | is_high, 0.0, gradient)

    def unit(self, vectors):
        """Vectors of the same directions and of length 1 in `norm`.

        Args:
            vectors: (N, H, W, C) float.

        Returns:
            (N, H, W, C) float; zero where the vector is zero.
        """
        # Divided by its largest value first, so that the square of a tiny one does not underflow.
        axes = tf.range(1, tf.rank(vectors))
        largest = tf.reduce_max(tf.abs(vectors), axis=axes, keepdims=True)
        vectors = tf.math.divide_no_nan(vectors, largest)
        if self.norm == "linf":
            return vectors
        if self.norm == "l2":
            return vectors / _length(vectors)
        total = tf.reduce_sum(tf.abs(vectors), axis=axes, keepdims=True)
        return tf.math.divide_no_nan(vectors, total)

    def slope(self, gradient):
        """By how much a step of length 1 can raise a linear function: the dual norm.

        Args:
            gradient: (N, H, W, C) float of that function.

        Returns:
            (N,) float.
        """
        # Divided by its largest value first, as in `unit`.
        axes = tf.range(1, tf.rank(gradient))
        largest = tf.reduce_max(tf.abs(gradient), axis=axes, keepdims=True)
        scaled = tf.math.divide_no_nan(gradient, largest)
        largest = tf.reshape(largest, (-1,))
        if self.norm == "linf":
            return largest * tf.reduce_sum(tf.abs(scaled), axis=axes)
        if self.norm == "l2":
            return largest * tf.sqrt(tf.reduce_sum(tf.square(scaled), axis=axes))
        return largest

    def random_start(self, images, noise, radius, scale=1.0):
        """A point drawn uniformly from the ball, clipped to the pixel range.

        Args:
            images: (N, H, W, C) float centres, pixel units.
            noise: (N, H, W, C) float as `start_noise` says: uniform on [-1, 1) in linf and l1,
                standard normal in l2.
            radius: (N, 1, 1, 1) float, uniform on [0, 1); linf does not use it.
            scale: () fraction of epsilon to allow, for a ramp in training.

        Returns:
            (N, H, W, C) float within ball and range; not uniform in what both have in common.

        Source:
            linf: the challenges' `pgd_attack.py`. l2: Gaussian direction, radius
            epsilon * U^(1/n), the uniform distribution of the ball. l1: the same with a direction
            of Laplace noise (Barthe et al. 2005, arXiv:math/0503650), which uniform noise is made
            into.
        """
        epsilon = self.epsilon * scale
        if self.norm == "linf":
            delta = noise * epsilon
        else:
            num_values = math.prod(images.shape[1:])
            if self.norm == "l1":
                size = tf.minimum(tf.abs(noise), _BELOW_ONE)
                noise = -tf.sign(noise) * tf.math.log1p(-size)
            delta = self.unit(noise) * (epsilon * radius ** (1.0 / num_values))
        return self.project(images + delta, images, scale)


def _shrunk(size, room, budget):
    """The nearest sizes, each at most its room, whose sum is at most the budget.

    All shrink by the same number, down to 0, and are then cut to their room. The sum falls
    piecewise linearly with that number, so that a step of Newton's method ends where the sum is
    the budget once it starts in the same piece; every second step halves the bracket, which leads
    there.

    Args:
        size: (N, H, W, C) float, at least 0.
        room: (N, H, W, C) float, at least 0.
        budget: () or (N, 1, 1, 1) float.

    Returns:
        (N, H, W, C) float.
    """
    flat = (tf.shape(size)[0], -1)
    wide, most = (tf.cast(tf.reshape(x, flat), tf.float64) for x in (size, room))
    budget = tf.cast(tf.reshape(budget, (-1, 1)), tf.float64)

    def body(step, less, low, high, _):
        left = tf.clip_by_value(wide - less, 0.0, most)
        over = tf.reduce_sum(left, axis=1, keepdims=True) - budget
        is_met = (tf.abs(over) <= _SUM_SLACK * budget) | ((less <= 0) & (over <= 0))
        low, high = tf.where(over > 0, less, low), tf.where(over > 0, high, less)
        rate = tf.math.count_nonzero((left > 0) & (left < most), axis=1, keepdims=True)
        reached = less + tf.math.divide_no_nan(over, tf.cast(rate, tf.float64))
        is_inside = (step % 2 == 0) & (reached > low) & (reached < high)
        better = tf.where(is_inside, reached, (low + high) / 2)
        return step + 1, tf.where(is_met, less, better), low, high, tf.reduce_all(is_met)

    largest = tf.reduce_max(wide, axis=1, keepdims=True)
    none = tf.zeros_like(largest)
    _, less, _, _, _ = tf.while_loop(
        lambda step, less, low, high, is_met: (step < _MAX_STEPS) & ~is_met,
        body,
        (0, none, none, largest, tf.constant(False)),
    )
    shrunk = tf.clip_by_value(wide - less, 0.0, most)
    return tf.cast(tf.reshape(shrunk, tf.shape(size)), size.dtype)


def _length(x):
    """(N, 1, 1, 1) l2 length of each image, kept away from 0."""
    squared = tf.reduce_sum(tf.square(x), axis=tf.range(1, tf.rank(x)), keepdims=True)
    return tf.maximum(tf.sqrt(squared), _TINY)
