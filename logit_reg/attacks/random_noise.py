"""Random noise: what an attack finds without looking at the network."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.random_numbers import example_noise, uniform_in_ball
from logit_reg.threat import ThreatModel

DISTRIBUTIONS = ("uniform", "sign")

# Most draws before images that are fooled are taken out.
_DRAWS_PER_CHUNK = 20


@dataclasses.dataclass(frozen=True)
class RandomNoise(ActiveSetAttack):
    """Noise drawn again and again until an image is fooled.

    Needs forwards only. The draws of a smaller `num_draws` are the first of a larger one.

    Source:
        The random search that Carlini et al. 2019, arXiv:1902.06705, section 4.5, ask for as a
        check: no gradient attack may miss what it finds.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    distribution: str = "uniform"
    """"uniform" in the ball, or "sign": every value moves by the same amount, up or down, as far
    as epsilon allows."""
    num_draws: int = 100
    """Number of draws for each image."""

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution must be one of {', '.join(DISTRIBUTIONS)}; "
                f"got {self.distribution!r}."
            )
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1; got {self.num_draws}.")

    def _attack(self, active):
        examples = active.examples
        image, numbers = batch_spec(examples.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, scalar, scalar, scalar)
        draw_all = compiled(self, "_draw_all", (active.logits_fn,), signature)
        rows = active.rows
        for first in range(0, self.num_draws, _DRAWS_PER_CHUNK):
            if not len(rows):
                break
            count = min(_DRAWS_PER_CHUNK, self.num_draws - first)
            stream = examples.stream(self, self.distribution, f"draws {first}")
            attacked = take((examples.images, examples.labels, examples.indices), rows)
            candidates, fooled = draw_all(*attacked, stream, examples.restart, count)
            active.count(len(rows), forwards=count)
            rows = rows[active.record(rows, candidates.numpy(), fooled.numpy())]

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        return self.num_draws + 1, 0

    def _draw_all(self, logits_fn, images, labels, indices, stream, restart, num_draws):
        def body(draw, candidates, fooled):
            # Two streams a draw: `uniform_in_ball` takes the next one too.
            point = self._point(images, stream + 2 * draw, indices, restart)
            candidates = tf.where(tf.reshape(fooled, (-1, 1, 1, 1)), candidates, point)
            now = is_fooled(call_logits(logits_fn, point), labels)
            return draw + 1, candidates, tf.logical_or(fooled, now)

        _, candidates, fooled = tf.while_loop(
            lambda draw, *_: draw < num_draws,
            body,
            (tf.constant(0, tf.int64), images, tf.zeros_like(labels, tf.bool)),
        )
        return candidates, fooled

    def _point(self, images, stream, indices, restart):
        draw = {"stream": stream, "indices": indices, "restart": restart}
        if self.distribution == "uniform":
            return uniform_in_ball(self.threat, images, **draw)
        noise = example_noise("uniform", images.shape[1:], **draw)
        signs = tf.where(noise < 0, -1.0, 1.0)
        delta = self.threat.epsilon * self.threat.ascent_direction(signs)
        return self.threat.project(images + delta, images)
