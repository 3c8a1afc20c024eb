"""PGD from starts that are spread in the logits: output diversified initialisation."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.active_set import Standing
from logit_reg.attacks.engine.attack import AttackResult, ImageAttack
from logit_reg.attacks.engine.examples import attack_inputs
from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.gradient_loop import Ascent, check_steps
from logit_reg.attacks.engine.losses import margin
from logit_reg.attacks.engine.random_numbers import example_noise, random_stream
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class ODI(ImageAttack):
    """First a few steps of length epsilon up a random mixture of logits, then PGD on the margin.

    The mixture w . z has weights w uniform on [-1, 1), drawn for each image and restart: wrap it
    in `Restarts`, the paper takes 20. An image is left once it is fooled.

    Source:
        Tashiro et al. 2020, arXiv:2003.06878, section 3 (ODI), and its public code for the CIFAR
        challenge: a uniform start, 2 steps of 8 and 20 steps of 2 for epsilon 8. Deviation: success
        at any iterate counts, where the code looks at the last one.
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

    def run(
        self,
        logits_fn,
        images,
        labels,
        *,
        seed,
        indices=None,
        restart=0,
        gradient_logits_fn=None,
    ) -> AttackResult:
        """Attack a batch; see `Attack.run`."""
        images, labels, indices = attack_inputs(images, labels, indices)
        standing = Standing(logits_fn, images, labels)
        scalar = tf.TensorSpec((), tf.int64)
        num_classes = standing.clean_logits.shape[1]
        signature = (batch_spec((), tf.int64), scalar, scalar)
        draw = compiled(self, "_weights", (num_classes,), signature)
        weights = draw(indices, random_stream(seed, type(self).__name__, "weights"), restart)
        Ascent(self, self.num_odi_steps + self.num_steps).run_on_standing(
            standing,
            (logits_fn, gradient_logits_fn or logits_fn),
            (images, labels, weights.numpy(), indices),
            stream=random_stream(seed, type(self).__name__, "start"),
            restart=restart,
        )
        return standing.result()

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        steps = self.num_odi_steps + self.num_steps
        return steps + 2, steps

    def ascended_loss(self, step, logits, labels, guides):
        """See `Climber.ascended_loss`; the guides are the weights (N, K)."""
        mixture = tf.reduce_sum(tf.cast(guides, logits.dtype) * logits, axis=-1)
        return tf.where(step < self.num_odi_steps, mixture, -margin(logits, labels))

    def step_length(self, step):
        """See `Climber.step_length`."""
        epsilon = self.threat.epsilon
        return tf.where(step < self.num_odi_steps, epsilon, self.step_size or epsilon / 4)

    def _weights(self, num_classes, indices, stream, restart):
        draw = {"stream": stream, "indices": indices, "restart": restart}
        return example_noise("uniform", (num_classes,), **draw)
