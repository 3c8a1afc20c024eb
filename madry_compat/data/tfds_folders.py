"""Prepared TFDS folders, put back into the order in which the data sets were published."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madry_compat.challenges import ImageSet
from madry_compat.data.idx import idx_note
from madry_compat.data.sources import (
    MAX_FILE_BYTES,
    Arrays,
    DataError,
    Source,
    read_bounded,
)
from madry_compat.files import one_line

_MAX_JSON_BYTES = 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Before a record stand its length and a checksum, after it another one.
_LENGTH_BYTES = 8
_RECORD_BYTES = 16


@dataclass(frozen=True, eq=False)
class _Records:
    """A split in stored order, which is TFDS's shuffle.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) int64.
        ids: (N,) bytes; empty where there are none.
        signatures: (N,) bytes: the first 8 of each coded image.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    signatures: np.ndarray


def find_tfds(image_set: ImageSet, split: str, root: Path) -> Source | None:
    """Finds the newest version in root/NAME that TFDS finished writing."""
    name = image_set.name
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
    return Source("tfds", image_set, split, newest, files, f"TFDS folder {newest}")


def download_tfds(name: str, folder: Path) -> None:
    """Lets TFDS download and prepare a data set.

    Raises:
        DataError: if it cannot.
    """
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=str(folder)).download_and_prepare()
    except Exception as error:  # whatever the network, the disk or TFDS may raise
        raise DataError(
            f"TFDS could not download {name} into {folder} ({one_line(error)}): try again, or "
            "give a folder that has it with --data_dir."
        ) from error


def read_tfds(source: Source) -> Arrays:
    """Reads a split: the MNIST family in the order of its IDX files, CIFAR ordered by id.

    Args:
        source: what `find_tfds` found.

    Raises:
        DataError: if the folder is incomplete, damaged, unsafe or of another data set.

    Source:
        TFDS shuffles by a hash of the key; sorting by that hash restores the order of the IDX
        files, and their md5 proves it. CIFAR's pixels have no known checksum: PNG-coded images
        whose ids count from 0 are taken on trust.
    """
    _check_features(source.folder / "features.json")
    try:
        records = _read_records(source)
    except DataError:
        raise
    except Exception as error:  # TFDS and TensorFlow raise whatever a broken file leads to
        raise DataError(
            f"TFDS folder {source.folder} is truncated or corrupt ({one_line(error)}): delete it "
            "and copy or download it again."
        ) from error
    has_ids = bool(source.image_set.num_examples)
    return _order_by_id(source, records) if has_ids else _order_by_key(source, records)


def _order_by_key(source: Source, records: _Records) -> Arrays:
    order = _key_order(source.split, len(records.labels))
    images, labels = records.images[order], records.labels[order]
    return Arrays(images, labels, idx_note(source, images[..., 0], labels.astype(np.uint8)))


def _order_by_id(source: Source, records: _Records) -> Arrays:
    if np.any(records.ids == b""):
        order = _key_order(source.split, len(records.labels))
        note = "a TFDS copy without ids: nothing proves the order"
    else:
        order = np.argsort(records.ids, kind="stable")
        note = _id_note(source, records.ids[order], records.signatures)
    return Arrays(records.images[order], records.labels[order], note)


def _id_note(source: Source, ids: np.ndarray, signatures: np.ndarray) -> str:
    """Why images with these ascending ids are not the published ones; "" if they are."""
    split, count = source.split, source.image_set.num_examples[source.split]
    published = [f"{split}_{index:05d}".encode() for index in range(count)]
    if np.any(np.char.startswith(signatures, _JPEG)):
        return (
            "lossy JPEG copy, not the challenge's test set: good for training and evaluation, "
            "refused for submissions"
        )
    if np.any(signatures != _PNG):
        return "not PNG-coded as TFDS writes it: nothing proves the pixels"
    if ids.tolist() != published:
        return f"its ids are not {published[0].decode()} to {published[-1].decode()}"
    return ""


def _key_order(split: str, count: int) -> np.ndarray:
    """(count,) stored positions in the order of the keys 0, 1, 2, ...: undoes TFDS's shuffle."""
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    keys = sorted(range(count), key=hasher.hash_key)
    return np.argsort(keys)


def _check_features(path: Path) -> None:
    """TFDS imports the modules that features.json names, so only its own may stand there."""
    try:
        features = json.loads(read_bounded(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is truncated or corrupt ({one_line(error)}): delete its folder and copy or "
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


def _check_records(path: Path) -> None:
    """TensorFlow allocates what a record's length says, and ends the process where it cannot."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has {size} bytes")
    position = 0
    with path.open("rb") as file:
        while header := file.read(_LENGTH_BYTES):
            position += int.from_bytes(header, "little") + _RECORD_BYTES
            if len(header) < _LENGTH_BYTES or position > size:
                raise ValueError(f"a record of {path.name} is longer than the file")
            file.seek(position)


@functools.cache
def _decoder(shape: tuple[int, int, int]):
    """Decodes the images of a batch of examples; traced once for a shape, not for each split."""
    import tensorflow as tf

    def decode_image(code):
        # Before it is decoded: a few bytes of PNG can announce gigabytes.
        is_png = tf.equal(tf.strings.substr(code, 0, len(_PNG)), _PNG)
        is_jpeg = tf.equal(tf.strings.substr(code, 0, len(_JPEG)), _JPEG)
        size = tf.cond(
            is_jpeg,
            lambda: tf.io.extract_jpeg_shape(code)[:2],
            lambda: tf.io.decode_raw(tf.strings.substr(code, 16, 8), tf.int32, little_endian=False)[
                ::-1
            ],
        )
        tf.debugging.Assert(is_png | is_jpeg, ["neither PNG nor JPEG"])
        tf.debugging.assert_equal(size, shape[:2], message="an image of another size")
        image = tf.io.decode_image(code, channels=shape[-1], expand_animations=False)
        return tf.ensure_shape(image, shape)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def decode(codes):
        images = tf.map_fn(decode_image, codes, fn_output_signature=tf.TensorSpec(shape, tf.uint8))
        return images, tf.strings.substr(codes, 0, len(_PNG))

    return decode


def _read_records(source: Source) -> _Records:
    """Lets TFDS read all examples of a split, in stored order, with their images still coded.

    TFDS decodes whatever size an image announces; so images are decoded here, after a look at it.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(source.folder))
    if builder.info.file_format.value != "tfrecord":
        raise DataError(
            f"{source.folder} is stored as {builder.info.file_format.value}; prepare it with "
            "TFDS's default, tfrecord."
        )
    for path in builder.info.splits[source.split].filepaths:
        _check_records(Path(path))
    examples = builder.as_dataset(
        split=source.split,
        batch_size=1_000,
        decoders={"image": tfds.decode.SkipDecoding()},
        # One shard after the other.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    decode = _decoder(source.shape)

    def columns(example):
        labels = tf.cast(example["label"], tf.int64)
        ids = example.get("id", tf.fill(tf.shape(labels), ""))
        images, signatures = decode(example["image"])
        return images, labels, ids, signatures

    batches = examples.map(columns, num_parallel_calls=tf.data.AUTOTUNE)
    parts = list(batches.as_numpy_iterator())
    images, labels, ids, signatures = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Records(images, labels, ids.astype(np.bytes_), signatures.astype(np.bytes_))
