"""How `scripts/NAME.py` starts a command from a clone, installed or not."""

import importlib
import os
import sys
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[1]
_OWN = ("logit_reg", "madry_compat")


def start(name: str) -> None:
    """Run a command; where a requirement is missing, say in one line what to install.

    Args:
        name: of its module in `logit_reg.commands`, such as "train".
    """
    # The clone comes first, whether or not the project is installed; in the processes that a
    # command starts, too.
    sys.path[0] = str(_CLONE)
    others = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_CLONE), *others])
    try:
        importlib.import_module(f"logit_reg.commands.{name}").run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in _OWN:
            raise
        print(
            f"error: the Python package {missing} is not installed here ({sys.executable}); "
            f"install what this project needs: pip install -e {_CLONE}",
            file=sys.stderr,
        )
        sys.exit(1)
