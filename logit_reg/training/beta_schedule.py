"""How the weight of a penalty changes while a network trains."""

import dataclasses
import itertools
import math
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class BetaSchedule:
    """The share of beta in a step: a ramp times the factor of the step.

    Source:
        NuAT grows its weight from 0 linearly; GAT multiplies it where the learning rate drops.
    """

    factors: tuple[tuple[int, float], ...] = ((0, 1.0),)
    """(first step, factor of beta) pairs, ascending from step 0."""
    ramp_steps: int = 0
    """Training steps over which beta grows from 0 linearly; 0: at once."""

    def __post_init__(self):
        steps = [step for step, _ in self.factors]
        if not steps or steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"beta_schedule must start at step 0 and increase; got steps {steps}.")
        if not all(math.isfinite(factor) and factor >= 0 for _, factor in self.factors):
            raise ValueError(
                f"beta_schedule needs factors of at least 0; got {[f for _, f in self.factors]}."
            )
        if self.ramp_steps < 0:
            raise ValueError(f"beta_ramp_steps must be at least 0; got {self.ramp_steps}.")

    def __call__(self, step: Any) -> Any:
        """() float32 share of beta in a step: () int64, how many were taken before it."""
        steps, factors = zip(*self.factors, strict=True)
        place = tf.searchsorted(tf.constant(steps, tf.int64), step[None], side="right")[0] - 1
        share = tf.gather(tf.constant(factors, tf.float32), place)
        if self.ramp_steps:
            share *= tf.minimum(1.0, tf.cast(step + 1, tf.float32) / self.ramp_steps)
        return share


CONSTANT = BetaSchedule()
"""All of beta in every step."""
