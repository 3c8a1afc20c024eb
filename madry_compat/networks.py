"""The challenges' two networks, as functional Keras models from raw pixels to logits.

Only stock `keras.layers` and `keras.ops` are used, so a saved network loads in Keras' safe
mode, on every backend, without this project installed.

Variables are named by layer; `madry_compat.tf1_checkpoints` maps them to the TF1 names.
"""

import math

import keras
from keras import layers, ops

_CIFAR_SHAPE = (32, 32, 3)
_UNITS_PER_GROUP = 5


def build(network: str, width: int, num_classes: int) -> keras.Model:
    """The untrained network of a challenge.

    Args:
        network: `Challenge.network`, the name of a function of this module.
        width: of a network that has more than one size, else 0.
        num_classes: number of logits; 10 for `mnist_cnn`.
    """
    if network == "mnist_cnn":
        return mnist_cnn()
    return wide_resnet(width, num_classes)


def mnist_cnn() -> keras.Model:
    """The MNIST challenge's network: two convolutions and two dense layers.

    Returns:
        A model from images (N, 28, 28, 1) in [0, 1] to logits (N, 10), with 3,274,634 parameters.

    Source:
        MadryLab mnist_challenge `model.py`: truncated normal weights of standard deviation 0.1,
        biases 0.1, SAME padding. The challenge feeds flat images of 784 values; here the channel
        axis is explicit, and the flattening before the dense layer is the same (NHWC).
    """
    weights = {
        "kernel_initializer": keras.initializers.TruncatedNormal(stddev=0.1),
        "bias_initializer": keras.initializers.Constant(0.1),
    }
    images = keras.Input((28, 28, 1), name="images")
    x = layers.Conv2D(32, 5, padding="same", activation="relu", name="conv1", **weights)(images)
    x = layers.MaxPooling2D(2, padding="same", name="pool1")(x)
    x = layers.Conv2D(64, 5, padding="same", activation="relu", name="conv2", **weights)(x)
    x = layers.MaxPooling2D(2, padding="same", name="pool2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(1024, activation="relu", name="dense", **weights)(x)
    logits = layers.Dense(10, name="logits", **weights)(x)
    return keras.Model(images, logits, name="mnist_cnn")


def wide_resnet(width: int = 10, num_classes: int = 10) -> keras.Model:
    """The CIFAR-10 challenge's pre-activation ResNet: 3 groups of 5 units, 32 layers.

    Args:
        width: multiplier of the group widths 16, 32, 64. 10 is the challenge's "w32-10"
            (45,901,914 trainable parameters); 1 is its narrow `[16, 16, 32, 64]`.
        num_classes: number of logits.

    Returns:
        A model from images (N, 32, 32, 3) in [0, 255] to logits (N, num_classes). Images are
        standardised one by one inside the model.

    Raises:
        ValueError: if `width` or `num_classes` is not a positive integer.

    Source:
        MadryLab cifar10_challenge `model.py`. BatchNorm has momentum 0.9 and epsilon 1e-3, leaky
        ReLU slope 0.1, shortcuts are average pooling and zero-padded channels. Deviation: Keras
        updates a moving variance with the population variance of the batch, TF1's fused kernel
        with n / (n - 1) times it.
    """
    if width < 1 or num_classes < 1:
        raise ValueError(
            f"wide_resnet needs a positive width and num_classes; got {width} and {num_classes}."
        )
    group_widths = (16 * width, 32 * width, 64 * width)

    images = keras.Input(_CIFAR_SHAPE, name="images")
    x = _per_image_standardization(images)
    x = _conv(16, 3, 1, "input_init_conv")(x)
    for group, channels in enumerate(group_widths, start=1):
        for unit in range(_UNITS_PER_GROUP):
            x = _residual_unit(
                x,
                channels,
                stride=2 if group > 1 and unit == 0 else 1,
                # The very first unit activates before the split, so its shortcut is activated too.
                activate_before_residual=group == 1 and unit == 0,
                name=f"unit_{group}_{unit}",
            )
    x = _activation(_batch_norm("unit_last_bn")(x), "unit_last_relu")
    x = layers.GlobalAveragePooling2D(name="global_pool")(x)
    logits = layers.Dense(
        num_classes,
        # TF1's uniform_unit_scaling_initializer(factor=1): U(+-sqrt(3 / fan_in)).
        kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "uniform"),
        name="logits",
    )(x)
    return keras.Model(images, logits, name="wide_resnet")


def _per_image_standardization(images):
    """Zero mean and unit variance for each image; the deviation is floored at 1/sqrt(3072)."""
    mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
    centered = ops.subtract(images, mean)
    variance = ops.mean(ops.square(centered), axis=(1, 2, 3), keepdims=True)
    floor = 1.0 / math.sqrt(math.prod(_CIFAR_SHAPE))
    return ops.divide(centered, ops.maximum(ops.sqrt(variance), floor))


def _residual_unit(x, channels, *, stride, activate_before_residual, name):
    in_channels = x.shape[-1]
    activated = _activation(_batch_norm(f"{name}_bn1")(x), f"{name}_relu1")
    shortcut = activated if activate_before_residual else x

    x = _conv(channels, 3, stride, f"{name}_conv1")(activated)
    x = _activation(_batch_norm(f"{name}_bn2")(x), f"{name}_relu2")
    x = _conv(channels, 3, 1, f"{name}_conv2")(x)

    if stride > 1:
        shortcut = layers.AveragePooling2D(stride, padding="valid", name=f"{name}_pool")(shortcut)
    if in_channels != channels:
        pad = (channels - in_channels) // 2
        shortcut = ops.pad(shortcut, [[0, 0], [0, 0], [0, 0], [pad, pad]])
    return layers.Add(name=f"{name}_add")([x, shortcut])


def _conv(channels, size, stride, name):
    # He initialisation over the output fan, as in the challenge's `_conv`.
    stddev = math.sqrt(2.0 / (size * size * channels))
    return layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=stddev),
        name=name,
    )


def _batch_norm(name):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-3, name=name)


def _activation(x, name):
    return layers.LeakyReLU(negative_slope=0.1, name=name)(x)
