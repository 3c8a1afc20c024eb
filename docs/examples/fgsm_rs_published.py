"""Fast adversarial training on MNIST as its authors train: their network, their recipe.

    python docs/examples/fgsm_rs_published.py FOLDER SEED fgsm_rs.keras

FOLDER is a TFDS folder with MNIST. After Wong et al., ICLR 2020, `MNIST/train_mnist.py`: no ramp of
epsilon, a noisy start that may leave the pixel range, PyTorch's initial weights.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from logit_reg import Objective, RegularizedModel, ThreatModel
from logit_reg.training.adversaries.fgsm_rs import FGSMRSAdversary

EPOCHS, BATCH_SIZE, PEAK_RATE = 10, 100, 5e-3
STEPS = EPOCHS * 60_000 // BATCH_SIZE


class UnclippedStart(FGSMRSAdversary):
    """The noisy image, of which the gradient is taken, may leave the pixel range."""

    def _within_range(self, images):
        return images


class Cyclic(keras.optimizers.schedules.LearningRateSchedule):
    """Up to the peak over two fifths of the training, then down to 0."""

    def __call__(self, step):
        """The rate of a step."""
        now, top = tf.cast(step, tf.float32) + 1, 2 * STEPS / 5
        up, down = now / top, (STEPS - now) / (STEPS - top)
        return PEAK_RATE * tf.where(now < top, up, down)


def drawn(fan_in):
    """PyTorch's initial weights and biases."""
    return keras.initializers.RandomUniform(-1 / np.sqrt(fan_in), 1 / np.sqrt(fan_in))


def layer(kind, size, fan_in, **others):
    """A convolution or dense layer that starts as PyTorch's."""
    return kind(size, kernel_initializer=drawn(fan_in), bias_initializer=drawn(fan_in), **others)


def small_network():
    """The authors' `mnist_net`: images (N, 28, 28, 1) in [0, 1] -> logits (N, 10)."""
    strided = {"kernel_size": 4, "strides": 2, "activation": "relu"}
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.ZeroPadding2D(1),
            layer(keras.layers.Conv2D, 16, 16, **strided),
            keras.layers.ZeroPadding2D(1),
            layer(keras.layers.Conv2D, 32, 256, **strided),
            keras.layers.Flatten(),
            layer(keras.layers.Dense, 100, 1568, activation="relu"),
            layer(keras.layers.Dense, 10, 100),
        ]
    )


def main(folder, seed, path):
    """Train and save."""
    keras.utils.set_random_seed(seed)
    digits = tfds.load("mnist", split="train", data_dir=folder, batch_size=-1, download=False)
    images = (digits["image"].numpy() / 255).astype(np.float32)
    network = small_network()
    adversary = UnclippedStart(ThreatModel("linf", epsilon=0.3), step_size=0.375, start_noise=0.3)
    model = RegularizedModel(
        network, Objective(), adversary=adversary, bounds=(0.0, 1.0), seed=seed
    )
    model.compile(optimizer=keras.optimizers.Adam(Cyclic(), epsilon=1e-8))
    batches = tf.data.Dataset.from_tensor_slices((images, digits["label"].numpy()))
    model.fit(batches.shuffle(60_000, seed=seed).batch(BATCH_SIZE), epochs=EPOCHS, verbose=2)
    network.save(path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
