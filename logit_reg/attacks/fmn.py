"""FMN: the closest adversarial image by gradient steps in a ball that follows the boundary."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.closest import RadiusSearch, linear_distance, per_image

# Gamma at the end, as published.
_LAST_GAMMA = 0.001


@dataclasses.dataclass(frozen=True)
class FMN(RadiusSearch):
    """Fast minimum-norm attack, for linf and l2.

    A step along the gradient, projected on a ball around the image. The ball reaches as far as
    the linearised boundary until something fools; then it shrinks where the iterate fools and
    grows where it does not. Step and change of radius fall along a cosine.

    `run` returns the closest image where it is within epsilon, else the image itself; `closest`
    returns it and its distance anyway. A restart starts half of epsilon from the image.

    Source:
        Pintor et al. 2021, arXiv:2102.12827, and its public code. Deviations: target classes;
        steps in linf go along the sign of the gradient, and steps are measured in radii, where
        the publication takes l2 steps of one length in every norm; a ball that is too small to
        fool grows by gamma at least; where the gradient vanishes, a step goes in a random
        direction; the last iterate is judged, too; a tie fools.
    """

    def __post_init__(self):
        super().__post_init__()
        self.threat.check_norm("FMN", "linf", "l2")

    def _first_radius(self, seen):
        return seen.length + linear_distance(self.threat, seen)

    def _next_radius(self, seen, radius, distance, share):
        gamma = _LAST_GAMMA + (self.gamma - _LAST_GAMMA) * share
        outside = radius * (1 + gamma)
        # Where the pixel range holds a step back, the linear estimate alone is never reached.
        linear = tf.maximum(seen.length + linear_distance(self.threat, seen), outside)
        outside = tf.where(tf.math.is_finite(distance), outside, linear)
        return tf.where(seen.fooled, tf.minimum(radius * (1 - gamma), distance), outside)

    def _to_radius(self, points, images, radius):
        return self.threat.project(points, images, per_image(radius / self.threat.epsilon))
