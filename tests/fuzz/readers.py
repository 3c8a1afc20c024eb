"""The readers: files to start from, how these are damaged, the call, what it may raise."""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fuzz import mutations as m

Mutation = Callable


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of untrusted files."""

    name: str
    seed: Callable[[Path], None]
    """Writes sound files to an empty folder."""
    mutations: dict[str, Mutation]
    """By pattern of the files that are damaged."""
    read: Callable[[Path, Path], object]
    """Reads a folder of files; may write below the second folder."""
    refusals: tuple[type[Exception], ...] = (ValueError, OSError)
    """What may be raised, with one line for the user."""
    share: float = 1.0
    """Of the number of inputs that others get: less for a library that takes a second for each."""


def _json(path, value):
    path.write_text(json.dumps(value))


# Each reader imports what it needs when it is called: a worker runs one of them only.


def _seed_config(folder):
    from madry_compat.challenges import challenge_for
    from madry_compat.config import write_config

    for name in ("mnist", "cifar10"):
        settings = {"model_dir": "models/a", "random_seed": 1}
        write_config(folder / f"{name}.json", challenge_for(name), settings)


def _read_config(folder, outside):
    from madry_compat.challenges import challenge_for
    from madry_compat.config import load_config, write_config

    refused = None
    for path in sorted(folder.glob("*.json")):
        try:
            config = load_config(path)
            settings = {"model_dir": "a", "random_seed": 0, **config.settings}
            write_config(outside / "again.json", challenge_for("cifar10"), settings)
        except ValueError as error:
            refused = error
    if refused:
        raise refused


def _challenge():
    from madry_compat.challenges import challenge_for

    return dataclasses.replace(
        challenge_for("mnist"), num_test_examples=20, submission_shape=(20, 784)
    )


def _seed_submission(folder):
    images = np.random.default_rng(0).random((20, 784), np.float32)
    np.save(folder / "attack.npy", images)


def _read_submission(folder, outside):
    from madry_compat.submissions import check_submission, load_submission

    images = load_submission(folder / "attack.npy", _challenge())
    check_submission(images, np.zeros_like(images), _challenge(), epsilon=1.0)


def _seed_idx(folder):
    images = np.arange(20 * 28 * 28, dtype=np.uint8).reshape(20, 28, 28)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
        header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
        packed = gzip.compress(header + array.tobytes(), 1)
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(packed)


def _load_mnist(folder, outside, splits=("train", "test")):
    from madry_compat.data import load

    # No folder, so that nothing is cached: that is written to disk with care and slowly.
    no_folder = outside / "no-folder"
    no_folder.touch()
    refused = None
    for split in splits:
        try:
            load("mnist", split, folder, cache_dir=no_folder)
        except ValueError as error:
            refused = error
    if refused:
        raise refused


def _seed_pickles(folder):
    rows = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    (folder / "cifar-10-batches-py").mkdir()
    batch = {b"data": rows, b"labels": [0, 1, 2, 3], b"batch_label": b"test"}
    for protocol, name in ((2, "test_batch"), (5, "protocol-5")):
        path = folder / "cifar-10-batches-py" / name
        path.write_bytes(pickle.dumps(batch, protocol=protocol))


def _read_pickles(folder, outside):
    from madry_compat.challenges import image_set
    from madry_compat.data.pickles import read_pickles
    from madry_compat.data.sources import Source

    refused = None
    for path in sorted((folder / "cifar-10-batches-py").iterdir()):
        try:
            read_pickles(Source("pickles", image_set("cifar10"), "test", folder, (path,), ""))
        except ValueError as error:
            refused = error
    if refused:
        raise refused


def _seed_bundle(folder):
    from madry_compat.networks import mnist_cnn
    from madry_compat.optimizers import TF1Adam
    from madry_compat.tf1_checkpoints import save_network

    network = mnist_cnn()
    optimizer = TF1Adam(1e-4)
    optimizer.build(network.trainable_variables)
    save_network(network, folder, 0, optimizer=optimizer)


def _read_bundle(folder, outside):
    from madry_compat.tf1_checkpoints import has_training_state, load_network, read_step

    load_network(folder)
    read_step(folder)
    has_training_state(folder)


def _seed_zip(folder):
    with zipfile.ZipFile(folder / "natural.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("models/", b"")
        archive.writestr("models/natural/checkpoint", b'model_checkpoint_path: "checkpoint-1"\n')
        archive.writestr("models/natural/checkpoint-1.index", b"a" * 300)
        archive.writestr("models/natural/config.json", b"{}")


def _read_zip(folder, outside):
    from madry_compat.archives import unpack

    unpack(folder / "natural.zip", outside / "natural")


def _seed_run(folder):
    from logit_reg.experiments.defaults import resolve_settings
    from logit_reg.training.records import TIMING_COLUMNS

    settings = resolve_settings({"dataset": "mnist_5k", "reg": "squeeze", "beta": 2.0})
    record = {"schema": 1, "name": "squeeze", "settings": dataclasses.asdict(settings), "seed": 0}
    record |= {"data_dir": None, "versions": {"keras": "3.15.1"}, "commit": None}
    _json(folder / "run.json", record)
    log = "step,lr,xent,penalty,total,accuracy,mean_logit_norm\n"
    log += "".join(f"{step},1e-4,2.3,.1,2.5,.5,3.2\n" for step in (100, 200, 300))
    (folder / "log.csv").write_text(log)
    rows = [",".join(TIMING_COLUMNS), *(",".join("1" for _ in TIMING_COLUMNS) for _ in range(3))]
    (folder / "timing.csv").write_text("\n".join(rows) + "\n")
    (folder / "main").mkdir()
    _seed_ledger(folder / "main")
    images = np.random.default_rng(0).random((2, 4, 4, 1), np.float32)
    arrays = {"images": images, "adversarial": images, "labels": np.array([0, 1])}
    arrays |= {"predictions": np.array([0, 2]), "bounds": np.array([0, 1], np.float32)}
    np.savez(folder / "main" / "examples.npz", **arrays)


def _read_run(folder, outside):
    from logit_reg.experiments.runs import read_run
    from logit_reg.report.runs import export_run, load_run
    from logit_reg.report.tables import results_table

    refused = None
    try:
        settings = read_run(folder)
        _ = settings.name, settings.description, settings.challenge, settings.loop
    except ValueError as error:
        refused = error
    table = results_table([load_run(folder)])
    _ = table.to_text(), table.to_html(), table.to_markdown()
    export_run(folder, outside / "exported")
    if refused:
        raise refused


def _seed_ledger(folder):
    columns = "index,label,clean_prediction,robust,broken_by,distance,correct_pgd,correct_cw"
    columns += ",standing_after_pgd"
    rows = ["0,1,1,1,,0.3,1,1,1", "1,2,2,0,pgd,0.3,0,1,0", "2,3,1,0,clean,0,0,0,0"]
    (folder / "ledger.csv").write_text("\n".join([columns, *rows]) + "\n")
    attack = {"attack": "PGD", "threat": {"norm": "linf", "epsilon": 0.3}}
    result = {"schema": 1, "dataset": "mnist_5k", "num_examples": 3, "clean_accuracy": 2 / 3}
    result |= {"robust_accuracy": 1 / 3, "seed": 0, "settings": {"network_sha256": "0" * 64}}
    attacks = {name: {"accuracy": 0.5, "settings": attack} for name in ("pgd", "cw")}
    result["protocols"] = {"flags": {"robust_accuracy": 1 / 3, "attacks": attacks}}
    _json(folder / "result.json", result)


def _read_ledger(folder, outside):
    from logit_reg.evaluation.ledger import read_ledger
    from logit_reg.experiments.model_cards import _protocols
    from madry_compat.challenges import challenge_for

    _, result = read_ledger(folder)
    _protocols(folder, result, challenge_for("mnist"))


def _seed_keras(folder):
    import keras

    images = keras.Input((8, 8, 1))
    hidden = images - keras.ops.mean(images, axis=(1, 2, 3), keepdims=True)
    hidden = keras.layers.Conv2D(2, 3, activation="relu")(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.MaxPooling2D()(hidden)
    logits = keras.layers.Dense(3)(keras.layers.Flatten()(hidden))
    keras.Model(images, logits).save(folder / "model.keras")


def _read_keras(folder, outside):
    from logit_reg.experiments.sources import load_keras

    load_keras(folder / "model.keras")


def _variables():
    import keras

    return [keras.Variable(np.ones((3, 4), np.float32), name="a"), keras.Variable(1.0, name="b")]


def _seed_state(folder):
    from logit_reg.training.state import save_state

    save_state(folder, 100, _variables(), {"seconds": 1.0})


def _read_state(folder, outside):
    from logit_reg.training.state import restore_newest_state

    restore_newest_state(folder, _variables())


def _seed_images(folder):
    images = np.random.default_rng(0).random((4, 5, 5, 3), np.float32)
    np.savez(folder / "images.npz", images=images, labels=np.arange(4))


def _read_images(folder, outside):
    from logit_reg.experiments.sources import load_own_images

    load_own_images(folder / "images.npz", (0.0, 1.0))


def _seed_tfds(folder):
    import tensorflow as tf

    version = folder / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), np.uint8)
    name = str(version / "mnist-test.tfrecord-00000-of-00001")
    with tf.io.TFRecordWriter(name) as out:
        for number, image in enumerate(images):
            code = tf.io.encode_png(image).numpy()
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[code])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            out.write(example.SerializeToString())
    splits = [{"name": "test", "numBytes": "5000", "shardLengths": [str(len(images))]}]
    info = {"name": "mnist", "version": "3.0.1", "fileFormat": "tfrecord", "splits": splits}
    info["releaseNotes"] = {"3.0.0": "New split API."}
    _json(version / "dataset_info.json", info)
    core = "tensorflow_datasets.core.features."
    image = {"shape": {"dimensions": ["28", "28", "1"]}, "dtype": "uint8", "encodingFormat": "png"}
    features = {
        "pythonClassName": f"{core}features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {"pythonClassName": f"{core}image_feature.Image", "image": image},
                "label": {
                    "pythonClassName": f"{core}class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": "10"},
                },
            }
        },
    }
    _json(version / "features.json", features)


_NPZ = m.mutate_zip({".npy": m.mutate_npy})

READERS = {
    reader.name: reader
    for reader in (
        Reader("config", _seed_config, {"*.json": m.mutate_json}, _read_config),
        Reader("attack", _seed_submission, {"attack.npy": m.mutate_npy}, _read_submission),
        Reader("idx", _seed_idx, {"*ubyte*": m.mutate_idx}, _load_mnist),
        Reader("pickles", _seed_pickles, {"*/*": m.mutate_pickle}, _read_pickles),
        Reader(
            "bundle",
            _seed_bundle,
            {"*.index": m.mutate_table, "*.ind*": m.mutate_table, "check*t": m.mutate_bytes},
            _read_bundle,
        ),
        Reader("zip", _seed_zip, {"*.zip": m.mutate_zip({})}, _read_zip, (RuntimeError, OSError)),
        Reader(
            "run",
            _seed_run,
            {
                "run.json": m.mutate_json,
                "log.csv": m.mutate_csv,
                "timing.csv": m.mutate_csv,
                "main/result.json": m.mutate_json,
                "main/examples.npz": _NPZ,
            },
            _read_run,
        ),
        Reader(
            "ledger",
            _seed_ledger,
            {"ledger.csv": m.mutate_csv, "result.json": m.mutate_json},
            _read_ledger,
        ),
        Reader(
            "keras",
            _seed_keras,
            {"*.keras": m.mutate_zip({"config.json": m.mutate_json})},
            _read_keras,
            share=0.2,
        ),
        Reader("state", _seed_state, {"*.npz": _NPZ}, _read_state),
        Reader("images", _seed_images, {"*.npz": _NPZ}, _read_images),
        Reader(
            "tfds",
            _seed_tfds,
            {"mnist/*/*.tfrecord*": m.mutate_records, "mnist/*/*.json": m.mutate_json},
            functools.partial(_load_mnist, splits=("test",)),
            share=0.2,
        ),
    )
}


def is_past_checks(path: Path) -> bool:
    """Whether a file still has its magic bytes, its directory and its checksums."""
    try:
        content = path.read_bytes()
        if path.name == "checkpoint":
            return b"model_checkpoint_path" in content
        return _CHECKS[path.suffix](content) if path.suffix in _CHECKS else _check_other(content)
    except Exception:  # whatever the format's own checks raise
        return False


def _check_zip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.testzip() is None


def _check_index(content):
    from madry_compat.bundle_index import _varints

    handles = _varints(content[-48:], 0, 4)[0]
    offset, size = handles[2:]
    block = content[offset : offset + size + 1]
    return content[-8:] == struct.pack("<Q", 0xDB4775248B80FB57) and content[
        offset + size + 1 :
    ].startswith(m.masked_crc32c(block))


def _check_other(content):
    if content[:2] == b"\x80\x02" or content[:2] == b"\x80\x05":
        return bool(list(pickletools.genops(content)))
    if content[:3] == b"\0\0\x08":
        return True
    if content[:6] == b"\x93NUMPY":
        return True
    return _check_records(content)


def _check_records(content):
    place = 0
    while place < len(content):
        length = content[place : place + 8]
        end = place + 12 + struct.unpack("<Q", length)[0]
        if content[place + 8 : place + 12] != m.masked_crc32c(length) or end > len(content):
            return content[place + 8 : place + 12] == m.masked_crc32c(length)
        place = end + 4
    return True


_CHECKS = {
    ".json": lambda content: json.loads(content) is not Ellipsis,
    ".csv": lambda content: bool(content.decode()),
    ".npy": lambda content: content[:6] == b"\x93NUMPY",
    ".gz": lambda content: gzip.decompress(content)[:3] == b"\0\0\x08",
    ".zip": _check_zip,
    ".npz": _check_zip,
    ".keras": _check_zip,
    ".index": _check_index,
}


def files_of(reader: Reader, folder: Path) -> list[tuple[Path, Mutation]]:
    """The files of a reader that are damaged, each with its mutation."""
    found = itertools.chain.from_iterable(
        ((path, mutate) for path in sorted(folder.glob(pattern)))
        for pattern, mutate in reader.mutations.items()
    )
    return list(found)
