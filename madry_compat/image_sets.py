"""What the readers of image sets share: their records, their error and careful looks at files."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The largest published file, CIFAR-100's `train`, has 155 MB.
MAX_FILE_BYTES = 256 * 2**20


class DataError(ValueError):
    """The data a user pointed at is missing, broken, unsafe or not what it was taken for."""


@dataclass(frozen=True)
class ImageSet:
    """What is known about an image set before it is read.

    Attributes:
        shape: (H, W, C) of an image.
        num_classes: labels run from 0 to num_classes - 1.
        pixel_divisor: stored values over this are in the challenge's pixel units.
    """

    shape: tuple[int, int, int]
    num_classes: int
    pixel_divisor: float


IMAGE_SETS = {
    "mnist_5k": ImageSet((28, 28, 1), 10, 255.0),
    "mnist": ImageSet((28, 28, 1), 10, 255.0),
    "fashion_mnist": ImageSet((28, 28, 1), 10, 255.0),
    "cifar10": ImageSet((32, 32, 3), 10, 1.0),
    "cifar100": ImageSet((32, 32, 3), 100, 1.0),
}


@dataclass(frozen=True)
class Source:
    """Where one split was found; nothing has been read yet.

    Attributes:
        kind: "mnist_5k", "idx", "pickles" or "tfds": says which reader to use.
        name: a key of `IMAGE_SETS`.
        split: "train" or "test".
        folder: for messages; TFDS reads the whole folder.
        files: all files that the result depends on.
        sentence: where the data comes from, for people.
    """

    kind: str
    name: str
    split: str
    folder: Path
    files: tuple[Path, ...]
    sentence: str


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a reader returns.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) integers.
        note: why the arrays are not proved to be the published ones; "" where they are.
    """

    images: np.ndarray
    labels: np.ndarray
    note: str


def one_line(error: Exception) -> str:
    """The first line of what a library has to say, without TensorFlow's node names."""
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error)).strip()
    line = (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return line if line.isprintable() else ascii(line)


def all_there(paths: list[Path]) -> bool:
    """Whether the files of one folder exist.

    Raises:
        DataError: if only some of them do.
    """
    missing = [path.name for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise DataError(
            f"{paths[0].parent} is incomplete: {', '.join(missing)} is missing; "
            "unpack the archive again."
        )
    return not missing


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file.

    Raises:
        DataError: if it cannot be read or has more than `limit` bytes.
    """
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: expected a file; got a folder or a device.")
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path} has {size} bytes, more than the {limit} it can need.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: unreadable ({one_line(error)}).") from error
