"""Files that appear whole or not at all, and files that are read with care."""

import contextlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

_MAX_JSON_BYTES = 16 * 2**20
# Of arrays in a message.
_MAX_NAMES = 10
# Integers, floats, flags and text: everything that runs no code when it is read.
_PLAIN_KINDS = "iufbU"


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path in the same folder; renamed to `path` when the block ends without error.

    Args:
        path: the file to appear. Its folder is made if need be.

    Yields:
        The temporary path, with the same suffix, for the block to write.

    Raises:
        OSError: if the file cannot be written, with its name.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes the file private; a result is as readable as any other new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror or error}); what was there stays."
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path | str, value) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_arrays(path: Path | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` of plain arrays, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write an `.npy` of a plain array, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_json(path: Path | str) -> dict:
    """Read a JSON object from a file that anyone may have written.

    Raises:
        ValueError: if it is missing, too large, not JSON or not an object.
    """
    content = read_bytes(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(content)
    # Too many digits are a plain ValueError, too many brackets a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(value).__name__}.")
    return value


def read_bytes(path: Path | str, max_bytes: int) -> bytes:
    """Read a whole file that anyone may have written.

    Raises:
        ValueError: if it is missing, no regular file, unreadable or larger than `max_bytes`.
    """
    path = Path(path)
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected a file; got a folder or a device.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes >> 20} MiB, not a file of this project.")
    return content


def read_arrays(
    path: Path | str, *, max_bytes: int, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Read plain arrays from an `.npz` that anyone may have written.

    The sizes that its headers declare are checked before anything is allocated, its checksums
    as it is read.

    Args:
        path: the file.
        max_bytes: most that the arrays may take together.
        names: arrays to read, the others are left alone; all if None.

    Raises:
        ValueError: if it is missing, damaged or too large, lacks one of `names`, or one of its
            arrays holds anything but numbers, flags or text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            names = held if names is None else names
            missing = [name for name in names if name not in held]
            arrays: dict[str, np.ndarray] = {}
            for name in () if missing else names:
                arrays[name] = _read_member(archive, name, max_bytes)
                max_bytes -= arrays[name].nbytes
    # A mutated file makes zipfile and numpy raise nearly anything; for the reader it is one thing.
    except Exception as error:
        raise ValueError(f"{path}: not an .npz of plain arrays ({one_line(error)}).") from error
    if missing:
        shown = ascii(held[:_MAX_NAMES])[1:-1][:200] or "none"
        raise ValueError(
            f"{path}: has no array {missing[0]!r}, only {shown}; expected {', '.join(names)}."
        )
    return arrays


def _read_member(archive, name, max_bytes):
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is neither stored nor deflated")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is not in the npy format 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in _PLAIN_KINDS or size != info.file_size - file.tell():
            raise ValueError(f"{name} is no array of numbers of its stated size")
        if size > max_bytes:
            raise ValueError(f"{name} has {size:,} bytes, {max_bytes:,} are allowed")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def one_line(error: BaseException) -> str:
    """What an error says, on one line and without what a file may have smuggled in."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if text.isprintable() else ascii(text))[:200].rstrip(".")
