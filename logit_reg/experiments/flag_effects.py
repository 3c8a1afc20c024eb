"""Flags that another choice leaves without effect: they are refused, never ignored.

A table for each command: flags, the condition under which they have an effect, and that condition
in words. Only flags that were given count, with their default value too; a challenge's config.json
may say more than a command uses.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.commands.flag_groups import PGD_FLAGS, THREAT_FLAGS

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Effect:
    """When flags have an effect."""

    flags: tuple[str, ...]
    condition: Callable[[Values], bool]
    """Of the values by flag; None stands for what is not given or not known yet."""
    words: str
    """The condition, as it goes on after "has an effect only"."""


def refuse_without_effect(effects: Collection[Effect], **known: Any) -> None:
    """Refuse a flag on the command line that has no effect.

    Args:
        effects: the table of the command.
        known: what the command has found out meanwhile, such as the data set, by flag.

    Raises:
        UsageError: if there is one, with what it would need.
    """
    values = {name: FLAGS[name].value for name in FLAGS} | known
    check_effects(effects, values, {name for name in FLAGS if FLAGS[name].present})


def check_effects(effects: Collection[Effect], values: Values, given: Collection[str]) -> None:
    """Refuse a setting that has no effect.

    Args:
        effects: a table.
        values: settings by flag; those that are missing are not given.
        given: the flags to judge.

    Raises:
        UsageError: if there is one, with what it would need.
    """
    looked_up = _Values(values)
    for effect in effects:
        for name in effect.flags:
            if name in given and not effect.condition(looked_up):
                raise UsageError(f"--{name} has an effect only {effect.words}.")


class _Values(dict):
    """A flag that a command does not have is one that is not given."""

    def __missing__(self, name: str) -> None:
        return None


def _adversary(values: Values) -> str:
    # A challenge's config.json trains as the challenge does.
    return values["adversary"] or ("pgd" if values["config"] else "none")


def _has_noise(values: Values) -> bool:
    if values["sigma"] is not None:
        return values["sigma"] > 0
    # The paper's noise comes with its regularisers.
    return (values["reg"] or "none") != "none" or bool(values["smoothing"])


def _is_cifar(values: Values) -> bool:
    return values["dataset"] is None or values["dataset"].startswith("cifar")


def _is_own(values: Values) -> bool:
    return bool(values["model"] or values["data"])


def _has_workers(values: Values) -> bool:
    return values["num_workers"] > 1 or values["worker"]


_FILE = "with a data set that is a file: mnist_5k is embedded (--dataset=mnist is the full set)"
_DATA = (
    Effect(("download",), lambda v: v["dataset"] != "mnist_5k", _FILE),
    Effect(
        ("data_dir", "data_path"),
        # Without --dataset it was looked through.
        lambda v: v["dataset"] != "mnist_5k" or v["stands_in"],
        _FILE,
    ),
)

_DATA_PATH = Effect(
    ("data_path",), lambda v: not v["data_dir"], "without --data_dir, which it stands for"
)

_CONFIDENCE = Effect(("confidence",), lambda v: v["loss_func"] == "cw", "with --loss_func=cw")

_OWN = (
    Effect(
        ("model_dir", "dataset", "data_dir", "data_path", "download"),
        lambda v: not _is_own(v),
        "without --model and --data, a network and images of your own",
    ),
    Effect(("bounds",), _is_own, "with --model and --data, a network and images of your own"),
)

TRAINING = (
    *_DATA,
    _DATA_PATH,
    Effect(
        ("beta",),
        lambda v: v["reg"] in ("squeeze", "squeeze_example", "similarity", "pairing"),
        "with a penalty to weigh: --reg=squeeze, squeeze_example, similarity or pairing",
    ),
    Effect(("gamma",), lambda v: v["reg"] == "similarity", "with --reg=similarity"),
    Effect(
        ("omega",),
        lambda v: v["reg"] in ("clip_xent", "clip_xent_batch"),
        "with --reg=clip_xent or clip_xent_batch",
    ),
    Effect(("clip_noise",), _has_noise, "with noise: --sigma above 0"),
    Effect(
        ("epsilon", "ramp_steps"),
        lambda v: _adversary(v) != "none",
        "with --adversary=pgd or --adversary=free",
    ),
    Effect(
        ("num_steps", "step_size", "loss_func", "random_start", "attack_batch_norm"),
        lambda v: _adversary(v) == "pgd",
        "with --adversary=pgd",
    ),
    Effect(("replays",), lambda v: _adversary(v) == "free", "with --adversary=free"),
    Effect(("width",), _is_cifar, "on CIFAR; MNIST's network has one size"),
    Effect(("momentum",), _is_cifar, "on CIFAR; MNIST's networks are trained with Adam"),
    Effect(("attack_batch_norm",), _is_cifar, "on CIFAR; MNIST's network has no BatchNorm"),
)

ATTACK = (*_DATA, _DATA_PATH, _CONFIDENCE)

EVALUATION = (
    *_OWN,
    *_DATA,
    _DATA_PATH,
    Effect(
        ("attack_file",), lambda v: not _is_own(v), "on a challenge, without --model and --data"
    ),
    Effect(("pred_path",), lambda v: bool(v["attack_file"]), "with --attack_file"),
    Effect(
        (
            "protocol",
            "norm",
            *PGD_FLAGS,
            "num_eval_examples",
            "random_seed",
            "worst_case_only",
            "attack_dtype",
            "store_adv_path",
            "output_dir",
            "num_workers",
            "runner",
        ),
        lambda v: not v["attack_file"],
        "without --attack_file, which is scored as it is",
    ),
    Effect(PGD_FLAGS, lambda v: not v["protocol"], "without --protocol: a protocol is frozen"),
    _CONFIDENCE,
    Effect(
        ("worst_case_only",),
        lambda v: v["num_attacks"] is None or v["num_attacks"] > 1,
        "with several attacks, as those of --protocol=paper-mnist",
    ),
    Effect(("runner",), _has_workers, "with --num_workers above 1"),
    Effect(
        ("num_cpus", "num_gpus"),
        lambda v: v["runner"] == "ray" and _has_workers(v),
        "with --num_workers above 1 and --runner=ray",
    ),
)

AUDIT = (
    *_OWN,
    *_DATA,
    _CONFIDENCE,
    Effect(
        ("controls", "control_steps"),
        lambda v: v["budget"] != "quick",
        "with --budget=standard or --budget=full",
    ),
    Effect(
        ("control_steps",),
        lambda v: not _is_own(v) and "none" not in v["controls"],
        "where controls are trained: on a challenge and without --controls=none",
    ),
)

LANDSCAPE = (
    *_DATA,
    Effect(
        (
            "model_dir",
            "dataset",
            "data_dir",
            "download",
            "num_eval_examples",
            "examples",
            "random_seed",
            "direction",
            *THREAT_FLAGS,
            "num_steps",
            "step_size",
            "extent",
            "num_points",
            "clip",
            "curves",
            "eval_batch_size",
        ),
        lambda v: not v["redraw"],
        "without --redraw, which computes nothing",
    ),
    Effect(
        ("num_steps", "step_size"),
        lambda v: v["direction"] == "pgd",
        "with --direction=pgd; FGSM takes one step",
    ),
)

REPORT = (
    Effect(
        ("page", "export", "readme", "against", "figure", "stamp"),
        lambda v: not (v["compare"] or v["leaderboard"]),
        "with --runs",
    ),
    Effect(("title",), lambda v: bool(v["page"]), "with --page"),
    Effect(("section",), lambda v: bool(v["readme"]), "with --readme"),
    Effect(("checkpoints",), lambda v: bool(v["leaderboard"]), "with --leaderboard"),
)

# Beside those of train.py, which are judged for each run of the grids.
SWEEP = (
    Effect(("num_parallel",), lambda v: v["runner"] == "local", "with --runner=local"),
    Effect(("num_cpus", "num_gpus"), lambda v: v["runner"] == "ray", "with --runner=ray"),
    Effect(("evaluation_grid",), lambda v: bool(v["evaluate"]), "with --evaluate, which it varies"),
)
