"""Gradients of convolutions and dense layers that processors compute faster than TensorFlow's own.

The gradients of a convolution of stride 1 are convolutions themselves, with the kernel turned round
or with examples as channels; TensorFlow's CPU kernels for them run at a fifth to three quarters of
the speed of a forward convolution. So does the product with the transposed weights of a large
dense layer. All are written here as forward operations: the same sums, in another order.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Below so many input channels a turned convolution leaves most of a vector register empty.
_LEAST_CHANNELS = 16
# How many multiplications by padding a turned convolution may add before it is the slower one.
_MOST_PADDING = 1.25
# Weights that the cache holds anyway need no other order.
_LEAST_WEIGHTS = 2**18


def with_fast_gradients(function: Callable) -> Callable:
    """The same function, with gradients that CPUs compute faster, where there is no GPU.

    Values are bit for bit those of the function; gradients differ by rounding. Only operations
    that the function itself creates are concerned, not those in a `tf.function` that it calls.

    Args:
        function: tensor -> tensor; the gradient may be taken by any tape around the call, with
            respect to the argument or to variables.

    Returns:
        A callable for traced code; outside of a trace, `function` itself.
    """
    if tf.executing_eagerly() or tf.config.list_logical_devices("GPU"):
        return function

    def with_overrides(tensor):
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"Conv2D": _CONVOLUTION, "MatMul": _PRODUCT}):
            return function(tensor)

    # A tape looks up gradients by the operation's name; only a function of its own is
    # differentiated by what the graph says.
    return tf.function(with_overrides, autograph=False)


_CONVOLUTION = "LogitRegConv2D"
_PRODUCT = "LogitRegMatMul"


@tf.RegisterGradient(_CONVOLUTION)
def _convolution_gradients(operation, gradient):
    images, kernel = operation.inputs
    settings = {
        "strides": operation.get_attr("strides"),
        "padding": operation.get_attr("padding").decode(),
        "explicit_paddings": operation.get_attr("explicit_paddings"),
        "data_format": operation.get_attr("data_format").decode(),
        "dilations": operation.get_attr("dilations"),
    }
    is_plain = (
        images.dtype == tf.float32
        and settings["data_format"] == "NHWC"
        and set(settings["strides"]) == set(settings["dilations"]) == {1}
        and settings["padding"] in ("SAME", "VALID")
        and None not in (*kernel.shape, *images.shape[1:], *gradient.shape[1:])
        and kernel.shape[2] == images.shape[3]
    )
    if is_plain and _is_worth_turning(images, kernel, gradient):
        for_images = _turned(images, kernel, gradient)
    else:
        for_images = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=tf.shape(images), filter=kernel, out_backprop=gradient, **settings
        )
    if is_plain:
        for_kernel = _correlated(images, kernel, gradient)
    else:
        for_kernel = tf.raw_ops.Conv2DBackpropFilter(
            input=images, filter_sizes=tf.shape(kernel), out_backprop=gradient, **settings
        )
    return for_images, for_kernel


def _is_worth_turning(images, kernel, gradient):
    added = np.prod(images.shape[1:3]) / np.prod(gradient.shape[1:3])
    return kernel.shape[2] >= _LEAST_CHANNELS and added <= _MOST_PADDING


def _turned(images, kernel, gradient):
    """The gradient for the images: the kernel, turned round, over the gradient."""
    turned = tf.transpose(tf.reverse(kernel, axis=[0, 1]), [0, 1, 3, 2])
    padding = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(
            kernel.shape[:2], _padding(images, kernel, gradient), strict=True
        )
    ]
    return tf.nn.conv2d(gradient, turned, 1, [(0, 0), *padding, (0, 0)])


def _correlated(images, kernel, gradient):
    """The gradient for the kernel: the gradient over the images, examples summed as channels."""
    padding = _padding(images, kernel, gradient)
    swapped = tf.nn.conv2d(
        tf.transpose(images, [3, 1, 2, 0]),
        tf.transpose(gradient, [1, 2, 0, 3]),
        1,
        [(0, 0), *padding, (0, 0)],
    )
    return tf.transpose(swapped, [1, 2, 0, 3])


def _padding(images, kernel, gradient):
    """Rows and columns of zeros (before, after) that the convolution added."""
    for full, size, given in zip(
        images.shape[1:3], kernel.shape[:2], gradient.shape[1:3], strict=True
    ):
        total = given - full + size - 1
        yield total // 2, total - total // 2


@tf.RegisterGradient(_PRODUCT)
def _product_gradients(operation, gradient):
    left, right = operation.inputs
    left_turned = operation.get_attr("transpose_a")
    right_turned = operation.get_attr("transpose_b")
    size = right.shape.num_elements()
    if not (left_turned or right_turned) and size is not None and size >= _LEAST_WEIGHTS:
        for_left = tf.transpose(tf.matmul(right, gradient, transpose_b=True))
    elif left_turned:
        for_left = tf.matmul(right, gradient, transpose_a=right_turned, transpose_b=True)
    else:
        for_left = tf.matmul(gradient, right, transpose_b=not right_turned)
    if right_turned:
        for_right = tf.matmul(gradient, left, transpose_a=True, transpose_b=left_turned)
    else:
        for_right = tf.matmul(left, gradient, transpose_a=not left_turned)
    return for_left, for_right
