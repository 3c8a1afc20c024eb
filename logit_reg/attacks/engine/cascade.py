"""What AutoAttack and the adaptive attack share: stages, each on what still stands."""

from collections.abc import Mapping

from logit_reg.attacks.engine.active_set import Standing
from logit_reg.attacks.engine.attack import Attack

# By name of the stage: DLR takes three logits, its targeted form four.
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


def stages_for(attacks: Mapping[str, Attack], num_classes: int) -> dict[str, Attack]:
    """The stages that are defined for so many classes, in order.

    Args:
        attacks: stages by name.
        num_classes: K, at least 2.
    """
    return {
        name: attack
        for name, attack in attacks.items()
        if num_classes >= _LEAST_CLASSES.get(name, 2)
    }


def run_stages(
    attacks: Mapping[str, Attack],
    standing: Standing,
    logits_fn,
    images,
    labels,
    *,
    indices,
    **options,
) -> tuple:
    """Run each stage on the images that still stand.

    Args:
        attacks: stages by name, in order.
        standing: the books of these images; gets what is found.
        logits_fn: images -> logits.
        images: (N, H, W, C) float32, pixel units.
        labels: (N,) int64.
        indices: (N,) int64 places of the images in their data set.
        options: further arguments of `Attack.run`.

    Returns:
        (name, (N,) bool still standing after it) of each stage, as `AttackResult.stages`.
    """
    stages = []
    for name, attack in attacks.items():
        rows = standing.rows
        if len(rows):
            found = attack.run(
                logits_fn, images[rows], labels[rows], indices=indices[rows], **options
            )
            standing.record(rows, found.adversarial, found.fooled)
            standing.forwards += found.forwards
            standing.backwards += found.backwards
        stages.append((name, ~standing.fooled))
    return tuple(stages)


def cost_of_stages(
    attacks: Mapping[str, Attack], cost_of_checks: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """The most forwards and backwards that one image can take: checks, a clean look, stages."""
    costs = [attack.cost() for attack in attacks.values()]
    forwards, backwards = cost_of_checks
    return (
        forwards + 1 + sum(cost[0] for cost in costs),
        backwards + sum(cost[1] for cost in costs),
    )
