"""Checks of what a model is trained on: labels, images, units. Wrong ones raise one line."""

import dataclasses
import functools
import re
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.checks import probabilities
from logit_reg.attacks.engine.examples import ROUNDING
from logit_reg.attacks.engine.forward import only_output
from logit_reg.objectives import class_indices, label_error
from logit_reg.threat import ThreatModel

# Images that span less of the pixel range than this are probably in other units.
_NARROW = 0.01
# Images that show whether a network returns logits.
_NUM_SHOWN = 8
# What an assertion of a graph says, a part in each pair of brackets.
_ASSERTED = re.compile(r"assertion failed: (\[.*\])")


@dataclasses.dataclass
class InputCheck:
    """What a model takes, and the checks of it."""

    network: keras.Model
    """Images (N, H, W, C) -> logits (N, K)."""
    bounds: tuple[float, float]
    """Lowest and highest pixel value."""
    dtype: str
    """What images become."""
    num_classes: int | None = None
    """K; None until images are seen, where the network does not know their shape."""

    def __post_init__(self):
        self._count_classes(known_shape(self.network))

    def of_batch(self, data) -> tuple[Any, Any]:
        """Images and labels of a batch of any source; wrong ones are an error in the graph.

        Args:
            data: (images (B, H, W, C) of any numeric type, labels (B,) or (B, 1)), as Keras hands
                it to `train_step`.

        Returns:
            Images (B, H, W, C) of `dtype` and labels (B,) int64.

        Raises:
            ValueError: if there are no labels, or weights of images are given.
        """
        images, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        if weights is not None:
            raise ValueError(
                "sample_weight and class_weight are refused: the penalty is of the batch as a "
                "whole; repeat or leave out images instead."
            )
        if labels is None:
            raise ValueError("labels are missing; pass images and labels, or a data set of both.")
        images = tf.cast(_only_tensor("images", images), self.dtype)
        if not images.shape[1:].is_fully_defined():
            # Random numbers are drawn in a static shape.
            images = tf.ensure_shape(images, (None, *image_shape(self.network)))
        self._count_classes(images.shape[1:])
        given = tf.convert_to_tensor(_only_tensor("labels", labels))
        if given.shape.rank is None:
            given = tf.reshape(given, (-1,))
        labels = class_indices(given, self.num_classes)
        is_right = [
            require(
                tf.equal(tf.size(labels), tf.shape(images)[0]),
                *("labels must be one an image; got", tf.size(labels)),
                *("for", tf.shape(images)[0], "images"),
            ),
            require(
                # Of every pixel, so that a NaN is seen.
                tf.reduce_all((images >= self._lowest) & (images <= self._highest)),
                *self._bounds_error(tf.reduce_min(images), tf.reduce_max(images)),
            ),
        ]
        if self.num_classes is not None:
            is_class = (labels >= 0) & (labels < self.num_classes)
            first = tf.boolean_mask(tf.reshape(given, (-1,)), ~is_class)[:1]
            is_right.append(require(tf.reduce_all(is_class), label_error(self.num_classes), first))
        with tf.control_dependencies(is_right):
            return tf.identity(images), tf.identity(labels)

    def of_network(self, images=None) -> None:
        """Check what the network returns, as far as the shape of its images is known.

        Args:
            images: (N, H, W, C) array or tensor, if that is what is trained on.

        Raises:
            ValueError: if it returns one logit an image.
        """
        is_array = isinstance(images, np.ndarray | tf.Tensor)
        shape = images.shape[1:] if is_array else known_shape(self.network)
        self._count_classes(shape)
        if shape is None:
            return
        sample = np.random.default_rng(0).uniform(*self.bounds, (_NUM_SHOWN, *shape))
        outputs = only_output(self.network(tf.constant(sample, self.dtype), training=False))
        if probabilities(np.asarray(outputs, np.float64)) is not None:
            warnings.warn(
                "the network returns probabilities, expected logits: the objective takes the "
                "softmax itself; leave it out of the network.",
                stacklevel=3,
            )

    def _count_classes(self, shape) -> None:
        """Learn K from the network, for images of a shape, (H, W, C) or None."""
        if self.num_classes is None and shape is not None:
            image = keras.KerasTensor((None, *shape), self.dtype)
            self.num_classes = only_output(self.network(image, training=False)).shape[-1]
            if self.num_classes == 1:
                raise ValueError(
                    "the network returns 1 logit an image, expected one for each class, at least 2."
                )

    def of_arrays(self, images=None, labels=None) -> None:
        """Check what is at hand as an array, all of it at once.

        Raises:
            ValueError: if a label is no class, or an image leaves the bounds.
        """
        if isinstance(labels, np.ndarray | tf.Tensor):
            class_indices(labels, self.num_classes)
        if isinstance(images, np.ndarray | tf.Tensor) and len(images):
            lowest, highest = np.min(images), np.max(images)
            is_inside = self._lowest <= lowest and highest <= self._highest
            require(is_inside, *self._bounds_error(lowest, highest))
            lower, upper = self.bounds
            if highest - lowest < _NARROW * (upper - lower):
                warnings.warn(
                    f"images span {lowest:g} to {highest:g} of the bounds of the model, "
                    f"{lower:g} to {upper:g}: are they in other pixel units?",
                    stacklevel=3,
                )

    @property
    def _lowest(self):
        return self.bounds[0] - ROUNDING * (self.bounds[1] - self.bounds[0])

    @property
    def _highest(self):
        return self.bounds[1] + ROUNDING * (self.bounds[1] - self.bounds[0])

    def _bounds_error(self, lowest, highest):
        lower, upper = self.bounds
        return (
            *("images span", lowest, "to", highest),
            f"and leave the bounds of the model, {lower:g} to {upper:g}; scale the images, or "
            f"give RegularizedModel their bounds",
        )


def check_units(bounds: tuple[float, float], threat: ThreatModel | None, sigma: float) -> None:
    """Check an adversary and noise against the pixel range; warn of what is out of proportion.

    Args:
        bounds: lowest and highest pixel value of the model.
        threat: the adversary's, if there is one.
        sigma: standard deviation of the noise, pixel units.

    Raises:
        ValueError: if the threat model has other bounds.
    """
    span = bounds[1] - bounds[0]
    if threat is not None:
        if (threat.lower, threat.upper) != tuple(bounds):
            raise ValueError(
                f"the adversary's threat model has bounds {threat.lower:g} to {threat.upper:g}, "
                f"the model {bounds[0]:g} to {bounds[1]:g}; give both the pixel range of the "
                f"images."
            )
        if threat.norm == "linf" and not span / 1000 <= threat.epsilon < span:
            _warn_of_units("epsilon", threat.epsilon, bounds)
    if sigma > span:
        _warn_of_units("sigma", sigma, bounds)


def _warn_of_units(name: str, value: float, bounds) -> None:
    warnings.warn(
        f"{name} {value:g} is in the images' pixel units, which are {bounds[0]:g} to "
        f"{bounds[1]:g} here; is it meant for another pixel range?",
        # Whoever makes the model.
        stacklevel=4,
    )


def known_shape(network: keras.Model) -> tuple[int, ...] | None:
    """(H, W, C) of a network's images, or None where it does not know all of it."""
    shape = getattr(network, "input_shape", None)
    if isinstance(shape, list | dict) and len(shape) == 1:
        (shape,) = shape.values() if isinstance(shape, dict) else shape
    if not isinstance(shape, tuple) or None in shape[1:]:
        return None
    return shape[1:]


def image_shape(network: keras.Model) -> tuple[int, ...]:
    """(H, W, C) of a network's images.

    Raises:
        ValueError: if it does not know all of it.
    """
    shape = known_shape(network)
    if shape is None:
        raise ValueError(
            "the network does not know the shape of its images: with image = keras.Input((H, W, "
            "C)), give keras.Model(image, network(image))."
        )
    return shape


def _only_tensor(name: str, value):
    """One dense tensor, out of a dictionary or list of one."""
    if isinstance(value, dict | list | tuple) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | tf.RaggedTensor | tf.SparseTensor):
        kind = f"{len(value)} parts" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be one dense tensor; got {kind}.")
    return value


def require(is_right, *parts):
    """Raise the parts, texts and numbers, in one line: here, or by an assertion of the graph.

    Args:
        is_right: () bool, a tensor inside a trace.
        parts: what the error says.

    Returns:
        An operation for `tf.control_dependencies`.
    """
    if tf.is_symbolic_tensor(is_right):
        return tf.debugging.Assert(is_right, list(parts))
    if not is_right:
        words = (part if isinstance(part, str) else f"{np.squeeze(part)}" for part in parts)
        raise ValueError(f"{' '.join(words)}.")
    return tf.no_op()


def in_one_line(function):
    """A function that raises a graph's failed assertion as a `ValueError` of one line."""

    @functools.wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except tf.errors.InvalidArgumentError as error:
            asserted = _ASSERTED.search(error.message)
            if asserted is None:
                raise
            words = re.findall(r"\[(.*?)\]", asserted[1])
            raise ValueError(f"{' '.join(words)}.") from None

    return wrapper
