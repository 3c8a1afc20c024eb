"""Projected gradient descent, the challenges' attack."""

import dataclasses

from logit_reg.attacks.engine.examples import check_examples
from logit_reg.attacks.engine.gradient_loop import GradientAttack, GradientLoop, check_steps
from logit_reg.attacks.engine.gradients import ascend
from logit_reg.attacks.engine.losses import attack_loss, check_loss
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class PGD(GradientAttack):
    """Projected gradient descent (ascent of the loss) on all images at once.

    Source:
        Madry et al. 2018, arXiv:1706.06083; the challenges' `pgd_attack.py`. Deviation: success
        at any iterate counts, the start included; the challenges count the last one, which
        `last_iterate_fooled` gives.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    loss: str = "xent"
    """"xent", "cw" (margin) or, with at least 3 classes, "dlr"."""
    num_steps: int = 40
    """Number of updates."""
    step_size: float = 0.01
    """Length of an update in the threat model's norm, pixel units."""
    random_start: bool = True
    """Start uniformly in the ball instead of at the image."""
    confidence: float = 0.0
    """Kappa of "cw": 0 as in the paper's Eq. 4, 50 as in the challenges' code."""
    early_stop: bool = False
    """Leave an image once it is fooled. `fooled` stays the same; `last_iterate_fooled` then
    equals it, because the iterate that fools is the last one."""

    same_steps = True

    def __post_init__(self):
        check_loss(self.loss)
        check_steps(self.num_steps, self.step_size)
        if self.confidence < 0:
            raise ValueError(f"confidence must be at least 0; got {self.confidence}.")

    def _run(self, logits_fn, examples):
        check_examples(logits_fn, examples.images, examples.labels)
        loop = GradientLoop(self, self.num_steps, self.random_start, self.early_stop)
        stream = examples.stream(self, self.loss)
        return loop.run(logits_fn, examples, examples.labels, stream=stream)

    def cost(self):
        """Return the forwards and backwards that one image takes."""
        return self.num_steps + 1, self.num_steps

    def perturb(self, logits_fn, images, labels, *, noise, radius, scale=1.0):
        """The last iterate, for training: inside a traced step, with nothing tracked.

        Args:
            logits_fn: images -> logits, in the mode that training wants.
            images: (B, H, W, C) float32, pixel units.
            labels: (B,) int.
            noise: (B, H, W, C) float for `ThreatModel.random_start`.
            radius: (B, 1, 1, 1) float for `ThreatModel.random_start`.
            scale: () fraction of epsilon and of the step size, for a ramp.

        Returns:
            (B, H, W, C) float32 within ball and range.
        """
        start = images
        if self.random_start:
            start = self.threat.random_start(images, noise, radius, scale)

        def loss(logits):
            return attack_loss(self.loss, logits, labels, self.confidence)

        return ascend(
            logits_fn, start, images, loss, self.threat, self.num_steps, self.step_size, scale
        )

    def step_loss(self, step, logits, labels, loss_inputs):
        """See `GradientAttack.step_loss`; the same at every step, without further inputs."""
        del step, loss_inputs
        return attack_loss(self.loss, logits, labels, self.confidence)

    def step_length(self, step):
        """See `GradientAttack.step_length`; the same at every step."""
        del step
        return self.step_size

    def unit(self):
        """See `GradientAttack.unit`; where to start and when to stop are the loop's to decide."""
        unit, *scales = super().unit()
        return dataclasses.replace(unit, random_start=True, early_stop=False), *scales
