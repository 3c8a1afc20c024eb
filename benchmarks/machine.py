"""The machine: whether it is idle, and what it is."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from logit_reg.experiments.provenance import commit

# Columns of /proc/stat: user nice system idle iowait irq softirq steal; guests are part of user.
_NUM_COLUMNS = 8
_IDLE_COLUMNS = (3, 4)

_PACKAGES = (
    "logit-reg",
    "tensorflow",
    "keras",
    "numpy",
    "torch",
    "foolbox",
    "adversarial-robustness-toolbox",
    "cleverhans",
)


class BusyError(RuntimeError):
    """Other work kept the machine busy for longer than we wait."""


def busy_processors(before: str, after: str) -> float:
    """How many processors were at work between two looks at /proc/stat.

    Args:
        before: its content at the first look.
        after: its content at the second look.

    Returns:
        At least 0; time stolen by other guests of the host counts as work.
    """
    columns = zip(_columns(before), _columns(after), strict=True)
    ticks = [later - earlier for earlier, later in columns]
    idle = sum(ticks[column] for column in _IDLE_COLUMNS)
    num_processors = sum(line[:3] == "cpu" and line[3:4].isdigit() for line in after.splitlines())
    return num_processors * (1 - idle / max(sum(ticks), 1))


def measure_busy(seconds: float = 1.0) -> float:
    """How many processors are at work now, over some seconds."""
    stat = Path("/proc/stat")
    before = stat.read_text()
    time.sleep(seconds)
    return busy_processors(before, stat.read_text())


def wait_until_idle(
    max_busy: float,
    timeout: float,
    *,
    measure: Callable[[], float] = measure_busy,
    say: Callable[[str], None] = print,
) -> float:
    """Wait until other work leaves the machine alone: it slows some libraries more than others.

    Args:
        max_busy: most processors that others may keep busy.
        timeout: seconds to wait at most.
        measure: tells how many are busy; takes its time.
        say: gets a line when waiting begins.

    Returns:
        How many processors were busy in the end.

    Raises:
        BusyError: if the machine stays busy.
    """
    deadline = time.monotonic() + timeout
    has_said = False
    while (busy := measure()) > max_busy:
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{busy:.2f} processors are still busy with other work after {timeout:.0f} s, "
                f"--max_busy={max_busy:g} are allowed: end that work, wait longer with "
                f"--idle_timeout, or measure what nobody can compare with a larger --max_busy."
            )
        if not has_said:
            say(
                f"waiting: {busy:.2f} processors are busy with other work; measuring goes on at "
                f"{max_busy:g}, or gives up after {timeout:.0f} s"
            )
            has_said = True
    return busy


def provenance() -> dict:
    """What the numbers depend on besides settings: machine, versions, commit."""
    return {
        "processor": _line_of("/proc/cpuinfo", "model name"),
        "num_processors": os.cpu_count(),
        "usable_processors": len(os.sched_getaffinity(0)),
        "memory": _line_of("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit(),
    }


def _columns(stat: str) -> list[int]:
    return [int(ticks) for ticks in stat.split("\n", 1)[0].split()[1 : 1 + _NUM_COLUMNS]]


def _line_of(path, key):
    lines = Path(path).read_text().splitlines()
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
    return values[0] if values else platform.machine()


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
