"""Sweeps: a grid of runs, each a chain of commands in processes of its own, here or on Ray."""

import collections
import concurrent.futures
import csv
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from logit_reg.files import read_json, write_json
from logit_reg.text_columns import aligned

BAD_INPUT = 2
"""Exit status of a command that would fail the same way again."""

_FAILURE = 1
_RECORD = "sweep.json"
_EARLIER = "earlier"
_LOG = "sweep.log"
# A command whose sweep is killed stops too, with the signal on which training saves its state.
_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a run."""

    name: str
    arguments: tuple[str, ...]
    """Of the Python interpreter, such as ("-m", "logit_reg.commands.train", "--beta=2")."""
    product: str
    """File in the run's folder that it leaves; without it the step is not done."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep: steps that follow each other; the first that fails ends it."""

    name: str
    folder: Path
    """Absolute; gets `sweep.log`, what the commands print, and `sweep.json`, what is done."""
    working_directory: Path
    """Absolute; where the commands run."""
    steps: tuple[Step, ...]
    """The first makes what the others look at: when it runs again, so do they."""


Runner = Callable[[Sequence[Job]], Iterator[tuple[str, int] | None]]
"""Runs jobs; yields the name and exit status of each as it ends, and None now and then."""


# A comma with no "]]" after it, unless a "[[" comes first.
_BETWEEN_VALUES = re.compile(r",(?!(?:(?!\[\[).)*\]\])")


def expand_grid(text: str) -> list[dict[str, str]]:
    """The points of a grid such as "beta=0.5,1,2;sigma=0,0.3".

    Args:
        text: settings separated by semicolons, values by commas; those in [[...]], a schedule, do
            not separate.

    Returns:
        A dict for each combination, the last setting changing fastest; one empty dict for "".

    Raises:
        ValueError: if it does not look like that, or names a setting or a value twice.
    """
    axes: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"(\w+)\s*=(.+)", part)
        values = [value.strip() for value in _BETWEEN_VALUES.split(match[2])] if match else []
        if match is None or not all(values):
            raise ValueError(f"a grid looks like beta=0.5,1,2;sigma=0,0.3; got {part!r}.")
        if match[1] in axes or len(set(values)) < len(values):
            raise ValueError(f"a grid names each setting and each value once; got {text!r}.")
        axes[match[1]] = values
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def point_name(point: dict[str, str]) -> str:
    """Name of a folder for a point of a grid: "beta-0.5-sigma-0"; "run" for the empty one."""
    words = (word for pair in point.items() for word in pair)
    return re.sub(r"[^\w.+-]+", "_", "-".join(words)) or "run"


def run_job(job: Job) -> int:
    """Run the steps of a job that are not done yet.

    When the first one has to run again, what the others made of its earlier product moves to
    `earlier`.

    Returns:
        0, or the exit status of the step that failed.
    """
    record = job.folder / _RECORD
    done = _done(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    for i, step in enumerate(job.steps):
        arguments = list(step.arguments)
        if _is_done(job, step, done):
            continue
        if i == 0:
            _move_aside(job, [later for later in job.steps[1:] if later.name in done])
        done = {} if i == 0 else {k: v for k, v in done.items() if k != step.name}
        write_json(record, done)
        with (job.folder / _LOG).open("ab") as log:
            status = subprocess.call(
                [sys.executable, "-c", _WITH_PARENT, *arguments],
                cwd=job.working_directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if status:
            return status
        done[step.name] = arguments
        write_json(record, done)
    return 0


def pending_steps(job: Job) -> list[Step]:
    """The steps of a job that are not done yet.

    A step is done if `sweep.json` holds it with the same arguments and its product is there; no
    step is when the first one is not.
    """
    done = _done(job)
    pending = [step for step in job.steps if not _is_done(job, step, done)]
    return list(job.steps) if job.steps[0] in pending else pending


def run_local(jobs: Sequence[Job], *, num_parallel: int) -> Iterator[tuple[str, int] | None]:
    """A `Runner` on this machine, with so many jobs at a time."""
    with concurrent.futures.ThreadPoolExecutor(num_parallel) as pool:
        waiting = {pool.submit(run_job, job): job.name for job in jobs}
        try:
            while waiting:
                finished, _ = concurrent.futures.wait(
                    waiting, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED
                )
                yield from ((waiting.pop(future), future.result()) for future in finished)
                yield None
        finally:
            # Ctrl-C reaches the running commands too; those that wait shall not begin.
            pool.shutdown(wait=False, cancel_futures=True)


def run_on_ray(
    jobs: Sequence[Job], *, num_cpus: float, num_gpus: float
) -> Iterator[tuple[str, int] | None]:
    """A `Runner` on a Ray cluster whose machines share the folders and have this installed.

    Args:
        jobs: to run.
        num_cpus: cores that Ray reserves for a job.
        num_gpus: GPUs that Ray reserves for a job and shows it.

    Raises:
        ValueError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--runner=ray needs Ray; install it with pip install '.[ray]'.") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # Ray itself starts a job again whose machine died.
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_run_job_on_ray)
    waiting = {task.remote(job): job.name for job in jobs}
    try:
        while waiting:
            for reference in ray.wait(list(waiting), timeout=1)[0]:
                name = waiting.pop(reference)
                try:
                    yield name, ray.get(reference)
                except ray.exceptions.RayError:
                    yield name, _FAILURE
            yield None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def run_sweep(
    jobs: Sequence[Job],
    runner: Runner,
    *,
    retries: int,
    show: Callable[[dict[str, int]], None] = lambda statuses: None,
) -> dict[str, int]:
    """Run all jobs; those that failed are tried again once the others are through.

    Args:
        jobs: with different names.
        runner: runs them.
        retries: how often a job that failed is tried again; bad input never is.
        show: called with the statuses so far, about once a second.

    Returns:
        The last exit status of each job by name.
    """
    for job in jobs:
        (job.folder / _LOG).unlink(missing_ok=True)
    statuses: dict[str, int] = {}
    pending = list(jobs)
    for _ in range(1 + retries):
        for finished in runner(pending):
            statuses.update([finished] if finished else [])
            show(statuses)
        pending = [job for job in pending if statuses[job.name] not in (0, BAD_INPUT)]
        if not pending:
            break
    return statuses


def sweep_lines(jobs: Sequence[Job], statuses: dict[str, int], max_lines: int = 40) -> list[str]:
    """The state of a sweep as lines for a terminal, read from the folders of its runs.

    Args:
        jobs: of the sweep.
        statuses: exit statuses so far.
        max_lines: at least 4; beyond it finished runs are left out, then waiting ones.
    """
    rows = [(_state(job, statuses), job) for job in jobs]
    counts = collections.Counter(state.split()[0] for state, _ in rows)
    order = ("running", "failed", "waiting", "done")
    shown = sorted(rows, key=lambda row: order.index(row[0].split()[0]))[: max_lines - 2]
    cells = [("run", "state", "step", "xent", "accuracy", "robust accuracy")]
    cells += [(job.name, state, *_progress(job)) for state, job in rows if (state, job) in shown]
    lines = aligned(cells, num_left=len(cells[0]))
    total = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    return [*lines, f"{len(rows)} runs: {total}"]


class LiveTable:
    """The state of the sweep: redrawn on a terminal, else a line for each run that ends."""

    def __init__(self, jobs: Sequence[Job], *, may_redraw: bool = True):
        """A table of some jobs; redrawn where it may be and somebody sees it."""
        self.is_live = may_redraw and sys.stdout.isatty()
        self._jobs = jobs
        self._height = 0
        self._known: dict[str, int] = {}

    def show(self, statuses: dict[str, int]) -> None:
        """Show the exit statuses so far."""
        if not self.is_live:
            for name, status in statuses.items():
                if self._known.get(name) != status:
                    print(f"{name}: {f'failed ({status})' if status else 'done'}", flush=True)
            self._known = dict(statuses)
            return
        size = shutil.get_terminal_size()
        lines = sweep_lines(self._jobs, statuses, max(size.lines - 1, 4))
        # Back to the first line, each line cleared to its end, then everything below.
        up = f"\x1b[{self._height}A" if self._height else ""
        drawn = "".join(f"{line[: size.columns - 1]}\x1b[K\n" for line in lines)
        print(f"{up}{drawn}\x1b[J", end="", flush=True)
        self._height = len(lines)


def last_words(job: Job) -> str:
    """The last line that a job's commands printed."""
    path = job.folder / _LOG
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _done(job):
    record = job.folder / _RECORD
    return read_json(record) if record.exists() else {}


def _is_done(job, step, done):
    return done.get(step.name) == list(step.arguments) and (job.folder / step.product).exists()


def _move_aside(job, steps):
    for step in steps:
        folder = (job.folder / step.product).parent
        if folder != job.folder and folder.exists():
            earlier = job.folder / _EARLIER
            earlier.mkdir(exist_ok=True)
            number = 1 + sum(1 for _ in earlier.glob(f"{folder.name}-*"))
            folder.rename(earlier / f"{folder.name}-{number}")


def _run_job_on_ray(job):
    # Ray sets it for its tasks; a run shall compute what it computes without Ray.
    os.environ.pop("OMP_NUM_THREADS", None)
    return run_job(job)


def _state(job, statuses):
    if job.name in statuses:
        status = statuses[job.name]
        return f"failed ({status})" if status else "done"
    return "running" if (job.folder / _LOG).exists() else "waiting"


def _progress(job):
    """Step, cross-entropy, accuracy in training and robust accuracy of what is finished."""
    step = xent = accuracy = "–"
    log = job.folder / "log.csv"
    if log.exists():
        with log.open(newline="") as file:
            last = collections.deque(csv.DictReader(file), maxlen=1)
        # A row that is being written has no last column yet.
        if last and last[0].get("mean_logit_norm"):
            row = last[0]
            step, xent = row["step"], f"{float(row['xent']):.3f}"
            accuracy = f"{100 * float(row['accuracy']):.1f}"
    found = []
    for evaluation in (step.name for step in job.steps):
        path = job.folder / evaluation / "result.json"
        if path.exists():
            found.append(f"{evaluation} {100 * read_json(path)['robust_accuracy']:.1f}")
    return step, xent, accuracy, ", ".join(found) or "–"
