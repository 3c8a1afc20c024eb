"""What a run writes besides its checkpoints: tables, TensorBoard, a progress bar."""

import contextlib
import csv
import io
import itertools
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from logit_reg.files import one_line, write_text
from logit_reg.progress import Progress
from logit_reg.training.folder import TrainingError, writing
from logit_reg.training.overfitting import ROBUSTNESS_COLUMNS

LOG_COLUMNS = ("step", "lr", "xent", "penalty", "total", "accuracy", "mean_logit_norm")
# For a network with losses of its own (`kernel_regularizer`, `add_loss`), whose sum it is.
OPTIONAL_LOG_COLUMNS = ("regularization",)
TIMING_COLUMNS = ("step", "seconds", "examples_per_second")


class Records:
    """What a run writes besides its checkpoints: rows, points of TensorBoard, a progress bar."""

    def __init__(
        self,
        model_dir: Path,
        columns: tuple[str, ...],
        *,
        first_step: int,
        total_steps: int,
        batch_size: int,
        seconds: float,
        show_progress: bool,
        with_robustness: bool = False,
    ):
        """Open the files of a run.

        Args:
            model_dir: folder of the run.
            columns: of log.csv.
            first_step: step that training goes on from; rows after it are cut.
            total_steps: step at which it ends.
            batch_size: images a step.
            seconds: wall-clock seconds of training in earlier processes.
            show_progress: draw a progress bar.
            with_robustness: write robustness.csv as well.

        Raises:
            TrainingError: if a file is damaged or cannot be written.
        """
        self._batch_size = batch_size
        self._seconds_before = seconds
        self._started = self._rate_time = time.monotonic()
        self._rate_step = first_step
        with writing(model_dir):
            self._log = _Table(model_dir / "log.csv", columns, last_step=first_step)
            self._timing = _Table(model_dir / "timing.csv", TIMING_COLUMNS, last_step=first_step)
            self._robustness = None
            if with_robustness:
                path = model_dir / "robustness.csv"
                self._robustness = _Table(path, ROBUSTNESS_COLUMNS, last_step=first_step)
            self._summaries = tf.summary.create_file_writer(str(model_dir / "tensorboard"))
        self._bar = Progress(
            desc="training",
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not show_progress,
            mininterval=0.5,
        )

    @property
    def robustness(self) -> list[dict[str, float]]:
        """The rows of robustness.csv, those of earlier processes included."""
        table = self._robustness
        return [] if table is None else [_numbers(table.path, row) for row in table.rows]

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

    def count(self) -> None:
        """Show that one more step has been started."""
        self._bar.update()

    def write(self, row: Mapping[str, Any], due: Collection[str]) -> None:
        """Write what is due after a step.

        Args:
            row: values by column, "step" and "lr" included.
            due: of "output" (a row of each file), "summary" (a point of TensorBoard) and
                "checkpoint" (all that was written is on the disk afterwards).
        """
        step, now = row["step"], time.monotonic()
        num_examples = (step - self._rate_step) * self._batch_size
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
                for name, value in {**row, "examples_per_second": rate}.items():
                    if name != "step":
                        tf.summary.scalar(name, value)
        if "checkpoint" in due:
            # On the disk before the checkpoint that makes them final.
            for table in (self._log, self._timing, self._robustness):
                if table is not None:
                    table.sync()
            self._summaries.flush()

    def write_robustness(self, row: Mapping[str, Any]) -> None:
        """Write a row of robustness.csv and its points of TensorBoard.

        Args:
            row: values of `ROBUSTNESS_COLUMNS`.
        """
        if self._robustness is None:
            raise ValueError("these records were made without robustness.csv.")
        self._robustness.append(row)
        with self._summaries.as_default(step=row["step"]):
            for name in ROBUSTNESS_COLUMNS[1:]:
                tf.summary.scalar(f"robustness/{name}", row[name])


class _Table:
    """A CSV file that grows by a row at a time; rows after the restored step are cut."""

    def __init__(self, path: Path, columns: tuple[str, ...], *, last_step: int):
        self.path = path
        self._columns = columns
        rows = _read_rows(path, columns) if last_step else []
        self.rows = [row for row in rows if int(row["step"]) <= last_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(path, text.getvalue())

    def append(self, row):
        # Not "a", which would make a file in a folder that has been emptied meanwhile.
        with self.path.open("r+", newline="") as file:
            file.seek(0, os.SEEK_END)
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            values = {name: _format(row[name]) for name in self._columns}
            writer.writerow(values)
        self.rows.append(values)

    def sync(self):
        with self.path.open("r+") as file:
            os.fsync(file.fileno())


def _numbers(path, row):
    try:
        return {name: int(row[name]) if name == "step" else float(row[name]) for name in row}
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{path} is damaged ({one_line(error)}); move it away.") from error


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
