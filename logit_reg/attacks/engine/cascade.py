"""Cascades: stages of attacks, each on what is still robust after the ones before."""

from collections.abc import Callable

import numpy as np

from logit_reg.attacks.engine.active_set import ActiveExamples, ActiveSet, ActiveSetAttack
from logit_reg.attacks.engine.attack import Attack, Cascade
from logit_reg.attacks.engine.checks import Finding, check_square, warn

# By name of the stage: DLR takes three logits, its targeted form four.
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


class CascadeAttack(ActiveSetAttack):
    """A `Cascade` that can be run on one batch, too: its result has `stages`."""

    def attacks(self, num_classes: int) -> dict[str, Attack]:
        """The stages by name, in order.

        Args:
            num_classes: K, at least 2; what is not defined for so few classes is left out.
        """
        return {
            name: attack
            for name, attack in self._all_attacks().items()
            if num_classes >= _LEAST_CLASSES.get(name, 2)
        }

    def cost(self) -> tuple[int, int]:
        """Return the most forwards and backwards that one image can take, with enough classes."""
        costs = [attack.cost() for attack in self._all_attacks().values()]
        # One more for the clean image.
        return 1 + sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)

    def check_num_classes(self, num_classes: int) -> list[Finding]:
        """See `Cascade.check_num_classes`."""
        raise NotImplementedError

    def _all_attacks(self) -> dict[str, Attack]:
        """The stages by name, for any number of classes."""
        raise NotImplementedError

    def _attack(self, active: ActiveExamples) -> None:
        warn(run_stages(self, active.num_classes, active, lambda _, *stage: active.run(*stage)))


def run_stages(
    cascade: Cascade,
    num_classes: int,
    active: ActiveSet,
    run_stage: Callable[[str, Attack, np.ndarray], None],
) -> list[Finding]:
    """Run each stage of a cascade on what is still robust.

    Args:
        cascade: what to run.
        num_classes: K of the network.
        active: gets the `stages`.
        run_stage: attacks rows of the active set with the stage of a name, and records there what
            it finds.

    Returns:
        What the stages show of the network.
    """
    before = ~active.fooled
    for name, attack in cascade.attacks(num_classes).items():
        if len(rows := active.rows):
            run_stage(name, attack, rows)
        active.stages.append((name, ~active.fooled))
    return check_square(before, active.stages)
