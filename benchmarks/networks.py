"""The networks that are attacked, in Keras, and what PyTorch needs to build the same."""

import math
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

from logit_reg.experiments.keras_files import read_keras
from madry_compat.networks import mnist_cnn, wide_resnet

# Flags of scripts/train.py: short trainings on the embedded digits, as in the demo.
_COMMON = (
    "--noprogress",
    "--dataset=mnist_5k",
    "--training_batch_size=64",
    "--max_num_training_steps=400",
    "--step_size_schedule=[[0,1e-3]]",
)
TRAININGS = {
    "natural": _COMMON,
    "squeezed": (*_COMMON, "--reg=squeeze", "--beta=2"),
    "adversarial": (
        *_COMMON,
        "--adversary=pgd",
        "--training_batch_size=32",
        "--max_num_training_steps=1000",
        "--ramp_steps=350",
        "--step_size_schedule=[[0,1e-3],[850,3e-4]]",
    ),
}


def load_network(name: str, folder: Path) -> keras.Model:
    """A network by the name that a case gives it.

    Args:
        name: see `Case.network`.
        folder: where trained networks are kept; a second call finds them there.

    Returns:
        Images (N, H, W, C) in pixel units -> logits (N, 10). Fresh weights are the same each time.

    Raises:
        ValueError: if there is no such network.
    """
    keras.utils.set_random_seed(0)
    if name in TRAININGS:
        return _trained(name, folder / name)
    if name == "mnist_cnn":
        return mnist_cnn()
    kind, _, width = name.partition("-")
    if kind == "wide_resnet" and width.isdigit():
        return wide_resnet(int(width))
    if name.endswith(".keras") and Path(name).is_file():
        return read_keras(Path(name))
    if name.endswith(".npz") and Path(name).is_file():
        return trades_network(Path(name))
    raise ValueError(
        f"network {name!r}: expected {', '.join(TRAININGS)}, mnist_cnn, wide_resnet-N, or an "
        "existing .keras or TRADES .npz file."
    )


def is_fresh(name: str) -> bool:
    """Whether the network of that name has weights that nobody trained."""
    return name == "mnist_cnn" or name.startswith("wide_resnet-")


def trades_cnn() -> keras.Model:
    """The small MNIST network of TRADES: images (N, 28, 28, 1) in [0, 1] -> logits (N, 10).

    Source:
        Zhang et al. 2019, arXiv:1901.08573, `small_cnn.py`.
    """
    images = keras.Input((28, 28, 1))
    x = images
    for channels in (32, 64):
        x = layers.Conv2D(channels, 3, activation="relu")(x)
        x = layers.Conv2D(channels, 3, activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(200, activation="relu")(x)
    return keras.Model(images, layers.Dense(10)(x), name="trades_cnn")


def trades_network(path: Path) -> keras.Model:
    """`trades_cnn` with the arrays w0, b0, ... w6, b6 of a converted PyTorch checkpoint."""
    with np.load(path, allow_pickle=False) as file:
        arrays = [file[f"{kind}{i}"] for i in range(7) for kind in "wb"]
    # Its first dense layer counts channels first, Keras' channels last.
    arrays[8] = arrays[8].reshape(64, 4, 4, -1).transpose(1, 2, 0, 3).reshape(1024, -1)
    network = trades_cnn()
    network.set_weights(arrays)
    return network


def forward_flops(network: keras.Model) -> int:
    """Floating-point operations that one image takes forward: two for each weight it meets.

    The gradient with respect to the image takes as many again.
    """
    total = 0
    for layer in network.layers:
        if isinstance(layer, layers.Conv2D):
            total += 2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:3])
        elif isinstance(layer, layers.Dense):
            total += 2 * math.prod(layer.kernel.shape)
    return total


def export(network: keras.Model) -> dict[str, np.ndarray]:
    """What `torch_networks.build` needs: arrays by "layer/variable", and "plan", the layers.

    Args:
        network: a chain of stock layers, or `wide_resnet`.

    Raises:
        ValueError: if a layer of a chain has no counterpart there.
    """
    arrays = {
        f"{layer.name}/{variable.name}": keras.ops.convert_to_numpy(variable)
        for layer in network.layers
        for variable in layer.variables
        if "seed" not in variable.name
    }
    is_chain = network.name != "wide_resnet"
    plan = [_step(layer) for layer in network.layers[1:]] if is_chain else ["wide_resnet"]
    return arrays | {"plan": np.array(plan)}


def _step(layer) -> str:
    """A layer in words: kind, name, padding and activation."""
    if isinstance(layer, layers.Flatten):
        return "flatten"
    if isinstance(layer, layers.MaxPooling2D) and layer.pool_size == layer.strides == (2, 2):
        # Of an even number of rows and columns, "same" and "valid" are the same.
        if layer.padding == "valid" or not any(size % 2 for size in layer.input.shape[1:3]):
            return "pool"
    elif isinstance(layer, layers.Conv2D) and layer.strides == layer.dilation_rate == (1, 1):
        return f"conv {layer.name} {layer.padding} {_activation(layer)}"
    elif isinstance(layer, layers.Dense):
        return f"dense {layer.name} {_activation(layer)}"
    raise ValueError(
        f"layer {layer.name} ({type(layer).__name__}) has no counterpart in PyTorch here; give a "
        "chain of Conv2D, 2 x 2 MaxPooling2D, Flatten and Dense."
    )


def _activation(layer) -> str:
    name = layer.activation.__name__
    if name not in ("relu", "linear"):
        raise ValueError(f"layer {layer.name}: activation {name}, only relu and linear are known.")
    return name


def _trained(name: str, model_dir: Path) -> keras.Model:
    """Train as `scripts/train.py` does; it leaves a finished run as it is."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
    command = [sys.executable, str(script), *TRAININGS[name], f"--model_dir={model_dir}"]
    # What it prints is for people; standard output belongs to the caller's answer.
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_keras(model_dir / "model.keras")
