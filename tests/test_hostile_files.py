"""Files that are made to harm, and places that cannot be written to."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from fuzz.mutations import read_table, write_table
from tensorflow.core.protobuf import tensor_bundle_pb2

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.keras_files import read_keras
from logit_reg.experiments.runs import read_run
from logit_reg.experiments.sources import load_own_images
from logit_reg.experiments.submissions import prepare_output
from logit_reg.files import (
    atomic_path,
    read_arrays,
    read_bytes,
    read_json,
    write_arrays,
    write_json,
)
from logit_reg.report.runs import load_run
from madry_compat import data
from madry_compat.archives import FetchError, unpack
from madry_compat.challenges import challenge_for
from madry_compat.config import load_config
from madry_compat.networks import mnist_cnn
from madry_compat.submissions import load_submission, write_predictions
from madry_compat.tf1_checkpoints import CheckpointError, load_network, save_network


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def proof(tmp_path):
    """A file that appears if code runs; checked at the end."""
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small network as Keras saves it."""
    images = keras.Input((8, 8, 1))
    logits = keras.layers.Dense(3)(keras.layers.Flatten()(images))
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    keras.Model(images, logits).save(path)
    return path


def rewritten(source, path, *, config=None, weights=None, extra=None):
    """A copy of a .keras file with other contents, and sound checksums."""
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    if config is not None:
        value = json.loads(contents["config.json"])
        contents["config.json"] = json.dumps(config(value) or value).encode()
    if weights is not None:
        contents["model.weights.h5"] = weights
    contents |= extra or {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def hdf5(write):
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        write(file)
    return out.getvalue()


# Networks


def stock_networks():
    layers = keras.layers
    sequential = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, activation="gelu", kernel_regularizer=keras.regularizers.L2(0.01)),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    images = layers.Input((8, 8, 3))
    hidden = layers.Add()([layers.Conv2D(3, 3, padding="same")(images), keras.ops.relu(images)])
    hidden = layers.Reshape((64, 3))(hidden)
    hidden = layers.MultiHeadAttention(2, 4)(hidden, hidden)
    hidden = layers.GRU(5)(layers.LayerNormalization()(hidden)[:, 1:])
    functional = keras.Model(images, layers.Dense(3)(hidden * 2.0))
    functional.compile("adam", "mse")
    outer = layers.Input((8, 8, 3))
    return [sequential, functional, keras.Model(outer, sequential(outer))]


def test_stock_networks_come_back_bit_for_bit(tmp_path):
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    for network in stock_networks():
        network.save(tmp_path / "model.keras")
        loaded = read_keras(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded(images), network(images))


def test_a_lambda_layer_is_refused_and_does_not_run(tmp_path, proof):
    images = keras.Input((8, 8, 1))
    code = f"__import__('os').system('touch {proof}')"
    hidden = keras.layers.Lambda(lambda x, code=code: [x, eval(code)][0])(images)
    proof.unlink()  # building it ran it
    logits = keras.layers.Dense(3)(keras.layers.Flatten()(hidden))
    keras.Model(images, logits).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="'Lambda'.*no layer that is safe"):
        read_keras(tmp_path / "model.keras")


@pytest.mark.parametrize(
    "replacement",
    [
        {"module": "os", "class_name": "system", "config": "touch X"},
        {"module": "subprocess", "class_name": "Popen", "config": {"args": ["touch", "X"]}},
        {"module": "keras.utils", "class_name": "function", "config": "get_file"},
        {"module": "builtins", "class_name": "function", "config": "eval"},
        {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
        {"class_name": "__typespec__", "config": [], "module": "os", "spec_name": "system"},
        {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "X"}},
        {"module": "keras.layers", "class_name": "StringLookup", "config": {"vocabulary": "X"}},
        {"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {"module": "X"}},
        {
            "module": "keras.layers",
            "class_name": "Dense",
            "config": {"units": 3},
            "registered_name": "some_package>Evil",
        },
        {"class_name": "__numpy__", "config": {"value": [1], "dtype": "V1000000000"}},
    ],
    ids=lambda value: value["class_name"] + "-" + str(value.get("module")),
)
def test_a_class_that_is_no_layer_is_refused(saved, tmp_path, proof, replacement):
    replacement = json.loads(json.dumps(replacement).replace("X", str(proof)))

    def anywhere(config):
        config["config"]["layers"][1]["config"]["extra"] = replacement

    def as_layer(config):
        config["config"]["layers"][1] |= replacement

    def as_root(config):
        return replacement

    for change in (anywhere, as_layer, as_root):
        with pytest.raises(ValueError, match=r"not loaded \("):
            read_keras(rewritten(saved, tmp_path / "model.keras", config=change))


def test_a_layer_that_asks_for_more_than_the_weights_is_refused_before_it_is_made(saved, tmp_path):
    def swell(config):
        config["config"]["layers"][2]["config"]["units"] = 10_000_000

    began = time.monotonic()
    with pytest.raises(ValueError, match="ask for 2,600,000,000 bytes"):
        read_keras(rewritten(saved, tmp_path / "model.keras", config=swell))
    assert time.monotonic() - began < 20
    # What was not made is not made later either.
    read_keras(saved)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_deeply_nested_network_is_refused(saved, tmp_path, depth):
    nested = b'{"class_name": "Functional", "config": ' + b"[" * depth + b"]" * depth + b"}"
    path = rewritten(saved, tmp_path / "model.keras", extra={"config.json": nested})
    with pytest.raises(ValueError, match="nested too deeply|recursion"):
        read_keras(path)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_a_network_that_unpacks_to_gigabytes_is_refused_before_it_is_read(saved, tmp_path, name):
    path = rewritten(saved, tmp_path / "model.keras")
    content = bytearray(path.read_bytes())
    entry = content.rindex(name.encode()) - 46
    struct.pack_into("<I", content, entry + 24, 3 * 2**30)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has 3,221,225,472 bytes"):
        read_keras(path)


def huge(file):
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((1, 2**20))
    space = h5py.h5s.create_simple((2**20, 2**20))
    h5py.h5d.create(file.id, b"huge", h5py.h5t.NATIVE_FLOAT, space, layout)


def cyclic(file):
    file["a"] = file.create_group("layers")
    file["layers/again"] = file["layers"]


def external_data(file):
    file.create_dataset("x", (4,), "u1", external=[("/etc/hostname", 0, 4)])


def virtual_data(file):
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(4,))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda file: file.update({"x": h5py.ExternalLink("other.h5", "/x")}), "x is a link"),
        (lambda file: file.update({"x": h5py.SoftLink("/layers")}), "x is a link"),
        (external_data, "no array in this file"),
        (virtual_data, "no array in this file"),
        (huge, "larger than the file"),
        (cyclic, "too many or too deep"),
        (lambda file: file.update({"x": "text"}), "no array of numbers"),
    ],
)
def test_weights_that_lie_elsewhere_or_nowhere_are_refused(saved, tmp_path, write, problem):
    path = rewritten(saved, tmp_path / "model.keras", weights=hdf5(write))
    with pytest.raises(ValueError, match=problem):
        read_keras(path)


def test_hdf5_is_read_in_another_process(saved, tmp_path):
    """A library that crashes there is a refusal here."""
    with zipfile.ZipFile(saved) as archive:
        content = archive.read("model.weights.h5")
    for end in (0, 50, 700, len(content) // 2):
        path = rewritten(saved, tmp_path / "model.keras", weights=content[:end])
        with pytest.raises(ValueError, match=r"model\.weights\.h5"):
            read_keras(path)


# Checkpoints


def test_an_index_that_declares_100_gb_is_refused_before_the_data_is_read(tmp_path):
    prefix = save_network(mnist_cnn(), tmp_path, 1)
    index = Path(f"{prefix}.index")
    records = read_table(index.read_bytes())
    entry = tensor_bundle_pb2.BundleEntryProto.FromString(records[b"Variable_4"])
    entry.shape.dim[0].size = 25_000_000
    entry.size = 25_000_000 * 1024 * 4
    records[b"Variable_4"] = entry.SerializeToString()
    index.write_bytes(write_table(records))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"its index declares 102,4\d\d,\d\d\d,\d\d\d"):
        load_network(tmp_path)
    assert time.process_time() - began < 2


# Arrays and pickles


def test_object_arrays_are_refused_and_do_not_run(tmp_path, proof):
    array = np.array([Payload(proof)], dtype=object)
    np.save(tmp_path / "attack.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="pickled objects"):
        load_submission(tmp_path / "attack.npy", challenge_for("mnist"))
    np.savez(tmp_path / "images.npz", images=array, labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="no array of numbers"):
        load_own_images(tmp_path / "images.npz", (0, 1))


def cifar_batch(folder, content):
    (folder / "cifar-10-batches-py").mkdir(exist_ok=True)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(content)


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def encoded_again_and_again():
    """A text of 4 MB that takes 4 TB if each of its encodings is made."""
    begin = b"\x80\x02" + text(b"x" * 2**22) + b"q\x00" + text(b"latin1") + b"q\x01"
    return begin + b"c_codecs\nencode\nq\x02(" + b"h\x02h\x00h\x01\x86R" * 75_000 + b"l."


def arguments_without_end():
    """A text spread into a million arguments, and that a hundred thousand times."""
    begin = b"\x80\x02cnumpy\nndarray\nq\x00" + text(b"x" * 2**20) + b"q\x01("
    return begin + b"h\x00h\x01R" * 100_000 + b"l."


def equal_hashes():
    """A dict of 30,000 integers that all have one hash."""
    numbers = (number * (2**61 - 1) for number in range(1, 30_001))
    return (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + n.to_bytes(10, "little") + b"N" for n in numbers)
        + b"u."
    )


def shown_for_ever():
    """An array whose type is a list of 2**40 items where it is shown."""
    nested = b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40))
    dtype = b"cnumpy\ndtype\nh(\x85R"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85" + dtype + b"\x89"
    return b"\x80\x02" + nested + b"q(}" + text(b"data") + array + text(b"x") + b"tbs."


def repeated_tuples():
    """A dict whose key takes 2**50 steps to hash."""
    twice = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(50))
    return b"\x80\x02}(K\x01\x85q\x00" + twice + b"K\x01u."


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        repeated_tuples(),
        b"\x80\x02}(X\x06\x00\x00\x00labels](]q\x00h\x00ee.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\nq\x01N}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02(" + b"]" * 3_000_000 + b"l.",
        b"c" + b"{" * 2_000_000 + b"\nx\n.",
        encoded_again_and_again(),
        arguments_without_end(),
        equal_hashes(),
        shown_for_ever(),
    ],
    ids=[
        "2**31 places",
        "a terabyte",
        "hash",
        "nested",
        "attribute of a function",
        "a terabyte of bytearray",
        "millions of lists",
        "a long name",
        "encodings",
        "arguments",
        "equal hashes",
        "a type that is shown",
    ],
)
def test_pickles_that_swell_or_hang_are_refused(tmp_path, content):
    cifar_batch(tmp_path, content)
    began = time.process_time()
    with pytest.raises(data.DataError):
        data.load("cifar10", "test", tmp_path, cache_dir=tmp_path / "cache")
    assert time.process_time() - began < 2


def test_pickles_that_run_code_are_refused_and_do_not_run(tmp_path, proof):
    for protocol in range(6):
        cifar_batch(tmp_path, pickle.dumps({b"data": Payload(proof)}, protocol=protocol))
        with pytest.raises(data.DataError, match="system"):
            data.load("cifar10", "test", tmp_path, cache_dir=tmp_path / "cache")


def test_an_npz_bomb_is_refused_before_it_is_unpacked(tmp_path):
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10, 10, 1)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(tmp_path / "images.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(100):
                file.write(bytes(10**6))
        archive.writestr("labels.npy", b"")
    with pytest.raises(ValueError, match="100,000,000 bytes, 50,000,000 are allowed"):
        read_arrays(tmp_path / "images.npz", max_bytes=50_000_000)


# Archives


def entry(name, *, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("info", "content"),
    [
        (entry("../outside"), b"x"),
        (entry("/tmp/outside"), b"x"),
        (entry("a/../../outside"), b"x"),
        (entry("a\\..\\..\\outside"), b"x"),
        (entry("link", mode=stat.S_IFLNK | 0o777), b"/etc"),
        (entry("pipe", mode=stat.S_IFIFO | 0o644), b""),
        (entry("zeros"), bytes(200 * 2**20)),
    ],
    ids=["..", "absolute", "inside ..", "backslashes", "link", "pipe", "bomb"],
)
def test_an_archive_that_leads_outside_or_swells_leaves_nothing(tmp_path, info, content):
    folder = tmp_path / "inside"
    folder.mkdir()
    info.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("good", b"good")
        archive.writestr(info, content)
    with pytest.raises(FetchError, match="nothing was unpacked"):
        unpack(folder / "a.zip", folder / "a")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "a.zip"]


# No files at all

READERS = {
    "config.json": load_config,
    "run.json": lambda path: load_run(path.parent),
    "any.json": read_json,
    "any.npz": lambda path: read_arrays(path, max_bytes=1000),
    "any.csv": lambda path: read_bytes(path, 1000),
    "attack.npy": lambda path: load_submission(path, challenge_for("mnist")),
    "images.npz": lambda path: load_own_images(path, (0, 1)),
    "model.keras": read_keras,
    "checkpoint-1.index": load_network,
    "t10k-images-idx3-ubyte": lambda path: data.load("mnist", "test", path.parent),
    "test_batch": lambda path: data.load("cifar10", "test", path.parent),
    "a.zip": lambda path: unpack(path, path.parent / "a"),
}


@pytest.mark.parametrize("kind", ["folder", "link to itself", "pipe", "empty", "nothing"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    if name == "any.csv" and kind == "empty":
        return
    with pytest.raises((ValueError, OSError, FetchError)) as caught:
        READERS[name](path)
    assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize(
    "text",
    ["NaN", "[" * 100_000, "9" * 10_000, '{"a": ' * 50_000, "{" * 10, '"\ud800"', ""],
)
def test_odd_json_is_refused_by_name(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="run.json"):
        read_json(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", [0.5]),
        ("sigma", {"config": 0.5}),
        ("epsilon", 10**400),
        ("num_steps", 7.5),
        ("num_steps", True),
        ("clip_noise", 1),
        ("reg", None),
        ("step_size_schedule", [[0, 0.1], [400]]),
        ("keep_checkpoint_steps", [100, "200"]),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(name, value, tmp_path):
    settings = dataclasses.asdict(resolve_settings({"dataset": "mnist_5k"}))
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"settings": settings}))
    assert read_run(tmp_path).dataset == "mnist_5k"
    record.write_text(json.dumps({"settings": settings | {name: value}}))
    with pytest.raises(ValueError, match=rf"run.json: {name} must be "):
        read_run(tmp_path)


# Places that cannot be written to


@contextlib.contextmanager
def mounted(folder, options):
    """A file system in memory, if this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def writers(folder):
    big = np.zeros(300_000, np.int64)
    return {
        "any.json": lambda: write_json(folder / "any.json", ["x" * 1_000_000]),
        "any.npz": lambda: write_arrays(folder / "any.npz", {"a": big}),
        "pred.npy": lambda: write_predictions(folder / "pred.npy", big),
        "checkpoint-1": lambda: save_network(mnist_cnn(), folder, 1),
    }


@pytest.mark.parametrize("name", ["any.json", "any.npz", "pred.npy", "checkpoint-1"])
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, name):
    with mounted(tmp_path / "full", "size=512k") as folder:
        for file in ("any.json", "any.npz", "pred.npy", "checkpoint-1.index"):
            (folder / file).write_text("before")
        with pytest.raises(OSError, match=f"{name}: cannot be written"):
            writers(folder)[name]()
        assert {path.read_text() for path in folder.iterdir()} == {"before"}


@pytest.mark.parametrize("name", ["any.json", "any.npz", "pred.npy"])
def test_a_read_only_folder_is_named(tmp_path, name):
    with mounted(tmp_path / "full", "size=512k,ro") as folder:
        with pytest.raises(OSError, match=f"{name}: cannot be written"):
            writers(folder)[name]()
        with pytest.raises(OSError, match=r"attack\.npy: cannot be written.*another folder"):
            prepare_output(folder / "attack.npy")


def test_a_folder_that_vanishes_while_a_file_is_written_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    with (
        pytest.raises(OSError, match=r"any\.json: cannot be written"),
        atomic_path(folder / "any.json") as temporary,
    ):
        temporary.write_text("{}")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_command_that_cannot_write_says_so_before_it_works(saved, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "logit_reg.commands.attack", f"--model_dir={saved}"]
    command.append(f"--store_adv_path={tmp_path / 'file' / 'attack.npy'}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "attack.npy" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
