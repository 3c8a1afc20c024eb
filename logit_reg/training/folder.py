"""The folder of a run: locked, of one run's settings, and what to say when it cannot be written."""

import contextlib
import dataclasses
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorflow as tf

from logit_reg.files import one_line, read_json, write_json
from logit_reg.training.state import remove_leftovers, saved_steps

_LOGGER = logging.getLogger(__name__)
# Entries of run.json that a number depends on in its last bits.
_BIT_EXACT_ENTRIES = ("versions", "execution", "rules")


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what to do."""


class WrongRun(TrainingError, ValueError):
    """The settings, which were given, are not those of the run that the folder holds."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Training that ended before its time; the "stopped" of run.json."""

    step: int
    """At which it did, because robust accuracy had fallen to nothing."""
    result_step: int
    """Of the checkpoint before it, which is what is left."""

    @classmethod
    def of_record(cls, record: Mapping) -> "Stop | None":
        """What a run.json says; None if training was not stopped."""
        said = record.get("stopped")
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(said, dict) or said.keys() != names:
            return None
        return cls(**said) if all(type(step) is int for step in said.values()) else None


@contextlib.contextmanager
def run_folder(
    model_dir: Path | str,
    record: dict,
    *,
    extend: bool = False,
    defaults: Mapping[str, object] | None = None,
) -> Iterator[Path]:
    """Hold a folder for one run: locked, and with this run's settings in `run.json`.

    A run that goes on with other versions or another execution than before is told that it is
    not bit-exact. A run that was stopped stays so for as long as it has its checkpoint.

    Args:
        model_dir: folder to make or to go on with.
        record: what `run.json` holds; its "settings" identify the run.
        extend: accept an existing run whose `max_num_training_steps` was smaller.
        defaults: values of the settings that the `run.json` of an older version lacks.

    Yields:
        The folder.

    Raises:
        TrainingError: if another process trains there, or the folder holds a run with other
            settings (the message lists the differences), or cannot be written.
    """
    model_dir = Path(model_dir)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        lock = (model_dir / ".lock").open("w")
    except OSError as error:
        raise TrainingError(
            f"{model_dir} cannot be written ({error.strerror}); choose another --model_dir."
        ) from error
    with lock:
        try:
            # The kernel drops it with the process, so a killed run leaves nothing behind.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{model_dir} is in use by another training process; wait for it or choose "
                f"another --model_dir."
            ) from error
        path = model_dir / "run.json"
        if path.exists():
            old = read_json(path)
            _check_same_settings(path, old, record, extend, defaults or {})
            if saved_steps(model_dir):
                _tell_if_not_bit_exact(model_dir, old, record)
                if Stop.of_record(old) is not None:
                    record = record | {"stopped": old["stopped"]}
        with writing(model_dir):
            remove_leftovers(model_dir)
            write_json(path, record)
        yield model_dir


def record_stop(model_dir: Path, stop: Stop) -> None:
    """Say in run.json that training was stopped."""
    path = model_dir / "run.json"
    with writing(model_dir):
        write_json(path, read_json(path) | {"stopped": dataclasses.asdict(stop)})


def stop_of(model_dir: Path) -> Stop | None:
    """Whether the training of a folder was stopped."""
    path = Path(model_dir) / "run.json"
    return Stop.of_record(read_json(path)) if path.exists() else None


def last_good(model_dir: Path) -> str:
    """Which checkpoint an error leaves, as the end of its message."""
    steps = saved_steps(model_dir)
    if not steps:
        return f"there is no checkpoint in {model_dir} yet."
    return f"the last good checkpoint, of step {max(steps)}, stays in {model_dir}."


@contextlib.contextmanager
def writing(model_dir: Path) -> Iterator[None]:
    """Turn what a full, read-only or vanished folder raises into one line that says what to do."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        if not model_dir.is_dir():
            raise TrainingError(
                f"{model_dir} has vanished; put it back, or start anew with the same command."
            ) from error
        # What `files.py` raises says less than its cause, which has no path in it.
        causes = (getattr(error.__cause__, "strerror", None), getattr(error, "strerror", None))
        reason = next(filter(None, causes), None) or one_line(error)
        raise TrainingError(
            f"{model_dir} cannot be written ({reason}); {last_good(model_dir)} Make room, or the "
            f"folder writable, and the same command goes on."
        ) from error


def _tell_if_not_bit_exact(model_dir, old, new):
    differences = []
    for entry in _BIT_EXACT_ENTRIES:
        before, now = old.get(entry), new.get(entry, {})
        if not isinstance(before, dict):
            before = {}
        names = sorted({*before, *now})
        changed = [name for name in names if before.get(name) != now.get(name)]
        differences += [f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in changed]
    if differences:
        _LOGGER.warning("%s goes on, but not bit-exactly: %s.", model_dir, ", ".join(differences))


def _check_same_settings(path, old, record, extend, defaults):
    old = old.get("settings")
    if not isinstance(old, dict):
        raise WrongRun(f"{path}: no settings of a run; choose another --model_dir.")
    new = json.loads(json.dumps(record["settings"]))
    old = json.loads(json.dumps(dict(defaults))) | old
    if old == new:
        return
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if extend and changed == ["max_num_training_steps"]:
        if new["max_num_training_steps"] > old["max_num_training_steps"]:
            return
        raise WrongRun(
            f"--extend needs a max_num_training_steps above {old['max_num_training_steps']}; "
            f"got {new['max_num_training_steps']}."
        )
    differences = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
    raise WrongRun(
        f"{path.parent} holds a run with other settings ({differences}); choose another "
        f"--model_dir, or --extend to raise max_num_training_steps alone."
    )
