"""The challenges' optimizers, in TF1's form, as Keras optimizers.

They matter only where training goes on from a challenge checkpoint: the slots of
`madry_compat.tf1_checkpoints` mean what they meant to TF1.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay

from madry_compat.config import checked_schedule

# The default of TF1's Adam; Keras' own is 1e-7.
ADAM_EPSILON = 1e-8


class TF1Momentum(keras.optimizers.Optimizer):
    """Momentum whose slot accumulates gradients, not steps: a = momentum * a + g; w -= rate * a.

    `keras.optimizers.SGD` accumulates rate * g instead. The two agree until the rate changes.

    Args:
        learning_rate: float, or a schedule of the number of updates made so far.
        momentum: factor of the accumulator, in [0, 1).
        name: name of the optimizer.

    Raises:
        ValueError: if `momentum` is outside [0, 1).

    Source:
        `tf.train.MomentumOptimizer`, as cifar10_challenge `train.py` uses it with momentum 0.9.
    """

    def __init__(
        self,
        learning_rate: float | LearningRateSchedule,
        momentum: float = 0.9,
        name: str = "tf1_momentum",
    ):
        super().__init__(learning_rate=learning_rate, name=name)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1); got {momentum}.")
        self.momentum = momentum

    def build(self, variables):
        """Creates one accumulator for each variable."""
        if self.built:
            return
        super().build(variables)
        self._accumulators = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable and its accumulator."""
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        accumulator = self._accumulators[self._get_variable_index(variable)]
        self.assign(accumulator, ops.add(ops.multiply(accumulator, self.momentum), gradient))
        self.assign_sub(variable, ops.multiply(accumulator, rate))

    def get_config(self):
        """Returns the arguments that rebuild this optimizer, serialised."""
        config = super().get_config()
        return {key: config[key] for key in ("name", "learning_rate")} | {"momentum": self.momentum}


class TF1Adam(keras.optimizers.Adam):
    """Adam as TF1 computes it, with TF1's epsilon, in one pass over the weights.

    w -= rate * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)

    The formula is Keras' own; Keras takes a pass over memory for each of its ten operations, which
    is a tenth of a training step of the MNIST network. Under a `tf.distribute` strategy the update
    is Keras'.

    Args:
        learning_rate: float, or a schedule of the number of updates made so far.
        beta_1: decay of the gradients' mean m.
        beta_2: decay of the squared gradients' mean v.
        epsilon: added outside the bias correction (Kingma and Ba's "epsilon hat"). A run that
            minimises the mean over b images does what the challenge does with the sum when
            epsilon is `ADAM_EPSILON / b`.
        name: name of the optimizer.

    Source:
        `tf.train.AdamOptimizer(1e-4)` in mnist_challenge `train.py`; the kernel is TF1's, too.
    """

    def __init__(
        self,
        learning_rate: float | LearningRateSchedule = 1e-4,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = ADAM_EPSILON,
        name: str = "tf1_adam",
    ):
        super().__init__(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, name=name)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable and its two slots."""
        if tf.distribute.has_strategy() or isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        dtype = variable.dtype
        beta_1, beta_2 = tf.constant(self.beta_1, dtype), tf.constant(self.beta_2, dtype)
        updates = tf.cast(self.iterations.value + 1, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(beta_1, updates),
            beta2_power=tf.pow(beta_2, updates),
            lr=tf.cast(learning_rate, dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )

    def get_config(self):
        """Returns the arguments that rebuild this optimizer, serialised."""
        config = super().get_config()
        return {
            key: config[key] for key in ("name", "learning_rate", "beta_1", "beta_2", "epsilon")
        }


def piecewise_constant(schedule: Sequence[Sequence[float]]) -> LearningRateSchedule:
    """Learning rate of a challenge's `step_size_schedule`.

    Args:
        schedule: pairs [first step, learning rate], from step 0 on with increasing steps, such
            as [[0, 0.1], [40000, 0.01], [60000, 0.001]].

    Returns:
        A schedule of the number of updates made so far. As in TF1, a boundary belongs to the
        rate before it: 0.1 still holds when 40,000 updates have been made, 0.01 from 40,001 on.

    Raises:
        ValueError: as `checked_schedule`.

    Source:
        `tf.train.piecewise_constant` in cifar10_challenge `train.py`.
    """
    steps, rates = zip(*checked_schedule(schedule), strict=True)
    if len(rates) == 1:
        # Keras' class fails without a boundary; one between two equal rates changes nothing.
        return PiecewiseConstantDecay([0], list(rates * 2))
    return PiecewiseConstantDecay(list(steps[1:]), list(rates))
