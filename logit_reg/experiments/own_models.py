"""A network and images of the user's own."""

import dataclasses
from pathlib import Path

import keras
import numpy as np

from logit_reg.evaluation.run import content_hash
from logit_reg.experiments.evaluations import NAME_DIGITS, network_name
from logit_reg.experiments.sources import load_keras, load_own_images, num_examples
from logit_reg.messages import UsageError
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """A network and images, checked to fit together.

    Args:
        network: images to logits.
        threat: norm, budget and pixel range.
        images: (N, H, W, C) float32, in the pixel units of the bounds.
        labels: (N,) int64.
        model: the .keras file of the network.
        data: the .npz file of the images.
        digest: of the content of that file.
        first: place of the first image to look at; those before it are there, too.
    """

    network: keras.Model
    threat: ThreatModel
    images: np.ndarray
    labels: np.ndarray
    model: Path
    data: Path
    digest: str
    first: int = 0

    @property
    def name(self) -> str:
        """Name of the folder of its results: network and images, told apart by their content."""
        return network_name(self.model, self.network, f"{self.data.stem}-{self.digest}")


def load_own_model(
    model: Path, data: Path, threat: ThreatModel, count: int | None = None, first: int = 0
) -> OwnModel:
    """A network and images of a file.

    Args:
        model: a .keras file.
        data: an .npz file of images and labels, see `load_own_images`.
        threat: norm, budget and pixel range.
        count: how many images; None for all.
        first: place of the first of them.

    Raises:
        UsageError: if the parts do not fit together.
    """
    network = load_keras(model)
    images, labels = load_own_images(data, (threat.lower, threat.upper))
    takes = network.input_shape[1:]
    # A size that the network leaves open is None.
    fits = len(takes) == 3 and all(
        a in (None, b) for a, b in zip(takes, images.shape[1:], strict=True)
    )
    if not fits:
        raise UsageError(
            f"{data}: images have shape {images.shape[1:]}, the network takes {tuple(takes)}."
        )
    num_classes = network.output_shape[-1]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        from_one = labels.min() == 1 and labels.max() == num_classes
        raise UsageError(
            f"{data}: image {wrong[0]} has the label {labels[wrong[0]]}, the network has "
            f"{num_classes} classes, whose labels are 0 to {num_classes - 1}"
            f"{'; these count from 1: subtract 1' if from_one else ''}."
        )
    end = first + num_examples(count, len(images), first)
    digest = content_hash(images, labels)[:NAME_DIGITS]
    return OwnModel(network, threat, images[:end], labels[:end], model, data, digest, first)
