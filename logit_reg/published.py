"""What others published, by the settings of the training that it belongs to, in per cent."""

import dataclasses
from collections.abc import Mapping

_PAPER = "Shafahi et al."
_FREE = "Shafahi et al., Adversarial training for free"
_CHALLENGE = "MadryLab's public model, as Shafahi et al. attack it"

_NATURAL = {"reg": "none", "smoothing": 0.0, "sigma": 0.0, "adversary": "none"}
_WIDE = {"width": 10}


@dataclasses.dataclass(frozen=True)
class Published:
    """Accuracies of one model."""

    dataset: str
    settings: Mapping[str, object]
    """Settings of a run that has to be the same for its numbers to stand beside these."""
    accuracy: Mapping[str, float]
    """Per cent by attack, named as in the protocols, or "clean"."""
    source: str


# Only numbers whose training and attack are both known. The paper's figures, and its MNIST
# tables, are not among them.
PUBLISHED = (
    Published("cifar10", _WIDE | _NATURAL, {"clean": 95.01}, _FREE),
    Published(
        "cifar10",
        _WIDE | {"adversary": "pgd", "num_steps": 7, "reg": "none"},
        {
            "clean": 87.25,
            "fgsm-xent": 56.22,
            "fgsm-cw": 55.57,
            "pgd20-xent": 45.84,
            "pgd50-xent": 45.39,
            "pgd200-xent": 45.32,
            "pgd20-cw": 46.90,
            "pgd200-cw": 46.48,
        },
        _CHALLENGE,
    ),
    Published(
        "cifar10",
        _WIDE | {"adversary": "free", "replays": 8, "reg": "none"},
        {"clean": 85.96, "autoattack": 41.47},
        f"{_FREE}; AutoAttack by Croce and Hein",
    ),
    Published("cifar100", _WIDE | _NATURAL, {"clean": 78.84}, _FREE),
    Published(
        "cifar100",
        _WIDE | {"adversary": "pgd", "num_steps": 2, "reg": "none"},
        {"clean": 67.94, "pgd20-xent": 17.08},
        _FREE,
    ),
    Published(
        "cifar100",
        _WIDE | {"adversary": "pgd", "num_steps": 7, "reg": "none"},
        {"clean": 59.87, "pgd20-xent": 22.76},
        _FREE,
    ),
    Published(
        "cifar100",
        _WIDE | {"adversary": "free", "replays": 8, "reg": "none"},
        {"clean": 62.13, "pgd20-xent": 25.88},
        _FREE,
    ),
    Published("cifar100", _WIDE | {"reg": "squeeze", "beta": 7.0}, {"pgd200-cw": 23.87}, _PAPER),
)


def published_for(settings: Mapping[str, object]) -> Published | None:
    """What was published of the training that a run's settings describe, if anything."""
    for entry in PUBLISHED:
        wanted = {"dataset": entry.dataset, **entry.settings}
        if all(settings.get(name) == value for name, value in wanted.items()):
            return entry
    return None
