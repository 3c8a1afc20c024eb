"""What an attacker may do: a norm, a budget and the pixel range, in one record."""

import dataclasses
import math

import tensorflow as tf

NORMS = ("linf", "l2")

# Below this length a vector has no usable direction; it also keeps 0 / 0 out.
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """A ball around each image, intersected with the pixel range.

    Units:
        Everything is in the model's own pixel units: [0, 1] for MNIST, [0, 255] for CIFAR. An
        l2 distance is over all pixels and channels of an image.
    """

    norm: str = "linf"
    """"linf" or "l2"."""
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
        return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=-1))

    def project(self, perturbed, images, scale=1.0):
        """Project onto the ball around `images`, then clip to the pixel range.

        Clipping last stays in the ball, because the images themselves lie in the range.

        Args:
            perturbed: (N, H, W, C) float, pixel units.
            images: (N, H, W, C) float centres of the balls, within the bounds.
            scale: () fraction of epsilon to allow, for a ramp in training.

        Returns:
            (N, H, W, C) float.
        """
        epsilon = self.epsilon * scale
        if self.norm == "linf":
            perturbed = tf.clip_by_value(perturbed, images - epsilon, images + epsilon)
        else:
            delta = perturbed - images
            perturbed = images + delta * tf.minimum(1.0, epsilon / _length(delta))
        return tf.clip_by_value(perturbed, self.lower, self.upper)

    def ascent_direction(self, gradient):
        """The unit step of steepest ascent: the sign in linf, the normalised gradient in l2.

        Args:
            gradient: (N, H, W, C) float.

        Returns:
            (N, H, W, C) float; zero where the gradient is zero.
        """
        if self.norm == "linf":
            return tf.sign(gradient)
        return _unit(gradient)

    def random_start(self, images, noise, radius, scale=1.0):
        """A point drawn uniformly from the ball, clipped to the pixel range.

        Args:
            images: (N, H, W, C) float centres, pixel units.
            noise: (N, H, W, C) float: uniform on [-1, 1) in linf, standard normal in l2.
            radius: (N, 1, 1, 1) float, uniform on [0, 1); only l2 uses it.
            scale: () fraction of epsilon to allow, for a ramp in training.

        Returns:
            (N, H, W, C) float within ball and range.

        Source:
            linf: the challenges' `pgd_attack.py`. l2: Gaussian direction, radius
            epsilon * U^(1/n), the uniform distribution of the ball.
        """
        epsilon = self.epsilon * scale
        if self.norm == "linf":
            delta = noise * epsilon
        else:
            num_values = math.prod(images.shape[1:])
            delta = _unit(noise) * (epsilon * radius ** (1.0 / num_values))
        return self.project(images + delta, images, scale)


def _unit(x):
    """Each image scaled to l2 length 1; divided by its largest value first, so that the square
    of a tiny gradient does not underflow.
    """
    largest = tf.reduce_max(tf.abs(x), axis=tf.range(1, tf.rank(x)), keepdims=True)
    x = tf.math.divide_no_nan(x, largest)
    return x / _length(x)


def _length(x):
    """(N, 1, 1, 1) l2 length of each image, kept away from 0."""
    squared = tf.reduce_sum(tf.square(x), axis=tf.range(1, tf.rank(x)), keepdims=True)
    return tf.maximum(tf.sqrt(squared), _TINY)
