"""Images, labels and places in the data set, checked."""

import numpy as np


def class_numbers(labels) -> np.ndarray:
    """Labels as one class number an image.

    Args:
        labels: (N,) or (N, 1) int, as data sets give them.

    Returns:
        (N,) int64.

    Raises:
        ValueError: if they are one-hot, not integers, or have another shape.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        raise ValueError(
            f"labels must be class numbers (N,); got {labels.shape}, as one-hot labels are: give "
            f"labels.argmax(axis=1)."
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers, one class number an image; got {labels.dtype} "
            f"{labels.shape}."
        )
    return labels.astype(np.int64, copy=False)


def check_classes(labels: np.ndarray, num_classes: int) -> None:
    """Refuse labels that are no class of the network.

    Args:
        labels: (N,) int.
        num_classes: K.

    Raises:
        ValueError: if one is not in 0 ... K-1; names the first one and its place.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise ValueError(
            f"labels must be 0 to {num_classes - 1}, for the network's {num_classes} classes; "
            f"label {outside[0]} is {labels[outside[0]]} ({len(outside)} such labels)."
        )


def attack_inputs(images, labels, indices):
    """The three arrays of an attack as tensors, checked.

    Args:
        images: (N, H, W, C) float, pixel units.
        labels: (N,) or (N, 1) int.
        indices: (N,) int or None for 0 ... N-1.

    Returns:
        images float32, labels int64 and indices int64: to be read only, for an array that has the
        type already is the caller's own.

    Raises:
        ValueError: if shapes or types do not fit together.
    """
    images, labels = np.asarray(images), class_numbers(labels)
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images must be float (N, H, W, C) in pixel units; got {images.dtype} {images.shape}."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be {images.shape[:1]} integers, one an image; got {labels.shape}."
        )
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != labels.shape:
        raise ValueError(f"indices must have shape {labels.shape}; got {indices.shape}.")
    return (
        images.astype(np.float32, copy=False),
        labels,
        indices.astype(np.int64, copy=False),
    )
