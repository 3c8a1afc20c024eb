"""What GAT and NuAT share: a Bernoulli start, and a step up a loss with a pair term."""

import dataclasses
from typing import Any, ClassVar, Self

import tensorflow as tf

from logit_reg.training.adversaries.protocol import Batch
from logit_reg.training.adversaries.single_step import SingleStepAdversary


@dataclasses.dataclass(frozen=True)
class GuidedAdversary(SingleStepAdversary):
    """Noise of one size and random sign, then one step up cross-entropy + weight * pair term."""

    weight: float = 0.0
    """Of the pair term; it follows the schedule of beta."""

    wants_clean_logits: ClassVar[bool] = True
    reg: ClassVar[str]
    """The objective with the same pair term."""

    @property
    def cost(self) -> tuple[int, int]:
        """See `Adversary.cost`."""
        return 3, 2

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """See `Adversary.from_settings`; with another pair term in training, its own has the weight
        that its authors give it.
        """
        weight = cls.recipes[settings.challenge.family].beta
        if cls.is_own(settings):
            weight = settings.beta
            if settings.loss_reduction == "sum":
                # Training sums the cross-entropy over the batch, and has the term once.
                weight /= settings.training_batch_size
        return dataclasses.replace(super().from_settings(settings), weight=weight)

    @classmethod
    def is_own(cls, settings: Any) -> bool:
        """Whether a run trains on the pair term that its attack ascends."""
        return settings.reg == cls.reg

    def start(self, batch: Batch) -> Any:
        """Return random signs."""
        noise = super().start(batch)
        return tf.where(noise < 0, -tf.ones_like(noise), tf.ones_like(noise))

    def pair_weight(self, batch: Batch, dtype: Any) -> Any:
        """() weight of the pair term in this step."""
        return self.weight * tf.cast(batch.beta_scale, dtype)
