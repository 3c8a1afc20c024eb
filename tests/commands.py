"""The commands as a user types them, each in a process of its own.

Importing TensorFlow takes longer than most of these commands' work. Python's fork server imports
it once, before it has a thread or a device, and every command is a fork of that process.
"""

import functools
import gc
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TFDS_DATA_DIR": "", "HOME": "/none"}

_SERVER = multiprocessing.get_context("forkserver")
# No module of `logit_reg.commands`: each command defines its own flags.
_SERVER.set_forkserver_preload(
    [
        "tensorflow",
        "keras",
        "tensorflow_datasets",
        "matplotlib.figure",
        "logit_reg.experiments.measure",
        "logit_reg.experiments.runs",
    ]
)


def command(
    script: str, *flags: object, cwd: Path, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Run `python scripts/<script>.py` in the folder `cwd`.

    Returns:
        The finished process, with its exit status and its text output.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; the process is killed.
    """
    arguments = [str(ROOT / "scripts" / f"{script}.py"), *map(str, flags)]
    environment = {**os.environ, **ENVIRONMENT, "LOGIT_REG_CACHE": str(Path(cwd) / "cache")}
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = fork(_run, arguments, str(cwd), environment, out.name, err.name)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read(), err.read())
        return subprocess.CompletedProcess(
            arguments, process.exitcode, out.read().decode(), err.read().decode()
        )


def fork(function, *arguments):
    """Start a function of a test module in a process of its own; returns the process.

    As `subprocess.Popen`, but TensorFlow is imported already.
    """
    process = _SERVER.Process(target=_begin, args=(function, *arguments))
    process.start()
    return process


def _begin(function, *arguments) -> None:
    # A collection has nothing to look for among what the server imported.
    gc.freeze()
    function(*arguments)


def fork_command(script: str, *flags: object, cwd: Path):
    """Start a command, its output to files in `cwd`; returns the process, to be killed."""
    arguments = [str(ROOT / "scripts" / f"{script}.py"), *map(str, flags)]
    environment = {**os.environ, **ENVIRONMENT, "LOGIT_REG_CACHE": str(Path(cwd) / "cache")}
    out, err = (str(Path(cwd) / f"{script}.{name}") for name in ("out", "err"))
    return fork(_run, arguments, str(cwd), environment, out, err)


def _run(arguments, cwd, environment, out, err) -> None:
    """What the fork does: become the command."""
    for name, descriptor in ((out, 1), (err, 2)):
        # Written from C++ too, hence below Python's own files.
        os.dup2(os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path[0] = str(ROOT / "scripts")
    runpy.run_path(arguments[0], run_name="__main__")


def assert_one_line_error(
    process: subprocess.CompletedProcess, *words: str, status: int = 2
) -> None:
    """The command ended with this status and one line, without a traceback, that has the words.

    Its advice names flags that the command has.
    """
    lines = process.stderr.strip().splitlines()
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    assert lines[-1].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[-1], lines[-1]
    assert_flags_exist(Path(process.args[0]).stem, lines[-1])


def assert_flags_exist(script: str, message: str) -> None:
    """A message names no flag that the command does not have."""
    flags = flags_of(script) | {"help", "name"}
    if script == "sweep":
        flags |= flags_of("eval_challenge")
    unknown = set(re.findall(r"(?<!\S)[(\"'\x60]*--(?:no)?(\w+)", message)) - flags
    unknown = {name for name in unknown if f"no{name}" not in flags}
    assert not unknown, f"{script} has no {unknown}: {message}"


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a command's help lists."""
    names = command(script, "--help", cwd=Path(tempfile.gettempdir())).stdout
    return frozenset(re.findall(r"^  --(?:\[no\])?(\w+)", names, re.MULTILINE))
