"""Settings that another choice leaves without effect: they are refused, never ignored.

A table holds settings, the condition under which they have an effect, and that condition in words.
Only what was given counts, with its default value too.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from logit_reg import regularizers
from logit_reg.messages import UsageError
from logit_reg.training import adversaries
from madry_compat.challenges import IMAGE_SETS, Challenge, challenge_for

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Effect:
    """When settings have an effect."""

    flags: tuple[str, ...]
    condition: Callable[[Values], bool]
    """Of the values by name; None stands for what is not given or not known yet."""
    words: str
    """The condition, as it goes on after "has an effect only"."""


def check_effects(effects: Collection[Effect], values: Values, given: Collection[str]) -> None:
    """Refuse a setting that has no effect.

    Args:
        effects: a table.
        values: settings by name; those that are missing are not given.
        given: the settings to judge.

    Raises:
        UsageError: if there is one, with what it would need.
    """
    looked_up = _Values(values)
    for effect in effects:
        for name in effect.flags:
            if name in given and not effect.condition(looked_up):
                raise UsageError(f"--{name} has an effect only {effect.words}.")


class _Values(dict):
    """A setting that a command does not have is one that is not given."""

    def __missing__(self, name: str) -> None:
        return None


def on_challenges(
    flags: tuple[str, ...], condition: Callable[[Challenge], bool], why: str
) -> Effect:
    """Settings that have an effect on some data sets only.

    Args:
        flags: the settings.
        condition: whether they have one under a challenge.
        why: what the data sets have in common, as it follows their names.
    """
    names = [record.name for record in IMAGE_SETS.values() if condition(record.challenge)]
    return Effect(
        flags,
        lambda v: v["dataset"] is None or condition(challenge_for(v["dataset"])),
        f"on {' and '.join(names)}, {why}",
    )


def _adversary(values: Values) -> str:
    # A challenge's config.json trains as the challenge does.
    return values["adversary"] or (adversaries.OF_CHALLENGES if values["config"] else "none")


def _reg(values: Values) -> str:
    return values["reg"] or adversaries.reg_of(_adversary(values))


def _with_a_regularizer(*settings: str, where: str) -> Effect:
    """Settings of the objective have an effect with those regularisers that take one of them."""
    names = regularizers.taking(where)
    return Effect(settings, lambda v: _reg(v) in names, f"with --reg={' or '.join(names)}")


def _with_an_adversary(flag: str) -> Effect:
    """A setting of the adversary has an effect with those adversaries that read it."""
    words = " or ".join(f"--adversary={name}" for name in adversaries.taking(flag))
    return Effect((flag,), lambda v: _adversary(v) in adversaries.taking(flag), f"with {words}")


def _has_noise(values: Values) -> bool:
    if values["sigma"] is not None:
        return values["sigma"] > 0
    # The paper's noise comes with its regularisers.
    return adversaries.comes_with_noise(
        _adversary(values), _reg(values), values["centre"] or "zero", values["smoothing"] or 0.0
    )


def _is_watched(values: Values) -> bool:
    steps = values["num_robustness_steps"]
    return _adversary(values) != "none" if steps is None else steps > 0


_EMBEDDED = [record for record in IMAGE_SETS.values() if record.format == "embedded"]

_EMBEDDED_NAMES = [record.name for record in _EMBEDDED]
_FILE = "with a data set that is a file: " + ", ".join(
    f"{record.name} is embedded (--dataset={record.taken_from} is the full set)"
    for record in _EMBEDDED
)

DATA = (
    Effect(("download",), lambda v: v["dataset"] not in _EMBEDDED_NAMES, _FILE),
    Effect(
        ("data_dir", "data_path"),
        # Without --dataset it was looked through.
        lambda v: v["dataset"] not in _EMBEDDED_NAMES or v["stands_in"],
        _FILE,
    ),
)

DATA_PATH = Effect(
    ("data_path",), lambda v: not v["data_dir"], "without --data_dir, which it stands for"
)

TRAINING = (
    *DATA,
    DATA_PATH,
    *(_with_a_regularizer(setting, where=setting) for setting in regularizers.SETTINGS),
    _with_a_regularizer("beta_schedule", "beta_ramp_steps", where="beta"),
    Effect(("clip_noise",), _has_noise, "with noise: --sigma above 0"),
    Effect(("ema_momentum",), lambda v: bool(v["ema"]), "with --ema"),
    Effect(
        ("stop_on_overfitting",),
        _is_watched,
        "where robustness is watched: with an adversary or --num_robustness_steps above 0",
    ),
    *map(_with_an_adversary, adversaries.FLAGS),
    on_challenges(
        ("width",), lambda c: c.paper.width > 0, "whose network has one; the others' has one size"
    ),
    on_challenges(
        ("momentum",),
        lambda c: c.training.optimizer == "momentum",
        "whose networks are trained with it; the others' with Adam",
    ),
    # The network that comes in widths is the one with BatchNorm.
    on_challenges(
        ("attack_batch_norm",),
        lambda c: c.paper.width > 0,
        "whose network has BatchNorm; the others' has none",
    ),
)
