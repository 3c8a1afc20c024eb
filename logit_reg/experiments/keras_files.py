"""Saved Keras networks, judged before Keras and HDF5 see them.

A `.keras` file is a zip archive of `config.json` (classes and their settings), `metadata.json`
and `model.weights.h5`. Keras' safe mode refuses code, but it allocates whatever the settings ask
for, reads files that they name, and opens the weights with a library that a damaged file crashes.
Here the archive's sizes, the classes and the number of weights are checked first, and another
process copies the weights (`weights_copy`).
"""

import contextlib
import json
import math
import mmap
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.experiments import weights_copy
from logit_reg.files import one_line

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_WEIGHTS_BYTES = 2**30
_MAX_DEPTH = 64
# Settings of layers are sizes and counts; seeds and object numbers are not.
_LARGEST_NUMBER = 2**24
_UNBOUNDED = ("seed", "shared_object_id")
# Random states of layers, which count as weights and may be left out of the file.
_FREE_BYTES = 2**20
_SECONDS = 300

_CONVERT = 'keras.models.load_model("m.h5", compile=False).save("m.keras")'
_SAVE_AGAIN = 'where the network was made, save it with network.save("m.keras") of Keras 3'
_LEGACY = f"this is a network in the legacy HDF5 format; save it again in Keras 3: {_CONVERT}"
_WEIGHTS_ALONE = (
    "this is an HDF5 file of weights without their network; build the network, call "
    'network.load_weights on it, then network.save("m.keras")'
)

# What networks for images are made of. Keras' others read files, wrap other frameworks' code or
# do something else that a network which takes finished images has no use for.
_LAYER_PACKAGES = (
    "activations",
    "attention",
    "convolutional",
    "core",
    "merging",
    "normalization",
    "pooling",
    "regularization",
    "reshaping",
    "rnn",
)
_OTHER_LAYERS = {"CenterCrop", "Normalization", "Rescaling", "Resizing"}
_MODELS = {"Functional", "Model", "Sequential"}
_ARRAYS = {"__numpy__", "__tensor__"}
_VALUES = {"__keras_tensor__", "__bytes__", "__ellipsis__", "__slice__"}
_MODULES = (
    "keras",
    "keras.activations",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.models",
    "keras.regularizers",
    "keras.src.models.functional",
    "keras.src.models.model",
    "keras.src.models.sequential",
)
_OPERATIONS = "keras.src.ops."


def read_keras(path: Path) -> keras.Model:
    """Load a network from a `.keras` file that anyone may have written.

    Args:
        path: the file; its network consists of Keras' own layers and operations.

    Returns:
        The network, not compiled.

    Raises:
        ValueError: if it is no such file, is damaged, asks for more memory than its weights
            take, or has a layer that can run code or read files.
    """
    if (other := _other_kind(path)) is not None:
        raise ValueError(f"{path}: expected a .keras file of Keras 3; {other}.")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "copy.weights.h5")
        try:
            config = _unpack(path, Path(folder, _WEIGHTS))
            _check(config)
            _copy_weights(Path(folder, _WEIGHTS), weights)
            return _build(config, weights)
        # Keras raises whatever its parts raise; for the user it is one thing.
        except Exception as error:
            raise ValueError(
                f"{path}: not loaded ({one_line(error)}); expected a network of Keras' own "
                f"layers, saved with network.save."
            ) from error


def _other_kind(path: Path) -> str | None:
    """What a path is if it is no .keras file of Keras 3, and how to save the network again."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return f"this is a SavedModel, whose functions are no layers; {_SAVE_AGAIN}"
        if (path / "model.keras").is_file():
            return f"this is a folder: name the file in it, {path / 'model.keras'}"
        return "this is a folder"
    if not path.is_file():
        return "there is none"
    if not path.stat().st_size:
        return "this file is empty"
    with path.open("rb") as file:
        head = file.read(16)
        if head.startswith(b"\x89HDF"):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _LEGACY if content.find(b"model_config") >= 0 else _WEIGHTS_ALONE
    if head[4:8] == b"TFL3":
        return f"this is a TensorFlow Lite model, which has no gradients; {_SAVE_AGAIN}"
    if head[0] == 0x80 and head[1] in range(2, 6):
        return f"this is a pickle, which runs code when it is read; {_SAVE_AGAIN}"
    if not zipfile.is_zipfile(path):
        return f"this is no zip file, as a network saved by Keras 3 is; {_SAVE_AGAIN}"
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return _other_archive(archive)
    return None


def _other_archive(archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "these are arrays (.npz)"
    if any(name.endswith("/data.pkl") for name in names):
        return "this is a file of PyTorch: build the same network in Keras and copy the weights"
    if _METADATA in names and archive.getinfo(_METADATA).file_size < _MAX_CONFIG_BYTES:
        version = json.loads(archive.read(_METADATA)).get("keras_version")
        if isinstance(version, str) and re.fullmatch(r"[0-2]\.[\w.]{1,20}", version):
            return (
                f"this one is of Keras {version}: save the network there as an .h5 file, which "
                f"Keras 3 can save again: {_CONVERT}"
            )
    return None


def _unpack(path: Path, weights: Path) -> dict[str, Any]:
    """The settings; the weights go to a file."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted((_CONFIG, _METADATA, _WEIGHTS)):
            raise ValueError(f"it holds {len(names)} files, not config, metadata and weights")
        for name, limit in ((_CONFIG, _MAX_CONFIG_BYTES), (_WEIGHTS, _MAX_WEIGHTS_BYTES)):
            if (size := archive.getinfo(name).file_size) > limit:
                raise ValueError(f"{name} has {size:,} bytes, {limit:,} are allowed")
        with archive.open(_CONFIG) as file:
            # One byte more than announced makes zipfile check the sum.
            content = file.read(_MAX_CONFIG_BYTES + 1)
        with archive.open(_WEIGHTS) as source, weights.open("wb") as target:
            size = 0
            while chunk := source.read(2**20):
                size += len(chunk)
                if size > archive.getinfo(_WEIGHTS).file_size:
                    raise ValueError(f"{_WEIGHTS} is larger than it claims")
                target.write(chunk)
    config = json.loads(content)
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS:
        raise ValueError(f"{_CONFIG} describes no network")
    return config


def _check(config: dict[str, Any]) -> None:
    """Refuse whatever is no plain network; take out how it was compiled."""
    classes = _allowed_classes()
    pending: list[tuple[Any, int]] = [(config, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"{_CONFIG} is nested too deeply")
        if isinstance(value, dict):
            value.pop("compile_config", None)
            if "class_name" in value:
                _check_class(value, classes)
            # A layer that is called on no tensor of the network would run now.
            for node in _as_list(value.get("inbound_nodes")):
                if not any(_tensors(node)):
                    raise ValueError("a layer that is not connected to the images")
            pending += [(item, depth + 1) for key, item in value.items() if key not in _UNBOUNDED]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]
        elif isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"a setting above {_LARGEST_NUMBER:,}")


def _check_class(value: dict[str, Any], classes: set[str]) -> None:
    name, module = value["class_name"], value.get("module")
    registered, content = value.get("registered_name"), value.get("config")
    if not isinstance(name, str):
        raise ValueError("a class that is not named")
    if name in _VALUES and module is None:
        return
    if name in _ARRAYS and module is None:
        dtype = content.get("dtype") if isinstance(content, dict) else None
        if dtype != "bool" and (not isinstance(dtype, str) or np.dtype(dtype).kind not in "iuf"):
            raise ValueError(f"an array of {dtype!r}")
    elif name == "function":
        known = isinstance(content, str) and content in dir(keras.activations)
        if not known or module not in ("builtins", "keras.activations"):
            raise ValueError(f"the function {content!r}, which is no activation")
        name = content
    elif isinstance(module, str) and module.startswith(_OPERATIONS):
        # Operations are classes; Keras itself imports nothing else from there.
        if not (name.isidentifier() and name[0].isupper()):
            raise ValueError(f"the operation {name!r}")
    elif name not in classes or module not in (None, *_MODULES):
        raise ValueError(f"{name!r} of {module!r}, which is no layer that is safe to load")
    if registered not in (None, name, "function"):
        raise ValueError(f"a class registered as {registered!r}")


def _allowed_classes() -> set[str]:
    packages = {f"keras.src.layers.{package}" for package in _LAYER_PACKAGES}
    layers = {
        name
        for name, value in vars(keras.layers).items()
        if isinstance(value, type) and value.__module__.rpartition(".")[0] in packages
    }
    parts = (keras.initializers, keras.regularizers, keras.constraints, keras.dtype_policies)
    small = {
        name for part in parts for name, value in vars(part).items() if isinstance(value, type)
    }
    return (layers - {"Lambda"}) | small | _OTHER_LAYERS | _MODELS


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tensors(value: Any) -> Iterator[dict[str, Any]]:
    """The network's tensors in a call's arguments, but not inside other objects."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            yield value
        elif "class_name" not in value:
            yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, list):
        yield from (tensor for item in value for tensor in _tensors(item))


def _copy_weights(source: Path, target: Path) -> None:
    """Let another process read the file; what it wrote is sound HDF5."""
    # -P: a module in the current folder is nobody's business.
    command = [sys.executable, "-P", weights_copy.__file__, str(source), str(target)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode < 0:
        raise ValueError(f"{_WEIGHTS} is damaged or hostile: reading it crashes or takes too much")
    if done.returncode:
        raise ValueError(f"{_WEIGHTS}: {done.stderr.strip()}")


def _build(config: dict[str, Any], weights: Path) -> keras.Model:
    """The network, once it is known how much memory it takes."""
    try:
        # Weights that are made in here have a shape and no value yet.
        with keras.StatelessScope(initialize_variables=False):
            network = keras.saving.deserialize_keras_object(config, safe_mode=True)
            needed = sum(
                math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
                for variable in network.variables
            )
        if needed > weights.stat().st_size + _FREE_BYTES:
            raise ValueError(
                f"its layers ask for {needed:,} bytes, its weights have {weights.stat().st_size:,}"
            )
    except Exception:
        # Forgets the weights without values, which the next scope would allocate.
        keras.utils.clear_session(free_memory=False)
        raise
    with keras.StatelessScope():
        pass  # leaving it gives the weights their values
    network.load_weights(weights)
    return network
