"""Weights for PyTorch: layouts, orders and refusals; its logits where it is installed."""

import re
import types
from pathlib import Path

import keras
import numpy as np
import pytest

from logit_reg.experiments.torch_weights import FILE, export_torch, torch_tensors
from logit_reg.messages import UsageError
from madry_compat.networks import mnist_cnn, wide_resnet

layers = keras.layers
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pytorch.md").read_text()


def mixed():
    network = keras.Sequential(
        [
            keras.Input((9, 8, 3)),
            layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="elu"),
            layers.Conv2D(4, 2, groups=2, dilation_rate=2),
            layers.Flatten(),
            layers.BatchNormalization(scale=False),
            layers.Dropout(0.3),
            layers.Dense(7, activation="relu"),
            layers.Dense(5),
        ]
    )
    rng = np.random.default_rng(0)
    network.set_weights([rng.uniform(0.1, 0.5, w.shape) for w in network.get_weights()])
    return network


def exported(network, folder):
    export_torch(types.SimpleNamespace(network=network), folder)
    return folder / FILE


def test_weights_have_the_names_and_shapes_of_pytorchs_layers():
    network = mnist_cnn()
    tensors = torch_tensors(network)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {
        **{"conv1.weight": (32, 1, 5, 5), "conv1.bias": (32,)},
        **{"conv2.weight": (64, 32, 5, 5), "conv2.bias": (64,)},
        **{"dense.weight": (1024, 3136), "dense.bias": (1024,)},
        **{"logits.weight": (10, 1024), "logits.bias": (10,)},
    }
    # Row 2, column 5, channel 3: the place in an image with channels last, and first.
    kernel = np.asarray(network.get_layer("dense").kernel)
    last, first = (2 * 7 + 5) * 64 + 3, 3 * 49 + 2 * 7 + 5
    np.testing.assert_array_equal(tensors["dense.weight"][:, first], kernel[last])


def test_a_normalisation_between_flattening_and_dense_layer_is_reordered_too():
    network = mixed()
    tensors = torch_tensors(network)
    normalization = network.layers[5]
    mean = np.asarray(normalization.moving_mean)
    found = tensors[f"{normalization.name}.running_mean"]
    height, width, channels = network.layers[4].input.shape[1:]
    np.testing.assert_array_equal(
        found, mean.reshape(height, width, channels).transpose(2, 0, 1).ravel()
    )
    assert np.all(tensors[f"{normalization.name}.weight"] == 1)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ([layers.Flatten(), layers.Reshape((2, -1)), layers.Flatten()], "Reshape"),
        ([layers.Flatten(), layers.LayerNormalization()], "LayerNormalization"),
        ([layers.Conv2DTranspose(2, 3), layers.Flatten()], "Conv2DTranspose"),
    ],
)
def test_a_layer_without_a_counterpart_is_refused(added, words):
    network = keras.Sequential([keras.Input((4, 4, 1)), *added, layers.Dense(2)])
    with pytest.raises(UsageError, match=words) as caught:
        torch_tensors(network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [mnist_cnn, mixed, lambda: wide_resnet(1)])
def test_pytorch_has_the_same_logits(make, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    exported(make(), tmp_path)
    assert re.search("parity: PyTorch's logits of 8 random images differ", capsys.readouterr().out)


def test_another_order_of_the_flattened_values_is_found_out(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    module = "logit_reg.experiments.torch_weights._flat_orders"
    monkeypatch.setattr(module, lambda network: {})
    with pytest.raises(ValueError, match="parity: .* do not use"):
        exported(mnist_cnn(), tmp_path)


def test_a_file_of_another_network_is_not_written_over(tmp_path):
    pytest.importorskip("safetensors")
    network = mixed()
    path = exported(network, tmp_path)
    before = path.read_bytes()
    exported(network, tmp_path)
    network.layers[-1].bias.assign_add(np.ones(5))
    with pytest.raises(UsageError, match="holds another network"):
        exported(network, tmp_path)
    assert path.read_bytes() == before


def examples():
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_loader_of_the_page_has_the_logits_of_the_network(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    network = mnist_cnn()
    exported(network, tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(examples()[1], names)
    images = np.random.default_rng(0).random((4, 28, 28, 1)).astype(np.float32)
    with torch.no_grad():
        found = names["network"](torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    expected = network(images).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.slow
def test_the_evaluation_of_the_page_runs():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)).eval()
    images = np.random.default_rng(0).random((4, 4, 4, 1)).astype(np.float32)
    names = {"module": module, "images": images, "labels": np.arange(4)}
    exec(examples()[0], names)
    assert len(names["found"].robust) == 4
