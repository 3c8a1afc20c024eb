"""What all attacks share: the protocol, the result, losses, random numbers and compilation."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import keras
import numpy as np
import tensorflow as tf

from logit_reg.threat import ThreatModel

if TYPE_CHECKING:
    from logit_reg.attacks.engine.checks import Finding

LogitsFn = Callable[[Any], Any]
"""Images (N, H, W, C) in pixel units -> logits (N, K)."""

LOSSES = ("xent", "cw")
"""Losses for any number of classes; "dlr" needs at least 3."""

ROUNDING = 1e-6
"""Share of the pixel range's larger end by which images may leave the range."""

# Keeps 0 / 0 out of DLR, as published.
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack found for N images."""

    adversarial: np.ndarray
    """(N, H, W, C) float32 pixel units: the first iterate that fools, else the last one."""
    fooled: np.ndarray
    """(N,) bool: misclassified at any iterate, decided in float32; a tie counts as fooled."""
    last_iterate_fooled: np.ndarray
    """(N,) bool: misclassified at the last iterate that the attack made, which is all that the
    challenges' own code looks at."""
    forwards: int
    """Images sent forward through the network, padding not counted; a doubtful image that a
    lower precision saw and the network itself sees again counts twice."""
    backwards: int
    """Images whose gradient was computed, padding not counted."""
    stages: tuple = ()
    """Of an attack that is a cascade: (name, (N,) bool still standing after it), in order."""


class Attack(Protocol):
    """A frozen dataclass of settings that can attack any `logits_fn`.

    An example's random numbers depend on the seed, the attack, the restart and the example's
    index in the data set only: never on the batch, its size or a shard.
    """

    @property
    def threat(self) -> ThreatModel:
        """Norm, budget and pixel range."""
        ...

    def run(
        self,
        logits_fn: LogitsFn,
        images,
        labels,
        *,
        seed: int,
        indices=None,
        restart: int = 0,
        gradient_logits_fn: LogitsFn | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units, within the threat model's bounds.
            labels: (N,) int true classes.
            seed: source of all random numbers.
            indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
            restart: number of the restart, a further source of random numbers.
            gradient_logits_fn: another version of the network (of lower precision, say) to take
                directions from; success is always decided on `logits_fn`.

        Returns:
            An `AttackResult` for the N images.
        """
        ...

    def __call__(self, logits_fn: LogitsFn, images, labels, *, seed: int):
        """Return `run(...).adversarial` as a tensor."""
        ...

    def cost(self) -> tuple[int, int]:
        """Return the most forwards and backwards that one image can take."""
        ...


class ImageAttack:
    """Lets an `Attack` be called as a function from images to adversarial images."""

    def __call__(self: Attack, logits_fn: LogitsFn, images, labels, *, seed: int) -> tf.Tensor:
        """Return `run(...).adversarial` as a tensor (N, H, W, C)."""
        return tf.convert_to_tensor(self.run(logits_fn, images, labels, seed=seed).adversarial)


@runtime_checkable
class Cascade(Protocol):
    """An attack made of attacks, each for what the ones before leave standing.

    `logit_reg.evaluation.evaluate` runs each stage on the whole data set before the next one, so
    that batches stay full and a killed evaluation goes on within a stage.
    """

    def attacks(self, num_classes: int) -> dict[str, Attack]:
        """The attacks by name, in order, for a network of so many classes."""
        ...

    def check_num_classes(self, num_classes: int) -> "list[Finding]":
        """What so few classes leave out of the cascade."""
        ...


def call_logits(logits_fn: LogitsFn, images):
    """Logits in float32 at least, a Keras model in evaluation mode, whatever surrounds the call.

    Args:
        logits_fn: a Keras model or any other callable; a dictionary or list of one output counts
            as that output.
        images: (N, H, W, C) float, pixel units.

    Returns:
        (N, K) float32 or float64.

    Raises:
        ValueError: if the result is not a matrix of at least two real logits an image, or the
            callable is not written in TensorFlow.
    """
    if not callable(logits_fn):
        raise ValueError(
            f"logits_fn must be a function from images to logits; got {type(logits_fn).__name__}: "
            f"of a SavedModel give its serve, or signatures['serving_default']; of a file what "
            f"logit_reg.load_model makes of it."
        )
    options = {"training": False} if isinstance(logits_fn, keras.Model) else {}
    try:
        logits = tf.convert_to_tensor(only_output(logits_fn(images, **options)))
    except (NotImplementedError, AttributeError, tf.errors.OperatorNotAllowedInGraphError) as error:
        # What numpy, PyTorch and plain Python raise when they are given a tensor of a graph.
        if tf.is_symbolic_tensor(images) and _is_about_symbols(error):
            raise ValueError(
                "logits_fn must be written in TensorFlow, from a tensor of images to a tensor of "
                "logits; this one wants numbers. For attacks without gradients (Square, SPSA, "
                "HopSkipJump) wrap it: lambda x: tf.numpy_function(logits_fn, [x], tf.float32)."
            ) from error
        raise
    dtype, shape = logits.dtype, logits.shape
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise ValueError(f"logits_fn must return real numbers; got {dtype.name}.")
    if shape.rank is None:
        # A `tf.numpy_function` does not know.
        logits = tf.ensure_shape(logits, (None, None))
    elif shape.rank != 2 or (shape[1] is not None and shape[1] < 2):
        raise ValueError(f"logits_fn must return (N, K) logits with K >= 2; got shape {shape}.")
    elif shape[0] == 1 and images.shape[0] is None:
        # One row would be taken for that of every image; others fail by themselves.
        raise ValueError(
            "logits_fn must return a row of logits for each image; it returns 1 for any number of "
            "images."
        )
    return logits if dtype == tf.float64 else tf.cast(logits, tf.float32)


def only_output(result):
    """The one tensor that a network returns, out of a dictionary or list of one.

    Raises:
        ValueError: if there are several, or it is not dense.
    """
    if isinstance(result, tf.RaggedTensor | tf.SparseTensor):
        raise ValueError(
            f"logits_fn must return a dense tensor (N, K) of logits; got a "
            f"{type(result).__name__}: return its to_tensor() or tf.sparse.to_dense of it."
        )
    is_dictionary = isinstance(result, Mapping)
    if is_dictionary or isinstance(result, list | tuple):
        parts = tf.nest.flatten(result)
        # A list of numbers or rows is the matrix itself.
        is_matrix = not is_dictionary and all(np.ndim(part) < 2 for part in parts)
        if len(parts) > 1 and not is_matrix:
            names, key = "", "0"
            if is_dictionary:
                names, key = f" ({', '.join(map(str, result))})", repr(next(iter(result)))
            raise ValueError(
                f"logits_fn must return logits alone; got {len(parts)} outputs{names}: pass "
                f"lambda images: network(images, training=False)[{key}], or another of them."
            )
        if parts and not is_matrix:
            (result,) = parts
    return result


def _is_about_symbols(error):
    is_graph_error = isinstance(error, tf.errors.OperatorNotAllowedInGraphError)
    return is_graph_error or "symbolic" in str(error).lower()


def is_finite(logits):
    """Where all logits of an image are finite: (N, K) -> (N,) bool."""
    return tf.reduce_all(tf.math.is_finite(logits), axis=-1)


def margin(logits, labels):
    """True logit minus the largest other logit: positive where the image is classified right.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float; -inf where any logit of the image is not finite, so that it counts as wrong.
    """
    true_logit, other = margin_terms(logits, labels)
    # Never NaN: compiled code turns `not (NaN > 0)` into `NaN <= 0`.
    return tf.where(is_finite(logits), true_logit - other, -np.inf)


def margin_terms(logits, labels):
    """True logit and largest other logit.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float each.
    """
    logits = tf.convert_to_tensor(logits)
    num_classes = logits.shape[-1] or tf.shape(logits)[-1]
    is_label = tf.one_hot(labels, num_classes, True, False, dtype=bool)
    true_logit = tf.reduce_sum(tf.where(is_label, logits, 0), axis=-1)
    # Masked, where the challenges subtract 1e4: that fails on logits of such a size.
    other = tf.reduce_max(tf.where(is_label, logits.dtype.min, logits), axis=-1)
    return true_logit, other


def is_fooled(logits, labels):
    """Where the prediction is wrong: a tie, or a logit that is not finite, counts as wrong.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) bool.
    """
    return tf.logical_not(margin(logits, labels) > 0)


def attack_loss(loss: str, logits, labels, confidence: float = 0.0):
    """A loss that attackers ascend, per example.

    Args:
        loss: "xent", "cw" for the margin of Carlini and Wagner, or "dlr" for the difference of
            logits ratio, -margin / (largest logit - third largest).
        logits: (N, K) float.
        labels: (N,) int.
        confidence: kappa of "cw": the loss is -relu(margin + kappa), so its gradient stops where
            the example is misclassified by more than kappa.

    Returns:
        (N,) float.

    Raises:
        ValueError: if there is no such loss, or none for so few classes.

    Source:
        The challenges' `pgd_attack.py` (confidence 50); Shafahi et al., Eq. 4 (confidence 0);
        "dlr": Croce and Hein 2020, arXiv:2003.01690, Eq. 6.
    """
    if loss == "xent":
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if loss == "cw":
        return -tf.nn.relu(margin(logits, labels) + confidence)
    check_loss(loss)
    num_classes = logits.shape[-1]
    if num_classes is not None and num_classes < 3:
        raise ValueError(f"dlr needs at least 3 classes; got {num_classes}: use xent or cw.")
    top = tf.math.top_k(logits, 3).values
    return -margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def check_loss(loss: str) -> None:
    """Refuse a loss that `attack_loss` does not know.

    Args:
        loss: "xent", "cw" or "dlr".

    Raises:
        ValueError: if it is another one.
    """
    if loss not in (*LOSSES, "dlr"):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}; got {loss!r} "
            "(dlr is a third, for 3 classes or more)."
        )


def example_noise(distribution: str, shape, *, stream, indices, restart):
    """Random numbers that belong to each example, whichever batch it is in.

    Args:
        distribution: "uniform" on [-1, 1), "unit" for uniform on [0, 1), or "normal".
        shape: shape of one example's numbers.
        stream: () int64 from `random_stream`.
        indices: (N,) int64 places of the examples in their data set.
        restart: () int64 number of the restart.

    Returns:
        (N, *shape) float32.
    """

    def draw(index):
        seed = tf.random.experimental.stateless_fold_in(tf.stack([stream, index]), restart)
        if distribution == "normal":
            return tf.random.stateless_normal(shape, seed)
        lower = -1.0 if distribution == "uniform" else 0.0
        return tf.random.stateless_uniform(shape, seed, lower, 1.0)

    signature = tf.TensorSpec(shape, tf.float32)
    # Outside of a graph TensorFlow warns that it cannot.
    at_once = 1 if tf.executing_eagerly() else 2
    return tf.map_fn(draw, indices, fn_output_signature=signature, parallel_iterations=at_once)


def random_stream(seed: int, *names: str) -> int:
    """A 63-bit number for a seed and the names of those who draw from it."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform_in_ball(threat: ThreatModel, images, *, stream, indices, restart, scale=1.0):
    """A point drawn uniformly from each image's ball, clipped to the pixel range.

    Args:
        threat: norm, budget and pixel range.
        images: (N, H, W, C) float32, pixel units.
        stream: () int64 from `random_stream`; the stream after it is used, too.
        indices: (N,) int64 places of the images in their data set.
        restart: () int64 number of the restart.
        scale: () or (N, 1, 1, 1) fraction of epsilon.

    Returns:
        (N, H, W, C) float32.
    """
    shape, draw = images.shape[1:], {"indices": indices, "restart": restart}
    if threat.norm == "linf":
        noise = example_noise("uniform", shape, stream=stream, **draw)
        return threat.random_start(images, noise, 1.0, scale)
    noise = example_noise("normal", shape, stream=stream, **draw)
    # A stream of its own: the same one would tie the radius to the first pixels.
    radius = example_noise("unit", (1, 1, 1), stream=stream + 1, **draw)
    return threat.random_start(images, noise, radius, scale)


def random_direction(threat: ThreatModel, images, *, stream, indices, restart):
    """Noise of length 1 in the threat model's norm, from which AutoAttack's attacks start.

    Args:
        threat: decides the norm.
        images: (N, H, W, C) float32.
        stream: () int64 from `random_stream`.
        indices: (N,) int64 places of the images in their data set.
        restart: () int64 number of the restart.

    Returns:
        (N, H, W, C) float32: in linf uniform noise over its largest entry, in l2 normal noise over
        its norm.
    """
    distribution = "uniform" if threat.norm == "linf" else "normal"
    draw = {"stream": stream, "indices": indices, "restart": restart}
    noise = example_noise(distribution, images.shape[1:], **draw)
    if threat.norm == "l2":
        return threat.ascent_direction(noise)
    largest = tf.reduce_max(tf.abs(noise), axis=(1, 2, 3), keepdims=True)
    return tf.math.divide_no_nan(noise, largest)


def compiled(attack: Any, method: str, functions: tuple, signature: tuple):
    """The traced form of `attack.method(*functions, *tensors)`: one trace for any batch size.

    The attack's settings and the functions are baked in, and the trace is kept for as long as
    the same ones come back, or until `forget_traces`.

    Args:
        attack: a frozen dataclass.
        method: name of the method to trace.
        functions: its leading arguments that are not tensors (`logits_fn`, ...).
        signature: `tf.TensorSpec` of each tensor, the first axis of batches left free.

    Returns:
        A `tf.function` of the tensors; its `experimental_get_tracing_count()` stays 1.
    """
    return _compiled(attack, method, tuple(map(_Key, functions)), signature)


def forget_traces() -> None:
    """Trace every function anew when it comes next."""
    _compiled.cache_clear()


@functools.lru_cache(maxsize=64)
def _compiled(attack, method, keys, signature):
    bound = functools.partial(getattr(attack, method), *(key.function for key in keys))
    return tf.function(bound, input_signature=signature, autograph=False)


class _Key:
    """A function as a key: by its identity where it has no hash, as objects of a dataclass."""

    def __init__(self, function):
        self.function = function
        try:
            self._hash = hash(function)
            self._has_hash = True
        except TypeError:
            self._hash = id(function)
            self._has_hash = False

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        if self.function is other.function:
            return True
        return self._has_hash and other._has_hash and self.function == other.function


def isolated(function):
    """A function of tensors that stays a graph of its own inside a trace.

    oneDNN's gradient of max-pooling is only taken where the optimiser meets the pooling before
    its gradient, and a loop around both can turn that order round; it costs PGD a tenth. Outside
    of a trace it is the function itself.
    """
    if tf.executing_eagerly():
        return function
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def batch_spec(shape, dtype=tf.float32) -> tf.TensorSpec:
    """The `tf.TensorSpec` of a batch of any size of items of this shape."""
    return tf.TensorSpec((None, *shape), dtype)


class Judgement(NamedTuple):
    """What one forward pass says of N images."""

    prediction: np.ndarray
    """(N,) int64 classes; -1, which is none, where a logit is not finite."""
    fooled: np.ndarray
    """(N,) bool: where attacks count it as misclassified; differs from the prediction on ties."""

    @property
    def not_finite(self) -> np.ndarray:
        """(N,) bool: where a logit is not finite."""
        return self.prediction < 0


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Plain predictions, compiled like an attack so that a network is traced for images once."""

    def predict(self, logits_fn: LogitsFn, images) -> np.ndarray:
        """Classes of a batch: (N, H, W, C) float, pixel units -> (N,) int64, as `Judgement`."""
        signature = (batch_spec(images.shape[1:]),)
        return compiled(self, "_predict", (logits_fn,), signature)(images).numpy()

    def judge(self, logits_fn: LogitsFn, images, labels) -> Judgement:
        """Judge a batch: (N, H, W, C) float in pixel units, (N,) int64."""
        signature = (batch_spec(images.shape[1:]), batch_spec((), tf.int64))
        judged = compiled(self, "_judge", (logits_fn,), signature)(images, labels)
        return Judgement(*(tensor.numpy() for tensor in judged))

    def _predict(self, logits_fn, images):
        return _classes(call_logits(logits_fn, images))

    def _judge(self, logits_fn, images, labels):
        logits = call_logits(logits_fn, images)
        return _classes(logits), is_fooled(logits, labels)


def _classes(logits):
    return tf.where(is_finite(logits), tf.argmax(logits, axis=-1), -1)


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
