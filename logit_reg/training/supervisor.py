"""A small process that starts a training worker again when it, or another worker, has died.

When one worker of a `tf.distribute` cluster dies, the others learn of it about ten seconds later
and cannot join a new cluster in the same process. So each worker is the child of a supervisor,
which needs no TensorFlow and outlives it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

RESTART = 75
"""Exit status of a worker that is to be started again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit status after SIGINT or SIGTERM."""

# Names the pipe whose end tells the worker that its supervisor is gone.
_PIPE = "LOGIT_REG_SUPERVISOR_PIPE"
# A worker that dies this often in a row, each time within these seconds, will not recover.
_MAX_FAILURES = 10
_SHORT_LIFE = 600.0


def is_supervised() -> bool:
    """Whether this process was started by `supervise`."""
    return _PIPE in os.environ


def supervise(command: Sequence[str]) -> int:
    """Run a command, again whenever it is killed or asks for it, until it ends.

    SIGINT and SIGTERM are passed on; the command is not started again after them.

    Args:
        command: what to run. It goes on where it stopped when it is started again, calls
            `follow_supervisor` and exits with `RESTART` when another worker is gone.

    Returns:
        The exit status of the last run.
    """
    failures = 0
    # Only this process holds the writing end: the kernel closes it, however this process ends.
    reading_end, _ = os.pipe()
    environment = {**os.environ, _PIPE: str(reading_end)}
    while True:
        started = time.monotonic()
        # A group of its own, so that a terminal's Ctrl-C reaches it once, passed on from here.
        worker = subprocess.Popen(
            command, env=environment, pass_fds=(reading_end,), start_new_session=True
        )
        status, was_asked = _wait(worker)
        if was_asked and (status < 0 or status == RESTART):
            return INTERRUPTED
        if status >= 0 and status != RESTART:
            return status
        failures = 1 if time.monotonic() - started > _SHORT_LIFE else failures + 1
        reason = "lost the others" if status == RESTART else f"was killed by signal {-status}"
        if failures >= _MAX_FAILURES:
            print(f"this worker {reason} for the {failures}th time in a row.", file=sys.stderr)
            return 1
        print(
            f"this worker {reason}; it starts again from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(failures)


def follow_supervisor() -> None:
    """Make this process end when its supervisor does, whatever it is doing."""
    pipe = int(os.environ[_PIPE])

    def follow():
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _wait(worker: subprocess.Popen) -> tuple[int, bool]:
    """The status with which a worker ended, and whether it was asked to."""
    asked = threading.Event()

    def pass_on(number, frame):
        asked.set()
        worker.send_signal(number)

    previous = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return worker.wait(), asked.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
