"""What an audit says: a record of each test, the worst case, the verdict and its rule."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from logit_reg.evaluation.statistics import LEVEL, PairedDifference, Proportion, wilson_interval

SCHEMA = 1

GROUPS = ("preconditions", "attack strength", "sanity", "geometry")
STATUSES = ("pass", "fail", "not_decided", "report", "skipped", "not_applicable")
ORIGINS = ("src", "ctl", "prop")
VERDICTS = ("HOLDS", "NOT REFUTED", "SUSPECT", "REFUTED")

DECISIVE = (3, 7, 12, 13, 19, 20, 23, 24, 25, 33, 34)
"""Numbers of the tests that the verdict hangs on."""

OF_THE_EVALUATION = (34,)
"""Those of them that judge attacks and not the model: a claim whose attacks fail them is not
confirmed, but the model is not to blame."""

# A claim that lies further than this above the worst case is refuted.
_REFUTING_GAP = 0.10


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a test took."""

    forwards: int = 0
    """Images sent forward through a network."""
    backwards: int = 0
    """Images whose gradient was computed."""
    seconds: float = 0.0
    """Wall-clock time."""


@dataclasses.dataclass(frozen=True)
class TestRecord:
    """The outcome of one diagnostic of a robustness claim."""

    # Its name is not that of a class of tests.
    __test__: ClassVar[bool] = False

    number: int
    """1 to 34, the number in the list of tests."""
    name: str
    """A few words, such as "Logits, not probabilities"."""
    group: str
    """One of `GROUPS`."""
    figure: Mapping[str, Any]
    """What was measured, by name; JSON values, accuracies and gaps as fractions."""
    criterion: str
    """When the test passes, in one sentence."""
    threshold_origin: str
    """"src" published, "ctl" relative to a control model, "prop" proposed by this project."""
    status: str
    """"pass", "fail", "not_decided" (the interval reaches over the threshold), "report" (no
    threshold applies), "skipped" or "not_applicable"."""
    reason: str
    """What the status rests on, in one sentence."""
    decisive: bool
    """Whether the verdict hangs on it."""
    cost: Cost = Cost()
    """What it took; an attack shared by several tests counts for the first."""

    @property
    def status_in_words(self) -> str:
        """The status as people read it."""
        return self.status.replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy against one knob of the attack, for a figure."""

    name: str
    """"epsilon", "steps", "step_size" or "logit_scale"."""
    label: str
    """Text for the horizontal axis, unit included."""
    x: tuple[float, ...]
    """Values of the knob, increasing."""
    accuracy: tuple[float, ...]
    """Fraction robust at each value."""
    reported: float | None = None
    """The value that the claim's own attack uses, if it is one of a kind."""


@dataclasses.dataclass(frozen=True)
class SqueezeDiagnostics:
    """How small the logits are and what that does to the cross-entropy; None if not finite."""

    mean_logit_norm: float | None
    """Mean l2 norm of the clean logits."""
    median_margin: float | None
    """Median over the images of the largest minus the second largest clean logit."""
    clean_cross_entropy: float | None
    """Mean over the images, in nats."""
    log_num_classes: float
    """ln K: the cross-entropy of logits that are all equal."""
    beta: float | None = None
    """Weight of the logit penalty in training, where it is known."""
    collapse_threshold: float | None = None
    """The beta from which on all-zero logits minimise the objective, where it is known."""


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """What is left of N examples after every attack of every test."""

    robust: np.ndarray
    """(N,) bool: classified right clean and under every attack within the threat model."""

    @property
    def accuracy(self) -> float:
        """Fraction robust."""
        return float(np.mean(self.robust))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return Proportion.of(self.robust).interval


@dataclasses.dataclass(frozen=True)
class Audit:
    """A robustness claim, the evidence and the verdict."""

    claim: float
    """Claimed robust accuracy, a fraction."""
    claimed_by: str | None
    """The protocol or attack that the claim rests on."""
    num_classes: int
    """K."""
    clean_accuracy: float
    """Fraction classified right without an attack."""
    worst_case: WorstCase
    """Per example over all attacks within the threat model."""
    accuracy_by_attack: Mapping[str, float]
    """Fraction robust under each single attack within the threat model."""
    tests: tuple[TestRecord, ...]
    """All tests by number, those that did not run included."""
    squeeze: SqueezeDiagnostics
    """Logit scale and cross-entropy on clean images."""
    curves: tuple[Curve, ...]
    """Accuracy against knobs of the attack, for figures."""
    budget: str
    """"quick", "standard" or "full"."""
    seed: int
    """Source of all random numbers."""
    settings: Mapping[str, Any]
    """Provenance: threat model, data, network, versions; JSON values."""
    claimed_robust: np.ndarray | None = None
    """(N,) bool: right under all of the claimant's own attacks, on the images of this audit; None
    where they are not known."""

    @property
    def claimed_gap(self) -> PairedDifference | None:
        """What the audit takes of what the claimant's own attacks leave, on the same images."""
        if self.claimed_robust is None:
            return None
        return PairedDifference.of(self.claimed_robust, self.worst_case.robust)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return verdict(self.claim, self.worst_case, self.tests)

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.worst_case.robust)

    @property
    def strongest_attack(self) -> str:
        """The attack that broke most on its own, "" if none ran."""
        accuracies = self.accuracy_by_attack
        return min(accuracies, key=accuracies.__getitem__) if accuracies else ""

    @property
    def failed(self) -> tuple[int, ...]:
        """Numbers of the tests that failed."""
        return tuple(test.number for test in self.tests if test.status == "fail")

    @property
    def undecided(self) -> tuple[int, ...]:
        """Numbers of the decisive tests that did not come to a decision."""
        return tuple(t.number for t in self.tests if t.decisive and not _is_decided(t))

    @property
    def cost(self) -> Cost:
        """Everything that the audit took."""
        return Cost(
            sum(test.cost.forwards for test in self.tests),
            sum(test.cost.backwards for test in self.tests),
            sum(test.cost.seconds for test in self.tests),
        )

    def to_json(self) -> dict:
        """The content of `audit.json`; see `audit.schema.json`. Accuracies are fractions."""
        low, high = self.worst_case.interval
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "claim": self.claim,
            "claimed_by": self.claimed_by,
            "num_examples": self.num_examples,
            "num_classes": self.num_classes,
            "clean_accuracy": self.clean_accuracy,
            "worst_case": {
                "accuracy": self.worst_case.accuracy,
                "interval": {"level": LEVEL, "method": "wilson", "low": low, "high": high},
                "robust": self.worst_case.robust.tolist(),
                "strongest_attack": self.strongest_attack,
                "accuracy_by_attack": dict(self.accuracy_by_attack),
            },
            "undecided": list(self.undecided),
            "failed": list(self.failed),
            "tests": [dataclasses.asdict(test) for test in self.tests],
            "squeeze": dataclasses.asdict(self.squeeze),
            "curves": [dataclasses.asdict(curve) for curve in self.curves],
            "budget": self.budget,
            "seed": self.seed,
            "settings": dict(self.settings),
            "cost": dataclasses.asdict(self.cost),
        }
        if (gap := self.claimed_gap) is not None:
            low, high = gap.interval
            value["claimed_attacks"] = {
                "accuracy": gap.correct_a / gap.num_examples,
                "gap": {"value": gap.value, "low": low, "high": high},
            }
        # Tuples become lists, and what JSON cannot say is refused here rather than in a browser.
        return json.loads(json.dumps(value, allow_nan=False))


def verdict(claim: float, worst_case: WorstCase, tests: tuple[TestRecord, ...]) -> str:
    """The verdict on a claim.

    Args:
        claim: claimed robust accuracy, a fraction.
        worst_case: what is left after all attacks.
        tests: records of all tests.

    Returns:
        "REFUTED" if the claim lies more than 10 points above the worst case and above its 95 %
        interval, or the worst case is below half the claim and their 95 % intervals do not
        overlap (the claim's is that of as many examples). Else "SUSPECT" if a decisive test of
        the model fails; "HOLDS" if every decisive test passed or does not apply to this model, and
        the claim lies at most 10 points above the worst case; "NOT REFUTED" otherwise, a failed
        test of the evaluation alone (`OF_THE_EVALUATION`) included.
    """
    accuracy = worst_case.accuracy
    num_examples = len(worst_case.robust)
    claim_low, _ = wilson_interval(round(claim * num_examples), num_examples)
    separated = worst_case.interval[1] < claim_low
    is_far = _is_far(claim, accuracy)
    if (is_far and claim > worst_case.interval[1]) or (accuracy < claim / 2 and separated):
        return "REFUTED"
    decisive = [test for test in tests if test.decisive]
    failed = [test.number for test in decisive if test.status == "fail"]
    if set(failed) - set(OF_THE_EVALUATION):
        return "SUSPECT"
    if decisive and not failed and all(map(_is_decided, decisive)) and not is_far:
        return "HOLDS"
    return "NOT REFUTED"


def overstates(claim: float, accuracy: float) -> bool:
    """Whether a claim lies more than 10 points above an accuracy or is more than twice as high."""
    return _is_far(claim, accuracy) or accuracy < claim / 2


def _is_far(claim, accuracy):
    # A gap of exactly 10 points is none above 10, whatever the rounding says.
    return claim - accuracy > _REFUTING_GAP + 1e-9


def _is_decided(test: TestRecord) -> bool:
    return test.status in ("pass", "fail", "not_applicable")
