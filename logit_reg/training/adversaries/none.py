"""No adversary: the images as they are."""

import dataclasses

from logit_reg.training.adversaries.protocol import Adversary


@dataclasses.dataclass(frozen=True)
class NoAdversary(Adversary):
    """Training on the images themselves."""

    threat: None = None
    """It moves no pixel."""
