"""Adversarial training on the last iterate of PGD."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logit_reg.attacks.pgd import PGD
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.attacked import attacked_network, check_batch_norm
from logit_reg.training.adversaries.protocol import Adversary, Batch, check_ramp, default_ramp
from logit_reg.training.random_numbers import RADIUS, START

# The attack of "7-step adversarial training".
_NUM_STEPS = 7


@dataclasses.dataclass(frozen=True)
class PGDAdversary(Adversary):
    """Adversarial training on the last iterate of PGD.

    Cost of a step:
        num_steps + 1 forwards and backwards.

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
        check_ramp(self.ramp_steps)
        check_batch_norm(self.batch_norm)

    @property
    def threat(self) -> ThreatModel:  # type: ignore[override]
        """The attack's threat model."""
        return self.attack.threat

    @property
    def description(self) -> str:
        """See `Adversary.description`."""
        return f"{self.attack.num_steps}-step adversarial"

    @property
    def cost(self) -> tuple[int, int]:
        """See `Adversary.cost`."""
        return self.attack.num_steps + 1, self.attack.num_steps + 1

    @classmethod
    def defaults(
        cls, challenge: Any, given: Mapping[str, Any], *, is_challenge_config: bool
    ) -> dict[str, Any]:
        """Return the paper's seven steps, or the challenge's own attack for its config.json."""
        attack = challenge.training.attack
        usual = attack.num_steps if is_challenge_config else _NUM_STEPS
        num_steps = given.get("num_steps", usual)
        return {
            **default_ramp(challenge, given, is_challenge_config=is_challenge_config),
            "num_steps": num_steps,
            "step_size": _step_size(challenge, num_steps),
            "loss_func": attack.loss_func,
        }

    @classmethod
    def from_settings(cls, settings: Any) -> "PGDAdversary":
        """See `Adversary.from_settings`."""
        attack = PGD(
            settings.threat,
            settings.loss_func,
            settings.num_steps,
            settings.step_size,
            random_start=settings.random_start,
        )
        return cls(attack, settings.ramp_steps, settings.attack_batch_norm)

    def create_state(self, model: Any) -> Any:
        """Return the images -> logits that the attack follows."""
        return attacked_network(model.network, self.batch_norm)

    def find(self, batch: Batch) -> Any:
        """Attack the batch."""
        draw = {"uniform": batch.numbers.uniform, "normal": batch.numbers.normal}
        return self.attack.perturb(
            batch.state,
            batch.images,
            batch.labels,
            noise=draw[self.threat.start_noise](START, batch.images.shape[1:]),
            radius=batch.numbers.unit(RADIUS, (1, 1, 1)),
            scale=batch.ramp(self.ramp_steps),
        )


def _step_size(challenge: Any, num_steps: int) -> float:
    """The challenges' own step sizes for their own numbers of steps, else 2.5 epsilon / steps."""
    if num_steps == _NUM_STEPS:
        return challenge.paper.adversarial_step_size
    if num_steps == challenge.training.attack.num_steps:
        return challenge.training.attack.step_size
    return 2.5 * challenge.epsilon / num_steps if num_steps > 0 else 0.0
