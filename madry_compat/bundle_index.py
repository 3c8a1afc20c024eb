"""Finding a TF1 bundle and reading its index, before TensorFlow sees it.

The index of a bundle (names, shapes, offsets, checksums) is untrusted, and TensorFlow's reader ends
the whole process on a shape it cannot represent; so it is read and judged here first.
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2

STATE_FILE = "checkpoint"
_BUNDLE_FILE = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_RELEASE_DEPTH = 3

# Bounds on untrusted files, far above w32-10 with its slots (253 entries, 367 MB).
_MAX_STATE_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 20
_MAX_INDEX_RECORDS = 10_000
_MAX_KEY_BYTES = 512
_MAX_RANK = 8
_MAX_DATA_BYTES = 8 << 30
_TABLE_MAGIC = 0xDB4775248B80FB57
_TABLE_FOOTER_BYTES = 48

Shape = tuple[int, ...]
PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and what is wrong with it."""


class Entry(NamedTuple):
    """What an index says of one tensor."""

    shape: Shape
    dtype: int
    """TensorFlow's number of the type."""
    shard: int
    """Number of the data file that holds it."""
    end: int
    """Bytes of the shard's file up to and with this tensor."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose data files are as long as its index says."""

    prefix: Path
    """Path of its files without their suffixes."""
    entries: Mapping[str, Entry]
    """Its tensors by name."""


def open_bundle(path: PathLike) -> Bundle:
    """Finds a bundle and checks its index against the size of its data files.

    Args:
        path: prefix (`.../checkpoint-N`), folder of a checkpoint, or unpacked release
            (`models/NAME/checkpoint-N.*` inside).

    Raises:
        CheckpointError: if there is none, or it is damaged or incomplete.
    """
    prefix = find_prefix(path)
    index = Path(f"{prefix}.index")
    try:
        entries, num_shards = _read_index(index)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}.") from None
    except (ValueError, IndexError, struct.error, DecodeError) as error:
        raise CheckpointError(
            f"{index}: not the index of a TF1 checkpoint, or damaged ({error}); copy it again."
        ) from None

    ends: dict[int, int] = {}
    for entry in entries.values():
        ends[entry.shard] = max(entry.end, ends.get(entry.shard, 0))
    for shard, end in ends.items():
        data = Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}")
        if not data.is_file():
            raise CheckpointError(
                f"{prefix}: data file missing; expected {data.name} beside {index.name}, which "
                "holds no values itself."
            )
        size = data.stat().st_size
        if end > size:
            raise CheckpointError(
                f"{data}: {size:,} bytes, but its index declares {end:,}; the file is truncated "
                "or the index is not its own. Copy both again."
            )
    total = sum(ends.values())
    if total > _MAX_DATA_BYTES:
        raise CheckpointError(f"{prefix}: {total:,} bytes; at most {_MAX_DATA_BYTES:,} are read.")
    return Bundle(prefix, entries)


def find_prefix(path: PathLike) -> Path:
    """The prefix of the bundle that a prefix, a folder or an unpacked release stands for.

    Raises:
        CheckpointError: if there is none, or several and none is named as the newest.
    """
    path = Path(path)
    if path.is_dir():
        return _find_in_folder(path)
    prefix = path.with_name(_BUNDLE_FILE.sub("", path.name))
    if Path(f"{prefix}.index").is_file():
        return prefix
    if path.is_file():
        raise CheckpointError(
            f"{path}: not a TF1 checkpoint; expected a folder, or a prefix such as "
            "checkpoint-100 of checkpoint-100.index."
        )
    raise CheckpointError(
        f"{path}: no such checkpoint; expected a folder, or a prefix with {path.name}.index."
    )


def is_bundle_file(path: PathLike) -> bool:
    """Whether the name of a file is that of a part of a bundle, or of its `checkpoint`."""
    name = Path(path).name
    return name == STATE_FILE or _BUNDLE_FILE.search(name) is not None


def _find_in_folder(folder: Path) -> Path:
    names = bundle_names(folder)
    if (folder / STATE_FILE).is_file():
        name = _newest_by_state(folder / STATE_FILE)
        if name not in names:
            raise CheckpointError(
                f"{folder / STATE_FILE} names {name}, but {name}.index is not beside it; "
                f"found: {', '.join(names) or 'no checkpoint'}. Pass the prefix to use."
            )
        return folder / name
    if names:
        if len(names) > 1 and _step_of(names[-1]) < 0:
            raise CheckpointError(
                f"{folder}: several checkpoints without a step: {', '.join(names)}. Pass the "
                "prefix to use."
            )
        return folder / names[-1]

    candidates = sorted(
        {
            found.parent
            for depth in range(1, _RELEASE_DEPTH + 1)
            for pattern in ("*.index", STATE_FILE)
            for found in folder.glob("*/" * depth + pattern)
            if found.is_file() and not found.name.startswith(".")
        }
    )
    if len(candidates) != 1:
        found = ", ".join(str(candidate.relative_to(folder)) for candidate in candidates)
        raise CheckpointError(
            f"{folder}: several checkpoints inside: {found}. Pass the folder of one."
            if candidates
            else f"{folder}: no checkpoint inside; expected checkpoint-N.index and its data file."
        )
    return _find_in_folder(candidates[0])


def bundle_names(folder: Path) -> list[str]:
    """Names of the bundles in a folder, the newest step last."""
    names = (path.stem for path in folder.glob("*.index") if not path.name.startswith("."))
    return sorted(names, key=lambda name: (_step_of(name), name))


def _step_of(name: str) -> int:
    step = re.search(r"-(\d{1,18})$", name, re.ASCII)
    return int(step[1]) if step else -1


def _newest_by_state(state_file: Path) -> str:
    """The name a `checkpoint` file gives, without the folder: that may be another machine's."""
    state = None
    try:
        if state_file.stat().st_size <= _MAX_STATE_BYTES:
            state = tf.train.get_checkpoint_state(str(state_file.parent))
    except (ValueError, tf.errors.OpError):
        pass
    # A name that cannot be shown is not one that TensorFlow wrote.
    if state is None or not state.model_checkpoint_path.isprintable():
        raise CheckpointError(
            f"{state_file}: no model_checkpoint_path in it; expected TensorFlow's text file, or "
            "pass the prefix to use."
        )
    return PureWindowsPath(state.model_checkpoint_path).name


def _read_index(path: Path) -> tuple[dict[str, Entry], int]:
    """Reads names, shapes and extents; returns them with the number of data files.

    Raises:
        ValueError, IndexError, struct.error, DecodeError: if the file is not a sound index.

    Source:
        `tensor_bundle.proto`, and LevelDB's `table_format.md`. A bundle's table is never
        compressed. Checksums of the table are left to TensorFlow.
    """
    with path.open("rb") as file:
        table = file.read(_MAX_INDEX_BYTES + 1)
    if len(table) > _MAX_INDEX_BYTES:
        raise ValueError(f"larger than {_MAX_INDEX_BYTES:,} bytes")
    if len(table) < _TABLE_FOOTER_BYTES:
        raise ValueError(f"only {len(table)} bytes")
    footer = table[-_TABLE_FOOTER_BYTES:]
    if struct.unpack("<Q", footer[-8:])[0] != _TABLE_MAGIC:
        raise ValueError("no table's magic number at its end")

    handles = _varints(footer, 0, 4)[0]  # the unused metaindex block, then the index block
    records: dict[bytes, bytes] = {}
    for _, handle in _block_records(table, *handles[2:]):
        for key, value in _block_records(table, *_varints(handle, 0, 2)[0]):
            records[key] = value
            if len(records) > _MAX_INDEX_RECORDS:
                raise ValueError(f"more than {_MAX_INDEX_RECORDS:,} entries")

    header = tensor_bundle_pb2.BundleHeaderProto.FromString(records.pop(b"", b""))
    if header.num_shards < 1:
        raise ValueError("no header")
    entries = {_name(key): _entry(key, value) for key, value in records.items()}
    return entries, header.num_shards


def _name(key: bytes) -> str:
    """A tensor's name, which messages show."""
    name = key.decode("utf-8")
    if not name.isprintable():
        raise ValueError(f"{key[:60]!r} is not the name of a tensor")
    return name


def _entry(key: bytes, record: bytes) -> Entry:
    """Reads one entry; refuses what TensorFlow's reader could not represent."""
    proto = tensor_bundle_pb2.BundleEntryProto.FromString(record)
    shape = tuple(dim.size for dim in proto.shape.dim)
    if (
        proto.shape.unknown_rank
        or len(shape) > _MAX_RANK
        or any(size < 0 for size in shape)
        or math.prod(max(size, 1) for size in shape) >= 1 << 62
    ):
        raise ValueError(f"{key!r} has the shape {shape[: _MAX_RANK + 1]}")
    if proto.slices:
        raise ValueError(f"{key!r} is stored in slices, which no challenge does")
    for dtype in (tf.float32, tf.int32, tf.int64):
        num_bytes = math.prod(shape) * dtype.size
        if proto.dtype == dtype.as_datatype_enum and proto.size != num_bytes:
            raise ValueError(f"{key!r} has {proto.size:,} bytes for the shape {shape}")
    if proto.offset < 0 or proto.size < 0 or proto.shard_id < 0:
        raise ValueError(f"{key!r} lies at a negative place")
    return Entry(shape, proto.dtype, proto.shard_id, proto.offset + proto.size)


def _block_records(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of one block; a key repeats a part of the one before it."""
    if table[offset + size] != 0:
        raise ValueError("a compressed block")
    (num_restarts,) = struct.unpack_from("<I", table, offset + size - 4)
    position, end = offset, offset + size - 4 * (num_restarts + 1)
    key = b""
    while position < end:
        (shared, unshared, length), position = _varints(table, position, 3)
        if shared > len(key) or shared + unshared > _MAX_KEY_BYTES:
            raise ValueError("a malformed key")
        value_at = position + unshared
        if value_at + length > end:
            raise ValueError("an entry beyond its block")
        key = key[:shared] + table[position:value_at]
        yield key, table[value_at : value_at + length]
        position = value_at + length


def _varints(buffer: bytes, position: int, count: int) -> tuple[list[int], int]:
    """Reads little-endian base-128 numbers; returns them and the position after them."""
    numbers = []
    for _ in range(count):
        number = shift = 0
        while True:
            byte = buffer[position]
            position += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 63:
                raise ValueError("a malformed number")
        numbers.append(number)
    return numbers, position
