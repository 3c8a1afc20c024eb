"""What a method's authors train with, as settings of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logit_reg.regularizers import wants_clean_logits


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published training on one family of images; epsilon decides the rest of its lengths."""

    step: float
    """Length of the adversary's step, of epsilon."""
    noise: float
    """Size of its random start, of epsilon."""
    rate: float
    """Learning rate: the largest one."""
    rate_schedule: str = "steps"
    """A value of `--learning_rate_schedule`."""
    rate_drops: tuple[float, ...] = ()
    """Shares of the training after which the rate falls."""
    rate_factor: float = 1.0
    """What the rate is divided by there."""
    reg: str = "none"
    """The pair term that comes with the method."""
    beta: float = 0.0
    """Its weight."""
    beta_ramp: float = 0.0
    """Share of the training over which beta grows from 0 linearly."""
    beta_drops: tuple[float, ...] = ()
    """Shares of the training after which beta is multiplied."""
    beta_factor: float = 1.0
    """What it is multiplied by there."""
    num_steps: int = 1
    """Optimiser steps of the whole training."""
    batch_size: int = 128
    """Images a step."""
    weight_decay: float = 0.0
    """Weight of half the squared norms of the kernels."""
    batch_norm: str = "evaluation"
    """Mode of BatchNorm during the attack."""

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a run, by field of `experiments.settings.RunSettings`.

        Args:
            given: what is known of the run; `max_num_training_steps` stretches the schedules.

        Returns:
            The recipe: its rate and drops unless the user gives a rate, its beta with its own pair
            term, the schedule of beta with any.
        """
        epsilon = given["epsilon"]
        steps = given["max_num_training_steps"]
        found: dict[str, Any] = {
            "step_size": self.step * epsilon,
            "start_noise": self.noise * epsilon,
            "training_batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "attack_batch_norm": self.batch_norm,
        }
        kind = given.get("learning_rate_schedule", self.rate_schedule)
        rates = given.get("step_size_schedule")
        if rates is None:
            drops = self.rate_drops if kind == "steps" else ()
            falls = _pairs(drops, 1.0 / self.rate_factor, steps)
            found["step_size_schedule"] = tuple((step, self.rate * f) for step, f in falls)
        # One rate is the peak of the recipe's schedule.
        found["learning_rate_schedule"] = kind if rates is None or len(rates) == 1 else "steps"
        reg, centre = given.get("reg", "none"), given.get("centre", "zero")
        if reg == self.reg != "none":
            found["beta"] = self.beta
        if wants_clean_logits(reg, centre):
            found["beta_ramp_steps"] = round(self.beta_ramp * steps)
            found["beta_schedule"] = _pairs(self.beta_drops, self.beta_factor, steps)
        return found


def _pairs(drops, factor, steps):
    """(first step, product of factors) from step 0 on; of drops in one step the last one."""
    pairs = {0: 1.0}
    for number, share in enumerate(drops, start=1):
        pairs[int(share * steps)] = factor**number
    return tuple(sorted(pairs.items()))
