"""Asking about a changed window gives the logits of the changed image."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from logit_reg.attacks import Square
from logit_reg.attacks.engine.incremental_forward import (
    FullForward,
    IncrementalForward,
    cheapest_forward,
)
from logit_reg.attacks.engine.inference_copy import copy_for_inference
from logit_reg.threat import ThreatModel
from madry_compat.networks import mnist_cnn

pytestmark = pytest.mark.graph_optimiser

SHAPE = (20, 17, 2)
LINF = ThreatModel("linf", 0.3, 0.0, 1.0)


def convolution(size=3, **settings):
    return layers.Conv2D(5, size, **{"activation": "relu"} | settings)


BLOCKS = {
    "one convolution": [convolution()],
    "same": [convolution(5, padding="same"), layers.MaxPooling2D(2)],
    "same, twice": [convolution(padding="same"), convolution(padding="same")],
    "two valid ones and a pooling": [convolution(), convolution(), layers.MaxPooling2D(2)],
    "valid after same": [convolution(padding="same"), convolution(), layers.MaxPooling2D((1, 3))],
    "even and oblong": [convolution((4, 1), padding="same"), convolution((1, 2))],
    "what the pooling leaves over": [convolution(2), layers.MaxPooling2D((5, 3))],
    "a pooling first": [layers.MaxPooling2D(2), convolution()],
    "activations apart": [
        convolution(activation=None, padding="same"),
        layers.Activation("relu"),
        layers.Dropout(0.5),
        convolution(use_bias=False, padding="same"),
        layers.ReLU(),
        layers.MaxPooling2D(2),
    ],
    "two blocks": [
        *(convolution(padding="same"), layers.MaxPooling2D(2)),
        *(convolution(2, padding="same"), convolution(2)),
    ],
}

UNFIT = {
    "strides": [convolution(strides=2)],
    "dilated": [convolution(dilation_rate=2)],
    "a pooling that overlaps": [layers.MaxPooling2D(3, strides=1)],
    "a pooling that adds pixels": [layers.MaxPooling2D(3, padding="same")],
    "zero does not stay zero": [layers.ReLU(negative_slope=0.1, threshold=0.5)],
    "each number depends on all": [convolution(activation="softmax")],
    "another layer first": [layers.Rescaling(2.0, offset=-1.0), convolution()],
}


def network_of(blocks, shape=SHAPE, **settings):
    """Images -> logits, with random weights and biases."""
    ends = [layers.Flatten(), layers.Dense(4)]
    copies = [type(layer).from_config(layer.get_config() | settings) for layer in (*blocks, *ends)]
    network = keras.Sequential([keras.Input(shape, **settings), *copies])
    generator = np.random.default_rng(0)
    network.set_weights([generator.normal(size=w.shape) / 3 for w in network.get_weights()])
    return network


def moved(images, starts, side):
    """The images with other pixels in a square of each."""
    other = np.random.default_rng(2).random((len(images), side, side, images.shape[-1]))
    images = images.copy()
    for image, top, left, pixels in zip(images, *starts, other, strict=True):
        image[top : top + side, left : left + side] = pixels
    return images


def corners_and_middle(shape, side):
    last = shape[0] - side, shape[1] - side
    tops = [0, 0, last[0], last[0], last[0] // 2, 0]
    lefts = [0, last[1], 0, last[1], last[1] // 2, last[1] // 3]
    return np.array(tops, np.int32), np.array(lefts, np.int32)


def assert_follows_changes(network, shape, side):
    """Change a window, and then another one on top of it."""
    answers = cheapest_forward(network, shape, side)
    assert isinstance(answers, IncrementalForward)
    images = np.random.default_rng(1).random((6, *shape), dtype=np.float32)
    features = answers.features(images)
    for places in (slice(None), slice(None, None, -1)):
        starts = [firsts[places] for firsts in corners_and_middle(shape, side)]
        before, images = images, moved(images, starts, side)
        features = answers.changed_features(images, features, starts, tf.constant(side))
        logits, expected = answers.logits(images, features), network(images)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected - network(before)).max() > 1e-2
    for new, anew in zip(features, answers.features(images), strict=True):
        np.testing.assert_allclose(new, anew, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_logits_are_those_of_the_changed_images(blocks, side):
    assert_follows_changes(network_of(blocks), SHAPE, side)


@pytest.mark.parametrize("side", [1, 3, 6])
def test_the_challenge_network_and_its_copy_for_inference(side):
    network, shape = mnist_cnn(), (28, 28, 1)
    assert_follows_changes(network, shape, side)
    copy = copy_for_inference(network, np.zeros((2, *shape), np.float32))
    assert copy is not network
    assert_follows_changes(copy, shape, side)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_convolution_with_a_normalization_folded_into_it(use_bias):
    """The window sees the folded weights, and nothing of the layer that is left empty."""
    network = keras.Sequential(
        [
            keras.Input(SHAPE),
            convolution(activation=None, use_bias=use_bias, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(2),
            *(layers.Flatten(), layers.Dense(4)),
        ]
    )
    generator = np.random.default_rng(0)
    network.set_weights([generator.uniform(0.1, 1, w.shape) for w in network.get_weights()])
    copy = copy_for_inference(network, np.zeros((2, *SHAPE), np.float32))
    assert copy is not network
    assert cheapest_forward(copy, SHAPE, 2).rest[0].name.startswith("flatten")
    assert_follows_changes(copy, SHAPE, 2)


def test_as_many_blocks_as_pay():
    network = mnist_cnn()
    found = [cheapest_forward(network, (28, 28, 1), side) for side in (1, 9, 28)]
    assert [len(answers.blocks) for answers in found[:2]] == [2, 1]
    assert isinstance(found[2], FullForward)
    assert cheapest_forward(network, (28, 28, 1), 10) is found[1]


@pytest.mark.parametrize("blocks", UNFIT.values(), ids=UNFIT)
def test_layers_that_do_not_fit_are_run_as_a_whole(blocks):
    network = network_of(blocks)
    answers = cheapest_forward(network, SHAPE, 1)
    assert isinstance(answers, FullForward)
    images = np.random.default_rng(1).random((2, *SHAPE), dtype=np.float32)
    np.testing.assert_array_equal(answers.logits(images, ()), network(images))


def test_networks_that_are_no_chain_are_run_as_a_whole():
    images = keras.Input(SHAPE)
    first = convolution(padding="same")(images)
    twice = layers.Add()([first, convolution(padding="same")(first)])
    forked = keras.Model(images, layers.Dense(3)(layers.Flatten()(twice)))
    shared = layers.Conv2D(SHAPE[-1], 1)
    inputs = keras.Input(SHAPE)
    used_twice = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(shared(shared(inputs)))))
    double = network_of(BLOCKS["same"], dtype="float64")

    class Inverted(keras.Sequential):
        def call(self, *arguments, **options):
            return -super().call(*arguments, **options)

    inverted = Inverted(network_of(BLOCKS["same"]).layers)
    inverted.build((None, *SHAPE))
    for network in (forked, used_twice, double, inverted, lambda images: images[:, 0, :, 0]):
        assert isinstance(cheapest_forward(network, SHAPE, 1), FullForward)


def test_the_square_attack_finds_the_same(monkeypatch):
    network = network_of(BLOCKS["two blocks"])
    images = np.random.default_rng(1).random((12, *SHAPE), dtype=np.float32)
    labels = np.asarray(network(images)).argmax(axis=1)
    attack, asked = Square(ThreatModel("linf", 0.02, 0.0, 1.0), 150), []

    def noted(network, shape, side):
        asked.append(cheapest_forward(network, shape, side))
        return asked[-1]

    monkeypatch.setattr("logit_reg.attacks.square.cheapest_forward", noted)
    found = attack.run(network, images, labels, seed=0)
    assert {type(answers) for answers in asked} == {FullForward, IncrementalForward}
    expected = attack.run(lambda images: network(images), images, labels, seed=0)
    np.testing.assert_array_equal(found.fooled, expected.fooled)
    assert 0 < found.fooled.sum() < len(images)
    same = [
        np.allclose(*pair) for pair in zip(found.adversarial, expected.adversarial, strict=True)
    ]
    # Rounding may turn a decision round, for a single image.
    assert np.sum(same) >= len(images) - 1
    assert found.forwards == pytest.approx(expected.forwards, rel=0.05)
