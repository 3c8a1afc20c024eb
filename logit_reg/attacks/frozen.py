"""A copy of a network with frozen weights, which CPUs attack faster.

Its layers compute the same sums as Keras' own in forms that oneDNN has fast kernels for:

- a convolution adds its bias as `BiasAdd`, which TensorFlow fuses with the convolution and the
  activation, where Keras adds a reshaped tensor, three passes over the largest arrays of a network;
- the gradient for images of one channel, whose single number a pixel leaves vector registers
  empty, computes two by two pixels at once;
- a large dense layer reads weights that were transposed beforehand, in the order of the product.
"""

import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.attack import LogitsFn, call_logits

# Fewer weights stay in the cache, whatever their order.
_MANY_WEIGHTS = 2**18
# Largest difference of logits, relative to the largest one, that another order of sums makes.
_TOLERANCE = 1e-4

UNCOPIED = (TypeError, ValueError, NotImplementedError)
"""What Keras raises for a network that it cannot copy, one with a `Lambda` layer, say."""

_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def frozen_copy(network: Any, images) -> Any:
    """A faster copy for attacks, with the weights that the network has now.

    Args:
        network: images (N, H, W, C) -> logits (N, K).
        images: (N, H, W, C) float, pixel units: a few of those that will be attacked.

    Returns:
        The copy, the same object each time for the same network; or the network itself if it is no
        plain model of Keras' own layers in float32, or if its logits are not the copy's.
    """
    if not _is_fitting(network):
        return network
    try:
        if network not in _copies:
            _copies[network] = keras.models.clone_model(network, clone_function=_clone)
        copy = _copies[network]
        copy.set_weights(network.get_weights())
    except UNCOPIED:
        return network
    for layer in copy.layers:
        if isinstance(layer, _Dense):
            layer.turn()
    logits, own = (np.asarray(call_logits(model, images)) for model in (network, copy))
    # Written so that a NaN disagrees.
    return copy if np.abs(own - logits).max() <= _TOLERANCE * np.abs(logits).max() else network


def following_copy(network: Any) -> LogitsFn:
    """A faster form of a network that is being trained, for the attack inside a training step.

    Args:
        network: images (N, H, W, C) -> logits (N, K).

    Returns:
        Images -> logits in evaluation mode, from the weights that the network has at that moment;
        of the network itself where a copy has nothing faster.
    """

    def own(images):
        return network(images, training=False)

    if not _is_fitting(network):
        return own
    try:
        copy = keras.models.clone_model(network, clone_function=_clone_convolution)
    except UNCOPIED:
        return own

    def logits_fn(images):
        trained = [variable.value for variable in network.trainable_variables]
        others = [variable.value for variable in network.non_trainable_variables]
        return copy.stateless_call(trained, others, images, training=False)[0]

    return logits_fn


def is_plain(network: Any) -> bool:
    """Whether a network is a Keras model whose layers are all that it does, none a model itself."""
    # Only Sequential and functional models know their operations; a class of somebody's own may do
    # more than its layers.
    is_known = isinstance(network, keras.Sequential) or hasattr(network, "operations")
    is_keras = type(network).__module__.startswith("keras.")
    return (
        is_known
        and is_keras
        and not any(isinstance(layer, keras.Model) for layer in network.layers)
    )


def _is_fitting(network):
    if not is_plain(network) or not network.built:
        return False
    return all(
        type(layer).__module__.startswith("keras.")
        and layer.compute_dtype == layer.variable_dtype == "float32"
        for layer in network.layers
    ) and any(_class_of(layer) is not type(layer) for layer in network.layers)


def _class_of(layer):
    """What computes the layer: one of ours, or its own class."""
    if type(layer) is keras.layers.Conv2D:
        is_plain = layer.data_format == "channels_last" and layer.groups == 1
        is_fitting = is_plain and layer.use_bias and layer.padding in ("same", "valid")
        return FrozenConvolution if is_fitting else type(layer)
    if type(layer) is keras.layers.Dense:
        is_fitting = layer.use_bias and layer.kernel.shape.num_elements() >= _MANY_WEIGHTS
        return _Dense if is_fitting else type(layer)
    return type(layer)


def _clone(layer):
    return _class_of(layer).from_config(layer.get_config())


def _clone_convolution(layer):
    # A dense layer's transposed weights would have to be made anew in each step.
    is_convolution = isinstance(layer, keras.layers.Conv2D)
    return _clone(layer) if is_convolution else type(layer).from_config(layer.get_config())


class FrozenConvolution(keras.layers.Conv2D):
    """A convolution in the copy; a faster form of the same sums."""

    def call(self, inputs):
        kernel, padding = tf.convert_to_tensor(self.kernel), self.padding.upper()
        if kernel.shape[2] == 1 and _has_blocks(inputs, self.strides, self.dilation_rate):
            outputs = _convolve_one_channel(inputs, kernel, padding)
        else:
            outputs = tf.nn.conv2d(
                inputs, kernel, self.strides, padding, dilations=self.dilation_rate
            )
        return activated(self, outputs)


class _Dense(keras.layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.turned = tf.Variable(tf.transpose(self.kernel), trainable=False)

    def turn(self):
        """Take the weights as they are now."""
        self.turned.assign(tf.transpose(self.kernel))

    def call(self, inputs, training=None):
        if inputs.shape.rank != 2:
            return super().call(inputs, training=training)
        outputs = tf.matmul(inputs, self.turned, transpose_b=True)
        return activated(self, outputs)


def activated(layer, sums):
    """What a layer does to its weighted sums: the bias and the activation."""
    if layer.use_bias:
        sums = tf.nn.bias_add(sums, tf.convert_to_tensor(layer.bias))
    return sums if layer.activation is None else layer.activation(sums)


def _has_blocks(images, strides, dilation_rate):
    height, width = images.shape[1:3]
    is_even = None not in (height, width) and height % 2 == width % 2 == 0
    return is_even and set(strides) == set(dilation_rate) == {1}


def _convolve_one_channel(images, kernel, padding):
    """A convolution of stride 1 whose gradient comes in blocks of two by two pixels.

    The gradient for the images is a convolution with the kernel turned round. For a block it is
    one of stride 2 with four kernels, the same one moved by a row, a column or both.
    """
    pads = [[0, 0]]
    for size in kernel.shape[:2]:
        # Zeros that the convolution added, in all and before the first pixel.
        added = size - 1 if padding == "SAME" else 0
        before = added // 2
        pads.append([size - 1 - before, size - 1 - (added - before)])
    pads.append([0, 0])

    @tf.custom_gradient
    def convolve(images, kernel):
        def gradients(gradient):
            turned = tf.transpose(tf.reverse(kernel, axis=[0, 1]), [0, 1, 3, 2])
            moved = [
                tf.pad(turned, [[row, 1 - row], [column, 1 - column], [0, 0], [0, 0]])
                for row in (0, 1)
                for column in (0, 1)
            ]
            blocks = tf.nn.conv2d(gradient, tf.concat(moved, axis=-1), 2, pads)
            for_kernel = tf.raw_ops.Conv2DBackpropFilter(
                input=images,
                filter_sizes=kernel.shape,
                out_backprop=gradient,
                strides=[1, 1, 1, 1],
                padding=padding,
            )
            return tf.nn.depth_to_space(blocks, 2), for_kernel

        return tf.nn.conv2d(images, kernel, 1, padding), gradients

    return convolve(images, kernel)
