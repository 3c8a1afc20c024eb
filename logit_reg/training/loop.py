"""The one training loop: batches, steps, log, TensorBoard, checkpoints, resume."""

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from logit_reg.files import one_line, read_json, write_json, write_text
from logit_reg.objectives import class_indices
from logit_reg.progress import Progress
from logit_reg.training.distribution import Workers, lost_workers, own_slice
from logit_reg.training.model import RegularizedModel
from logit_reg.training.state import (
    prune_states,
    remove_leftovers,
    restore_newest_state,
    save_state,
    saved_steps,
)

LOG_COLUMNS = ("step", "lr", "xent", "penalty", "total", "accuracy", "mean_logit_norm")
# For a network with losses of its own (`kernel_regularizer`, `add_loss`), whose sum it is.
OPTIONAL_LOG_COLUMNS = ("regularization",)
TIMING_COLUMNS = ("step", "seconds", "examples_per_second")

_LOGGER = logging.getLogger(__name__)
# Entries of run.json that a number depends on in its last bits.
_BIT_EXACT_ENTRIES = ("versions", "execution", "rules")
_WHAT_TO_TRY = "Try a smaller learning rate (--step_size_schedule) or a smaller --beta."


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what to do."""


class WrongRun(TrainingError, ValueError):
    """The settings, which were given, are not those of the run that the folder holds."""


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
    max_to_keep: int = 3
    """How many checkpoints stay, the newest ones, besides those of `keep_checkpoint_steps`."""
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
            "max_to_keep",
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
def run_folder(
    model_dir: Path | str,
    record: dict,
    *,
    extend: bool = False,
    defaults: Mapping[str, object] | None = None,
) -> Iterator[Path]:
    """Hold a folder for one run: locked, and with this run's settings in `run.json`.

    A run that goes on with other versions or another execution than before is told that it is
    not bit-exact.

    Args:
        model_dir: folder to make or to go on with.
        record: what `run.json` holds; its "settings" identify the run.
        extend: accept an existing run whose `max_num_training_steps` was smaller.
        defaults: values of the settings that the `run.json` of an older version lacks.

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
            old = read_json(path)
            _check_same_settings(path, old, record, extend, defaults or {})
            if saved_steps(model_dir):
                _tell_if_not_bit_exact(model_dir, old, record)
        with _writing(model_dir):
            remove_leftovers(model_dir)
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
    on_removal: Callable[[int], None] | None = None,
    deterministic: bool = True,
    show_progress: bool = True,
) -> int:
    """Train until `max_num_training_steps`, going on where an earlier call stopped.

    SIGINT and SIGTERM finish the step, write a checkpoint and return. Of several workers only
    the chief reads and writes files.

    Args:
        model: compiled with its optimiser, in the scope of the strategy that trains it.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) or (N, 1) int.
        settings: see `LoopSettings`.
        model_dir: gets `log.csv`, `timing.csv`, `tensorboard/` and `state-N.npz`.
        on_checkpoint: called with the step before each checkpoint, to export the network.
        on_removal: called with the step of each checkpoint that has been removed.
        deterministic: make steps repeatable bit for bit; see `repeatable_steps`.
        show_progress: draw a progress bar.

    Returns:
        The number of finished steps; smaller than asked for after a signal.

    Raises:
        ValueError: see `traced_train_step`.
        TrainingError: if the network computes in float16, the loss or a weight is no longer
            finite, a file cannot be written, or training is to end before the step that it goes
            on from.
        WorkerLost: if another worker is gone.
    """
    model_dir = Path(model_dir)
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise TrainingError(
            "float16 skips the steps that overflow, so that training could not go on exactly; "
            "train in bfloat16, or in float16 with fit."
        )
    workers = Workers(model.distribute_strategy)
    with model.distribute_strategy.scope():
        optimizer.build(model.network.trainable_variables)
    variables = [*model.network.variables, *optimizer.variables]
    if model.perturbation is not None:
        variables.append(model.perturbation)
    meta = restore_newest_state(model_dir, variables) if workers.is_chief else None
    workers.copy_from_chief(variables)
    # A run that goes on from another one's checkpoint starts at that one's step.
    step = int(optimizer.iterations.numpy())
    total_steps = settings.max_num_training_steps
    if step > total_steps:
        raise WrongRun(
            f"{model_dir} goes on from step {step}, beyond max_num_training_steps "
            f"{total_steps}; ask for more steps."
        )
    order = BatchOrder(
        len(images), settings.training_batch_size, settings.random_seed, settings.replays
    )
    batches = order.batches(step)
    totals = []
    is_stopping = False
    with (
        contextlib.ExitStack() as stack,
        repeatable_steps() if deterministic else contextlib.nullcontext(),
        _stop_on_signal() as stop,
    ):
        train_step = traced_train_step(model, images, labels, settings.training_batch_size)
        records = None
        if workers.is_chief:
            measured = train_step.get_concrete_function().structured_outputs
            columns = LOG_COLUMNS + tuple(c for c in OPTIONAL_LOG_COLUMNS if c in measured)
            seconds = float((meta or {}).get("seconds", 0.0))
            records = _Records(
                model_dir, settings, columns, step, seconds, show_progress=show_progress
            )
            stack.enter_context(records)
        while step < total_steps and not is_stopping:
            learning_rate = optimizer.learning_rate
            with lost_workers(workers):
                measures = train_step(next(batches))
            step += 1
            if records is not None:
                records.count()
            totals.append(measures["total"])
            is_stopping = workers.any(stop.is_set())
            due = _due(step, settings, is_stopping)
            if not due:
                continue
            # Only here does the host wait for the step.
            _check_finite(totals, step, model_dir)
            totals.clear()
            if "checkpoint" in due:
                _check_weights(variables, step, model_dir)
            if records is None:
                continue
            row = {name: float(value) for name, value in measures.items()}
            row |= {"step": step, "lr": float(keras.ops.convert_to_numpy(learning_rate))}
            with _writing(model_dir):
                records.write(row, due)
                if "checkpoint" in due:
                    # Exports first: a kill in between repeats the steps, and with them the export.
                    if on_checkpoint is not None:
                        on_checkpoint(step)
                    save_state(model_dir, step, variables, {"seconds": records.seconds})
                    for removed in prune_states(
                        model_dir,
                        max_to_keep=settings.max_to_keep,
                        keep=settings.keep_checkpoint_steps,
                    ):
                        if on_removal is not None:
                            on_removal(removed)
        # The others stay until the chief has written the last checkpoint.
        workers.any(False)
    return step


@contextlib.contextmanager
def repeatable_steps() -> Iterator[None]:
    """Make training steps traced inside repeatable bit for bit, on the same machine and threads.

    TensorFlow's graph optimiser lets sums of gradients race: with BatchNorm, repeats of a step
    differ in nearly every weight, even under op determinism. Without it they do not; that costs
    about 4 % of the CPU time on CIFAR's network (a single inter-op thread, the other way, about
    10 %) and nothing that shows on MNIST's. On a GPU op determinism is needed as well, and stays
    on for the rest of the process.
    """
    name = "disable_meta_optimizer"
    before = tf.config.optimizer.get_experimental_options().get(name, False)
    tf.config.optimizer.set_experimental_options({name: True})
    if tf.config.list_logical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({name: before})


def traced_train_step(model: RegularizedModel, images, labels, batch_size: int):
    """The training step as one `tf.function` of the indices of its batch.

    The data stay in memory as they are on disk; a step gathers and converts its own images.

    Args:
        model: compiled with its optimiser, in the scope of the strategy that trains it.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) or (N, 1) int.
        batch_size: fixed number of indices, over all replicas.

    Returns:
        A function from (batch_size,) int64 indices, the same in all processes, to the dict of
        `RegularizedModel.update`.

    Raises:
        ValueError: if the images are not uint8, a label is no class or is missing, or the
            replicas cannot share a batch evenly.
    """
    strategy = model.distribute_strategy
    if batch_size % strategy.num_replicas_in_sync:
        raise ValueError(
            f"training_batch_size {batch_size} cannot be shared evenly by "
            f"{strategy.num_replicas_in_sync} replicas; choose a multiple."
        )
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as on disk; got {images.dtype}.")
    all_images = tf.convert_to_tensor(np.ascontiguousarray(images))
    all_labels = class_indices(labels, model.num_classes)
    if len(all_labels) != len(images):
        raise ValueError(
            f"labels must be one an image; got {len(all_labels)} for {len(images)} images."
        )
    lower, upper = model.bounds
    divisor = 255.0 / (upper - lower)

    def on_replica(pixels, classes):
        scaled = tf.cast(own_slice(pixels), model.precision) / divisor + lower
        return model.update(scaled, own_slice(classes))

    @tf.function(input_signature=[tf.TensorSpec((batch_size,), tf.int64)], autograph=False)
    def train_step(indices):
        batch = tf.gather(all_images, indices), tf.gather(all_labels, indices)
        measures = strategy.run(on_replica, batch)
        return {
            name: strategy.experimental_local_results(value)[0] for name, value in measures.items()
        }

    return train_step


class _Records:
    """What a run writes besides its checkpoints: rows, points of TensorBoard, a progress bar."""

    def __init__(self, model_dir, settings, columns, first_step, seconds, *, show_progress):
        self._settings = settings
        self._seconds_before = seconds
        self._started = self._rate_time = time.monotonic()
        self._rate_step = first_step
        with _writing(model_dir):
            self._log = _Table(model_dir / "log.csv", columns, last_step=first_step)
            self._timing = _Table(model_dir / "timing.csv", TIMING_COLUMNS, last_step=first_step)
            self._summaries = tf.summary.create_file_writer(str(model_dir / "tensorboard"))
        self._bar = Progress(
            total=settings.max_num_training_steps,
            initial=first_step,
            unit="step",
            disable=not show_progress,
            mininterval=0.5,
        )

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, those of earlier processes included."""
        return self._seconds_before + time.monotonic() - self._started

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()
        # Points that count were flushed with the last checkpoint; a full disk was reported then.
        with contextlib.suppress(tf.errors.OpError):
            self._summaries.close()

    def count(self):
        """Show that one more step has been started."""
        self._bar.update()

    def write(self, row, due):
        """Write what is due at a row's step."""
        step, now = row["step"], time.monotonic()
        num_examples = (step - self._rate_step) * self._settings.training_batch_size
        rate = num_examples / max(now - self._rate_time, 1e-9)
        if "output" in due:
            self._rate_step, self._rate_time = step, now
            self._log.append(row)
            seconds = {"step": step, "seconds": self.seconds, "examples_per_second": rate}
            self._timing.append(seconds)
            self._bar.set_postfix_str(
                f"xent {row['xent']:.3f}, accuracy {row['accuracy']:.3f}, "
                f"logit norm {row['mean_logit_norm']:.2f}, {rate:.0f} examples/s"
            )
        if "summary" in due:
            with self._summaries.as_default(step=step):
                for name, value in (row | {"examples_per_second": rate}).items():
                    if name != "step":
                        tf.summary.scalar(name, value)
        if "checkpoint" in due:
            # On the disk before the checkpoint that makes them final.
            self._log.sync()
            self._timing.sync()
            self._summaries.flush()


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
        # Not "a", which would make a file in a folder that has been emptied meanwhile.
        with self._path.open("r+", newline="") as file:
            file.seek(0, os.SEEK_END)
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({name: _format(row[name]) for name in self._columns})

    def sync(self):
        with self._path.open("r+") as file:
            os.fsync(file.fileno())


def _format(value):
    return value if isinstance(value, int) else f"{value:.9g}"


def _read_rows(path, columns):
    """Whole rows only: a killed process may have left half of one."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise TrainingError(
            f"{path} is damaged ({one_line(error)}); move it away to go on without its rows."
        ) from error
    # The rows of an earlier version have nothing in an optional column.
    needed = [column for column in columns if column not in OPTIONAL_LOG_COLUMNS]
    is_whole = [
        (row.get("step") or "").isdecimal() and all(row.get(column) for column in needed)
        for row in rows
    ]
    return list(itertools.compress(rows, is_whole))


def _due(step, settings, is_stopping):
    """What is to be written after a step."""
    is_last = step == settings.max_num_training_steps
    due = {
        "output": step == 1 or step % settings.num_output_steps == 0 or is_last,
        "summary": step % settings.num_summary_steps == 0,
        "checkpoint": step % settings.num_checkpoint_steps == 0
        or step in settings.keep_checkpoint_steps
        or is_last
        or is_stopping,
    }
    return {name for name, is_due in due.items() if is_due}


def _check_finite(totals, step, model_dir):
    """Find the first of the last steps whose loss is not finite."""
    totals = np.array([float(total) for total in totals])
    if not np.isfinite(totals).all():
        bad = int(np.argmin(np.isfinite(totals)))
        first = step - len(totals) + 1 + bad
        raise TrainingError(
            f"the loss is no longer finite at step {first} (total {totals[bad]}); "
            f"{_last_good(model_dir)} {_WHAT_TO_TRY}"
        )


def _check_weights(variables, step, model_dir):
    if not all(np.isfinite(variable.numpy()).all() for variable in variables):
        raise TrainingError(
            f"the weights are no longer finite after step {step}; "
            f"{_last_good(model_dir)} {_WHAT_TO_TRY}"
        )


def _last_good(model_dir):
    steps = saved_steps(model_dir)
    if not steps:
        return f"there is no checkpoint in {model_dir} yet."
    return f"the last good checkpoint, of step {max(steps)}, stays in {model_dir}."


@contextlib.contextmanager
def _writing(model_dir):
    """Turn what a full, read-only or vanished folder raises into one line that says what to do."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        if not model_dir.is_dir():
            raise TrainingError(
                f"{model_dir} has vanished; put it back, or start anew with the same command."
            ) from error
        # What `files.py` raises says less than its cause, which has no path in it.
        causes = (getattr(error.__cause__, "strerror", None), getattr(error, "strerror", None))
        reason = next(filter(None, causes), None) or one_line(error)
        raise TrainingError(
            f"{model_dir} cannot be written ({reason}); {_last_good(model_dir)} Make room, or the "
            f"folder writable, and the same command goes on."
        ) from error


def _tell_if_not_bit_exact(model_dir, old, new):
    differences = []
    for entry in _BIT_EXACT_ENTRIES:
        before, now = old.get(entry), new.get(entry, {})
        if not isinstance(before, dict):
            before = {}
        names = sorted({*before, *now})
        changed = [name for name in names if before.get(name) != now.get(name)]
        differences += [f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in changed]
    if differences:
        _LOGGER.warning("%s goes on, but not bit-exactly: %s.", model_dir, ", ".join(differences))


def _check_same_settings(path, old, record, extend, defaults):
    old = old.get("settings")
    if not isinstance(old, dict):
        raise WrongRun(f"{path}: no settings of a run; choose another --model_dir.")
    new = json.loads(json.dumps(record["settings"]))
    old = json.loads(json.dumps(dict(defaults))) | old
    if old == new:
        return
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if extend and changed == ["max_num_training_steps"]:
        if new["max_num_training_steps"] > old["max_num_training_steps"]:
            return
        raise WrongRun(
            f"--extend needs a max_num_training_steps above {old['max_num_training_steps']}; "
            f"got {new['max_num_training_steps']}."
        )
    differences = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
    raise WrongRun(
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
