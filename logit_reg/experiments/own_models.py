"""A network and images of your own: --model and --data, with --bounds and --epsilon."""

import dataclasses
from pathlib import Path

import keras
import numpy as np

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.evaluation.run import content_hash
from logit_reg.experiments.evaluations import NAME_DIGITS, network_name
from logit_reg.experiments.sources import load_keras, load_own_images
from logit_reg.threat import ThreatModel

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
    missing = [f"--{name}" for name in _NEEDED if FLAGS[name].value is None]
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
    takes = network.input_shape[1:]
    # A size that the network leaves open is None.
    fits = len(takes) == 3 and all(
        a in (None, b) for a, b in zip(takes, images.shape[1:], strict=True)
    )
    if not fits:
        raise UsageError(
            f"{path}: images have shape {images.shape[1:]}, the network takes {tuple(takes)}."
        )
    num_classes = network.output_shape[-1]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        from_one = labels.min() == 1 and labels.max() == num_classes
        raise UsageError(
            f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, the network has "
            f"{num_classes} classes, whose labels are 0 to {num_classes - 1}"
            f"{'; these count from 1: subtract 1' if from_one else ''}."
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
