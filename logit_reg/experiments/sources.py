"""What a command works on: which data set, which network."""

import dataclasses
import re
from pathlib import Path

import keras
import numpy as np

from logit_reg.attacks.engine.examples import within_bounds
from logit_reg.experiments.evaluations import training_notices
from logit_reg.experiments.keras_files import read_keras
from logit_reg.experiments.runs import read_run, step_of_network
from logit_reg.experiments.settings import RunSettings
from logit_reg.files import read_arrays, read_json
from logit_reg.messages import UsageError, existing_folder, notice
from logit_reg.training.folder import Stop
from logit_reg.training.state import saved_steps
from madry_compat.bundle_index import is_bundle_file
from madry_compat.challenges import IMAGE_SETS, MNIST, Challenge, challenge_for, image_set
from madry_compat.data import NAMES, Dataset, is_available, load
from madry_compat.releases import identify_release
from madry_compat.tf1_checkpoints import load_network

RUNS = Path("runs")

_OWN_ARRAYS = ("images", "labels")
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
    stop: Stop | None = None
    """Where its run was stopped, if it was."""

    @property
    def training(self) -> dict[str, int] | None:
        """How far this network is trained, for `training_notices`; None where that is not known."""
        if self.run is None or self.finished_steps is None:
            return None
        training = {
            "steps_done": self.finished_steps,
            "steps_planned": self.run.max_num_training_steps,
        }
        return training if self.stop is None else training | {"stopped_at": self.stop.step}

    @property
    def usable_data_dir(self) -> str | None:
        """Where the run had its data from, if that folder is still there."""
        return self.data_dir if self.data_dir and Path(self.data_dir).is_dir() else None

    @property
    def is_squeezed(self) -> bool:
        """Whether it was trained in the family that PGD flatters."""
        return self.run is not None and (self.run.reg != "none" or self.run.smoothing > 0)


def choose_dataset(
    name: str | None,
    data_dir: str | None,
    challenge: Challenge = MNIST,
    *,
    may_stand_in: bool = True,
) -> str:
    """The data set to take: the one named, else the challenge's where it is or nothing stands in.

    Args:
        name: value of --dataset or None.
        data_dir: value of --data_dir or None.
        challenge: whose data set to take; for MNIST's stand the embedded digits in.
        may_stand_in: whether they do where the challenge's set is not in `data_dir`.

    Returns:
        A name of `madry_compat.data.NAMES`.

    Raises:
        UsageError: if `data_dir` does not exist, or has not the set and nothing may stand in.
    """
    if name is not None:
        return name
    stand_ins = [each.name for each in IMAGE_SETS.values() if each.taken_from == challenge.name]
    if not stand_ins or is_available(challenge.name, data_dir):
        return challenge.name
    if data_dir is not None:
        existing_folder("data_dir", data_dir)
        if not may_stand_in:
            raise UsageError(
                f"--data_dir={data_dir}: there is no {challenge.name} there; name the folder that "
                f"has it, or choose --dataset={stand_ins[0]}, which is embedded."
            )
        notice(f"{data_dir} has no {challenge.name}: {stand_ins[0]} stands in for it.")
    return stand_ins[0]


def load_split(
    name: str, split: str, data_dir: str | None, *, download: bool, is_chosen: bool = True
) -> Dataset:
    """Load a data set and say in one line what it is.

    Args:
        name: of the data set.
        split: "train" or "test".
        data_dir: folder of its files; None for the usual places.
        download: whether to download what is not there.
        is_chosen: whether another set can be chosen; how to get the full one is then said.

    Raises:
        UsageError: if `data_dir` does not exist.
        ValueError: from `madry_compat.data.load`.
    """
    full_set = image_set(name).taken_from
    if data_dir and not (full_set or download):
        existing_folder("data_dir", data_dir)
    dataset = load(name, split, data_dir, download=download)
    print(f"data: {name} {split}, {len(dataset.images)} images ({dataset.source})")
    if dataset.note:
        print(f"      {dataset.note}")
    if full_set and is_chosen:
        print(
            f"      The full set: --dataset={full_set} with --data_dir=FOLDER (TFDS or original "
            "files) or --download."
        )
    return dataset


def num_examples(wanted: int | None, available: int, first: int = 0) -> int:
    """How many of the available images --num_eval_examples asks for.

    Args:
        wanted: its value; None for all.
        available: number of images.
        first: value of --first_eval_example.

    Raises:
        UsageError: if it is not positive, or there is no such first image.
    """
    if first >= available:
        raise UsageError(
            f"--first_eval_example={first}: there are {available} images, the last is number "
            f"{available - 1}."
        )
    available -= first
    if wanted is None:
        return available
    if wanted < 1:
        raise UsageError(f"--num_eval_examples must be at least 1; got {wanted}.")
    if wanted > available:
        after = f" from number {first} on" if first else ""
        notice(f"--num_eval_examples={wanted}: there are {available} images{after}, all are taken.")
    return min(wanted, available)


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


def load_model(path: Path | str) -> keras.Model:
    """The network of a run or a file.

    Args:
        path: a run's folder, a `.keras` file, or a folder or prefix of a TF1 bundle, such as a
            release unpacked.

    Returns:
        Images (N, H, W, C) in pixel units -> logits (N, K).

    Raises:
        ValueError: if there is no model there, or what is there cannot be read.
    """
    return find_model(path).network


def find_model(path: Path | str, named: str | None = None) -> Model:
    """A network with where it comes from.

    Args:
        path: as in `load_model`.
        named: what messages call it; the path if None.

    Raises:
        UsageError: if there is no model there.
        ValueError: if what is there cannot be read.
    """
    path = Path(path).expanduser()
    named = named or str(path)
    if path.is_file() and not is_bundle_file(path):
        return Model(load_keras(path), path, None)
    if (path / "model.keras").is_file():
        if not (path / "run.json").is_file():
            return Model(load_keras(path / "model.keras"), path, None)
        network, step = _load_with_step(path)
        return _model_of_run(network, path, path, step)
    if not path.exists() and not Path(f"{path}.index").exists():
        raise UsageError(f"{named}: no such file, folder or checkpoint prefix.")
    if (path / "saved_model.pb").is_file():
        # Says what it is.
        read_keras(path)
    if path.is_dir() and not any(path.rglob("*.index")):
        raise UsageError(
            f"{named}: no model there; expected model.keras (a run) or "
            f"checkpoint-N.index (a challenge checkpoint). An unfinished run has its first model "
            f"at its first checkpoint."
        )
    checkpoint = re.fullmatch(r"checkpoint-(\d{1,12})", path.name)
    if checkpoint and (path.parent / "run.json").is_file():
        return _model_of_run(load_network(path), path, path.parent, int(checkpoint[1]))
    return Model(load_network(path), path, None, release=identify_release(path))


def _model_of_run(network, path, folder, step) -> Model:
    record = read_json(folder / "run.json")
    model = Model(
        network,
        path,
        read_run(folder),
        record.get("data_dir"),
        folder=folder,
        finished_steps=step,
        stop=Stop.of_record(record),
    )
    for found in training_notices(model.training):
        notice(f"notice: {found['message']}")
    return model


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

    Returns:
        A network of one tensor of images and one of logits; a dictionary or list of one is taken
        apart.

    Raises:
        ValueError: if the file is not a network that is safe to load.
        UsageError: if it is not a network from images to logits.
    """
    network = read_keras(path)
    for kind, tensors in (("input", network.inputs or ()), ("output", network.outputs or ())):
        if len(tensors) != 1:
            names = ", ".join(tensor.name for tensor in tensors)
            raise UsageError(
                f"{path}: the network has {len(tensors)} {kind}s ({names or 'none'}), expected one "
                f"of images and one of logits; save keras.Model(images, logits) of them."
            )
    images, logits = network.inputs[0], network.outputs[0]
    if len(logits.shape) != 2 or (logits.shape[1] or 0) < 2:
        raise UsageError(
            f"{path}: the network's output has shape {logits.shape}, expected logits (N, K) of at "
            f"least two classes."
        )
    # What was loaded as a Sequential has no `input`; it cannot have a dictionary or list there.
    if isinstance(network, keras.Sequential) or all(
        isinstance(tensor, keras.KerasTensor) for tensor in (network.input, network.output)
    ):
        return network
    return keras.Model(images, logits, name=network.name)


def dataset_for(model: Model, name: str | None, data_dir: str | None) -> str:
    """The data set to evaluate a model on: the one named, its own, or one of its input shape.

    Raises:
        UsageError: if the images of the data set do not fit the network.
    """
    shape = tuple(model.network.input_shape[1:])
    num_classes = model.network.output_shape[-1]
    if name is None and model.run is not None:
        name = model.run.dataset
    fitting = [known for known in NAMES if _fits(challenge_for(known), shape, num_classes)]
    if name is None and fitting:
        # Other images than those of a folder that was named would give other numbers.
        name = choose_dataset(
            None, data_dir, challenge_for(fitting[0]), may_stand_in=data_dir is None
        )
    if name is None or name not in fitting:
        own = "give --model=FILE.keras with --data, --bounds and --epsilon for images of your own"
        choose = {"dataset": f"choose --dataset={' or '.join(fitting)}"} if fitting else {}
        wanted = challenge_for(name or MNIST.name)
        raise UsageError(
            f"the network takes {shape} images and has {num_classes} classes; "
            f"{name or 'no data set here fits: mnist'} has {wanted.image_shape} and "
            f"{wanted.num_classes}.",
            choose or {"data": own},
        )
    return name


def _fits(challenge: Challenge, shape: tuple[int, ...], num_classes: int) -> bool:
    return (challenge.image_shape, challenge.num_classes) == (shape, num_classes)


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
        what = "a folder" if path.is_dir() else "none"
        raise UsageError(f"{path}: expected an .npz file; there is {what}.")
    # Images do not compress much: what claims to is a bomb.
    max_bytes = min(max(_MIN_NPZ_BYTES, 4 * path.stat().st_size), _MAX_NPZ_BYTES)
    try:
        arrays = read_arrays(path, names=_OWN_ARRAYS, max_bytes=max_bytes)
    except ValueError as error:
        raise UsageError(
            f'{str(error).rstrip(".")}; np.savez("images.npz", images=x, labels=y) writes them.'
        ) from error
    images, labels = (arrays[name] for name in _OWN_ARRAYS)
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if images.ndim != 4 or images.dtype.kind not in "fu" or not len(images):
        is_grey = images.ndim == 3 and images.dtype.kind in "fu"
        raise UsageError(
            f"{path}: images are {images.dtype} {images.shape}, expected float or uint8 (N, H, W, "
            f"C) in pixel units{'; save images[..., None]' if is_grey else ''}."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        is_one_hot = labels.ndim == 2 and len(labels) == len(images)
        is_float = labels.ndim == 1 and labels.dtype.kind == "f"
        save = "labels.argmax(axis=1)" if is_one_hot else "labels.astype(int)" if is_float else ""
        raise UsageError(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected {images.shape[:1]} "
            f"integers{save and f'; save {save}'}."
        )
    images = images.astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if len(broken):
        raise UsageError(
            f"{path}: image {broken[0]} has pixels that are not finite, as {len(broken)} of "
            f"{len(images)} have; leave them out."
        )
    return _within(path, images, bounds), labels.astype(np.int64)


def _within(path: Path, images: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """The images, clipped where they leave the bounds by no more than a rounding."""
    try:
        inside = within_bounds(images, *(float(np.float32(bound)) for bound in bounds))
    except ValueError:
        raise UsageError(
            f"{path}: images span [{images.min():.9g}, {images.max():.9g}], outside --bounds="
            f"{bounds[0]:.9g},{bounds[1]:.9g}; give the bounds in the images' own pixel "
            f"units, or save images within them."
        ) from None
    if inside is not images:
        excess = np.abs(inside - images).max()
        notice(f"{path}: pixels leave the bounds by {excess:.2g}, a rounding; they are clipped.")
    return inside
