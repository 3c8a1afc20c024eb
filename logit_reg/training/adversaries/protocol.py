"""What a training step asks of an adversary, and what it tells it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import keras
import tensorflow as tf

from logit_reg.threat import ThreatModel
from logit_reg.training.random_numbers import StepNumbers


@dataclasses.dataclass(frozen=True)
class Batch:
    """A training step before its update, as an adversary sees it.

    Under a `tf.distribute` strategy images and labels are this replica's equal part of the batch;
    `distribution.whole_batch` gathers what concerns all of it.
    """

    images: Any
    """(B, H, W, C) float32 or float64 in pixel units: after the random crop, before noise."""
    labels: Any
    """(B,) int64."""
    step: Any
    """() int64: how many optimiser steps were taken before this one."""
    network: keras.Model
    """Images -> logits (B, K); its mode is that of the call."""
    objective: Callable
    """What is minimised; see `objectives.Objective`."""
    numbers: StepNumbers
    """Random numbers of this step, for each image its own."""
    state: Any
    """What the adversary's `create_state` returned."""
    beta_scale: Any = 1.0
    """() share of beta in this step."""
    clean_logits: Any = None
    """(B, K) of the whole batch, noise included, in training mode, where the adversary or the
    objective wants them; no gradient flows into them."""

    def ramp(self, ramp_steps: int):
        """() fraction of its budget that an adversary has in this step.

        Args:
            ramp_steps: number of steps over which it grows from 0 linearly; 0 for all at once.
        """
        full = tf.constant(1.0, self.images.dtype)
        if not ramp_steps:
            return full
        return tf.minimum(full, tf.cast(self.step + 1, self.images.dtype) / ramp_steps)


class Adversary(Protocol):
    """What finds the images that a training step trains on.

    A frozen dataclass that inherits from this one; what it does not define is as with no adversary
    at all. Its fields are its settings, in pixel units. A step calls, in this order: `find`; inside
    the gradient tape `images`; and `learn`, if `learns`. All are traced into one graph.
    """

    threat: ThreatModel | None
    """What it may do to an image; checked against the bounds of the model."""
    replays: int = 1
    """How many steps in a row train on the same minibatch, with the same random crop; the loop
    and `feeding.replayed` see to it."""
    learns: ClassVar[bool] = False
    """Whether it wants the gradient of the loss with respect to what it found."""
    wants_clean_logits: ClassVar[bool] = False
    """Whether `find` needs `Batch.clean_logits`. Their forward pass comes first: the network's own
    losses (`add_loss`) are of the last. The objective has an attribute of this name as well."""

    @property
    def description(self) -> str:
        """The method in two or three words, for tables and names of runs."""
        return ""

    @property
    def rules(self) -> Mapping[str, str]:
        """What an earlier version computed otherwise, for run.json.

        A run that it began does not go on bit-exactly.
        """
        return {}

    @property
    def cost(self) -> tuple[int, int]:
        """Forward and backward passes of a batch in a step, those of the update included.

        An objective that wants clean logits adds a backward and, where the adversary does not want
        them, a forward.
        """
        return 1, 1

    @classmethod
    def usual_steps(cls, challenge: Any) -> int | None:
        """How many steps its authors train for; None for as many as the challenge does."""
        del challenge
        return None

    @classmethod
    def defaults(
        cls, challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
    ) -> dict[str, Any]:
        """Settings of a run where the user gives none.

        Args:
            challenge: the challenge whose images they are: a record with `epsilon`, `training` and
                `paper`, in pixel units.
            given: what is known of the settings of the run, `max_num_training_steps` included.
            is_challenge_config: everything that is not given is the challenge's own training.

        Returns:
            Values by field of `experiments.settings.RunSettings`.
        """
        del challenge, given, is_challenge_config
        return {}

    @classmethod
    def from_settings(cls, settings: Any) -> "Adversary":
        """The adversary of a run.

        Args:
            settings: an `experiments.settings.RunSettings`; of its flags the ones that
                `ADVERSARIES` lists are read.
        """
        del settings
        return cls()

    def create_state(self, model: Any) -> Any:
        """What it keeps from one step to the next.

        Args:
            model: the `RegularizedModel`, not compiled yet; its `add_weight` makes variables and
                its `precision` is their dtype.

        Returns:
            What `Batch.state` is in each step.
        """
        del model

    def variables(self, state: Any) -> tuple:
        """Those variables of its state that a checkpoint holds, in a fixed order."""
        del state
        return ()

    def find(self, batch: Batch) -> Any:
        """Look for images; not seen by the gradient of the update.

        Returns:
            A tensor for `images`: the adversarial images, or what they are made of.
        """
        return batch.images

    def images(self, batch: Batch, found: Any) -> Any:
        """The images to train on, as a function of what was found.

        Returns:
            (B, H, W, C) in pixel units; noise comes on top.
        """
        del batch
        return found

    def learn(self, batch: Batch, found: Any, gradient: Any) -> None:
        """Update the state; called only if `learns`.

        Args:
            batch: see `Batch`.
            found: what `find` returned.
            gradient: of the loss with respect to `found`, of its shape. Under a loss scale it is
                scaled, and not finite where a step overflows.
        """
        del batch, found, gradient


def check_ramp(ramp_steps: int) -> None:
    """Check a number of steps.

    Raises:
        ValueError: if it is negative.
    """
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps must be at least 0; got {ramp_steps}.")


def default_ramp(
    challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
) -> dict[str, int]:
    """The ramp of the images on which short adversarial training learns nothing without one.

    Args:
        challenge: see `Adversary.defaults`, as the others.
        given: likewise.
        is_challenge_config: likewise; the challenges have no ramp.

    Returns:
        `ramp_steps`, a tenth of the training, or nothing.
    """
    if is_challenge_config or not challenge.paper.needs_ramp:
        return {}
    return {"ramp_steps": given["max_num_training_steps"] // 10}
