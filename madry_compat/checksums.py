"""Checksums: those of the published files, and the hash that identifies a set of examples."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from madry_compat.image_sets import DataError, Source

# md5 of the published files: uncompressed IDX files, and the pickles as unpacked. Looked up at
# every load, so that a test can put the sum of a made-up file here.
MD5 = {
    "mnist/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "mnist/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "mnist/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "mnist/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    "fashion_mnist/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "fashion_mnist/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "fashion_mnist/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "fashion_mnist/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "cifar10/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar10/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar10/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar10/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar10/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar10/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar100/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar100/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


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
    for file, digest in digests.items():
        key = f"{source.name}/{file}"
        if MD5.get(key) == digest:
            continue
        owner = next((other for other, known in MD5.items() if known == digest), None)
        if owner is not None:
            raise DataError(
                f"{source.folder}: what should be {key} is {owner}; "
                f"give the folder of {source.name}."
            )
        if key not in MD5:
            return f"no checksum of {key} is known, so that nothing proves its images and order"
        return f"not the published data: md5 of {file} is {digest}, expected {MD5[key]}"
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
