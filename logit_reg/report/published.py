"""What others published: of released models, and by the settings of a training."""

import dataclasses
import re
from collections.abc import Mapping

# Accuracies of the released models as fractions, by "protocol/loss" or by leaderboard entry.
_RELEASES: dict[str, dict[str, float]] = {
    "mnist/secret": {
        "clean": 0.9853,
        "fgsm/xent": 0.9636,
        "fgsm/cw": 0.9640,
        "madry-mnist-100/xent": 0.9252,
        "madry-mnist-100/cw": 0.9304,
        "madry-mnist-100-restarts-50/xent": 0.8962,
        "madry-mnist-100-restarts-50/cw": 0.8971,
        "autoattack": 0.8850,
        "autoattack/apgd-ce": 0.9057,
        "autoattack/apgd-t": 0.9057,
        "autoattack/fab-t": 0.9369,
        "autoattack/square": 0.8856,
        "leaderboard/square": 0.8825,
        "leaderboard/multitargeted": 0.8836,
        "leaderboard/odi-pgd": 0.8813,
        "leaderboard/best": 0.8800,
        "black-box/best": 0.9276,
        "black-box/adv_trained-copies/pgd-xent": 0.9354,
        "black-box/natural/fgsm-cw": 0.9608,
        "black-box/natural/pgd-xent": 0.9681,
        "black-box/adv_trained/fgsm-xent": 0.9766,
        "black-box/adv_trained/pgd-xent": 0.9779,
    },
    "cifar10/natural": {"clean": 0.9501, "pgd": 0.0},
    "cifar10/adv_trained": {
        "clean": 0.8725,
        "paper-fgsm/xent": 0.5622,
        "paper-fgsm/cw": 0.5557,
        "paper-20/xent": 0.4584,
        "paper-50/xent": 0.4539,
        "paper-200/xent": 0.4532,
        "paper-20/cw": 0.4690,
        "paper-200/cw": 0.4648,
    },
    "cifar10/secret": {
        "clean": 0.8714,
        "fgsm/xent": 0.5555,
        "fgsm/cw": 0.5492,
        "madry-cifar10/xent": 0.4704,
        "madry-cifar10/cw": 0.4776,
        "madry-cifar10-restarts-10/xent": 0.4521,
        "autoattack": 0.4404,
        "autoattack/apgd-ce": 0.4475,
        "autoattack/apgd-t": 0.4428,
        "autoattack/fab-t": 0.4475,
        "autoattack/square": 0.5310,
        "leaderboard/fab": 0.4451,
        "leaderboard/multitargeted": 0.4403,
        "leaderboard/odi-pgd": 0.4399,
        "leaderboard/best": 0.4395,
        "black-box/adv_trained/pgd-xent": 0.6339,
        "black-box/adv_trained/pgd-cw": 0.6438,
        "black-box/adv_trained/fgsm-cw": 0.6725,
        "black-box/natural/fgsm-cw": 0.8523,
    },
}


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


def published_accuracies(release: str) -> Mapping[str, float]:
    """Published accuracies of a released model.

    Args:
        release: such as "mnist/secret".

    Returns:
        Accuracy as a fraction by "protocol/loss"; empty where nothing was published. "xent" and
        "cw" are the loss; a protocol name without one has a single attack. "clean" is the accuracy
        without an attack, "leaderboard/..." and "black-box/..." are submissions by others, and
        these two have no protocol here that repeats them.

    Source:
        The challenges' README leaderboards; AutoAttack (arXiv:2003.01690), Table 2; Shafahi et
        al. for the public CIFAR-10 model, with steps of 2 and a CW loss without confidence,
        while the leaderboard's own attacks on the secret one took steps of 1 and confidence 50;
        free adversarial training (arXiv:1904.12843) for the natural one.
    """
    return dict(_RELEASES.get(release, {}))


def _by_attack(release: str) -> dict[str, float]:
    """Per cent by attack, "clean" included, of the protocols that `paper-*` names."""
    accuracy = {}
    for name, value in _RELEASES[release].items():
        attack = re.sub(r"^paper-(\d+)/", r"pgd\1-", name).replace("paper-fgsm/", "fgsm-")
        if "/" not in attack and attack != "pgd":
            accuracy[attack] = round(100 * value, 2)
    return accuracy


# Only numbers whose training and attack are both known. The paper's figures, and its MNIST
# tables, are not among them.
PUBLISHED = (
    Published("cifar10", _WIDE | _NATURAL, _by_attack("cifar10/natural"), _FREE),
    Published(
        "cifar10",
        _WIDE | {"adversary": "pgd", "num_steps": 7, "reg": "none"},
        _by_attack("cifar10/adv_trained"),
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
