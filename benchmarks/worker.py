"""One contender in a process of its own.

Takes a request in JSON on the command line and answers with a line of JSON on standard output:
first how it got ready, then, for each line on standard input, one repetition.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS
from benchmarks.problem import Problem


def answers(request: dict, turns):
    """Get ready, then do a repetition for each turn.

    Args:
        request: case, contender, folder, threads and autoattack_dir.
        turns: an iterable; each item asks for a repetition.

    Yields:
        {"seconds"} of getting ready, then of each repetition {"seconds", "peak_bytes"} and what it
        found; {"missing": reason} instead where a library is not there.
    """
    case = Case(**request["case"])
    problem = Problem(
        case, Path(request["folder"]), request["threads"], request.get("autoattack_dir")
    )
    contender = CONTENDERS[case.kind][request["contender"]]
    started = time.perf_counter()
    try:
        repetition = contender(problem)
    except ImportError as error:
        yield {"missing": str(error)}
        return
    yield {"seconds": time.perf_counter() - started}
    for _ in turns:
        started = time.perf_counter()
        outcome = repetition()
        elapsed = time.perf_counter() - started
        seconds = elapsed if outcome.seconds is None else outcome.seconds
        found = {
            name: None if verdicts is None else verdicts.tolist()
            for name, verdicts in dataclasses.asdict(outcome).items()
            if name != "seconds"
        }
        yield {"seconds": seconds, "peak_bytes": peak_bytes(), **found}


def peak_bytes() -> int:
    """Most memory that this process, or a command that it ran, has held at once."""
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # Of this process getrusage counts its parent before the exec, too.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return max(children, 1024 * int(line.split()[1]))
    raise OSError("/proc/self/status has no VmHWM: peak memory cannot be read here.")


if __name__ == "__main__":
    # Libraries print what they like; only answers go to standard output.
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in answers(json.loads(sys.argv[1]), sys.stdin):
        print(json.dumps(answer), file=answer_file, flush=True)
