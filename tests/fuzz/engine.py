"""Runs a reader on damaged files in a process of its own, with limits.

A worker reads one input after the other. Whatever a reader does that it must not (another
exception, no or a long or an unprintable message, more than 2 s of processor time, more than 2 GB,
a file or a process outside) is reported with the seed that makes the input again; a worker that
dies or hangs is reported and replaced.
"""

import dataclasses
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fuzz.mutations import mutate_bytes
from fuzz.readers import READERS, Reader, files_of, is_past_checks

MAX_SECONDS = 2.0
MAX_BYTES = 2 * 2**30
MAX_MESSAGE = 10_000
# Wall-clock time after which a worker counts as hanging, on however busy a machine.
_HANGS_AFTER = 60.0
_STRUCTURED = 0.75
_MAX_FAILURES = 20


@dataclasses.dataclass
class Report:
    """What came of the inputs of a reader."""

    reader: str
    inputs: int = 0
    accepted: int = 0
    past_checks: int = 0
    slowest: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.past_checks / max(1, self.inputs)
        return (
            f"{self.reader:8} {self.inputs:6} inputs, {share:3.0f}% past magic bytes, directories "
            f"and checksums, {self.accepted:5} read, slowest {self.slowest:.2f} s, "
            f"{len(self.failures)} failures"
        )


def fuzz(name: str, inputs: int, folder: Path, *, seed: int = 0, start: int = 0) -> Report:
    """Run a reader on damaged files.

    Args:
        name: of the reader.
        inputs: how many; a slow reader takes its share of them.
        folder: for the files; offending inputs stay in `folder/failures`.
        seed: with the number of an input it decides what is damaged.
        start: number of the first input.
    """
    report = Report(name)
    stop = start + max(1, round(inputs * READERS[name].share))
    while start < stop and len(report.failures) < _MAX_FAILURES:
        start = _run_worker(report, folder, seed, start, stop)
    return report


def _run_worker(report, folder, seed, start, stop):
    """Let a worker run from `start`; returns the number to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fuzz", "--worker", report.reader]
    command += [str(folder), str(seed), str(start), str(stop)]
    with (folder / "stderr.txt").open("w") as stderr:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=Path(__file__).parents[1]
        )
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True).start()
    current, is_ready = start, False
    while True:
        try:
            line = lines.get(timeout=_HANGS_AFTER if is_ready else 600)
        except queue.Empty:
            worker.kill()
            worker.wait()
            _fail(report, folder, seed, current, "hangs")
            return current + 1
        if not line:
            break
        is_ready = True
        record = json.loads(line)
        current = record["number"]
        if "outcome" not in record:
            continue
        report.inputs += 1
        report.accepted += record["outcome"] == "read"
        report.past_checks += record["past_checks"]
        report.slowest = max(report.slowest, record["seconds"])
        if record["outcome"] not in ("read", "refused"):
            _fail(report, folder, seed, current, record["outcome"])
        current += 1
        if len(report.failures) >= _MAX_FAILURES:
            worker.kill()
            worker.wait()
            return stop
    if worker.wait() != 0:
        tail = (folder / "stderr.txt").read_text(errors="replace")[-500:]
        if not is_ready:
            raise RuntimeError(f"the worker of {report.reader} does not start: {tail}")
        report.inputs += 1
        _fail(report, folder, seed, current, f"ends the process ({worker.returncode}): {tail}")
        return current + 1
    return stop


def _forward(stream, lines):
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put("")


def _fail(report, folder, seed, number, problem):
    kept = folder / "failures" / f"{report.reader}-{seed}-{number}"
    if not kept.exists():
        make_input(READERS[report.reader], folder / "seeds" / report.reader, kept, seed, number)
    report.failures.append(f"{report.reader} --seed={seed} --start={number}: {problem} ({kept})")


def make_input(reader: Reader, seeds: Path, target: Path, seed: int, number: int) -> Path:
    """Write a damaged copy of the seeds; returns the file that was damaged."""
    rng = random.Random(f"{reader.name}-{seed}-{number}")
    # Files that stay as they are are links: a checkpoint has 40 MB.
    shutil.copytree(seeds, target, copy_function=os.link)
    path, mutate = rng.choice(files_of(reader, seeds))
    content = path.read_bytes()
    damaged = mutate(rng, content) if rng.random() < _STRUCTURED else mutate_bytes(rng, content)
    victim = target / path.relative_to(seeds)
    victim.unlink()
    victim.write_bytes(damaged)
    return victim


def work(name: str, folder: Path, seed: int, start: int, stop: int) -> None:
    """What a worker does: one line of JSON before and after each input."""
    reader = READERS[name]
    home, seeds = folder / "home", folder / "seeds" / name
    home.mkdir(exist_ok=True)
    os.environ["HOME"] = os.environ["LOGIT_REG_CACHE"] = str(home)
    os.environ["TFDS_DATA_DIR"] = str(home)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    (folder / "tmp").mkdir(exist_ok=True)
    if not seeds.exists():
        seeds.mkdir(parents=True)
        reader.seed(seeds)
    os.chdir(home)
    # The first time everything is imported, and the second nothing more.
    for _ in range(2):
        _fresh(folder / "tmp", folder / "out")
        reader.read(seeds, folder / "out")
    known = _listing(home)
    guard = _Guard([folder / "tmp", folder / "out"])
    _limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(start, stop):
        _fresh(folder / "tmp", folder / "out", folder / "input")
        (folder / "input").rmdir()
        victim = make_input(reader, seeds, folder / "input", seed, number)
        record = {"number": number}
        print(json.dumps(record), flush=True)
        seconds, problem = _read(reader, folder, guard)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if seconds > MAX_SECONDS:
            problem = f"takes {seconds:.1f} s"
        elif grown > MAX_BYTES:
            problem = f"takes {grown >> 20} MiB"
        elif changed := sorted(_listing(home) ^ known):
            problem = f"changes {changed[:3]}"
        elif any((folder / "tmp").iterdir()):
            problem = "leaves temporary files behind"
        past_checks = is_past_checks(victim)
        record |= {"outcome": problem, "seconds": seconds, "past_checks": past_checks}
        print(json.dumps(record), flush=True)


def _read(reader, folder, guard):
    """Processor seconds, of children too, and "read", "refused" or what was wrong."""
    began = _processor_seconds()
    problem = "read"
    guard.violation = None
    guard.is_active = True
    try:
        reader.read(folder / "input", folder / "out")
    except reader.refusals as error:
        message = " ".join(str(error).split())
        problem = "refused"
        if isinstance(error, MemoryError) or not message or len(message) > MAX_MESSAGE:
            problem = f"a message of {len(message)} characters: {message[:200]!r}"
        elif not message.isprintable():
            problem = f"an unprintable message: {message[:200]!r}"
    except BaseException as error:
        problem = f"raises {type(error).__name__}: {str(error)[:300]}"
    guard.is_active = False
    return _processor_seconds() - began, guard.violation or problem


def _processor_seconds():
    usage = os.times()
    return usage.user + usage.system + usage.children_user + usage.children_system


def _listing(folder):
    """What lies in a folder, with sizes and times."""
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {(str(path), status.st_size, status.st_mtime_ns) for path, status in found}


def _fresh(*folders):
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _limit_memory():
    """2 GB more than the process has now; allocations beyond fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Guard:
    """Notices what Python is asked to write, run or connect to outside of the allowed folders."""

    _CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
    _CHANGES += ("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")
    _RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "os.fork")

    def __init__(self, folders):
        self._folders = [folder.resolve() for folder in folders]
        self.violation = None
        self.is_active = False
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.is_active:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and not self._is_inside(path):
                self.violation = f"writes {path!r}"
        # With a folder's descriptor: inside a shutil.rmtree, which was looked at.
        elif event in self._CHANGES and not self._is_inside(arguments[0]):
            self.violation = f"{event} {arguments[0]!r}"
        elif event in self._RUNS:
            self.violation = f"{event} {arguments!r}"
        # The one process that a reader starts, to look into HDF5 files.
        elif event == "subprocess.Popen" and "weights_copy" not in str(arguments[1]):
            self.violation = f"runs {arguments[1]!r}"

    def _is_inside(self, path):
        if isinstance(path, int) or str(path) == os.devnull:
            return True
        # Relative to a descriptor, inside a shutil.rmtree that was looked at. A reader has no
        # other use for a relative path: what it is given is absolute.
        path = Path(os.fsdecode(path))
        if not path.is_absolute():
            return not os.path.lexists(path)
        return any(path.resolve().is_relative_to(folder) for folder in self._folders)


def print_time(began: float) -> str:
    """Minutes and seconds since a time."""
    return "{:.0f} min {:02.0f} s".format(*divmod(time.monotonic() - began, 60))
