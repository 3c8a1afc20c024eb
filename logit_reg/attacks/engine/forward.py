"""Forward passes: any callable to logits, compiled once for batches of any size."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.losses import is_finite, is_fooled

LogitsFn = Callable[[Any], Any]
"""Images (N, H, W, C) in pixel units -> logits (N, K)."""

# Images whose logits tell whether a function is still the one that was traced.
_NUM_COMPARED = 4


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

    A functional model whose own random layers were called with `training=True` stays random.
    """
    if not callable(logits_fn):
        raise ValueError(
            f"logits_fn must be a function from images to logits; got {type(logits_fn).__name__}: "
            f"of a SavedModel give its serve, or signatures['serving_default']; of a file what "
            f"logit_reg.load_model makes of it."
        )
    if _is_torch(logits_fn):
        raise ValueError(
            f"logits_fn must be written in TensorFlow; {type(logits_fn).__name__} is a PyTorch "
            "module: pass logit_reg.adapters.from_torch(module)."
        )
    options = {"training": False} if isinstance(logits_fn, keras.Model) else {}
    if options and _keeps_random_layers(logits_fn):
        # The value for the whole model would win over that of its layers.
        options = {}
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


def _is_torch(logits_fn):
    return any(kind.__module__.startswith("torch.") for kind in type(logits_fn).__mro__)


def _keeps_random_layers(network):
    """Whether a functional model was built with random layers, as Dropout, always in training."""
    if not hasattr(network, "operations") or not network.built:
        return False
    # Not by `get_config`, which layers of somebody's own may not have.
    return any(
        node.arguments.kwargs.get("training") is True and _is_random(layer)
        for layer in network.operations
        for node in getattr(layer, "_inbound_nodes", ())
    )


def _is_random(layer):
    parts = getattr(layer, "layers", ())
    return hasattr(layer, "seed_generator") or any(map(_is_random, parts))


def _is_about_symbols(error):
    is_graph_error = isinstance(error, tf.errors.OperatorNotAllowedInGraphError)
    return is_graph_error or "symbolic" in str(error).lower()


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


def clean_logits(logits_fn: LogitsFn, images, *, trace: int = 0) -> np.ndarray:
    """Logits of a batch, compiled like an attack: (N, H, W, C) -> (N, K) float.

    Args:
        logits_fn: images -> logits.
        images: (N, H, W, C) float, pixel units.
        trace: another number takes another trace of the same function.

    Raises:
        ValueError: if there is not one row of logits an image.
    """
    logits = _compiled_forward(logits_fn, images, trace)(images).numpy()
    if len(logits) != len(images):
        raise ValueError(
            f"logits_fn must return a row of logits for each image; it returns {len(logits)} for "
            f"{len(images)} images."
        )
    return logits


def count_classes(logits_fn: LogitsFn, images) -> int:
    """K of a network, from its trace; from one image where that does not say."""
    traced = _compiled_forward(logits_fn, images).get_concrete_function()
    return traced.structured_outputs.shape[1] or clean_logits(logits_fn, images[:1]).shape[1]


def forget_if_changed(logits_fn: LogitsFn, images) -> None:
    """Drop all traces if a function computes something else than when it was traced.

    A trace follows the values of variables, but no layer whose activation is replaced or that is
    quantised, and no number or array of a Python object.

    Args:
        logits_fn: images -> logits.
        images: (N, H, W, C) float, pixel units.
    """
    traced = _compiled_forward(logits_fn, images)
    if not traced.experimental_get_tracing_count():
        return
    sample = images[:_NUM_COMPARED]
    now = tf.function(
        functools.partial(_Forward()._logits, logits_fn),
        input_signature=traced.input_signature,
        autograph=False,
    )
    if not np.array_equal(traced(sample), now(sample), equal_nan=True):
        forget_traces()


def forward_graph(logits_fn: LogitsFn, images) -> tf.Graph:
    """The graph of `clean_logits`, for images (N, H, W, C) of the same shape."""
    return _compiled_forward(logits_fn, images).get_concrete_function().graph


def _compiled_forward(logits_fn, images, trace=0):
    signature = (batch_spec(images.shape[1:]),)
    return compiled(_Forward(trace), "_logits", (logits_fn,), signature)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """One pass."""

    trace: int = 0

    def _logits(self, logits_fn, images):
        return call_logits(logits_fn, images)
