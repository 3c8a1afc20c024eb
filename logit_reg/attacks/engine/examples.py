"""What an attack is given: images, labels, places in the data set, and where chance comes from."""

import dataclasses

import numpy as np

from logit_reg.attacks.engine.forward import LogitsFn, count_classes
from logit_reg.attacks.engine.random_numbers import random_stream

ROUNDING = 1e-6
"""Share of the pixel range's larger end by which images may leave the range."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """The arguments of `Attack.run`, checked."""

    images: np.ndarray
    """(N, H, W, C) float32, pixel units."""
    labels: np.ndarray
    """(N,) int64."""
    indices: np.ndarray
    """(N,) int64 places of the images in their data set."""
    seed: int
    """Source of all random numbers."""
    restart: int = 0
    """Number of the restart, a further source of random numbers."""
    gradient_logits_fn: LogitsFn | None = None
    """What to take directions from; the attacked network if None."""

    @classmethod
    def checked(cls, images, labels, *, seed: int, indices=None, **options) -> "Examples":
        """Check the arguments of `Attack.run`.

        Raises:
            ValueError: as `attack_inputs`.
        """
        images, labels, indices = attack_inputs(images, labels, indices)
        return cls(images, labels, indices, seed, **options)

    def take(self, rows) -> "Examples":
        """Some of them: rows (M,) int or a slice."""
        parts = {name: getattr(self, name)[rows] for name in ("images", "labels", "indices")}
        return dataclasses.replace(self, **parts)

    def stream(self, attack, *names: str) -> int:
        """A stream of an attack's random numbers, see `random_stream`."""
        return random_stream(self.seed, type(attack).__name__, *names)

    def functions(self, logits_fn: LogitsFn) -> tuple[LogitsFn, LogitsFn]:
        """The callable that judges, and the one that gives directions."""
        return logits_fn, self.gradient_logits_fn or logits_fn


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


def within_bounds(images: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Images that may leave the pixel range by a rounding, and no more.

    Args:
        images: (N, H, W, C) float, pixel units.
        lower: lowest pixel value.
        upper: highest pixel value.

    Returns:
        The images, clipped to the range where they leave it by at most a millionth of its larger
        end, as a bound that is no float32 makes them.

    Raises:
        ValueError: if they leave it by more, or are not finite.
    """
    if not len(images):
        return images
    lowest, highest = float(images.min()), float(images.max())
    slack = ROUNDING * max(abs(lower), abs(upper))
    if not (lower - slack <= lowest and highest <= upper + slack):
        raise ValueError(
            f"images span [{lowest:.9g}, {highest:.9g}], but the threat model has bounds "
            f"[{lower:.9g}, {upper:.9g}]; images, epsilon and bounds must share pixel units."
        )
    is_inside = lower <= lowest and highest <= upper
    return images if is_inside else np.clip(images, np.float32(lower), np.float32(upper))


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


def check_examples(logits_fn: LogitsFn, images, labels) -> None:
    """Refuse labels that are no class of a network.

    Args:
        logits_fn: images -> logits.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int.

    Raises:
        ValueError: if there is one, or the network gives no logits.
    """
    if len(images):
        check_classes(labels, count_classes(logits_fn, images))
