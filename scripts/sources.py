"""What a command works on: which data set, which network."""

import dataclasses
import re
from pathlib import Path

import keras
import numpy as np

from logit_reg.files import read_arrays, read_json
from logit_reg.state import saved_steps
from logit_reg_scripts.command_line import UsageError, existing_path, notice
from logit_reg_scripts.keras_files import read_keras
from logit_reg_scripts.runs import RunSettings, read_run, step_of_network
from madry_compat.challenges import challenge_for
from madry_compat.data import NAMES, Dataset, is_available, load
from madry_compat.releases import identify_release
from madry_compat.tf1_checkpoints import load_network

RUNS = Path("runs")

_MIN_NPZ_BYTES = 2**28
_MAX_NPZ_BYTES = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class Model:
    """A network to evaluate and where it comes from."""

    network: keras.Model
    """Images in pixel units -> logits."""
    path: Path
    """What was named on the command line, or the newest run."""
    run: RunSettings | None
    """Settings of its training, if it is a run of this project."""
    data_dir: str | None = None
    """Where the run had its data from."""
    release: str | None = None
    """Which released model it is, such as "mnist/secret", where a hash proves it."""
    folder: Path | None = None
    """Folder of the run that it belongs to, if it does."""
    finished_steps: int | None = None
    """Training steps of this very network, if it is of a run and they are known."""

    @property
    def usable_data_dir(self) -> str | None:
        """Where the run had its data from, if that folder is still there."""
        return self.data_dir if self.data_dir and Path(self.data_dir).is_dir() else None

    @property
    def is_squeezed(self) -> bool:
        """Whether it was trained in the family that PGD flatters."""
        return self.run is not None and (self.run.reg != "none" or self.run.smoothing > 0)


def choose_dataset(name: str | None, data_dir: str | None) -> str:
    """The data set to take: the one named, else `mnist` where it is, else the embedded one.

    Args:
        name: value of --dataset or None.
        data_dir: value of --data_dir or None.

    Returns:
        A name of `madry_compat.data.NAMES`.
    """
    if name is not None:
        return name
    return "mnist" if is_available("mnist", data_dir) else "mnist_5k"


def load_split(name: str, split: str, data_dir: str | None, *, download: bool) -> Dataset:
    """Load a data set and say in one line what it is.

    Raises:
        UsageError: if --data_dir does not exist.
        ValueError: from `madry_compat.data.load`.
    """
    if data_dir is not None and name != "mnist_5k" and not download:
        existing_path("data_dir", data_dir)
    dataset = load(name, split, data_dir, download=download)
    print(f"data: {name} {split}, {len(dataset.images)} images ({dataset.source})")
    if dataset.note:
        print(f"      {dataset.note}")
    if name == "mnist_5k":
        print(
            "      The full set: --dataset=mnist with --data_dir=FOLDER (TFDS or IDX files) or "
            "--download."
        )
    return dataset


def newest_run() -> Path:
    """The run that was trained last.

    Raises:
        UsageError: if there is none.
    """
    runs = [path.parent for path in RUNS.glob("*/model.keras")]
    if not runs:
        raise UsageError(
            f"no trained run in {RUNS}/; train one (logit-reg-train or python scripts/train.py) "
            f"or name a model with --model_dir."
        )
    return max(runs, key=lambda run: (run / "model.keras").stat().st_mtime)


def load_model(value: str | None) -> Model:
    """Load what --model_dir names.

    Args:
        value: a run's folder, a `.keras` file, a folder or prefix of a TF1 bundle, or None for
            the newest run.

    Returns:
        The network with its provenance.

    Raises:
        UsageError: if there is no model there.
        ValueError: if what is there cannot be read.
    """
    path = newest_run() if value is None else Path(value).expanduser()
    if value is None:
        notice(f"model: {path}, the newest run (choose with --model_dir)")
    if path.suffix == ".keras":
        return Model(load_keras(existing_path("model_dir", str(path))), path, None)
    if (path / "model.keras").is_file():
        if not (path / "run.json").is_file():
            return Model(load_keras(path / "model.keras"), path, None)
        network, step = _load_with_step(path)
        return _model_of_run(network, path, path, step)
    if not path.exists() and not Path(f"{path}.index").exists():
        raise UsageError(f"--model_dir={value}: no such file, folder or checkpoint prefix.")
    if path.is_dir() and not any(path.rglob("*.index")):
        raise UsageError(
            f"--model_dir={value}: no model there; expected model.keras (a run) or "
            f"checkpoint-N.index (a challenge checkpoint). An unfinished run has its first model "
            f"at its first checkpoint."
        )
    checkpoint = re.fullmatch(r"checkpoint-(\d{1,12})", path.name)
    if checkpoint and (path.parent / "run.json").is_file():
        return _model_of_run(load_network(path), path, path.parent, int(checkpoint[1]))
    return Model(load_network(path), path, None, release=identify_release(path))


def _model_of_run(network, path, folder, step) -> Model:
    data_dir = read_json(folder / "run.json").get("data_dir")
    return Model(network, path, read_run(folder), data_dir, folder=folder, finished_steps=step)


def _load_with_step(folder: Path) -> tuple[keras.Model, int | None]:
    """The network of a run and its step, of one and the same file while training goes on."""
    path = folder / "model.keras"
    step = step_of_network(path)
    while True:
        network, before = load_keras(path), step
        step = step_of_network(path)
        if step == before:
            break
    # Earlier versions did not write it; the checkpoint beside is of the same step.
    return network, max(saved_steps(folder), default=None) if step is None else step


def load_keras(path: Path) -> keras.Model:
    """Load a saved network, in Keras' safe mode and with the care that `read_keras` takes.

    Raises:
        ValueError: if the file is not a network that is safe to load.
        UsageError: if it is not a network from images to logits.
    """
    network = read_keras(path)
    if len(network.inputs or ()) != 1 or len(network.outputs or ()) != 1:
        raise UsageError(f"{path}: expected one Keras model with one output, the logits.")
    return network


def dataset_for(model: Model, name: str | None, data_dir: str | None) -> str:
    """The data set to evaluate a model on: the one named, its own, or one of its input shape.

    Raises:
        UsageError: if the images of the data set do not fit the network.
    """
    shape = tuple(model.network.input_shape[1:])
    num_classes = model.network.output_shape[-1]
    if name is None and model.run is not None:
        name = model.run.dataset
    if name is None and shape == challenge_for("mnist").image_shape:
        name = choose_dataset(None, data_dir)
    if name is None and shape == challenge_for("cifar10").image_shape:
        name = "cifar100" if num_classes == 100 else "cifar10"
    if name is None:
        raise UsageError(
            f"the network takes images of shape {shape}; name your own data with --data=images.npz "
            f"or choose --dataset from {', '.join(NAMES)}."
        )
    challenge = challenge_for(name)
    if (challenge.image_shape, challenge.num_classes) != (shape, num_classes):
        raise UsageError(
            f"the network takes {shape} images and has {num_classes} classes; {name} has "
            f"{challenge.image_shape} and {challenge.num_classes}. Choose another --dataset."
        )
    return name


def load_own_images(path: Path, bounds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A user's own test set.

    Args:
        path: `.npz` with `images` (N, H, W, C), float in pixel units or uint8, and `labels` (N,).
        bounds: lowest and highest pixel value.

    Returns:
        images float32 and labels int64.

    Raises:
        ValueError: if the file is something else, or an image is outside the bounds.
    """
    if not path.is_file():
        raise UsageError(f"{path}: expected an .npz file; there is none.")
    # Images do not compress much: what claims to is a bomb.
    max_bytes = min(max(_MIN_NPZ_BYTES, 4 * path.stat().st_size), _MAX_NPZ_BYTES)
    arrays = read_arrays(path, names=("images", "labels"), max_bytes=max_bytes)
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim != 4 or images.dtype.kind not in "fu" or not len(images):
        raise UsageError(
            f"{path}: images are {images.dtype} {images.shape}, expected float or uint8 (N, H, W, "
            f"C) in pixel units."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected {images.shape[:1]} "
            f"integers."
        )
    images = images.astype(np.float32)
    if not (np.isfinite(images).all() and bounds[0] <= images.min() <= images.max() <= bounds[1]):
        raise UsageError(
            f"{path}: images span [{images.min():g}, {images.max():g}], outside --bounds="
            f"{bounds[0]:g},{bounds[1]:g}; give the bounds in the images' own pixel units."
        )
    return images, labels.astype(np.int64)
