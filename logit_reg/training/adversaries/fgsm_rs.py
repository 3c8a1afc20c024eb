"""FGSM with a random start, known as fast adversarial training."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from logit_reg.training.adversaries.recipes import Recipe
from logit_reg.training.adversaries.single_step import SingleStepAdversary


@dataclasses.dataclass(frozen=True)
class FGSMRSAdversary(SingleStepAdversary):
    """FGSM with a random start: uniform noise of epsilon, one step of 1.25 epsilon, clipped.

    Cost of a step:
        2 forwards and 2 backwards.

    Source:
        Wong et al., ICLR 2020, and the authors' `train_mnist.py` and `train_fgsm.py`. Deviations:
        the noisy images are clipped to the pixel range on MNIST as well (the authors do so on
        CIFAR only); a ramp of epsilon on MNIST; on CIFAR the rate rises over 2/5 of the training
        (theirs over 1/2); weight decay of kernels alone;
        crops of 2 pixels (theirs 4).
    """

    description = "FGSM-RS"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "mnist": Recipe(
            step=1.25,
            noise=1.0,
            rate=5e-3,
            rate_schedule="cyclic",
            num_steps=6_000,
            batch_size=100,
        ),
        "cifar": Recipe(
            step=1.25,
            noise=1.0,
            rate=0.2,
            rate_schedule="cyclic",
            num_steps=5_850,
            weight_decay=5e-4,
            batch_norm="training",
        ),
    }
