"""The other end of `worker.py` and `prepare.py`: starts processes and asks them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


class ContenderError(RuntimeError):
    """A process ended without an answer."""


class Worker:
    """A contender's process, waiting between its repetitions."""

    def __init__(self, request: dict, log: Path):
        """Start it; `answer` tells when it is ready.

        Args:
            request: see `worker.answers`.
            log: file for all that it prints besides.
        """
        self._log = log
        self.name = f"{request['contender']} ({request['case']['name']})"
        with _opened(log) as errors:
            # Any: its pipes are there, which types cannot say.
            self._process: Any = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_ROOT,
                env=_environment(request["threads"]),
            )

    def __enter__(self):
        """Nothing to do: it has been started."""
        return self

    def __exit__(self, *_):
        """End it, whatever it is at."""
        self._process.kill()
        self._process.communicate()

    def answer(self) -> dict:
        """Wait for the next answer.

        Raises:
            ContenderError: if the process ended instead.
        """
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ContenderError(f"{self.name} ended with status {status}; see {self._log}.")
        return json.loads(line)

    def repeat(self) -> dict:
        """Ask for a repetition and wait for its answer."""
        # If it has ended, `answer` says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer()


def prepare(request: dict, threads: int, log: Path) -> dict:
    """Run `prepare.prepare` in a process.

    Args:
        request: see there.
        threads: processors to use.
        log: file for all that it prints besides its answer.

    Raises:
        ContenderError: if it fails.
    """
    with _opened(log) as errors:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.prepare", json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=_ROOT,
            env=_environment(threads),
            check=False,
        )
    if done.returncode:
        raise ContenderError(
            f"{request['case']['name']}: network and images cannot be had; see {log}."
        )
    return json.loads(done.stdout)


def _opened(log: Path):
    """A file for what a process prints besides its answers."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("w")


def _environment(threads: int) -> dict[str, str]:
    """The same processors for every library, and no accelerator."""
    number = str(threads)
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "-1",
        "KERAS_BACKEND": "tensorflow",
        "MKL_NUM_THREADS": number,
        "OMP_NUM_THREADS": number,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_NUM_INTEROP_THREADS": number,
        "TF_NUM_INTRAOP_THREADS": number,
    }
