"""The attack flags of `flag_groups`, turned into records."""

from logit_reg.attacks import PGD, Attack, Restarts
from logit_reg.commands.command_line import FLAGS
from logit_reg.evaluation.protocols import CHALLENGE_CONFIDENCE, threat_of
from logit_reg.threat import ThreatModel
from madry_compat.challenges import Challenge


def challenge_threat(challenge: Challenge) -> ThreatModel:
    """The threat model of --norm and --epsilon, the challenge's where they are not given."""
    return threat_of(_flag("norm", "linf"), challenge, FLAGS.epsilon)


def attack_from_flags(threat: ThreatModel, challenge: Challenge | None) -> dict[str, Attack]:
    """The attack that the flags describe, by name.

    Args:
        threat: norm, budget and pixel range.
        challenge: gives the steps that were not given; without one they are 40 of a tenth of
            epsilon.

    Returns:
        One attack.
    """
    num_steps = _flag("num_steps", challenge.attack.num_steps if challenge else 40)
    step_size = challenge.attack.step_size if challenge else threat.epsilon / 10
    if threat.norm == "l2":
        step_size = 2.5 * threat.epsilon / max(num_steps, 1)
    loss = _flag("loss_func", "xent")
    restarts = _flag("restarts", 1)
    attack = PGD(
        threat,
        loss,
        num_steps,
        _flag("step_size", step_size),
        random_start=_flag("random_start", True),
        confidence=_flag("confidence", CHALLENGE_CONFIDENCE) if loss == "cw" else 0.0,
        early_stop=restarts != 1,
    )
    name = f"pgd{num_steps}-{loss}"
    if restarts == 1:
        return {name: attack}
    return {f"{name}-x{restarts}": Restarts(attack, restarts)}


def _flag(name, default):
    value = FLAGS[name].value
    return default if value is None else value
