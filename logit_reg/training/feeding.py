"""What a training step is fed with: the order of the data, batches from memory, replays."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from logit_reg.objectives import class_indices
from logit_reg.training.averaging import WeightAverage
from logit_reg.training.distribution import own_slice
from logit_reg.training.model import RegularizedModel


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which examples each step trains on: a pure function of the seed and the step.

    Every epoch is a fresh permutation; its last examples that do not fill a batch are left out.
    """

    num_examples: int
    """Size of the training set."""
    batch_size: int
    """Examples a step."""
    seed: int = 0
    """Source of the permutations."""
    replays: int = 1
    """Steps in a row on the same minibatch."""

    def __post_init__(self):
        if self.num_examples < self.batch_size:
            raise ValueError(
                f"training_batch_size {self.batch_size} exceeds the {self.num_examples} training "
                f"examples; choose a smaller one."
            )

    def batches(self, first_step: int) -> Iterator[np.ndarray]:
        """Yield the (batch_size,) int64 indices of step `first_step`, the next one, and so on."""
        step, batches_per_epoch = first_step, self.num_examples // self.batch_size
        order_epoch = -1
        while True:
            epoch, batch = divmod(step // self.replays, batches_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
                order_epoch = epoch
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            step += 1


def traced_train_step(
    model: RegularizedModel,
    images,
    labels,
    batch_size: int,
    average: WeightAverage | None = None,
):
    """The training step as one `tf.function` of the indices of its batch.

    The data stay in memory as they are on disk; a step gathers and converts its own images.

    Args:
        model: compiled with its optimiser, in the scope of the strategy that trains it.
        images: (N, H, W, C) uint8, mapped from [0, 255] to the model's bounds.
        labels: (N,) or (N, 1) int.
        batch_size: fixed number of indices, over all replicas.
        average: takes in the weights after each update.

    Returns:
        A function from (batch_size,) int64 indices, the same in all processes, to the dict of
        `RegularizedModel.update`.

    Raises:
        ValueError: if the images are not uint8, a label is no class or is missing, or the
            replicas cannot share a batch evenly.
    """
    strategy = model.distribute_strategy
    if batch_size % strategy.num_replicas_in_sync:
        raise ValueError(
            f"training_batch_size {batch_size} cannot be shared evenly by "
            f"{strategy.num_replicas_in_sync} replicas; choose a multiple."
        )
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as on disk; got {images.dtype}.")
    all_images = tf.convert_to_tensor(np.ascontiguousarray(images))
    all_labels = class_indices(labels, model.num_classes)
    if len(all_labels) != len(images):
        raise ValueError(
            f"labels must be one an image; got {len(all_labels)} for {len(images)} images."
        )
    lower, upper = model.bounds
    divisor = 255.0 / (upper - lower)

    def on_replica(pixels, classes):
        scaled = tf.cast(own_slice(pixels), model.precision) / divisor + lower
        measures = model.update(scaled, own_slice(classes))
        if average is not None:
            average.update(model.optimizer.iterations)
        return measures

    @tf.function(input_signature=[tf.TensorSpec((batch_size,), tf.int64)], autograph=False)
    def train_step(indices):
        batch = tf.gather(all_images, indices), tf.gather(all_labels, indices)
        measures = strategy.run(on_replica, batch)
        return {
            name: strategy.experimental_local_results(value)[0] for name, value in measures.items()
        }

    return train_step


def replayed(dataset: tf.data.Dataset, replays: int) -> tf.data.Dataset:
    """Repeat each batch, for free adversarial training in `fit`.

    Args:
        dataset: of batches, `(images, labels)` each; of a batch size at most that of the
            `FreeAdversary`.
        replays: how many times in a row each batch comes, as in the `FreeAdversary`.

    Returns:
        A data set of `replays` as many batches; what was random in a batch is the same in its
        replays.

    Raises:
        ValueError: if `replays` is below 1.
    """
    if replays < 1:
        raise ValueError(f"replays must be at least 1; got {replays}.")
    found = dataset.flat_map(lambda *batch: tf.data.Dataset.from_tensors(batch).repeat(replays))
    size = dataset.cardinality()
    return (
        found if size < 0 else found.apply(tf.data.experimental.assert_cardinality(size * replays))
    )
