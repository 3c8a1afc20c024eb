"""The one training loop: batches, steps, log, TensorBoard, checkpoints, resume."""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from logit_reg.files import read_json, write_json, write_text
from logit_reg.state import prune_states, restore_newest_state, save_state
from logit_reg.training import RegularizedModel

LOG_COLUMNS = ("step", "lr", "xent", "penalty", "total", "accuracy", "mean_logit_norm")
TIMING_COLUMNS = ("step", "seconds", "examples_per_second")

_STATES_TO_KEEP = 2


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train and what to write on the way; the names are the challenges' own."""

    max_num_training_steps: int
    """Number of optimiser steps; a replay of free adversarial training counts as one."""
    training_batch_size: int = 128
    """Images a step."""
    num_output_steps: int = 100
    """Steps between two rows of log.csv."""
    num_summary_steps: int = 100
    """Steps between two points of TensorBoard."""
    num_checkpoint_steps: int = 300
    """Steps between two checkpoints."""
    keep_checkpoint_steps: tuple[int, ...] = ()
    """Steps whose checkpoints are made and never removed."""
    replays: int = 1
    """How many steps in a row train on the same minibatch (free adversarial training)."""
    random_seed: int = 0
    """Seed of the order of the data."""

    def __post_init__(self):
        for name in (
            "max_num_training_steps",
            "training_batch_size",
            "num_output_steps",
            "num_summary_steps",
            "num_checkpoint_steps",
            "replays",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if any(step < 1 for step in self.keep_checkpoint_steps):
            raise ValueError(
                f"keep_checkpoint_steps must be at least 1; got {self.keep_checkpoint_steps}."
            )


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which examples each step trains on: a pure function of the seed and the step.

    Every epoch is a fresh permutation; its last examples that do not fill a batch are left out.
    """

    num_examples: int
    """Size of the training set."""
    batch_size: int
    """Examples a step."""
    seed: int = 0
    """Source of the permutations."""
    replays: int = 1
    """Steps in a row on the same minibatch."""

    def __post_init__(self):
        if self.num_examples < self.batch_size:
            raise ValueError(
                f"training_batch_size {self.batch_size} exceeds the {self.num_examples} training "
                f"examples; choose a smaller one."
            )

    def batches(self, first_step: int) -> Iterator[np.ndarray]:
        """Yield the (batch_size,) int64 indices of step `first_step`, the next one, and so on."""
        step, batches_per_epoch = first_step, self.num_examples // self.batch_size
        order_epoch = -1
        while True:
            epoch, batch = divmod(step // self.replays, batches_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
                order_epoch = epoch
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            step += 1


@contextlib.contextmanager
def run_folder(model_dir: Path | str, record: dict, *, extend: bool = False) -> Iterator[Path]:
    """Hold a folder for one run: locked, and with this run's settings in `run.json`.

    Args:
        model_dir: folder to make or to go on with.
        record: what `run.json` holds; its "settings" identify the run.
        extend: accept an existing run whose `max_num_training_steps` was smaller.

    Yields:
        The folder.

    Raises:
        TrainingError: if another process trains there, or the folder holds a run with other
            settings (the message lists the differences), or cannot be written.
    """
    model_dir = Path(model_dir)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        lock = (model_dir / ".lock").open("w")
    except OSError as error:
        raise TrainingError(
            f"{model_dir} cannot be written ({error.strerror}); choose another --model_dir."
        ) from error
    with lock:
        try:
            # The kernel drops it with the process, so a killed run leaves nothing behind.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{model_dir} is in use by another training process; wait for it or choose "
                f"another --model_dir."
            ) from error
        path = model_dir / "run.json"
        if path.exists():
            _check_same_settings(path, record, extend)
        write_json(path, record)
        yield model_dir


def train(
    model: RegularizedModel,
    images: np.ndarray,
    labels: np.ndarray,
    settings: LoopSettings,
    model_dir: Path | str,
    *,
    on_checkpoint: Callable[[int], None] | None = None,
    show_progress: bool = True,
) -> int:
    """Train until `max_num_training_steps`, going on where an earlier call stopped.

    SIGINT and SIGTERM finish the step, write a checkpoint and return.

    Args:
        model: compiled with its optimiser.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) int.
        settings: see `LoopSettings`.
        model_dir: gets `log.csv`, `timing.csv`, `tensorboard/` and `state-N.npz`.
        on_checkpoint: called with the step after each checkpoint, to export the network.
        show_progress: draw a progress bar.

    Returns:
        The number of finished steps; smaller than asked for after a signal.

    Raises:
        TrainingError: if the loss is no longer finite, or training is to end before the step
            that it goes on from.
    """
    model_dir = Path(model_dir)
    optimizer = model.optimizer
    optimizer.build(model.network.trainable_variables)
    variables = [*model.network.variables, *optimizer.variables]
    if model.perturbation is not None:
        variables.append(model.perturbation)
    # A run that goes on from another one's checkpoint starts at that one's step.
    beginning = {"step": int(optimizer.iterations.numpy()), "seconds": 0.0}
    meta = restore_newest_state(model_dir, variables) or beginning
    first_step, seconds_before = int(meta["step"]), float(meta["seconds"])
    if first_step > settings.max_num_training_steps:
        raise TrainingError(
            f"{model_dir} goes on from step {first_step}, beyond max_num_training_steps "
            f"{settings.max_num_training_steps}; ask for more steps."
        )
    log = _Table(model_dir / "log.csv", LOG_COLUMNS, last_step=first_step)
    timing = _Table(model_dir / "timing.csv", TIMING_COLUMNS, last_step=first_step)

    order = BatchOrder(
        len(images), settings.training_batch_size, settings.random_seed, settings.replays
    )
    batches = order.batches(first_step)
    train_step = traced_train_step(model, images, labels, settings.training_batch_size)
    total_steps = settings.max_num_training_steps
    started = time.monotonic()
    rate_step, rate_time = first_step, started
    step = first_step
    summaries = tf.summary.create_file_writer(str(model_dir / "tensorboard"))
    with (
        _stop_on_signal() as stop,
        summaries.as_default(),
        tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not show_progress,
            mininterval=0.5,
        ) as bar,
    ):
        while step < total_steps and not stop.is_set():
            learning_rate = optimizer.learning_rate
            measures = train_step(next(batches))
            step += 1
            bar.update()
            is_last = step == total_steps
            is_output = step == 1 or step % settings.num_output_steps == 0 or is_last
            is_summary = step % settings.num_summary_steps == 0
            is_checkpoint = (
                step % settings.num_checkpoint_steps == 0
                or step in settings.keep_checkpoint_steps
                or is_last
                or stop.is_set()
            )
            if not (is_output or is_summary or is_checkpoint):
                continue
            # Only here does the host wait for the step.
            row = {name: float(value) for name, value in measures.items()}
            _check_finite(row, step, model_dir)
            row |= {"step": step, "lr": float(learning_rate)}
            now = time.monotonic()
            seconds = seconds_before + now - started
            rate = (step - rate_step) * settings.training_batch_size / max(now - rate_time, 1e-9)
            if is_output:
                rate_step, rate_time = step, now
                log.append(row)
                timing.append({"step": step, "seconds": seconds, "examples_per_second": rate})
                bar.set_postfix_str(
                    f"xent {row['xent']:.3f}, accuracy {row['accuracy']:.3f}, "
                    f"logit norm {row['mean_logit_norm']:.2f}, {rate:.0f} examples/s"
                )
            if is_summary:
                for name, value in (row | {"examples_per_second": rate}).items():
                    if name != "step":
                        tf.summary.scalar(name, value, step=step)
            if is_checkpoint:
                # Exports first: a kill in between repeats the steps, and with them the export.
                if on_checkpoint is not None:
                    on_checkpoint(step)
                save_state(model_dir, step, variables, {"seconds": seconds})
                keep = settings.keep_checkpoint_steps
                prune_states(model_dir, max_to_keep=_STATES_TO_KEEP, keep=keep)
    return step


def traced_train_step(model: RegularizedModel, images, labels, batch_size: int):
    """The training step as one `tf.function` of the indices of its batch.

    The data stay in memory as they are on disk; a step gathers and converts its own images.

    Args:
        model: compiled with its optimiser.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) int.
        batch_size: fixed number of indices.

    Returns:
        A function from (batch_size,) int64 indices to the dict of `RegularizedModel.update`.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as on disk; got {images.dtype}.")
    all_images = tf.convert_to_tensor(np.ascontiguousarray(images))
    all_labels = tf.convert_to_tensor(labels, tf.int64)
    lower, upper = model.bounds
    divisor = 255.0 / (upper - lower)

    @tf.function(input_signature=[tf.TensorSpec((batch_size,), tf.int64)], autograph=False)
    def train_step(indices):
        pixels = tf.cast(tf.gather(all_images, indices), tf.float32) / divisor + lower
        return model.update(pixels, tf.gather(all_labels, indices))

    return train_step


class _Table:
    """A CSV file that grows by a row at a time; rows after the restored step are cut."""

    def __init__(self, path: Path, columns: tuple[str, ...], *, last_step: int):
        self._path = path
        self._columns = columns
        rows = _read_rows(path, columns) if last_step else []
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= last_step)
        write_text(path, text.getvalue())

    def append(self, row):
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({name: _format(row[name]) for name in self._columns})


def _format(value):
    return value if isinstance(value, int) else f"{value:.9g}"


def _read_rows(path, columns):
    """Whole rows only: a killed process may have left half of one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["step"].isdigit() and all(row.get(c) for c in columns)]


def _check_finite(row, step, model_dir):
    if not all(math.isfinite(value) for value in row.values()):
        raise TrainingError(
            f"the loss is no longer finite at step {step} (total {row['total']}); the last good "
            f"checkpoint stays in {model_dir}. Try a smaller learning rate (--step_size_schedule) "
            f"or a smaller --beta."
        )


def _check_same_settings(path, record, extend):
    old = read_json(path).get("settings", {})
    new = json.loads(json.dumps(record["settings"]))
    if old == new:
        return
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if extend and changed == ["max_num_training_steps"]:
        if new["max_num_training_steps"] > old["max_num_training_steps"]:
            return
        raise TrainingError(
            f"--extend needs a max_num_training_steps above {old['max_num_training_steps']}; "
            f"got {new['max_num_training_steps']}."
        )
    differences = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
    raise TrainingError(
        f"{path.parent} holds a run with other settings ({differences}); choose another "
        f"--model_dir, or --extend to raise max_num_training_steps alone."
    )


@contextlib.contextmanager
def _stop_on_signal():
    """An event that SIGINT or SIGTERM sets; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_to_stop(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask_to_stop) for number in (2, 15)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
