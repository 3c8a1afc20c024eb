"""A training run: its settings with all defaults resolved, its name, its parts, its folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import reprlib
import subprocess
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import keras
import numpy as np
import tensorflow as tf

import logit_reg
from logit_reg.attacks import PGD
from logit_reg.attacks.engine.low_precision import bfloat16_copy
from logit_reg.experiments import flag_effects
from logit_reg.files import atomic_path, read_json
from logit_reg.objectives import Objective
from logit_reg.threat import ThreatModel
from logit_reg.training.distribution import Workers
from logit_reg.training.loop import LoopSettings, run_folder, train
from logit_reg.training.model import FREE_GRADIENT, FreeAdversary, PGDAdversary, RegularizedModel
from logit_reg.training.state import saved_steps
from madry_compat.challenges import Challenge, challenge_for, image_set
from madry_compat.config import write_config
from madry_compat.networks import build
from madry_compat.optimizers import ADAM_EPSILON, TF1Adam, TF1Momentum, piecewise_constant
from madry_compat.tf1_checkpoints import (
    has_training_state,
    load_network,
    load_training_state,
    save_network,
)

ADVERSARIES = ("none", "pgd", "free")
_STEP_COMMENT = "training step "
TRAIN_DTYPES = ("float32", "float64", "bfloat16")

_PAPER_BATCH_SIZE = 128
_DEMO_STEPS = 1000
_FREE_REPLAYS = 8
# Whole numbers that a run can hold; a file may have any.
_INTEGERS = range(-(2**63), 2**63)
# The attack of "7-step adversarial training"; on MNIST with a ramp, see `RunSettings.ramp_steps`.
_ADVERSARIAL_STEPS = 7
# Settings of later versions; where they have their defaults, runs keep the names they had before.
_LATER_SETTINGS = ("train_dtype", "max_to_keep")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a training run computes, in pixel units."""

    dataset: str
    reg: str = "none"
    beta: float = 0.0
    gamma: float = 0.0
    smoothing: float = 0.0
    omega: float = 0.0
    loss_reduction: str = "mean"
    sigma: float = 0.0
    clip_noise: bool = True
    adversary: str = "none"
    epsilon: float = 0.3
    num_steps: int = 0
    step_size: float = 0.0
    loss_func: str = "xent"
    random_start: bool = True
    ramp_steps: int = 0
    attack_batch_norm: str = "evaluation"
    replays: int = 1
    width: int = 0
    max_num_training_steps: int = _DEMO_STEPS
    training_batch_size: int = _PAPER_BATCH_SIZE
    step_size_schedule: tuple[tuple[int, float], ...] = ((0, 1e-4),)
    weight_decay: float = 0.0
    momentum: float = 0.0
    augment: bool = False
    first_example: int = 0
    init_checkpoint: str = ""
    random_seed: int = 0
    num_output_steps: int = 100
    num_summary_steps: int = 100
    num_checkpoint_steps: int = 300
    keep_checkpoint_steps: tuple[int, ...] = ()
    train_dtype: str = "float32"
    max_to_keep: int = 3

    @property
    def challenge(self) -> Challenge:
        """The challenge whose images and threat model the data set takes."""
        return challenge_for(self.dataset)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            reg=self.reg,
            beta=self.beta,
            gamma=self.gamma,
            smoothing=self.smoothing,
            omega=self.omega,
            reduction=self.loss_reduction,
        )

    @property
    def threat(self) -> ThreatModel:
        """The threat model of the adversary in training."""
        return ThreatModel("linf", self.epsilon, self.challenge.lower, self.challenge.upper)

    @property
    def loop(self) -> LoopSettings:
        """Settings of the training loop."""
        names = {field.name for field in dataclasses.fields(LoopSettings)}
        return LoopSettings(**{k: v for k, v in dataclasses.asdict(self).items() if k in names})

    @property
    def description(self) -> str:
        """The method in a few words, such as "squeeze beta=2, noise"."""
        words = []
        if self.reg != "none":
            words.append(self.reg)
        for name in ("beta", "gamma", "omega"):
            if getattr(self, name) and not (name == "gamma" and self.gamma == 1.0):
                words.append(f"{name}={getattr(self, name):g}")
        if self.smoothing:
            words.append(f"label smoothing {self.smoothing:g}")
        if self.adversary == "pgd":
            words.append(f"{self.num_steps}-step adversarial")
        if self.adversary == "free":
            words.append(f"free-{self.replays} adversarial")
        if self.sigma:
            words.append("+ noise" if words else "noise only")
        return " ".join(words) or "natural"

    @property
    def name(self) -> str:
        """Name of the run's folder, derived from the settings."""
        words = [self.dataset, *self.description.replace("+ ", "").replace("=", "").split()]
        settings = dataclasses.asdict(self)
        # --extend raises the number of steps of the same run.
        settings.pop("max_num_training_steps")
        for name in _LATER_SETTINGS:
            if settings[name] == _DEFAULTS[name]:
                settings.pop(name)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if self.width:
            words.append(f"width{self.width}")
        if self.sigma:
            words.append(f"sigma{self.sigma:g}")
        words += [f"{self.max_num_training_steps}steps", f"seed{self.random_seed}", digest[:6]]
        return "-".join(words)


_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(RunSettings)
    if field.default is not dataclasses.MISSING
}


def resolve_settings(given: dict[str, Any], *, is_challenge_config: bool = False) -> RunSettings:
    """Fill in what was not given: the paper's settings, then the data set's challenge defaults.

    Args:
        given: fields of `RunSettings`; "dataset" is required.
        is_challenge_config: the rest comes from a challenge's config.json, so that everything
            not given is the challenge's own training: its adversary, batch size and loss.

    Returns:
        Settings without holes.

    Raises:
        ValueError: if settings contradict each other or are out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    challenge = challenge_for(given["dataset"])
    training, paper = challenge.training, challenge.paper
    reg = given.get("reg", "none")
    adversary = given.get("adversary", "pgd" if is_challenge_config else "none")
    is_regularized = reg != "none" or given.get("smoothing", 0.0) > 0

    defaults: dict[str, Any] = {
        "width": paper.width,
        "epsilon": challenge.epsilon,
        "weight_decay": training.weight_decay,
        "momentum": training.momentum,
        "augment": training.augmentation,
        "num_output_steps": training.num_output_steps,
        "num_summary_steps": training.num_summary_steps,
        "num_checkpoint_steps": training.num_checkpoint_steps,
        "max_num_training_steps": training.max_num_training_steps,
        "step_size_schedule": training.step_size_schedule,
        "adversary": adversary,
    }
    if is_challenge_config:
        defaults |= {
            "training_batch_size": training.training_batch_size,
            "loss_reduction": training.reduction,
            "first_example": image_set(given["dataset"]).validation_examples,
            "attack_batch_norm": "training",
        }
    else:
        defaults["training_batch_size"] = _PAPER_BATCH_SIZE
        if is_regularized and adversary == "none":
            defaults["max_num_training_steps"] *= paper.stretch
            defaults["step_size_schedule"] = tuple(
                (step * paper.stretch, rate) for step, rate in training.step_size_schedule
            )
    if is_regularized:
        defaults["sigma"] = paper.noise_stddev
    if reg == "similarity":
        defaults["gamma"] = 1.0
    if reg in ("clip_xent", "clip_xent_batch"):
        defaults["omega"] = 1.5
    if reg == "pairing":
        defaults["beta"] = 0.5
    if reg in ("squeeze", "squeeze_example", "similarity") and "beta" not in given:
        raise ValueError(
            f"--reg={reg} needs --beta, the weight of its penalty (2 is the paper's choice on "
            f"MNIST; `squeeze` collapses from 10.73 on at batch 128)."
        )
    if adversary in ("pgd", "free") and paper.needs_ramp and not is_challenge_config:
        steps = given.get("max_num_training_steps", defaults["max_num_training_steps"])
        defaults["ramp_steps"] = steps // 10
    if adversary == "pgd":
        attack = training.attack
        usual = attack.num_steps if is_challenge_config else _ADVERSARIAL_STEPS
        num_steps = given.get("num_steps", usual)
        defaults |= {
            "num_steps": num_steps,
            "step_size": _adversarial_step_size(challenge, num_steps),
            "loss_func": attack.loss_func,
        }
    elif adversary == "free":
        defaults |= {"replays": _FREE_REPLAYS, "step_size": challenge.epsilon, "num_steps": 1}
    if not is_challenge_config:
        flag_effects.check_effects(flag_effects.TRAINING, given, given)
    settings = RunSettings(**(defaults | given))
    _check_settings(settings)
    return settings


def build_network(settings: RunSettings):
    """The untrained network of a run, initialised from its seed.

    Its weights are float64 or float32; in bfloat16 `build_model` trains a copy.
    """
    keras.utils.set_random_seed(settings.random_seed)
    challenge = settings.challenge
    with _default_dtype("float64" if settings.train_dtype == "float64" else "float32"):
        return build(challenge.network, settings.width, challenge.num_classes)


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """What Keras builds inside has this dtype, its inputs included."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def build_model(settings: RunSettings, network) -> RegularizedModel:
    """A network wrapped and compiled for training.

    Its `network` is this one or, in bfloat16, a copy whose weights, logits and normalisation stay
    in float32, as penalty, loss and optimiser do.
    """
    challenge = settings.challenge
    if settings.train_dtype == "bfloat16":
        network = bfloat16_copy(network, for_training=True)
    adversary: PGDAdversary | FreeAdversary | None = None
    if settings.adversary == "pgd":
        attack = PGD(
            settings.threat,
            settings.loss_func,
            settings.num_steps,
            settings.step_size,
            random_start=settings.random_start,
        )
        adversary = PGDAdversary(attack, settings.ramp_steps, settings.attack_batch_norm)
    elif settings.adversary == "free":
        adversary = FreeAdversary(
            settings.threat,
            settings.training_batch_size,
            settings.ramp_steps,
            settings.replays,
        )
    with warnings.catch_warnings():
        # The commands notice it too, by the names of their flags.
        warnings.filterwarnings("ignore", message=".* in the images' pixel units")
        model = RegularizedModel(
            network,
            settings.objective,
            noise_stddev=settings.sigma,
            clip_noise=settings.clip_noise,
            bounds=(challenge.lower, challenge.upper),
            adversary=adversary,
            augment=settings.augment,
            weight_decay=settings.weight_decay,
            seed=settings.random_seed,
        )
    rate = piecewise_constant(settings.step_size_schedule)
    if challenge.training.optimizer == "adam":
        # A mean loss has gradients 1/b as large: with epsilon / b Adam takes the same steps.
        is_mean = settings.loss_reduction == "mean"
        divisor = settings.training_batch_size if is_mean else 1
        optimizer = TF1Adam(rate, epsilon=ADAM_EPSILON / divisor)
    else:
        optimizer = TF1Momentum(rate, settings.momentum)
    model.compile(optimizer=optimizer)
    return model


def train_run(
    settings: RunSettings,
    images,
    labels,
    model_dir: Path | str,
    *,
    data_dir: str | None = None,
    extend: bool = False,
    strategy: tf.distribute.Strategy | None = None,
    deterministic: bool = True,
    show_progress: bool = True,
) -> int:
    """Train a run in its folder, or go on with it.

    Args:
        settings: what to compute.
        images: (N, H, W, C) uint8 training images.
        labels: (N,) int.
        model_dir: gets what DESIGN's contract lists for `train.py`, from the chief alone if there
            are several workers.
        data_dir: where the data came from, for the record.
        extend: accept that an existing run had a smaller `max_num_training_steps`.
        strategy: from `make_strategy`; None for one device.
        deterministic: make steps repeatable bit for bit.
        show_progress: draw a progress bar.

    Returns:
        The number of finished steps; smaller than asked for after a signal.

    Raises:
        TrainingError: see `run_folder` and `train`.
        ValueError: if this worker has other settings or data than the chief, or the checkpoint to
            start from is broken, of another network, or of the last step or a later one.
        WorkerLost: if another worker is gone.
    """
    strategy = strategy or tf.distribute.get_strategy()
    workers = Workers(strategy)
    images, labels = images[settings.first_example :], labels[settings.first_example :]
    # Where training starts is the chief's business.
    same = dataclasses.asdict(settings) | {"init_checkpoint": ""}
    workers.check_same(same, images, labels)
    with strategy.scope():
        network = build_network(settings)
        model = build_model(settings, network)
    reduction: dict[str, Any] = {
        "loss_reduction": settings.loss_reduction,
        "batch_size": settings.training_batch_size,
    }
    folder = Path(model_dir)
    # Before the folder belongs to a run that cannot start.
    if workers.is_chief and settings.init_checkpoint and not saved_steps(folder):
        start, planned = Path(settings.init_checkpoint), settings.max_num_training_steps
        step = start_from_checkpoint(model, start, reduction)
        if step >= planned:
            raise ValueError(
                f"{start} is of step {step} already, so that nothing is left to train; give a "
                f"larger --max_num_training_steps than {planned}."
            )
        print(f"start: step {step} {_origin(start)}", flush=True)
    with contextlib.ExitStack() as stack:
        if workers.is_chief:
            record = run_record(settings, data_dir, execution(strategy, deterministic))
            held = run_folder(model_dir, record, extend=extend, defaults=_DEFAULTS)
            folder = stack.enter_context(held)
            if extend or not (folder / "config.json").exists():
                _write_challenge_config(folder, settings, str(model_dir))

        def export(step):
            if model.network is not network:
                network.set_weights(model.network.get_weights())
            with atomic_path(folder / "model.keras") as temporary:
                network.save(temporary)
                # Within the file: it is replaced while others read it.
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.comment = f"{_STEP_COMMENT}{step}".encode()
            save_network(model.network, folder, step, optimizer=model.optimizer, **reduction)

        def remove_export(step):
            for path in folder.glob(f"checkpoint-{step}.*"):
                path.unlink(missing_ok=True)

        return train(
            model,
            images,
            labels,
            settings.loop,
            folder,
            on_checkpoint=export,
            on_removal=remove_export,
            deterministic=deterministic,
            show_progress=show_progress,
        )


def _origin(checkpoint: Path) -> str:
    if has_training_state(checkpoint):
        return f"of {checkpoint}, with its optimiser's state"
    return f"with the weights of {checkpoint}, which holds no optimiser's state"


def _write_challenge_config(folder: Path, settings: RunSettings, model_dir: str) -> None:
    names = (
        "random_seed",
        "max_num_training_steps",
        "num_output_steps",
        "num_summary_steps",
        "num_checkpoint_steps",
        "training_batch_size",
        "step_size_schedule",
        "weight_decay",
        "momentum",
        "epsilon",
    )
    values = {name: getattr(settings, name) for name in names}
    write_config(folder / "config.json", settings.challenge, {"model_dir": model_dir, **values})


def start_from_checkpoint(model: RegularizedModel, path: Path, reduction: dict) -> int:
    """Fill a model from a challenge's checkpoint.

    Args:
        model: compiled; its network must be the checkpoint's.
        path: prefix or folder of a TF1 bundle.
        reduction: loss_reduction and batch_size of the training that goes on.

    Returns:
        The step that training goes on from; 0 for a checkpoint of weights alone.

    Raises:
        ValueError: if the checkpoint is broken or of another network.
    """
    source = load_network(path)
    ours, theirs = model.network.variables, source.variables
    if [v.shape for v in ours] != [v.shape for v in theirs]:
        raise ValueError(f"{path} holds another network than this run's; check --dataset, --width.")
    for variable, value in zip(ours, theirs, strict=True):
        variable.assign(value)
    if not has_training_state(path):
        return 0
    return load_training_state(path, model.network, model.optimizer, **reduction)


def run_record(settings: RunSettings, data_dir: str | None, executed: dict) -> dict:
    """What `run.json` says.

    Settings, seed, versions, commit, what `execution` gives, and those rules of training that an
    earlier version had otherwise.
    """
    return {
        "schema": 1,
        "name": settings.description,
        "settings": dataclasses.asdict(settings),
        "seed": settings.random_seed,
        "data_dir": data_dir,
        "versions": versions(),
        "execution": executed,
        "rules": {"free gradient": FREE_GRADIENT} if settings.adversary == "free" else {},
        "commit": commit(),
    }


def read_run(model_dir: Path) -> RunSettings:
    """The settings of a finished or unfinished run.

    Raises:
        ValueError: if its `run.json` is not one of this version.
    """
    path = Path(model_dir) / "run.json"
    settings = read_json(path).get("settings")
    names = {field.name for field in dataclasses.fields(RunSettings)}
    if not isinstance(settings, dict) or not set(settings) <= names or "dataset" not in settings:
        raise ValueError(f"{path}: not the settings of a run of this version.")
    lists = {name: as_tuples(value) for name, value in settings.items()}
    try:
        run = RunSettings(**lists)
        _check_settings(run)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return run


def step_of_network(path: Path) -> int | None:
    """The training step that a run's `model.keras` says it is of; None if it does not say."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return None
    match = re.fullmatch(rf"{_STEP_COMMENT}(\d{{1,12}})", comment)
    return int(match[1]) if match else None


def versions() -> dict[str, str]:
    """Versions that a number depends on, and the machine's."""
    return {
        "logit_reg": logit_reg.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def execution(strategy: tf.distribute.Strategy, deterministic: bool) -> dict[str, Any]:
    """What, besides settings and versions, the last bits of a run depend on."""
    num_cores = len(os.sched_getaffinity(0))
    return {
        "num_workers": Workers(strategy).count,
        "num_replicas": strategy.num_replicas_in_sync,
        "deterministic": deterministic,
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads()
        or int(os.environ.get("TF_NUM_INTEROP_THREADS", num_cores)),
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads()
        or int(os.environ.get("TF_NUM_INTRAOP_THREADS", num_cores)),
        "processor": _processor(),
        "gpus": len(tf.config.list_logical_devices("GPU")),
    }


def _processor() -> str:
    """The model of the CPU, whose instructions decide how sums are split."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The commit of the code, with "+changes" if files were edited; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _adversarial_step_size(challenge, num_steps):
    """The challenges' own step sizes for their own numbers of steps, else 2.5 epsilon / steps."""
    if num_steps == _ADVERSARIAL_STEPS:
        return challenge.paper.adversarial_step_size
    if num_steps == challenge.training.attack.num_steps:
        return challenge.training.attack.step_size
    return 2.5 * challenge.epsilon / num_steps if num_steps > 0 else 0.0


def _check_settings(settings: RunSettings) -> None:
    """Check the types, which a file can have wrong, and let every part check its own settings."""
    for name, kind in get_type_hints(RunSettings).items():
        value = getattr(settings, name)
        if not _has_type(value, kind):
            wanted = kind if get_args(kind) else kind.__name__
            raise ValueError(f"{name} must be {wanted}; got {reprlib.repr(value)}.")
    if settings.adversary not in ADVERSARIES:
        raise ValueError(
            f"adversary must be one of {', '.join(ADVERSARIES)}; got {settings.adversary!r}."
        )
    if settings.train_dtype not in TRAIN_DTYPES:
        raise ValueError(
            f"train_dtype must be one of {', '.join(TRAIN_DTYPES)}; got {settings.train_dtype!r}."
        )
    _ = settings.objective, settings.threat, settings.loop
    piecewise_constant(settings.step_size_schedule)
    if settings.challenge.paper.width and settings.width < 1:
        raise ValueError(f"width must be at least 1; got {settings.width}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the type of a field of `RunSettings`."""
    parts = get_args(kind)
    if parts:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and value in _INTEGERS
    return isinstance(value, kind)


def as_tuples(value):
    """A value read from JSON with tuples for its lists, as the settings have them."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value
