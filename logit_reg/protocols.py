"""The named protocols: frozen attacks under the names that numbers are quoted with."""

import functools
from collections.abc import Callable

from logit_reg.attacks import FGSM, PGD, SPSA, Adaptive, Attack, AutoAttack, Restarts
from logit_reg.attacks.checks import Finding
from logit_reg.threat import ThreatModel

FAMILIES = ("mnist", "cifar")

_LINF = {
    "mnist": ThreatModel("linf", 0.3, 0.0, 1.0),
    "cifar": ThreatModel("linf", 8.0, 0.0, 255.0),
}
# The paper's CIFAR budget is 1.5 on [0, 1]; MNIST's 2.0 is the field's.
_L2 = {
    "mnist": ThreatModel("l2", 2.0, 0.0, 1.0),
    "cifar": ThreatModel("l2", 1.5 * 255, 0.0, 255.0),
}
# The budgets that the field evaluates in l2: .5 on [0, 1] for CIFAR.
_AUTOATTACK_L2 = {"mnist": _L2["mnist"], "cifar": ThreatModel("l2", 127.5, 0.0, 255.0)}
_STEP_SIZE = {"mnist": 0.01, "cifar": 2.0}

# The challenges' own code; the paper's Eq. 4 has no such constant.
_CHALLENGE_CONFIDENCE = 50.0

_EACH = "autoattack-each"


def protocol_attacks(name: str, family: str) -> dict[str, Attack]:
    """The attacks of a named protocol.

    Args:
        name: one of `PROTOCOLS`.
        family: "mnist" ([0, 1] pixels) or "cifar" ([0, 255]).

    Returns:
        Attacks by name. Names are unique over all protocols of a family, and equal attacks of
        two protocols compare equal.

    Raises:
        ValueError: if the protocol is unknown or not defined for the family.

    Source:
        `eval.py` of the challenges and their leaderboards (madry-*); Shafahi et al., section 5
        (paper-*); Croce and Hein 2020 (autoattack*). "paper-20" to "paper-200" use step size 2:
        the published text, "2^4", is 2 with a footnote mark.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}.")
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}.")
    return PROTOCOLS[name](family)


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


def linf_threat(family: str) -> ThreatModel:
    """The challenges' own threat model of a family."""
    return _LINF[family]


def l2_threat(family: str) -> ThreatModel:
    """The l2 threat model of a family's `paper-l2`."""
    return _L2[family]


def _only(family, wanted, name, instead):
    if family != wanted:
        raise ValueError(f"protocol {name} is defined on {wanted} only; use {instead} here.")


def _madry_mnist(family, *, num_steps):
    _only(family, "mnist", "madry-mnist", "madry-cifar10")
    return _madry(family, num_steps, 0.01)


def _madry_cifar10(family):
    _only(family, "cifar", "madry-cifar10", "madry-mnist")
    # The leaderboard's "20-step PGD" used step size 1, not the config's 2.
    return _madry(family, 20, 1.0)


def _paper_mnist(family):
    _only(family, "mnist", "paper-mnist", "paper-20")
    return _paper(family, 40, 0.01)


def _paper_pgd(family, *, num_steps):
    _only(family, "cifar", f"paper-{num_steps}", "paper-mnist")
    return _paper(family, num_steps, 2.0)


def _paper_fgsm(family):
    return {f"fgsm-{loss}": FGSM(_LINF[family], loss) for loss in ("xent", "cw")}


def _paper_restarts(family):
    attack = PGD(_LINF[family], "cw", 100, _STEP_SIZE[family], early_stop=True)
    return {"pgd100-cw-x10": Restarts(attack, 10)}


def _paper_l2(family):
    threat = _L2[family]
    attack = PGD(threat, "cw", 100, 2.5 * threat.epsilon / 100, early_stop=True)
    return {"l2-pgd100-cw-x10": Restarts(attack, 10)}


def _paper_spsa(family):
    # The paper gives the iterations and its 2,048 images, not the samples: the usual 128.
    return {"spsa20": SPSA(_LINF[family], num_steps=20, num_samples=128)}


def _autoattack_l2(family):
    return {"autoattack-l2": AutoAttack(_AUTOATTACK_L2[family])}


def _linf(family, *, name):
    return any_threat_attacks(name, _LINF[family])


def _madry(family, num_steps, step_size):
    # All steps on all images: the last iterate, which the leaderboard counts, stands beside.
    confidence = {"xent": 0.0, "cw": _CHALLENGE_CONFIDENCE}
    return {
        f"madry-pgd{num_steps}-{loss}": PGD(
            _LINF[family], loss, num_steps, step_size, confidence=confidence[loss]
        )
        for loss in ("xent", "cw")
    }


def _paper(family, num_steps, step_size):
    # Any iterate counts, so a fallen image needs no further step.
    return {
        f"pgd{num_steps}-{loss}": PGD(_LINF[family], loss, num_steps, step_size, early_stop=True)
        for loss in ("xent", "cw")
    }


ANY_THREAT: dict[str, Callable[[ThreatModel, int], dict[str, Attack]]] = {
    "autoattack": lambda threat, num_classes: {"autoattack": AutoAttack(threat)},
    # The columns of the AutoAttack paper's tables: each on all images.
    _EACH: lambda threat, num_classes: AutoAttack(threat).attacks(num_classes),
    "adaptive": lambda threat, num_classes: {"adaptive": Adaptive(threat)},
}

PROTOCOLS: dict[str, Callable[[str], dict[str, Attack]]] = {
    "madry-mnist": functools.partial(_madry_mnist, num_steps=40),
    "madry-mnist-100": functools.partial(_madry_mnist, num_steps=100),
    "madry-cifar10": _madry_cifar10,
    "paper-fgsm": _paper_fgsm,
    "paper-20": functools.partial(_paper_pgd, num_steps=20),
    "paper-50": functools.partial(_paper_pgd, num_steps=50),
    "paper-200": functools.partial(_paper_pgd, num_steps=200),
    "paper-mnist": _paper_mnist,
    "paper-restarts": _paper_restarts,
    "paper-l2": _paper_l2,
    "paper-spsa": _paper_spsa,
    "autoattack": functools.partial(_linf, name="autoattack"),
    _EACH: functools.partial(_linf, name=_EACH),
    "autoattack-l2": _autoattack_l2,
    "adaptive": functools.partial(_linf, name="adaptive"),
}
