"""The one training loop: steps, what is due after each, checkpoints, resume."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from logit_reg.threat import ThreatModel
from logit_reg.training.averaging import WeightAverage
from logit_reg.training.distribution import Workers, lost_workers
from logit_reg.training.feeding import BatchOrder, traced_train_step
from logit_reg.training.folder import Stop, TrainingError, WrongRun, last_good, writing
from logit_reg.training.model import RegularizedModel
from logit_reg.training.overfitting import (
    OverfittingWatch,
    RobustnessProbe,
    best_row,
    fall_in_words,
)
from logit_reg.training.records import LOG_COLUMNS, OPTIONAL_LOG_COLUMNS, Records
from logit_reg.training.state import (
    prune_states,
    remove_later_states,
    restore_newest_state,
    restore_state,
    save_state,
    saved_steps,
)

_WHAT_TO_TRY = "Try a smaller learning rate (--step_size_schedule) or a smaller --beta."


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
    random_seed: int = 0
    """Seed of the order of the data."""
    ema: bool = False
    """Whether what is exported and watched are averages of the weights; see `WeightAverage`."""
    ema_momentum: float = 0.999
    """Their momentum, in [0, 1)."""
    num_robustness_steps: int = 0
    """Steps between two rows of robustness.csv; 0 for none."""
    stop_on_overfitting: bool = False
    """End training where robustness has fallen to nothing, and leave the best checkpoint."""

    def __post_init__(self):
        for name in (
            "max_num_training_steps",
            "training_batch_size",
            "num_output_steps",
            "num_summary_steps",
            "num_checkpoint_steps",
            "max_to_keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if any(step < 1 for step in self.keep_checkpoint_steps):
            raise ValueError(
                f"keep_checkpoint_steps must be at least 1; got {self.keep_checkpoint_steps}."
            )
        if not 0 <= self.ema_momentum < 1:
            raise ValueError(f"ema_momentum must be in [0, 1); got {self.ema_momentum}.")
        if self.num_robustness_steps < 0:
            raise ValueError(
                f"num_robustness_steps must be at least 0; got {self.num_robustness_steps}."
            )
        if self.stop_on_overfitting and not self.measures_robustness:
            raise ValueError(
                f"stop_on_overfitting needs num_robustness_steps from 1 to "
                f"{self.max_num_training_steps}, the number of training steps; got "
                f"{self.num_robustness_steps}."
            )

    @property
    def measures_robustness(self) -> bool:
        """Whether there is a row of robustness.csv before training ends."""
        return 0 < self.num_robustness_steps <= self.max_num_training_steps


class Outcome(NamedTuple):
    """How far training came."""

    step: int
    """Of the newest checkpoint; smaller than asked for after a signal or a stop."""
    is_finished: bool
    """Whether nothing is left to train."""
    stop: Stop | None = None
    """If training was ended because robustness had fallen to nothing."""


def train(
    model: RegularizedModel,
    images: np.ndarray,
    labels: np.ndarray,
    settings: LoopSettings,
    model_dir: Path | str,
    *,
    threat: ThreatModel | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
    on_removal: Callable[[int], None] | None = None,
    deterministic: bool = True,
    show_progress: bool = True,
) -> Outcome:
    """Train until `max_num_training_steps`, going on where an earlier call stopped.

    SIGINT and SIGTERM finish the step, write a checkpoint and return. Of several workers only
    the chief reads and writes files.

    Args:
        model: compiled with its optimiser, in the scope of the strategy that trains it.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) or (N, 1) int.
        settings: see `LoopSettings`.
        model_dir: gets `log.csv`, `timing.csv`, `tensorboard/` and `state-N.npz`, and
            `robustness.csv` if settings ask for it.
        threat: what robustness is measured against; the adversary's if None.
        on_checkpoint: called with the step before each checkpoint, to export the network, which
            holds its averaged weights then if settings ask for them.
        on_removal: called with the step of each checkpoint that has been removed.
        deterministic: make steps repeatable bit for bit; see `repeatable_steps`.
        show_progress: draw a progress bar.

    Returns:
        The number of finished steps, and whether training was stopped.

    Raises:
        ValueError: see `traced_train_step`; or if there is no threat model.
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
    average = None
    with model.distribute_strategy.scope():
        optimizer.build(model.network.trainable_variables)
        if settings.ema:
            average = WeightAverage(model.network, settings.ema_momentum)
    variables = [*model.network.variables, *optimizer.variables, *model.adversary_variables]
    variables += average.variables if average is not None else []
    probe = None
    if settings.measures_robustness:
        threat = threat or model.adversary.threat
        if threat is None:
            raise ValueError("num_robustness_steps needs an adversary, or a threat model.")
        probe = RobustnessProbe(model.network, images, labels, threat)
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
        len(images), settings.training_batch_size, settings.random_seed, model.adversary.replays
    )
    batches = order.batches(step)
    totals = []
    is_stopping = is_overfitted = False
    with (
        contextlib.ExitStack() as stack,
        repeatable_steps() if deterministic else contextlib.nullcontext(),
        _stop_on_signal() as signalled,
    ):
        train_step = traced_train_step(model, images, labels, settings.training_batch_size, average)
        records = None
        if workers.is_chief:
            measured = train_step.get_concrete_function().structured_outputs
            columns = LOG_COLUMNS + tuple(c for c in OPTIONAL_LOG_COLUMNS if c in measured)
            seconds = float((meta or {}).get("seconds", 0.0))
            records = Records(
                model_dir,
                columns,
                first_step=step,
                total_steps=total_steps,
                batch_size=settings.training_batch_size,
                seconds=seconds,
                show_progress=show_progress,
                with_robustness=probe is not None,
            )
            stack.enter_context(records)
        result_network = average.in_network if average is not None else contextlib.nullcontext
        watch = None
        if probe is not None and records is not None:
            watch = OverfittingWatch(probe, records)
        while step < total_steps and not is_stopping and not is_overfitted:
            learning_rate = optimizer.learning_rate
            with lost_workers(workers):
                measures = train_step(next(batches))
            step += 1
            if records is not None:
                records.count()
            totals.append(measures["total"])
            is_stopping = workers.any(signalled.is_set())
            due = _due(step, settings, is_stopping)
            if not due:
                continue
            # Only here does the host wait for the step.
            _check_finite(totals, step, model_dir)
            totals.clear()
            if "robustness" in due:
                if watch is not None:
                    is_late = model.adversary.threat is not None and step > max(
                        total_steps / 2, getattr(model.adversary, "ramp_steps", 0)
                    )
                    accuracy = float(measures["accuracy"])
                    with writing(model_dir), result_network():
                        watch.look(step, accuracy, is_late=is_late)
                if settings.stop_on_overfitting:
                    is_overfitted = workers.any(watch is not None and watch.is_overfitted)
                    if is_overfitted:
                        due.discard("checkpoint")
                    elif watch is not None and watch.best_step == step:
                        due.add("checkpoint")
            if "checkpoint" in due:
                _check_weights(variables, step, model_dir)
            if records is None:
                continue
            row = {name: float(value) for name, value in measures.items()}
            row |= {"step": step, "lr": float(keras.ops.convert_to_numpy(learning_rate))}
            with writing(model_dir):
                records.write(row, due)
                if "checkpoint" in due:
                    # Exports first: a kill in between repeats the steps, and with them the export.
                    if on_checkpoint is not None:
                        with result_network():
                            on_checkpoint(step)
                    save_state(model_dir, step, variables, {"seconds": records.seconds})
                    best = watch.best_step if watch and settings.stop_on_overfitting else 0
                    for removed in prune_states(
                        model_dir,
                        max_to_keep=settings.max_to_keep,
                        keep=(*settings.keep_checkpoint_steps, best),
                    ):
                        if on_removal is not None:
                            on_removal(removed)
        ended = None
        if is_overfitted:
            result_step = 0
            if watch is not None:
                with writing(model_dir):
                    result_step = _go_back(model_dir, watch, variables)
                    # As with every checkpoint, exports first.
                    if on_checkpoint is not None:
                        with result_network():
                            on_checkpoint(result_step)
                    for removed in remove_later_states(model_dir, result_step):
                        if on_removal is not None and removed not in settings.keep_checkpoint_steps:
                            on_removal(removed)
            ended = Stop(step, workers.number_of_chief(result_step))
            step = ended.result_step
        # The others stay until the chief has written the last checkpoint.
        workers.any(False)
    return Outcome(step, step == total_steps or ended is not None, ended)


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


def _due(step, settings, is_stopping):
    """What is to be written after a step."""
    is_last = step == settings.max_num_training_steps
    due = {
        "output": step == 1 or step % settings.num_output_steps == 0 or is_last,
        "summary": step % settings.num_summary_steps == 0,
        "robustness": settings.measures_robustness
        and (step % settings.num_robustness_steps == 0 or is_last),
        "checkpoint": step % settings.num_checkpoint_steps == 0
        or step in settings.keep_checkpoint_steps
        or is_last
        or is_stopping,
    }
    return {name for name, is_due in due.items() if is_due}


def _go_back(model_dir, watch, variables):
    """Fill the variables from the checkpoint of the best row of robustness.csv; its step."""
    saved = saved_steps(model_dir)
    best = best_row([row for row in watch.rows if row["step"] in saved])
    if best is None:
        raise TrainingError(
            f"{fall_in_words(watch.rows)}; {model_dir} has no checkpoint from before it."
        )
    restore_state(model_dir, best["step"], variables)
    return best["step"]


def _check_finite(totals, step, model_dir):
    """Find the first of the last steps whose loss is not finite."""
    totals = np.array([float(total) for total in totals])
    if not np.isfinite(totals).all():
        bad = int(np.argmin(np.isfinite(totals)))
        first = step - len(totals) + 1 + bad
        raise TrainingError(
            f"the loss is no longer finite at step {first} (total {totals[bad]}); "
            f"{last_good(model_dir)} {_WHAT_TO_TRY}"
        )


def _check_weights(variables, step, model_dir):
    if not all(np.isfinite(variable.numpy()).all() for variable in variables):
        raise TrainingError(
            f"the weights are no longer finite after step {step}; "
            f"{last_good(model_dir)} {_WHAT_TO_TRY}"
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
