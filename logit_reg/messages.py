"""What the user is told: notices on standard error, and mistakes in one line."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that makes numbers unreliable or an attack incomplete."""

    name: str
    """"not_finite", "probabilities", "decisions", "randomised", "frozen", "not_randomised",
    "repeated_passes", "unconfirmed", "dynamic", "zero_gradients", "square_lowers", "num_targets"
    or "num_classes"."""
    message: str
    """One line: what was seen, what it may mean and what to do."""
    value: float
    """The number behind it."""


class UsageError(ValueError):
    """The user's mistake; the message says what came, what was expected and what to do."""

    def __init__(self, message: str, advice: Mapping[str, str] | None = None):
        """A mistake, and what to do about it where that depends on the command.

        Args:
            message: one line.
            advice: by the flag that it rests on; a command adds what its own flags allow.
        """
        super().__init__(message)
        self.advice = advice or {}


def notice(message: str) -> None:
    """Tell the user something on standard error."""
    print(message, file=sys.stderr, flush=True)


def tell(findings: Iterable[Finding]) -> None:
    """Tell the user what may mislead about the numbers to come."""
    for finding in findings:
        notice(f"notice: {finding.message}")


def existing_path(name: str, value: str) -> Path:
    """A path that a flag names, checked to exist.

    Raises:
        UsageError: if it does not.
    """
    path = Path(value).expanduser()
    if not path.exists():
        raise UsageError(f"--{name}={value}: no such file or folder.")
    return path


def existing_folder(name: str, value: str) -> Path:
    """A folder that a flag names, checked to be one.

    Raises:
        UsageError: if it does not exist or is a file.
    """
    path = existing_path(name, value)
    if not path.is_dir():
        raise UsageError(f"--{name}={value}: this is a file, expected a folder.")
    return path
