"""Progress is a bar on terminals and a line now and then elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest

COUNT = """
import sys
from unittest import mock
import logit_reg.progress
seconds = iter(float(n) for n in range(0, 10_000, {seconds}))
with mock.patch("time.monotonic", lambda: next(seconds)):
    for _ in logit_reg.progress.Progress(range(100), desc="attack", mininterval=0):
        pass
"""


@pytest.mark.parametrize(("seconds", "fewest", "most"), [(1, 1, 10), (31, 90, 110)])
def test_a_pipe_gets_a_line_every_half_a_minute(seconds, fewest, most):
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(seconds=seconds)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert fewest <= len(lines) <= most and "\r" not in done.stderr
    assert all(line.startswith("attack: ") for line in lines)
    assert all("%" in line and " of 100, " in line and "left" in line for line in lines[1:])


def test_a_terminal_gets_a_bar():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    script = "from logit_reg.progress import Progress\nfor _ in Progress(range(3)): pass"
    subprocess.run([sys.executable, "-c", script], stderr=follower, check=True)
    os.close(follower)
    drawn = b""
    while b"100%" not in drawn:
        drawn += os.read(leader, 10_000)
