"""The random numbers of a training step, for each image its own."""

import dataclasses
from typing import Any

import tensorflow as tf

from logit_reg.training.distribution import num_replicas, own_slice

NOISE, START, RADIUS, CROP = range(4)
"""What numbers are drawn for: of one step and one purpose they are always the same. An adversary
that draws more takes numbers from 4 on."""


@dataclasses.dataclass(frozen=True)
class StepNumbers:
    """Random numbers that depend on the seed, the step and the image's place in the whole batch.

    So every replica draws all of them and keeps its own: a millisecond for a batch of MNIST. They
    are float32 numbers in either precision.
    """

    seed: int
    """Of training."""
    step: Any
    """() int64."""
    num_images: Any
    """() int of this replica's part of the batch."""
    dtype: str
    """Of what is returned."""

    def of_step(self, step) -> "StepNumbers":
        """Return those of another step."""
        return dataclasses.replace(self, step=step)

    def normal(self, purpose: int, shape):
        """(num_images, *shape) numbers of the standard normal distribution."""
        return self._own(tf.random.stateless_normal(self._whole(shape), self._seed(purpose)))

    def uniform(self, purpose: int, shape):
        """(num_images, *shape) numbers, uniform on [-1, 1)."""
        return self._uniform(purpose, shape, -1.0)

    def unit(self, purpose: int, shape):
        """(num_images, *shape) numbers, uniform on [0, 1)."""
        return self._uniform(purpose, shape, 0.0)

    def _uniform(self, purpose, shape, lower):
        whole = self._whole(shape)
        return self._own(tf.random.stateless_uniform(whole, self._seed(purpose), lower, 1.0))

    def _whole(self, shape):
        return (self.num_images * num_replicas(), *shape)

    def _own(self, numbers):
        return tf.cast(own_slice(numbers), self.dtype)

    def _seed(self, purpose):
        return tf.random.experimental.stateless_fold_in(
            tf.stack([tf.constant(self.seed, tf.int64), self.step]), purpose
        )
