"""Checkpoints both ways, against the challenges' graphs in TF1 and against damaged files."""

import dataclasses
import logging
import os
import shutil
import struct
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import tensor_bundle_pb2
from tf1_challenge_graphs import (
    BATCH_NORM_DECAY,
    WEIGHT_DECAY,
    ChallengeGraph,
    cifar10_graph,
    mnist_graph,
)

from madry_compat.networks import mnist_cnn, wide_resnet
from madry_compat.optimizers import ADAM_EPSILON, TF1Adam, TF1Momentum, piecewise_constant
from madry_compat.tf1_checkpoints import (
    CheckpointError,
    has_training_state,
    load_network,
    load_training_state,
    read_step,
    save_network,
    tf1_names,
)

tf1 = tf.compat.v1

MNIST_BATCH = 50
CIFAR10_BATCH = 8
NUM_STEPS_BEFORE, NUM_STEPS, NUM_STEPS_AFTER = 3, 5, 2
# The rate drops in the middle of the steps that go on from the checkpoint.
CIFAR10_SCHEDULE = [[0, 0.1], [5, 0.01]]
DATA_SUFFIX = ".data-00000-of-00001"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the original code wrote: a checkpoint, its logits, and where training led."""

    graph: ChallengeGraph
    batches: list
    probes: np.ndarray
    logits: np.ndarray
    start: str
    end: str
    final: str

    @property
    def next_batches(self):
        return self.batches[NUM_STEPS_BEFORE:][:NUM_STEPS]


def random_batches(shape, upper, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.uniform(0, upper, shape).astype(np.float32), rng.integers(0, 10, shape[0]))
        for _ in range(NUM_STEPS_BEFORE + NUM_STEPS + NUM_STEPS_AFTER)
    ]


def make_reference(graph, batches, probes, folder, predict=None):
    with graph.initialised() as session:
        keep_away_from_kinks(graph, session)
        graph.train(session, batches[:NUM_STEPS_BEFORE])
        start = graph.save(session, folder)
        predict = predict or (lambda _: graph.predict(session, probes))
        logits = predict(start)
        graph.train(session, batches[NUM_STEPS_BEFORE:][:NUM_STEPS])
        end = graph.save(session, folder)
        graph.train(session, batches[NUM_STEPS_BEFORE + NUM_STEPS :])
        final = graph.save(session, folder)
    return Reference(graph, batches, probes, logits, start, end, final)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    batches = random_batches((MNIST_BATCH, 784), 1.0)
    probes = np.random.default_rng(1).uniform(0, 1, (64, 784)).astype(np.float32)
    return make_reference(mnist_graph(), batches, probes, tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def cifar10_eval():
    return cifar10_graph(1, training=False)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory, cifar10_eval):
    graph = cifar10_graph(1, training=True, boundaries=(5,), rates=(0.1, 0.01))
    batches = random_batches((CIFAR10_BATCH, 32, 32, 3), 255.0)
    probes = np.random.default_rng(1).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)

    def predict(prefix):
        with cifar10_eval.restored(prefix) as session:
            return cifar10_eval.predict(session, probes)

    folder = tmp_path_factory.mktemp("cifar10")
    return make_reference(graph, batches, probes, folder, predict)


def keep_away_from_kinks(graph, session):
    """Moves all activations away from 0, half to each side.

    Where rounding decides on which side of a ReLU a value falls, gradients of the same network
    differ by a per cent, in TF1 as in Keras, and training parts: depth and Adam amplify it.
    """
    rng = np.random.default_rng(5)
    with graph.graph.as_default():
        variables = {variable.op.name: variable for variable in tf1.trainable_variables()}
        for name, variable in variables.items():
            signs = rng.choice([-1.0, 1.0], variable.shape).astype(np.float32)
            if name.endswith("BatchNorm/gamma"):
                variable.load(np.abs(0.2 * signs), session)
            elif name.endswith("BatchNorm/beta") or name in (
                "Variable_1",
                "Variable_3",
                "Variable_5",
            ):
                variable.load(signs, session)
        for name, scale in {"Variable": 0.1, "Variable_2": 0.05, "Variable_4": 0.02}.items():
            if name in variables:
                variables[name].load(scale * session.run(variables[name]), session)


def read_bundle(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def write_bundle(prefix, values):
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )
    return str(prefix)


def relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def assert_same_values(ours, theirs, tolerance=1e-4):
    """Variables within the tolerance of their own largest value, slots of their kind's largest."""
    assert ours.keys() == theirs.keys()
    scales: dict[str, float] = {}
    for name, value in theirs.items():
        kind = slot_kind(name) or name
        scales[kind] = max(scales.get(kind, 1e-30), np.abs(value).max())
    errors = {
        name: np.abs(ours[name] - theirs[name]).max() / scales[slot_kind(name) or name]
        for name in theirs
    }
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def slot_kind(name):
    kind = name.rpartition("/")[2]
    return kind if kind in ("Adam", "Adam_1", "Momentum") else None


def assert_same_form(ours, theirs):
    def form(values):
        return {name: (value.shape, value.dtype) for name, value in values.items()}

    assert form(ours) == form(theirs)


def train_mnist(network, optimizer, batches, reduce):
    for images, labels in batches:
        with tf.GradientTape() as tape:
            logits = network(images.reshape(-1, 28, 28, 1), training=True)
            loss = reduce(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            )
        variables = network.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)


def train_cifar10(network, optimizer, batches):
    kernels = [v for name, v in tf1_names(network).items() if name.endswith("DW")]
    for images, labels in batches:
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            )
            loss += WEIGHT_DECAY * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
        variables = network.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)


def one_error(call):
    """The message of the CheckpointError that `call` raises; never a traceback of TensorFlow's."""
    with pytest.raises(CheckpointError) as caught:
        call()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


# Against the challenges' graphs.


def test_mnist_checkpoint_gives_the_original_logits(mnist):
    network = load_network(mnist.start)

    logits = network(mnist.probes.reshape(-1, 28, 28, 1), training=False)

    assert logits.shape == (64, 10)
    assert relative_error(logits.numpy(), mnist.logits) < 1e-4


def test_cifar10_checkpoint_gives_the_original_logits(cifar10):
    network = load_network(cifar10.start)

    logits = network(cifar10.probes, training=False)

    assert logits.shape == (16, 10)
    assert relative_error(logits.numpy(), cifar10.logits) < 1e-4


@pytest.mark.slow
def test_width_10_checkpoint_gives_the_original_logits(tmp_path):
    graph = cifar10_graph(10, training=True)
    probes = np.random.default_rng(1).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    with graph.initialised() as session:
        graph.train(session, [(probes[:4], np.arange(4))])
        prefix = graph.save(session, tmp_path)
    graph = cifar10_graph(10, training=False)
    with graph.restored(prefix) as session:
        expected = graph.predict(session, probes)

    network = load_network(prefix)

    sizes = [variable.value.shape.num_elements() for variable in network.trainable_variables]
    assert (len(sizes), sum(sizes)) == (95, 45_901_914)
    assert has_training_state(prefix)
    assert relative_error(network(probes, training=False).numpy(), expected) < 1e-4


def test_mnist_bundle_restores_in_the_original_graph(mnist, tmp_path):
    network, optimizer = load_network(mnist.start), TF1Adam()
    step = load_training_state(mnist.start, network, optimizer)

    prefix = save_network(network, tmp_path, step, optimizer=optimizer)

    ours, theirs = read_bundle(prefix), read_bundle(mnist.start)
    assert len(theirs) == 27
    assert_same_form(ours, theirs)
    assert_same_values(ours, theirs, tolerance=1e-6)
    with mnist.graph.restored(prefix) as session:
        np.testing.assert_array_equal(mnist.graph.predict(session, mnist.probes), mnist.logits)


def test_cifar10_bundle_restores_in_the_original_graph(cifar10, cifar10_eval, tmp_path):
    network, optimizer = load_network(cifar10.start), TF1Momentum(0.1)
    step = load_training_state(cifar10.start, network, optimizer)

    prefix = save_network(network, tmp_path, step, optimizer=optimizer)

    ours, theirs = read_bundle(prefix), read_bundle(cifar10.start)
    assert len(theirs) == 253
    assert_same_form(ours, theirs)
    assert_same_values(ours, theirs, tolerance=0)
    with cifar10_eval.restored(prefix) as session:
        logits = cifar10_eval.predict(session, cifar10.probes)
    np.testing.assert_array_equal(logits, cifar10.logits)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mnist_training_goes_on_as_the_original(mnist, tmp_path, reduction):
    """Five steps here, then two more in the original graph from our bundle."""
    is_mean = reduction == "mean"
    settings = {"loss_reduction": reduction, "batch_size": MNIST_BATCH if is_mean else None}
    network = load_network(mnist.start)
    optimizer = TF1Adam(epsilon=ADAM_EPSILON / MNIST_BATCH if is_mean else ADAM_EPSILON)

    step = load_training_state(mnist.start, network, optimizer, **settings)
    train_mnist(
        network, optimizer, mnist.next_batches, tf.reduce_mean if is_mean else tf.reduce_sum
    )
    prefix = save_network(network, tmp_path, step + NUM_STEPS, optimizer=optimizer, **settings)

    assert_same_values(read_bundle(prefix), read_bundle(mnist.end))
    with mnist.graph.restored(prefix) as session:
        mnist.graph.train(session, mnist.batches[NUM_STEPS_BEFORE + NUM_STEPS :])
        again = mnist.graph.save(session, tmp_path / "again")
    assert_same_values(read_bundle(again), read_bundle(mnist.final))


def test_mnist_training_parts_from_the_original_without_its_slots(mnist, tmp_path):
    network, optimizer = load_network(mnist.start), TF1Adam()
    optimizer.build(network.trainable_variables)

    train_mnist(network, optimizer, mnist.next_batches, tf.reduce_sum)

    ours, theirs = tf1_names(network)["Variable"].value.numpy(), read_bundle(mnist.end)["Variable"]
    assert relative_error(ours, theirs) > 3e-4


def test_cifar10_training_goes_on_as_the_original_across_a_drop_of_the_rate(cifar10, tmp_path):
    network = load_network(cifar10.start)
    optimizer = TF1Momentum(piecewise_constant(CIFAR10_SCHEDULE))

    step = load_training_state(cifar10.start, network, optimizer)
    train_cifar10(network, optimizer, cifar10.next_batches)
    prefix = save_network(network, tmp_path, step + NUM_STEPS, optimizer=optimizer)

    ours = read_bundle(prefix)
    for name, value in read_bundle(cifar10.start).items():
        if name.endswith("moving_variance"):
            ours[name] = with_tf1s_variance(name, ours[name], value)
    assert_same_values(ours, read_bundle(cifar10.end))
    with cifar10.graph.restored(write_bundle(tmp_path / "corrected" / "model", ours)) as session:
        cifar10.graph.train(session, cifar10.batches[NUM_STEPS_BEFORE + NUM_STEPS :])
        again = cifar10.graph.save(session, tmp_path / "again")
    assert_same_values(read_bundle(again), read_bundle(cifar10.final))


def with_tf1s_variance(name, ours, start):
    """The moving variance, had every batch added n / (n - 1) of its variance, as in TF1."""
    unit = name.split("/")[0]
    size = {"unit_1": 32, "unit_2": 16, "unit_3": 8, "unit_l": 8}[unit[:6]]
    if unit in ("unit_2_0", "unit_3_0") and "residual_only_activation" in name:
        size *= 2  # before the stride
    n = CIFAR10_BATCH * size * size
    kept = BATCH_NORM_DECAY**NUM_STEPS * start
    return (kept + n / (n - 1) * (ours - kept)).astype(np.float32)


def test_cifar10_training_parts_from_the_original_with_kerass_momentum(cifar10):
    network = load_network(cifar10.start)
    optimizer = keras.optimizers.SGD(piecewise_constant(CIFAR10_SCHEDULE), momentum=0.9)

    train_cifar10(network, optimizer, cifar10.next_batches[:2])

    end = read_bundle(cifar10.end)
    errors = [relative_error(v.value.numpy(), end[name]) for name, v in tf1_names(network).items()]
    assert max(errors) > 1e-2


# Names.


@pytest.mark.shared
def test_every_name_and_shape_of_the_released_index_is_in_the_map(shared, tmp_path):
    shutil.copy(shared / "reference" / "madry_mnist_secret.index", tmp_path / "secret.index")
    # The names and shapes can be read when the data file is there, even if it is a hole.
    with (tmp_path / f"secret{DATA_SUFFIX}").open("wb") as data:
        data.truncate(39_295_624)
    released = tf.train.load_checkpoint(str(tmp_path / "secret")).get_variable_to_shape_map()

    network, optimizer = mnist_cnn(), TF1Adam()
    saved = read_bundle(save_network(network, tmp_path / "ours", 0, optimizer=optimizer))

    assert len(released) == 27
    assert {name: list(value.shape) for name, value in saved.items()} == released
    assert has_training_state(tmp_path / "secret")
    assert "the file is damaged" in one_error(lambda: load_network(tmp_path / "secret"))


@pytest.mark.shared
def test_the_released_index_without_its_data_says_which_file_is_missing(shared, tmp_path):
    index = tmp_path / "checkpoint-99900.index"
    shutil.copy(shared / "reference" / "madry_mnist_secret.index", index)

    for call in (load_network, read_step, has_training_state):
        message = one_error(lambda call=call: call(index.with_suffix("")))
        assert "data file missing" in message
        assert f"checkpoint-99900{DATA_SUFFIX}" in message


def test_a_network_from_a_keras_file_has_the_same_names(tmp_path):
    network = wide_resnet(width=1, num_classes=7)
    network.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")

    names, copied = tf1_names(network), tf1_names(copy)

    assert len(names) == 157
    assert list(names) == list(copied)
    for name, variable in names.items():
        np.testing.assert_array_equal(variable.value.numpy(), copied[name].value.numpy())


def test_another_network_has_no_names(tmp_path):
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10, name="logits")])

    with pytest.raises(ValueError, match="not those of .*mnist_cnn or wide_resnet"):
        save_network(network, tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


# Save, find, load.


@pytest.fixture(scope="module")
def small():
    """Values of a narrow network's checkpoint."""
    names = tf1_names(wide_resnet(width=1))
    values = {name: variable.value.numpy() for name, variable in names.items()}
    return values | {"global_step": np.int64(7)}


@pytest.fixture
def prefix(small, tmp_path):
    return write_bundle(tmp_path / "run" / "checkpoint-7", small)


def test_save_writes_relative_paths_and_nothing_else(tmp_path):
    network = wide_resnet(width=1)
    folder = tmp_path / "run"

    save_network(network, folder, 3)
    prefix = save_network(network, folder, 20)

    assert prefix == str(folder / "checkpoint-20")
    assert (folder / "checkpoint").read_text() == (
        'model_checkpoint_path: "checkpoint-20"\n'
        'all_model_checkpoint_paths: "checkpoint-3"\n'
        'all_model_checkpoint_paths: "checkpoint-20"\n'
    )
    expected = {f"checkpoint-{step}{end}" for step in (3, 20) for end in (".index", DATA_SUFFIX)}
    assert {path.name for path in folder.iterdir()} == expected | {"checkpoint"}
    moved = folder.rename(tmp_path / "moved")
    assert tf.train.latest_checkpoint(str(moved)) == str(moved / "checkpoint-20")
    values = read_bundle(moved / "checkpoint-20")
    assert (len(values), values["global_step"], values["global_step"].dtype) == (158, 20, np.int64)
    assert read_step(moved) == 20
    assert not has_training_state(moved)


def test_an_interrupted_save_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    network = wide_resnet(width=1)
    save_network(network, tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_network(network, tmp_path, 4)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_class_count_and_width_come_from_the_shapes(tmp_path):
    network = wide_resnet(width=2, num_classes=100)

    loaded = load_network(save_network(network, tmp_path, 0))

    assert loaded.output_shape == (None, 100)
    assert loaded.get_layer("unit_last_bn").gamma.shape == (128,)


def find_by_prefix(prefix):
    return prefix


def find_by_index_file(prefix):
    return f"{prefix}.index"


def find_in_a_folder_without_state_file(prefix):
    for suffix in (".index", DATA_SUFFIX):
        shutil.copy(f"{prefix}{suffix}", Path(prefix).with_name(f"checkpoint-10{suffix}"))
    # By number, not by letters: 10 is newer than 7 and 9.
    Path(prefix).with_name("checkpoint-9.index").write_bytes(b"old")
    return Path(prefix).parent


def find_by_another_machines_path(prefix):
    state = Path(prefix).with_name("checkpoint")
    state.write_text('model_checkpoint_path: "/home/somebody/models/secret/checkpoint-7"\n')
    return state.parent


def find_by_a_windows_path(prefix):
    state = Path(prefix).with_name("checkpoint")
    state.write_text(r'model_checkpoint_path: "C:\\models\\secret\\checkpoint-7"')
    return state.parent


def find_in_a_release(prefix):
    release = Path(prefix).parents[1] / "release"
    (release / "models").mkdir(parents=True)
    find_by_another_machines_path(prefix).rename(release / "models" / "secret")
    return release


@pytest.mark.parametrize(
    "find",
    [
        find_by_prefix,
        find_by_index_file,
        find_in_a_folder_without_state_file,
        find_by_another_machines_path,
        find_by_a_windows_path,
        find_in_a_release,
    ],
)
def test_a_checkpoint_is_found(prefix, find):
    assert read_step(find(prefix)) == 7


def test_several_candidates_are_listed(prefix):
    folder = Path(prefix).parent
    shutil.copytree(folder, folder.parent / "second")

    message = one_error(lambda: load_network(folder.parent))

    assert "several checkpoints inside: run, second" in message


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (b'model_checkpoint_path: "checkpoint-8"', "checkpoint-8.index is not beside it"),
        (b'model_checkpoint_path: "../../checkpoint-7x"', "checkpoint-7x.index is not beside it"),
        (b"not a state file", "no model_checkpoint_path"),
        (b"\xff\xfe\x00", "no model_checkpoint_path"),
        (b"", "no model_checkpoint_path"),
    ],
)
def test_a_wrong_state_file_is_refused(prefix, state, expected):
    path = Path(prefix).with_name("checkpoint")
    path.write_bytes(state)

    assert expected in one_error(lambda: load_network(path.parent))


def test_paths_without_a_checkpoint_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no checkpoint")

    assert "no such checkpoint" in one_error(lambda: load_network(tmp_path / "absent"))
    assert "not a TF1 checkpoint" in one_error(lambda: load_network(tmp_path / "notes.txt"))
    assert "no checkpoint inside" in one_error(lambda: load_network(tmp_path))


# Damaged and unfitting files.


def test_a_flipped_byte_of_the_data_is_refused(prefix):
    data = Path(f"{prefix}{DATA_SUFFIX}")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)

    message = one_error(lambda: load_network(prefix))

    assert "cannot be read, the file is damaged" in message
    assert "Checksum does not match" in message
    assert "\n" not in message


def test_a_truncated_data_file_is_refused(prefix):
    data = Path(f"{prefix}{DATA_SUFFIX}")
    size = data.stat().st_size
    os.truncate(data, size - 1)

    message = one_error(lambda: load_network(prefix))

    assert f"{size - 1:,} bytes, but its index declares {size:,}" in message


def test_a_missing_data_file_is_named(prefix):
    Path(f"{prefix}{DATA_SUFFIX}").unlink()

    message = one_error(lambda: load_network(prefix))

    assert "data file missing; expected checkpoint-7.data-00000-of-00001" in message


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 4096, os.urandom(5000)])
def test_a_file_that_is_no_index_is_refused(prefix, content):
    Path(f"{prefix}.index").write_bytes(content)

    assert "not the index of a TF1 checkpoint" in one_error(lambda: load_network(prefix))


def test_damage_anywhere_in_the_index_is_noticed(prefix):
    index = Path(f"{prefix}.index")
    content = index.read_bytes()
    num_bytes = len(content) - 100  # after them an unused block, and padding
    for position in np.random.default_rng(0).choice(num_bytes, 60, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(position) % 8
        index.write_bytes(damaged)
        one_error(lambda: read_step(prefix))
    for length in range(0, len(content), 97):
        index.write_bytes(content[:length])
        one_error(lambda: read_step(prefix))


def test_all_differences_are_listed_at_once(small, tmp_path):
    values = dict(small)
    del values["unit_1_0/sub1/conv1/DW"], values["unit_3_4/sub2/BatchNorm/moving_mean"]
    values["ema/weights"] = np.zeros(3, np.float32)
    values["input/init_conv/DW"] = np.zeros((5, 5, 3, 16), np.float32)
    values["unit_last/BatchNorm/beta/Momentum"] = np.zeros(63, np.float32)
    values["logit/biases"] = values["logit/biases"].astype(np.float64)
    prefix = write_bundle(tmp_path / "checkpoint-7", values)

    lines = [line.strip() for line in one_error(lambda: load_network(prefix)).splitlines()]

    assert lines == [
        f"{prefix} does not fit the challenge's network; 6 names differ:",
        "- unit_1_0/sub1/conv1/DW: missing",
        "- unit_3_4/sub2/BatchNorm/moving_mean: missing",
        "+ ema/weights: unexpected",
        "! input/init_conv/DW: shape (5, 5, 3, 16), expected (3, 3, 3, 16)",
        "! logit/biases: not of type float32",
        "! unit_last/BatchNorm/beta/Momentum: shape (63,), expected (64,)",
    ]


def test_another_class_count_on_mnist_is_a_wrong_shape(tmp_path):
    graph = mnist_graph(num_classes=7)
    with graph.initialised() as session:
        prefix = graph.save(session, tmp_path)

    message = one_error(lambda: load_network(prefix))

    assert "! Variable_6: shape (1024, 7), expected (1024, 10)" in message
    assert "! Variable_7/Adam: shape (7,), expected (10,)" in message


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    prefix = tf.train.Checkpoint(weights=tf.Variable(1.0)).save(str(tmp_path / "model"))

    message = one_error(lambda: load_network(prefix))

    assert "none of its variables" in message
    assert "expected a TF1 checkpoint of a challenge" in message


def test_the_perturbation_of_free_training_is_left_out_with_a_notice(small, tmp_path, caplog):
    extra = ["input/instance_perturbation", "input/instance_perturbation/Momentum"]
    values = small | dict.fromkeys(extra, np.ones((4, 32, 32, 3), np.float32))
    prefix = write_bundle(tmp_path / "checkpoint-7", values)

    with caplog.at_level(logging.WARNING):
        network = load_network(prefix)

    assert [record.args[1] for record in caplog.records] == extra
    for name, variable in tf1_names(network).items():
        np.testing.assert_array_equal(variable.value, small[name])


def test_a_checkpoint_without_slots_cannot_be_trained_on(prefix):
    network = wide_resnet(width=1)

    message = one_error(lambda: load_training_state(prefix, network, TF1Momentum(0.1)))

    assert "95 names differ" in message
    assert "- logit/DW/Momentum: missing" in message


def test_training_state_is_recognised(mnist, cifar10, prefix):
    assert has_training_state(mnist.start)
    assert has_training_state(cifar10.start)
    assert not has_training_state(prefix)
    assert read_step(mnist.end) == NUM_STEPS_BEFORE + NUM_STEPS


def test_beta_powers_of_a_long_run_underflow_to_zero(tmp_path):
    network, optimizer = mnist_cnn(), TF1Adam()
    optimizer.build(network.trainable_variables)
    optimizer.iterations.assign(200_000)
    prefix = save_network(network, tmp_path, 200_000, optimizer=optimizer)
    restored = TF1Adam()

    step = load_training_state(prefix, network, restored)

    values = read_bundle(prefix)
    assert (values["beta1_power"], values["beta2_power"]) == (0.0, 0.0)
    assert step == int(restored.iterations) == 200_000


@pytest.mark.parametrize(
    ("optimizer", "settings", "expected"),
    [
        (lambda: keras.optimizers.SGD(0.1), {}, "belong to keras.optimizers.Adam"),
        (lambda: TF1Momentum(0.1), {}, "belong to keras.optimizers.Adam"),
        (lambda: keras.optimizers.Adam(amsgrad=True), {}, "belong to keras.optimizers.Adam"),
        (lambda: keras.optimizers.Adam(), {}, "epsilon is 1e-07"),
        (TF1Adam, {"loss_reduction": "mean"}, "batch_size is None"),
        (TF1Adam, {"loss_reduction": "mean", "batch_size": 0}, "batch_size is 0"),
        (TF1Adam, {"loss_reduction": "mean", "batch_size": 50}, "TF1Adam.epsilon=2e-10"),
        (TF1Adam, {"loss_reduction": "median"}, "'sum', 'mean' or None; got 'median'"),
    ],
)
def test_unfitting_optimizers_are_refused(mnist, optimizer, settings, expected):
    with pytest.raises(ValueError, match=expected):
        load_training_state(mnist.start, mnist_cnn(), optimizer(), **settings)


def test_momentum_belongs_to_the_mean_loss(tmp_path):
    with pytest.raises(ValueError, match="train with the mean"):
        save_network(
            wide_resnet(width=1), tmp_path, 0, optimizer=TF1Momentum(0.1), loss_reduction="sum"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 3])
def test_a_wrong_step_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match="step"):
        save_network(wide_resnet(width=1), tmp_path, step, optimizer=TF1Momentum(0.1))
    assert list(tmp_path.iterdir()) == []


# An index made to harm: its checksums are right, so only its content can give it away.


def write_index(path, records):
    """A table with one block of records (key, value), as LevelDB writes it."""
    table = b""

    def put(block):
        nonlocal table
        handle = varint(len(table)) + varint(len(block))
        crc = crc32c(block + b"\0")
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        table += block + b"\0" + struct.pack("<I", masked)
        return handle

    def block(pairs):
        content = b"".join(
            b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs
        )
        return content + struct.pack("<II", 0, 1)

    data = put(block(records))
    footer = put(block([])) + put(block([(b"\xff", data)]))
    footer = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(path).write_bytes(table + footer)


def varint(number):
    content = b""
    while number > 127:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])


def crc32c(content):
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def entry(shape, size, **fields):
    dims = [{"size": dim} for dim in shape]
    proto = tensor_bundle_pb2.BundleEntryProto(
        dtype=fields.pop("dtype", 1), shape={"dim": dims}, size=size, **fields
    )
    return proto.SerializeToString()


HEADER = tensor_bundle_pb2.BundleHeaderProto(num_shards=1, version={"producer": 1})
GIANT = 1 << 40


def test_the_index_written_here_is_a_sound_one(tmp_path):
    """Otherwise the refusals below would prove nothing."""
    (tmp_path / f"model{DATA_SUFFIX}").write_bytes(struct.pack("<q", 5))
    checksum = crc32c(struct.pack("<q", 5))
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    step = entry((), 8, dtype=tf.int64.as_datatype_enum, crc32c=masked)

    write_index(
        tmp_path / "model.index", [(b"", HEADER.SerializeToString()), (b"global_step", step)]
    )

    assert read_step(tmp_path / "model") == 5


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (entry((GIANT, 10), 4 * 10 * GIANT), "but its index declares 43,980,465,111,040"),
        (entry((GIANT, 10), 4), "has 4 bytes for the shape"),
        # TensorFlow's own reader ends the process on each of these.
        (entry((GIANT,) * 4, 4), "has the shape"),
        (entry((-5,), 4), "has the shape"),
        (entry((1,) * 300, 4), "has the shape"),
        (b"\xff\xff\xff", "not the index"),
        (entry((1,), 4, offset=1 << 50), "but its index declares"),
        (entry((1,), 4, offset=-8), "negative"),
        (entry((1,), 4, shard_id=7), "data file missing"),
        (entry((4,), 0, slices=[{"extent": [{"length": 2}]}]), "stored in slices"),
    ],
)
def test_an_index_made_to_harm_is_refused_before_anything_is_read(tmp_path, record, expected):
    (tmp_path / f"model{DATA_SUFFIX}").write_bytes(b"\0" * 64)
    write_index(
        tmp_path / "model.index", [(b"", HEADER.SerializeToString()), (b"logit/DW", record)]
    )

    assert expected in one_error(lambda: load_network(tmp_path / "model"))


@pytest.mark.parametrize("shape", [(0, 64 * GIANT), (64 * GIANT, 0)])
def test_empty_tensors_of_a_giant_network_are_wrong_shapes(tmp_path, shape):
    """They take no bytes, but the network of that width would."""
    (tmp_path / f"model{DATA_SUFFIX}").write_bytes(b"")
    names = (b"logit/DW", b"unit_3_0/sub1/conv1/DW")
    records = [(b"", HEADER.SerializeToString()), *((name, entry(shape, 0)) for name in names)]
    write_index(tmp_path / "model.index", records)

    assert "does not fit" in one_error(lambda: load_network(tmp_path / "model"))
