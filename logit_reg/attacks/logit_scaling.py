"""PGD on the cross-entropy of rescaled logits."""

import dataclasses
import math

import tensorflow as tf

from logit_reg.attacks.engine.gradient_loop import ActiveGradientAttack, check_steps
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.threat import ThreatModel

# Of the spread of an image's logits: smallest difference of the top two to divide by.
_SMALLEST_GAP = 1e-6


@dataclasses.dataclass(frozen=True)
class ScaledPGD(ActiveGradientAttack):
    """PGD on cross-entropy where the logits are first multiplied by a factor.

    Cross-entropy has no gradient left in float32 where logits are large and says little where
    they are small. With `logit_scale` None each image's logits are divided, at each step, by the
    difference of its top two (MIFPE): the attack then does not depend on their scale. An image is
    left once it is fooled.

    Source:
        A fixed factor: Carlini and Wagner 2016, arXiv:1607.04311; Hitaj et al. 2021,
        arXiv:2103.01914. None: Yu and Xu, CVPR 2023 (MIFPE: minimal impact of floating-point
        errors) with t = 1. Deviations: its public code has t = 10, APGD's momentum and steps that
        fall from 2 epsilon to 0; here they are PGD's, and logits are divided in float64.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    logit_scale: float | None = None
    """Factor above 0, or None for one over the difference of an image's top two logits."""
    num_steps: int = 40
    """Number of updates."""
    step_size: float | None = None
    """Length of an update in the threat model's norm, pixel units; epsilon / 4 if None."""

    same_steps = True

    def __post_init__(self):
        scale = self.logit_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"logit_scale must be above 0, or None; got {scale}.")
        check_steps(self.num_steps, self.step_size)

    def _starts(self, active):
        yield (), active.examples.labels

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; the same at every step, without further inputs."""
        del step, loss_inputs
        if self.logit_scale is None:
            return _gap_scaled_cross_entropy(logits, labels)
        return attack_loss("xent", self.logit_scale * logits, labels)


def _gap_scaled_cross_entropy(logits, labels):
    """Cross-entropy of logits divided by the difference of the top two, times that difference.

    The difference counts as a constant, so multiplying by it leaves the direction of an image's
    gradient and keeps its size near 1, whatever the scale of the logits.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float64.
    """
    logits = tf.cast(logits, tf.float64)
    top = tf.math.top_k(tf.stop_gradient(logits), 2).values
    spread = top[:, 0] - tf.reduce_min(tf.stop_gradient(logits), axis=-1)
    gap = tf.maximum(top[:, 0] - top[:, 1], _SMALLEST_GAP * spread)
    # Logits that are all the same have nothing to be divided by.
    gap = tf.where(gap > 0, gap, 1.0)
    scaled = (logits - top[:, :1]) / gap[:, None]
    return gap * attack_loss("xent", scaled, labels)
