"""Free adversarial training: every backward pass serves the weights and the perturbation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf

from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.protocol import Adversary, Batch, check_ramp, default_ramp
from logit_reg.training.distribution import num_replicas, own_slice, whole_batch
from logit_reg.training.inputs import image_shape, require

_REPLAYS = 8
GRADIENTS = ("perturbation", "image")


@dataclasses.dataclass(frozen=True)
class FreeAdversary(Adversary):
    """Free adversarial training: one persistent perturbation, updated with every weight update.

    The gradient of one backward pass serves the weights and the perturbation. The published code
    takes it with respect to the perturbation, so it is 0 where the image with it leaves the pixel
    range: such a pixel of the perturbation stays as it is. On MNIST, where most pixels are black,
    most of the perturbation then never moves again, and the network is left without robustness
    (results/README.md); there the gradient is by default that of the clipped image.

    Each minibatch has to come several times in a row ("replays"): that is the data's business;
    `loop.py` does it, and `feeding.replayed` does it to a data set for `fit`.

    Cost of a step:
        1 forward and 1 backward; as many steps as replays make one of other training.

    Source:
        Shafahi et al. 2019, arXiv:1904.12843, and the authors' `free_train.py`: step size
        epsilon, never reset, one crop for all replays. Deviations, on MNIST alone, for which the
        authors have no code: the gradient above, and a ramp (at 0.3 from the first step on, the
        network stays at chance).
    """

    threat: ThreatModel
    """An linf threat model."""
    batch_size: int
    """Images of the persistent perturbation; a smaller batch uses its first ones."""
    ramp_steps: int = 0
    """Number of training steps over which epsilon, and the step with it, grows from 0 linearly."""
    replays: int = 1
    """How many steps in a row come with the same minibatch; they share its random crop."""
    gradient: str = "perturbation"
    """What the gradient is taken with respect to: "perturbation" or "image", the clipped one."""

    learns: ClassVar[bool] = True

    def __post_init__(self):
        if self.gradient not in GRADIENTS:
            raise ValueError(
                f"gradient must be one of {', '.join(GRADIENTS)}; got {self.gradient!r}."
            )
        check_ramp(self.ramp_steps)
        if self.replays < 1:
            raise ValueError(f"replays must be at least 1; got {self.replays}.")
        self.threat.check_norm("free adversarial training", "linf")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")

    @property
    def description(self) -> str:
        """See `Adversary.description`."""
        return f"free-{self.replays} adversarial"

    @property
    def rules(self) -> Mapping[str, str]:
        """See `Adversary.rules`."""
        return {"free gradient": f"with respect to the {self.gradient}"}

    @classmethod
    def defaults(
        cls, challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
    ) -> dict[str, Any]:
        """Return eight replays; its step is epsilon, for the record."""
        on_mnist = challenge.family == "mnist"
        return {
            **default_ramp(challenge, given, is_challenge_config=is_challenge_config),
            "replays": _REPLAYS,
            "free_gradient": "image" if on_mnist else "perturbation",
            "step_size": challenge.epsilon,
            "num_steps": 1,
        }

    @classmethod
    def from_settings(cls, settings: Any) -> "FreeAdversary":
        """See `Adversary.from_settings`."""
        return cls(
            settings.threat,
            settings.training_batch_size,
            settings.ramp_steps,
            settings.replays,
            settings.free_gradient,
        )

    def create_state(self, model: Any) -> Any:
        """Return the perturbation, (batch_size, H, W, C) in pixel units, all 0.

        It is state of training, not a weight of the network: checkpoints alone hold it.
        """
        return model.add_weight(
            name="perturbation",
            shape=(self.batch_size, *image_shape(model.network)),
            initializer="zeros",
            dtype=model.precision,
            trainable=False,
        )

    def variables(self, state: Any) -> tuple:
        """See `Adversary.variables`."""
        return (state,)

    def find(self, batch: Batch) -> Any:
        """Return this batch's part of the perturbation."""
        return self._part(batch.state, batch.images)

    def images(self, batch: Batch, found: Any) -> Any:
        """Add it and clip; see `gradient` for what the clip does to the backward pass."""

        def clip(summed):
            return tf.clip_by_value(summed, self.threat.lower, self.threat.upper)

        through = tf.grad_pass_through(clip) if self.gradient == "image" else clip
        return through(batch.images + found)

    def learn(self, batch: Batch, found: Any, gradient: Any) -> None:
        """Move it up the gradient by epsilon."""
        # A step that overflows in float16 is left out: it must not spoil the perturbation.
        gradient = tf.where(tf.math.is_finite(gradient), gradient, 0.0)
        epsilon = batch.ramp(self.ramp_steps) * self.threat.epsilon
        moved = tf.clip_by_value(found + epsilon * tf.sign(gradient), -epsilon, epsilon)
        moved = whole_batch(moved)
        rest = batch.state.value[tf.shape(moved)[0] :]
        batch.state.assign(tf.concat([moved, rest], axis=0))

    def _part(self, perturbation, images):
        size = (images.shape[0] or tf.shape(images)[0]) * num_replicas()
        fits = require(
            size <= self.batch_size,
            f"free adversarial training keeps a perturbation of {self.batch_size} images; the "
            f"batch has",
            size,
        )
        with tf.control_dependencies([fits]):
            return own_slice(perturbation.value[:size])
