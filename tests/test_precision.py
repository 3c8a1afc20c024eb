"""Attacks that follow a network in bfloat16: faster directions, the same judge."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import command

from logit_reg.attacks import (
    APGD,
    FAB,
    MD,
    PGD,
    SPSA,
    APGDTargeted,
    FABTargeted,
    Restarts,
    Square,
)
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.low_precision import (
    NO_BFLOAT16,
    LowPrecision,
    PrecisionError,
    bfloat16_copy,
    has_bfloat16,
    lower_precision,
)
from logit_reg.evaluation.run import evaluate
from logit_reg.evaluation.state import EvaluationState
from logit_reg.threat import ThreatModel
from madry_compat.data import load, to_pixels
from madry_compat.networks import mnist_cnn, wide_resnet

pytestmark = pytest.mark.graph_optimiser

LINF = ThreatModel("linf", 0.1)
COUNT = 60


@pytest.fixture(scope="module")
def digits():
    """Images (N, 28, 28, 1) in [0, 1] and labels."""
    dataset = load("mnist_5k", "test")
    return to_pixels(dataset.images[:COUNT], "mnist_5k"), dataset.labels[:COUNT]


@pytest.fixture(scope="module")
def network():
    """A small network that reads digits."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(4, 5, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    train = load("mnist_5k", "train")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    model.fit(to_pixels(train.images, "mnist_5k"), train.labels, 100, epochs=4, verbose=0)
    return model


class Anything(LowPrecision):
    """A `LowPrecision` whose copy is any function at all."""

    def __init__(self, function, tolerance=0.0):
        self._network, self.tolerance = function, tolerance


ATTACKS = [
    PGD(LINF, num_steps=12, step_size=0.02),
    PGD(LINF, "cw", num_steps=12, step_size=0.02, early_stop=True),
    Restarts(PGD(LINF, "cw", num_steps=4, step_size=0.05, early_stop=True), 3),
    MD(LINF, num_steps=12),
    APGD(LINF, num_steps=20),
    APGDTargeted(LINF, num_targets=2, num_steps=20),
    FAB(LINF, num_steps=3),
    FABTargeted(LINF, num_targets=2, num_steps=10, early_stop=True),
    Square(LINF, num_queries=60),
    SPSA(LINF, num_steps=3, num_samples=16),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_whoever_counts_as_fooled_fools_the_network_itself(attack, network, digits):
    images, labels = digits
    low = LowPrecision(network, images)
    found = attack.run(network, images, labels, seed=0, gradient_logits_fn=low)
    wrong = is_fooled(network(found.adversarial), labels).numpy()
    assert found.fooled.any() and not found.fooled.all()
    np.testing.assert_array_equal(wrong & found.fooled, found.fooled)
    plain = attack.run(network, images, labels, seed=0)
    # The same attack: what it finds differs by what rounding tips over.
    assert np.sum(found.fooled != plain.fooled) <= (0 if "FAB" in type(attack).__name__ else 3)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_a_copy_that_calls_everybody_fooled_convinces_nobody(attack, network, digits):
    images, _ = digits
    labels = np.argmax(network(images).numpy(), axis=-1)
    careful = ThreatModel("linf", 1e-4)
    replaced = _with_threat(attack, careful)
    liar = Anything(lambda images: -network(images))
    found = replaced.run(network, images, labels, seed=0, gradient_logits_fn=liar)
    assert not found.fooled.any()


def _with_threat(attack, threat):
    if isinstance(attack, Restarts):
        return Restarts(_with_threat(attack.attack, threat), attack.num_restarts)
    return dataclasses.replace(attack, threat=threat)


def test_only_doubtful_iterates_are_looked_at_twice(network, digits):
    """The network itself sees the iterates that the copy does not call safe, and the last one."""
    images, _ = digits
    labels = np.argmax(network(images).numpy(), axis=-1)
    seen = []

    def watched(points):
        tf.py_function(lambda x: seen.append(len(x)), [points], [])
        return network(points)

    # The copy has no doubt about the first half: it knows an image by its place in the batch.
    sure = tf.where(tf.range(COUNT)[:, None] < COUNT // 2, tf.one_hot(labels, 10), 0.0)
    still = Anything(lambda points: sure + 0.0 * tf.reduce_sum(points, axis=(1, 2, 3))[:, None])
    attack = PGD(ThreatModel("linf", 1e-6), num_steps=8, step_size=1e-6, random_start=False)
    attack.run(watched, images, labels, seed=0, gradient_logits_fn=still)
    # Six steps follow the copy; the last quarter and the last look are the network's own.
    assert seen == [COUNT - COUNT // 2] * 6 + [COUNT] * 3


def test_the_last_quarter_of_the_steps_follows_the_network_itself():
    def linear(images):
        total = tf.reduce_sum(images, axis=(1, 2, 3))
        return tf.stack([total, tf.ones_like(total)], axis=1)

    still = Anything(lambda images: tf.stop_gradient(linear(images)), tolerance=0.01)
    images = np.full((3, 2, 2, 1), 0.5, np.float32)
    attack = PGD(ThreatModel("linf", 0.1), num_steps=8, step_size=0.01, random_start=False)
    found = attack.run(linear, images, np.zeros(3, int), seed=0, gradient_logits_fn=still)
    np.testing.assert_allclose(found.adversarial, images - 0.02, atol=1e-6)


def test_another_function_to_follow_is_judged_at_every_iterate(network, digits):
    """Only a `LowPrecision` is known to be the same network: a surrogate says nothing of it."""
    images, _ = digits
    labels = np.argmax(network(images).numpy(), axis=-1)
    safe = lambda points: tf.one_hot(labels, 10) * 9.0 + 0.0 * network(points)  # noqa: E731
    attack = PGD(LINF, num_steps=4, step_size=0.05)
    plain = attack.run(network, images, labels, seed=0)
    guided = attack.run(network, images, labels, seed=0, gradient_logits_fn=safe)
    wrong = is_fooled(network(guided.adversarial), labels).numpy()
    np.testing.assert_array_equal(guided.fooled, wrong)
    assert guided.forwards == 2 * plain.forwards - COUNT


class Counted:
    """A function of images that counts how many it was given, compiled or not."""

    def __init__(self, function):
        self._function = function
        self.num_images = tf.Variable(0)

    def __call__(self, images):
        self.num_images.assign_add(tf.shape(images)[0])
        return self._function(images)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(LINF, num_steps=6, step_size=0.02, early_stop=True),
        APGD(LINF, num_steps=6),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_second_looks_at_doubtful_images_are_counted(network, digits, attack):
    images, labels = digits
    exact, low = Counted(lambda x: network(x, training=False)), Counted(bfloat16_copy(network))
    # So large that the network looks at every iterate again.
    lower = Anything(low, tolerance=1e9)
    attack.run(exact, images, labels, seed=0, gradient_logits_fn=lower)
    # Tracing is not a look.
    exact.num_images.assign(0), low.num_images.assign(0)
    result = attack.run(exact, images, labels, seed=0, gradient_logits_fn=lower)
    assert result.forwards == int(exact.num_images + low.num_images)


@pytest.mark.parametrize("make", [mnist_cnn, lambda: wide_resnet(1)], ids=["mnist", "cifar10"])
def test_the_copy_computes_in_bfloat16_between_its_ends(make):
    network = make()
    images = np.random.default_rng(0).uniform(0, 1, (4, *network.input_shape[1:]))
    images = (images * (255 if images.shape[-1] == 3 else 1)).astype(np.float32)
    before = network.get_weights()
    copy = bfloat16_copy(network)
    weighted = [layer for layer in copy.layers if layer.weights]
    assert weighted[-1].compute_dtype == "float32"
    assert {layer.compute_dtype for layer in weighted[:-1]} == {"bfloat16"}
    exact, low = network(images, training=False).numpy(), copy(images, training=False).numpy()
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, exact, atol=0.05 * np.abs(exact).max())
    assert not np.array_equal(low, exact)
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(layer.compute_dtype == "float32" for layer in network.layers)


def test_a_network_whose_margins_drown_in_rounding_keeps_float32(digits):
    """Logits that are differences of large numbers: bfloat16 sees noise."""
    images, _ = digits
    keras.utils.set_random_seed(1)
    collapsed = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(8, bias_initializer=keras.initializers.Constant(100.0)),
            keras.layers.Dense(10),
        ]
    )
    with pytest.raises(PrecisionError, match="moves this network's margins"):
        LowPrecision(collapsed, images)
    function, reason = lower_precision("auto", collapsed, images, is_fast=lambda: True)
    assert function is None and "margins" in reason


def test_what_is_no_plain_keras_model_keeps_float32(network, digits):
    class Subclassed(keras.Model):
        def call(self, images):
            return network(images)

    nested = keras.Sequential([keras.Input((28, 28, 1)), network])
    for other in (Subclassed(), nested, lambda images: network(images)):
        function, reason = lower_precision("auto", other, digits[0], is_fast=lambda: True)
        assert function is None and "plain" in reason
        with pytest.raises(PrecisionError, match="plain"):
            lower_precision("bfloat16", other, digits[0])


def test_auto_is_bfloat16_only_where_the_processor_has_it(network, digits):
    slow = lower_precision("auto", network, digits[0], is_fast=lambda: False)
    assert slow == (None, NO_BFLOAT16)
    function, reason = lower_precision("auto", network, digits[0], is_fast=lambda: True)
    assert isinstance(function, LowPrecision) and reason == ""
    assert lower_precision("float32", network, digits[0], is_fast=lambda: True) == (None, "")
    with pytest.raises(ValueError, match="auto, float32, bfloat16; got 'half'"):
        lower_precision("half", network, digits[0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 fma", False),
        ("fpu avx512f avx512_vnni", False),
        ("fpu avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
    ],
)
def test_a_processor_with_bfloat16_is_known_by_its_flags(flags, expected):
    cpuinfo = f"processor\t: 0\nmodel name\t: amx_bf16 or so\nflags\t\t: {flags}\n"
    assert has_bfloat16(cpuinfo) == expected


def test_a_kept_batch_of_one_precision_is_not_taken_for_the_other(network, digits, tmp_path):
    state = EvaluationState(tmp_path / "state", "key")
    attack = {"pgd": PGD(LINF, num_steps=2, step_size=0.05)}
    low = LowPrecision(network, digits[0])
    for function in (None, low, None, low):
        evaluate(network, attack, *digits, state=state, gradient_logits_fn=function)
    assert len(list((tmp_path / "state").glob("*.npz"))) == 2


def test_the_command_says_what_it_followed(network, tmp_path):
    network.save(tmp_path / "network.keras")
    common = ("--model_dir=network.keras", "--dataset=mnist_5k", "--num_eval_examples=20")
    attack = ("--num_steps=4", "--step_size=0.1", "--noprogress")
    for dtype in ("auto", "float32", "bfloat16"):
        done = command(
            "eval_challenge",
            *(*common, *attack, f"--attack_dtype={dtype}", f"--output_dir={dtype}"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        settings = json.loads((tmp_path / dtype / "result.json").read_text())["settings"]
        expected = dtype if dtype != "auto" else ("bfloat16" if has_bfloat16() else "float32")
        assert settings["attack_dtype"] == expected
        assert ("follow bfloat16" in done.stdout) == (expected == "bfloat16")
