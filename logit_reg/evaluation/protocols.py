"""The named protocols: frozen attacks under the names that numbers are quoted with."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

from logit_reg.attacks import FGSM, PGD, SPSA, Adaptive, Attack, AutoAttack, Restarts
from logit_reg.messages import Finding
from logit_reg.threat import ThreatModel

# The challenges' own code; the paper's Eq. 4 has no such constant.
CHALLENGE_CONFIDENCE = 50.0

_EACH = "autoattack-each"
_RAND = "autoattack-rand"


class Challenge(Protocol):
    """What a protocol has to know of the images, as `madry_compat.challenges.Challenge` does.

    Attributes:
        family: "mnist" or "cifar".
        lower: smallest pixel value.
        upper: largest pixel value.
        epsilon: allowed l-infinity distance, pixel units.
        autoattack_epsilon_l2: l2 distance of `autoattack-l2`, pixel units.
        autoattack_epsilon_l1: l1 distance of `autoattack-l1`, pixel units.
        attack: `num_steps` and `step_size` of the challenge's own PGD.
        paper: `step_size` of the paper's attacks and `epsilon_l2` of `paper-l2`, pixel units.
    """

    @property
    def family(self) -> str: ...
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def autoattack_epsilon_l2(self) -> float: ...
    @property
    def autoattack_epsilon_l1(self) -> float: ...
    @property
    def attack(self) -> Any: ...
    @property
    def paper(self) -> Any: ...


def protocol_attacks(name: str, challenge: Challenge) -> dict[str, Attack]:
    """The attacks of a named protocol.

    Args:
        name: one of `PROTOCOLS`.
        challenge: of the images.

    Returns:
        Attacks by name. Names are unique over all protocols of a challenge, and equal attacks of
        two protocols compare equal.

    Raises:
        ValueError: if the protocol is unknown or not defined for the challenge.

    Source:
        `eval.py` of the challenges and their leaderboards (madry-*); Shafahi et al., section 5
        (paper-*); Croce and Hein 2020 (autoattack*) and 2021 (autoattack-l1). "paper-20" to
        "paper-200" use step size 2: the published text, "2^4", is 2 with a footnote mark.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}.")
    family, instead = _FAMILIES.get(name, (challenge.family, ""))
    if challenge.family != family:
        raise ValueError(f"protocol {name} is defined on {family} only; use {instead} here.")
    return PROTOCOLS[name](challenge)


def any_threat_attacks(name: str, threat: ThreatModel, num_classes: int = 10) -> dict[str, Attack]:
    """The attacks of a protocol that needs nothing but a threat model, for data of one's own.

    Args:
        name: one of `ANY_THREAT`.
        threat: norm, budget and pixel range.
        num_classes: K; attacks that are not defined for so few are left out, see `left_out`.

    Returns:
        Attacks by name.

    Raises:
        ValueError: if the protocol is another.
    """
    if name not in ANY_THREAT:
        raise ValueError(f"protocol must be one of {', '.join(ANY_THREAT)}; got {name!r}.")
    return ANY_THREAT[name](threat, num_classes)


def left_out(name: str, threat: ThreatModel, num_classes: int) -> list[Finding]:
    """What a protocol leaves out for so few classes, if it is no cascade that says so itself.

    Args:
        name: one of `PROTOCOLS`, or any other name.
        threat: of its attacks.
        num_classes: K.
    """
    return AutoAttack(threat).check_num_classes(num_classes) if name == _EACH else []


def threat_of(norm: str, challenge: Challenge, epsilon: float | None = None) -> ThreatModel:
    """The threat model of a challenge's images.

    Args:
        norm: "linf", "l2" as in `paper-l2`, or "l1" as in `autoattack-l1`.
        challenge: of the images.
        epsilon: the budget in pixel units, if not the challenge's.
    """
    if epsilon is None:
        budgets = {"l2": challenge.paper.epsilon_l2, "l1": challenge.autoattack_epsilon_l1}
        # Of a norm that there is not, `ThreatModel` tells.
        epsilon = budgets.get(norm, challenge.epsilon)
    return ThreatModel(norm, epsilon, challenge.lower, challenge.upper)


def _paper_fgsm(challenge):
    threat = threat_of("linf", challenge)
    return {f"fgsm-{loss}": FGSM(threat, loss) for loss in ("xent", "cw")}


def _paper_restarts(challenge):
    threat, step_size = threat_of("linf", challenge), challenge.paper.step_size
    attack = PGD(threat, "cw", 100, step_size, early_stop=True)
    return {"pgd100-cw-x10": Restarts(attack, 10)}


def _paper_l2(challenge):
    threat = threat_of("l2", challenge)
    attack = PGD(threat, "cw", 100, 2.5 * threat.epsilon / 100, early_stop=True)
    return {"l2-pgd100-cw-x10": Restarts(attack, 10)}


def _paper_spsa(challenge):
    # The paper gives the iterations and its 2,048 images, not the samples: the usual 128.
    return {"spsa20": SPSA(threat_of("linf", challenge), num_steps=20, num_samples=128)}


def _autoattack_l2(challenge):
    threat = threat_of("l2", challenge, challenge.autoattack_epsilon_l2)
    return {"autoattack-l2": AutoAttack(threat)}


def _autoattack_l1(challenge):
    return {"autoattack-l1": AutoAttack(threat_of("l1", challenge))}


def _linf(challenge, *, name):
    return any_threat_attacks(name, threat_of("linf", challenge))


def _madry(challenge, num_steps=None):
    # All steps on all images: the last iterate, which the leaderboard counts, is recorded, too.
    num_steps = num_steps or challenge.attack.num_steps
    threat, step_size = threat_of("linf", challenge), challenge.attack.step_size
    confidence = {"xent": 0.0, "cw": CHALLENGE_CONFIDENCE}
    return {
        f"madry-pgd{num_steps}-{loss}": PGD(
            threat, loss, num_steps, step_size, confidence=confidence[loss]
        )
        for loss in ("xent", "cw")
    }


def _paper(challenge, num_steps):
    threat, step_size = threat_of("linf", challenge), challenge.paper.step_size
    # Any iterate counts: an image that is fooled needs no further step.
    return {
        f"pgd{num_steps}-{loss}": PGD(threat, loss, num_steps, step_size, early_stop=True)
        for loss in ("xent", "cw")
    }


ANY_THREAT: dict[str, Callable[[ThreatModel, int], dict[str, Attack]]] = {
    "autoattack": lambda threat, num_classes: {"autoattack": AutoAttack(threat)},
    # The columns of the AutoAttack paper's tables: each on all images.
    _EACH: lambda threat, num_classes: AutoAttack(threat).attacks(num_classes),
    # For randomised networks.
    _RAND: lambda threat, num_classes: {_RAND: AutoAttack(threat, "rand")},
    "adaptive": lambda threat, num_classes: {"adaptive": Adaptive(threat)},
}

PROTOCOLS: dict[str, Callable[[Challenge], dict[str, Attack]]] = {
    "madry-mnist": _madry,
    "madry-mnist-100": functools.partial(_madry, num_steps=100),
    "madry-cifar10": _madry,
    "paper-fgsm": _paper_fgsm,
    "paper-20": functools.partial(_paper, num_steps=20),
    "paper-50": functools.partial(_paper, num_steps=50),
    "paper-200": functools.partial(_paper, num_steps=200),
    "paper-mnist": functools.partial(_paper, num_steps=40),
    "paper-restarts": _paper_restarts,
    "paper-l2": _paper_l2,
    "paper-spsa": _paper_spsa,
    "autoattack": functools.partial(_linf, name="autoattack"),
    _EACH: functools.partial(_linf, name=_EACH),
    "autoattack-l2": _autoattack_l2,
    "autoattack-l1": _autoattack_l1,
    _RAND: functools.partial(_linf, name=_RAND),
    "adaptive": functools.partial(_linf, name="adaptive"),
}

# The family of images that a protocol is defined on, and what to use on the other.
_FAMILIES = {
    **dict.fromkeys(("madry-mnist", "madry-mnist-100"), ("mnist", "madry-cifar10")),
    **dict.fromkeys(("madry-cifar10",), ("cifar", "madry-mnist")),
    **dict.fromkeys(("paper-20", "paper-50", "paper-200"), ("cifar", "paper-mnist")),
    **dict.fromkeys(("paper-mnist",), ("mnist", "paper-20")),
}
