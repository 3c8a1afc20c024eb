"""CIFAR's python pickles, read by an unpickler that can make arrays and nothing else."""

import io
import math
import pickle
import pickletools
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
# What the picklers of Python 2 and 3 write for arrays, integers, text and plain containers.
# fmt: off
_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}
# fmt: on


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
        _check_operations(content)
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        batch = {_text(key): value for key, value in batch.items()}
        rows = batch["data"].to_numpy()
        labels = batch[labels_key]
        labels = labels.to_numpy() if isinstance(labels, _PickledArray) else _to_array(labels)
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


def _check_operations(content: bytes) -> None:
    """Refuses a pickle that would take more memory or time than its size warrants.

    Raises:
        DataError: if it does something that a pickled batch does not.
        ValueError: if it is truncated or no pickle.
    """
    count, tuples, top_is_tuple = 0, set[int](), False
    for operation, argument, _ in pickletools.genops(content):
        name = operation.name
        if name not in _OPERATIONS:
            raise DataError(f"it holds {name}, which a data file has no use for")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = count if argument is None else int(argument)
            # The unpickler makes room for as many places as a file names.
            if place > len(content):
                raise DataError(f"it counts {place} objects in {len(content)} bytes")
            count += 1
            if top_is_tuple:
                tuples.add(place)
            continue
        # A tuple of tuples that repeat takes forever to hash, as the key of a dict.
        if name in ("GET", "BINGET", "LONG_BINGET") and argument in tuples:
            raise DataError("it repeats a tuple, which a data file has no use for")
        top_is_tuple = name.startswith("TUPLE")


def _to_array(labels: Any) -> np.ndarray:
    # Lists of lists that repeat would become an array without end.
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise DataError("the labels are no list of integers")
    return np.array(labels, np.int64)


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
        if self.byte_order not in ("|", "<", ">", "="):
            raise DataError(f"an array of byte order {self.byte_order!r}")
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


class _ArrayFromBuffer:
    """What protocol 5 calls for an array.

    An object without attributes, as the next two: a pickle can set those of a function.
    """

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: _PickledDtype, shape: tuple, order: str) -> Any:
        array = _PickledArray()
        array.state = (1, shape, dtype, order == "F", buffer)
        return array


class _Scalar:
    __slots__ = ()

    def __call__(self, dtype: _PickledDtype, raw: bytes) -> int:
        return int(np.frombuffer(raw, dtype.to_numpy())[0])


class _Latin1:
    """What protocol 2 of Python 3 calls for bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise DataError(f"an encoding {encoding!r}, expected latin1")
        return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything but arrays, integers, text and plain containers."""

    _ALLOWED = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy.core.multiarray", "scalar"): _Scalar(),
        ("numpy.core.numeric", "_frombuffer"): _ArrayFromBuffer(),
        ("_codecs", "encode"): _Latin1(),
    }

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files of both are about.
        known = self._ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise DataError(f"it asks for {module}.{name}, which a data file has no use for")
        return known
