"""CIFAR's python pickles, read by an unpickler that can make arrays and nothing else."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from madry_compat.checksums import checksum_note, md5
from madry_compat.image_sets import (
    IMAGE_SETS,
    MAX_FILE_BYTES,
    Arrays,
    DataError,
    Source,
    all_there,
    one_line,
    read_bounded,
)

_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_LABELS_KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}
_FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}


def pickle_paths(name: str, split: str) -> list[Path]:
    """The files of a split, as the published archive unpacks them."""
    return [Path(_FOLDERS[name], file) for file in _FILES[name, split]]


def find_pickles(name: str, split: str, root: Path) -> Source | None:
    """Finds the files of a split in root/cifar-10-batches-py (or cifar-100-python) or root.

    Raises:
        DataError: if only some of them are there.
    """
    for folder in (root / _FOLDERS[name], root):
        wanted = [folder / path.name for path in pickle_paths(name, split)]
        if all_there(wanted):
            sentence = f"CIFAR's pickles in {folder}"
            return Source("pickles", name, split, folder, tuple(wanted), sentence)
    return None


def read_pickles(source: Source) -> Arrays:
    """Reads a split in the order of its files; CIFAR-100 with its fine labels.

    Args:
        source: what `find_pickles` found.

    Raises:
        DataError: if a file is damaged, unsafe, no batch of CIFAR, or of another data set.
    """
    contents = {path: read_bounded(path, MAX_FILE_BYTES) for path in source.files}
    note = checksum_note(source, {path.name: md5(content) for path, content in contents.items()})
    batches = [_parse_batch(source.name, path, content) for path, content in contents.items()]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Arrays(images, labels, note)


def _parse_batch(name: str, path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels = IMAGE_SETS[name].shape
    row_size = math.prod(IMAGE_SETS[name].shape)
    labels_key = _LABELS_KEYS[name]
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        batch = {_text(key): value for key, value in batch.items()}
        rows = batch["data"].to_numpy()
        labels = batch[labels_key]
        labels = labels.to_numpy() if isinstance(labels, _PickledArray) else np.array(labels)
    except Exception as error:  # a hostile pickle can raise anything
        problem = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise DataError(
            f"{path} is not a CIFAR batch of arrays and labels: {problem}. Use the files of the "
            "python version of CIFAR, unpacked from the original archive."
        ) from error
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != row_size:
        raise DataError(
            f"{path}: data is {rows.dtype} {rows.shape}, expected uint8 (N, {row_size})."
        )
    if labels.dtype.kind not in "iu" or labels.shape != rows.shape[:1]:
        raise DataError(
            f"{path}: {labels_key} are {labels.dtype} {labels.shape}, expected "
            f"{len(rows)} integers."
        )
    # Rows are stored channel by channel.
    images = rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return images, labels.astype(np.int64)


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


class _PickledDtype:
    """Stands in for a dtype, so that a file cannot drive numpy's own unpickling."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.byte_order = "|"

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def to_numpy(self) -> np.dtype:
        if self.code not in ("u1", "i1", "i2", "i4", "i8"):
            raise DataError(f"an array of type {self.code!r}, expected integers")
        return np.dtype(self.byte_order + self.code)


class _PickledArray:
    """Stands in for an array: keeps its parts until all of them are known and checked."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = self.state
        # Python 2 wrote strings, which come as latin1 text.
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        array = np.frombuffer(raw, dtype.to_numpy())
        return array.reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(buffer: Any, dtype: _PickledDtype, shape: tuple, order: str) -> Any:
    """What protocol 5 calls for an array."""
    array = _PickledArray()
    array.state = (1, shape, dtype, order == "F", buffer)
    return array


def _scalar(dtype: _PickledDtype, raw: bytes) -> int:
    return int(np.frombuffer(raw, dtype.to_numpy())[0])


def _latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 of Python 3 calls for bytes."""
    if encoding != "latin1":
        raise DataError(f"an encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything but arrays, integers, text and plain containers."""

    _ALLOWED = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files of both are about.
        known = self._ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise DataError(f"it asks for {module}.{name}, which a data file has no use for")
        return known
