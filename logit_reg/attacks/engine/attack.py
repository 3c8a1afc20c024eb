"""The protocol of an attack, its result and its base class."""

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.examples import Examples, within_bounds
from logit_reg.attacks.engine.forward import LogitsFn
from logit_reg.messages import Finding
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack found for N images."""

    adversarial: np.ndarray
    """(N, H, W, C) float32 pixel units: the first iterate that fools, else the last one."""
    fooled: np.ndarray
    """(N,) bool: misclassified at any iterate, decided in float32; a tie counts as fooled."""
    last_iterate_fooled: np.ndarray
    """(N,) bool: misclassified at the last iterate that the attack made, which is all that the
    challenges' own code counts."""
    forwards: int
    """Images sent forward through the network, padding not counted; a doubtful image that a
    lower precision saw and the network itself sees again counts twice. An iterate that was met
    before counts again, though it is not sent again."""
    backwards: int
    """Images whose gradient was computed, counted likewise."""
    stages: tuple = ()
    """Of an attack that is a cascade: (name, (N,) bool still robust after it), in order."""


class Attack(Protocol):
    """A frozen dataclass of settings that can attack any `logits_fn`.

    An example's random numbers depend on the seed, the attack, the restart and the example's
    index in the data set only: never on the batch, its size or a shard.
    """

    @property
    def threat(self) -> ThreatModel:
        """Norm, budget and pixel range."""
        ...

    def run(
        self,
        logits_fn: LogitsFn,
        images,
        labels,
        *,
        seed: int,
        indices=None,
        restart: int = 0,
        gradient_logits_fn: LogitsFn | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units, within the threat model's bounds.
            labels: (N,) int true classes.
            seed: source of all random numbers.
            indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
            restart: number of the restart, a further source of random numbers.
            gradient_logits_fn: another version of the network (of lower precision, say) to take
                directions from; success is always decided on `logits_fn`.

        Returns:
            An `AttackResult` for the N images.
        """
        ...

    def __call__(self, logits_fn: LogitsFn, images, labels, *, seed: int):
        """Return `run(...).adversarial` as a tensor."""
        ...

    def cost(self) -> tuple[int, int]:
        """Return the most forwards and backwards that one image can take."""
        ...


class ImageAttack:
    """What attacks inherit: `run` with its inputs checked, and the call as a function of images."""

    if TYPE_CHECKING:

        @property
        def threat(self) -> ThreatModel:
            """A field, or what its fields make of it."""
            ...

    def run(
        self,
        logits_fn: LogitsFn,
        images,
        labels,
        *,
        seed: int,
        indices=None,
        restart: int = 0,
        gradient_logits_fn: LogitsFn | None = None,
    ) -> AttackResult:
        """Attack a batch; see `Attack.run`.

        Raises:
            ValueError: if shapes or types do not fit, or an image is outside the bounds.
        """
        examples = self._checked(
            images,
            labels,
            seed=seed,
            indices=indices,
            restart=restart,
            gradient_logits_fn=gradient_logits_fn,
        )
        return self._run(logits_fn, examples)

    def __call__(self, logits_fn: LogitsFn, images, labels, *, seed: int) -> tf.Tensor:
        """Return `run(...).adversarial` as a tensor (N, H, W, C)."""
        return tf.convert_to_tensor(self.run(logits_fn, images, labels, seed=seed).adversarial)

    def _checked(self, images, labels, **options) -> Examples:
        """The arguments of `run` as examples, within the bounds."""
        examples = Examples.checked(images, labels, **options)
        images = within_bounds(examples.images, self.threat.lower, self.threat.upper)
        return dataclasses.replace(examples, images=images)

    def _run(self, logits_fn: LogitsFn, examples: Examples) -> AttackResult:
        """Attack examples that are checked."""
        raise NotImplementedError


@runtime_checkable
class Cascade(Protocol):
    """An attack made of attacks, each for what is still robust after the ones before.

    `logit_reg.evaluation.evaluate` runs each stage on the whole data set before the next one, so
    that batches stay full and a killed evaluation goes on within a stage.
    """

    def attacks(self, num_classes: int) -> dict[str, Attack]:
        """The attacks by name, in order, for a network of so many classes."""
        ...

    def check_num_classes(self, num_classes: int) -> list[Finding]:
        """What so few classes leave out of the cascade."""
        ...


def run_attack(attack: Attack, logits_fn: LogitsFn, examples: Examples) -> AttackResult:
    """Run an attack of any make on examples; it needs to know only the arguments that are set."""
    options: dict[str, Any] = {}
    if examples.restart:
        options["restart"] = examples.restart
    if examples.gradient_logits_fn is not None:
        options["gradient_logits_fn"] = examples.gradient_logits_fn
    return attack.run(
        logits_fn,
        examples.images,
        examples.labels,
        seed=examples.seed,
        indices=examples.indices,
        **options,
    )
