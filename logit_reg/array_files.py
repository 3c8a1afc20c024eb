"""Arrays with their settings beside them: an .npz and the .json of the same name."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from logit_reg.files import read_arrays, read_json, write_arrays, write_json

_MAX_BYTES = 2**30


def write_record(path: Path | str, arrays: Mapping[str, np.ndarray], settings: dict) -> None:
    """Write arrays to `path`, an .npz, and their settings to the .json beside it."""
    write_arrays(path, arrays)
    write_json(Path(path).with_suffix(".json"), settings)


def read_record(path: Path | str, axes: Mapping[str, str]) -> tuple[dict[str, np.ndarray], dict]:
    """Read back what `write_record` wrote, from files that anyone may have written.

    Args:
        path: the .npz.
        axes: of each array that has to be there; see `check_axes`.

    Returns:
        The arrays of `axes` and the settings.

    Raises:
        ValueError: if a file is missing, damaged or larger than 1 GiB, or as `check_axes`.
    """
    arrays = read_arrays(path, max_bytes=_MAX_BYTES, names=list(axes))
    check_axes(path, arrays, axes)
    return arrays, read_json(Path(path).with_suffix(".json"))


def check_axes(
    path: Path | str,
    arrays: Mapping[str, np.ndarray],
    axes: Mapping[str, str],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Refuse arrays that do not fit together.

    Args:
        path: their file, for the message.
        arrays: by name.
        axes: a letter for each axis of an array; axes of one letter have one size.
        sizes: of some letters, where they are known; else the first array decides.

    Raises:
        ValueError: if an array holds text, or has other axes.
    """
    known = dict(sizes or {})
    for name, letters in axes.items():
        array = arrays[name]
        if array.ndim != len(letters) or array.dtype.kind == "U":
            raise ValueError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected numbers on "
                f"{len(letters)} axes."
            )
        for letter, size in zip(letters, array.shape, strict=True):
            known.setdefault(letter, size)
        expected = tuple(known[letter] for letter in letters)
        if array.shape != expected:
            raise ValueError(f"{path}: {name} has shape {array.shape}, expected {expected}.")
