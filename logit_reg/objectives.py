"""What training minimises: the paper's penalties and label smoothing, as functions of tensors.

Written with `keras.ops` only, to match the paper's equations rather than to share code. A loss
takes tensors, never a model.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

REGULARIZERS = (
    "none",
    "squeeze",
    "squeeze_example",
    "similarity",
    "clip_xent",
    "clip_xent_batch",
    "pairing",
)
REDUCTIONS = ("mean", "sum")

_CLIPPING = ("clip_xent", "clip_xent_batch")
_WITH_BETA = ("squeeze", "squeeze_example", "similarity", "pairing")


class LossTerms(NamedTuple):
    """What an `Objective` returns for a batch, each a () tensor."""

    total: Any
    """What is minimised."""
    cross_entropy: Any
    """Plain mean cross-entropy on the hard labels, whatever is minimised."""
    penalty: Any
    """The penalty before beta; 0 where the objective has none."""


def batch_logit_norm(logits, gamma: float = 0.0):
    """Distance of the whole batch of logits from gamma, divided by the batch size.

    Logit squeezing when gamma is 0, logit similarity otherwise. One norm over the batch, so the
    examples with the largest logits dominate the gradient.

    Args:
        logits: (B, K) float, before softmax.
        gamma: value that the logits are pulled towards, in logit units.

    Returns:
        () float, at least 0; its gradient at logits == gamma is 0.

    Scale:
        About 1/sqrt(B) of `example_logit_norm`: beta does not carry over between the two, nor
        between batch sizes. The paper uses B = 128.

    Source:
        Shafahi et al., Eq. 5 (gamma = 0) and Eq. 7 (gamma = 1). The norm is not squared.
    """
    logits = _at_least_float32(logits)
    batch_size = ops.cast(ops.shape(logits)[0], logits.dtype)
    return _l2_norm(logits - gamma, axis=None) / batch_size


def example_logit_norm(logits, gamma: float = 0.0):
    """Mean over the examples of the distance of an example's logits from gamma.

    Args:
        logits: (B, K) float, before softmax.
        gamma: value that the logits are pulled towards, in logit units.

    Returns:
        () float, at least 0; the gradient of an example with logits == gamma is 0.

    Scale:
        About sqrt(B) times `batch_logit_norm`.

    Source:
        Shafahi et al., Eq. 2 (logit squeezing of Kannan et al. 2018, per example).
    """
    return ops.mean(_l2_norm(_at_least_float32(logits) - gamma, axis=-1))


def paired_logit_distance(logits):
    """Mean squared difference between the logits of the batch's first and second half.

    Args:
        logits: (B, K) float; the last example of an odd batch is left out.

    Returns:
        () float, at least 0.

    Source:
        Clean logit pairing (CLP), Kannan et al. 2018, arXiv:1803.06373.
    """
    logits = _at_least_float32(logits)
    half = ops.shape(logits)[0] // 2
    return ops.mean(ops.square(logits[:half] - logits[half : 2 * half]))


def smooth_labels(labels, num_classes: int, smoothing: float):
    """One-hot labels moved towards the uniform distribution: y - smoothing * (y - 1/K).

    Args:
        labels: (B,) or (B, 1) class indices; see `class_indices`.
        num_classes: K.
        smoothing: lambda of the paper; 0 keeps the one-hot labels, 1 makes them uniform.

    Returns:
        (B, K) float32 probabilities; NaN for a label that is no class, inside a trace.

    Raises:
        ValueError: see `class_indices`.

    Source:
        Shafahi et al., Eq. 8 ("aggressive" label smoothing: lambda .9 and .95).
    """
    labels = class_indices(labels, num_classes)
    is_class = ops.logical_and(labels >= 0, labels < num_classes)
    one_hot = ops.one_hot(labels, num_classes, dtype="float32")
    # A row of zeros would be an image without a loss.
    one_hot = ops.where(is_class[:, None], one_hot, math.nan)
    return one_hot - smoothing * (one_hot - 1.0 / num_classes)


def class_indices(labels, num_classes: int | None):
    """Labels as a vector of class indices.

    Args:
        labels: (B,) or (B, 1), as `keras.datasets.cifar10` has them; integers, or floats without a
            fraction.
        num_classes: K; None if it is not known.

    Returns:
        (B,) int64. Inside a trace, where values cannot be seen, -1 for a label with a fraction.

    Raises:
        ValueError: if the shape is another one (one-hot labels), or a label is not in 0 ... K-1.
    """
    values = _values(labels)
    shape = tuple(labels.shape if values is None else values.shape)
    if len(shape) != 1 and not (len(shape) == 2 and shape[1] in (1, None)):
        advice = "pass the argmax of one-hot labels" if shape else "put the data set in batches"
        raise ValueError(
            f"labels must be class indices of shape (B,) or (B, 1); got shape {shape}: {advice}."
        )
    if values is not None:
        labels = _checked(values.reshape(-1), num_classes)
    labels = ops.reshape(labels, (-1,)) if len(shape) == 2 else ops.convert_to_tensor(labels)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if dtype == "string":
        raise ValueError(f"{label_error(num_classes)} a string.")
    if keras.backend.is_float_dtype(dtype):
        labels = ops.where(labels == ops.floor(labels), labels, -1.0)
    return labels if dtype == "int64" else ops.cast(labels, "int64")


def label_error(num_classes: int | None) -> str:
    """The beginning of what is said of a label that is no class; the label comes after it."""
    last = "K-1" if num_classes is None else num_classes - 1
    return (
        f"labels must be whole numbers from 0 to {last}, for {num_classes or 'K'} logits; the "
        f"first other one is"
    )


def _values(labels) -> np.ndarray | None:
    """The labels as an array; None for a tensor inside a trace."""
    try:
        values = np.asarray(labels)
    except (TypeError, ValueError, NotImplementedError):
        return None
    return values.astype(np.int64) if values.dtype == bool else values


def _checked(values: np.ndarray, num_classes: int | None) -> np.ndarray:
    """The (B,) labels themselves, if all of them are classes."""
    is_number = values.dtype.kind in "iuf"
    is_class = np.zeros(len(values), bool)
    if is_number:
        is_class = np.equal(values, np.floor(values)) & (values >= 0)
        is_class &= num_classes is None or values < num_classes
    if not is_class.all():
        first = int(np.argmin(is_class))
        shown = values[first] if is_number else repr(str(values[first]))
        raise ValueError(f"{label_error(num_classes)} {shown}, at place {first}.")
    return values


def collapse_threshold(
    batch_size: int,
    num_classes: int,
    *,
    reg: str = "squeeze",
    smoothing: float = 0.0,
    reduction: str = "mean",
) -> float:
    """The beta from which on all-zero logits minimise the objective over free logits.

    There the gradient of the cross-entropy at Z = 0 is no longer than the penalty's slope, so
    training has nothing to gain from telling classes apart.

    Args:
        batch_size: b, at least 1.
        num_classes: K, at least 2.
        reg: a value of `REGULARIZERS`.
        smoothing: lambda of Eq. 8, which shortens the gradient of the cross-entropy.
        reduction: "sum" multiplies the threshold by the batch size.

    Returns:
        sqrt((1 - 1/K) b) for squeeze and similarity, sqrt(1 - 1/K) for squeeze_example, times
        (1 - smoothing); infinity for an objective that never collapses. 10.733 for K = 10,
        b = 128.

    Raises:
        ValueError: if `reg` or `reduction` is unknown, or a size is too small.

    Source:
        Derived from Shafahi et al., Eqs. 2, 5, 7 and 8; the paper does not give it.
    """
    _check_choice("reg", reg, REGULARIZERS)
    _check_choice("reduction", reduction, REDUCTIONS)
    if batch_size < 1 or num_classes < 2:
        raise ValueError(
            f"collapse_threshold needs batch_size >= 1 and num_classes >= 2; "
            f"got {batch_size} and {num_classes}."
        )
    spread = (1.0 - smoothing) * math.sqrt(1.0 - 1.0 / num_classes)
    scale = batch_size if reduction == "sum" else 1.0
    if reg in ("squeeze", "similarity"):
        return scale * spread * math.sqrt(batch_size)
    if reg == "squeeze_example":
        return scale * spread
    return math.inf


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective: (logits, labels) -> LossTerms.

    Scale:
        With reduction "mean" the total is mean cross-entropy + beta * penalty. With "sum" (the
        MNIST challenge's own training) it is *summed* cross-entropy + beta * penalty, so the
        same beta weighs 1/b as much.
    """

    reg: str = "none"
    """One of `REGULARIZERS`."""
    beta: float = 0.0
    """Weight of the penalty, at least 0."""
    gamma: float = 0.0
    """Value that logit similarity pulls towards; 1 in the paper. Only with reg "similarity"."""
    smoothing: float = 0.0
    """Lambda of Eq. 8, in [0, 1); combines with any reg."""
    omega: float = 0.0
    """Floor of the cross-entropy in Eq. 6, above 0. Only with reg "clip_xent" or
    "clip_xent_batch"."""
    reduction: str = "mean"
    """"mean", or "sum" for the MNIST challenge's own training."""

    def __post_init__(self):
        _check_choice("reg", self.reg, REGULARIZERS)
        _check_choice("reduction", self.reduction, REDUCTIONS)
        for name in ("beta", "gamma", "smoothing", "omega"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number; got {getattr(self, name)}.")
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0; got {self.beta:g}.")
        if self.beta > 0 and self.reg not in _WITH_BETA:
            raise ValueError(
                f"beta weighs the penalty of {', '.join(_WITH_BETA)}; reg {self.reg!r} has none: "
                f"leave beta at 0 (got {self.beta:g}) or choose one of these."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {self.smoothing:g}.")
        if (self.gamma != 0) != (self.reg == "similarity"):
            raise ValueError(
                f"gamma must be non-zero with reg 'similarity' (1 in the paper) and 0 otherwise; "
                f"got gamma {self.gamma:g} with reg {self.reg!r}."
            )
        if (self.omega > 0) != (self.reg in _CLIPPING) or self.omega < 0:
            raise ValueError(
                f"omega must be above 0 with reg 'clip_xent' or 'clip_xent_batch' (1.5 in the "
                f"paper) and 0 otherwise; got omega {self.omega:g} with reg {self.reg!r}."
            )

    def __call__(self, logits, labels) -> LossTerms:
        """Evaluate the objective on a batch.

        Args:
            logits: (B, K) float of any precision; computed in float32 at least.
            labels: (B,) or (B, 1) class indices; see `class_indices`.

        Returns:
            `LossTerms` of () tensors, differentiable with finite gradients everywhere. Inside a
            trace a label that is no class makes them NaN.

        Raises:
            ValueError: see `class_indices`.

        Source:
            Shafahi et al.: Eq. 2 squeeze_example, Eq. 5 squeeze, Eq. 6 clip_xent (each example's
            cross-entropy is clipped) and clip_xent_batch (the batch's mean is), Eq. 7 similarity,
            Eq. 8 smoothing. pairing: Kannan et al. 2018.
        """
        logits = _at_least_float32(logits)
        labels = class_indices(labels, logits.shape[-1])
        num_logits, num_labels = logits.shape[0], labels.shape[0]
        if None not in (num_logits, num_labels) and num_logits != num_labels:
            raise ValueError(
                f"labels must be one an image; got {num_labels} for {num_logits} images."
            )
        hard = _cross_entropy(logits, smooth_labels(labels, logits.shape[-1], 0.0))
        if self.smoothing:
            xent = _cross_entropy(logits, smooth_labels(labels, logits.shape[-1], self.smoothing))
        else:
            xent = hard
        # Each objective has one line here; a new one adds its penalty above.
        penalty = ops.zeros((), dtype=logits.dtype)
        if self.reg == "squeeze":
            penalty = batch_logit_norm(logits)
        elif self.reg == "squeeze_example":
            penalty = example_logit_norm(logits)
        elif self.reg == "similarity":
            penalty = batch_logit_norm(logits, self.gamma)
        elif self.reg == "pairing":
            penalty = paired_logit_distance(logits)
        elif self.reg == "clip_xent":
            xent = ops.maximum(xent, self.omega)
        mean_xent = ops.mean(xent)
        if self.reg == "clip_xent_batch":
            mean_xent = ops.maximum(mean_xent, self.omega)
        if self.reduction == "sum":
            mean_xent = mean_xent * ops.cast(ops.shape(logits)[0], logits.dtype)
        return LossTerms(mean_xent + self.beta * penalty, ops.mean(hard), penalty)


def _cross_entropy(logits, targets):
    """(B,) cross-entropy against (B, K) target probabilities."""
    targets = ops.cast(targets, logits.dtype)
    return -ops.sum(targets * ops.log_softmax(logits, axis=-1), axis=-1)


def _l2_norm(x, axis):
    """l2 norm whose gradient at 0 is 0: that of `tf.norm` is NaN (tensorflow#12071)."""
    squared = ops.sum(ops.square(x), axis=axis)
    positive = squared > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, squared, 1.0)), 0.0)


def _at_least_float32(x):
    """Half precision would lose the penalty's small gradients; float64 is kept."""
    x = ops.convert_to_tensor(x)
    is_wide = keras.backend.standardize_dtype(x.dtype) in ("float32", "float64")
    return x if is_wide else ops.cast(x, "float32")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
