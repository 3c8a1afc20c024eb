"""What the single-step adversaries share: a random start, one signed step up a gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import tensorflow as tf

from logit_reg.attacks.engine.forward import call_logits
from logit_reg.attacks.engine.gradients import logits_and_gradient, usable_gradient
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.attacked import attacked_network, check_batch_norm
from logit_reg.training.adversaries.protocol import Adversary, Batch, check_ramp, default_ramp
from logit_reg.training.adversaries.recipes import Recipe
from logit_reg.training.distribution import num_replicas, whole_batch
from logit_reg.training.random_numbers import START


@dataclasses.dataclass(frozen=True)
class SingleStepAdversary(Adversary):
    """Noise, then one step of `step_size` along the sign of the gradient of `loss`.

    Noisy and final images are clipped to the pixel range.
    """

    threat: ThreatModel
    """An linf threat model."""
    step_size: float
    """Length of the step, pixel units."""
    start_noise: float
    """Size of the random start, pixel units."""
    ramp_steps: int = 0
    """Training steps over which epsilon, start and step grow from 0 linearly."""
    batch_norm: str = "evaluation"
    """Mode of BatchNorm during the attack: "evaluation" or "training"."""

    recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Published training, or ours where none is published, by family of images."""

    def __post_init__(self):
        check_ramp(self.ramp_steps)
        check_batch_norm(self.batch_norm)
        if self.threat.norm != "linf":
            raise ValueError(
                f"{self.description} takes signed steps: it is defined in linf; got norm "
                f"{self.threat.norm!r}."
            )
        for name in ("step_size", "start_noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")

    @property
    def cost(self) -> tuple[int, int]:
        """See `Adversary.cost`."""
        return 2, 2

    @classmethod
    def usual_steps(cls, challenge: Any) -> int | None:
        """See `Adversary.usual_steps`."""
        return cls.recipes[challenge.family].num_steps

    @classmethod
    def defaults(
        cls, challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
    ) -> dict[str, Any]:
        """Return the recipe for these images.

        Raises:
            ValueError: if the rest is a challenge's config.json, which has a training of its own.
        """
        if is_challenge_config:
            name = given["adversary"]
            raise ValueError(
                f"--config trains as the challenge does; --adversary={name} comes with a training "
                f"of its own: leave one of them out."
            )
        return {
            **default_ramp(challenge, given, is_challenge_config=is_challenge_config),
            "num_steps": 1,
            **cls.recipes[challenge.family].settings(given),
        }

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """See `Adversary.from_settings`."""
        return cls(
            settings.threat,
            settings.step_size,
            settings.start_noise,
            settings.ramp_steps,
            settings.attack_batch_norm,
        )

    def create_state(self, model: Any) -> Any:
        """Return the images -> logits that the attack follows."""
        return attacked_network(model.network, self.batch_norm)

    def start(self, batch: Batch) -> Any:
        """(B, H, W, C) noise, in units of `start_noise`: uniform unless another is defined."""
        return batch.numbers.uniform(START, batch.images.shape[1:])

    def loss(self, batch: Batch, logits: Any) -> Any:
        """The loss that the step ascends: cross-entropy unless another is defined.

        Args:
            batch: see `Batch`.
            logits: (B, K) of the start.

        Returns:
            (B,) losses; of a loss of the whole batch, its () sum over the images.
        """
        return tf.nn.sparse_softmax_cross_entropy_with_logits(batch.labels, logits)

    def clip(self, perturbed: Any, images: Any, scale: Any) -> Any:
        """Cut to epsilon and pixel range, unless something else is defined."""
        return self.threat.project(perturbed, images, scale)

    def find(self, batch: Batch) -> Any:
        """Take the step."""
        scale = batch.ramp(self.ramp_steps)
        noise = scale * self.start_noise * self.start(batch)
        start = self._within_range(batch.images + noise)
        gradient = self._gradient(batch, start)
        moved = start + scale * self.step_size * tf.sign(gradient)
        return tf.stop_gradient(self.clip(moved, batch.images, scale))

    def _within_range(self, images: Any) -> Any:
        return tf.clip_by_value(images, self.threat.lower, self.threat.upper)

    def _gradient(self, batch: Batch, start: Any) -> Any:
        """(B, H, W, C) gradient of the sum of the losses over all replicas."""
        if num_replicas() == 1:
            return logits_and_gradient(batch.state, start, lambda z: self.loss(batch, z))[1]
        # Replicas cannot exchange logits within the graph of its own that a gradient has elsewhere.
        whole = dataclasses.replace(batch, labels=whole_batch(batch.labels))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(start)
            total = tf.reduce_sum(self.loss(whole, whole_batch(call_logits(batch.state, start))))
        return usable_gradient(tape.gradient(total, start))
