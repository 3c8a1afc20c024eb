"""CIFAR's python pickles, read by an unpickler that can make arrays and nothing else."""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from madry_compat.data.checksums import checksum_note, md5
from madry_compat.data.sources import (
    MAX_FILE_BYTES,
    Arrays,
    DataError,
    Source,
    read_bounded,
)
from madry_compat.files import one_line

# CIFAR-100 takes 350,000 in the wordiest protocol: 50,000 file names and twice as many labels.
_MAX_OPERATIONS = 400_000
# What the picklers of Python 2 and 3 write for arrays, integers, text and plain containers.
_OPERATIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING
    BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE BUILD
"""
_MAX_ARGUMENTS = 4
_MAX_KEY = 100
_SCALAR_BYTES = 8
_INTEGERS = ("u1", "i1", "i2", "i4", "i8")


def read_pickles(source: Source) -> Arrays:
    """Reads a split in the order of its files; CIFAR-100 with its fine labels.

    Args:
        source: what `find_files` found.

    Raises:
        DataError: if a file is damaged, unsafe, no batch of CIFAR, or of another data set.
    """
    contents = {path: read_bounded(path, MAX_FILE_BYTES) for path in source.files}
    note = checksum_note(source, {path.name: md5(content) for path, content in contents.items()})
    batches = [_parse_batch(source, path, content) for path, content in contents.items()]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Arrays(images, labels, note)


def _parse_batch(source: Source, path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels = source.shape
    row_size = math.prod(source.shape)
    labels_key = source.image_set.labels_key
    try:
        batch = _BatchUnpickler(content).load()
        rows = batch["data"].to_numpy()
        labels = batch[labels_key]
        labels = labels.to_numpy() if isinstance(labels, _Array) else _to_array(labels)
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


def _to_array(labels: Any) -> np.ndarray:
    # Lists of lists that repeat would become an array without end.
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise DataError("the labels are no list of integers")
    return np.array(labels, np.int64)


class _Part:
    """Stands in for an object of numpy: what it was made of and, later, its state.

    Numpy's own would take the memory for any shape that a file names, and text that is encoded
    again and again would fill it: here only what becomes images or labels is ever made.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.state: Any = None


class _Dtype(_Part):
    def to_numpy(self) -> np.dtype:
        order, code = self.state[1] if self.state else "|", self.parts[0]
        if code not in _INTEGERS or order not in ("|", "<", ">", "="):
            raise DataError("an array of another type, expected integers")
        return np.dtype(order + code)


class _Array(_Part):
    def to_numpy(self) -> np.ndarray:
        _, shape, dtype, is_fortran, content = self.state
        array = np.frombuffer(_to_bytes(content), dtype.to_numpy())
        return array.reshape(shape, order="F" if is_fortran else "C")


class _Latin1(_Part):
    """Bytes as Python 3 writes them in protocol 2."""


def _to_bytes(content: Any) -> bytes:
    if isinstance(content, _Latin1):
        content, encoding = content.parts
        if encoding != "latin1":
            raise DataError("an encoding other than latin1")
    # Python 2 wrote strings, which come as latin1 text.
    return content.encode("latin1") if isinstance(content, str) else content


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """What protocol 5 calls for an array."""
    array = _Array()
    array.state = (1, shape, dtype, order == "F", buffer)
    return array


def _scalar(dtype: _Dtype, raw: Any) -> int:
    if len(raw.parts[0] if isinstance(raw, _Latin1) else raw) > _SCALAR_BYTES:
        raise DataError("an integer of more than 8 bytes")
    return int(np.frombuffer(_to_bytes(raw), dtype.to_numpy())[0])


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("_codecs", "encode"): _Latin1,
}


class _TextDict(dict):
    """A dict without keys that take forever to hash, to decode or to tell apart."""

    def __setitem__(self, key: Any, value: Any) -> None:
        key = key.parts[0] if isinstance(key, _Latin1) else key
        if type(key) not in (str, bytes) or len(key) > _MAX_KEY:
            raise DataError("a key is no short text")
        super().__setitem__(key if isinstance(key, str) else key.decode("latin1"), value)


class _Operations(dict):
    """What to do at each operation; a file may ask for so many and no more."""

    left = _MAX_OPERATIONS

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise DataError(f"it takes more than {_MAX_OPERATIONS:,} operations")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[..., None]:
        raise DataError(f"it holds operation {code:#04x}, which a data file has no use for")


class _BatchUnpickler(pickle._Unpickler):
    """Refuses everything but arrays, integers, text and plain containers.

    Python's own unpickler, not the one in C: that makes room for as many objects as a file counts
    and as many bytes as it announces, and nothing can be put between it and a dict's keys.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        known = pickle._Unpickler.dispatch
        own = {
            pickle.EMPTY_DICT: _BatchUnpickler.load_empty_dict,
            pickle.DICT: _BatchUnpickler.load_dict,
            pickle.REDUCE: _BatchUnpickler.load_reduce,
            pickle.BUILD: _BatchUnpickler.load_build,
            # As bytes: an array of bytes would be as long as the file announces.
            pickle.BYTEARRAY8: known[pickle.BINBYTES8[0]],
        }
        codes = (getattr(pickle, name) for name in _OPERATIONS.split())
        self.dispatch = _Operations(  # type: ignore[misc]
            {code[0]: own.get(code, known[code[0]]) for code in codes}
        )

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files of both are about.
        known = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            place = f"{module[:60]}.{name[:60]}"
            raise DataError(f"it asks for {place}, which a data file has no use for")
        return known

    def load_empty_dict(self) -> None:
        self.append(_TextDict())

    def load_dict(self) -> None:
        # Protocol 0 has no other empty dict, and picklers fill it afterwards.
        if self.pop_mark():
            raise DataError("it makes a dict at once, which no pickler does")
        self.load_empty_dict()

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise DataError("a call with no or with many arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Part):
            raise DataError("it sets the state of what has none")
        self.stack[-1].state = state
