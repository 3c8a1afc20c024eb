"""The state of an unfinished training run, as one verified file a checkpoint."""

import json
import logging
import zipfile
from pathlib import Path

import numpy as np

from logit_reg.files import write_arrays

_LOGGER = logging.getLogger(__name__)
_META = "meta"


def save_state(model_dir: Path, step: int, variables, meta: dict) -> None:
    """Write `state-STEP.npz`, whole or not at all.

    Args:
        model_dir: folder of the run.
        step: number of finished training steps.
        variables: Keras variables; their order and names identify them (a path contains the
            optimizer's name, which Keras numbers anew in every process).
        meta: further JSON values to keep.
    """
    arrays = {_META: np.array(json.dumps({"step": step, **meta}))}
    for number, variable in enumerate(variables):
        arrays[f"{number:04d}/{variable.name}"] = variable.numpy()
    write_arrays(state_path(model_dir, step), arrays)


def restore_newest_state(model_dir: Path, variables) -> dict | None:
    """Fill the variables from the newest readable state.

    A damaged state is passed over with a notice, in favour of the one before.

    Args:
        model_dir: folder of the run.
        variables: Keras variables, as they were saved.

    Returns:
        The saved meta values with "step", or None if there is no state.

    Raises:
        ValueError: if there are states and none can be read: starting anew would overwrite them.
    """
    for step in sorted(saved_steps(model_dir), reverse=True):
        path = state_path(model_dir, step)
        try:
            meta, arrays = _read(path, variables)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            _LOGGER.warning("%s is damaged (%s); trying the one before.", path, error)
            continue
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        return meta
    if saved_steps(model_dir):
        raise ValueError(
            f"{model_dir}: none of its state-*.npz can be read; remove them to start anew, or "
            f"choose another --model_dir."
        )
    return None


def prune_states(model_dir: Path, *, max_to_keep: int, keep=()) -> None:
    """Remove all but the newest states and those of the steps in `keep`."""
    for step in sorted(saved_steps(model_dir), reverse=True)[max_to_keep:]:
        if step not in keep:
            state_path(model_dir, step).unlink(missing_ok=True)


def saved_steps(model_dir: Path) -> list[int]:
    """Steps of the states in a folder."""
    names = (path.stem.removeprefix("state-") for path in Path(model_dir).glob("state-*.npz"))
    return [int(name) for name in names if name.isdigit()]


def state_path(model_dir: Path, step: int) -> Path:
    """Where the state of a step stands."""
    return Path(model_dir) / f"state-{step}.npz"


def _read(path, variables):
    # Every member's checksum is verified before anything is assigned.
    with np.load(path, allow_pickle=False) as saved:
        meta = json.loads(str(saved[_META]))
        arrays = []
        for number, variable in enumerate(variables):
            array = saved[f"{number:04d}/{variable.name}"]
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"{variable.path} has shape {array.shape}, expected {tuple(variable.shape)}"
                )
            arrays.append(array)
    return meta, arrays
