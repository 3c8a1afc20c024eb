"""The attack flags of `flag_groups`, turned into records."""

from pathlib import Path

from logit_reg.attacks import PGD, Attack, Restarts
from logit_reg.protocols import CHALLENGE_CONFIDENCE, threat_of
from logit_reg.threat import ThreatModel
from logit_reg_scripts import command_line
from logit_reg_scripts.command_line import FLAGS
from madry_compat.challenges import Challenge
from madry_compat.config import ChallengeConfig, load_config

THREAT_FLAGS = ("norm", "epsilon")
ATTACK_FLAGS = (
    *THREAT_FLAGS,
    "num_steps",
    "step_size",
    "random_start",
    "loss_func",
    "confidence",
    "restarts",
)


def apply_config(*, without: tuple[str, ...] = ()) -> ChallengeConfig | None:
    """Set flags from --config, except those given on the command line.

    Args:
        without: keys that have no say in this command.

    Returns:
        What the file says, or None without --config.
    """
    if not FLAGS.config:
        return None
    config = load_config(command_line.existing_path("config", FLAGS.config))
    if config.unknown:
        command_line.notice(f"config: keys without meaning here: {', '.join(config.unknown)}")
    # Only the command line decides which files are written.
    ignored = {*without, "store_adv_path"}
    values = {key: value for key, value in config.settings.items() if key not in ignored}
    # The challenges' files name a folder of the machine that they were written on.
    if not Path(values.get("data_path", ".")).exists():
        values.pop("data_path")
    command_line.apply_config(values)
    return config


def given_attack_flags() -> list[str]:
    """Those of `ATTACK_FLAGS` that were given, on the command line or in --config."""
    return [name for name in ATTACK_FLAGS if FLAGS[name].value is not None]


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
