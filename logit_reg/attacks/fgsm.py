"""The fast gradient sign method."""

import dataclasses

from logit_reg.attacks.engine.attack import ImageAttack
from logit_reg.attacks.pgd import PGD
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class FGSM(ImageAttack):
    """One step of length epsilon from the image itself.

    Source:
        Goodfellow et al. 2015, arXiv:1412.6572; in l2 the fast gradient method.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    loss: str = "xent"
    """"xent" or "cw" (margin)."""
    confidence: float = 0.0
    """Kappa of "cw"."""

    def _run(self, logits_fn, examples):
        return self._as_pgd()._run(logits_fn, examples)

    def cost(self):
        """Return the forwards and backwards that one image takes."""
        return self._as_pgd().cost()

    def __post_init__(self):
        self._as_pgd()

    def _as_pgd(self) -> PGD:
        return PGD(
            self.threat,
            loss=self.loss,
            num_steps=1,
            step_size=self.threat.epsilon,
            random_start=False,
            confidence=self.confidence,
        )
