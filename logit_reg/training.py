"""One training step: noise, adversary, objective, update."""

import dataclasses
import functools
import math
from typing import Any

import keras
import tensorflow as tf

from logit_reg.attacks.attack import is_fooled
from logit_reg.attacks.frozen import following_copy
from logit_reg.attacks.pgd import PGD
from logit_reg.distribution import average, own_slice, whole_batch
from logit_reg.objectives import Objective
from logit_reg.threat import ThreatModel

BATCH_NORM_MODES = ("evaluation", "training")

# What separates the random numbers of one step's several draws.
_NOISE, _START, _RADIUS, _CROP = range(4)


@dataclasses.dataclass(frozen=True)
class PGDAdversary:
    """Adversarial training on the last iterate of PGD.

    Source:
        Madry et al. 2018. Deviations: BatchNorm stays in evaluation mode during the attack unless
        told otherwise (the CIFAR-10 challenge attacks in training mode, and moves the averages
        with every pass); the ramp is ours: short MNIST runs learn nothing without it.
    """

    attack: PGD
    """Loss, steps and threat model; `early_stop` has no meaning here."""
    ramp_steps: int = 0
    """Number of training steps over which epsilon and the step size grow from 0 linearly."""
    batch_norm: str = "evaluation"
    """Mode of BatchNorm during the attack: "evaluation" or "training"."""

    def __post_init__(self):
        _check_ramp(self.ramp_steps)
        if self.batch_norm not in BATCH_NORM_MODES:
            raise ValueError(
                f"batch_norm must be one of {', '.join(BATCH_NORM_MODES)}; got {self.batch_norm!r}."
            )


@dataclasses.dataclass(frozen=True)
class FreeAdversary:
    """Free adversarial training: one persistent perturbation, updated with every weight update.

    The gradient of one backward pass serves the weights and the perturbation. Each minibatch has
    to come several times in a row ("replays"): that is the data's business; `loop.py` does it,
    and a data set for `fit` has to repeat its batches.

    Source:
        Shafahi et al. 2019, arXiv:1904.12843: step size epsilon, never reset. Deviation: the ramp
        is ours: on MNIST, at .3 from the first step on, the network stays at chance.
    """

    threat: ThreatModel
    """An linf threat model."""
    batch_size: int
    """Images of the persistent perturbation; a smaller batch uses its first ones."""
    ramp_steps: int = 0
    """Number of training steps over which epsilon, and the step with it, grows from 0 linearly."""

    def __post_init__(self):
        _check_ramp(self.ramp_steps)
        if self.threat.norm != "linf":
            raise ValueError(
                f"free adversarial training is defined in linf; got norm {self.threat.norm!r}."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")


class RegularizedModel(keras.Model):
    """A network with a training step that regularises its logits.

    Works with `compile` and `fit`, and in `loop.train`. Calling it calls the network.

    Under a `tf.distribute` strategy each replica trains on an equal part of the batch, and the
    step is that of one process: the objective is that of the whole batch, and an image's random
    numbers belong to its place in the whole batch. BatchNorm is the exception: each replica
    normalises with the statistics of its own part, and the moving averages are the mean over the
    replicas.

    Precision:
        Everything is float64 if the network's variables are, else float32.

    Units:
        Images, noise and bounds are in the network's own pixel units.
    """

    def __init__(
        self,
        network: keras.Model,
        objective: Objective,
        *,
        noise_stddev: float = 0.0,
        clip_noise: bool = True,
        bounds: tuple[float, float],
        adversary: PGDAdversary | FreeAdversary | None = None,
        augment: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        """Wrap a network for training.

        Args:
            network: images (N, H, W, C) in pixel units -> logits (N, K).
            objective: what is minimised.
            noise_stddev: standard deviation of the Gaussian noise added to every training image,
                pixel units (the paper: .5 on MNIST, 20 on CIFAR).
            clip_noise: clip noisy images to the bounds (the paper does not say; Mosbach et al.
                do).
            bounds: lowest and highest pixel value.
            adversary: what replaces the images by adversarial ones; noise comes on top.
            augment: pad by 2 pixels a side, crop at random and flip, as the CIFAR-10 challenge.
            weight_decay: weight of the sum of half the squared norms of all kernels (not biases,
                not BatchNorm), added to the total: the challenge's coupled weight decay.
            seed: source of all random numbers of training.

        Raises:
            ValueError: if a number is out of range.
        """
        super().__init__(name="regularized_model")
        if not (math.isfinite(noise_stddev) and noise_stddev >= 0):
            raise ValueError(f"noise_stddev must be at least 0; got {noise_stddev}.")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0; got {weight_decay}.")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be increasing; got {bounds}.")
        self.network = network
        self.objective = objective
        self.noise_stddev = noise_stddev
        self.clip_noise = clip_noise
        self.bounds = tuple(bounds)
        self.adversary = adversary
        self.augment = augment
        self.weight_decay = weight_decay
        self.seed = seed
        self.precision = "float64" if network.variable_dtype == "float64" else "float32"
        if isinstance(adversary, PGDAdversary):
            self._attacked_fn = following_copy(network)
        self.perturbation: Any = None
        if isinstance(adversary, FreeAdversary):
            shape = (adversary.batch_size, *network.input_shape[1:])
            # State of training, not a weight of the network: it is saved with the checkpoint only.
            self.perturbation = self.add_weight(
                name="perturbation",
                shape=shape,
                initializer="zeros",
                dtype=self.precision,
                trainable=False,
            )
        self._kernels = [v for v in network.trainable_variables if v.name == "kernel"]
        self._moving_averages = [
            v for v in network.non_trainable_variables if tf.as_dtype(v.dtype).is_floating
        ]
        self._trackers = [
            keras.metrics.Mean(name=name)
            for name in ("total", "xent", "penalty", "accuracy", "mean_logit_norm")
        ]
        self.built = True

    def call(self, images, training=None):
        """Logits of the network."""
        return self.network(images, training=training)

    @property
    def metrics(self):
        """Running means that `fit` shows."""
        return self._trackers

    def train_step(self, data):
        """Take one optimiser step on a batch and return the running means.

        Args:
            data: (images (B, H, W, C) in pixel units, labels (B,) int).

        Returns:
            A dict of () tensors: total, xent (plain, on hard labels), penalty (before beta),
            accuracy and mean_logit_norm, all on the images that were trained on.
        """
        return self._track(self.update(*data), tf.shape(data[0])[0])

    def test_step(self, data):
        """Evaluate a batch without noise or adversary; see `train_step`."""
        images, labels = tf.cast(data[0], self.precision), tf.cast(data[1], tf.int64)
        labels = whole_batch(labels)
        logits = whole_batch(self.network(images, training=False))
        terms = self.objective(logits, labels)
        return self._track(_measures(terms, logits, labels), tf.shape(images)[0])

    def update(self, images, labels) -> dict:
        """Take one optimiser step; the measures of this batch alone.

        Args:
            images: (B, H, W, C) in pixel units; under a strategy this replica's part of the batch.
            labels: (B,) int.

        Returns:
            A dict of () tensors with the keys of `train_step`, of the whole batch.
        """
        step = tf.cast(self.optimizer.iterations, tf.int64)
        images = tf.cast(images, self.precision)
        labels = tf.cast(labels, tf.int64)
        if self.augment:
            draws = self._random_numbers("unit", images, (3,), step, _CROP)
            images = random_crop_and_flip(images, draws)
        if isinstance(self.adversary, PGDAdversary):
            images = self._attack(self.adversary, images, labels, step)
        if isinstance(self.adversary, FreeAdversary):
            images = tf.clip_by_value(images + self._own_perturbation(images), *self.bounds)
        images = self._add_noise(images, step)

        variables = self.network.trainable_variables
        sources = [variable.value for variable in variables]
        all_labels = whole_batch(labels)
        with tf.GradientTape() as tape:
            if isinstance(self.adversary, FreeAdversary):
                tape.watch(images)
                sources.append(images)
            logits = whole_batch(self.network(images, training=True))
            terms = self.objective(logits, all_labels)
            total = loss = terms.total
            if self.weight_decay:
                decay = self.weight_decay * sum(tf.nn.l2_loss(kernel) for kernel in self._kernels)
                total += decay
                # The optimiser sums over the replicas, and each one sees the whole decay.
                loss += decay / _num_replicas()
        gradients = tape.gradient(loss, sources)
        if isinstance(self.adversary, FreeAdversary):
            scale = self._ramp(self.adversary, step)
            self._move_perturbation(gradients.pop(), scale * self.adversary.threat.epsilon)
        self.optimizer.apply(gradients, variables)
        if _num_replicas() > 1:
            averages = self._moving_averages
            for variable, mean in zip(averages, average([v.value for v in averages]), strict=True):
                variable.assign(mean)
        return _measures(terms._replace(total=total), logits, all_labels)

    def _attack(self, adversary: PGDAdversary, images, labels, step):
        attack = adversary.attack
        logits_fn = self._attacked_fn
        if adversary.batch_norm == "training":
            logits_fn = functools.partial(self.network, training=True)
        distribution = "uniform" if attack.threat.norm == "linf" else "normal"
        return attack.perturb(
            logits_fn,
            images,
            labels,
            noise=self._random_numbers(distribution, images, images.shape[1:], step, _START),
            radius=self._random_numbers("unit", images, (1, 1, 1), step, _RADIUS),
            scale=self._ramp(adversary, step),
        )

    def _ramp(self, adversary: PGDAdversary | FreeAdversary, step):
        """() fraction of epsilon that the adversary has in a step."""
        full = tf.constant(1.0, self.precision)
        if not adversary.ramp_steps:
            return full
        return tf.minimum(full, tf.cast(step + 1, self.precision) / adversary.ramp_steps)

    def _add_noise(self, images, step):
        if not self.noise_stddev:
            return images
        noise = self._random_numbers("normal", images, images.shape[1:], step, _NOISE)
        images += self.noise_stddev * noise
        return tf.clip_by_value(images, *self.bounds) if self.clip_noise else images

    def _own_perturbation(self, images):
        size = tf.shape(images)[0] * _num_replicas()
        return own_slice(self.perturbation.value[:size])

    def _move_perturbation(self, gradient, epsilon):
        moved = self._own_perturbation(gradient) + epsilon * tf.sign(gradient)
        moved = whole_batch(tf.clip_by_value(moved, -epsilon, epsilon))
        rest = self.perturbation.value[tf.shape(moved)[0] :]
        self.perturbation.assign(tf.concat([moved, rest], axis=0))

    def _random_numbers(self, distribution, images, shape, step, draw):
        """Numbers of a shape for each image: "normal", "uniform" on [-1, 1), "unit" on [0, 1).

        They depend on the seed, the step and the image's place in the whole batch, so every
        replica draws all of them and keeps its own: a millisecond for a batch of MNIST. They are
        float32 numbers in either precision.
        """
        shape = (tf.shape(images)[0] * _num_replicas(), *shape)
        seed = self._random_seed(step, draw)
        if distribution == "normal":
            numbers = tf.random.stateless_normal(shape, seed)
        else:
            lower = -1.0 if distribution == "uniform" else 0.0
            numbers = tf.random.stateless_uniform(shape, seed, lower, 1.0)
        return tf.cast(own_slice(numbers), self.precision)

    def _random_seed(self, step, draw):
        """A seed of its own for each step and each of its draws."""
        return tf.random.experimental.stateless_fold_in(
            tf.stack([tf.constant(self.seed, tf.int64), step]), draw
        )

    def _track(self, measures, batch_size):
        for tracker in self._trackers:
            tracker.update_state(measures[tracker.name], sample_weight=batch_size)
        return {tracker.name: tracker.result() for tracker in self._trackers}


def random_crop_and_flip(images, draws):
    """Pad by 2 pixels a side with zeros, crop back at random, flip half of the images.

    Args:
        images: (B, H, W, C) float.
        draws: (B, 3) float, uniform on [0, 1): row, column and flip of each image.

    Returns:
        (B, H, W, C) float.

    Source:
        MadryLab cifar10_challenge `cifar10_input.py` (32 -> 36 -> 32).
    """
    height, width = tf.unstack(tf.shape(images)[1:3])
    padded = tf.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]])
    offsets = tf.cast(draws[:, :2] * 5.0, tf.int32)
    rows = offsets[:, :1] + tf.range(height)
    columns = offsets[:, 1:] + tf.range(width)
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    cropped = tf.gather(cropped, columns, axis=2, batch_dims=1)
    flip = tf.reshape(draws[:, 2] < 0.5, (-1, 1, 1, 1))
    return tf.where(flip, tf.reverse(cropped, axis=[2]), cropped)


def _check_ramp(ramp_steps: int) -> None:
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps must be at least 0; got {ramp_steps}.")


def _num_replicas() -> int:
    return tf.distribute.get_replica_context().num_replicas_in_sync


def _measures(terms, logits, labels):
    logits = tf.cast(logits, tf.float32)
    return {
        "total": terms.total,
        "xent": terms.cross_entropy,
        "penalty": terms.penalty,
        "accuracy": 1.0 - tf.reduce_mean(tf.cast(is_fooled(logits, labels), tf.float32)),
        "mean_logit_norm": tf.reduce_mean(tf.norm(logits, axis=-1)),
    }
