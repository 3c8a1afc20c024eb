"""What an audit will cost, from two short attacks on the model itself."""

import dataclasses
import time
from collections.abc import Iterable

import numpy as np

from logit_reg.attacks import APGD, FGSM, PGD, Attack, Restarts
from logit_reg.audit.evidence import NUM_LEFT, Diagnostic, Evidence
from logit_reg.audit.records import Cost

_PROBED_IMAGES = 100
# Passes (forwards and gradients) that an attack spends on an image which falls.
_PASSES_OF_THE_FALLEN = 25


@dataclasses.dataclass(frozen=True)
class _Probe:
    """What two short attacks tell of a model and of this machine."""

    clean: float
    """Fraction classified right."""
    after_pgd: float
    """Fraction robust under PGD."""
    after_apgd: float
    """Fraction robust under APGD."""
    seconds_per_pass: float
    seconds_per_trace: float


def estimate(evidence: Evidence, diagnostics: Iterable[Diagnostic]) -> Cost:
    """The likely cost of some tests.

    Args:
        evidence: of the audited model; a probe attacks its first images.
        diagnostics: what is going to run.

    Returns:
        Expected passes and seconds: attacks leave an image when it falls, so the cost depends on
        how many are robust.
    """
    probe = _probe(evidence)
    num_images = evidence.num_examples
    counted: set = set()
    forwards = backwards = passes = 0.0
    for diagnostic in diagnostics:
        num_left = min(num_images * probe.after_apgd, NUM_LEFT)
        passes += diagnostic.passes(evidence) + num_left * diagnostic.passes_each(evidence)
        controls = evidence.controls_of(*diagnostic.control_kinds)
        for attack in diagnostic.attacks(evidence).values():
            targets = [None, *controls]
            for target in targets:
                if (attack, target) in counted:
                    continue
                counted.add((attack, target))
                forward, backward = _expected(attack, evidence.threat.epsilon, probe)
                # Attacks on a randomised network go on to their end.
                is_repeated = target is None and evidence.is_randomised
                if is_repeated:
                    forward, backward = (
                        probe.clean * evidence.num_passes * count for count in attack.cost()
                    )
                forwards += num_images * forward
                backwards += num_images * backward
    seconds = (forwards + backwards + passes) * probe.seconds_per_pass
    seconds += len(counted) * probe.seconds_per_trace
    # The direct passes of the tests are about as many forwards as gradients.
    return Cost(round(forwards + passes / 2), round(backwards + passes / 2), seconds)


def _probe(evidence: Evidence) -> _Probe:
    sample = slice(_PROBED_IMAGES)
    images, labels = evidence.images[sample], evidence.labels[sample]
    threat = evidence.threat
    short = PGD(threat, "cw", 10, threat.epsilon / 4)

    def run(attack) -> tuple[np.ndarray, float]:
        started = time.monotonic()
        found = attack.run(evidence.precise, images, labels, seed=evidence.seed)
        return found.fooled, time.monotonic() - started

    _, first_seconds = run(short)
    fooled, seconds = run(short)
    forwards, backwards = short.cost()
    broken, _ = run(APGD(threat, "xent", 20))
    return _Probe(
        clean=float(evidence.clean.mean()),
        after_pgd=float(np.mean(~fooled)),
        after_apgd=float(np.mean(~(fooled | broken))),
        seconds_per_pass=seconds / (forwards + backwards) / len(images),
        seconds_per_trace=max(0.0, first_seconds - seconds),
    )


def _expected(attack: Attack, epsilon: float, probe: _Probe) -> tuple[float, float]:
    """Likely forwards and backwards of an image."""
    forward, backward = attack.cost()
    if isinstance(attack, FGSM) or (isinstance(attack, PGD) and not attack.early_stop):
        return probe.clean * forward, probe.clean * backward
    is_plain = isinstance(attack, PGD) or (
        isinstance(attack, Restarts) and isinstance(attack.attack, PGD)
    )
    share = probe.after_pgd if is_plain else probe.after_apgd
    if attack.threat.epsilon < 0.75 * epsilon:
        share = probe.clean
    elif attack.threat.epsilon > 2 * epsilon:
        share = 0.0
    elif attack.threat.epsilon > epsilon:
        share = share / 3
    fallen = max(0.0, probe.clean - share)
    short = min(1.0, _PASSES_OF_THE_FALLEN / (forward + backward))
    weight = share + fallen * short
    return weight * forward, weight * backward
