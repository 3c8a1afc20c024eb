"""The audit itself: announce, run test by test, and record what each test found and took."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logit_reg.attacks import Attack, AttackWarning
from logit_reg.audit.binarization import BINARIZATION
from logit_reg.audit.estimate import estimate
from logit_reg.audit.evidence import BUDGETS, Control, Diagnostic, Evidence, Outcome
from logit_reg.audit.geometry import GEOMETRY
from logit_reg.audit.other_attacks import OTHER_ATTACKS
from logit_reg.audit.preconditions import PRECONDITIONS
from logit_reg.audit.records import DECISIVE, GROUPS, Audit, Cost, Curve, TestRecord, WorstCase
from logit_reg.audit.sanity import SANITY
from logit_reg.audit.strength import STRENGTH
from logit_reg.durations import in_words
from logit_reg.evaluation.ledger import attack_settings
from logit_reg.evaluation.run import ThreatModelError, content_hash, known_hash
from logit_reg.threat import ThreatModel
from logit_reg.version import __version__

_GROUPS = dict(
    zip(
        GROUPS,
        (PRECONDITIONS, (*STRENGTH, *OTHER_ATTACKS, BINARIZATION), SANITY, GEOMETRY),
        strict=True,
    )
)
DIAGNOSTICS = {test.number: test for tests in _GROUPS.values() for test in tests}

# Cheap ones first; those that look for what white-box attacks missed after these, and AutoAttack,
# which has a black box of its own, after them; test 4, what was found amiss of the attacks, last.
_ORDER = (
    *(1, 5, 6, 27, 2, 33, 3, 8, 14, 24, 12, 11, 9, 23, 7, 13),
    *(16, 17, 15, 34, 29, 30, 31, 28, 32, 25, 26, 10, 20, 22, 21, 19, 18, 4),
)


def check_audited(threat: ThreatModel) -> None:
    """Refuse a norm that the tests' thresholds are not made for.

    Raises:
        ValueError: if it is neither linf nor l2.
    """
    threat.check_norm("the audit", "linf", "l2")


def audit(
    logits_fn,
    threat: ThreatModel,
    images,
    labels,
    *,
    claim: float,
    claimed_by: str | None = None,
    controls: Sequence[Control] = (),
    budget: str = "quick",
    seed: int = 0,
    attacks: Mapping[str, Attack] | None = None,
    beta: float | None = None,
    collapse_threshold: float | None = None,
    ceiling: tuple[float, str] | None = None,
    batch_size: int = 200,
    settings: Mapping[str, Any] | None = None,
    state_dir: Path | str | None = None,
    announce: Callable[[str], None] | None = None,
    show_progress: bool = False,
) -> Audit:
    """Test whether a claim of robustness holds.

    Attacks with gradients run on logits in float64, so that no saturated softmax hides a
    gradient which the network has; see `logit_reg.audit.evidence.precise`.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K); a Keras network is called
            in evaluation mode, any other callable as it is.
        threat: norm, epsilon and pixel range of the claim.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        claim: claimed robust accuracy: per cent, or a fraction if it is at most 1.
        claimed_by: the protocol or attack that the claim rests on, for the record.
        controls: models of which the truth is known; the quick budget does without.
        budget: "quick", "standard" or "full".
        seed: source of all random numbers.
        attacks: the claimant's own attacks by name. They count for the worst case and are
            themselves tested: against FGSM, where every ball holds the grey image, and where any
            image is allowed. They have to accept logits in float64.
        beta: weight of the logit penalty in training, where it is known.
        collapse_threshold: see `logit_reg.objectives.collapse_threshold`.
        ceiling: the best published robust accuracy of these data and this threat model, a
            fraction, and its source; None where it is not known.
        batch_size: most images sent through a network at once.
        settings: further provenance for the record; JSON values.
        state_dir: where finished batches of attacks are kept, so that a killed audit goes on.
            Needs a Keras network, whose content is the key.
        announce: takes a line of text: the plan with its cost, then each test as it ends.
        show_progress: draw a progress bar for each attack.

    Returns:
        The `Audit`, with a record of every test, those that did not run included.

    Raises:
        ValueError: if an argument does not make sense, or the images are outside the bounds.
    """
    check_audited(threat)
    say = announce or (lambda line: None)
    evidence = Evidence(
        logits_fn,
        threat,
        images,
        labels,
        claim=claim,
        controls=controls,
        budget=budget,
        seed=seed,
        attacks=attacks,
        beta=beta,
        collapse_threshold=collapse_threshold,
        ceiling=ceiling,
        batch_size=batch_size,
        state_dir=state_dir,
        show_progress=show_progress,
    )
    running = [DIAGNOSTICS[number] for number in _ORDER if _is_in(DIAGNOSTICS[number], budget)]
    expected = estimate(evidence, running)
    for line in _announcement(evidence, running, expected):
        say(line)

    records: dict[int, TestRecord] = {}
    curves: list[Curve] = []
    with warnings.catch_warnings():
        # The tests judge for themselves what AutoAttack warns of.
        warnings.simplefilter("ignore", AttackWarning)
        for diagnostic in running:
            record, drawn = run_test(evidence, diagnostic)
            records[diagnostic.number] = record
            curves += drawn
            say(
                f"test {record.number:2} {record.name}: {record.status_in_words}, {record.reason} "
                f"({record.cost.seconds:.0f} s)"
            )
    for number in DIAGNOSTICS.keys() - records.keys():
        needed = DIAGNOSTICS[number].budget
        records[number] = _record(
            DIAGNOSTICS[number], Outcome("skipped", f"needs the {needed} budget"), Cost()
        )
    return Audit(
        claim=evidence.claim,
        claimed_by=claimed_by,
        num_classes=evidence.num_classes,
        clean_accuracy=float(evidence.clean.mean()),
        worst_case=WorstCase(evidence.robust),
        accuracy_by_attack=dict(evidence.accuracy_by_attack),
        tests=tuple(records[number] for number in sorted(records)),
        squeeze=evidence.squeeze,
        curves=tuple(curves),
        budget=budget,
        seed=seed,
        settings=_settings(evidence, logits_fn, expected, settings or {}),
        claimed_robust=evidence.claimed_robust(),
    )


def run_test(evidence: Evidence, diagnostic: Diagnostic) -> tuple[TestRecord, tuple[Curve, ...]]:
    """Run one test: its record, and what it has for figures."""
    evidence.take_cost()
    try:
        outcome = diagnostic.judge(evidence)
    except ThreatModelError as error:
        evidence.violations.append(str(error))
        outcome = Outcome("skipped", str(error))
    return _record(diagnostic, outcome, evidence.take_cost()), outcome.curves


def _record(diagnostic: Diagnostic, outcome: Outcome, cost: Cost) -> TestRecord:
    return TestRecord(
        number=diagnostic.number,
        name=diagnostic.name,
        group=next(name for name, tests in _GROUPS.items() if diagnostic in tests),
        figure=outcome.figure,
        criterion=diagnostic.criterion,
        threshold_origin=diagnostic.threshold_origin,
        status=outcome.status,
        reason=outcome.reason,
        decisive=diagnostic.number in DECISIVE,
        cost=cost,
    )


def _announcement(evidence: Evidence, running: Sequence[Diagnostic], expected: Cost) -> list[str]:
    numbers = sorted(diagnostic.number for diagnostic in running)
    left_out = [str(number) for number in sorted(DIAGNOSTICS.keys() - set(numbers))]
    threat = evidence.threat
    lines = [
        f"audit: budget {evidence.budget}, {evidence.num_examples} images, {threat.norm} epsilon "
        f"{threat.epsilon:g} on [{threat.lower:g}, {threat.upper:g}]",
        f"tests: {', '.join(str(number) for number in numbers)}",
    ]
    if left_out:
        lines.append(f"left out by this budget: {', '.join(left_out)}")
    lines.append(f"estimate: about {in_words(expected.seconds)}, {expected.backwards:,} gradients")
    return lines


def _settings(evidence: Evidence, logits_fn, expected: Cost, given: Mapping[str, Any]) -> dict:
    return {
        **given,
        "threat": dataclasses.asdict(evidence.threat),
        "data_sha256": content_hash(evidence.images, evidence.labels),
        "network_sha256": known_hash(logits_fn),
        "batch_size": evidence.batch_size,
        "step_size": evidence.step_size,
        "claimed_attacks": {
            name: attack_settings(attack) if dataclasses.is_dataclass(attack) else repr(attack)
            for name, attack in evidence.claimed.items()
        },
        "controls": [{"name": c.name, "kind": c.kind} for c in evidence.controls],
        "estimate": dataclasses.asdict(expected),
        "version": __version__,
    }


def _is_in(diagnostic: Diagnostic, budget: str) -> bool:
    return BUDGETS.index(diagnostic.budget) <= BUDGETS.index(budget)
