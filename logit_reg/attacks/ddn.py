"""DDN: the closest adversarial image in l2, direction and norm decoupled."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.closest import RadiusSearch, linear_distance, per_image

# Largest norm of the first step, in distances of the linearised boundary.
_FARTHEST_START = 10.0


@dataclasses.dataclass(frozen=True)
class DDN(RadiusSearch):
    """Decoupled direction and norm attack, for l2.

    A step along the gradient, then the perturbation is scaled to a norm of its own, which shrinks
    by a constant factor where the iterate fools and grows where it does not.

    `run` returns the closest image where it is within epsilon, else the image itself; `closest`
    returns it and its distance anyway. A restart starts half of epsilon from the image.

    Source:
        Rony et al. 2019, arXiv:1811.09600, and the public code of its authors. Deviations: target
        classes, and differences of logits, whose gradient stays where a network is sure and
        cross-entropy has none left; steps are measured in radii, and the first
        norm is 2 on images in [0, 1], not 1; pixels keep values between the
        256 levels; the last iterate is judged, too; a tie fools.
    """

    initial_norm: float = 2.0
    """Norm of the first step, as a share of the pixel range; at most ten times the distance of
    the linearised boundary, from where a hundred steps get down to it."""

    def __post_init__(self):
        super().__post_init__()
        self.threat.check_norm("DDN", "l2")
        if not self.initial_norm > 0:
            raise ValueError(f"initial_norm must be above 0; got {self.initial_norm}.")

    def _first_radius(self, seen):
        norm = self.initial_norm * (self.threat.upper - self.threat.lower)
        return tf.minimum(norm, _FARTHEST_START * linear_distance(self.threat, seen))

    def _next_radius(self, seen, radius, distance, share):
        return radius * tf.where(seen.fooled, 1 - self.gamma, 1 + self.gamma)

    def _to_radius(self, points, images, radius):
        length = self.threat.distance(points, images)
        return images + (points - images) * per_image(tf.math.divide_no_nan(radius, length))
