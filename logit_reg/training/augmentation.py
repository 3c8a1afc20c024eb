"""The augmentation of the CIFAR-10 challenge."""

import tensorflow as tf


def random_crop_and_flip(images, draws):
    """Pad by 2 pixels a side with zeros, crop back at random, flip half of the images.

    Args:
        images: (B, H, W, C) float.
        draws: (B, 3) float, uniform on [0, 1): row, column and flip of each image.

    Returns:
        (B, H, W, C) float.

    Source:
        MadryLab cifar10_challenge `cifar10_input.py` (32 -> 36 -> 32).
    """
    height, width = tf.unstack(tf.shape(images)[1:3])
    padded = tf.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]])
    offsets = tf.cast(draws[:, :2] * 5.0, tf.int32)
    rows = offsets[:, :1] + tf.range(height)
    columns = offsets[:, 1:] + tf.range(width)
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    cropped = tf.ensure_shape(tf.gather(cropped, columns, axis=2, batch_dims=1), images.shape)
    flip = tf.reshape(draws[:, 2] < 0.5, (-1, 1, 1, 1))
    return tf.where(flip, tf.reverse(cropped, axis=[2]), cropped)
