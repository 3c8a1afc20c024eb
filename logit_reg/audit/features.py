"""The features of a network: what it computes before its last dense layer."""

from typing import Any

import keras

# Layers and activations after the last dense layer that change neither order nor number of logits.
_PASSED_ACTIVATIONS = ("linear", "softmax", "log_softmax")
_PASSED_LAYERS = (
    keras.layers.Dropout,
    keras.layers.Identity,
    keras.layers.Rescaling,
    keras.layers.Softmax,
)


def features_of(network: Any) -> keras.Model:
    """What a network computes before its last dense layer: images (N, H, W, C) -> (N, F).

    Raises:
        ValueError: if it does not end in a dense layer, perhaps followed by layers that change
            neither order nor number of the logits, or is no functional or Sequential network.
    """
    if not isinstance(network, keras.Model):
        raise ValueError(
            f"features can be cut off a functional or Sequential Keras network only; got "
            f"{type(network).__name__}."
        )
    features = _features(network, None)
    return keras.Model(network.inputs[0], features)


def _features(network, given):
    """The tensor before the last dense layer of a network.

    Args:
        network: a Keras model, perhaps the last layer of another one.
        given: the tensor that it is applied to there; its own input if None.
    """
    outputs = getattr(network, "outputs", None)
    if not outputs or len(outputs) != 1 or len(network.inputs) != 1:
        raise ValueError(
            f"features can be cut off a functional or Sequential Keras network with one input and "
            f"one output only; {network.name} is none."
        )
    tensor = outputs[0]
    while True:
        layer, node_index, _ = tensor._keras_history
        if isinstance(layer, keras.layers.InputLayer):
            break
        (tensor, *others) = layer._inbound_nodes[node_index].input_tensors
        if others:
            break
        if isinstance(layer, keras.Model):
            return _applied(network, _features(layer, tensor), given)
        if isinstance(layer, keras.layers.Dense):
            activation = keras.activations.serialize(layer.activation)
            if activation not in _PASSED_ACTIVATIONS or len(tensor.shape) != 2:
                break
            return _applied(network, tensor, given)
        if not _is_passed(layer):
            break
    raise ValueError(
        f"features can be cut off a network only that ends in a dense layer of logits; "
        f"{network.name} ends in {layer.name} ({type(layer).__name__})."
    )


def _is_passed(layer):
    if isinstance(layer, keras.layers.Activation):
        return keras.activations.serialize(layer.activation) in _PASSED_ACTIVATIONS
    return isinstance(layer, _PASSED_LAYERS)


def _applied(network, tensor, given):
    """A tensor of a network's graph, as it is where the network is applied to another tensor."""
    return tensor if given is None else keras.Model(network.inputs[0], tensor)(given)
