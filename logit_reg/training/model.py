"""One training step: noise, adversary, objective, update."""

import dataclasses
import functools
import inspect
import math
import re
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.attack import is_fooled, only_output
from logit_reg.attacks.engine.checks import probabilities
from logit_reg.attacks.engine.inference_copy import following_copy
from logit_reg.attacks.pgd import PGD
from logit_reg.objectives import Objective, class_indices, label_error
from logit_reg.threat import ThreatModel
from logit_reg.training.distribution import average, own_slice, whole_batch

BATCH_NORM_MODES = ("evaluation", "training")

FREE_GRADIENT = "with respect to the perturbation"
"""How free adversarial training differentiates; it once did so after the clip."""

# What separates the random numbers of one step's several draws.
_NOISE, _START, _RADIUS, _CROP = range(4)
# Share of the pixel range by which rounding may leave it.
_ROUNDING = 1e-6
# Images that span less of the pixel range than this are probably in other units.
_NARROW = 0.01
# Images that show whether a network returns logits.
_NUM_SHOWN = 8
# What an assertion of a graph says, a part in each pair of brackets.
_ASSERTED = re.compile(r"assertion failed: (\[.*\])")


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

    @property
    def threat(self) -> ThreatModel:
        """The attack's threat model."""
        return self.attack.threat

    def __post_init__(self):
        _check_ramp(self.ramp_steps)
        if self.batch_norm not in BATCH_NORM_MODES:
            raise ValueError(
                f"batch_norm must be one of {', '.join(BATCH_NORM_MODES)}; got {self.batch_norm!r}."
            )


@dataclasses.dataclass(frozen=True)
class FreeAdversary:
    """Free adversarial training: one persistent perturbation, updated with every weight update.

    The gradient of one backward pass serves the weights and the perturbation. It is taken with
    respect to the perturbation, so it is 0 where the image with it leaves the pixel range: such a
    pixel of the perturbation stays as it is.

    Each minibatch has to come several times in a row ("replays"): that is the data's business;
    `loop.py` does it, and a data set for `fit` has to repeat its batches.

    Source:
        Shafahi et al. 2019, arXiv:1904.12843, and the authors' `free_train.py`: step size
        epsilon, never reset, one crop for all replays. Deviation: the ramp is ours: on MNIST, at
        .3 from the first step on, the network stays at chance.
    """

    threat: ThreatModel
    """An linf threat model."""
    batch_size: int
    """Images of the persistent perturbation; a smaller batch uses its first ones."""
    ramp_steps: int = 0
    """Number of training steps over which epsilon, and the step with it, grows from 0 linearly."""
    replays: int = 1
    """How many steps in a row come with the same minibatch; they share its random crop."""

    def __post_init__(self):
        _check_ramp(self.ramp_steps)
        if self.replays < 1:
            raise ValueError(f"replays must be at least 1; got {self.replays}.")
        if self.threat.norm != "linf":
            raise ValueError(
                f"free adversarial training is defined in linf; got norm {self.threat.norm!r}."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")


class RegularizedModel(keras.Model):
    """A network with a training step that regularises its logits.

    Works with `compile`, `fit`, `evaluate`, `predict` and Keras' callbacks, and in `loop.train`.
    Calling it calls the network. `loss` in Keras' logs is `total`, what is minimised, weight decay
    and the network's own losses (`kernel_regularizer`, `add_loss`) included. Keras' ways to weigh
    images and to add losses or metrics are refused; XLA (`jit_compile`) is not used, because it
    leaves out the checks of labels and images.

    Under a `tf.distribute` strategy each replica trains on an equal part of the batch, and the
    step is that of one process: the objective is that of the whole batch, and an image's random
    numbers belong to its place in the whole batch. BatchNorm is the exception: each replica
    normalises with the statistics of its own part, and the moving averages are the mean over the
    replicas.

    Precision:
        Everything is float64 if the network's variables are, else float32. The layers of the
        network may compute in less; where any does so in float16, `compile` wraps the optimiser
        in Keras' `LossScaleOptimizer`.

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
                pixel units (the paper: .5 on MNIST, 20 on CIFAR); a warning above the pixel range.
            clip_noise: clip noisy images to the bounds (the paper does not say; Mosbach et al.
                do).
            bounds: lowest and highest pixel value; images that leave them are refused.
            adversary: what replaces the images by adversarial ones; noise comes on top. Its
                threat model has the same bounds.
            augment: pad by 2 pixels a side, crop at random and flip, as the CIFAR-10 challenge.
            weight_decay: weight of the sum of half the squared norms of all kernels (not biases,
                not BatchNorm), added to the total: the challenge's coupled weight decay.
            seed: source of all random numbers of training.

        Raises:
            ValueError: if a number is out of range, the adversary has other bounds, or the
                network's variables are float16.
        """
        if network.variable_dtype == "float16":
            raise ValueError(
                "float16 variables lose the updates of training; build the network under "
                "keras.config.set_dtype_policy('mixed_float16'), which keeps them in float32."
            )
        # The network converts its own input.
        super().__init__(name="regularized_model", dtype=_dtype_policy(network), autocast=False)
        if not (math.isfinite(noise_stddev) and noise_stddev >= 0):
            raise ValueError(f"noise_stddev must be at least 0; got {noise_stddev}.")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0; got {weight_decay}.")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be increasing; got {bounds}.")
        if adversary is not None:
            _check_threat(adversary.threat, bounds)
        if noise_stddev > bounds[1] - bounds[0]:
            _warn_of_units("noise_stddev", noise_stddev, bounds)
        # XLA drops assertions without a word.
        self.supports_jit = False
        self.network = network
        self.objective = objective
        self.noise_stddev = noise_stddev
        self.clip_noise = clip_noise
        self.bounds = tuple(bounds)
        slack = _ROUNDING * (bounds[1] - bounds[0])
        self._accepted = (bounds[0] - slack, bounds[1] + slack)
        self.adversary = adversary
        self.augment = augment
        self.weight_decay = weight_decay
        self.seed = seed
        self.precision = "float64" if network.variable_dtype == "float64" else "float32"
        if isinstance(adversary, PGDAdversary):
            self._attacked_fn = following_copy(network)
        self.perturbation: Any = None
        if isinstance(adversary, FreeAdversary):
            shape = (adversary.batch_size, *_image_shape(network))
            # State of training, not a weight of the network: it is saved with the checkpoint only.
            self.perturbation = self.add_weight(
                name="perturbation",
                shape=shape,
                initializer="zeros",
                dtype=self.precision,
                trainable=False,
            )
        self._replays = adversary.replays if isinstance(adversary, FreeAdversary) else 1
        self.num_classes: int | None = None
        """K; None until images are seen, where the network does not know their shape."""
        self._trackers = [
            keras.metrics.Mean(name=name)
            for name in (
                "loss",
                "total",
                "xent",
                "penalty",
                "regularization",
                "accuracy",
                "mean_logit_norm",
            )
        ]
        # Seen when the network is first called in training.
        self._has_own_losses = False
        self.built = True
        self._count_classes(_known_shape(network))

    def call(self, images, training=None):
        """Logits of the network."""
        return self.network(images, training=training)

    @property
    def metrics(self):
        """Running means that `fit` shows."""
        return [
            tracker
            for tracker in self._trackers
            if tracker.name != "regularization" or self._has_own_losses
        ]

    def compile(self, *args, **kwargs):
        """Choose the optimiser; see `keras.Model.compile`.

        Raises:
            ValueError: if a loss or a metric is given.
        """
        given = inspect.signature(super().compile).bind(*args, **kwargs).arguments
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if given.get(name) is not None:
                raise ValueError(
                    f"leave {name} out of compile: the objective is the loss, and the logs have "
                    f"its terms, accuracy and mean_logit_norm."
                )
        super().compile(*args, **kwargs)

    def fit(self, x=None, y=None, *args, **kwargs):
        """Train; see `keras.Model.fit`. Arrays are checked before the first step.

        Raises:
            ValueError: if a label is no class, an image leaves the bounds, or weights of images
                or classes are given.
        """
        given = inspect.signature(super().fit).bind(x, y, *args, **kwargs).arguments
        validation = given.get("validation_data")
        shape = x.shape[1:] if isinstance(x, np.ndarray | tf.Tensor) else _known_shape(self.network)
        self._count_classes(shape)
        self._check_logits(shape)
        for pair in ((x, y), validation if isinstance(validation, tuple | list) else ()):
            self._check_arrays(*pair[:2])
        return super().fit(x, y, *args, **kwargs)

    def make_train_function(self, force=False):
        """Make the function that takes steps; its assertions raise one line."""
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function: Any = _in_one_line(self.train_function)

    def make_test_function(self, force=False):
        """Make the function that evaluates batches; its assertions raise one line."""
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function: Any = _in_one_line(self.test_function)

    def save(self, filepath, *args, **kwargs):
        """Save the network alone, as `model.network.save` does; `ModelCheckpoint` calls this.

        Keras loads the file without this project, in safe mode where the network has stock layers
        only. It does not hold the optimiser, nor the perturbation of free adversarial training: to
        go on with training, keep `save_weights` or use Keras' `BackupAndRestore`.
        """
        self.network.save(filepath, *args, **kwargs)

    def export(self, filepath, *args, **kwargs):
        """Export the network alone, as `model.network.export` does."""
        self.network.export(filepath, *args, **kwargs)

    def get_config(self):
        """Refuse; see `save`."""
        raise NotImplementedError(
            "a RegularizedModel cannot be rebuilt from a file; save its network with "
            "model.save(path) or model.network.save(path)."
        )

    def train_step(self, data):
        """Take one optimiser step on a batch and return the running means.

        Args:
            data: (images (B, H, W, C) in pixel units, labels (B,) or (B, 1) int).

        Returns:
            A dict of () tensors: total and, the same for Keras' callbacks, loss; xent (plain, on
            hard labels), penalty (before beta), regularization (if the network has losses of its
            own), accuracy and mean_logit_norm, all on the images that were trained on.
        """
        images, labels = self._checked(data)
        return self._track(self.update(images, labels), tf.shape(images)[0])

    def test_step(self, data):
        """Evaluate a batch without noise or adversary; see `train_step`."""
        images, labels = self._checked(data)
        _, measures = self._loss_and_measures(images, whole_batch(labels), training=False)
        return self._track(measures, tf.shape(images)[0])

    def update(self, images, labels) -> dict:
        """Take one optimiser step; the measures of this batch alone.

        Args:
            images: (B, H, W, C) in pixel units; under a strategy this replica's part of the batch.
            labels: (B,) or (B, 1) int, each in 0 ... K-1; inside a trace the caller sees to that.

        Returns:
            A dict of () tensors with the keys of `train_step`, of the whole batch.
        """
        step = tf.cast(self.optimizer.iterations, tf.int64)
        images = tf.cast(images, self.precision)
        labels = class_indices(labels, self.num_classes)
        if self.augment:
            draws = self._random_numbers("unit", images, (3,), step // self._replays, _CROP)
            images = random_crop_and_flip(images, draws)
        if isinstance(self.adversary, PGDAdversary):
            images = self._attack(self.adversary, images, labels, step)

        variables = self.network.trainable_variables
        sources = [variable.value for variable in variables]
        all_labels = whole_batch(labels)
        with tf.GradientTape() as tape:
            if isinstance(self.adversary, FreeAdversary):
                perturbation = self._own_perturbation(images)
                tape.watch(perturbation)
                sources.append(perturbation)
                images = tf.clip_by_value(images + perturbation, *self.bounds)
            images = self._add_noise(images, step)
            loss, measures = self._loss_and_measures(images, all_labels, training=True)
            # Against underflow in float16; `apply` divides by it.
            loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, sources)
        if isinstance(self.adversary, FreeAdversary):
            scale = self._ramp(self.adversary, step)
            self._move_perturbation(gradients.pop(), scale * self.adversary.threat.epsilon)
        self.optimizer.apply(gradients, variables)
        if _num_replicas() > 1:
            averages = self._moving_averages
            for variable, mean in zip(averages, average([v.value for v in averages]), strict=True):
                variable.assign(mean)
        return measures

    # No attributes: Keras would list them as the wrapper's own variables, before the others, and
    # optimisers and files would then disagree about the order.
    @property
    def _kernels(self):
        return [v for v in self.network.trainable_variables if v.name == "kernel"]

    @property
    def _moving_averages(self):
        variables = self.network.non_trainable_variables
        return [v for v in variables if tf.as_dtype(v.dtype).is_floating]

    def _loss_and_measures(self, images, labels, *, training):
        """What is minimised, and what is logged.

        Args:
            images: (B, H, W, C) float, this replica's part of the batch.
            labels: () int64 of the whole batch.
            training: mode of the network.

        Returns:
            The () loss of this replica, of which the optimiser sums the gradients over the
            replicas, and the measures of the whole batch; see `update`.
        """
        logits = whole_batch(only_output(self.network(images, training=training)))
        own_losses = self.network.losses
        terms = self.objective(logits, labels)
        total = loss = terms.total
        if self.weight_decay:
            decay = self.weight_decay * sum(tf.nn.l2_loss(kernel) for kernel in self._kernels)
            total += decay
            # The optimiser sums over the replicas, and each one sees the whole decay.
            loss += decay / _num_replicas()
        measures = {"xent": terms.cross_entropy, "penalty": terms.penalty}
        self._has_own_losses = bool(own_losses)
        if own_losses:
            # Of weights, the same on all replicas, or means over this replica's images.
            regularization = tf.add_n([tf.cast(one, total.dtype) for one in own_losses])
            loss += regularization / _num_replicas()
            (measures["regularization"],) = average([regularization])
            total += measures["regularization"]
        logits = tf.cast(logits, tf.float32)
        return loss, measures | {
            "total": total,
            "accuracy": 1.0 - tf.reduce_mean(tf.cast(is_fooled(logits, labels), tf.float32)),
            "mean_logit_norm": tf.reduce_mean(tf.norm(logits, axis=-1)),
        }

    def _checked(self, data):
        """Images and labels of a batch of any source; wrong ones are an error in the graph."""
        images, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        if weights is not None:
            raise ValueError(
                "sample_weight and class_weight are refused: the penalty is of the batch as a "
                "whole; repeat or leave out images instead."
            )
        if labels is None:
            raise ValueError("labels are missing; pass images and labels, or a data set of both.")
        images = tf.cast(_only_tensor("images", images), self.precision)
        if not images.shape[1:].is_fully_defined():
            # Random numbers are drawn in a static shape.
            images = tf.ensure_shape(images, (None, *_image_shape(self.network)))
        self._count_classes(images.shape[1:])
        given = tf.convert_to_tensor(_only_tensor("labels", labels))
        if given.shape.rank is None:
            given = tf.reshape(given, (-1,))
        labels = class_indices(given, self.num_classes)
        is_right = [
            _require(
                tf.equal(tf.size(labels), tf.shape(images)[0]),
                *("labels must be one an image; got", tf.size(labels)),
                *("for", tf.shape(images)[0], "images"),
            ),
            _require(
                # Of every pixel, so that a NaN is seen.
                tf.reduce_all((images >= self._accepted[0]) & (images <= self._accepted[1])),
                *self._bounds_error(tf.reduce_min(images), tf.reduce_max(images)),
            ),
        ]
        if self.num_classes is not None:
            is_class = (labels >= 0) & (labels < self.num_classes)
            first = tf.boolean_mask(tf.reshape(given, (-1,)), ~is_class)[:1]
            error = label_error(self.num_classes)
            is_right.append(_require(tf.reduce_all(is_class), error, first))
        with tf.control_dependencies(is_right):
            return tf.identity(images), tf.identity(labels)

    def _bounds_error(self, lowest, highest):
        lower, upper = self.bounds
        return (
            *("images span", lowest, "to", highest),
            f"and leave the bounds of the model, {lower:g} to {upper:g}; scale the images, or "
            f"give RegularizedModel their bounds",
        )

    def _count_classes(self, shape):
        """Learn K from the network, for images of a shape, (H, W, C) or None."""
        if self.num_classes is None and shape is not None:
            image = keras.KerasTensor((None, *shape), self.precision)
            self.num_classes = only_output(self.network(image, training=False)).shape[-1]
            if self.num_classes == 1:
                raise ValueError(
                    "the network returns 1 logit an image, expected one for each class, at least 2."
                )

    def _check_logits(self, shape):
        """Warn if the network has a softmax, for images of a shape, (H, W, C) or None."""
        if shape is None:
            return
        lower, upper = self.bounds
        images = np.random.default_rng(0).uniform(lower, upper, (_NUM_SHOWN, *shape))
        images = tf.constant(images, self.precision)
        outputs = np.asarray(only_output(self.network(images, training=False)), np.float64)
        if probabilities(outputs) is not None:
            warnings.warn(
                "the network returns probabilities, expected logits: the objective takes the "
                "softmax itself; leave it out of the network.",
                stacklevel=3,
            )

    def _check_arrays(self, images=None, labels=None):
        """Check what is at hand as an array, all of it at once."""
        if isinstance(labels, np.ndarray | tf.Tensor):
            class_indices(labels, self.num_classes)
        if isinstance(images, np.ndarray | tf.Tensor) and len(images):
            lowest, highest = np.min(images), np.max(images)
            is_inside = self._accepted[0] <= lowest and highest <= self._accepted[1]
            _require(is_inside, *self._bounds_error(lowest, highest))
            lower, upper = self.bounds
            if highest - lowest < _NARROW * (upper - lower):
                warnings.warn(
                    f"images span {lowest:g} to {highest:g} of the bounds of the model, "
                    f"{lower:g} to {upper:g}: are they in other pixel units?",
                    stacklevel=3,
                )

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
        own_size = images.shape[0] or tf.shape(images)[0]
        size = own_size * _num_replicas()
        most = self.perturbation.shape[0]
        fits = _require(
            size <= most,
            f"free adversarial training keeps a perturbation of {most} images; the batch has",
            size,
        )
        with tf.control_dependencies([fits]):
            return own_slice(self.perturbation.value[:size])

    def _move_perturbation(self, gradient, epsilon):
        # A step that overflows in float16 is left out: it must not spoil the perturbation.
        gradient = tf.where(tf.math.is_finite(gradient), gradient, 0.0)
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
        measures = measures | {"loss": measures["total"]}
        for tracker in self.metrics:
            tracker.update_state(measures[tracker.name], sample_weight=batch_size)
        return {tracker.name: tracker.result() for tracker in self.metrics}


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
    cropped = tf.ensure_shape(tf.gather(cropped, columns, axis=2, batch_dims=1), images.shape)
    flip = tf.reshape(draws[:, 2] < 0.5, (-1, 1, 1, 1))
    return tf.where(flip, tf.reverse(cropped, axis=[2]), cropped)


def _check_ramp(ramp_steps: int) -> None:
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps must be at least 0; got {ramp_steps}.")


def _num_replicas() -> int:
    return tf.distribute.get_replica_context().num_replicas_in_sync


def _dtype_policy(network: keras.Model):
    """The policy for which Keras wraps the optimiser as the network's layers need it."""
    layers = network._flatten_layers()  # `layers` would leave out nested ones
    is_half = any(layer.compute_dtype == "float16" for layer in layers)
    return "mixed_float16" if is_half else network.dtype_policy


def _check_threat(threat: ThreatModel, bounds) -> None:
    if (threat.lower, threat.upper) != tuple(bounds):
        raise ValueError(
            f"the adversary's threat model has bounds {threat.lower:g} to {threat.upper:g}, the "
            f"model {bounds[0]:g} to {bounds[1]:g}; give both the pixel range of the images."
        )
    span = bounds[1] - bounds[0]
    if threat.norm == "linf" and not span / 1000 <= threat.epsilon < span:
        _warn_of_units("epsilon", threat.epsilon, bounds)


def _warn_of_units(name: str, value: float, bounds) -> None:
    warnings.warn(
        f"{name} {value:g} is in the images' pixel units, which are {bounds[0]:g} to "
        f"{bounds[1]:g} here; is it meant for another pixel range?",
        stacklevel=4,
    )


def _known_shape(network: keras.Model) -> tuple[int, ...] | None:
    """(H, W, C) of a network's images, or None where it does not know all of it."""
    shape = getattr(network, "input_shape", None)
    if isinstance(shape, list | dict) and len(shape) == 1:
        (shape,) = shape.values() if isinstance(shape, dict) else shape
    if not isinstance(shape, tuple) or None in shape[1:]:
        return None
    return shape[1:]


def _image_shape(network: keras.Model) -> tuple[int, ...]:
    shape = _known_shape(network)
    if shape is None:
        raise ValueError(
            "the network does not know the shape of its images: with image = keras.Input((H, W, "
            "C)), give keras.Model(image, network(image))."
        )
    return shape


def _only_tensor(name: str, value):
    """One dense tensor, out of a dictionary or list of one."""
    if isinstance(value, dict | list | tuple) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | tf.RaggedTensor | tf.SparseTensor):
        kind = f"{len(value)} parts" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be one dense tensor; got {kind}.")
    return value


def _require(is_right, *parts):
    """Raise the parts, texts and numbers, in one line: here, or by an assertion of the graph."""
    if tf.is_symbolic_tensor(is_right):
        return tf.debugging.Assert(is_right, list(parts))
    if not is_right:
        words = (part if isinstance(part, str) else f"{np.squeeze(part)}" for part in parts)
        raise ValueError(f"{' '.join(words)}.")
    return tf.no_op()


def _in_one_line(function):
    """A function that raises a graph's failed assertion as a `ValueError` of one line."""

    @functools.wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except tf.errors.InvalidArgumentError as error:
            asserted = _ASSERTED.search(error.message)
            if asserted is None:
                raise
            words = re.findall(r"\[(.*?)\]", asserted[1])
            raise ValueError(f"{' '.join(words)}.") from None

    return wrapper
