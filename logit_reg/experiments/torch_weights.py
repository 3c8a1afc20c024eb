"""A network's weights for PyTorch: named and shaped as its layers have them, in safetensors."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.forward import clean_logits
from logit_reg.attacks.engine.inference_copy import is_plain
from logit_reg.evaluation.run import network_hash
from logit_reg.experiments.sources import Model
from logit_reg.files import atomic_path
from logit_reg.messages import UsageError, notice
from madry_compat.challenges import IMAGE_SETS

FILE = "weights.safetensors"

# Random images that the two networks are compared on.
_NUM_COMPARED = 8
# Largest difference of logits, relative to the largest logit or 1.
_TOLERANCE = 1e-5
_INSTALL = "pip install 'logit-reg[torch]'"


def export_torch(model: Model, output_dir: Path) -> None:
    """Write a network's weights as `weights.safetensors`, and compare its logits in PyTorch.

    Args:
        model: a run, a network from a `.keras` file, or a challenge's checkpoint.
        output_dir: folder to write; a file of another network there is refused.

    Raises:
        UsageError: if a layer has no counterpart in PyTorch, or safetensors is not installed.
        ValueError: if PyTorch's logits are others.
    """
    try:
        from safetensors import safe_open
        from safetensors.numpy import save
    except ModuleNotFoundError:
        raise UsageError(f"--to=safetensors needs the package safetensors: {_INSTALL}.") from None
    network, path = model.network, output_dir / FILE
    digest = network_hash(network)
    if path.exists():
        with safe_open(path, "numpy") as file:
            held = (file.metadata() or {}).get("network_sha256")
        if held != digest:
            raise UsageError(f"{path} holds another network; choose another --output_dir.")
    tensors = torch_tensors(network)
    # One entry: several come in another order each time.
    content = save(tensors, {"network_sha256": digest})
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    print(f"weights: {path}, {len(tensors)} tensors for images (N, C, H, W)")
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        notice(f"parity: not checked, PyTorch is not installed ({_INSTALL})")
        return
    shape = tuple(network.input_shape[1:])
    # The pixel range of the challenge whose images these are, else [0, 1].
    known = [record.challenge for record in IMAGE_SETS.values()]
    highest = next((one.upper for one in known if one.image_shape == shape), 1.0)
    images = np.random.default_rng(0).uniform(0, highest, (_NUM_COMPARED, *shape))
    images = images.astype(np.float32)
    found, expected = torch_logits(network, load_file(path), images), clean_logits(network, images)
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    told = f"PyTorch's logits of {_NUM_COMPARED} random images differ by at most {difference:.1e}"
    # Written so that a NaN disagrees.
    if not difference <= _TOLERANCE * max(largest, 1.0):
        raise ValueError(f"parity: {told}, of logits up to {largest:.3g}: do not use {path}.")
    print(f"parity: {told}, of logits up to {largest:.3g}")


def torch_tensors(network: keras.Model) -> dict[str, np.ndarray]:
    """Weights by the names of PyTorch's layers.

    Args:
        network: a plain model of Keras' layers, images (N, H, W, C) -> logits.

    Returns:
        For each layer LAYER.weight and LAYER.bias, of normalisation LAYER.running_mean and
        LAYER.running_var, too. Convolutions are (out, in, H, W), dense layers (out, in); what
        follows a flattening counts channels first, as PyTorch's Flatten does.

    Raises:
        UsageError: if a layer with weights has no counterpart, or the network is no plain model.
    """
    tensors: dict[str, np.ndarray] = {}
    orders = _flat_orders(network)
    for operation in _operations(network):
        if not getattr(operation, "weights", ()):
            continue
        kind = type(operation).__name__
        if kind not in _LAYOUTS:
            raise UsageError(
                f"--to=safetensors: layer {operation.name} ({kind}) has no counterpart here; "
                f"known are {', '.join(_LAYOUTS)}."
            )
        for name, array in _LAYOUTS[kind](operation, orders.get(id(operation.input))).items():
            tensors[f"{operation.name}.{name}"] = np.ascontiguousarray(array, np.float32)
    return tensors


def torch_logits(network: keras.Model, tensors: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """The logits that PyTorch gives with exported weights.

    PyTorch computes layers that have weights, and the flattening, on (N, C, H, W); layers without
    weights, which the export does not touch, are Keras' own.

    Args:
        network: where the weights came from.
        tensors: PyTorch's, by the names of `torch_tensors`.
        images: (N, H, W, C) float32, pixel units.

    Returns:
        (N, K) float32.
    """
    import torch

    values = {id(network.inputs[0]): _channels_first(torch.from_numpy(images))}
    for operation in _operations(network):
        if isinstance(operation, keras.layers.InputLayer):
            continue
        kind = type(operation).__name__
        inputs = [values[id(tensor)] for tensor in tf.nest.flatten(operation.input)]
        prefix = f"{operation.name}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if own:
            value = _in_torch(operation, inputs[0], own)
        elif kind == "Flatten":
            value = inputs[0].flatten(1)
        else:
            value = _in_keras(keras.Function(operation.input, operation.output), inputs)
        values[id(operation.output)] = value
    return values[id(network.outputs[0])].numpy()


def _in_torch(layer, value, own):
    """A layer with weights, and its activation."""
    from torch.nn import functional

    weight, bias = own["weight"], own.get("bias")
    if isinstance(layer, keras.layers.Dense):
        value = functional.linear(value, weight, bias)
    elif isinstance(layer, keras.layers.BatchNormalization):
        moving = own["running_mean"], own["running_var"]
        return functional.batch_norm(value, *moving, weight, bias, eps=layer.epsilon)
    else:
        padding = [0, 0, 0, 0]
        if layer.padding == "same":
            # TensorFlow pads an odd number of rows or columns below and on the right.
            sizes = zip(
                value.shape[2:], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
            )
            total = [
                max((-(-size // step) - 1) * step + (kernel - 1) * rate + 1 - size, 0)
                for size, kernel, step, rate in sizes
            ]
            padding = [total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2)]
        value = functional.conv2d(
            functional.pad(value, padding),
            weight,
            bias,
            layer.strides,
            dilation=layer.dilation_rate,
            groups=value.shape[1] // weight.shape[1],
        )
    return _in_keras(layer.activation, [value])


def _in_keras(function, inputs):
    """A function of Keras tensors that counts channels last."""
    import torch

    arrays = [np.ascontiguousarray(_channels_last(value).numpy()) for value in inputs]
    result = function(arrays if len(arrays) > 1 else arrays[0])
    return _channels_first(torch.from_numpy(keras.ops.convert_to_numpy(result).copy()))


def _channels_first(value):
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value


def _channels_last(value):
    return value.permute(0, 2, 3, 1) if value.ndim == 4 else value


def _operations(network):
    if not is_plain(network):
        raise UsageError("--to=safetensors needs a plain functional or sequential model of Keras.")
    return network.layers if isinstance(network, keras.Sequential) else network.operations


# What keeps the values of a flattened image in their order.
_KEEPING = (
    *("Activation", "ReLU", "LeakyReLU", "ELU", "PReLU", "Dropout", "GaussianNoise"),
    *("GaussianDropout", "ActivityRegularization", "BatchNormalization", "Identity", "Rescaling"),
)


def _flat_orders(network) -> dict[int, np.ndarray]:
    """By tensor that holds flattened images: the places of its values, channels first."""
    orders: dict[int, np.ndarray] = {}
    for operation in _operations(network):
        kind = type(operation).__name__
        given = tf.nest.flatten(operation.input)
        known = [orders[id(tensor)] for tensor in given if id(tensor) in orders]
        if kind == "Flatten" and len(given[0].shape) == 4:
            height, width, channels = given[0].shape[1:]
            places = np.arange(height * width * channels).reshape(height, width, channels)
            if height * width > 1:
                orders[id(operation.output)] = places.transpose(2, 0, 1).ravel()
        elif kind in _KEEPING and known:
            orders[id(operation.output)] = known[0]
        elif (known and kind != "Dense") or kind == "Reshape":
            raise UsageError(
                f"--to=safetensors: layer {operation.name} ({kind}) takes or makes flattened "
                "images whose order PyTorch has otherwise; Dense layers may follow Flatten."
            )
    return orders


def _convolution(layer, order):
    del order
    return _with_bias(layer, np.transpose(layer.kernel, (3, 2, 0, 1)))


def _depthwise(layer, order):
    del order
    height, width, channels, multiplier = layer.kernel.shape
    kernel = np.transpose(layer.kernel, (2, 3, 0, 1))
    return _with_bias(layer, kernel.reshape(channels * multiplier, 1, height, width))


def _dense(layer, order):
    kernel = np.asarray(layer.kernel)
    return _with_bias(layer, (kernel if order is None else kernel[order]).T)


def _with_bias(layer, weight):
    return {"weight": weight} | ({"bias": np.asarray(layer.bias)} if layer.use_bias else {})


def _normalization(layer, order):
    if layer.axis not in (-1, len(layer.input.shape) - 1):
        raise UsageError(
            f"--to=safetensors: layer {layer.name} normalises axis {layer.axis}; expected the last."
        )
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    parts = {
        "weight": np.asarray(layer.gamma) if layer.scale else np.ones_like(mean),
        "bias": np.asarray(layer.beta) if layer.center else np.zeros_like(mean),
        "running_mean": mean,
        "running_var": variance,
    }
    return {name: part if order is None else part[order] for name, part in parts.items()}


_LAYOUTS = {
    "Conv2D": _convolution,
    "DepthwiseConv2D": _depthwise,
    "Dense": _dense,
    "BatchNormalization": _normalization,
}
