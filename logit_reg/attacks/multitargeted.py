"""The MultiTargeted attack: one ascent towards every wrong class."""

import dataclasses

from logit_reg.attacks.engine.gradient_loop import ActiveGradientAttack, check_steps
from logit_reg.attacks.engine.losses import target_difference
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class MultiTargeted(ActiveGradientAttack):
    """PGD on the difference of a wrong class' logit and the true one, one class after the other.

    The wrong class with the largest clean logit comes first. An image is left once it is fooled,
    into whichever class.

    Source:
        Gowal et al. 2019, arXiv:1910.09338. Deviation: PGD's steps of one length, where the paper
        takes Adam's with a schedule.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_steps: int = 20
    """Number of updates for each target."""
    step_size: float | None = None
    """Length of an update in the threat model's norm, pixel units; epsilon / 4 if None."""
    num_targets: int | None = None
    """Number of target classes; all wrong ones if None."""
    random_start: bool = True
    """Start uniformly in the ball, anew for each target, instead of at the image."""

    same_steps = True

    def __post_init__(self):
        check_steps(self.num_steps, self.step_size)
        if self.num_targets is not None and self.num_targets < 1:
            raise ValueError(f"num_targets must be at least 1; got {self.num_targets}.")

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K; without `num_targets` there are K - 1 targets.
        """
        num_targets = min(self.num_targets or num_classes - 1, num_classes - 1)
        return num_targets * (self.num_steps + 1) + 1, num_targets * self.num_steps

    def _starts(self, active):
        for name, targets in active.targets(self.num_targets or active.num_classes - 1):
            yield (name,), targets

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; the further inputs are the target classes."""
        del step
        return target_difference(logits, labels, loss_inputs)
