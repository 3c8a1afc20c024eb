"""A training run in its folder: training it, going on with it, reading it."""

import contextlib
import dataclasses
import re
import zipfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from logit_reg.experiments.building import build_model, build_network, start_from_checkpoint
from logit_reg.experiments.provenance import execution, run_record
from logit_reg.experiments.settings import DEFAULTS, RunSettings, as_tuples, check_settings
from logit_reg.files import atomic_path, read_json
from logit_reg.messages import UsageError, notice
from logit_reg.training.distribution import Workers
from logit_reg.training.folder import Stop, record_stop, run_folder, stop_of
from logit_reg.training.loop import Outcome, train
from logit_reg.training.state import saved_steps
from madry_compat.config import write_config
from madry_compat.tf1_checkpoints import has_training_state, save_network

_STEP_COMMENT = "training step "


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
) -> Outcome:
    """Train a run in its folder, or go on with it.

    Where training was stopped because of overfitting, nothing is trained any more.

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
        The number of finished steps, and whether training was stopped.

    Raises:
        UsageError: if a learning rate that is stretched over the training is to be extended.
        TrainingError: see `run_folder` and `train`.
        ValueError: if this worker has other settings or data than the chief, or the checkpoint to
            start from is broken, of another network, or of the last step or a later one.
        WorkerLost: if another worker is gone.
    """
    if extend and settings.learning_rate_schedule != "steps":
        raise UsageError(
            f"--extend: --learning_rate_schedule={settings.learning_rate_schedule} is stretched "
            f"over the whole training, so that a longer one has another rate from its first step "
            f"on; train anew in another --model_dir."
        )
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
            held = run_folder(model_dir, record, extend=extend, defaults=DEFAULTS)
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
            # The optimiser's state belongs to the last weights, not to their averages.
            optimizer = None if settings.ema else model.optimizer
            save_network(model.network, folder, step, optimizer=optimizer, **reduction)

        def remove_export(step):
            for path in folder.glob(f"checkpoint-{step}.*"):
                path.unlink(missing_ok=True)

        before = stop_of(folder) if workers.is_chief else None
        stopped_at = workers.number_of_chief(before.step if before else 0)
        if stopped_at:
            step = workers.number_of_chief(before.result_step if before else 0)
            return Outcome(step, True, Stop(stopped_at, step))
        outcome = train(
            model,
            images,
            labels,
            settings.loop,
            folder,
            threat=settings.threat,
            on_checkpoint=export,
            on_removal=remove_export,
            deterministic=deterministic,
            show_progress=show_progress,
        )
        if outcome.stop is not None and workers.is_chief:
            record_stop(folder, outcome.stop)
        return outcome


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
        check_settings(run)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return run


def checkpoint_to_go_on_from(model_dir: str | None) -> str | None:
    """The challenge's checkpoint that the folder of a run was begun from, or holds."""
    if not model_dir:
        return None
    folder = Path(model_dir)
    if (folder / "run.json").exists():
        # The run may have begun that way; the same command has to name the same settings.
        return read_run(folder).init_checkpoint
    if not any(folder.glob("*.index")):
        return None
    notice(f"{folder} holds a challenge's checkpoint: training goes on from it.")
    return model_dir


def step_of_network(path: Path) -> int | None:
    """The training step that a run's `model.keras` says it is of; None if it does not say."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return None
    match = re.fullmatch(rf"{_STEP_COMMENT}(\d{{1,12}})", comment)
    return int(match[1]) if match else None
