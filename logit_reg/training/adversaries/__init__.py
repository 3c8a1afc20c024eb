"""The adversaries of training by name. Importing this starts no TensorFlow; their files do.

A new one is a file beside this one, with a class that fulfils `protocol.Adversary`, and its line
in `ADVERSARIES`.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from logit_reg.regularizers import wants_clean_logits

if TYPE_CHECKING:
    from logit_reg.training.adversaries.protocol import Adversary

_STEPS = ("epsilon", "num_steps", "step_size", "loss_func", "random_start", "ramp_steps")
_SINGLE_STEP = ("epsilon", "step_size", "start_noise", "ramp_steps", "attack_batch_norm")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an adversary is, and which settings of a run it reads."""

    place: str
    """Module of this package and class in it, as "pgd.PGDAdversary"."""
    flags: tuple[str, ...] = ()
    """Settings of a run that have an effect with it: flags of train.py, fields of its settings."""
    reg: str = "none"
    """The regulariser that comes with it, unless another is chosen."""
    has_recipe: bool = False
    """Whether its authors' whole training comes with it."""

    def load(self) -> "type[Adversary]":
        """Import the class."""
        module, _, name = self.place.rpartition(".")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


ADVERSARIES: Mapping[str, Entry] = {
    "none": Entry("none.NoAdversary"),
    "pgd": Entry("pgd.PGDAdversary", (*_STEPS, "attack_batch_norm")),
    "free": Entry("free.FreeAdversary", ("epsilon", "ramp_steps", "replays", "free_gradient")),
    "fgsm_rs": Entry("fgsm_rs.FGSMRSAdversary", _SINGLE_STEP, has_recipe=True),
    "n_fgsm": Entry("n_fgsm.NFGSMAdversary", _SINGLE_STEP, has_recipe=True),
    "gat": Entry("gat.GATAdversary", _SINGLE_STEP, has_recipe=True, reg="gat"),
    "nuat": Entry("nuat.NuATAdversary", _SINGLE_STEP, has_recipe=True, reg="nuat"),
    "trades": Entry(
        "trades.TRADESAdversary", ("num_steps", *_SINGLE_STEP), has_recipe=True, reg="trades"
    ),
}

FLAGS = tuple(dict.fromkeys(flag for entry in ADVERSARIES.values() for flag in entry.flags))
"""All settings that depend on the adversary."""

OF_CHALLENGES = "pgd"
"""The adversary that both challenges train with."""


def adversary_class(name: str) -> "type[Adversary]":
    """The class of an adversary.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ADVERSARIES:
        raise ValueError(f"adversary must be one of {', '.join(ADVERSARIES)}; got {name!r}.")
    return ADVERSARIES[name].load()


def taking(flag: str) -> tuple[str, ...]:
    """The adversaries with which a flag has an effect."""
    return tuple(name for name, entry in ADVERSARIES.items() if flag in entry.flags)


def comes_with_noise(name: str, reg: str, centre: str, smoothing: float) -> bool:
    """Whether noise comes unasked: beside the paper's regularisers, but not within a recipe."""
    if name in ADVERSARIES and ADVERSARIES[name].has_recipe or wants_clean_logits(reg, centre):
        return False
    return reg != "none" or smoothing > 0


def reg_of(name: str) -> str:
    """The regulariser that an adversary comes with; "none" for an unknown one, too."""
    return ADVERSARIES[name].reg if name in ADVERSARIES else "none"
