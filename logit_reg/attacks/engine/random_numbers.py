"""Random numbers that belong to an example, not to its batch."""

import hashlib

import tensorflow as tf

from logit_reg.threat import ThreatModel


def example_noise(distribution: str, shape, *, stream, indices, restart):
    """Random numbers that belong to each example, whichever batch it is in.

    Args:
        distribution: "uniform" on [-1, 1), "unit" for uniform on [0, 1), or "normal".
        shape: shape of one example's numbers.
        stream: () int64 from `random_stream`.
        indices: (N,) int64 places of the examples in their data set.
        restart: () int64 number of the restart.

    Returns:
        (N, *shape) float32.
    """

    def draw(index):
        seed = tf.random.experimental.stateless_fold_in(tf.stack([stream, index]), restart)
        if distribution == "normal":
            return tf.random.stateless_normal(shape, seed)
        lower = -1.0 if distribution == "uniform" else 0.0
        return tf.random.stateless_uniform(shape, seed, lower, 1.0)

    signature = tf.TensorSpec(shape, tf.float32)
    # Outside of a graph TensorFlow warns that it cannot.
    at_once = 1 if tf.executing_eagerly() else 2
    return tf.map_fn(draw, indices, fn_output_signature=signature, parallel_iterations=at_once)


def random_stream(seed: int, *names: str) -> int:
    """A 63-bit number for a seed and the names of those who draw from it."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform_in_ball(threat: ThreatModel, images, *, stream, indices, restart, scale=1.0):
    """A point drawn uniformly from each image's ball, clipped to the pixel range.

    Args:
        threat: norm, budget and pixel range.
        images: (N, H, W, C) float32, pixel units.
        stream: () int64 from `random_stream`; the stream after it is used, too.
        indices: (N,) int64 places of the images in their data set.
        restart: () int64 number of the restart.
        scale: () or (N, 1, 1, 1) fraction of epsilon.

    Returns:
        (N, H, W, C) float32.
    """
    shape, draw = images.shape[1:], {"indices": indices, "restart": restart}
    noise = example_noise(threat.start_noise, shape, stream=stream, **draw)
    if threat.norm == "linf":
        return threat.random_start(images, noise, 1.0, scale)
    # A stream of its own: the same one would tie the radius to the first pixels.
    radius = example_noise("unit", (1, 1, 1), stream=stream + 1, **draw)
    return threat.random_start(images, noise, radius, scale)


def random_direction(threat: ThreatModel, images, *, stream, indices, restart):
    """Noise of length 1 in the threat model's norm, from which AutoAttack's attacks start.

    Args:
        threat: decides the norm.
        images: (N, H, W, C) float32.
        stream: () int64 from `random_stream`.
        indices: (N,) int64 places of the images in their data set.
        restart: () int64 number of the restart.

    Returns:
        (N, H, W, C) float32: in linf uniform noise over its largest entry, in l2 and l1 normal
        noise over its norm.
    """
    distribution = "uniform" if threat.norm == "linf" else "normal"
    draw = {"stream": stream, "indices": indices, "restart": restart}
    return threat.unit(example_noise(distribution, images.shape[1:], **draw))
