"""Flags that another choice leaves without effect: they are refused, never ignored.

A table for each command, as in `logit_reg.experiments.effects`, which has that of training. A
challenge's config.json may say more than a command uses.
"""

from collections.abc import Collection
from typing import Any

from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import PGD_FLAGS, THREAT_FLAGS
from logit_reg.experiments.effects import DATA, DATA_PATH, Effect, Values, check_effects
from logit_reg.experiments.effects import TRAINING as TRAINING


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


def _is_own(values: Values) -> bool:
    return bool(values["model"] or values["data"])


def _has_workers(values: Values) -> bool:
    return values["num_workers"] > 1 or values["worker"]


_CONFIDENCE = Effect(("confidence",), lambda v: v["loss_func"] == "cw", "with --loss_func=cw")

_OWN = (
    Effect(
        ("model_dir", "dataset", "data_dir", "data_path", "download"),
        lambda v: not _is_own(v),
        "without --model and --data, a network and images of your own",
    ),
    Effect(("bounds",), _is_own, "with --model and --data, a network and images of your own"),
)

ATTACK = (*DATA, DATA_PATH, _CONFIDENCE)

EVALUATION = (
    Effect(
        (
            *("model_dir", "model", "bounds", "config", "dataset", "data", "data_dir", "data_path"),
            *("download", "protocol", "trial", "attack_file", "pred_path", "num_eval_examples"),
            *("first_eval_example", "eval_batch_size", "random_seed", "worst_case_only"),
            *(
                "attack_dtype",
                "eot",
                *THREAT_FLAGS,
                *PGD_FLAGS,
                "num_workers",
                "runner",
                "num_cpus",
            ),
            *("num_gpus", "worker", "progress"),
        ),
        lambda v: not v["merge"],
        "without --merge, which joins what was evaluated",
    ),
    Effect(
        ("store_adv_path",),
        lambda v: not v["merge"],
        "without --merge: ledgers hold no images; np.concatenate joins the .npy files of slices",
    ),
    *_OWN,
    *DATA,
    DATA_PATH,
    Effect(
        ("attack_file",), lambda v: not _is_own(v), "on a challenge, without --model and --data"
    ),
    Effect(("pred_path",), lambda v: bool(v["attack_file"]), "with --attack_file"),
    Effect(
        (
            "protocol",
            "trial",
            "norm",
            *PGD_FLAGS,
            "num_eval_examples",
            "first_eval_example",
            "random_seed",
            "worst_case_only",
            "attack_dtype",
            "eot",
            "store_adv_path",
            "output_dir",
            "num_workers",
            "runner",
            "worker",
            "progress",
        ),
        lambda v: not v["attack_file"],
        "without --attack_file, which is scored as it is",
    ),
    Effect(PGD_FLAGS, lambda v: not v["protocol"], "without --protocol: a protocol is frozen"),
    _CONFIDENCE,
    Effect(
        ("eot",),
        lambda v: "autoattack-rand" not in (v["protocol"] or ()),
        "with other protocols: autoattack-rand averages over 20 passes itself",
    ),
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
    *DATA,
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
    *DATA,
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
        ("page", "export", "against", "figure", "stamp"),
        lambda v: not (v["compare"] or v["audits"] or v["leaderboard"]),
        "with --runs",
    ),
    Effect(
        ("readme",), lambda v: not (v["compare"] or v["leaderboard"]), "with --runs or --audits"
    ),
    Effect(("title",), lambda v: bool(v["page"]), "with --page"),
    Effect(("section",), lambda v: bool(v["readme"]), "with --readme"),
    Effect(("checkpoints",), lambda v: bool(v["leaderboard"]), "with --leaderboard"),
)

EXPORT = (
    Effect(
        ("slots", "step", "zip", "evaluations", "link"),
        lambda v: v["to"] == "challenge",
        "with --to=challenge",
    ),
)

# Beside those of train.py, which are judged for each run of the grids.
SWEEP = (
    Effect(("num_parallel",), lambda v: v["runner"] == "local", "with --runner=local"),
    Effect(("num_cpus", "num_gpus"), lambda v: v["runner"] == "ray", "with --runner=ray"),
    Effect(("evaluation_grid",), lambda v: bool(v["evaluate"]), "with --evaluate, which it varies"),
)
