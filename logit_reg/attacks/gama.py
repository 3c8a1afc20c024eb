"""GAMA: the margin in probabilities, helped at first by the way that leads off the clean image."""

import dataclasses
import math

import tensorflow as tf

from logit_reg.attacks.engine.gradient_loop import ActiveGradientAttack, check_steps
from logit_reg.attacks.engine.losses import margin_terms, probability_margin_terms
from logit_reg.threat import ThreatModel

# Shares of the steps: the relaxation fades out in the first, steps are divided after the others.
_RELAXED_SHARE = 0.25
_SHORTER_SHARES = (0.6, 0.85)
_STEP_DIVISOR = 10.0
# Keeps 0 / 0 out where both terms underflow.
_TINY = 1e-300


@dataclasses.dataclass(frozen=True)
class GAMA(ActiveGradientAttack):
    """PGD on the margin in probabilities plus a relaxation that fades out.

    The relaxation is weight x ||p(x') - p(x)||_2^2, p(x) being the probabilities of the clean
    image: its gradient is smooth where the margin's is not. It starts as far away as epsilon
    allows. An image is left once it is fooled.

    Source:
        Sriramanan et al. 2020, arXiv:2011.14969, Eq. 5 (GAMA-PGD), and its public code: a corner of
        the ball, 100 steps of 2 epsilon, a tenth of it from step 60, a hundredth from step 85,
        weight 50 falling to 0 over 25 steps. Deviations: the code takes p of the start in place of
        the clean image's, and the last iterate's verdict; here the loss is computed in float64 and
        keeps its gradient where the network is sure.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_steps: int = 100
    """Number of updates; both schedules depend on it."""
    step_size: float | None = None
    """Length of the first updates in the threat model's norm, pixel units; 2 epsilon, as
    published, if None."""
    weight: float = 50.0
    """Weight of the relaxation at the first step."""

    starts_far = True

    def __post_init__(self):
        check_steps(self.num_steps, self.step_size)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be at least 0; got {self.weight}.")

    def _starts(self, active):
        yield (), tf.nn.softmax(active.clean_logits.astype("float64")).numpy()

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; the further inputs are clean probabilities (N, K)."""
        num_relaxed = max(_RELAXED_SHARE * self.num_steps, 1.0)
        weight = self.weight * tf.nn.relu(1.0 - tf.cast(step, tf.float64) / num_relaxed)
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float64))
        relaxation = weight * tf.reduce_sum(tf.square(probabilities - loss_inputs), axis=-1)
        # The margin comes over the largest wrong probability; both then over their joint size.
        true, other = probability_margin_terms(logits, labels)
        unit = tf.stop_gradient(margin_terms(probabilities, labels)[1])
        size = tf.stop_gradient(tf.sqrt(weight * relaxation))
        joint = tf.maximum(unit + size, _TINY)
        share = tf.where(size > 0, unit / joint, 1.0)
        return share * (other - true) + relaxation / joint

    def step_length(self, step):
        """See `GradientAttack.step_length`."""
        length = self.step_size or 2.0 * self.threat.epsilon
        for share in _SHORTER_SHARES:
            is_late = step >= int(share * self.num_steps)
            length = tf.where(is_late, length / _STEP_DIVISOR, length)
        return length
