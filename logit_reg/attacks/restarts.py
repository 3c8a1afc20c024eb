"""Random restarts around any attack."""

import dataclasses

import numpy as np

from logit_reg.attacks.engine.attack import Attack, AttackResult, ImageAttack
from logit_reg.attacks.engine.examples import attack_inputs
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class Restarts(ImageAttack):
    """An attack repeated with fresh random numbers on the images that still stand.

    The first restart that fools an image counts: candidates are never compared by their loss.
    """

    attack: Attack
    """What is repeated."""
    num_restarts: int
    """How often, at least 1; the first one is the plain attack."""

    def __post_init__(self):
        if self.num_restarts < 1:
            raise ValueError(f"num_restarts must be at least 1; got {self.num_restarts}.")

    @property
    def threat(self) -> ThreatModel:
        """The repeated attack's threat model."""
        return self.attack.threat

    def run(self, logits_fn, images, labels, *, seed, indices=None, restart=0, **options):
        """Attack a batch; see `Attack.run`.

        `last_iterate_fooled` is True where the last iterate of any restart fools. Images that
        were fooled on the way are not attacked again, so it may miss some of the later restarts.
        """
        images, labels, indices = attack_inputs(images, labels, indices)
        adversarial = images.copy()
        fooled = np.zeros(len(images), bool)
        last_fooled = np.zeros(len(images), bool)
        forwards = backwards = 0
        for number in range(self.num_restarts):
            standing = np.flatnonzero(~fooled)
            if not len(standing):
                break
            found = self.attack.run(
                logits_fn,
                images[standing],
                labels[standing],
                seed=seed,
                indices=indices[standing],
                restart=restart * self.num_restarts + number,
                **options,
            )
            adversarial[standing] = found.adversarial
            fooled[standing] = found.fooled
            last_fooled[standing] = found.last_iterate_fooled
            forwards += found.forwards
            backwards += found.backwards
        return AttackResult(adversarial, fooled, last_fooled, forwards, backwards)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        forwards, backwards = self.attack.cost()
        return forwards * self.num_restarts, backwards * self.num_restarts
