"""A network with a training step: adversary, noise, objective, update."""

import dataclasses
import inspect
import math
from typing import Any

import keras
import tensorflow as tf

from logit_reg.attacks.engine.forward import only_output
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.objectives import Objective, class_indices
from logit_reg.training.adversaries.none import NoAdversary
from logit_reg.training.adversaries.protocol import Adversary, Batch
from logit_reg.training.augmentation import random_crop_and_flip
from logit_reg.training.beta_schedule import CONSTANT, BetaSchedule
from logit_reg.training.distribution import average, num_replicas, whole_batch
from logit_reg.training.inputs import InputCheck, check_units, in_one_line
from logit_reg.training.random_numbers import CROP, NOISE, StepNumbers

_MEASURES = (
    "loss",
    "total",
    "xent",
    "penalty",
    "regularization",
    "accuracy",
    "mean_logit_norm",
)


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

    # Keras sets them.
    train_function: Any
    test_function: Any

    def __init__(
        self,
        network: keras.Model,
        objective: Objective,
        *,
        sigma: float = 0.0,
        clip_noise: bool = True,
        bounds: tuple[float, float],
        adversary: Adversary | None = None,
        augment: bool = False,
        weight_decay: float = 0.0,
        beta_schedule: BetaSchedule = CONSTANT,
        seed: int = 0,
    ):
        """Wrap a network for training.

        Args:
            network: images (N, H, W, C) in pixel units -> logits (N, K).
            objective: what is minimised.
            sigma: standard deviation of the Gaussian noise added to every training image, pixel
                units (the paper: 0.5 on MNIST, 20 on CIFAR); a warning above the pixel range.
            clip_noise: clip noisy images to the bounds (the paper does not say; Mosbach et al.
                do).
            bounds: lowest and highest pixel value; images that leave them are refused.
            adversary: what replaces the images by adversarial ones, see `adversaries`; noise
                comes on top. Its threat model has the same bounds.
            augment: pad by 2 pixels a side, crop at random and flip, as the CIFAR-10 challenge.
            weight_decay: weight of the sum of half the squared norms of all kernels (not biases,
                not BatchNorm), added to the total: the challenge's coupled weight decay.
            beta_schedule: how the objective's beta changes while it trains.
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
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be at least 0; got {sigma}.")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0; got {weight_decay}.")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be increasing; got {bounds}.")
        self.adversary = adversary or NoAdversary()
        check_units(bounds, self.adversary.threat, sigma)
        # XLA drops assertions without a word.
        self.supports_jit = False
        self.network = network
        self.objective = objective
        self.sigma = sigma
        self.clip_noise = clip_noise
        self.bounds = tuple(bounds)
        self.augment = augment
        self.weight_decay = weight_decay
        self.beta_schedule = beta_schedule
        self.seed = seed
        self.precision = "float64" if network.variable_dtype == "float64" else "float32"
        self._inputs = InputCheck(network, bounds, self.precision)
        self.adversary_state: Any = self.adversary.create_state(self)
        self._trackers = [keras.metrics.Mean(name=name) for name in _MEASURES]
        # Seen when the network is first called in training.
        self._has_own_losses = False
        self.built = True

    def call(self, images, training=None):
        """Logits of the network."""
        return self.network(images, training=training)

    @property
    def num_classes(self) -> int | None:
        """K; None until images are seen, where the network does not know their shape."""
        return self._inputs.num_classes

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
        self._inputs.of_network(x)
        for pair in ((x, y), validation if isinstance(validation, tuple | list) else ()):
            self._inputs.of_arrays(*pair[:2])
        return super().fit(x, y, *args, **kwargs)

    def make_train_function(self, force=False):
        """Make the function that takes steps; its assertions raise one line."""
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function: Any = in_one_line(self.train_function)

    def make_test_function(self, force=False):
        """Make the function that evaluates batches; its assertions raise one line."""
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function: Any = in_one_line(self.test_function)

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
            own), accuracy and mean_logit_norm, on the images that were trained on; xent is that of
            the clean images where the objective compares both.
        """
        images, labels = self._inputs.of_batch(data)
        return self._track(self.update(images, labels), tf.shape(images)[0])

    def test_step(self, data):
        """Evaluate a batch without noise or adversary; see `train_step`."""
        images, labels = self._inputs.of_batch(data)
        logits, own_losses = self._forward(images, training=False)
        batch = self._batch(images, labels, augment=False)
        # Nothing was attacked: a pair is twice the same.
        measures = self._loss_and_measures(
            logits, own_losses, batch, whole_batch(batch.labels), logits
        )[1]
        return self._track(measures, tf.shape(images)[0])

    def update(self, images, labels) -> dict:
        """Take one optimiser step; the measures of this batch alone.

        Args:
            images: (B, H, W, C) in pixel units; under a strategy this replica's part of the batch.
            labels: (B,) or (B, 1) int, each in 0 ... K-1; inside a trace the caller sees to that.

        Returns:
            A dict of () tensors with the keys of `train_step`, of the whole batch.
        """
        batch = self._batch(images, labels)
        labels = whole_batch(batch.labels)
        variables = self.network.trainable_variables
        sources = [variable.value for variable in variables]
        with tf.GradientTape() as tape:
            clean = None
            if self._pairs or self.adversary.wants_clean_logits:
                noisy_clean = self._add_noise(batch.images, batch.numbers)
                clean, _ = self._forward(noisy_clean, training=True)
                batch = dataclasses.replace(batch, clean_logits=tf.stop_gradient(clean))
            with tape.stop_recording():
                found = self.adversary.find(batch)
            if self.adversary.learns:
                tape.watch(found)
                sources.append(found)
            noisy = self._add_noise(self.adversary.images(batch, found), batch.numbers)
            logits, own_losses = self._forward(noisy, training=True)
            loss, measures = self._loss_and_measures(logits, own_losses, batch, labels, clean)
            # Against underflow in float16; `apply` divides by it.
            loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, sources)
        if self.adversary.learns:
            self.adversary.learn(batch, found, gradients.pop())
        self.optimizer.apply(gradients, variables)
        self._average_over_replicas()
        return measures

    @property
    def adversary_variables(self) -> tuple:
        """The adversary's variables, which a checkpoint of training holds; see `Adversary`."""
        return self.adversary.variables(self.adversary_state)

    @property
    def _pairs(self) -> bool:
        """Whether the objective compares with the clean logits; any function can be one."""
        return getattr(self.objective, "wants_clean_logits", False)

    def _batch(self, images, labels, *, augment: bool | None = None) -> Batch:
        """What the adversary sees of a batch."""
        step = tf.cast(self.optimizer.iterations, tf.int64)
        images = tf.cast(images, self.precision)
        labels = class_indices(labels, self.num_classes)
        numbers = StepNumbers(self.seed, step, tf.shape(images)[0], self.precision)
        if self.augment if augment is None else augment:
            # One crop for all replays of a minibatch.
            draws = numbers.of_step(step // self.adversary.replays).unit(CROP, (3,))
            images = random_crop_and_flip(images, draws)
        return Batch(
            images,
            labels,
            step,
            self.network,
            self.objective,
            numbers,
            self.adversary_state,
            self.beta_schedule(step),
        )

    def _add_noise(self, images, numbers: StepNumbers):
        if not self.sigma:
            return images
        images += self.sigma * numbers.normal(NOISE, images.shape[1:])
        return tf.clip_by_value(images, *self.bounds) if self.clip_noise else images

    def _forward(self, images, *, training):
        """(B, K) logits of the whole batch, of which every replica computes its part, and the
        network's own losses of this replica's part.
        """
        logits = only_output(self.network(images, training=training))
        # Before anything is exchanged: another replica's call would put its own in their place.
        own_losses = self.network.losses
        return whole_batch(logits), own_losses

    def _average_over_replicas(self) -> None:
        """Give the moving averages of BatchNorm the mean over the replicas."""
        if num_replicas() > 1:
            averages = self._moving_averages
            for variable, mean in zip(averages, average([v.value for v in averages]), strict=True):
                variable.assign(mean)

    # No attributes: Keras would list them as the wrapper's own variables, before the others, and
    # optimisers and files would then disagree about the order.
    @property
    def _kernels(self):
        return [v for v in self.network.trainable_variables if v.name == "kernel"]

    @property
    def _moving_averages(self):
        variables = self.network.non_trainable_variables
        return [v for v in variables if tf.as_dtype(v.dtype).is_floating]

    def _loss_and_measures(self, logits, own_losses, batch, labels, clean_logits):
        """What is minimised, and what is logged.

        Args:
            logits: (B, K) of the whole batch.
            own_losses: of the same forward pass; see `_forward`.
            batch: see `Batch`.
            labels: (B,) int64 of the whole batch.
            clean_logits: (B, K) of the whole batch, for an objective that wants them.

        Returns:
            The () loss of this replica, of which the optimiser sums the gradients over the
            replicas, and the measures of the whole batch; see `update`.
        """
        more: dict = {"clean_logits": clean_logits} if self._pairs else {}
        if self.beta_schedule != CONSTANT:
            more["beta_scale"] = batch.beta_scale
        terms = self.objective(logits, labels, **more)
        total = loss = terms.total
        if self.weight_decay:
            decay = self.weight_decay * sum(tf.nn.l2_loss(kernel) for kernel in self._kernels)
            total += decay
            # The optimiser sums over the replicas, and each one sees the whole decay.
            loss += decay / num_replicas()
        measures = {"xent": terms.cross_entropy, "penalty": terms.penalty}
        self._has_own_losses = bool(own_losses)
        if own_losses:
            # Of weights, the same on all replicas, or means over this replica's images.
            regularization = tf.add_n([tf.cast(one, total.dtype) for one in own_losses])
            loss += regularization / num_replicas()
            (measures["regularization"],) = average([regularization])
            total += measures["regularization"]
        logits = tf.cast(logits, tf.float32)
        return loss, measures | {
            "total": total,
            "accuracy": 1.0 - tf.reduce_mean(tf.cast(is_fooled(logits, labels), tf.float32)),
            "mean_logit_norm": tf.reduce_mean(tf.norm(logits, axis=-1)),
        }

    def _track(self, measures, batch_size):
        measures = measures | {"loss": measures["total"]}
        for tracker in self.metrics:
            tracker.update_state(measures[tracker.name], sample_weight=batch_size)
        return {tracker.name: tracker.result() for tracker in self.metrics}


def _dtype_policy(network: keras.Model):
    """The policy for which Keras wraps the optimiser as the network's layers need it."""
    layers = network._flatten_layers()  # `layers` would leave out nested ones
    is_half = any(layer.compute_dtype == "float16" for layer in layers)
    return "mixed_float16" if is_half else network.dtype_policy
