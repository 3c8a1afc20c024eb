"""Flags that several commands take: defined once, so that a flag means the same in all of them."""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import existing_path, notice
from madry_compat.challenges import IMAGE_SETS
from madry_compat.config import ChallengeConfig, load_config

DATASETS = tuple(IMAGE_SETS)
# What numpy and Keras take, from 0.
LARGEST_SEED = 2**32 - 1
# Those of `logit_reg.threat`, which starts TensorFlow.
NORMS = ("linf", "l2", "l1")
THREAT_FLAGS = ("norm", "epsilon")
PGD_FLAGS = ("num_steps", "step_size", "random_start", "loss_func", "confidence", "restarts")
ATTACK_FLAGS = (*THREAT_FLAGS, *PGD_FLAGS)


TRIAL_EXAMPLES = 10
"""Most images of an evaluation with --trial."""


def define_model_flag() -> None:
    """The network to look at."""
    flags.DEFINE_string(
        "model_dir",
        None,
        "a run, a .keras file, or folder or prefix of a TF1 checkpoint; newest run",
    )


def define_data_flags(dataset: str = "data set; the run's own if not given") -> None:
    """Where the data are.

    Args:
        dataset: what `--help` says of --dataset.
    """
    flags.DEFINE_enum("dataset", None, DATASETS, dataset)
    flags.DEFINE_string("data_dir", None, "folder of the data: TFDS, IDX files or CIFAR pickles")
    flags.DEFINE_bool("download", False, "download the data set into --data_dir if it is not there")


def define_challenge_flags() -> None:
    """What the challenges' own commands read."""
    flags.DEFINE_string("data_path", None, "the challenges' name for --data_dir")
    flags.DEFINE_string("config", None, "a challenge's config.json")


def define_own_model_flags() -> None:
    """A network and images of the user's; `own_models` reads them."""
    flags.DEFINE_string(
        "model", None, "a .keras file of your own, with --data, --bounds, --epsilon"
    )
    flags.DEFINE_string("data", None, "an .npz file of your own, with arrays images and labels")
    flags.DEFINE_list("bounds", None, "lowest and highest pixel value of --data, as 0,1")


def define_example_flags() -> None:
    """How many test images, and how many at once."""
    flags.DEFINE_integer("num_eval_examples", None, "how many test images, from the first (all)")
    flags.DEFINE_integer("eval_batch_size", None, "images at once (200 or 100)", lower_bound=1)
    flags.DEFINE_integer(
        "random_seed", 0, "seed of the attacks", lower_bound=0, upper_bound=LARGEST_SEED
    )


def define_attack_dtype_flag() -> None:
    """What attacks compute directions in."""
    flags.DEFINE_enum(
        "attack_dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "what attacks follow; float32 decides in any case (auto: bfloat16 where the processor has "
        "it and the network bears it)",
    )


def define_attack_flags(whose: str = "") -> None:
    """Threat model and settings of PGD; `attack_flags` reads them.

    Args:
        whose: said before what each setting of PGD is.
    """
    flags.DEFINE_enum("norm", None, NORMS, "norm of the budget (linf)")
    flags.DEFINE_float(
        "epsilon", None, "budget, pixel units (.3 or 8; l2 2 or 382.5; l1 10 or 3060)"
    )
    flags.DEFINE_integer("num_steps", None, f"{whose}steps of PGD (40 or 20)")
    flags.DEFINE_float("step_size", None, f"{whose}step size, pixel units (.01 or 1)")
    flags.DEFINE_bool("random_start", None, f"{whose}random start (on)")
    flags.DEFINE_enum("loss_func", None, ["xent", "cw"], f"{whose}loss (xent)")
    flags.DEFINE_float("confidence", None, f"{whose}confidence of --loss_func=cw (50)")
    flags.DEFINE_integer("restarts", None, f"{whose}number of random starts (1)")


def apply_config(*, without: tuple[str, ...] = ()) -> ChallengeConfig | None:
    """Set flags from --config, except those given on the command line.

    Args:
        without: keys that have no say in this command.

    Returns:
        What the file says, or None without --config.
    """
    if not FLAGS.config:
        return None
    config = load_config(existing_path("config", FLAGS.config))
    if config.unknown:
        notice(f"config: keys without meaning here: {', '.join(config.unknown)}")
    # Only the command line decides which files are written.
    ignored = {*without, "store_adv_path"}
    values = {key: value for key, value in config.settings.items() if key not in ignored}
    # The challenges' files name a folder of the machine that they were written on.
    if not Path(values.get("data_path", ".")).exists():
        values.pop("data_path")
    command_line.apply_config(values)
    return config
