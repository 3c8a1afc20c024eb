"""Which attacks an evaluation runs: protocols by name, or PGD with settings of the user's."""

import dataclasses

from logit_reg.attacks import PGD, Attack, Restarts
from logit_reg.evaluation.ledger import FLAGS_PROTOCOL, threat_suffix
from logit_reg.evaluation.protocols import (
    ANY_THREAT,
    CHALLENGE_CONFIDENCE,
    PROTOCOLS,
    any_threat_attacks,
    protocol_attacks,
    threat_of,
)
from logit_reg.messages import UsageError
from logit_reg.threat import ThreatModel
from madry_compat.challenges import Challenge

# Of data without a challenge; a step is a tenth of epsilon.
_NUM_STEPS = 40

_THREAT = ("norm", "epsilon")

Protocols = dict[str, dict[str, Attack]]
"""Attacks by protocol and name."""


@dataclasses.dataclass(frozen=True)
class AttackChoice:
    """What was said of the attack; None is what was not, which the challenge then decides.

    Attributes:
        protocols: names of frozen protocols; empty for an attack of the settings below.
        norm: "linf", "l2" or "l1".
        epsilon: budget, pixel units.
        num_steps: of PGD, as all that follows.
        step_size: pixel units.
        random_start: whether the first image is drawn from the ball.
        loss_func: "xent" or "cw".
        confidence: of the loss "cw".
        restarts: number of random starts.
    """

    protocols: tuple[str, ...] = ()
    norm: str | None = None
    epsilon: float | None = None
    num_steps: int | None = None
    step_size: float | None = None
    random_start: bool | None = None
    loss_func: str | None = None
    confidence: float | None = None
    restarts: int | None = None

    @property
    def given(self) -> list[str]:
        """The settings that were said, the protocols aside."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "protocols"]
        return [name for name in names if getattr(self, name) is not None]

    @property
    def describes_attack(self) -> bool:
        """Whether more was said of an attack than its threat model."""
        return not set(_THREAT).issuperset(self.given)

    def threat(self, challenge: Challenge) -> ThreatModel:
        """The threat model that was chosen, the challenge's where nothing was said."""
        return threat_of(self.norm or "linf", challenge, self.epsilon)

    def attack(self, threat: ThreatModel, challenge: Challenge | None) -> dict[str, Attack]:
        """PGD as it was described, by name.

        Args:
            threat: norm, budget and pixel range.
            challenge: gives the steps of which nothing was said; without one they are 40 of a
                tenth of epsilon.

        Returns:
            One attack.
        """
        num_steps = _or(self.num_steps, challenge.attack.num_steps if challenge else _NUM_STEPS)
        loss = self.loss_func or "xent"
        restarts = _or(self.restarts, 1)
        attack = PGD(
            threat,
            loss,
            num_steps,
            _or(self.step_size, usual_step_size(threat, challenge, num_steps)),
            random_start=_or(self.random_start, True),
            confidence=_or(self.confidence, CHALLENGE_CONFIDENCE) if loss == "cw" else 0.0,
            early_stop=restarts != 1,
        )
        name = f"pgd{num_steps}-{loss}"
        if restarts == 1:
            return {name: attack}
        return {f"{name}-x{restarts}": Restarts(attack, restarts)}

    def on_challenge(self, challenge: Challenge) -> Protocols:
        """The attacks on a challenge's images; its own protocol where nothing was said.

        Raises:
            UsageError: if a protocol that is frozen to a threat model is to have another.
            ValueError: if a protocol is unknown or not defined for the challenge.
        """
        if not self.protocols:
            if not self.given:
                return {challenge.protocol: protocol_attacks(challenge.protocol, challenge)}
            return {FLAGS_PROTOCOL: self.attack(self.threat(challenge), challenge)}
        if not self.given:
            return {name: protocol_attacks(name, challenge) for name in self.protocols}
        self._refuse_frozen(f"leave out --{self.given[0]}")
        threat = self.threat(challenge)
        suffix = threat_suffix(dataclasses.asdict(threat))
        # Another threat model is another attack: it never shares a column with the protocol's.
        return {
            name: {
                f"{key}{suffix}": attack
                for key, attack in any_threat_attacks(name, threat, challenge.num_classes).items()
            }
            for name in self.protocols
        }

    def on_own_data(self, threat: ThreatModel, num_classes: int) -> Protocols:
        """The attacks on images of the user's own.

        Args:
            threat: of the user's own.
            num_classes: K.

        Raises:
            UsageError: if a protocol is frozen to its challenge's threat model.
        """
        if not self.protocols:
            return {FLAGS_PROTOCOL: self.attack(threat, None)}
        self._refuse_frozen()
        return {name: any_threat_attacks(name, threat, num_classes) for name in self.protocols}

    def _refuse_frozen(self, *instead: str) -> None:
        """The cascades alone take another threat model, or other images."""
        frozen = [name for name in self.protocols if name in PROTOCOLS.keys() - ANY_THREAT.keys()]
        if frozen:
            ways = [
                *instead,
                f"choose from {', '.join(ANY_THREAT)}",
                "describe the attack with --num_steps, --step_size, --loss_func and --restarts",
            ]
            raise UsageError(
                f"--protocol={frozen[0]}: a protocol is frozen to its challenge's images and "
                f"threat model; {', '.join(ways[:-1])} or {ways[-1]}."
            )


def usual_step_size(threat: ThreatModel, challenge: Challenge | None, num_steps: int) -> float:
    """The step size of PGD of which nothing was said, in pixel units.

    Args:
        threat: norm, budget and pixel range.
        challenge: whose step size it is in linf; a tenth of epsilon without one.
        num_steps: of the attack; in l2 and l1 all steps together are 2.5 epsilon.
    """
    if threat.norm != "linf":
        return 2.5 * threat.epsilon / max(num_steps, 1)
    return challenge.attack.step_size if challenge else threat.epsilon / 10


def is_strong(protocol: str) -> bool:
    """Whether a protocol is a cascade that adapts itself to the network."""
    return protocol in ANY_THREAT or protocol.startswith(tuple(ANY_THREAT))


def _or(value, default):
    return default if value is None else value
