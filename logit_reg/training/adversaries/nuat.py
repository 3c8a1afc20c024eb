"""Nuclear-norm adversarial training (NuAT)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf

from logit_reg.objectives import batch_matrix_norm
from logit_reg.training.adversaries.guided import GuidedAdversary
from logit_reg.training.adversaries.protocol import Batch
from logit_reg.training.adversaries.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class NuATAdversary(GuidedAdversary):
    """NuAT: noise of half epsilon and random sign, one step of epsilon, clipped to epsilon. Every
    second step of training ascends cross-entropy + the nuclear norm of the batch's logits around
    the clean ones, the others cross-entropy alone.

    Cost of a step:
        3 forwards and 3 backwards, with reg "nuat": clean, start and adversarial images (the paper
        counts the update's two backwards as one).

    Source:
        Sriramanan et al., NeurIPS 2021, and the authors' `NuAT_cifar10.py`. Deviations: the clean
        logits serve both attack and update (the authors' code computes them twice); beta grows
        with every step, theirs with every epoch; the rate rises over 2/5 of the training and falls
        to 0 (theirs to 0.02 after 4/5, then by tenths); weight decay of kernels alone; crops of 2
        pixels (theirs 4). Nothing is published for MNIST: the noise of epsilon, the rate and the
        ramp of epsilon there are ours.
    """

    description = "NuAT"
    reg = "nuat"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "mnist": Recipe(
            step=1.0,
            noise=1.0,
            rate=1e-3,
            rate_schedule="cosine",
            reg="nuat",
            beta=4.5,
            beta_ramp=0.9,
            num_steps=39_062,
            batch_size=64,
        ),
        "cifar": Recipe(
            step=1.0,
            noise=0.5,
            rate=0.1,
            rate_schedule="cyclic",
            reg="nuat",
            beta=4.5,
            beta_ramp=0.9,
            num_steps=76_562,
            batch_size=64,
            weight_decay=5e-4,
        ),
    }

    @classmethod
    def is_own(cls, settings: Any) -> bool:
        """See `GuidedAdversary.is_own`; squeezing has the same member of the family."""
        family = ("squeeze", "nuclear", "clean")
        member = (settings.reg, settings.matrix_norm, settings.centre)
        return super().is_own(settings) or member == family

    def loss(self, batch: Batch, logits: Any) -> Any:
        """See `SingleStepAdversary.loss`."""
        clean = tf.cast(batch.clean_logits, logits.dtype)
        weight = self.pair_weight(batch, logits.dtype) * tf.cast(batch.step % 2, logits.dtype)
        num_images = tf.cast(tf.shape(logits)[0], logits.dtype)
        norm = num_images * batch_matrix_norm(logits, clean, "nuclear")
        return tf.reduce_sum(super().loss(batch, logits)) + weight * norm
