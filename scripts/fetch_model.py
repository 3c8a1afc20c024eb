"""Fetch released challenge models by name, as `fetch_model.py mnist/secret`."""

import sys
from pathlib import Path

# The clone comes first, whether or not the project is installed.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from logit_reg.commands.start import start  # noqa: E402

if __name__ == "__main__":
    start("fetch_model")
