"""TRADES: the images whose probabilities differ most from those of the clean ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import tensorflow as tf

from logit_reg.attacks.engine.forward import call_logits
from logit_reg.attacks.engine.gradient_loop import check_steps
from logit_reg.attacks.engine.gradients import ascend
from logit_reg.objectives import kl_divergences
from logit_reg.training.adversaries.protocol import Batch
from logit_reg.training.adversaries.recipes import Recipe
from logit_reg.training.adversaries.single_step import SingleStepAdversary
from logit_reg.training.random_numbers import START


@dataclasses.dataclass(frozen=True)
class TRADESAdversary(SingleStepAdversary):
    """TRADES: a little Gaussian noise, then steps up KL(p, p~), clipped to epsilon after each.

    Cost of a step:
        num_steps + 3 forwards and num_steps + 2 backwards, with reg "trades": once the clean images
        for the attack, in its mode of BatchNorm, and once for the update.

    Source:
        Zhang et al., ICML 2019, and the authors' `trades.py`: 40 steps of 0.01 on MNIST, 10 of 2 of
        255 on CIFAR-10 (theirs is 0.007 of 1). Other numbers of steps are 2.5 epsilon in all.
        Deviations: on MNIST Adam along a cosine (theirs is SGD at 0.01 with drops) and a ramp of
        epsilon; the noisy start is clipped to the pixel range.
    """

    num_steps: int = 10
    """Number of steps."""

    @property
    def description(self) -> str:
        """See `Adversary.description`."""
        return f"TRADES-{self.num_steps}"

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "mnist": Recipe(
            step=1 / 30,
            noise=1 / 300,
            rate=1e-3,
            rate_schedule="cosine",
            reg="trades",
            beta=1.0,
            num_steps=46_875,
        ),
        "cifar": Recipe(
            step=1 / 4,
            noise=0.255 / 8,
            rate=0.1,
            rate_drops=(0.75, 0.9),
            rate_factor=10.0,
            reg="trades",
            beta=6.0,
            num_steps=39_000,
            weight_decay=2e-4,
        ),
    }
    attack_steps: ClassVar[Mapping[str, int]] = {"mnist": 40, "cifar": 10}

    def __post_init__(self):
        super().__post_init__()
        check_steps(self.num_steps, self.step_size)

    @property
    def cost(self) -> tuple[int, int]:
        """See `Adversary.cost`."""
        return self.num_steps + 2, self.num_steps + 1

    @classmethod
    def defaults(
        cls, challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
    ) -> dict[str, Any]:
        """Return the recipe for these images."""
        found = super().defaults(challenge, given, is_challenge_config=is_challenge_config)
        usual = cls.attack_steps[challenge.family]
        num_steps = given.get("num_steps", usual)
        if num_steps != usual:
            found["step_size"] = 2.5 * given["epsilon"] / max(num_steps, 1)
        return found | {"num_steps": num_steps}

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """See `Adversary.from_settings`."""
        return dataclasses.replace(super().from_settings(settings), num_steps=settings.num_steps)

    def start(self, batch: Batch) -> Any:
        """Return Gaussian noise."""
        return batch.numbers.normal(START, batch.images.shape[1:])

    def find(self, batch: Batch) -> Any:
        """Take the steps."""
        scale = batch.ramp(self.ramp_steps)
        images = batch.images
        clean = tf.stop_gradient(call_logits(batch.state, images))
        start = self._within_range(images + scale * self.start_noise * self.start(batch))

        def loss(logits):
            return kl_divergences(logits, clean)

        return ascend(
            batch.state, start, images, loss, self.threat, self.num_steps, self.step_size, scale
        )
