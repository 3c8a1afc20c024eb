"""A network and images of your own: --model and --data, with --bounds and --epsilon."""

import dataclasses
from pathlib import Path

import keras
import numpy as np

from logit_reg.evaluation import content_hash
from logit_reg.threat import ThreatModel
from logit_reg_scripts import command_line
from logit_reg_scripts.command_line import FLAGS, UsageError
from logit_reg_scripts.evaluations import NAME_DIGITS, network_name
from logit_reg_scripts.sources import load_keras, load_own_images

_NEEDED = ("model", "data", "bounds", "epsilon")


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """What the flags name, checked to fit together.

    Args:
        network: images to logits.
        threat: norm, budget and pixel range.
        images: (N, H, W, C) float32, in the pixel units of the bounds.
        labels: (N,) int64.
        path: the .npz file of the images.
        digest: of the content of that file.
    """

    network: keras.Model
    threat: ThreatModel
    images: np.ndarray
    labels: np.ndarray
    path: Path
    digest: str

    @property
    def name(self) -> str:
        """Name of the folder of its results: network and images, told apart by their content."""
        return network_name(Path(FLAGS.model), self.network, f"{self.path.stem}-{self.digest}")


def load_own_model() -> OwnModel:
    """The network of --model and the first --num_eval_examples images of --data.

    Raises:
        UsageError: if a flag is missing or the parts do not fit together.
    """
    missing = [f"--{name}" for name in _NEEDED if not FLAGS[name].value]
    if missing:
        raise UsageError(
            f"your own model and data need --model, --data, --bounds and --epsilon together; "
            f"missing {', '.join(missing)}."
        )
    lower, upper = _bounds()
    threat = ThreatModel(FLAGS.norm or "linf", FLAGS.epsilon, lower, upper)
    network = load_keras(command_line.existing_path("model", FLAGS.model))
    path = command_line.existing_path("data", FLAGS.data)
    images, labels = load_own_images(path, (lower, upper))
    if tuple(network.input_shape[1:]) != images.shape[1:]:
        raise UsageError(
            f"{path}: images have shape {images.shape[1:]}, the network takes "
            f"{tuple(network.input_shape[1:])}."
        )
    num_classes = network.output_shape[-1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(
            f"{path}: labels span {labels.min()} to {labels.max()}, the network has "
            f"{num_classes} classes."
        )
    count = command_line.num_examples(FLAGS.num_eval_examples, len(images))
    digest = content_hash(images, labels)[:NAME_DIGITS]
    return OwnModel(network, threat, images[:count], labels[:count], path, digest)


def _bounds() -> tuple[float, float]:
    try:
        lower, upper = (float(value) for value in FLAGS.bounds)
    except ValueError as error:
        raise UsageError(
            f"--bounds must be two numbers, as 0,1; got {','.join(FLAGS.bounds)!r}."
        ) from error
    return lower, upper
