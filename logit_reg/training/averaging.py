"""Averages of the weights over training: what is exported in the place of the last ones."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


class WeightAverage:
    """The moving average of all weights of a network, and of BatchNorm's statistics with them.

    After update t it becomes m * average + (1 - m) * weights, with m = min(momentum, t / (9 + t)).

    Source:
        Polyak and Juditsky 1992. The growing m is that of `tf.train.ExponentialMovingAverage` with
        `num_updates`. Keras' own `use_ema` differs in two ways: it starts at the weights of the
        first update with the full momentum, so that those still weigh 37 % after 1,000 updates at
        0.999, and it leaves out BatchNorm's moving statistics, which belong to the weights that
        they were measured with. Here they are averaged alike, as timm's `ModelEma` does.
    """

    def __init__(self, network: keras.Model, momentum: float):
        """Begin with the weights that the network has now.

        Args:
            network: built, in the scope of the strategy that trains it.
            momentum: in [0, 1).
        """
        self._momentum = momentum
        # Not the counters of random numbers.
        self._averaged = [v for v in network.variables if tf.as_dtype(v.dtype).is_floating]
        self.variables = [
            keras.Variable(v.numpy(), dtype=v.dtype, trainable=False, name=f"{v.name}_average")
            for v in self._averaged
        ]
        """Keras variables, one for each floating-point variable of the network."""

    def update(self, num_updates) -> None:
        """Take in the weights after an update; to be called inside the training step.

        Args:
            num_updates: () int: how many updates were made, this one included.
        """
        updates = tf.cast(num_updates, tf.float64)
        rest = 1.0 - tf.minimum(tf.constant(self._momentum, tf.float64), updates / (9.0 + updates))
        for variable, average in zip(self._averaged, self.variables, strict=True):
            share = tf.cast(rest, average.dtype)
            average.assign(average.value + share * (variable.value - average.value))

    @contextlib.contextmanager
    def in_network(self) -> Iterator[None]:
        """Put the averages into the network, and afterwards its own weights back, bit by bit."""
        own = [variable.numpy() for variable in self._averaged]
        try:
            for variable, average in zip(self._averaged, self.variables, strict=True):
                variable.assign(average.numpy())
            yield
        finally:
            for variable, value in zip(self._averaged, own, strict=True):
                variable.assign(value)
