"""What training minimises: the paper's penalties, label smoothing and the pair terms of guided
adversarial training, as functions of tensors.

Written with `keras.ops` only, to match the paper's equations rather than to share code. A loss
takes tensors, never a model.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from logit_reg.regularizers import CENTRES, MATRIX_NORMS, REGULARIZERS, taking, wants_clean_logits

REDUCTIONS = ("mean", "sum")


class LossTerms(NamedTuple):
    """What an `Objective` returns for a batch, each a () tensor."""

    total: Any
    """What is minimised."""
    cross_entropy: Any
    """Plain mean cross-entropy on the hard labels, whatever is minimised."""
    penalty: Any
    """The penalty before beta; 0 where the objective has none."""


def batch_matrix_norm(logits, centre=0.0, norm: str = "frobenius"):
    """A matrix norm of the batch's logits around a centre, divided by the batch size.

    The family that the paper opens: its own penalty is the Frobenius norm around a number, NuAT's
    the nuclear norm around the clean logits.

    Args:
        logits: (B, K) float, before softmax.
        centre: a number, or (B, K) logits, in logit units.
        norm: "frobenius" or "nuclear", the sum of the singular values.

    Returns:
        () float, at least 0, with first derivatives only where the norm is nuclear. The gradient is
        0 at logits == centre, and at lost rank that subgradient which leaves lost directions alone.

    Raises:
        ValueError: if the norm is unknown.

    Scale:
        Frobenius <= nuclear <= sqrt(K) Frobenius. Both are about 1/sqrt(B) of
        `example_logit_norm`, so that beta does not carry over between batch sizes.

    Source:
        Frobenius: Shafahi et al., Eqs. 5 and 7. Nuclear: Sriramanan et al., NeurIPS 2021 (NuAT).
    """
    _check_choice("matrix_norm", norm, MATRIX_NORMS)
    logits = _at_least_float32(logits)
    difference = logits - ops.cast(centre, logits.dtype)
    length = _l2_norm(difference, axis=None) if norm == "frobenius" else _nuclear_norm(difference)
    return length / ops.cast(ops.shape(logits)[0], logits.dtype)


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
    return batch_matrix_norm(logits, gamma)


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


def probability_distances(logits, clean_logits):
    """||p~ - p||_2^2 of each image, the term of guided adversarial training (GAT), which minimises
    its mean.

    Args:
        logits: (B, K) float, of the images that are trained on.
        clean_logits: (B, K) float, of the same images before the attack.

    Returns:
        (B,) float in [0, 2].

    Source:
        Sriramanan et al., NeurIPS 2020.
    """
    difference = ops.softmax(logits, axis=-1) - ops.softmax(clean_logits, axis=-1)
    return ops.sum(ops.square(difference), axis=-1)


def kl_divergences(logits, clean_logits):
    """KL(p, p~) of each image, the term of TRADES; its mean is what training minimises.

    Args:
        logits: (B, K) float, of the images that are trained on: p~.
        clean_logits: (B, K) float, of the same images before the attack: p.

    Returns:
        (B,) float in nats, at least 0 up to rounding.

    Source:
        Zhang et al., ICML 2019, and the authors' code.
    """
    log_clean = ops.log_softmax(clean_logits, axis=-1)
    log_ratio = log_clean - ops.log_softmax(logits, axis=-1)
    return ops.sum(ops.exp(log_clean) * log_ratio, axis=-1)


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
    matrix_norm: str = "frobenius",
    centre: str = "zero",
    class_counts: Sequence[int] | None = None,
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
        matrix_norm: of squeeze and similarity, see `batch_matrix_norm`.
        centre: "clean" has no threshold: logits may move as long as both of a pair do.
        class_counts: how many images of each class the batch has, K numbers; as even as b allows if
            None. The nuclear norm alone depends on them: an uneven batch collapses later, never
            later than with the Frobenius norm.

    Returns:
        sqrt((1 - 1/K) b) for squeeze and similarity, sqrt(1 - 1/K) for squeeze_example, times
        (1 - smoothing); infinity for an objective that never collapses. 10.733 for K = 10,
        b = 128. With the nuclear norm the largest singular value of the (b, K) matrix of
        labels minus 1/K, about sqrt(b/K): 3.606 for the same.

    Raises:
        ValueError: if a name is unknown, a size is too small, or the counts are not of the batch.

    Source:
        Derived from Shafahi et al., Eqs. 2, 5, 7 and 8; the paper does not give it. The slope of a
        norm at 0 is the unit ball of its dual: Frobenius for Frobenius, the largest singular
        value for nuclear.
    """
    _check_choice("reg", reg, REGULARIZERS)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("matrix_norm", matrix_norm, MATRIX_NORMS)
    _check_choice("centre", centre, CENTRES)
    if batch_size < 1 or num_classes < 2:
        raise ValueError(
            f"collapse_threshold needs batch_size >= 1 and num_classes >= 2; "
            f"got {batch_size} and {num_classes}."
        )
    scale = (1.0 - smoothing) * (batch_size if reduction == "sum" else 1.0)
    if centre == "clean":
        return math.inf
    if reg in ("squeeze", "similarity"):
        if matrix_norm == "nuclear":
            return scale * _label_spread(batch_size, num_classes, class_counts)
        return scale * math.sqrt(1.0 - 1.0 / num_classes) * math.sqrt(batch_size)
    if reg == "squeeze_example":
        return scale * math.sqrt(1.0 - 1.0 / num_classes)
    return math.inf


def _label_spread(batch_size, num_classes, class_counts):
    """The largest singular value of the (b, K) matrix of one-hot labels minus 1/K."""
    if class_counts is None:
        counts = np.full(num_classes, batch_size // num_classes)
        counts[: batch_size % num_classes] += 1
    else:
        counts = np.asarray(class_counts)
        if counts.shape != (num_classes,) or counts.min() < 0 or counts.sum() != batch_size:
            raise ValueError(
                f"class_counts must be {num_classes} numbers, at least 0, whose sum is the batch "
                f"size {batch_size}; got {class_counts}."
            )
    centred = np.eye(num_classes) - 1.0 / num_classes
    gram = centred @ np.diag(counts) @ centred
    return math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective: (logits, labels, clean_logits) -> LossTerms.

    Scale:
        With reduction "mean" the total is mean cross-entropy + beta * penalty. With "sum" (the
        MNIST challenge's own training) it is *summed* cross-entropy + beta * penalty, so the
        same beta weighs 1/b as much. The penalties that are a norm of the whole batch ("squeeze",
        "similarity", "nuat") weigh about 1/sqrt(b), see `batch_matrix_norm`; the others do not
        depend on b.
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
    matrix_norm: str = "frobenius"
    """"frobenius" or "nuclear": the norm of reg "squeeze" and "similarity"."""
    centre: str = "zero"
    """"zero", or "clean": reg "squeeze" then is the norm around the clean logits."""

    def __post_init__(self):
        _check_choice("reg", self.reg, REGULARIZERS)
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _check_choice("matrix_norm", self.matrix_norm, MATRIX_NORMS)
        _check_choice("centre", self.centre, CENTRES)
        for name in ("beta", "gamma", "smoothing", "omega"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number; got {getattr(self, name)}.")
        settings = REGULARIZERS[self.reg]
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0; got {self.beta:g}.")
        if self.beta > 0 and "beta" not in settings:
            raise ValueError(
                f"beta weighs the penalty of {', '.join(taking('beta'))}; reg {self.reg!r} has "
                f"none: leave beta at 0 (got {self.beta:g}) or choose one of these."
            )
        for name, usual in (("matrix_norm", "frobenius"), ("centre", "zero")):
            if getattr(self, name) != usual and name not in settings:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} goes with reg {_named(name)}; got reg "
                    f"{self.reg!r}."
                )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {self.smoothing:g}.")
        if (self.gamma != 0) != ("gamma" in settings):
            raise ValueError(
                f"gamma must be non-zero with reg {_named('gamma')} (1 in the paper) and 0 "
                f"otherwise; got gamma {self.gamma:g} with reg {self.reg!r}."
            )
        if (self.omega > 0) != ("omega" in settings) or self.omega < 0:
            raise ValueError(
                f"omega must be above 0 with reg {_named('omega')} (1.5 in the paper) and 0 "
                f"otherwise; got omega {self.omega:g} with reg {self.reg!r}."
            )

    @property
    def wants_clean_logits(self) -> bool:
        """Whether it compares the logits with those of the images before the attack."""
        return wants_clean_logits(self.reg, self.centre)

    @property
    def is_flat_at_clean(self) -> bool:
        """Whether moving the logits away from the clean ones changes nothing at first."""
        return self.wants_clean_logits and self.reg != "alp"

    def __call__(self, logits, labels, clean_logits=None, *, beta_scale=1.0) -> LossTerms:
        """Evaluate the objective on a batch.

        Args:
            logits: (B, K) float of any precision; computed in float32 at least.
            labels: (B,) or (B, 1) class indices; see `class_indices`.
            clean_logits: (B, K) float, of the same images before the attack, for an objective that
                `wants_clean_logits`; the others ignore them. The cross-entropy is then that
                of the clean logits, as in the guided methods' papers; for "alp" the mean of both.
            beta_scale: () share of beta, for a schedule.

        Returns:
            `LossTerms` of () tensors, differentiable with finite gradients everywhere. Inside a
            trace a label that is no class makes them NaN.

        Raises:
            ValueError: see `class_indices`; or if clean logits are missing.

        Source:
            Shafahi et al.: Eq. 2 squeeze_example, Eq. 5 squeeze, Eq. 6 clip_xent (each example's
            cross-entropy is clipped) and clip_xent_batch (the batch's mean is), Eq. 7 similarity,
            Eq. 8 smoothing. pairing and alp: Kannan et al. 2018. nuat (what squeeze with the
            nuclear norm around the clean logits is, too), gat: Sriramanan et al. 2021 and 2020.
            trades: Zhang et al. 2019.
        """
        logits = _at_least_float32(logits)
        labels = class_indices(labels, logits.shape[-1])
        num_logits, num_labels = logits.shape[0], labels.shape[0]
        if None not in (num_logits, num_labels) and num_logits != num_labels:
            raise ValueError(
                f"labels must be one an image; got {num_labels} for {num_logits} images."
            )
        clean = logits
        if self.wants_clean_logits:
            if clean_logits is None:
                raise ValueError(
                    f"reg {self.reg!r} compares the logits with those of the clean images: pass "
                    f"clean_logits."
                )
            clean = ops.cast(clean_logits, logits.dtype)
        hard, xent = self._cross_entropies(clean, labels)
        # Each objective has one line here; a new one adds its penalty above.
        penalty = ops.zeros((), dtype=logits.dtype)
        if self.reg in ("squeeze", "similarity"):
            centre = clean if self.centre == "clean" else self.gamma
            penalty = batch_matrix_norm(logits, centre, self.matrix_norm)
        elif self.reg == "squeeze_example":
            penalty = example_logit_norm(logits)
        elif self.reg == "nuat":
            penalty = batch_matrix_norm(logits, clean, "nuclear")
        elif self.reg == "gat":
            penalty = ops.mean(probability_distances(logits, clean))
        elif self.reg == "trades":
            penalty = ops.mean(kl_divergences(logits, clean))
        elif self.reg == "alp":
            penalty = ops.mean(ops.square(logits - clean))
            pairs = zip((hard, xent), self._cross_entropies(logits, labels), strict=True)
            hard, xent = ((of_clean + of_other) / 2 for of_clean, of_other in pairs)
        elif self.reg == "pairing":
            penalty = paired_logit_distance(logits)
        elif self.reg == "clip_xent":
            xent = ops.maximum(xent, self.omega)
        mean_xent = ops.mean(xent)
        if self.reg == "clip_xent_batch":
            mean_xent = ops.maximum(mean_xent, self.omega)
        if self.reduction == "sum":
            mean_xent = mean_xent * ops.cast(ops.shape(logits)[0], logits.dtype)
        weight = self.beta * ops.cast(beta_scale, logits.dtype)
        return LossTerms(mean_xent + weight * penalty, ops.mean(hard), penalty)

    def _cross_entropies(self, logits, labels):
        """(B,) cross-entropies on hard labels, and on those that are trained on."""
        num_classes = logits.shape[-1]
        hard = _cross_entropy(logits, smooth_labels(labels, num_classes, 0.0))
        if not self.smoothing:
            return hard, hard
        return hard, _cross_entropy(logits, smooth_labels(labels, num_classes, self.smoothing))


def _cross_entropy(logits, targets):
    """(B,) cross-entropy against (B, K) target probabilities."""
    targets = ops.cast(targets, logits.dtype)
    return -ops.sum(targets * ops.log_softmax(logits, axis=-1), axis=-1)


def _l2_norm(x, axis):
    """l2 norm whose gradient at 0 is 0: that of `tf.norm` is NaN (tensorflow#12071)."""
    squared = ops.sum(ops.square(x), axis=axis)
    positive = squared > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, squared, 1.0)), 0.0)


def _nuclear_norm(matrix):
    """() sum of the singular values of a (B, K) matrix.

    Written as the inner product with its own subgradient, held constant: the derivative of a
    singular value decomposition is infinite where two singular values meet.
    """
    held = ops.stop_gradient(matrix)
    # Of something that is not finite the product below says so; the decomposition might not return.
    left, values, right = ops.svd(ops.where(ops.isfinite(held), held, 0.0), full_matrices=False)
    rounding = float(np.finfo(keras.backend.standardize_dtype(held.dtype)).eps)
    size = ops.cast(ops.shape(held)[0] + ops.shape(held)[1], held.dtype)
    is_there = values > values[0] * rounding * size
    subgradient = ops.matmul(left * ops.cast(is_there, held.dtype), right)
    return ops.sum(ops.stop_gradient(subgradient) * matrix)


def _at_least_float32(x):
    """Half precision would lose the penalty's small gradients; float64 is kept."""
    x = ops.convert_to_tensor(x)
    is_wide = keras.backend.standardize_dtype(x.dtype) in ("float32", "float64")
    return x if is_wide else ops.cast(x, "float32")


def _named(setting):
    """The regularisers that take a setting, as an error names them."""
    return " or ".join(repr(reg) for reg in taking(setting))


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
