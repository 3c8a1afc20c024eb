"""Planted fakes: networks whose robustness is none, to test an audit or an attack of your own.

Each hides the adversarial examples of a network from attacks and leaves nearly all decisions as
they are. What an attack has to follow to see through it is at hand:
`evaluate(fake, attacks, images, labels, gradient_logits_fn=fake.followed)`, for a fake that
`is_random` with `eot=20`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.forward import LogitsFn, call_logits, clean_logits
from logit_reg.audit.features import features_of
from logit_reg.evaluation.run import content_hash, network_hash

# Reference images that are sent through the network at once.
_BATCH = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Fake:
    """A network behind something that hides its adversarial examples; a `logits_fn`."""

    network: keras.Model
    """What is hidden: images (N, H, W, C) in pixel units -> logits (N, K)."""
    name: str
    """One of `FAKES`."""
    settings: Mapping[str, Any]
    """How it is hidden; JSON values."""
    logits_fn: LogitsFn
    """Images (N, H, W, C) in pixel units -> logits (N, K) of the fake."""
    followed: LogitsFn
    """The same with a gradient that attacks find adversarial examples with."""
    is_random: bool = False
    """Whether its logits differ from pass to pass."""

    def __call__(self, images):
        """Logits of the fake: (N, H, W, C) float, pixel units -> (N, K)."""
        return self.logits_fn(images)

    @property
    def record(self) -> dict[str, Any]:
        """What it is, for `audit.json`."""
        return {"name": self.name, **self.settings}

    @property
    def sha256(self) -> str:
        """Hash of its content, for the records of audits."""
        said = json.dumps([self.name, dict(self.settings), network_hash(self.network)])
        return hashlib.sha256(said.encode()).hexdigest()


def temperature(network: keras.Model, *, factor: float = 1e4) -> Fake:
    """Logits times a factor, so that the softmax saturates and cross-entropy has no gradient.

    Args:
        network: to hide; so in all functions here.
        factor: what the logits are multiplied by; far below 1, rounding takes the differences.

    Source:
        Carlini and Wagner 2016, arXiv:1607.04311, on defensive distillation.
    """

    def logits(images):
        return factor * call_logits(network, images)

    return Fake(network, "temperature", {"factor": factor}, logits, network)


def logit_jump(network: keras.Model, *, height: float = 1e3) -> Fake:
    """A constant on the largest logit: the margin jumps at the boundary and is never small.

    Args:
        network: to hide.
        height: of the jump.

    Source:
        This project. It stands for decisions that are post-processed before they are attacked.
    """

    def logits(images):
        found = call_logits(network, images)
        return found + height * _largest(found)

    return Fake(network, "logit-jump", {"height": height}, logits, network)


def quantised_input(
    network: keras.Model, *, bounds: tuple[float, float] = (0.0, 1.0), levels: int = 16
) -> Fake:
    """Pixels rounded to a few levels, whose gradient is zero.

    Args:
        network: to hide.
        bounds: lowest and highest pixel value.
        levels: number of pixel values, at least 2.

    Source:
        Guo et al. 2018, arXiv:1711.00117 (bit depth); broken in Athalye et al. 2018,
        arXiv:1802.00420.
    """
    lower, upper = bounds
    step = (upper - lower) / (levels - 1)

    def rounded(images):
        return lower + step * tf.round((images - lower) / step)

    def logits(images):
        return call_logits(network, rounded(images))

    def straight_through(images):
        return call_logits(network, images + tf.stop_gradient(rounded(images) - images))

    settings = {"bounds": list(bounds), "levels": levels}
    return Fake(network, "quantised-input", settings, logits, straight_through)


def nearest_neighbours(network: keras.Model, *, references: np.ndarray, k: int = 5) -> Fake:
    """The votes of the nearest reference images by the network's features: steps, no slope.

    A neighbour votes for the class that the network gives it. Nearer ones weigh a little more, so
    that no two classes tie.

    Args:
        network: to hide; it has to end in a dense layer of logits.
        references: (M, H, W, C) float, pixel units, M at least `k`; not the images under attack.
        k: number of neighbours.

    Raises:
        ValueError: if there are too few references, or the features cannot be cut off.

    Source:
        Papernot and McDaniel 2018, arXiv:1803.04765, on the last features alone; broken in
        Sitawarin and Wagner 2019, arXiv:1903.08333.
    """
    if len(references) < k:
        raise ValueError(f"references must be at least k={k} images; got {len(references)}.")
    features = features_of(network)
    parts = [references[start : start + _BATCH] for start in range(0, len(references), _BATCH)]
    known = np.concatenate([clean_logits(features, part) for part in parts])
    votes = np.concatenate([clean_logits(network, part) for part in parts])
    votes = np.eye(votes.shape[1], dtype=np.float32)[votes.argmax(axis=1)]
    known_squares = np.sum(np.square(known), axis=1)
    # Sums of different powers of 2 are all different.
    weights = (1 + 0.5 ** np.arange(2, k + 2)).astype(np.float32)

    def nearness(images):
        found = call_logits(features, images)
        # Without the square of the image's own features, which is the same for all.
        return 2 * tf.matmul(found, known, transpose_b=True) - known_squares

    def logits(images):
        nearest = tf.math.top_k(nearness(images), k).indices
        return tf.reduce_sum(tf.gather(votes, nearest) * weights[:, None], axis=1)

    def smooth(images):
        """How near the references of each class are, all of them with a weight that decays."""
        weighted = nearness(images) / width
        of_class = tf.where(votes.T > 0, weighted[:, None], -np.inf)
        return tf.reduce_logsumexp(of_class, axis=-1)

    # Of the squared distances of the references from one another; the least is that to itself.
    apart = known_squares[:, None] + known_squares - 2 * known @ known.T
    width = float(np.mean(np.sort(apart, axis=1)[:, 1 : k + 1])) / 4
    settings = {"k": k, "references": content_hash(references)}
    return Fake(network, "nearest-neighbours", settings, logits, smooth)


def noisy_gradient(network: keras.Model, *, scale: float = 100.0) -> Fake:
    """Noise in the backward pass alone: the logits are the network's own.

    Args:
        network: to hide.
        scale: standard deviation of the noise, in root mean squares of an image's gradient.

    Source:
        This project, after the stochastic gradients of Athalye et al. 2018, arXiv:1802.00420.
    """

    @tf.custom_gradient
    def through(images):
        def backward(upstream):
            square = tf.reduce_mean(tf.square(upstream), axis=(1, 2, 3), keepdims=True)
            noise = tf.random.normal(tf.shape(upstream), dtype=upstream.dtype)
            return upstream + scale * tf.sqrt(square) * noise

        return tf.identity(images), backward

    def logits(images):
        return call_logits(network, through(images))

    return Fake(network, "noisy-gradient", {"scale": scale}, logits, network)


def reversed_gradient(network: keras.Model) -> Fake:
    """The gradient with the other sign: attacks go downhill. The logits are the network's own.

    Args:
        network: to hide.

    Source:
        This project. It stands for a sign error on the way of the gradient.
    """

    @tf.custom_gradient
    def through(images):
        return tf.identity(images), lambda upstream: -upstream

    def logits(images):
        return call_logits(network, through(images))

    return Fake(network, "reversed-gradient", {}, logits, network)


def shattered_gradient(
    network: keras.Model, *, height: float = 100.0, waves: float = 1237.0
) -> Fake:
    """A ripple on the largest logit whose slope drowns that of the network.

    Args:
        network: to hide.
        height: of the ripple, in logits.
        waves: periods of the ripple while every pixel moves by 1 along the ripple's direction.

    Source:
        This project, after the shattered gradients of Athalye et al. 2018, arXiv:1802.00420.
    """
    shape = tuple(network.input_shape[1:])
    direction = np.where(np.random.default_rng(0).random(shape) < 0.5, -1.0, 1.0)
    slope = (2 * np.pi * waves / direction.size * direction).astype(np.float32)

    def logits(images):
        found = call_logits(network, images)
        phase = tf.reduce_sum(tf.cast(images, tf.float32) * slope, axis=(1, 2, 3))
        # It lifts the largest logit and never lowers it.
        ripple = height * (1 + tf.sin(phase))
        return found + tf.cast(ripple, found.dtype)[:, None] * _largest(found)

    settings = {"height": height, "waves": waves}
    return Fake(network, "shattered-gradient", settings, logits, network)


def softmax_output(network: keras.Model, *, factor: float = 20.0) -> Fake:
    """Probabilities in place of logits.

    Args:
        network: to hide.
        factor: what the logits are multiplied by before; at 1 a plain softmax.

    Source:
        Croce and Hein 2020, arXiv:2003.01690: models that return probabilities.
    """

    def probabilities(images):
        return tf.nn.softmax(factor * call_logits(network, images))

    return Fake(network, "softmax-output", {"factor": factor}, probabilities, network)


def dropout(network: keras.Model, *, rate: float = 0.5) -> Fake:
    """Dropout of the network's features that stays on, drawn anew for each image and pass.

    Args:
        network: to hide; it has to end in a dense layer of logits.
        rate: share of the features that are dropped.

    Raises:
        ValueError: if the features cannot be cut off.

    Source:
        After Dhillon et al. 2018, arXiv:1803.01442 (stochastic activation pruning); broken in
        Athalye et al. 2018, arXiv:1802.00420.
    """
    features = features_of(network)
    head = keras.Model(features.outputs[0], network.outputs[0])

    def logits(images):
        return call_logits(head, tf.nn.dropout(call_logits(features, images), rate))

    return Fake(network, "dropout", {"rate": rate}, logits, logits, is_random=True)


def random_resize(
    network: keras.Model, *, bounds: tuple[float, float] = (0.0, 1.0), smallest: float = 0.8
) -> Fake:
    """Images shrunk to a random size and put at a random place, drawn anew in each pass.

    Args:
        network: to hide.
        bounds: lowest and highest pixel value; the margin is filled with the lowest.
        smallest: share of height and width that an image is shrunk to at most.

    Source:
        Xie et al. 2018, arXiv:1711.01991, without enlargement, which a network of a fixed input
        does not take; broken in Athalye et al. 2018, arXiv:1802.00420.
    """
    size = np.array(network.input_shape[1:3])
    least = np.maximum(1, np.round(smallest * size)).astype(int)

    def logits(images):
        share = tf.random.uniform(())
        new = tf.cast(tf.round(least + share * (size - least)), tf.int32)
        # Around the lowest value, so that the margin is filled with it.
        shrunk = tf.image.resize(images - bounds[0], new)
        spare = size - new
        before = tf.cast(tf.random.uniform((2,)) * tf.cast(spare + 1, tf.float32), tf.int32)
        margins = tf.stack([before, spare - before], axis=1)
        placed = tf.pad(shrunk, tf.concat([[[0, 0]], margins, [[0, 0]]], axis=0)) + bounds[0]
        return call_logits(network, tf.ensure_shape(placed, (None, *network.input_shape[1:])))

    settings = {"bounds": list(bounds), "smallest": smallest}
    return Fake(network, "random-resize", settings, logits, logits, is_random=True)


def _largest(logits):
    """One-hot rows of the largest logits."""
    return tf.one_hot(tf.argmax(logits, axis=-1), tf.shape(logits)[-1], dtype=logits.dtype)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fake."""

    plant: Callable[..., Fake]
    """Makes one of a network."""
    takes: tuple[str, ...] = ()
    """What it has to be told beside the network: "bounds", "references"."""


FAKES = {
    "temperature": Kind(temperature),
    "logit-jump": Kind(logit_jump),
    "quantised-input": Kind(quantised_input, ("bounds",)),
    "nearest-neighbours": Kind(nearest_neighbours, ("references",)),
    "noisy-gradient": Kind(noisy_gradient),
    "reversed-gradient": Kind(reversed_gradient),
    "shattered-gradient": Kind(shattered_gradient),
    "softmax-output": Kind(softmax_output),
    "dropout": Kind(dropout),
    "random-resize": Kind(random_resize, ("bounds",)),
}
"""All kinds by name; `FAKES[name].plant(network, ...)`."""
