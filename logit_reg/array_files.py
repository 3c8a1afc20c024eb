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


def read_record(path: Path | str, ranks: Mapping[str, int]) -> tuple[dict[str, np.ndarray], dict]:
    """Read back what `write_record` wrote, from files that anyone may have written.

    Args:
        path: the .npz.
        ranks: number of axes of each array that has to be there.

    Returns:
        The arrays of `ranks` and the settings.

    Raises:
        ValueError: if a file is missing, damaged or larger than 1 GiB, or an array holds text or
            has another number of axes.
    """
    arrays = read_arrays(path, max_bytes=_MAX_BYTES, names=list(ranks))
    for name, rank in ranks.items():
        if arrays[name].ndim != rank or arrays[name].dtype.kind == "U":
            raise ValueError(
                f"{path}: {name} is {arrays[name].dtype} of shape {arrays[name].shape}, expected "
                f"numbers on {rank} axes."
            )
    return arrays, read_json(Path(path).with_suffix(".json"))
