"""N-FGSM: FGSM from stronger noise, not clipped to epsilon."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from logit_reg.training.adversaries.recipes import Recipe
from logit_reg.training.adversaries.single_step import SingleStepAdversary


@dataclasses.dataclass(frozen=True)
class NFGSMAdversary(SingleStepAdversary):
    """N-FGSM: uniform noise of 2 epsilon, one step of epsilon, clipped to the pixel range alone.

    Its images reach up to 3 epsilon.

    Cost of a step:
        2 forwards and 2 backwards.

    Source:
        de Jorge et al., NeurIPS 2022, and the authors' `train.py`. Deviation: the rate rises over
        2/5 of the training (theirs over 1/2); weight decay of kernels alone;
        crops of 2 pixels (theirs 4). Nothing is published for MNIST: the ramp of epsilon
        and the rate there are ours.
    """

    description = "N-FGSM"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "mnist": Recipe(step=1.0, noise=2.0, rate=1e-3, rate_schedule="cosine", num_steps=10_000),
        "cifar": Recipe(
            step=1.0,
            noise=2.0,
            rate=0.2,
            rate_schedule="cyclic",
            num_steps=11_700,
            weight_decay=5e-4,
            batch_norm="training",
        ),
    }

    def clip(self, perturbed: Any, images: Any, scale: Any) -> Any:
        """Cut to the pixel range."""
        del images, scale
        return self._within_range(perturbed)
