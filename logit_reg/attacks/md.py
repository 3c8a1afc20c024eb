"""Margin decomposition: one term of the margin first, then the whole of it."""

import dataclasses
import math

import tensorflow as tf

from logit_reg.attacks.engine.gradient_loop import ActiveGradientAttack, check_steps
from logit_reg.attacks.engine.losses import margin_terms, probability_margin_terms
from logit_reg.threat import ThreatModel

TERMS = ("label", "other")
SPACES = ("logits", "probabilities")


@dataclasses.dataclass(frozen=True)
class MD(ActiveGradientAttack):
    """PGD on one term of the margin for the first half of the steps, then on the margin.

    Where the gradient of one term drowns the other's, the margin alone leads astray. Run both
    orders: which term misleads is not known. In probabilities it is the probability margin attack
    (PMA). An image is left once it is fooled.

    Source:
        Ma et al. 2023, arXiv:2006.13726 (imbalanced gradients), with the steps of its public
        code: their length falls from 2 epsilon to 0 along a cosine, and once more for the margin.
        Deviations: the code spends 20 of 50 steps on the one term, along a cosine of 30, and its
        very first step raises the true logit; here each half has a cosine of its own, and no step
        helps the true class. The code runs both orders one after the other, in linf only.
        Probabilities: Xie et al. 2024, arXiv:2411.15210 (PMA), whose public code is MD's with the
        softmax. Deviation: in float64 and in a form that keeps its gradient where the network is
        sure.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    first: str = "label"
    """The term to start with: "label" lowers the true logit, "other" raises the largest other."""
    num_steps: int = 50
    """Number of updates, at least 2."""
    step_size: float | None = None
    """Length of the first update of each half in the threat model's norm, pixel units; 2 epsilon,
    as published, if None."""
    space: str = "logits"
    """What the margin is taken of: "logits" or "probabilities"."""

    def __post_init__(self):
        if self.first not in TERMS:
            raise ValueError(f"first must be one of {', '.join(TERMS)}; got {self.first!r}.")
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}; got {self.space!r}.")
        check_steps(self.num_steps, self.step_size, least=2)

    def _starts(self, active):
        yield (self.first,), active.examples.labels

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; without further inputs."""
        del loss_inputs
        terms = margin_terms if self.space == "logits" else probability_margin_terms
        true, other = terms(logits, labels)
        term = -true if self.first == "label" else other
        return tf.where(step < self._num_first, term, other - true)

    def step_length(self, step):
        """See `GradientAttack.step_length`."""
        num_first, num_second = self._num_first, self.num_steps - self._num_first
        step = tf.cast(step, tf.float32)
        progress = tf.where(step < num_first, step / num_first, (step - num_first) / num_second)
        largest = self.step_size or 2.0 * self.threat.epsilon
        return largest * 0.5 * (1.0 + tf.cos(math.pi * progress))

    @property
    def _num_first(self):
        return self.num_steps // 2
