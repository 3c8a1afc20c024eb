"""The MultiTargeted attack: one ascent towards every wrong class."""

import dataclasses

import tensorflow as tf

from logit_reg.attacks.engine.active_set import Standing, ranked_targets
from logit_reg.attacks.engine.attack import AttackResult, ImageAttack
from logit_reg.attacks.engine.examples import attack_inputs
from logit_reg.attacks.engine.gradient_loop import Ascent, check_steps
from logit_reg.attacks.engine.random_numbers import random_stream
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class MultiTargeted(ImageAttack):
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

    def __post_init__(self):
        check_steps(self.num_steps, self.step_size)
        if self.num_targets is not None and self.num_targets < 1:
            raise ValueError(f"num_targets must be at least 1; got {self.num_targets}.")

    def run(
        self,
        logits_fn,
        images,
        labels,
        *,
        seed,
        indices=None,
        restart=0,
        gradient_logits_fn=None,
    ) -> AttackResult:
        """Attack a batch; see `Attack.run`."""
        images, labels, indices = attack_inputs(images, labels, indices)
        standing = Standing(logits_fn, images, labels)
        num_wrong = standing.clean_logits.shape[1] - 1
        targets = ranked_targets(standing.clean_logits, labels, self.num_targets or num_wrong)
        for rank in range(targets.shape[1]):
            Ascent(self, self.num_steps, self.random_start).run_on_standing(
                standing,
                (logits_fn, gradient_logits_fn or logits_fn),
                (images, labels, targets[:, rank], indices),
                stream=random_stream(seed, type(self).__name__, f"target {rank}"),
                restart=restart,
            )
        return standing.result()

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K; without `num_targets` there are K - 1 targets.
        """
        num_targets = min(self.num_targets or num_classes - 1, num_classes - 1)
        return num_targets * (self.num_steps + 1) + 1, num_targets * self.num_steps

    def ascended_loss(self, step, logits, labels, guides):
        """See `Climber.ascended_loss`; the guides are the target classes."""
        del step
        target_logit = tf.gather(logits, guides, batch_dims=1)
        return target_logit - tf.gather(logits, labels, batch_dims=1)

    def step_length(self, step):
        """See `Climber.step_length`; the same at every step."""
        del step
        return self.step_size or self.threat.epsilon / 4
