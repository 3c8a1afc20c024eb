"""TF1 checkpoints of the challenges: strict load and save, optimizer slots included.

A V2 bundle is `checkpoint-N.index` (names, shapes, offsets, checksums) and
`checkpoint-N.data-00000-of-00001` (the values); a text file `checkpoint` names the newest one.
TensorFlow reads and writes the values; `bundle_index` finds the files and judges the index first.
"""

import contextlib
import glob
import logging
import math
import operator
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from madry_compat.bundle_index import (
    STATE_FILE,
    Bundle,
    CheckpointError,
    PathLike,
    Shape,
    bundle_names,
    open_bundle,
)
from madry_compat.files import write_atomically
from madry_compat.networks import mnist_cnn, wide_resnet
from madry_compat.optimizers import ADAM_EPSILON, TF1Momentum

_logger = logging.getLogger(__name__)

_BATCH_NORM_VARIABLES = ("beta", "gamma", "moving_mean", "moving_variance")
_BETA_POWERS = ("beta1_power", "beta2_power")
_GLOBAL_STEP = "global_step"
# Of names in a message: more than any challenge's network has, fewer than a file can invent.
_MAX_LINES = 500
# The perturbation that free adversarial training keeps as a variable; no part of the network.
_HARMLESS = ("input/instance_perturbation", "input/instance_perturbation/Momentum")


# Characters with a meaning in TensorFlow's patterns for files.
_PATTERN = re.compile(r"[*?\[\]{}\\]")


class _Row(NamedTuple):
    """One variable: its name in the challenge's graph, `layer/variable` in ours, and its shape."""

    tf1_name: str
    keras_name: str
    shape: Shape

    @property
    def trainable(self) -> bool:
        return "/moving_" not in self.tf1_name


def _mnist_cnn_rows() -> list[_Row]:
    """TF1 numbered the challenge's unnamed variables in the order of their creation."""
    return [
        _Row("Variable", "conv1/kernel", (5, 5, 1, 32)),
        _Row("Variable_1", "conv1/bias", (32,)),
        _Row("Variable_2", "conv2/kernel", (5, 5, 32, 64)),
        _Row("Variable_3", "conv2/bias", (64,)),
        _Row("Variable_4", "dense/kernel", (7 * 7 * 64, 1024)),
        _Row("Variable_5", "dense/bias", (1024,)),
        _Row("Variable_6", "logits/kernel", (1024, 10)),
        _Row("Variable_7", "logits/bias", (10,)),
    ]


def _wide_resnet_rows(width: int, num_classes: int) -> list[_Row]:
    rows = [_Row("input/init_conv/DW", "input_init_conv/kernel", (3, 3, 3, 16))]
    in_channels = 16
    for group, channels in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for unit in range(5):
            ours = f"unit_{group}_{unit}"
            first = group == 1 and unit == 0
            activation = "shared_activation" if first else "residual_only_activation"
            rows += _batch_norm_rows(f"{ours}/{activation}", f"{ours}_bn1", in_channels)
            shape = (3, 3, in_channels, channels)
            rows.append(_Row(f"{ours}/sub1/conv1/DW", f"{ours}_conv1/kernel", shape))
            rows += _batch_norm_rows(f"{ours}/sub2", f"{ours}_bn2", channels)
            shape = (3, 3, channels, channels)
            rows.append(_Row(f"{ours}/sub2/conv2/DW", f"{ours}_conv2/kernel", shape))
            in_channels = channels
    rows += _batch_norm_rows("unit_last", "unit_last_bn", in_channels)
    rows.append(_Row("logit/DW", "logits/kernel", (in_channels, num_classes)))
    rows.append(_Row("logit/biases", "logits/bias", (num_classes,)))
    return rows


def _batch_norm_rows(scope: str, layer: str, channels: int) -> list[_Row]:
    return [
        _Row(f"{scope}/BatchNorm/{name}", f"{layer}/{name}", (channels,))
        for name in _BATCH_NORM_VARIABLES
    ]


def tf1_names(network: keras.Model) -> dict[str, keras.Variable]:
    """Maps the challenge's variable names to the network's variables; values need no transposing.

    Args:
        network: `mnist_cnn` or `wide_resnet`, built here or loaded from a file; recognised by
            the names of its layers and the shapes of its variables.

    Returns:
        TF1 name -> variable, 8 for `mnist_cnn` and 157 for `wide_resnet`, in the graph's order.

    Raises:
        ValueError: if the network is neither of the two.
    """
    variables = {
        f"{layer.name}/{variable.name}": variable
        for layer in network.layers
        for variable in layer.weights
    }
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    candidates = [_mnist_cnn_rows()]
    if len(shapes.get("logits/kernel", ())) == 2:
        features, num_classes = shapes["logits/kernel"]
        candidates.append(_wide_resnet_rows(features // 64, num_classes))
    for rows in candidates:
        if shapes == {row.keras_name: row.shape for row in rows}:
            return {row.tf1_name: variables[row.keras_name] for row in rows}
    raise ValueError(
        f"{network.name!r} has no TF1 names: its {len(shapes)} variables are not those of "
        "madry_compat.networks.mnist_cnn or wide_resnet; pass one of these networks."
    )


def _slot_names(tf1_name: str, slots: Iterable[str] = ("Momentum", "Adam", "Adam_1")) -> list[str]:
    return [f"{tf1_name}/{slot}" for slot in slots]


def load_network(path: PathLike) -> keras.Model:
    """Loads a challenge's checkpoint into the network it belongs to.

    The network, its width and its number of classes are read from names and shapes. Moving
    variances are taken as they are. Optimizer slots may be there or not, free adversarial
    training's `input/instance_perturbation` is left out with a logged notice, and any other
    difference is an error.

    Args:
        path: prefix (`.../checkpoint-N`), folder of a checkpoint, or unpacked release
            (`models/NAME/checkpoint-N.*` inside).

    Returns:
        `mnist_cnn` (images in [0, 1]) or `wide_resnet` (images in [0, 255]).

    Raises:
        CheckpointError: if there is no such checkpoint, it is damaged or incomplete, or it does
            not fit; then all missing, unexpected and wrongly shaped names are listed.
    """
    bundle = open_bundle(path)
    rows, width, num_classes = _rows_for(bundle)
    _check_entries(bundle, rows)
    values = _read_tensors(bundle, [row.tf1_name for row in rows])
    network = wide_resnet(width, num_classes) if width else mnist_cnn()
    for name, variable in tf1_names(network).items():
        variable.assign(values[name])
    return network


def read_step(path: PathLike) -> int:
    """Reads the `global_step` of a checkpoint: the number of updates the challenge had made.

    Args:
        path: as for `load_network`.

    Raises:
        CheckpointError: if there is no such checkpoint, it is damaged, or it has no valid step.
    """
    return _read_step(open_bundle(path))


def has_training_state(path: PathLike) -> bool:
    """Whether a checkpoint has all that `load_training_state` needs.

    Args:
        path: as for `load_network`.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    bundle = open_bundle(path)
    rows, width, _ = _rows_for(bundle)
    kinds = ("Momentum",) if width else ("Adam", "Adam_1")
    slots = [slot for row in rows if row.trainable for slot in _slot_names(row.tf1_name, kinds)]
    return bundle.entries.keys() >= {*slots, _GLOBAL_STEP}


def load_training_state(
    path: PathLike,
    network: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    *,
    loss_reduction: Literal["sum", "mean"] | None = None,
    batch_size: int | None = None,
) -> int:
    """Restores an optimizer, so that training goes on as the challenge's own would.

    Args:
        path: as for `load_network`.
        network: the network trained, with this checkpoint's variables (`load_network(path)`).
        optimizer: `TF1Adam` for `mnist_cnn`, `TF1Momentum` for `wide_resnet`. Built on the
            network's trainable variables if it is not yet.
        loss_reduction: reduction of the cross-entropy in the run that goes on. None is the
            challenge's own: the sum on MNIST, the mean on CIFAR-10. MNIST's slots are converted
            for "mean": m is divided by `batch_size` and v by its square, and the optimizer's
            epsilon must be `ADAM_EPSILON / batch_size`.
        batch_size: number of images in a batch; needed for that conversion only.

    Returns:
        The step to go on from; the optimizer's `iterations` are set to it.

    Raises:
        CheckpointError: if the checkpoint cannot be used, or lacks slots.
        ValueError: if the network, optimizer and reduction do not fit together.

    Source:
        Adam's step number is `global_step`, which counts calls of `minimize`; the stored beta
        powers hold one update more and underflow to 0 in long runs.
    """
    slots = _optimizer_slots(network, optimizer)
    divisor = _loss_divisor(optimizer, loss_reduction, batch_size)
    if isinstance(optimizer, keras.optimizers.Adam):
        epsilon = ADAM_EPSILON / divisor
        if not math.isclose(optimizer.epsilon, epsilon, rel_tol=1e-6):
            raise ValueError(
                f"Adam's epsilon is {optimizer.epsilon:g}; the challenge's, for this reduction of "
                f"the loss, is {epsilon:g}: build the optimizer with TF1Adam(epsilon={epsilon:g})."
            )
    bundle = open_bundle(path)
    _check_entries(bundle, _rows_of(network), needed=[*slots, _GLOBAL_STEP])
    step = _read_step(bundle)
    values = _read_tensors(bundle, slots)
    for name, slot in slots.items():
        slot.variable.assign(values[name] / np.float32(divisor**slot.power))
    optimizer.iterations.assign(step)
    return step


def _rows_for(bundle: Bundle) -> tuple[list[_Row], int, int]:
    """The rows, width (0 for MNIST) and class count of the network a bundle belongs to."""
    names = bundle.entries.keys()
    mnist_rows = _mnist_cnn_rows()
    # The most frequent one, so that a single wrong shape is reported as such.
    channels = Counter(
        entry.shape[-1]
        for name, entry in bundle.entries.items()
        if name.startswith("unit_3_") and entry.shape
    )
    width = max(1, channels.most_common(1)[0][0] // 64) if channels else 10
    biases = bundle.entries.get("logit/biases")
    num_classes = max(1, biases.shape[0]) if biases and biases.shape else 10
    resnet_rows = _wide_resnet_rows(width, num_classes)

    mnist_hits = sum(row.tf1_name in names for row in mnist_rows)
    resnet_hits = sum(row.tf1_name in names for row in resnet_rows)
    if mnist_hits == resnet_hits == 0:
        some = ", ".join(sorted(names)[:3]) or "none"
        raise CheckpointError(
            f"{bundle.prefix}: none of its variables ({some}, ...) is one of the MNIST or CIFAR-10 "
            "challenge's; expected a TF1 checkpoint of a challenge, such as Variable or logit/DW."
        )
    if mnist_hits > resnet_hits:
        return mnist_rows, 0, 10
    return resnet_rows, width, num_classes


def _rows_of(network: keras.Model) -> list[_Row]:
    names = tf1_names(network)
    return [_Row(name, "", tuple(variable.shape)) for name, variable in names.items()]


def _check_entries(bundle: Bundle, rows: list[_Row], needed: Iterable[str] = ()) -> None:
    """Raises one error that lists every name by which the bundle and the rows differ."""
    required = {row.tf1_name: row.shape for row in rows}
    known = required | {_GLOBAL_STEP: ()} | dict.fromkeys(_BETA_POWERS, ())
    for row in rows:
        if row.trainable:
            known |= dict.fromkeys(_slot_names(row.tf1_name), row.shape)

    missing = sorted({*required, *needed} - bundle.entries.keys())
    extra = sorted(bundle.entries.keys() - known.keys())
    lines = [f"- {name}: missing" for name in missing]
    lines += [f"+ {name}: unexpected" for name in extra if name not in _HARMLESS]
    for name, entry in sorted(bundle.entries.items()):
        if name not in known:
            continue
        dtypes = (tf.int64, tf.int32) if name == _GLOBAL_STEP else (tf.float32,)
        if entry.shape != known[name]:
            lines.append(f"! {name}: shape {entry.shape}, expected {known[name]}")
        elif entry.dtype not in {dtype.as_datatype_enum for dtype in dtypes}:
            lines.append(f"! {name}: not of type {dtypes[0].name}")
    if lines:
        raise CheckpointError(
            f"{bundle.prefix} does not fit the challenge's network; {len(lines)} names differ:\n  "
            + "\n  ".join(lines if len(lines) <= _MAX_LINES else [*lines[:_MAX_LINES], "..."])
        )
    for name in extra:
        _logger.warning("%s: %s is no part of the network; left out.", bundle.prefix, name)


def _read_step(bundle: Bundle) -> int:
    entry = bundle.entries.get(_GLOBAL_STEP)
    integers = (tf.int64.as_datatype_enum, tf.int32.as_datatype_enum)
    if entry is None or entry.shape != () or entry.dtype not in integers:
        raise CheckpointError(f"{bundle.prefix}: it has no integer scalar named {_GLOBAL_STEP}.")
    step = int(_read_tensors(bundle, [_GLOBAL_STEP])[_GLOBAL_STEP])
    if step < 0:
        raise CheckpointError(f"{bundle.prefix}: {_GLOBAL_STEP} is {step}, expected 0 or more.")
    return step


class _Slot(NamedTuple):
    variable: keras.Variable
    power: int
    """Power of the gradient's scale that the slot is proportional to."""


def _optimizer_slots(
    network: keras.Model, optimizer: keras.optimizers.Optimizer
) -> dict[str, _Slot]:
    """TF1 slot name -> variable of the optimizer, which is built if it is not yet."""
    names = tf1_names(network)
    is_mnist = "Variable" in names
    fits = (
        isinstance(optimizer, keras.optimizers.Adam) and not optimizer.amsgrad
        if is_mnist
        else isinstance(optimizer, TF1Momentum)
    )
    if not fits:
        wanted = "keras.optimizers.Adam (TF1Adam)" if is_mnist else "TF1Momentum"
        raise ValueError(
            f"the challenge's slots for this network belong to {wanted}; "
            f"got {type(optimizer).__name__}. Pass that optimizer, or save without one."
        )
    kinds = (
        {"Adam": ("momentum", 1), "Adam_1": ("velocity", 2)}
        if is_mnist
        else {"Momentum": ("momentum", 1)}
    )
    optimizer.build(network.trainable_variables)
    # Keras names a slot after the path of its variable.
    by_name = {variable.name: variable for variable in optimizer.variables}
    slots = {}
    for name, variable in names.items():
        if not variable.trainable:
            continue
        for tf1_slot, (keras_slot, power) in kinds.items():
            keras_name = f"{variable.path.replace('/', '_')}_{keras_slot}"
            if keras_name not in by_name:
                raise ValueError(
                    f"the optimizer has no slot {keras_name}; it was built on other variables. "
                    "Build it on network.trainable_variables."
                )
            slots[f"{name}/{tf1_slot}"] = _Slot(by_name[keras_name], power)
    return slots


def _loss_divisor(
    optimizer: keras.optimizers.Optimizer, loss_reduction: str | None, batch_size: int | None
) -> int:
    """How many times smaller the run's gradients are than the challenge's."""
    if loss_reduction not in (None, "sum", "mean"):
        raise ValueError(f"loss_reduction must be 'sum', 'mean' or None; got {loss_reduction!r}.")
    if isinstance(optimizer, TF1Momentum):
        if loss_reduction == "sum":
            raise ValueError(
                "loss_reduction is 'sum', but Momentum's slots and learning rate belong to the "
                "mean of the CIFAR-10 challenge; train with the mean."
            )
        return 1
    if loss_reduction != "mean":
        return 1
    if batch_size is None or batch_size < 1:
        raise ValueError(
            f"batch_size is {batch_size}; converting Adam's slots between the challenge's summed "
            "loss and a mean needs the number of images in a batch."
        )
    return batch_size


def save_network(
    network: keras.Model,
    directory: PathLike,
    step: int,
    *,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss_reduction: Literal["sum", "mean"] | None = None,
    batch_size: int | None = None,
) -> str:
    """Writes a checkpoint that `tf.train.Saver` restores in the challenge's own graph.

    Writes `checkpoint-STEP.index`, `checkpoint-STEP.data-00000-of-00001` and the text file
    `checkpoint`, whose paths are relative. Each is complete or absent.

    Args:
        network: `mnist_cnn` or `wide_resnet`.
        directory: folder to write to; made if needed.
        step: number of updates made, stored as `global_step`.
        optimizer: `TF1Adam` for `mnist_cnn`, `TF1Momentum` for `wide_resnet`: its slots are
            written too, and its `iterations` must equal `step`. None: the network only, which
            the challenge can evaluate but not go on training.
        loss_reduction: reduction of the cross-entropy in this run, as for `load_training_state`.
            The slots are written for the challenge's own.
        batch_size: number of images in a batch, needed on MNIST for "mean" only.

    Returns:
        The prefix written, `DIRECTORY/checkpoint-STEP`.

    Raises:
        ValueError: if the network is neither of the two, the step is negative or not the
            optimizer's, or the optimizer and reduction do not fit the network.
        OSError: if the files cannot be written.
    """
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step must be 0 or more; got {step}.")
    values = {name: _float32(variable) for name, variable in tf1_names(network).items()}
    values[_GLOBAL_STEP] = np.array(step, np.int64)
    if optimizer is not None:
        values |= _training_state(network, optimizer, step, loss_reduction, batch_size)

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / f"checkpoint-{step}"
    _write_bundle(prefix, values)
    _write_state(prefix)
    return str(prefix)


def _training_state(
    network: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    step: int,
    loss_reduction: str | None,
    batch_size: int | None,
) -> dict[str, np.ndarray]:
    slots = _optimizer_slots(network, optimizer)
    divisor = _loss_divisor(optimizer, loss_reduction, batch_size)
    updates = int(optimizer.iterations.value.numpy())
    if updates != step:
        raise ValueError(
            f"step is {step}, but the optimizer has made {updates} updates; the challenge counts "
            "both with global_step, so pass step=int(optimizer.iterations)."
        )
    values = {
        name: _float32(slot.variable) * np.float32(divisor**slot.power)
        for name, slot in slots.items()
    }
    if isinstance(optimizer, keras.optimizers.Adam):
        # TF1 multiplies the powers after an update, and starts from the betas themselves.
        for name, beta in zip(_BETA_POWERS, (optimizer.beta_1, optimizer.beta_2), strict=True):
            values[name] = np.array(beta ** (step + 1), np.float32)
    return values


def _float32(variable: keras.Variable) -> np.ndarray:
    return np.asarray(variable.value.numpy(), np.float32)


def _write_bundle(prefix: Path, values: Mapping[str, np.ndarray]) -> None:
    partial = prefix.with_name(f".{prefix.name}.partial")
    # The data first: an index beside it is then always complete. No file holds its own name.
    suffixes = (".data-00000-of-00001", ".index")
    try:
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(partial),
                tensor_names=list(values),
                shape_and_slices=[""] * len(values),
                tensors=[tf.constant(value) for value in values.values()],
            )
        for suffix in suffixes:
            _publish(Path(f"{partial}{suffix}"), Path(f"{prefix}{suffix}"))
    except tf.errors.OpError as error:
        raise OSError(f"{prefix}: cannot be written: {_first_line(error)}") from None
    finally:
        # TensorFlow leaves its own temporary files where the disk is full.
        for path in partial.parent.glob(f"{glob.escape(partial.name)}.*"):
            path.unlink(missing_ok=True)


def _write_state(prefix: Path) -> None:
    """Names the prefix as the newest checkpoint, by relative paths: the folder can move."""
    names = [
        name
        for name in bundle_names(prefix.parent)
        if re.fullmatch(r"checkpoint-\d+", name) and name != prefix.name
    ]
    lines = [f'model_checkpoint_path: "{prefix.name}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in [*names, prefix.name]]
    content = ("\n".join(lines) + "\n").encode()
    write_atomically(prefix.with_name(STATE_FILE), lambda file: file.write(content))


def _publish(partial: Path, path: Path) -> None:
    try:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_tensors(bundle: Bundle, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads values through TensorFlow, which verifies their checksums."""
    values = {}
    name = "its index"
    try:
        with _plain_prefix(bundle.prefix) as prefix:
            reader = tf.train.load_checkpoint(prefix)
            for name in names:
                values[name] = np.asarray(reader.get_tensor(name))
    except (tf.errors.OpError, IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{bundle.prefix}: {name} cannot be read, the file is damaged: {_first_line(error)}"
        ) from None
    return values


@contextlib.contextmanager
def _plain_prefix(prefix: Path) -> Iterator[str]:
    """The prefix under a name that is no pattern: TensorFlow takes the one it reads for such.

    Yields:
        The prefix itself or, where it has a pattern's characters, one of links to its files.
    """
    if not _PATTERN.search(str(prefix)):
        yield str(prefix)
        return
    # $TMPDIR may be a folder of that kind itself.
    temporary = next(f for f in (tempfile.gettempdir(), "/tmp") if not _PATTERN.search(f))
    with tempfile.TemporaryDirectory(dir=temporary) as folder:
        for path in prefix.parent.glob(f"{glob.escape(prefix.name)}.*"):
            link = Path(folder, path.name.replace(prefix.name, "linked", 1))
            link.symlink_to(path.absolute())
        yield f"{folder}/linked"


def _first_line(error: Exception) -> str:
    message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    return message.strip().partition("\n")[0]
