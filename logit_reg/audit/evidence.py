"""What an audit knows: the claim, the model on its images, and all that attacks have found."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from logit_reg.attacks import Transfer
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.attacks.engine.attack import Attack
from logit_reg.attacks.engine.checks import SAME_LOGITS, Probabilities, probabilities
from logit_reg.attacks.engine.examples import attack_inputs, check_classes, within_bounds
from logit_reg.attacks.engine.forward import (
    LogitsFn,
    batch_spec,
    call_logits,
    clean_logits,
    compiled,
)
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses
from logit_reg.audit.records import Cost, Curve, SqueezeDiagnostics
from logit_reg.evaluation.run import (
    NUM_VERDICT_PASSES,
    Evaluation,
    ThreatModelError,
    evaluate,
    known_hash,
)
from logit_reg.evaluation.state import EvaluationState
from logit_reg.threat import ThreatModel

# Most images that attacks without gradients are tried on, of those that are still robust.
NUM_LEFT = 100

BUDGETS = ("quick", "standard", "full")
CONTROL_KINDS = ("natural", "noise_only", "adversarial", "same_recipe", "squeezed", "reference")

# Of the pixel range; see `Evidence.has_wide_ball`.
_WIDE_BALL = 1 / 15
# Fractions of epsilon of the challenges' own steps: 0.01 of 0.3 on MNIST, 2 of 8 on CIFAR.
_WIDE_STEP_SHARE = 1 / 30
_STEP_SHARE = 1 / 4
# Logits whose median margin is larger are divided before they are attacked, at most by so much.
_LARGE_MARGIN = 200.0
_MOST_DIVIDED = 10.0
NUM_SAMPLED = 100
"""Images of the tests that need no statistics."""
NUM_PASSES = 5
"""Passes that tell whether a network is randomised."""
# Passes that attacks on a randomised network average over, by budget.
_EOT = (4, 20, 20)
# Entries of the gradient of cross-entropy below which that of the true class is lost to rounding.
_SATURATED = 1e-13


@dataclasses.dataclass(frozen=True)
class Control:
    """A model of which the truth is known, attacked beside the audited one."""

    name: str
    """For tables and reasons."""
    kind: str
    """"natural", "noise_only" (Gaussian noise, no regulariser), "adversarial" (trained on
    adversarial examples), "same_recipe" (as the audited one, with another seed), "squeezed" (a
    logit-regularised model known to be broken) or "reference" (published accuracy)."""
    logits_fn: LogitsFn
    """Images in pixel units -> logits."""
    published: float | None = None
    """Of a reference: accuracy under APGD-CE with 100 steps, a fraction."""

    def __post_init__(self):
        if self.kind not in CONTROL_KINDS:
            raise ValueError(f"kind must be one of {', '.join(CONTROL_KINDS)}; got {self.kind!r}.")
        if (self.published is None) == (self.kind == "reference"):
            raise ValueError(
                f"control {self.name!r}: a reference, and nothing else, has a published accuracy."
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a test found, before it becomes a `TestRecord`."""

    status: str
    reason: str
    figure: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: tuple[Curve, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One entry of the list of tests: what it says of itself, what it runs, how it judges."""

    number: int
    name: str
    criterion: str
    judge: Callable[["Evidence"], Outcome]
    attacks: Callable[["Evidence"], Mapping[str, Attack]] = lambda evidence: {}
    """What it attacks the audited model with; an attack of several tests runs once."""
    threshold_origin: str = "prop"
    """One of `records.ORIGINS`."""
    budget: str = "quick"
    """The least budget that it runs in."""
    control_kinds: tuple[str, ...] = ()
    """Controls that it attacks in the same way."""
    passes: Callable[["Evidence"], float] = lambda evidence: 0.0
    """Forward passes of single images outside attacks; a gradient counts as two."""
    passes_each: Callable[["Evidence"], float] = lambda evidence: 0.0
    """The same for each of the first `NUM_LEFT` images that the attacks before leave."""


class Evidence:
    """A claim, the audited model on its images, and what the attacks have found so far.

    It runs attacks, each once, and keeps the worst case per example.
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        threat: ThreatModel,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        claim: float,
        controls: Sequence[Control] = (),
        budget: str = "quick",
        seed: int = 0,
        attacks: Mapping[str, Attack] | None = None,
        beta: float | None = None,
        collapse_threshold: float | None = None,
        ceiling: tuple[float, str] | None = None,
        batch_size: int = 200,
        state_dir: Path | str | None = None,
        show_progress: bool = False,
    ):
        """Classify the clean images; the arguments are those of `logit_reg.audit.audit`."""
        images, labels, _ = attack_inputs(images, labels, None)
        _check(logits_fn, images, claim, budget, batch_size, state_dir)
        images = within_bounds(images, threat.lower, threat.upper)
        self.given_logits_fn, self.threat = logits_fn, threat
        self.images, self.labels = images, labels
        self.claim = claim / 100 if claim > 1 else claim
        """A fraction."""
        self.ceiling = ceiling
        self.budget, self.seed, self.batch_size = budget, seed, batch_size
        self.controls = () if budget == "quick" else tuple(controls)
        self.claimed = dict(attacks or {})
        """The claimant's own attacks by name."""
        self._state_dir = None if state_dir is None else Path(state_dir)
        self._show_progress = show_progress

        self._forwards = self._backwards = 0
        self.outputs = _in_batches(logits_fn, images, batch_size)
        """(N, K) what `logits_fn` returns for the clean images."""
        check_classes(labels, self.outputs.shape[1])
        self.probabilities = probabilities(self.outputs)
        """How the outputs are made of probabilities, None where they are logits."""
        self.logits_fn, self.logits = logits_fn, self.outputs
        """Logits: the logarithm of the probabilities where the outputs are made of these; of a
        randomised network `logits_fn` is one pass, `logits` are those of the mean probabilities."""
        if self.probabilities is not None:
            self.logits_fn = log_of(logits_fn, self.probabilities)
            self.logits = self.probabilities.logarithm(self.outputs).numpy()
        self.spread = self._spread_of_passes()
        """Largest difference of an image's normalised logits between passes; NaN counts as one."""
        self.num_passes = 1 if self.spread <= SAME_LOGITS else self.pick(*_EOT)
        """Passes that attacks average over; most of 20 then decide whether an image is right."""
        if self.is_randomised:
            repeated = RepeatedPasses(self.logits_fn, NUM_VERDICT_PASSES)
            self.logits = _in_batches(repeated, images, batch_size)
        ordered = np.sort(self.logits[np.isfinite(self.logits).all(axis=1)], axis=1)
        margins = ordered[:, -1] - ordered[:, -2]
        self.median_margin = float(np.median(margins)) if len(margins) else math.nan
        """Median over the clean images of the largest minus the second largest logit; images whose
        logits are not finite have no margin, NaN if no others are left."""
        large = np.nan_to_num(self.median_margin / _LARGE_MARGIN, nan=1.0)
        self.divisor = float(np.clip(large, 1.0, _MOST_DIVIDED))
        """What the logits are divided by before they are attacked; see `precise`."""
        self.precise = precise(self.logits_fn, self.divisor)
        """The logits in float64, for gradients that float32 would lose; see `precise`."""
        self._followed, self._judged = self.precise, self.logits_fn
        if self.is_randomised:
            self._followed = RepeatedPasses(self.precise, self.num_passes)
            self._judged = RepeatedPasses(self.logits_fn, self.num_passes)
        self.cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, self.logits.astype(np.float64)
        ).numpy()
        """(N,) of the clean images, in nats."""
        self.squeeze = SqueezeDiagnostics(
            mean_logit_norm=finite(np.linalg.norm(self.logits.astype(np.float64), axis=1).mean()),
            median_margin=finite(self.median_margin),
            clean_cross_entropy=finite(self.cross_entropy.mean()),
            log_num_classes=math.log(self.num_classes),
            beta=beta,
            collapse_threshold=finite(collapse_threshold),
        )

        self.clean = clean_margin(self.logits, labels) > 0
        """(N,) bool."""
        self.robust = self.clean.copy()
        """(N,) bool: right under everything within the threat model so far."""
        self.accuracy_by_attack: dict[str, float] = {}
        self.violations: list[str] = []
        """What was found of attacks that left their threat model."""
        self._done: dict[Attack, np.ndarray] = {}
        self._controls: dict[Control, LogitsFn] = {}
        self._started = time.monotonic()

    @property
    def num_classes(self) -> int:
        """K."""
        return self.outputs.shape[1]

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.images)

    @property
    def is_randomised(self) -> bool:
        """Whether the network's logits differ between passes."""
        return self.num_passes > 1

    @property
    def has_wide_ball(self) -> bool:
        """Whether epsilon is as large as MNIST's: there attacks on honest models converge slowly.

        That is so where every value may change, as a root mean square, by a fifteenth of the
        range; CIFAR's 16 of 255 in linf is below it, MNIST's 2 in l2 above.
        """
        return self.threat.epsilon >= _WIDE_BALL * self.reach(1.0)

    @property
    def step_size(self) -> float:
        """Of the plain PGD that the ladder starts from: the claimant's, else the challenges'."""
        for attack in self.claimed.values():
            step_size = getattr(attack, "step_size", None)
            if step_size is not None and attack.threat == self.threat:
                return float(step_size)
        return (_WIDE_STEP_SHARE if self.has_wide_ball else _STEP_SHARE) * self.threat.epsilon

    def reach(self, share: float) -> float:
        """The epsilon that lets every value move by a share of the pixel range."""
        change = share * (self.threat.upper - self.threat.lower)
        return self.threat.distance_of(change, self.images.shape[1:])

    def pick(self, quick, standard, full):
        """The value for the budget."""
        return {"quick": quick, "standard": standard, "full": full}[self.budget]

    def controls_of(self, *kinds: str) -> tuple[Control, ...]:
        """The controls of some kinds, in the order given."""
        return tuple(control for control in self.controls if control.kind in kinds)

    def run(self, attacks: Mapping[str, Attack]) -> dict[str, np.ndarray]:
        """Attack all images with each attack.

        Args:
            attacks: by name; an attack that ran before is not run again.

        Returns:
            For each attack (N,) bool: right clean and under it.

        Raises:
            ThreatModelError: if an attack leaves its own threat model.
        """
        for name, attack in attacks.items():
            if attack not in self._done:
                found = self.evaluate(self.precise, {name: attack})
                self.credit(name, attack.threat, found.correct[name])
                self._done[attack] = found.correct[name]
        return {name: self._done[attack] for name, attack in attacks.items()}

    def run_claimed(self, attacks: Mapping[str, Attack]) -> dict[str, np.ndarray]:
        """Like `run`, for attacks of unknown make: who breaks the rules is left out and noted."""
        found: dict[str, np.ndarray] = {}
        for name, attack in attacks.items():
            try:
                found |= self.run({name: attack})
            except (ThreatModelError, ValueError) as error:
                if str(error) not in self.violations:
                    self.violations.append(str(error))
        return found

    def claimed_robust(self) -> np.ndarray | None:
        """(N,) bool: right under all of the claimant's attacks; None unless all of them ran."""
        claimed = self.claimed.values()
        if not claimed or any(
            attack not in self._done or not is_within(attack.threat, self.threat)
            for attack in claimed
        ):
            return None
        return np.all([self._done[attack] for attack in claimed], axis=0)

    def credit(self, name: str, threat: ThreatModel, correct: np.ndarray) -> None:
        """Let an attack count for the worst case if its threat model is within the audited one."""
        if is_within(threat, self.threat):
            self.robust &= correct
            self.accuracy_by_attack[name] = float(np.mean(correct))

    def call(self, images: np.ndarray) -> np.ndarray:
        """One eager call of the function as it was given: what a trace would freeze is seen."""
        self.spend(len(images))
        return call_logits(self.given_logits_fn, tf.convert_to_tensor(images)).numpy()

    def evaluate(
        self, logits_fn, attacks, *, rows=None, network=None, precision="precise"
    ) -> Evaluation:
        """Attack images of any model by `evaluation.evaluate`, which checks what comes back.

        Args:
            logits_fn: what to attack.
            attacks: by name.
            rows: (M,) int which images; all if None.
            network: whose content stands for `logits_fn` in the state; the audited one if None.
            precision: in which `logits_fn` computes, for the state, too.
        """
        rows = np.arange(len(self.images)) if rows is None else rows
        found = evaluate(
            logits_fn,
            attacks,
            self.images[rows],
            self.labels[rows],
            batch_size=self.batch_size,
            seed=self.seed,
            indices=rows,
            state=self._state(network or self.given_logits_fn, precision),
            show_progress=self._show_progress,
            with_checks=False,
            # Controls are not randomised.
            eot=self.num_passes if network is None else 1,
        )
        self.spend(found.forwards, found.backwards)
        return found

    def run_on_control(self, control: Control, attacks) -> dict[str, np.ndarray]:
        """Attack a control with each attack: (N,) bool for each."""
        function = self.precise_control(control)
        return self.evaluate(function, attacks, network=control.logits_fn).correct

    def run_transferred(self, control: Control, attacks) -> dict[str, np.ndarray]:
        """Attack the audited model along the gradients of a control: (N,) bool for each."""
        source = self.precise_control(control)
        # The content of a network, so that a kept batch belongs to it; a function has its name.
        key = known_hash(control.logits_fn) or control.name
        return self.run(
            {
                f"{name}-from-{control.name}": Transfer(attack, source, key, every_iterate=True)
                for name, attack in attacks.items()
            }
        )

    def precise_control(self, control: Control) -> LogitsFn:
        """The logits of a control as `precise` gives them, one function for all attacks."""
        if control not in self._controls:
            self._controls[control] = precise(control.logits_fn)
        return self._controls[control]

    def spend(self, forwards: int = 0, backwards: int = 0) -> None:
        """Count forward and backward passes of single images."""
        self._forwards += forwards
        self._backwards += backwards

    def take_cost(self) -> Cost:
        """What was spent since the last call."""
        seconds = time.monotonic() - self._started
        cost = Cost(self._forwards, self._backwards, seconds)
        self._forwards = self._backwards = 0
        self._started = time.monotonic()
        return cost

    def gradient(self, loss: str, points: np.ndarray, rows, logits_fn=None) -> np.ndarray:
        """Gradient of an attacker's loss: (M, H, W, C) points of (M,) rows -> (M, H, W, C).

        Of `logits_fn` if one is given, else of the audited model: of a randomised one the mean over
        the passes of its attacks.
        """
        gradients = LossGradient(loss)
        function = logits_fn or self._followed
        parts = [
            gradients(function, points[part], self.labels[rows[part]])
            for part in _parts(len(points), self.batch_size)
        ]
        count = len(points) * (1 if logits_fn else self.num_passes)
        self.spend(count, count)
        return np.concatenate(parts)

    def logits_of(self, points: np.ndarray) -> np.ndarray:
        """Logits of any images, of a randomised model over its passes: (M, H, W, C) -> (M, K)."""
        self.spend(len(points) * self.num_passes)
        return _in_batches(self._judged, points, self.batch_size)

    def _spread_of_passes(self):
        images = self.images[:NUM_SAMPLED]
        first, *others = (self.call(images) for _ in range(NUM_PASSES))
        return max(normalised_spread(first, other) for other in others)

    def _state(self, network, precision):
        key = known_hash(network)
        if self._state_dir is None or key is None:
            return None
        return EvaluationState(self._state_dir, f"{key} {precision}")


@dataclasses.dataclass(frozen=True)
class LossGradient:
    """The gradient of an attacker's loss with respect to the images."""

    loss: str
    """"xent", "cw" or "dlr"."""

    def __call__(self, logits_fn: LogitsFn, images, labels) -> np.ndarray:
        """(N, H, W, C) images, (N,) labels -> (N, H, W, C) float32."""
        signature = (batch_spec(images.shape[1:]), batch_spec((), tf.int64))
        return compiled(self, "_gradient", (logits_fn,), signature)(images, labels).numpy()

    def _gradient(self, logits_fn, images, labels):
        _, gradient = logits_and_gradient(
            logits_fn, images, lambda logits: attack_loss(self.loss, logits, labels)
        )
        return gradient


def precise(logits_fn: LogitsFn, divisor: float = 1.0) -> LogitsFn:
    """The same logits in float64, with a gradient that does not underflow on its way back.

    A saturated softmax leaves no gradient in float32 once the margin exceeds 88, although the
    network has one: a healthy network with logits times 30 would look masked. In float64 that
    happens at 745, and with a divisor of 10, the most that an audit takes, at 7,450. Dividing
    logits changes no decision. On its way into a float32 network the gradient of an image is
    scaled so that its largest entry is 1, which no attack that follows directions notices.

    Args:
        logits_fn: images -> logits.
        divisor: what the logits are divided by, above 0.

    Returns:
        images -> (N, K) float64.
    """

    @tf.custom_gradient
    def widen(logits):
        def backward(upstream):
            largest = tf.reduce_max(tf.abs(upstream), axis=-1, keepdims=True)
            # No other loss has gradients as small.
            is_saturated = largest < _SATURATED
            upstream = tf.where(is_saturated, _balanced(upstream, logits), upstream)
            largest = tf.reduce_max(tf.abs(upstream), axis=-1, keepdims=True)
            return tf.cast(tf.math.divide_no_nan(upstream, largest), logits.dtype)

        return tf.cast(logits, tf.float64) / divisor, backward

    def precise_logits(images):
        return widen(call_logits(logits_fn, images))

    return precise_logits


def _balanced(gradient, logits):
    """The gradient with an entry at the largest logit that makes its sum 0: (N, K) -> (N, K)."""
    num_classes = logits.shape[-1] or tf.shape(logits)[-1]
    predicted = tf.one_hot(tf.argmax(logits, axis=-1), num_classes, dtype=gradient.dtype)
    others = gradient * (1 - predicted)
    return others - predicted * tf.reduce_sum(others, axis=-1, keepdims=True)


def in_float64(network: keras.Model) -> LogitsFn | None:
    """A network computed in float64 throughout, or None where it cannot be rebuilt so."""
    try:
        config = _with_float64(network.get_config())
        wide = type(network).from_config(config)
        wide.set_weights(network.get_weights())
        wide(tf.zeros((1, *network.input_shape[1:]), tf.float64), training=False)
    # A network of others may fail to rebuild in any way.
    except Exception:
        return None

    def float64_logits(images):
        return call_logits(wide, tf.cast(images, tf.float64))

    return float64_logits


def normalised_spread(first: np.ndarray, second: np.ndarray) -> float:
    """Largest l2 distance between two versions of the images' logits, each scaled to length 1.

    The mean of an image's logits, on which no decision depends, is taken off before: behind a
    large one a difference would not show.

    Args:
        first: (N, K) logits.
        second: (N, K) logits of the same images.
    """
    return float(np.linalg.norm(unit(first) - unit(second), axis=1).max(initial=0.0))


def unit(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) without their mean, of length 1; zeros where one is not finite."""
    logits = logits.astype(np.float64)
    # What is not finite is another finding: here it differs from finite logits alone.
    logits = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, 0.0)
    logits = logits - logits.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(logits, axis=1, keepdims=True)
    return logits / np.where(lengths > 0, lengths, 1.0)


def log_of(logits_fn: LogitsFn, form: Probabilities) -> LogitsFn:
    """Logits of a function that returns probabilities of this form: their logarithm."""

    def log_probabilities(images):
        return form.logarithm(call_logits(logits_fn, images))

    return log_probabilities


def is_within(threat: ThreatModel, audited: ThreatModel) -> bool:
    """Whether whatever one threat model allows, another one allows, too."""
    return (
        threat.norm == audited.norm
        and threat.epsilon <= audited.epsilon
        and threat.lower >= audited.lower
        and threat.upper <= audited.upper
    )


def _with_float64(config):
    """A Keras configuration with every data type policy replaced."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {"name": "float64"}}
        is_float = isinstance(config.get("dtype"), str) and "float" in config["dtype"]
        replaced = {"dtype": "float64"} if is_float else {}
        return {key: _with_float64(value) for key, value in config.items()} | replaced
    if isinstance(config, list | tuple):
        return type(config)(_with_float64(item) for item in config)
    return config


def _in_batches(logits_fn, images, batch_size):
    parts = _parts(len(images), batch_size)
    return np.concatenate([clean_logits(logits_fn, images[part]) for part in parts])


def _parts(count, size):
    return [slice(start, start + size) for start in range(0, count, size)]


def finite(value: float | None) -> float | None:
    """A float for JSON; None where it is none or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _check(logits_fn, images, claim, budget, batch_size, state_dir):
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}.")
    if not (math.isfinite(claim) and 0 <= claim <= 100):
        raise ValueError(f"claim must be in per cent (or a fraction up to 1); got {claim}.")
    if not len(images):
        raise ValueError("an audit needs at least one image; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if state_dir is not None and known_hash(logits_fn) is None:
        raise ValueError(
            "state_dir needs a Keras network or one of logit_reg.adapters: another function has no "
            "content to key it by."
        )
