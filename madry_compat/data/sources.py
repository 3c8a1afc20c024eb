"""What the readers of image sets share: records, an error, how files are found and read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madry_compat.challenges import ImageSet
from madry_compat.files import one_line

# The largest published file, CIFAR-100's `train`, has 155 MB.
MAX_FILE_BYTES = 256 * 2**20


class DataError(ValueError):
    """The data a user pointed at is missing, broken, unsafe or not what it was taken for."""


@dataclass(frozen=True)
class Source:
    """Where one split was found; nothing has been read yet.

    Attributes:
        kind: the format of the files, "tfds" or that of `image_set`: says which reader to use.
        image_set: the data set.
        split: "train" or "test".
        folder: for messages; TFDS reads the whole folder.
        files: all files that the result depends on.
        sentence: where the data comes from, for people.
    """

    kind: str
    image_set: ImageSet
    split: str
    folder: Path
    files: tuple[Path, ...]
    sentence: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.image_set.challenge.image_shape


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


def find_files(image_set: ImageSet, split: str, root: Path, suffix: str = "") -> Source | None:
    """Finds a set's own files in root/FOLDER, as its archive unpacks them, or in root.

    Args:
        image_set: the data set.
        split: "train" or "test".
        root: where to look.
        suffix: of a file that stands in for one that is missing, such as ".gz".

    Raises:
        DataError: if only some of them are there.
    """
    for folder in (root / image_set.folder, root):
        plain = [folder / name for name in image_set.files[split]]
        paths = [path if path.exists() else Path(f"{path}{suffix}") for path in plain]
        missing = [path.name for path in paths if not path.is_file()]
        if not missing:
            sentence = f"original files in {folder}"
            return Source(image_set.format, image_set, split, folder, tuple(paths), sentence)
        if len(missing) < len(paths):
            raise DataError(
                f"{folder} is incomplete: {', '.join(missing)} is missing; "
                "unpack the archive again."
            )
    return None


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
