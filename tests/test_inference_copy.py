"""The copy that attacks run on is the network, only faster."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from logit_reg.attacks import PGD
from logit_reg.attacks.engine.inference_copy import (
    FoldedNormalization,
    copy_for_inference,
    following_copy,
)
from logit_reg.evaluation.run import evaluate
from logit_reg.threat import ThreatModel
from madry_compat.networks import mnist_cnn, wide_resnet

pytestmark = pytest.mark.graph_optimiser

CONVOLUTIONS = {
    "same": {"kernel_size": 5, "padding": "same"},
    "even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "valid": {"kernel_size": 3},
    "valid, oblong": {"kernel_size": (1, 4)},
    "strides": {"kernel_size": 3, "strides": 2, "padding": "same"},
    "dilated": {"kernel_size": 3, "dilation_rate": 2},
    "no activation": {"kernel_size": 3, "activation": None},
}
SIZES = [(12, 10, 1), (11, 12, 1), (12, 12, 2)]


def small_network(size=(12, 12, 1), units=3, **convolution):
    """Images -> logits, with random biases, too."""
    images = keras.Input(size)
    x = layers.Conv2D(6, **{"activation": "relu", "kernel_size": 3} | convolution)(images)
    x = layers.Flatten()(x)
    network = keras.Model(images, layers.Dense(units)(x))
    generator = np.random.default_rng(0)
    network.set_weights([generator.normal(size=w.shape) for w in network.get_weights()])
    return network


def batch(size=(12, 12, 1), count=4):
    return np.random.default_rng(1).random((count, *size), dtype=np.float32)


def gradient(network, images):
    """Of the logits, weighted so that no symmetry hides anything, traced as attacks do."""

    @tf.function(autograph=False)
    def traced(points):
        with tf.GradientTape() as tape:
            tape.watch(points)
            logits = network(points, training=False)
            total = tf.reduce_sum(logits * tf.range(1.0, logits.shape[1] + 1.0))
        kernels = [
            layer.kernel.value for layer in network.layers if isinstance(layer, layers.Conv2D)
        ]
        # Kernels that are folded together with a normalisation are not asked themselves.
        unconnected = tf.UnconnectedGradients.ZERO
        return tape.gradient(total, [points, *kernels], unconnected_gradients=unconnected)

    return [found.numpy() for found in traced(tf.constant(images))]


def assert_same(network, images):
    copy = copy_for_inference(network, images)
    assert copy is not network
    np.testing.assert_allclose(copy(images), network(images), rtol=1e-4, atol=1e-4)
    for found, expected in zip(gradient(copy, images), gradient(network, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_logits_and_gradients_are_those_of_the_network(settings, size):
    assert_same(small_network(size, **settings), batch(size))


def test_a_large_dense_layer_and_the_challenge_network():
    assert_same(small_network(units=600), batch())
    assert_same(mnist_cnn(), batch((28, 28, 1)))


def test_the_copy_is_one_object_that_follows_the_weights():
    network, images = small_network(units=600), batch()
    first = copy_for_inference(network, images)
    network.set_weights([2 * weights for weights in network.get_weights()])
    assert copy_for_inference(network, images) is first
    np.testing.assert_allclose(first(images), network(images), rtol=1e-4, atol=1e-4)


def with_normalization(*, convolution=None, normalization=None, again=False, units=600):
    """Convolution, normalisation and ReLU, with random statistics, too."""
    images = keras.Input((12, 12, 2))
    sums = layers.Conv2D(6, 3, **convolution or {})(images)
    x = layers.BatchNormalization(**normalization or {})(sums)
    x = layers.ReLU()(x)
    x = layers.Add()([x, sums]) if again else x
    network = keras.Model(images, layers.Dense(units)(layers.Flatten()(x)))
    return with_random_weights(network)


def with_random_weights(network):
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=w.shape) for w in network.get_weights()]
    for place, variable in enumerate(network.weights):
        if variable.name == "moving_variance":
            weights[place] = np.abs(weights[place]) + 0.1
    network.set_weights(weights)
    return network


def num_folded(network, images):
    copy = copy_for_inference(network, images)
    return sum(isinstance(layer, FoldedNormalization) for layer in copy.layers)


@pytest.mark.parametrize("convolution", [{}, {"use_bias": False}, {"strides": 2}], ids=str)
@pytest.mark.parametrize("normalization", [{}, {"scale": False}, {"center": False}], ids=str)
def test_a_normalization_becomes_part_of_the_convolution_before_it(convolution, normalization):
    network = with_normalization(convolution=convolution, normalization=normalization)
    images = batch((12, 12, 2))
    copy = copy_for_inference(network, images)
    assert num_folded(network, images) == 1
    np.testing.assert_allclose(copy(images), network(images, training=False), rtol=1e-4, atol=1e-4)
    for found, expected in zip(
        gradient(copy, images)[:1], gradient(network, images)[:1], strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    # A later look at other weights finds those.
    network.set_weights([0.5 * weights for weights in network.get_weights()])
    copy = copy_for_inference(network, images)
    np.testing.assert_allclose(copy(images), network(images, training=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"again": True},
        {"convolution": {"activation": "relu"}},
        {"normalization": {"axis": 1}},
    ],
    ids=["the sums are used again", "an activation between them", "rows are normalised"],
)
def test_a_normalization_of_anything_else_stays(settings):
    network, images = with_normalization(**settings), batch((12, 12, 2))
    assert num_folded(network, images) == 0
    copy = copy_for_inference(network, images)
    assert copy is not network
    np.testing.assert_allclose(copy(images), network(images, training=False), rtol=1e-4, atol=1e-4)


def test_half_of_the_challenge_s_normalizations_are_folded():
    """The second one of each of its 15 units, and the very first; others see a sum of branches."""
    network = with_random_weights(wide_resnet(1))
    images = 255 * batch((32, 32, 3))
    assert num_folded(network, images) == 16
    copy = copy_for_inference(network, images)
    expected = network(images, training=False)
    np.testing.assert_allclose(copy(images), expected, atol=1e-4 * np.abs(expected).max())


def test_a_sequential_network_of_convolution_normalization_and_relu_is_folded():
    network = keras.Sequential(
        [keras.Input((12, 12, 2)), layers.Conv2D(4, 3, use_bias=False)]
        + [layers.BatchNormalization(), layers.ReLU(), layers.Flatten(), layers.Dense(3)]
    )
    with_random_weights(network)
    images = batch((12, 12, 2))
    assert num_folded(network, images) == 1
    copy = copy_for_inference(network, images)
    np.testing.assert_allclose(copy(images), network(images, training=False), rtol=1e-4, atol=1e-4)


def test_only_a_few_images_are_compared(monkeypatch):
    """A wide network's layers hold gigabytes for a whole batch."""
    seen = []

    def noted(network, images):
        seen.append(len(images))
        return network(images, training=False).numpy()

    monkeypatch.setattr("logit_reg.attacks.engine.inference_copy.clean_logits", noted)
    copy_for_inference(small_network(), batch(count=500))
    assert seen == [4, 4]


class Scaled(layers.Layer):
    """A layer of somebody else's, of which nothing is known."""

    def call(self, inputs):
        return 2 * inputs


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_copy_for_training_has_the_weights_of_the_moment(settings):
    network, images = small_network(units=600, **settings), batch()
    logits_fn = following_copy(network)

    @tf.function(autograph=False)
    def logits_and_gradient(points):
        with tf.GradientTape() as tape:
            tape.watch(points)
            logits = logits_fn(points)
            total = tf.reduce_sum(logits * tf.range(600.0))
        return logits, tape.gradient(total, points)

    for _ in range(2):
        logits, found = logits_and_gradient(tf.constant(images))
        np.testing.assert_allclose(logits, network(images), rtol=1e-4, atol=1e-4)
        points = tf.constant(images)
        with tf.GradientTape() as tape:
            tape.watch(points)
            total = tf.reduce_sum(network(points) * tf.range(600.0))
        expected = tape.gradient(total, points).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        network.set_weights([weights + 0.1 for weights in network.get_weights()])


def test_networks_without_a_faster_form_are_attacked_in_evaluation_mode():
    network = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Flatten(), layers.Dropout(0.5), layers.Dense(3)]
    )
    images = batch((4, 4, 1))
    np.testing.assert_array_equal(following_copy(network)(images), network(images, training=False))


def test_what_is_no_plain_network_is_attacked_itself():
    network = small_network()
    images = batch()
    foreign = keras.Sequential([keras.Input((12, 12, 1)), Scaled(), layers.Flatten()])
    nested = keras.Sequential([keras.Input((12, 12, 1)), small_network()])
    no_layers_of_ours = keras.Sequential([keras.Input((12, 12, 1)), layers.Flatten()])
    for one in (network.call, foreign, nested, no_layers_of_ours, None):
        assert copy_for_inference(one, images) is one
    double = keras.Sequential(
        [keras.Input((12, 12, 1)), layers.Conv2D(2, 3, dtype="float64"), layers.Flatten()]
    )
    assert copy_for_inference(double, images) is double


def test_a_network_that_keras_cannot_copy_is_attacked_itself():
    network = keras.Sequential(
        [keras.Input((12, 12, 1)), layers.Conv2D(2, 3), layers.Lambda(lambda x: 2 * x)]
        + [layers.Flatten(), layers.Dense(3)]
    )
    assert copy_for_inference(network, batch()) is network


def test_a_network_whose_logits_are_not_the_copy_s_is_attacked_itself():
    network, images = small_network(), batch()
    network.set_weights([np.full_like(weights, np.nan) for weights in network.get_weights()])
    assert copy_for_inference(network, images) is network


def test_an_evaluation_attacks_the_copy_and_the_network_decides(monkeypatch):
    """A copy that is wrong about everything breaks nothing."""
    network = small_network()
    images = batch(count=20)
    labels = np.asarray(network(images)).argmax(axis=1)
    attack = PGD(ThreatModel("linf", 1e-6, 0.0, 1.0), num_steps=2, step_size=1e-6)
    seen = []

    def wrong_copy(network, images):
        def wrong(points):
            seen.append(points)
            return -network(points, training=False)

        return wrong

    monkeypatch.setattr("logit_reg.evaluation.run.copy_for_inference", wrong_copy)
    found = evaluate(network, {"attack": attack}, images, labels)
    assert seen
    assert found.records["attack"].correct.all()
    assert found.records["attack"].unconfirmed == 20
