"""Train a logit-regularised network, or a baseline, on real data."""

import sys
from pathlib import Path

# The clone comes first, whether or not the project is installed.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from logit_reg.commands.start import start  # noqa: E402

if __name__ == "__main__":
    start("train")
