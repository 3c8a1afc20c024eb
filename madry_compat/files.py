"""Files that appear whole or not at all, and the folder for those that can be made again."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name in its folder, fsyncs it and renames it.

    Args:
        path: the file to write; what was there stays untouched if writing fails.
        write: called once with the open binary file.

    Raises:
        OSError: if the folder does not exist or cannot be written, with the file's name.
    """
    path = Path(path)
    # Made by open, not by tempfile: the file gets the permissions of any other new file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror or error}); what was there stays."
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error
    finally:
        # Of a folder that has vanished there is nothing to remove.
        with contextlib.suppress(OSError):
            temporary.unlink()


def default_cache_dir() -> Path:
    """$LOGIT_REG_CACHE, else $XDG_CACHE_HOME/logit_reg, else ~/.cache/logit_reg."""
    if own := os.environ.get("LOGIT_REG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "logit_reg"


def one_line(error: BaseException) -> str:
    """The first line of what an error says, without what a file or a server may smuggle in.

    TensorFlow's names of nodes are left out.
    """
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error)[:1000]).strip()
    line = (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return line if line.isprintable() else ascii(line)
