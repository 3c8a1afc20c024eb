"""Attack a data set and keep the books: per example, worst case, checked, resumable."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np

from logit_reg.attacks.engine.active_set import check_examples, count_classes, forget_if_changed
from logit_reg.attacks.engine.attack import (
    Attack,
    AttackResult,
    Cascade,
    Classifier,
    Judgement,
    attack_inputs,
    within_bounds,
)
from logit_reg.attacks.engine.checks import (
    NUM_CHECKED,
    Finding,
    check_finite,
    check_network,
    check_square,
    cost_of_checks,
    followed_losses,
    warn,
)
from logit_reg.attacks.engine.inference_copy import frozen_copy
from logit_reg.attacks.pgd import PGD
from logit_reg.evaluation.state import EvaluationState
from logit_reg.evaluation.statistics import wilson_interval as wilson_interval
from logit_reg.progress import Progress
from logit_reg.threat import ThreatModel

# Relative slack of an attack's own output: float32 cannot keep a ball to the last bit.
_RELATIVE_SLACK = 1e-6
# What is kept of a finished batch.
_SAVED = {"adversarial", "fooled", "last", "counts"}

_CLASSIFIER = Classifier()


class GateError(RuntimeError):
    """An attack returned something that is not an adversarial example of its threat model."""


@dataclasses.dataclass(frozen=True)
class AttackRecord:
    """What one attack did to the N examples of an evaluation."""

    correct: np.ndarray
    """(N,) bool: classified right clean and under this attack, at every iterate."""
    correct_last_iterate: np.ndarray
    """(N,) bool: classified right clean and at the attack's last iterate."""
    attacked: np.ndarray
    """(N,) bool: whether the attack ran on the example."""
    forwards: int
    """Images sent forward through the network."""
    backwards: int
    """Images whose gradient was computed."""
    seconds: float
    """Wall-clock time, checks included."""
    unconfirmed: int
    """Examples that the attack called fooled and that the returned image does not fool."""
    stages: tuple = ()
    """Of a cascade: (name, (N,) bool still standing after it), in order."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is left of N examples after all attacks."""

    labels: np.ndarray
    """(N,) int64."""
    clean_prediction: np.ndarray
    """(N,) int64."""
    clean: np.ndarray
    """(N,) bool: classified right without an attack."""
    robust: np.ndarray
    """(N,) bool: classified right under every attack."""
    correct: dict[str, np.ndarray]
    """(N,) bool for each attack."""
    adversarial: np.ndarray
    """(N, H, W, C) float32 pixel units: the first image that fools, in the order of the attacks;
    the last attack's final iterate where none does; the image itself where it is misclassified
    clean."""
    broken_by: list[str]
    """For each example "clean", the first attack that breaks it, or ""."""
    distance: np.ndarray
    """(N,) float64 distance of `adversarial` from the image, in the norm of the attack that made
    it."""
    records: dict[str, AttackRecord]
    """Books of each attack."""
    findings: tuple[Finding, ...] = ()
    """What makes these numbers doubtful or incomplete, each once; see `check_network`."""
    cost_of_checks: tuple[int, int] = (0, 0)
    """Forwards and backwards of the checks that gave the findings."""

    @property
    def forwards(self) -> int:
        """Images sent forward by the checks and all attacks."""
        return self.cost_of_checks[0] + sum(record.forwards for record in self.records.values())

    @property
    def backwards(self) -> int:
        """Gradients computed by the checks and all attacks."""
        return self.cost_of_checks[1] + sum(record.backwards for record in self.records.values())


def evaluate(
    logits_fn,
    attacks: Mapping[str, Attack],
    images,
    labels,
    *,
    batch_size: int = 200,
    seed: int = 0,
    worst_case_only: bool = False,
    indices=None,
    state: EvaluationState | None = None,
    show_progress: bool = False,
    gradient_logits_fn=None,
    with_checks: bool = True,
) -> Evaluation:
    """Attack a data set with several attacks and combine them per example.

    Signs that the numbers cannot be trusted stand in `findings`, and each is issued once as an
    `AttackWarning`.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attacks: the attacks by name, in the order in which they are to be credited.
        images: (N, H, W, C) float, pixel units, within the attacks' bounds.
        labels: (N,) or (N, 1) int true classes.
        batch_size: most images sent through the network at once.
        seed: source of all random numbers.
        worst_case_only: attack only what the attacks before have left standing. The worst case
            stays the same up to the random order of batches; the accuracy under a single attack
            is then that of the attacks so far.
        indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
        state: where finished batches are kept.
        show_progress: draw a progress bar for each attack.
        gradient_logits_fn: what the attacks follow, see `Attack.run`; `logits_fn` if None.
        with_checks: look at the network first, on a few images, see `check_network`; without it
            `findings` hold what the attacks show by themselves.

    Returns:
        An `Evaluation`: robust <= each single attack <= clean, per example. Logits that are not
        finite are a wrong answer.

    Raises:
        ValueError: if there are no images or attacks, an image is outside the bounds, or a label
            is no class of the network.
        GateError: if an attack leaves its threat model.
    """
    images, labels, indices = attack_inputs(images, labels, indices)
    images = _check_inputs(images, attacks, batch_size)
    for function in (logits_fn, gradient_logits_fn):
        if function is not None:
            forget_if_changed(function, images)
    check_examples(logits_fn, images, labels)
    findings, cost = [], (0, 0)
    if with_checks:
        found, cost = _check(logits_fn, attacks, images, labels, indices, batch_size, seed)
        findings += found
        warn(findings)
    judgement = _judge(logits_fn, images, labels, batch_size)
    clean = ~judgement.fooled
    not_finite = judgement.not_finite
    worst = _WorstCase(images, clean)
    records: dict[str, AttackRecord] = {}
    done: dict[Attack, str] = {}

    run = _Run(
        (logits_fn, gradient_logits_fn),
        images,
        labels,
        indices,
        batch_size,
        seed,
        state,
        show_progress,
    )
    for name, attack in attacks.items():
        if attack in done and not worst_case_only:
            # Another protocol asks for the very same attack: same settings, seed and examples.
            records[name] = records[done[attack]]
            continue
        attacked = np.flatnonzero(worst.robust if worst_case_only else clean)
        books = run.attack(name, attack, attacked, worst)
        worst.close(name, books.fooled)
        records[name] = books.close(clean, attacked)
        not_finite |= books.not_finite
        done[attack] = name
    late = check_finite(not_finite) + run.findings
    warn(late)
    return Evaluation(
        labels=labels,
        clean_prediction=judgement.prediction,
        clean=clean,
        robust=worst.robust,
        correct={name: record.correct for name, record in records.items()},
        adversarial=worst.adversarial,
        broken_by=worst.broken_by,
        distance=worst.distance,
        records=records,
        findings=tuple(dict.fromkeys([*findings, *late])),
        cost_of_checks=cost,
    )


def predict(logits_fn, images, *, batch_size: int = 200) -> np.ndarray:
    """Predicted classes.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        images: (N, H, W, C) float32, pixel units.
        batch_size: most images sent through the network at once.

    Returns:
        (N,) int64.
    """
    forget_if_changed(logits_fn, images)
    starts = range(0, len(images), batch_size)
    parts = [_CLASSIFIER.predict(logits_fn, images[i : i + batch_size]) for i in starts]
    return np.concatenate(parts).astype(np.int64)


def distances(a: np.ndarray, b: np.ndarray, norm: str) -> np.ndarray:
    """Distances between images in float64: two (N, H, W, C) arrays -> (N,)."""
    delta = (a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), math.prod(a.shape[1:]))
    if norm == "linf":
        return np.abs(delta).max(axis=1, initial=0.0)
    return np.sqrt(np.square(delta).sum(axis=1))


def check_threat(name: str, adversarial, images, indices, threat: ThreatModel) -> None:
    """Refuse adversarial images that are not what their threat model allows.

    Args:
        name: the attack, for the message.
        adversarial: (N, H, W, C) float, pixel units.
        images: (N, H, W, C) float, pixel units.
        indices: (N,) int places in the data set, for the message.
        threat: norm, epsilon and bounds.

    Raises:
        GateError: for another shape, values that are not finite or outside the bounds, or a
            distance above epsilon (1 + 1e-6) plus one float32 spacing of the upper bound.
    """
    if adversarial.shape != images.shape:
        raise GateError(f"{name} returned shape {adversarial.shape}, expected {images.shape}.")
    flat = adversarial.reshape(len(adversarial), math.prod(adversarial.shape[1:]))
    for values, problem in (
        (~np.isfinite(flat), "is not finite"),
        ((flat < threat.lower) | (flat > threat.upper), "leaves the pixel range"),
    ):
        bad = np.flatnonzero(values.any(axis=1))
        if len(bad):
            raise GateError(
                f"{name} left its threat model: image {indices[bad[0]]} {problem} "
                f"[{threat.lower:g}, {threat.upper:g}] ({len(bad)} such images)."
            )
    measured = distances(adversarial, images, threat.norm)
    spacing = float(np.spacing(np.float32(threat.upper)))
    if threat.norm == "l2":
        # Each pixel may be off by one rounding; their l2 sum grows with the root of their number.
        spacing *= math.sqrt(flat.shape[1])
    allowed = threat.epsilon * (1 + _RELATIVE_SLACK) + spacing
    worst = int(np.argmax(measured)) if len(measured) else 0
    if len(measured) and measured[worst] > allowed:
        raise GateError(
            f"{name} left its threat model: image {indices[worst]} is at distance "
            f"{measured[worst]:.6g}, allowed {threat.epsilon:g} in {threat.norm}."
        )


def content_hash(*arrays: np.ndarray) -> str:
    """sha256 of arrays: types, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def network_hash(network: keras.Model) -> str:
    """sha256 of a Keras network: architecture and weights."""
    digest = hashlib.sha256(json.dumps(network.get_config(), default=str).encode())
    digest.update(content_hash(*network.get_weights()).encode())
    return digest.hexdigest()


def estimate_seconds(
    logits_fn, attacks: Mapping[str, Attack], images, labels, *, batch_size: int = 200
) -> float:
    """How long the attacks take at most, from one timed gradient step on this machine.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attacks: the attacks by name.
        images: (N, H, W, C) float32, pixel units.
        labels: (N,) int.
        batch_size: images sent through the network at once.

    Returns:
        Seconds; attacks that stop early take less.
    """
    sample = images[: min(len(images), batch_size)]
    attack: Attack = next(iter(attacks.values()))
    attacked_fn = frozen_copy(logits_fn, sample)
    probe = PGD(attack.threat, num_steps=2, step_size=attack.threat.epsilon, random_start=False)

    def seconds_of_probe() -> float:
        started = time.monotonic()
        probe.run(attacked_fn, sample, labels[: len(sample)], seed=0)
        return time.monotonic() - started

    seconds_of_probe()
    # Three forwards and two gradients; a gradient step costs about two forwards.
    seconds_per_forward = seconds_of_probe() / len(sample) / 5
    passes = sum(sum(attack.cost()) for attack in attacks.values())
    return passes * seconds_per_forward * len(images)


class _WorstCase:
    """What all attacks together have done to N examples; the only place that keeps N images."""

    def __init__(self, images, clean):
        self._images = images
        self.robust = clean.copy()
        self.adversarial = images.copy()
        self.broken_by = ["" if is_clean else "clean" for is_clean in clean]
        self.distance = np.zeros(len(images))

    def add(self, batch, adversarial, norm):
        """Take an attack's images of those that no attack before it has broken."""
        stands = self.robust[batch]
        rows = batch[stands]
        self.adversarial[rows] = adversarial[stands]
        self.distance[rows] = distances(self.adversarial[rows], self._images[rows], norm)

    def close(self, name, fooled):
        """Credit an attack, once all of its batches are there, with those that it fools."""
        newly = np.flatnonzero(self.robust & fooled)
        self.robust[newly] = False
        for example in newly:
            self.broken_by[example] = name


class _Books:
    """Collects what an attack does to N examples, batch by batch."""

    def __init__(self, worst):
        self._worst = worst
        self.fooled = np.zeros(len(worst.robust), bool)
        self.not_finite = np.zeros(len(worst.robust), bool)
        self.stages: dict[str, np.ndarray] = {}
        self._last_fooled = np.zeros(len(worst.robust), bool)
        self._forwards = self._backwards = self._unconfirmed = 0
        self._seconds = 0.0

    def add(self, batch, norm, found, seconds):
        self._worst.add(batch, found.adversarial, norm)
        self.fooled[batch] = found.fooled
        self.not_finite[batch] = found.not_finite
        self._last_fooled[batch] = found.last_iterate_fooled
        self.count(found.forwards, found.backwards, seconds)
        self._unconfirmed += found.unconfirmed

    def count(self, forwards, backwards, seconds):
        self._forwards += forwards
        self._backwards += backwards
        self._seconds += seconds

    def close(self, clean, attacked):
        is_attacked = np.zeros(len(clean), bool)
        is_attacked[attacked] = True
        return AttackRecord(
            correct=clean & is_attacked & ~self.fooled,
            correct_last_iterate=clean & is_attacked & ~self._last_fooled,
            attacked=is_attacked,
            forwards=self._forwards,
            backwards=self._backwards,
            seconds=self._seconds,
            unconfirmed=self._unconfirmed,
            stages=tuple(self.stages.items()),
        )


@dataclasses.dataclass(frozen=True)
class _Confirmed(AttackResult):
    unconfirmed: int = 0
    not_finite: Any = None
    """(N,) bool: whom logits that are not finite fool."""


class _Run:
    """One evaluation: the network, the examples, and where finished batches are kept."""

    def __init__(self, functions, images, labels, indices, batch_size, seed, state, show_progress):
        self._logits_fn, self._gradient_logits_fn = functions
        self._attacked_fn = frozen_copy(self._logits_fn, images[:batch_size])
        self._images, self._labels, self._indices = images, labels, indices
        self._batch_size = batch_size
        self._seed = seed
        self._state = state
        self._show_progress = show_progress
        self._data_key = content_hash(images, labels, indices) if state else ""
        self.findings: list[Finding] = []
        """What the attacks show of the network."""

    def attack(self, name, attack, rows, worst):
        """Attack some rows of the data set; the images go to the worst case."""
        books = _Books(worst)
        if isinstance(attack, Cascade):
            self._attack_in_stages(books, name, attack, rows)
        else:
            self._attack_all(books, name, attack, rows)
        return books

    def _attack_all(self, books, name, attack, rows):
        """Attack batch by batch; what another worker is at comes last, from what it saved."""
        starts = range(0, len(rows), self._batch_size)
        batches = [rows[start : start + self._batch_size] for start in starts]
        is_shown = self._show_progress and batches
        with Progress(total=len(batches), desc=name, unit="batch", disable=not is_shown) as bar:
            for wait in (False, True):
                taken = []
                for batch in batches:
                    found = self._attack_batch(name, attack, batch, wait=wait)
                    if found is None:
                        taken.append(batch)
                    else:
                        books.add(batch, attack.threat.norm, *found)
                        bar.update()
                batches = taken

    def _attack_in_stages(self, books, name, cascade, rows):
        """Each stage on all that still stand, so that batches stay full as examples fall."""
        if not len(rows):
            return
        num_classes = count_classes(self._logits_fn, self._images)
        is_standing = np.zeros(len(self._images), bool)
        is_standing[rows] = True
        before = is_standing.copy()
        for stage, attack in cascade.attacks(num_classes).items():
            rows = np.flatnonzero(is_standing)
            self._attack_all(books, f"{name}: {stage}", attack, rows)
            is_standing &= ~books.fooled
            books.stages[stage] = is_standing.copy()
        self.findings += check_square(before, books.stages.items())

    def _attack_batch(self, name, attack, batch, *, wait):
        """Attack one batch, or take its result from the state; either way it passes the gate.

        Returns:
            What was found and the seconds that it took, or None if another worker is at it and
            `wait` is off.
        """
        images, labels, indices = self._images[batch], self._labels[batch], self._indices[batch]
        description = f"{self._data_key} {attack!r} {self._seed} {_hash_of(batch)}"
        if self._gradient_logits_fn is not None:
            description += f" {self._gradient_logits_fn!r}"
        arrays = self._saved(description)
        if arrays is None:
            claim = self._state.claim(description, wait=wait) if self._state else nullcontext(True)
            with claim as is_mine:
                if not is_mine:
                    return None
                # Another worker may have finished it meanwhile.
                arrays = self._saved(description)
                if arrays is None:
                    arrays = self._compute(attack, images, labels, indices)
                    if self._state:
                        self._state.save(description, arrays)
        forwards, backwards, seconds = arrays["counts"]
        found = AttackResult(
            arrays["adversarial"], arrays["fooled"], arrays["last"], int(forwards), int(backwards)
        )
        check_threat(name, found.adversarial, images, indices, attack.threat)
        return _confirm(self._logits_fn, found, labels, self._batch_size), float(seconds)

    def _saved(self, description):
        arrays = self._state.load(description) if self._state else None
        return arrays if arrays is not None and arrays.keys() >= _SAVED else None

    def _compute(self, attack, images, labels, indices):
        started = time.monotonic()
        followed = self._gradient_logits_fn
        # Attacks that know no such argument run as they are.
        options = {} if followed is None else {"gradient_logits_fn": followed}
        found = attack.run(
            self._attacked_fn, images, labels, seed=self._seed, indices=indices, **options
        )
        seconds = time.monotonic() - started
        return {
            "adversarial": found.adversarial,
            "fooled": found.fooled,
            "last": found.last_iterate_fooled,
            "counts": np.array([found.forwards, found.backwards, seconds]),
        }


def _confirm(logits_fn, found, labels, batch_size):
    """Count an image as fooled only if it is, read back from the array in another batch size."""
    candidates = np.flatnonzero(found.fooled)
    other_size = max(1, batch_size // 2) if batch_size > 1 else 2
    judgement = _judge(logits_fn, found.adversarial[candidates], labels[candidates], other_size)
    wrong = judgement.fooled
    fooled = found.fooled.copy()
    fooled[candidates[~wrong]] = False
    not_finite = np.zeros(len(fooled), bool)
    not_finite[candidates] = judgement.not_finite
    return _Confirmed(
        adversarial=found.adversarial,
        fooled=fooled,
        last_iterate_fooled=found.last_iterate_fooled & fooled,
        forwards=found.forwards,
        backwards=found.backwards,
        unconfirmed=int((~wrong).sum()),
        not_finite=not_finite,
    )


def _judge(logits_fn, images, labels, batch_size) -> Judgement:
    """One pass over the images."""
    judgement = Judgement(np.zeros(len(images), np.int64), np.zeros(len(images), bool))
    for i in range(0, len(images), batch_size):
        part = slice(i, i + batch_size)
        found = _CLASSIFIER.judge(logits_fn, images[part], labels[part])
        for whole, values in zip(judgement, found, strict=True):
            whole[part] = values
    return judgement


def _check(logits_fn, attacks, images, labels, indices, batch_size, seed):
    """What a look at the first images says of the network, and its forwards and backwards."""
    images, labels, indices = (part[:NUM_CHECKED] for part in (images, labels, indices))
    num_classes = count_classes(logits_fn, images)
    findings: list[Finding] = []
    for attack in attacks.values():
        if isinstance(attack, Cascade):
            findings += attack.check_num_classes(num_classes)
    for_randomised = all(getattr(attack, "for_randomised", False) for attack in attacks.values())
    findings += check_network(
        logits_fn,
        next(iter(attacks.values())).threat,
        images,
        labels,
        followed=followed_losses(attacks.values()),
        for_randomised=for_randomised,
        seed=seed,
        indices=indices,
        batch_size=batch_size,
    )
    cost = cost_of_checks(len(images), for_randomised=for_randomised)
    return list(dict.fromkeys(findings)), cost


def _check_inputs(images, attacks, batch_size):
    if not len(images):
        raise ValueError("evaluate needs at least one image; got none.")
    if not attacks:
        raise ValueError("evaluate needs at least one attack; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    for attack in attacks.values():
        images = within_bounds(images, attack.threat.lower, attack.threat.upper)
    return images


def _hash_of(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.tobytes()).hexdigest()
