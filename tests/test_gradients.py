"""Faster gradients are the same gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from logit_reg.gradients import with_fast_gradients
from madry_compat.networks import mnist_cnn, wide_resnet

CONVOLUTIONS = {
    "same": {"filters": 4, "kernel_size": 5, "padding": "same"},
    "same, even kernel": {"filters": 4, "kernel_size": (4, 2), "padding": "same"},
    "valid": {"filters": 4, "kernel_size": 2},
    "valid, oblong": {"filters": 4, "kernel_size": (1, 3)},
    "valid, kernel as large as the images": {"filters": 4, "kernel_size": 12},
    "strides": {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"},
    "dilated": {"filters": 4, "kernel_size": 3, "dilation_rate": 2},
    "groups": {"filters": 4, "kernel_size": 3, "groups": 2, "padding": "same"},
}


def gradients(function, points, variables):
    """Value, gradient for the points and gradients for the variables, of a traced call."""

    @tf.function(autograph=False)
    def traced(points):
        with tf.GradientTape() as tape:
            tape.watch(points)
            value = with_fast_gradients(function)(points)
            total = tf.reduce_sum(tf.cast(value, tf.float32) ** 2)
        return value, tape.gradient(total, [points, *variables])

    return traced(points)


def plain_gradients(function, points, variables):
    """The same by TensorFlow's own formulas, without a trace."""
    with tf.GradientTape() as tape:
        tape.watch(points)
        value = function(points)
        total = tf.reduce_sum(tf.cast(value, tf.float32) ** 2)
    return value, tape.gradient(total, [points, *variables])


def assert_same(function, points, variables, tolerance=2e-5):
    found, expected = (take(function, points, variables) for take in (gradients, plain_gradients))
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance, atol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.shape == other.shape
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance)


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("channels", [2, 16])
def test_a_convolution_has_the_gradients_of_tensorflow_s_own(settings, channels):
    images = keras.random.normal((3, 14, 12, channels), seed=1)
    layer = layers.Conv2D(**settings)
    layer.build(images.shape)
    assert_same(layer, images, [layer.kernel.value, layer.bias.value])


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("size", [3, 600])
def test_a_product_has_the_gradients_of_tensorflow_s_own(turned, size):
    shapes = [(4, size), (size, 500)]
    left, right = (
        keras.random.normal(shape[::-1] if turn else shape, seed=2)
        for shape, turn in zip(shapes, turned, strict=True)
    )
    weights = tf.Variable(right)

    def product(left):
        return tf.matmul(left, weights, transpose_a=bool(turned[0]), transpose_b=bool(turned[1]))

    assert_same(product, left, [weights])


def test_networks_have_the_gradients_of_tensorflow_s_own():
    for network, size, upper in ((mnist_cnn(), 28, 1), (wide_resnet(1), 32, 255)):
        channels = network.input_shape[-1]
        images = upper * keras.random.uniform((4, size, size, channels), seed=3)
        variables = [variable.value for variable in network.trainable_variables]
        assert_same(lambda x, call=network: call(x, training=False), images, variables, 1e-4)


def test_what_is_not_float32_is_left_alone():
    kernel = tf.Variable(keras.random.normal((3, 3, 16, 4), dtype="float64", seed=4))
    images = keras.random.normal((2, 8, 8, 16), dtype="float64", seed=5)
    assert_same(lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"), images, [kernel])


def test_values_are_bit_for_bit_those_of_the_function():
    network = mnist_cnn()
    images = keras.random.uniform((8, 28, 28, 1), seed=6)
    plain = tf.function(lambda x: network(x, training=False), autograph=False)
    fast = tf.function(
        lambda x: with_fast_gradients(lambda y: network(y, training=False))(x), autograph=False
    )
    assert np.array_equal(plain(images), fast(images))


def test_no_slow_operation_is_left_in_the_gradient_of_the_challenge_network():
    network = mnist_cnn()

    @tf.function(autograph=False)
    def gradient(images):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            logits = with_fast_gradients(lambda x: network(x, training=False))(images)
        return tape.gradient(logits, images)

    graph = gradient.get_concrete_function(tf.TensorSpec((None, 28, 28, 1))).graph
    definition = graph.as_graph_def(add_shapes=True)
    nodes = [node for function in definition.library.function for node in function.node_def]
    slow = [node for node in nodes if node.op == "Conv2DBackpropInput"]
    # The first layer's, whose single channel has nothing to turn.
    assert len(slow) == 1


def test_outside_of_a_trace_the_function_is_returned_as_it_is():
    assert with_fast_gradients(tf.square) is tf.square
