"""Checksums: the proof of published files, and the hash that identifies a set of examples."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from madry_compat.challenges import IMAGE_SETS
from madry_compat.data.sources import DataError, Source


def md5(*parts: Any) -> str:
    """The md5 (hexadecimal) of buffers joined together."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def checksum_note(source: Source, digests: Mapping[str, str]) -> str:
    """Compares files with the published ones.

    Args:
        source: names the data set asked for.
        digests: md5 of each file by the name it was published under.

    Returns:
        Why the files are not the published ones; "" if all are.

    Raises:
        DataError: if a file is a published one, but not the one asked for.
    """
    name, known = source.image_set.name, source.image_set.files[source.split]
    for file, digest in digests.items():
        if known.get(file) == digest:
            continue
        owners = (
            f"{other.name}/{name}"
            for other in IMAGE_SETS.values()
            for files in other.files.values()
            for name, published in files.items()
            if published == digest
        )
        if owner := next(owners, None):
            raise DataError(
                f"{source.folder}: what should be {name}/{file} is {owner}; "
                f"give the folder of {name}."
            )
        if not known.get(file):
            unknown = f"no checksum of {name}/{file} is known"
            return f"{unknown}, so that nothing proves its images and order"
        return f"not the published data: md5 of {file} is {digest}, expected {known[file]}"
    return ""


def content_hash(images: np.ndarray, labels: np.ndarray) -> str:
    """Identifies a set of examples by its content and order.

    Args:
        images: any array.
        labels: any array.

    Returns:
        sha256 (hexadecimal) over dtype, shape and bytes of both.
    """
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
