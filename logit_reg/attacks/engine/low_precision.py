"""A network in bfloat16, which attacks follow, while float32 decides who is fooled."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.forward import LogitsFn, call_logits, clean_logits
from logit_reg.attacks.engine.inference_copy import UNCOPIED, copied_layer, is_plain
from logit_reg.attacks.engine.losses import margin

ATTACK_DTYPES = ("auto", "float32", "bfloat16")
"""What attacks may compute directions in; "auto" is bfloat16 where it pays and agrees."""

NO_BFLOAT16 = "this processor has no bfloat16"
"""Why "auto" is float32 on most machines."""

# Of x86 processors: without them TensorFlow's bfloat16 is an order of magnitude slower.
_PROCESSOR_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
# float32 checks again below this multiple of the largest difference seen between the precisions.
_TOLERANCE = 4.0
# The precisions agree if the tolerance is at most this share of a typical margin ...
_LARGEST_TOLERANCE = 0.5
# ... and at most this share of the predictions differs.
_MOST_DIFFERENT = 0.01


class PrecisionError(ValueError):
    """A network whose lower precision cannot stand in for it; says why."""


class LowPrecision:
    """A copy of a network in bfloat16: a `gradient_logits_fn` that attacks know.

    Attacks follow its logits; what they call fooled, or nearly so, is checked again by the
    network itself, see `judged_logits`. A copy sees no later change of the weights.
    """

    def __init__(self, network: keras.Model, images):
        """Copy a network and measure how far its logits move.

        Args:
            network: a functional Keras model of Keras' own layers, images -> logits, in float32.
            images: (N, H, W, C) float, pixel units: a batch of what will be attacked.

        Raises:
            PrecisionError: if the network cannot be copied, or the copy says something else.
        """
        self._network = bfloat16_copy(network)
        self.tolerance = _measured_tolerance(network, self._network, np.asarray(images))
        """Margin, in logits, below which the copy is not believed."""

    def __repr__(self):
        return "LowPrecision('bfloat16')"

    def __call__(self, images):
        """Logits in float32 at least: (N, H, W, C) -> (N, K)."""
        return call_logits(self._network, images)


def has_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether the processor multiplies bfloat16 itself.

    Args:
        cpuinfo: content of /proc/cpuinfo; this machine's if None.

    Returns:
        True on x86 processors with AVX512-BF16 or AMX; GPUs are not asked.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        if platform.system() != "Linux" or not path.is_file():
            return False
        cpuinfo = path.read_text()
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    return bool(flags & _PROCESSOR_FLAGS)


def lower_precision(
    attack_dtype: str,
    network: Any,
    images,
    *,
    is_fast: Callable[[], bool] = has_bfloat16,
) -> tuple[LowPrecision | None, str]:
    """What attacks take directions from.

    Args:
        attack_dtype: one of `ATTACK_DTYPES`.
        network: images -> logits.
        images: (N, H, W, C) float, pixel units: a batch of what will be attacked.
        is_fast: tells whether "auto" should try bfloat16 on this machine.

    Returns:
        A `gradient_logits_fn`, or None for the network itself; and why it is not bfloat16, or "".

    Raises:
        PrecisionError: if "bfloat16" is asked for and cannot be had.
        ValueError: if there is no such `attack_dtype`.
    """
    if attack_dtype not in ATTACK_DTYPES:
        raise ValueError(
            f"attack_dtype must be one of {', '.join(ATTACK_DTYPES)}; got {attack_dtype!r}."
        )
    if attack_dtype == "float32":
        return None, ""
    if attack_dtype == "auto" and not is_fast():
        return None, NO_BFLOAT16
    try:
        return LowPrecision(network, images), ""
    except PrecisionError as error:
        if attack_dtype == "bfloat16":
            raise
        return None, str(error)


def bfloat16_copy(network: keras.Model, *, for_training: bool = False) -> keras.Model:
    """The same network, computing in bfloat16 from its first to its last but one weighted layer.

    What comes before (the standardisation of images, say) and the layer of the logits stay in
    float32, and so does normalisation inside: small differences count there.

    Args:
        network: a functional Keras model of Keras' own layers.
        for_training: keep all weights in float32, which small updates would not move otherwise.

    Returns:
        A network of its own, with copies of the weights.

    Raises:
        PrecisionError: if it is no such model, or has fewer than two weighted layers.
    """
    if not is_plain(network):
        raise PrecisionError("the network is no plain functional model of Keras' layers")
    layers = network.layers
    weighted = [place for place, layer in enumerate(layers) if layer.weights]
    if len(weighted) < 2:
        raise PrecisionError("the network has fewer than two layers with weights")
    first, last = weighted[0], weighted[-1]
    lower = {layer.name for layer in layers[first:last]}

    def clone(layer):
        config = layer.get_config()
        if layer.name in lower:
            is_wide = for_training or isinstance(layer, keras.layers.BatchNormalization)
            config["dtype"] = "mixed_bfloat16" if is_wide else "bfloat16"
        # A network that is trained is exported, and has to be Keras' own.
        return type(layer).from_config(config) if for_training else copied_layer(layer, config)

    try:
        copy = keras.models.clone_model(network, clone_function=clone)
        copy.set_weights(network.get_weights())
    except UNCOPIED as error:
        raise PrecisionError(f"Keras cannot copy the network in bfloat16: {error}") from None
    return copy


def followed_dtype(gradient_logits_fn: LowPrecision | None) -> str:
    """What attacks that take such directions compute them in: "bfloat16" or "float32"."""
    return "float32" if gradient_logits_fn is None else "bfloat16"


def is_screened(gradient_logits_fn: LogitsFn) -> bool:
    """Whether only doubtful iterates are checked again, not all of them."""
    return isinstance(gradient_logits_fn, LowPrecision)


def num_forwards(logits_fn: LogitsFn, gradient_logits_fn: LogitsFn) -> int:
    """Forward passes of one iterate: two if another function than the one followed judges it.

    Rechecks of doubtful iterates come on top; `judged_logits` counts them.
    """
    is_same = gradient_logits_fn is logits_fn
    return 1 if is_same or is_screened(gradient_logits_fn) else 2


def query_fn(logits_fn: LogitsFn, gradient_logits_fn: LogitsFn) -> LogitsFn:
    """Where attacks without gradients send their queries: a lower precision or the network."""
    return gradient_logits_fn if is_screened(gradient_logits_fn) else logits_fn


def exact_gradient_fn(logits_fn: LogitsFn, gradient_logits_fn: LogitsFn) -> LogitsFn:
    """What attacks follow that stay on the boundary itself, where a lower precision is lost.

    FAB in bfloat16 missed a tenth of the images that it finds in float32.
    """
    return logits_fn if is_screened(gradient_logits_fn) else gradient_logits_fn


def judged_logits(logits_fn: LogitsFn, gradient_logits_fn: LogitsFn, points, logits, labels, done):
    """The logits that decide, from those that an attack follows. Inside a trace.

    Args:
        logits_fn: the network that decides.
        gradient_logits_fn: the one that gave `logits`: the same, a `LowPrecision` copy, of which
            only doubtful rows are checked again, or another function, of which all are.
        points: (N, H, W, C) float, pixel units.
        logits: (N, K) float of `gradient_logits_fn` at the points.
        labels: (N,) int.
        done: (N,) bool rows that need no decision any more.

    Returns:
        (N, K) float: a row whose margin is at most the copy's tolerance, unless it is done, is
        the network's own; and () int32, how many rows were checked again.
    """
    if gradient_logits_fn is logits_fn:
        return logits, 0
    if not isinstance(gradient_logits_fn, LowPrecision):
        return call_logits(logits_fn, points), 0
    is_clear = margin(logits, labels) > gradient_logits_fn.tolerance
    rows = tf.where(tf.logical_not(tf.logical_or(is_clear, done)))

    def recheck():
        exact = call_logits(logits_fn, tf.gather_nd(points, rows))
        return tf.tensor_scatter_nd_update(logits, rows, tf.cast(exact, logits.dtype))

    return tf.cond(tf.size(rows) > 0, recheck, lambda: logits), tf.shape(rows)[0]


def _measured_tolerance(network, copy, images):
    """How far the margins of two networks are apart, with room to spare."""
    noise = np.random.default_rng(0).uniform(images.min(), images.max(), images.shape)
    samples = np.concatenate([images, (images + noise) / 2]).astype(np.float32)
    # Compiled: in an eager call Keras keeps what every layer gives until the end.
    logits, low = (clean_logits(model, samples) for model in (network, copy))
    labels = logits.argmax(axis=1)
    margins, low_margins = (np.asarray(margin(found, labels)) for found in (logits, low))
    typical = float(np.median(margins))
    largest = float(np.abs(low_margins - margins).max())
    tolerance = _TOLERANCE * largest
    different = float((low.argmax(axis=1) != labels).mean())
    # Written so that a NaN disagrees.
    if not (tolerance <= _LARGEST_TOLERANCE * typical and different <= _MOST_DIFFERENT):
        raise PrecisionError(
            f"bfloat16 moves this network's margins by up to {largest:.2g}, of typically "
            f"{typical:.2g}, and {100 * different:.1f} % of its predictions"
        )
    return tolerance
