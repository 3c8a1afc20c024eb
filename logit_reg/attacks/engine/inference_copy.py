"""The inference copy of a network, which CPUs attack faster.

Its layers compute the same sums as Keras' own in forms that oneDNN has fast kernels for:

- a convolution adds its bias as `BiasAdd`, which TensorFlow fuses with the convolution and the
  activation, where Keras adds a reshaped tensor, three passes over the largest arrays of a network;
- a normalisation after a convolution becomes part of the convolution's weights;
- the gradient for images of one channel, whose single number a pixel leaves vector registers
  empty, computes two by two pixels at once;
- a large dense layer reads weights that were transposed beforehand, in the order of the product.
"""

import collections
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.forward import LogitsFn, clean_logits

# Fewer weights stay in the cache, whatever their order.
_MANY_WEIGHTS = 2**18
# Largest difference of logits, relative to the largest one, that another order of sums makes.
_TOLERANCE = 1e-4
# Images whose logits are compared.
_NUM_COMPARED = 4

UNCOPIED = (TypeError, ValueError, NotImplementedError)
"""What Keras raises for a network that it cannot copy, one with a `Lambda` layer, say."""

_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def copy_for_inference(network: Any, images) -> Any:
    """A faster copy for attacks, with the weights that the network has now.

    Args:
        network: images (N, H, W, C) -> logits (N, K).
        images: (N, H, W, C) float, pixel units, that will be attacked; the first few are compared.

    Returns:
        The copy, the same object each time for the same network; or the network itself if it is no
        plain model of Keras' own layers in float32, or if its logits are not the copy's.
    """
    if not _is_known(network):
        return network
    folded = _folded(network)
    if not folded and not _kinds(network):
        return network
    try:
        if network not in _copies:
            _copies[network] = _copy(network, folded)
        copy = _copies[network]
        _set_weights(copy, network, folded)
    except UNCOPIED:
        return network
    sample = np.asarray(images[:_NUM_COMPARED], np.float32)
    # Compiled: eager calls leave 120 MiB more behind at width 10 (measured).
    logits, own = (clean_logits(model, sample) for model in (network, copy))
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

    if not _is_known(network) or FastConvolution not in _kinds(network):
        return own
    try:
        copy = keras.models.clone_model(
            network, clone_function=lambda layer: copied_layer(layer, layer.get_config())
        )
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


def _is_known(network):
    """Whether all of a network is Keras' own, in float32."""
    if not is_plain(network) or not network.built:
        return False
    return all(
        type(layer).__module__.startswith("keras.")
        and layer.compute_dtype == layer.variable_dtype == "float32"
        for layer in network.layers
    )


def _kinds(network):
    """The classes of ours that compute its layers faster."""
    classes = {_class_of(layer) for layer in network.layers}
    return classes & {FastConvolution, _Dense}


def _copy(network, folded):
    """A copy in faster forms, with weights still to come."""
    normalizations = set(folded.values())

    def clone(layer):
        config = layer.get_config()
        if layer in normalizations:
            return FoldedNormalization(name=layer.name)
        if layer in folded:
            return FastConvolution.from_config(config | {"use_bias": True})
        return _class_of(layer).from_config(config)

    return keras.models.clone_model(network, clone_function=clone)


def _set_weights(copy, network, folded):
    """Give a copy the weights that its network has now."""
    normalizations = set(folded.values())
    for layer in network.layers:
        if not layer.weights or layer in normalizations:
            continue
        own = copy.get_layer(layer.name)
        is_folded = layer in folded
        own.set_weights(_folded_weights(layer, folded[layer]) if is_folded else layer.get_weights())
        if isinstance(own, _Dense):
            own.transpose()


def _folded_weights(convolution, normalization):
    """Kernel and bias that do what a convolution and the normalisation after it do."""
    factor = 1 / np.sqrt(np.float64(normalization.moving_variance) + normalization.epsilon)
    if normalization.scale:
        factor = factor * np.float64(normalization.gamma)
    bias = np.float64(convolution.bias) if convolution.use_bias else 0.0
    shift = np.float64(normalization.beta) if normalization.center else 0.0
    bias = (bias - np.float64(normalization.moving_mean)) * factor + shift
    return [np.float64(convolution.kernel) * factor, bias]


def _folded(network) -> dict[keras.layers.Layer, keras.layers.Layer]:
    """Convolutions that give what they compute to a normalisation, and to nothing else.

    Returns:
        The normalisation after each.
    """
    is_sequential = isinstance(network, keras.Sequential)
    operations = network.layers if is_sequential else network.operations
    try:
        seen = [tensor for operation in operations for tensor in tf.nest.flatten(operation.input)]
        producers = {id(layer.output): layer for layer in network.layers if _can_fold(layer)}
    except (AttributeError, ValueError):
        # A layer that is used twice has no one input.
        return {}
    uses = collections.Counter(map(id, [*seen, *network.outputs]))
    return {
        producers[id(layer.input)]: layer
        for layer in network.layers
        if type(layer) is keras.layers.BatchNormalization
        and layer.axis in (-1, 3)
        and id(layer.input) in producers
        and uses[id(layer.input)] == 1
    }


def _can_fold(layer):
    return (
        type(layer) is keras.layers.Conv2D
        and _is_plain_convolution(layer)
        and layer.activation is keras.activations.linear
    )


def _is_plain_convolution(layer):
    is_plain = layer.data_format == "channels_last" and layer.groups == 1
    return is_plain and layer.padding in ("same", "valid")


def _class_of(layer):
    """What computes the layer: one of ours, or its own class."""
    if type(layer) is keras.layers.Conv2D:
        is_fitting = _is_plain_convolution(layer) and layer.use_bias
        return FastConvolution if is_fitting else type(layer)
    if type(layer) is keras.layers.Dense:
        is_fitting = layer.use_bias and layer.kernel.shape.num_elements() >= _MANY_WEIGHTS
        return _Dense if is_fitting else type(layer)
    return type(layer)


def copied_layer(layer, config: dict) -> keras.layers.Layer:
    """A layer of its own: a convolution in its faster form, anything else as it is.

    Args:
        layer: one of Keras'.
        config: its own, or that with another dtype.
    """
    # A dense layer's transposed weights would have to be made anew whenever they change.
    is_convolution = isinstance(layer, keras.layers.Conv2D)
    return (_class_of(layer) if is_convolution else type(layer)).from_config(config)


class FastConvolution(keras.layers.Conv2D):
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


class FoldedNormalization(keras.layers.Layer):
    """What is left in the copy of a normalisation that the convolution before it does."""

    def call(self, inputs, training=None, mask=None):
        """The inputs as they are."""
        del training, mask
        return inputs


class _Dense(keras.layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.transposed = tf.Variable(tf.transpose(self.kernel), trainable=False)

    def transpose(self):
        """Take the weights as they are now."""
        self.transposed.assign(tf.transpose(self.kernel))

    def call(self, inputs, training=None):
        if inputs.shape.rank != 2:
            return super().call(inputs, training=training)
        outputs = tf.matmul(inputs, self.transposed, transpose_b=True)
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

    The gradient for the images is a convolution with the flipped kernel. For a block it is
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
            flipped = tf.transpose(tf.reverse(kernel, axis=[0, 1]), [0, 1, 3, 2])
            moved = [
                tf.pad(flipped, [[row, 1 - row], [column, 1 - column], [0, 0], [0, 0]])
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
