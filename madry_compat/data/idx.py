"""IDX files, plain or gzipped: how MNIST and Fashion-MNIST were published."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from madry_compat.challenges import ImageSet
from madry_compat.data.checksums import checksum_note, md5
from madry_compat.data.sources import (
    MAX_FILE_BYTES,
    Arrays,
    DataError,
    Source,
    find_files,
)
from madry_compat.files import one_line

# The magic number of unsigned bytes, without the number of dimensions that is added to it.
_UNSIGNED_BYTES = 0x0800
# Deflate cannot do better than this, so a header that claims more is a lie.
_MAX_DEFLATE_RATIO = 1032


def find_idx(image_set: ImageSet, split: str, root: Path) -> Source | None:
    """Finds the two files of a split in root/NAME or root, gzipped or not.

    Raises:
        DataError: if there is only one of them.
    """
    return find_files(image_set, split, root, suffix=".gz")


def read_idx(source: Source) -> Arrays:
    """Reads a split in the order of its files.

    Args:
        source: what `find_idx` found.

    Raises:
        DataError: if a file is damaged, not what its name says, or of another data set.
    """
    images_file, labels_file = source.files
    images = _read_file(images_file, source.shape[:2])
    labels = _read_file(labels_file, ())
    return Arrays(images[..., np.newaxis], labels, idx_note(source, images, labels))


def idx_note(source: Source, images: np.ndarray, labels: np.ndarray) -> str:
    """Proves a split by the md5 that its IDX files have, or would have.

    Args:
        source: names the data set and the split.
        images: (N, H, W) uint8.
        labels: (N,) uint8.

    Returns:
        Why the arrays are not the published ones; "" if they are.

    Raises:
        DataError: if they are those of another data set.
    """
    digests = {
        file: md5(_header(array), np.ascontiguousarray(array).data)
        for file, array in zip(source.image_set.files[source.split], (images, labels), strict=True)
    }
    return checksum_note(source, digests)


def _header(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", _UNSIGNED_BYTES | array.ndim, *array.shape)


def _read_file(path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
    """Reads unsigned bytes, after checking the header against the size of the file."""
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            stored = path.stat().st_size
            shape, header_size = _read_header(path, file, item_shape)
            size = math.prod(shape)
            largest = stored * (_MAX_DEFLATE_RATIO if zipped else 1)
            if header_size + size > min(largest, MAX_FILE_BYTES):
                raise DataError(
                    f"{path} is truncated or no IDX file: its header announces {size} bytes of "
                    f"data, the file has {stored}; fetch it again."
                )
            # One byte more than announced: finds trailing bytes, and makes gzip check its sum.
            payload = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({one_line(error)}); fetch it again.") from error
    if len(payload) != size:
        raise DataError(
            f"{path} is {'truncated' if len(payload) < size else 'followed by other bytes'}: its "
            f"header announces {size} bytes of data; fetch it again."
        )
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _read_header(
    path: Path, file: BinaryIO | gzip.GzipFile, item_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """The shape that a file announces and the size of its header in bytes."""
    layout = struct.Struct(f">{2 + len(item_shape)}I")
    header = file.read(layout.size)
    if len(header) < layout.size:
        raise DataError(f"{path} is truncated: it ends inside its header; fetch it again.")
    magic, *shape = layout.unpack(header)
    expected = _UNSIGNED_BYTES | len(shape)
    if magic != expected:
        raise DataError(
            f"{path} is no IDX file of {len(shape)}-dimensional bytes: magic number {magic}, "
            f"expected {expected}."
        )
    if tuple(shape[1:]) != item_shape:
        raise DataError(f"{path} holds items of shape {tuple(shape[1:])}, expected {item_shape}.")
    return tuple(shape), layout.size
