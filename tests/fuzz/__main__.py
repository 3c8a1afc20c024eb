"""Fuzz the readers of untrusted files: `python -m fuzz [READER ...]` in the folder tests.

--inputs=10000 for each reader, --seed=0, --start=0 (number of the first input), --folder=FOLDER.
"""

import argparse
import concurrent.futures
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from fuzz.engine import fuzz, print_time, work
from fuzz.readers import READERS


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, folder, *numbers = sys.argv[2:]
        work(name, Path(folder), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", default=[], metavar="READER", help=", ".join(READERS))
    parser.add_argument("--inputs", type=int, default=int(os.environ.get("FUZZ_INPUTS", 10_000)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz-results"))
    parser.add_argument("--processes", type=int, default=2)
    flags = parser.parse_args()
    unknown = set(flags.readers) - set(READERS)
    if unknown:
        parser.error(f"no reader {', '.join(sorted(unknown))}; known: {', '.join(READERS)}")
    folder = flags.folder.resolve()

    def run(name):
        return fuzz(name, flags.inputs, folder / name, seed=flags.seed, start=flags.start)

    began = time.monotonic()
    num_failures = 0
    with concurrent.futures.ThreadPoolExecutor(flags.processes) as pool:
        for report in pool.map(run, flags.readers or READERS):
            print(report, *report.failures, sep="\n  ", flush=True)
            num_failures += len(report.failures)
    print(f"{num_failures} failures in {print_time(began)}")
    sys.exit(num_failures > 0)


if __name__ == "__main__":
    main()
