"""The state of an unfinished training run, as one verified file a checkpoint."""

import json
import logging
import math
from pathlib import Path

import numpy as np

from logit_reg.files import read_arrays, write_arrays

_LOGGER = logging.getLogger(__name__)
_META = "meta"
_MAX_META_BYTES = 2**20
_LARGEST_ITEM = 8
# What a process that was killed while it wrote a checkpoint leaves behind, each as large as one.
_LEFTOVERS = (".state-*.npz", ".model.*.keras", ".checkpoint-*.partial.*")


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
            meta, arrays = _read(path, step, variables)
        except ValueError as error:
            _LOGGER.warning("%s is damaged (%s); trying the one before.", path, error)
            continue
        _assign(variables, arrays)
        return meta
    if saved_steps(model_dir):
        raise ValueError(
            f"{model_dir}: none of its state-*.npz can be read; remove them to start anew, or "
            f"choose another --model_dir."
        )
    return None


def restore_state(model_dir: Path, step: int, variables) -> None:
    """Fill the variables from the state of a step.

    Raises:
        ValueError: if it is missing or damaged; nothing is assigned then.
    """
    path = state_path(model_dir, step)
    try:
        _, arrays = _read(path, step, variables)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    _assign(variables, arrays)


def prune_states(model_dir: Path, *, max_to_keep: int, keep=()) -> list[int]:
    """Remove all but the newest states and those of the steps in `keep`.

    The newest are those of the largest steps: a clock may have been set back.

    Returns:
        The steps whose states were removed.
    """
    old = sorted(saved_steps(model_dir), reverse=True)[max_to_keep:]
    removed = [step for step in old if step not in keep]
    for step in removed:
        state_path(model_dir, step).unlink(missing_ok=True)
    return removed


def remove_later_states(model_dir: Path, step: int) -> list[int]:
    """Remove the states of all steps after one, so that it is the newest.

    Returns:
        The steps whose states were removed.
    """
    removed = sorted(later for later in saved_steps(model_dir) if later > step)
    for later in reversed(removed):
        state_path(model_dir, later).unlink(missing_ok=True)
    return removed


def remove_leftovers(model_dir: Path) -> None:
    """Remove the partial files of a killed process; the caller holds the folder's lock."""
    for pattern in _LEFTOVERS:
        for path in Path(model_dir).glob(pattern):
            path.unlink(missing_ok=True)


def saved_steps(model_dir: Path) -> list[int]:
    """Steps of the states in a folder."""
    names = (path.stem.removeprefix("state-") for path in Path(model_dir).glob("state-*.npz"))
    return [int(name) for name in names if name.isdecimal()]


def state_path(model_dir: Path, step: int) -> Path:
    """Where the state of a step stands."""
    return Path(model_dir) / f"state-{step}.npz"


def _assign(variables, arrays):
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _read(path, step, variables):
    # Every member's checksum is verified before anything is assigned.
    names = [f"{number:04d}/{variable.name}" for number, variable in enumerate(variables)]
    size = sum(_LARGEST_ITEM * math.prod(variable.shape) for variable in variables)
    saved = read_arrays(path, max_bytes=size + _MAX_META_BYTES, names=[_META, *names])
    try:
        meta = json.loads(str(saved[_META]))
        if int(meta["step"]) != step:
            raise ValueError(f"it is of step {meta['step']}")
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its step cannot be read: {error}") from error
    for name, variable in zip(names, variables, strict=True):
        if saved[name].shape != tuple(variable.shape):
            raise ValueError(
                f"{variable.path} has shape {saved[name].shape}, expected {tuple(variable.shape)}"
            )
    return meta, [saved[name] for name in names]
