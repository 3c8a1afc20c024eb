"""Train a logit-regularised network, or a baseline, on real data.

With nothing else, `--reg=squeeze --beta=2` trains on MNIST if --data_dir, $TFDS_DATA_DIR or
~/tensorflow_datasets has it, else on 5,000 embedded digits, for 1,000 steps. What is not given
takes the paper's settings where it states them, then the challenge's. All values are in pixel
units: [0, 1] for MNIST, [0, 255] for CIFAR.

Stop it with Ctrl-C or kill it; the same command goes on where it was.

Several machines: the same command on each, with --strategy=multi_worker and $TF_CONFIG. Workers
that die are started again; the first one, the chief, writes the run's folder.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_effects
from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import DATASETS, LARGEST_SEED, apply_config
from logit_reg.messages import UsageError, notice
from logit_reg.regularizers import CENTRES, MATRIX_NORMS, REGULARIZERS
from logit_reg.regularizers import taking as regs_taking
from logit_reg.training import supervisor
from logit_reg.training.adversaries import ADVERSARIES, taking
from madry_compat.config import load_config


def _with(flag: str) -> str:
    return f"--adversary={'|'.join(taking(flag))}"


flags.DEFINE_enum(
    "dataset",
    None,
    DATASETS,
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
    list(REGULARIZERS),
    "what regularises the logits: Eq. 5, Eq. 2, Eq. 7, Eq. 6 (two variants), CLP, or the pair term "
    "of NuAT, GAT, TRADES or ALP with an --adversary (which may bring its own)",
)
flags.DEFINE_float("beta", None, "weight of the penalty")
flags.DEFINE_string("beta_schedule", None, "factors of beta, as [[0, 1], [40000, 3]]")
flags.DEFINE_integer("beta_ramp_steps", None, "steps over which beta grows from 0 (0)")
flags.DEFINE_enum(
    "matrix_norm",
    None,
    MATRIX_NORMS,
    f"norm of the batch's logits with --reg={' or '.join(regs_taking('matrix_norm'))} (frobenius)",
)
flags.DEFINE_enum(
    "centre",
    None,
    CENTRES,
    "what --reg=squeeze pulls the logits towards: zero, or with an --adversary the clean logits",
)
flags.DEFINE_float("gamma", None, "value that --reg=similarity pulls logits towards (1)")
flags.DEFINE_float("smoothing", None, "lambda of label smoothing, Eq. 8, in [0, 1)")
flags.DEFINE_float("omega", None, "floor of the cross-entropy of --reg=clip_xent* (1.5)")
flags.DEFINE_enum("loss_reduction", None, ["mean", "sum"], "reduction of the cross-entropy (mean)")
flags.DEFINE_float(
    "sigma", None, "standard deviation of the noise, pixel units (0.5 MNIST, 20 CIFAR with a reg)"
)
flags.DEFINE_bool("clip_noise", None, "clip noisy images to the pixel range (on)")

flags.DEFINE_enum("adversary", None, list(ADVERSARIES), "adversarial training")
flags.DEFINE_float("epsilon", None, "linf budget of the adversary, pixel units (0.3 or 8)")
flags.DEFINE_integer("num_steps", None, f"steps of {_with('num_steps')} (7 with pgd)")
flags.DEFINE_float("step_size", None, f"step size of {_with('step_size')}, pixel units")
flags.DEFINE_float(
    "start_noise", None, f"size of the random start of {_with('start_noise')}, pixel units"
)
flags.DEFINE_enum("loss_func", None, ["xent", "cw"], f"loss of {_with('loss_func')} (xent)")
flags.DEFINE_bool("random_start", None, f"random start of {_with('random_start')} (on)")
flags.DEFINE_integer(
    "ramp_steps", None, "steps over which epsilon grows from 0 (a tenth of them on MNIST)"
)
flags.DEFINE_enum(
    "attack_batch_norm",
    None,
    ["evaluation", "training"],
    f"mode of BatchNorm while {_with('attack_batch_norm')} attacks (evaluation)",
)
flags.DEFINE_integer("replays", None, f"replays of each minibatch with {_with('replays')} (8)")
flags.DEFINE_enum(
    "free_gradient",
    None,
    ["perturbation", "image"],
    "what free training moves along: the gradient with respect to the perturbation, as published "
    "(0 where the image leaves the pixel range), or to the clipped image (perturbation; image on "
    "MNIST)",
)

flags.DEFINE_integer("width", None, "width of CIFAR's network (10; 1 is narrow)")
flags.DEFINE_integer("max_num_training_steps", None, "number of optimiser steps")
flags.DEFINE_integer("training_batch_size", None, "images a step (128, or the adversary's recipe)")
flags.DEFINE_string("step_size_schedule", None, "learning rates, as [[0, 0.1], [40000, 0.01]]")
flags.DEFINE_enum(
    "learning_rate_schedule",
    None,
    ["steps", "cosine", "cyclic"],
    "the steps of --step_size_schedule, or its one rate as the peak of a rate that ends at 0: "
    "cosine falls from it, cyclic rises to it over 2/5 of them and falls (steps)",
)
flags.DEFINE_float("weight_decay", None, "weight decay of kernels (CIFAR 2e-4)")
flags.DEFINE_float("momentum", None, "momentum (CIFAR 0.9)")
flags.DEFINE_bool("ema", None, "evaluate and export moving averages of the weights (off)")
flags.DEFINE_float("ema_momentum", None, "momentum of these averages (0.999)")
flags.DEFINE_integer(
    "random_seed",
    None,
    "seed of weights, data order, noise and attacks (0)",
    lower_bound=0,
    upper_bound=LARGEST_SEED,
)
flags.DEFINE_integer("num_output_steps", None, "steps between rows of log.csv (100)")
flags.DEFINE_integer("num_summary_steps", None, "steps between points of TensorBoard (100)")
flags.DEFINE_integer("num_checkpoint_steps", None, "steps between checkpoints (300 or 1000)")
flags.DEFINE_integer(
    "num_robustness_steps",
    None,
    "steps between rows of robustness.csv, PGD on 200 training images; 0 for none (100 to 500 with "
    "an adversary)",
    lower_bound=0,
)
flags.DEFINE_bool(
    "stop_on_overfitting",
    None,
    "end where robustness falls to nothing; the checkpoint of its best is what is left (off)",
)
flags.DEFINE_list("keep_checkpoint_steps", None, "steps whose checkpoints are kept, as 100,200")
flags.DEFINE_integer("max_to_keep", None, "checkpoints that stay besides those to keep (3)")
flags.DEFINE_string(
    "init_checkpoint", None, "challenge checkpoint (folder or prefix) to go on from"
)
flags.DEFINE_bool("extend", False, "go on with a run to a larger --max_num_training_steps")
flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "multi_worker"],
    "one device, all GPUs of this machine, or the workers of $TF_CONFIG; BatchNorm normalises "
    "each replica's part of the batch by itself",
)
flags.DEFINE_enum(
    "train_dtype",
    None,
    ["float32", "float64", "bfloat16"],
    "precision of training (float32); bfloat16 keeps weights, logits, penalty and loss in float32, "
    "and pays on processors that multiply it themselves",
)
flags.DEFINE_bool("deterministic", True, "repeatable bit for bit, for up to 6 % of the time")
flags.DEFINE_bool("progress", True, "draw a progress bar")

# What every command sets before it starts TensorFlow; a worker starts it later than the others.
_WORKER_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "KERAS_BACKEND": "tensorflow",
    "TF_ENABLE_ONEDNN_OPTS": "1",
}

# A newcomer's first run ends within minutes.
_BARE_STEPS = 1000


def check_flags() -> None:
    """Refuse flags that have no effect."""
    apply_config()
    if FLAGS.model_dir:
        folder = Path(FLAGS.model_dir)
        command_line.check_output_folder("model_dir", FLAGS.model_dir, folder)
    flag_effects.refuse_without_effect(flag_effects.TRAINING)


def main() -> None:
    """Train as the flags say, under a supervisor if other workers take part."""
    if FLAGS.strategy != "multi_worker":
        _train()
        return
    if not supervisor.is_supervised():
        os.environ.update(_WORKER_ENVIRONMENT | os.environ)
        command = (sys.executable, "-m", "logit_reg.commands.train", *sys.argv[1:])
        raise SystemExit(supervisor.supervise(command))
    supervisor.follow_supervisor()
    # Until training looks after signals itself, one ends the process whatever it waits for.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from logit_reg.training.distribution import WorkerLost

    try:
        _train()
    except WorkerLost as error:
        notice(str(error))
        # Nothing here can still end in an orderly way: TensorFlow would wait for the others.
        os._exit(supervisor.RESTART)


def _train() -> None:
    from logit_reg.experiments.defaults import resolve_settings, stretched_settings
    from logit_reg.experiments.run_notices import tell_of_settings
    from logit_reg.experiments.runs import checkpoint_to_go_on_from, read_run, train_run
    from logit_reg.experiments.settings import RunSettings
    from logit_reg.experiments.sources import RUNS, choose_dataset, load_split
    from logit_reg.training.distribution import Workers, make_strategy
    from madry_compat.challenges import MNIST, challenge_for

    config = load_config(FLAGS.config) if FLAGS.config else None
    data_dir = FLAGS.data_dir or FLAGS.data_path
    dataset = FLAGS.dataset
    named = config.challenge_name if config is not None else None
    name = choose_dataset(dataset, data_dir, challenge_for(named or MNIST.name))
    flag_effects.refuse_without_effect(
        flag_effects.TRAINING, dataset=name, stands_in=dataset is None
    )

    names = {field.name for field in dataclasses.fields(RunSettings)} - {"dataset"}
    given = {flag: FLAGS[flag].value for flag in names if flag in FLAGS}
    if dataset is None and config is None and given["max_num_training_steps"] is None:
        given["max_num_training_steps"] = _BARE_STEPS
    for flag in ("step_size_schedule", "beta_schedule"):
        given[flag] = schedule(FLAGS[flag].value, flag)
    given["keep_checkpoint_steps"] = steps(FLAGS.keep_checkpoint_steps)
    if FLAGS.extend:
        if not FLAGS.model_dir:
            raise UsageError("--extend needs the folder of the run: --model_dir.")
        given |= stretched_settings(read_run(FLAGS.model_dir), given)
    given["init_checkpoint"] = FLAGS.init_checkpoint or checkpoint_to_go_on_from(FLAGS.model_dir)
    settings = resolve_settings({"dataset": name, **given}, is_challenge_config=config is not None)

    # Before anything else that starts TensorFlow.
    strategy = make_strategy(FLAGS.strategy)
    training_set = load_split(name, "train", data_dir, download=FLAGS.download)
    model_dir = Path(FLAGS.model_dir) if FLAGS.model_dir else RUNS / settings.name
    print(f"run:  {settings.description}, {settings.max_num_training_steps} steps -> {model_dir}")
    tell_of_settings(settings)
    outcome = train_run(
        settings,
        training_set.images,
        training_set.labels,
        model_dir,
        data_dir=data_dir and str(Path(data_dir).resolve()),
        extend=FLAGS.extend,
        strategy=strategy,
        deterministic=FLAGS.deterministic,
        show_progress=FLAGS.progress and Workers(strategy).is_chief,
    )
    if not outcome.is_finished:
        raise KeyboardInterrupt
    if outcome.stop is not None:
        notice(
            f"stopped: training ended at step {outcome.stop.step:,} of "
            f"{settings.max_num_training_steps:,}, overfitted catastrophically; what is left is "
            f"the checkpoint of step {outcome.stop.result_step:,}. Another training needs another "
            f"--model_dir."
        )
    averaged = f" (weights averaged, momentum {settings.ema_momentum:g})" if settings.ema else ""
    print(f"done: {model_dir / 'model.keras'}{averaged}")
    command_line.print_next("eval_challenge", {"model_dir": model_dir})


def schedule(value, name="step_size_schedule"):
    """The pairs (step, number) that a flag says."""
    if not isinstance(value, str):
        return value
    try:
        pairs = json.loads(value)
        return tuple((int(step), float(rate)) for step, rate in pairs)
    except (json.JSONDecodeError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"--{name} must look like [[0, 1], [40000, 0.1]]; got {value!r}."
        ) from error


def steps(value):
    """The steps that --keep_checkpoint_steps names."""
    if value is None:
        return None
    if not all(step.strip().isdigit() for step in value):
        raise UsageError(
            f"--keep_checkpoint_steps must be whole numbers, as 100,200; got {','.join(value)!r}."
        )
    return tuple(sorted({int(step) for step in value}))


def run() -> None:
    """Entry point."""
    # A worker's strategy has to come before TensorFlow starts, its supervisor needs none.
    is_worker = any("multi_worker" in argument for argument in sys.argv)
    command_line.run(main, __doc__, check_flags=check_flags, needs_tensorflow=not is_worker)


if __name__ == "__main__":
    run()
