"""Logits of images that changed in a window only: what it cannot reach is not computed again.

The first layers of a plain network look at small neighbourhoods. Its leading blocks, convolutions
with a pooling after them, are therefore run on the surroundings of the window, and the result is
set into the outputs that the images had before.
"""

import dataclasses
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.forward import LogitsFn, call_logits
from logit_reg.attacks.engine.inference_copy import (
    FastConvolution,
    FoldedNormalization,
    activated,
    is_plain,
)

# A block of which a larger share of the outputs changes is cheaper to run as a whole (measured).
_MOST_CHANGED = 0.55
# Activations that look at one number at a time.
_POINTWISE = (keras.activations.linear, keras.activations.relu)

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class FullForward:
    """A network that computes every image anew, as where nothing else pays."""

    network: LogitsFn

    def features(self, images) -> tuple:
        """See `IncrementalForward.features`: there are none."""
        del images
        return ()

    def changed_features(self, images, features, starts, side) -> tuple:
        """See `IncrementalForward.changed_features`: there are none."""
        del images, features, starts, side
        return ()

    def logits(self, images, features):
        """(N, H, W, C) float, pixel units -> (N, K)."""
        del features
        return call_logits(self.network, images)


@dataclasses.dataclass(frozen=True, eq=False)
class IncrementalForward:
    """The leading blocks of a network, and the layers after them."""

    blocks: tuple["_Block", ...]
    rest: tuple[keras.layers.Layer, ...]

    def features(self, images) -> tuple:
        """What the blocks give for whole images, to be changed later.

        Args:
            images: (N, H, W, C) float, pixel units.

        Returns:
            Outputs (N, H', W', C') of each block, padded as the next one wants them.
        """
        inputs, features = self.blocks[0].padded(images), []
        for block, following in self._pairs():
            inputs = following.padded(block.run(inputs))
            features.append(inputs)
        return tuple(features)

    def changed_features(self, images, features, starts, side) -> tuple:
        """The features of images that differ from those of `features` in a square.

        Args:
            images: (N, H, W, C) float, pixel units, as they are now.
            features: what `features` or this method gave for them as they were.
            starts: the first row and the first column of each square, two (N,) int32.
            side: () int32 of the squares.

        Returns:
            As `features`.
        """
        inputs, sides = self.blocks[0].padded(images), [side, side]
        changed = []
        for (block, following), outputs in zip(self._pairs(), features, strict=True):
            starts, sides, patch = block.run_around(inputs, starts, sides)
            moved = [
                start + axis.before for start, axis in zip(starts, following.axes, strict=True)
            ]
            inputs = tf.tensor_scatter_nd_update(outputs, _places(moved, sides), patch)
            changed.append(inputs)
        return tuple(changed)

    def logits(self, images, features):
        """(N, K) of the images that the features belong to."""
        del images
        outputs = features[-1]
        for layer in self.rest:
            outputs = layer(outputs, training=False)
        return outputs

    def _pairs(self):
        """Each block with the one that pads its outputs."""
        return zip(self.blocks, (*self.blocks[1:], _NOTHING), strict=True)


def cheapest_forward(
    network: LogitsFn, shape: tuple[int, ...], side: int
) -> FullForward | IncrementalForward:
    """The cheapest way to send images that change in squares of one size through a network.

    Args:
        network: images -> logits.
        shape: (H, W, C) of the images.
        side: of the squares, in pixels.

    Returns:
        The same object each time for the same network and number of blocks that pay.
    """
    if not isinstance(network, keras.Model):
        return FullForward(network)
    known = _known.setdefault(network, {})
    if shape not in known:
        layers = _chain(network)
        blocks, ends = _leading_blocks(layers, shape)
        known[shape] = [
            IncrementalForward(tuple(blocks[:depth]), tuple(layers[end:]))
            for depth, end in enumerate(ends, start=1)
        ]
    forward: FullForward | IncrementalForward = FullForward(network)
    sides = [side, side]
    for deeper in known[shape]:
        block = deeper.blocks[-1]
        sides = block.changed(sides)
        if np.prod(sides) > _MOST_CHANGED * np.prod(block.outputs):
            break
        forward = deeper
    return forward


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How a block maps rows to rows, or columns to columns."""

    before: int
    """Zeros that a "same" convolution adds before its input."""
    after: int
    reach: int
    """How far beyond its own place an output of the convolutions sees."""
    pool: int
    outputs: int
    """Number of outputs."""

    def changed(self, side):
        """Length of the shortest window of outputs that holds all that changes."""
        return tf.minimum((side + self.reach + self.pool - 2) // self.pool + 1, self.outputs)

    def first_changed(self, start, changed):
        """Where a window of outputs of that length begins."""
        first = (start + self.before - self.reach) // self.pool
        return tf.clip_by_value(first, 0, self.outputs - changed)

    def seen(self, outputs):
        """Length of the window of padded inputs that so many outputs see."""
        return outputs * self.pool + self.reach


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """Convolutions of stride 1, pointwise layers, and at most one pooling, which comes last."""

    layers: tuple[keras.layers.Layer, ...]
    axes: tuple[_Axis, _Axis]
    """Rows and columns."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """Rows and columns of the outputs."""
        return tuple(axis.outputs for axis in self.axes)

    def padded(self, inputs):
        """With the zeros around them that the convolutions add."""
        pads = [(axis.before, axis.after) for axis in self.axes]
        return tf.pad(inputs, [(0, 0), *pads, (0, 0)]) if np.any(pads) else inputs

    def run(self, padded):
        """Padded inputs, or a part of them, -> the outputs that see nothing else."""
        outputs = padded
        for layer in self.layers:
            if isinstance(layer, keras.layers.Conv2D):
                sums = tf.nn.conv2d(outputs, tf.convert_to_tensor(layer.kernel), 1, "VALID")
                outputs = activated(layer, sums)
            elif isinstance(layer, keras.layers.MaxPooling2D):
                outputs = tf.nn.max_pool2d(outputs, layer.pool_size, layer.strides, "VALID")
            else:
                outputs = layer(outputs, training=False)
        return outputs

    def changed(self, sides) -> list:
        """Rows and columns of the window of outputs that a window of inputs changes."""
        return [axis.changed(side) for axis, side in zip(self.axes, sides, strict=True)]

    def run_around(self, padded, starts, sides):
        """First row and column, size and values of the window of outputs that changes."""
        changed = self.changed(sides)
        windows = list(zip(self.axes, starts, changed, strict=True))
        firsts = [axis.first_changed(start, number) for axis, start, number in windows]
        seen = [axis.seen(number) for axis, _, number in windows]
        corners = [first * axis.pool for axis, first in zip(self.axes, firsts, strict=True)]
        return firsts, changed, self.run(tf.gather_nd(padded, _places(corners, seen)))


_NOTHING = _Block((), (_Axis(0, 0, 0, 1, 0), _Axis(0, 0, 0, 1, 0)))
"""What follows the last block: it pads nothing."""


def _places(starts, sides):
    """Indices of a window of each image: (N, rows, columns, 3)."""
    rows = starts[0][:, None, None] + tf.range(sides[0])[None, :, None]
    columns = starts[1][:, None, None] + tf.range(sides[1])[None, None, :]
    images = tf.range(tf.size(starts[0]))[:, None, None]
    shape = (tf.size(starts[0]), sides[0], sides[1])
    return tf.stack([tf.broadcast_to(part, shape) for part in (images, rows, columns)], axis=-1)


def _chain(network) -> list[keras.layers.Layer]:
    """The layers of a network that is nothing but one after the other; else none."""
    if not is_plain(network):
        return []
    is_float32 = all(layer.compute_dtype == "float32" for layer in network.layers)
    if not is_float32 or not network.built:
        return []
    if isinstance(network, keras.Sequential):
        return list(network.layers)
    operations: list[Any] = list(network.operations)
    if not all(isinstance(operation, keras.layers.Layer) for operation in operations):
        return []
    try:
        links = [
            later.input is earlier.output
            for earlier, later in zip(operations, operations[1:], strict=False)
        ]
        is_chain = all(links) and network.output is operations[-1].output
    except (AttributeError, ValueError):
        # A layer that is used twice has no one input.
        return []
    return operations[1:] if is_chain else []


def _leading_blocks(layers, shape) -> tuple[list[_Block], list[int]]:
    """The blocks that a network begins with, and for each the number of layers up to its end."""
    blocks: list[_Block] = []
    ends: list[int] = []
    taken: list[keras.layers.Layer] = []
    size = shape[:2]

    def finish(end):
        blocks.append(_block(taken, size))
        ends.append(end)
        return blocks[-1].outputs, []

    def has_convolution():
        return any(_is_convolution(layer) for layer in taken)

    for place, layer in enumerate(layers):
        is_pool = _is_pool(layer, _block(taken, size).outputs)
        if not (is_pool or _is_convolution(layer) or _is_pointwise(layer)):
            if has_convolution():
                finish(place)
            break
        # Zeros between two convolutions would have to be set again: only the first adds any.
        if has_convolution() and _is_convolution(layer) and layer.padding == "same":
            size, taken = finish(place)
        taken.append(layer)
        if is_pool:
            size, taken = finish(place + 1)
    return blocks, ends


def _block(layers, size) -> _Block:
    convolutions = [layer for layer in layers if _is_convolution(layer)]
    pools = [layer.pool_size for layer in layers if isinstance(layer, keras.layers.MaxPooling2D)]
    axes = []
    for axis in (0, 1):
        beyond = [layer.kernel_size[axis] - 1 for layer in convolutions]
        # At most the first one adds zeros.
        added = beyond[0] if convolutions and convolutions[0].padding == "same" else 0
        pool = pools[0][axis] if pools else 1
        outputs = (size[axis] + added - sum(beyond)) // pool
        axes.append(_Axis(added // 2, added - added // 2, sum(beyond), pool, outputs))
    return _Block(tuple(layers), (axes[0], axes[1]))


def _is_convolution(layer):
    return (
        type(layer) in (keras.layers.Conv2D, FastConvolution)
        and layer.data_format == "channels_last"
        and layer.groups == 1
        and {*layer.strides, *layer.dilation_rate} == {1}
        and layer.padding in ("same", "valid")
        and layer.activation in _POINTWISE
    )


def _is_pool(layer, inputs):
    return (
        type(layer) is keras.layers.MaxPooling2D
        and layer.data_format == "channels_last"
        and tuple(layer.strides) == tuple(layer.pool_size)
        and (
            layer.padding == "valid"
            # Then "same" adds nothing.
            or not any(np.remainder(inputs, layer.pool_size))
        )
    )


def _is_pointwise(layer):
    """Whether each number stays in its place, and 0 stays 0."""
    if type(layer) is keras.layers.Activation:
        return layer.activation in _POINTWISE
    return type(layer) in (keras.layers.Dropout, FoldedNormalization) or (
        type(layer) is keras.layers.ReLU and not layer.threshold
    )
