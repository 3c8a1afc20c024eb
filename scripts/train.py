"""Train a logit-regularised network, or a baseline, on real data.

With nothing else, `--reg=squeeze --beta=2` trains on MNIST if --data_dir, $TFDS_DATA_DIR or
~/tensorflow_datasets has it, else on 5,000 embedded digits, for 1,000 steps. What is not given
takes the paper's settings where it states them, then the challenge's. All values are in pixel
units: [0, 1] for MNIST, [0, 255] for CIFAR.

Stop it with Ctrl-C or kill it; the same command goes on where it was.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from logit_reg_scripts import command_line
from logit_reg_scripts.command_line import FLAGS

flags.DEFINE_enum(
    "dataset",
    None,
    ["mnist_5k", "mnist", "fashion_mnist", "cifar10", "cifar100"],
    "data set; mnist if it is there, else mnist_5k, when not given",
)
flags.DEFINE_string("data_dir", None, "folder of the data: TFDS, IDX files or CIFAR pickles")
flags.DEFINE_string("data_path", None, "the challenges' name for --data_dir")
flags.DEFINE_bool("download", False, "download the data set into --data_dir if it is not there")
flags.DEFINE_string("config", None, "a challenge's config.json: trains as the challenge does")
flags.DEFINE_string("model_dir", None, "folder of the run; runs/<name from settings> if not given")

flags.DEFINE_enum(
    "reg",
    None,
    [
        "none",
        "squeeze",
        "squeeze_example",
        "similarity",
        "clip_xent",
        "clip_xent_batch",
        "pairing",
    ],
    "what regularises the logits: Eq. 5, Eq. 2, Eq. 7, Eq. 6 (two variants) or CLP",
)
flags.DEFINE_float("beta", None, "weight of the penalty")
flags.DEFINE_float("gamma", None, "value that --reg=similarity pulls logits towards (1)")
flags.DEFINE_float("smoothing", None, "lambda of label smoothing, Eq. 8, in [0, 1)")
flags.DEFINE_float("omega", None, "floor of the cross-entropy of --reg=clip_xent* (1.5)")
flags.DEFINE_enum("loss_reduction", None, ["mean", "sum"], "reduction of the cross-entropy (mean)")
flags.DEFINE_float(
    "sigma", None, "stddev of the Gaussian noise, pixel units (.5 MNIST, 20 CIFAR with a reg)"
)
flags.DEFINE_bool("clip_noise", None, "clip noisy images to the pixel range (on)")

flags.DEFINE_enum("adversary", None, ["none", "pgd", "free"], "adversarial training")
flags.DEFINE_float("epsilon", None, "linf budget of the adversary, pixel units (.3 or 8)")
flags.DEFINE_integer("num_steps", None, "steps of --adversary=pgd (7)")
flags.DEFINE_float("step_size", None, "step size of --adversary=pgd, pixel units")
flags.DEFINE_enum("loss_func", None, ["xent", "cw"], "loss of --adversary=pgd (xent)")
flags.DEFINE_bool("random_start", None, "random start of --adversary=pgd (on)")
flags.DEFINE_integer(
    "ramp_steps", None, "steps over which epsilon grows from 0 (a tenth of them on MNIST)"
)
flags.DEFINE_enum(
    "attack_batch_norm",
    None,
    ["evaluation", "training"],
    "mode of BatchNorm while --adversary=pgd attacks (evaluation)",
)
flags.DEFINE_integer("replays", None, "replays of each minibatch with --adversary=free (8)")

flags.DEFINE_integer("width", None, "width of CIFAR's network (10; 1 is narrow)")
flags.DEFINE_integer("max_num_training_steps", None, "number of optimiser steps")
flags.DEFINE_integer("training_batch_size", None, "images a step (128)")
flags.DEFINE_string("step_size_schedule", None, "learning rates, as [[0, 0.1], [40000, 0.01]]")
flags.DEFINE_float("weight_decay", None, "weight decay of kernels (CIFAR 2e-4)")
flags.DEFINE_float("momentum", None, "momentum (CIFAR .9)")
flags.DEFINE_integer("random_seed", None, "seed of weights, data order, noise and attacks (0)")
flags.DEFINE_integer("num_output_steps", None, "steps between rows of log.csv (100)")
flags.DEFINE_integer("num_summary_steps", None, "steps between points of TensorBoard (100)")
flags.DEFINE_integer("num_checkpoint_steps", None, "steps between checkpoints (300 or 1000)")
flags.DEFINE_list("keep_checkpoint_steps", None, "steps whose checkpoints are kept, as 100,200")
flags.DEFINE_string(
    "init_checkpoint", None, "challenge checkpoint (folder or prefix) to go on from"
)
flags.DEFINE_bool("extend", False, "go on with a run to a larger --max_num_training_steps")
flags.DEFINE_bool("progress", True, "draw a progress bar")

# A newcomer's first run ends within minutes.
_BARE_STEPS = 1000


def main() -> None:
    """Train as the flags say."""
    from logit_reg_scripts.attack_flags import apply_config
    from logit_reg_scripts.runs import RunSettings, resolve_settings, train_run
    from logit_reg_scripts.sources import RUNS, choose_dataset, load_split

    config = apply_config()
    data_dir = FLAGS.data_dir or FLAGS.data_path
    dataset = FLAGS.dataset
    if dataset is None and config is not None and config.challenge_name == "cifar10":
        dataset = "cifar10"
    name = choose_dataset(dataset, data_dir)

    names = {field.name for field in dataclasses.fields(RunSettings)} - {"dataset"}
    given = {flag: FLAGS[flag].value for flag in names if flag in FLAGS}
    if dataset is None and config is None and given["max_num_training_steps"] is None:
        given["max_num_training_steps"] = _BARE_STEPS
    given["step_size_schedule"] = _schedule(FLAGS.step_size_schedule)
    given["keep_checkpoint_steps"] = _steps(FLAGS.keep_checkpoint_steps)
    given["init_checkpoint"] = FLAGS.init_checkpoint or _checkpoint_in_model_dir()
    settings = resolve_settings({"dataset": name, **given}, is_challenge_config=config is not None)

    training_set = load_split(name, "train", data_dir, download=FLAGS.download)
    model_dir = Path(FLAGS.model_dir) if FLAGS.model_dir else RUNS / settings.name
    print(f"run:  {settings.description}, {settings.max_num_training_steps} steps -> {model_dir}")
    _warn_of_collapse(settings)
    step = train_run(
        settings,
        training_set.images,
        training_set.labels,
        model_dir,
        data_dir=data_dir and str(Path(data_dir).resolve()),
        extend=FLAGS.extend,
        show_progress=FLAGS.progress,
    )
    if step < settings.max_num_training_steps:
        raise KeyboardInterrupt
    print(f"done: {model_dir / 'model.keras'}; next: python scripts/eval_challenge.py", end="")
    print(f" --model_dir={model_dir}" if FLAGS.model_dir else "")


def _checkpoint_in_model_dir() -> str | None:
    """The challenge's checkpoint that a named --model_dir holds, to go on from."""
    if not FLAGS.model_dir:
        return None
    from logit_reg.files import read_json

    folder = Path(FLAGS.model_dir)
    if (folder / "run.json").exists():
        # The run may have begun that way; the same command has to name the same settings.
        return read_json(folder / "run.json").get("settings", {}).get("init_checkpoint")
    if not any(folder.glob("*.index")):
        return None
    command_line.notice(f"{folder} holds a challenge's checkpoint: training goes on from it.")
    return FLAGS.model_dir


def _warn_of_collapse(settings) -> None:
    from logit_reg.objectives import collapse_threshold

    threshold = collapse_threshold(
        settings.training_batch_size,
        settings.challenge.num_classes,
        reg=settings.reg,
        smoothing=settings.smoothing,
        reduction=settings.loss_reduction,
    )
    if settings.beta >= threshold:
        command_line.notice(
            f"warning: beta {settings.beta:g} is at or above {threshold:.4g}, from which on "
            f"all-zero logits minimise this objective over free logits (batch "
            f"{settings.training_batch_size}, {settings.challenge.num_classes} classes), so "
            f"training may collapse; watch mean_logit_norm and xent in log.csv."
        )


def _schedule(value):
    if not isinstance(value, str):
        return value
    try:
        pairs = json.loads(value)
        return tuple((int(step), float(rate)) for step, rate in pairs)
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise command_line.UsageError(
            f"--step_size_schedule must look like [[0, 0.1], [40000, 0.01]]; got {value!r}."
        ) from error


def _steps(value):
    if value is None:
        return None
    if not all(step.strip().isdigit() for step in value):
        raise command_line.UsageError(
            f"--keep_checkpoint_steps must be whole numbers, as 100,200; got {','.join(value)!r}."
        )
    return tuple(sorted({int(step) for step in value}))


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__)


if __name__ == "__main__":
    run()
