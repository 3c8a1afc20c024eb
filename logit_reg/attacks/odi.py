"""PGD from starts that are spread in the logits: output diversified initialisation."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.gradient_loop import ActiveGradientAttack, check_steps
from logit_reg.attacks.engine.losses import margin
from logit_reg.attacks.engine.random_numbers import example_noise
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class ODI(ActiveGradientAttack):
    """First a few steps of length epsilon up a random mixture of logits, then PGD on the margin.

    The mixture w . z has weights w uniform on [-1, 1), drawn for each image and restart: wrap it
    in `Restarts`, the paper takes 20. An image is left once it is fooled.

    Source:
        Tashiro et al. 2020, arXiv:2003.06878, section 3 (ODI), and its public code for the CIFAR
        challenge: a uniform start, 2 steps of 8 and 20 steps of 2 for epsilon 8. Deviation: success
        at any iterate counts, where the code counts the last one.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_odi_steps: int = 2
    """Number of updates along w . z, each of length epsilon."""
    num_steps: int = 20
    """Number of updates on the margin that follow."""
    step_size: float | None = None
    """Length of an update on the margin in the threat model's norm, pixel units; epsilon / 4, as
    published, if None."""

    def __post_init__(self):
        if self.num_odi_steps < 1:
            raise ValueError(f"num_odi_steps must be at least 1; got {self.num_odi_steps}.")
        check_steps(self.num_steps, self.step_size)

    @property
    def _num_updates(self):
        return self.num_odi_steps + self.num_steps

    def _starts(self, active):
        scalar = tf.TensorSpec((), tf.int64)
        signature = (batch_spec((), tf.int64), scalar, scalar)
        draw = compiled(self, "_weights", (active.num_classes,), signature)
        examples = active.examples
        weights = draw(examples.indices, examples.stream(self, "weights"), examples.restart)
        yield ("start",), weights.numpy()

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; the further inputs are the weights (N, K)."""
        mixture = tf.reduce_sum(tf.cast(loss_inputs, logits.dtype) * logits, axis=-1)
        return tf.where(step < self.num_odi_steps, mixture, -margin(logits, labels))

    def step_length(self, step):
        """See `GradientAttack.step_length`."""
        return tf.where(step < self.num_odi_steps, self.threat.epsilon, super().step_length(step))

    def _weights(self, num_classes, indices, stream, restart):
        draw = {"stream": stream, "indices": indices, "restart": restart}
        return example_noise("uniform", (num_classes,), **draw)
