"""Fast adversarial training on MNIST as its authors train: their network, their recipe.

    python docs/examples/fgsm_rs_published.py FOLDER SEED fgsm_rs.keras

FOLDER is a TFDS folder with MNIST. After Wong et al., ICLR 2020, `MNIST/train_mnist.py`: no ramp of
epsilon, a noisy start that may leave the pixel range, PyTorch's initial weights.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

from logit_reg import Objective, RegularizedModel, ThreatModel
from logit_reg.training.adversaries.fgsm_rs import FGSMRSAdversary
from logit_reg.training.learning_rates import Cyclic
from madry_compat.data import load, to_pixels

EPOCHS, BATCH_SIZE, PEAK_RATE = 10, 100, 5e-3
STEPS = EPOCHS * 60_000 // BATCH_SIZE


class UnclippedStart(FGSMRSAdversary):
    """The noisy image, of which the gradient is taken, may leave the pixel range."""

    def _within_range(self, images):
        return images


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
    digits = load("mnist", "train", folder)
    images = to_pixels(digits.images, "mnist")
    network = small_network()
    adversary = UnclippedStart(ThreatModel("linf", epsilon=0.3), step_size=0.375, start_noise=0.3)
    model = RegularizedModel(
        network, Objective(), adversary=adversary, bounds=(0.0, 1.0), seed=seed
    )
    model.compile(optimizer=keras.optimizers.Adam(Cyclic(PEAK_RATE, STEPS), epsilon=1e-8))
    batches = tf.data.Dataset.from_tensor_slices((images, digits.labels))
    model.fit(batches.shuffle(60_000, seed=seed).batch(BATCH_SIZE), epochs=EPOCHS, verbose=2)
    network.save(path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
