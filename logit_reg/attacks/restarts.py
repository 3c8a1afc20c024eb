"""Random restarts around any attack."""

import dataclasses

from logit_reg.attacks.engine.active_set import ActiveSet
from logit_reg.attacks.engine.attack import Attack, ImageAttack, run_attack
from logit_reg.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class Restarts(ImageAttack):
    """An attack repeated with fresh random numbers on the images that are still robust.

    The first restart that fools an image counts: candidates are never compared by their loss.
    `last_iterate_fooled` is True where the last iterate of any restart fools; images that were
    fooled on the way are not attacked again, so it may miss some of the later restarts.
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

    def _run(self, logits_fn, examples):
        active = ActiveSet(examples.images.copy(), logits_fn, examples.labels)
        for number in range(self.num_restarts):
            rows = active.rows
            if not len(rows):
                break
            restart = examples.restart * self.num_restarts + number
            restarted = dataclasses.replace(examples.take(rows), restart=restart)
            active.add(rows, run_attack(self.attack, logits_fn, restarted))
        return active.result()

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        forwards, backwards = self.attack.cost()
        return forwards * self.num_restarts, backwards * self.num_restarts
