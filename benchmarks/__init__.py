"""Speed beside the peers, in one run: `make bench`, or `python -m benchmarks.run --help`.

Reading order: `cases.py` (what is measured), `contenders.py` (by whom), `worker.py` (one contender
in its own process), `run.py` (takes turns, checks, reports).
"""
