"""Attack a data set: per example, worst case, checked, resumable."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from logit_reg.attacks.engine.active_set import ActiveSet
from logit_reg.attacks.engine.attack import Attack, AttackResult, Cascade, run_attack
from logit_reg.attacks.engine.cascade import run_stages
from logit_reg.attacks.engine.checks import (
    NUM_CHECKED,
    Finding,
    check_finite,
    check_network,
    cost_of_checks,
    followed_losses,
    warn,
)
from logit_reg.attacks.engine.examples import Examples, check_examples, within_bounds
from logit_reg.attacks.engine.forward import Classifier, Judgement, count_classes, forget_if_changed
from logit_reg.attacks.engine.inference_copy import copy_for_inference
from logit_reg.attacks.engine.repeated_passes import with_repeats
from logit_reg.attacks.pgd import PGD
from logit_reg.evaluation.state import EvaluationState
from logit_reg.progress import Progress
from logit_reg.threat import ThreatModel

# Relative slack of an attack's own output: float32 cannot keep a ball to the last bit.
_RELATIVE_SLACK = 1e-6
# What is kept of a finished batch.
_SAVED = {"adversarial", "fooled", "last", "counts"}
# What is kept of a judgement by repeated passes: others would not be the same.
_JUDGED = {"prediction", "share_right"}

NUM_VERDICT_PASSES = 20
"""Passes that decide on an image of a randomised network."""

_CLASSIFIER = Classifier()


class ThreatModelError(RuntimeError):
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
    """Of a cascade: (name, (N,) bool still robust after it), in order."""


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
    """What each attack did."""
    findings: tuple[Finding, ...] = ()
    """What makes these numbers doubtful or incomplete, each once; see `check_network`."""
    cost_of_checks: tuple[int, int] = (0, 0)
    """Forwards and backwards of the checks that gave the findings."""
    share_right: np.ndarray | None = None
    """(N,) float: the share of passes that classify `adversarial` right, each drawn anew, where
    repeated passes decide; else None."""

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
    sample: tuple[np.ndarray, np.ndarray] | None = None,
    state: EvaluationState | None = None,
    show_progress: bool = False,
    gradient_logits_fn=None,
    with_checks: bool = True,
    eot: int = 1,
) -> Evaluation:
    """Attack a data set with several attacks and combine them per example.

    Signs that the numbers cannot be trusted are in `findings`, and each is issued once as an
    `AttackWarning`.

    Of a randomised network, an image is right if most of 20 passes are, each drawn anew; that is
    so with `eot` above 1, and with AutoAttack's version "rand". The network's own random numbers
    do not depend on `seed`.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attacks: the attacks by name, in the order in which they are to be credited.
        images: (N, H, W, C) float, pixel units, within the attacks' bounds.
        labels: (N,) or (N, 1) int true classes.
        batch_size: most images sent through the network at once.
        seed: source of all random numbers.
        worst_case_only: attack only what is still robust after the attacks before. The worst case
            stays the same up to the random order of batches; the accuracy under a single attack
            is then that of the attacks so far.
        indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
        sample: images and labels, as above, that show what the network is: where the images are
            a slice, the first ones of the data set, so that all slices come to the same; the
            images and labels themselves if None.
        state: where finished batches are kept.
        show_progress: draw a progress bar for each attack.
        gradient_logits_fn: what the attacks follow, see `Attack.run`; `logits_fn` if None.
        with_checks: check the network first, on a few images, see `check_network`; without it
            `findings` hold what the attacks show by themselves.
        eot: passes over which the attacks average gradients and verdicts, see `RepeatedPasses`;
            above 1 for randomised networks.

    Returns:
        An `Evaluation`: robust <= each single attack <= clean, per example. Logits that are not
        finite are a wrong answer.

    Raises:
        ValueError: if there are no images or attacks, `eot` is below 1, an image is outside the
            bounds, or a label is no class of the network.
        ThreatModelError: if an attack leaves its threat model.
    """

    def checked(images, labels, indices):
        given = Examples.checked(
            images, labels, seed=seed, indices=indices, gradient_logits_fn=gradient_logits_fn
        )
        return dataclasses.replace(
            given, images=_check_inputs(given.images, attacks, batch_size, eot)
        )

    examples = checked(images, labels, indices)
    first_examples = examples if sample is None else checked(*sample, None)
    images, labels = examples.images, examples.labels
    for function in (logits_fn, gradient_logits_fn):
        if function is not None:
            forget_if_changed(function, images)
    check_examples(logits_fn, images, labels)
    findings: list[Finding] = []
    cost = (0, 0)
    if with_checks:
        found, cost = _check(logits_fn, attacks, first_examples, batch_size, eot)
        findings += found
        warn(findings)
    is_repeated = decided_by_repeats(attacks.values(), eot)
    judge = _Judge(logits_fn, NUM_VERDICT_PASSES if is_repeated else 1)
    attacked_fn = copy_for_inference(logits_fn, first_examples.images[:batch_size])
    run = _Run(judge, attacked_fn, examples, batch_size, state, show_progress, eot)
    judgement, share_right = run.judge_clean()
    clean = ~judgement.fooled
    not_finite = judgement.not_finite
    worst = _WorstCase(images, clean, share_right)
    unconfirmed = np.zeros(len(images), bool)
    records: dict[str, AttackRecord] = {}
    done: dict[Attack, str] = {}

    for name, attack in attacks.items():
        if attack in done and not worst_case_only:
            # Another protocol asks for the very same attack: same settings, seed and examples.
            records[name] = records[done[attack]]
            continue
        attacked = _Attacked(worst, worst.robust if worst_case_only else clean, attack.threat.norm)
        run.attack(name, attack, attacked)
        worst.credit(name, attacked.fooled)
        records[name] = attacked.as_record()
        not_finite |= attacked.not_finite
        unconfirmed |= attacked.is_unconfirmed
        done[attack] = name
    late = check_finite(not_finite) + run.findings
    if is_repeated:
        late.append(repeated_finding(worst.share_right))
        late += unconfirmed_findings(int((worst.robust & unconfirmed).sum()))
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
        share_right=worst.share_right if is_repeated else None,
    )


def decided_by_repeats(attacks: Iterable[Attack], eot: int) -> bool:
    """Whether several passes decide on an image: with `eot` above 1, or where an attack asks."""
    return eot > 1 or any(map(_is_for_randomised, attacks))


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
    if norm == "l1":
        return np.abs(delta).sum(axis=1)
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
        ThreatModelError: for another shape, values that are not finite or outside the bounds, or a
            distance above epsilon (1 + 1e-6) plus that of one float32 spacing of the upper bound
            in every value.
    """
    if adversarial.shape != images.shape:
        raise ThreatModelError(
            f"{name} returned shape {adversarial.shape}, expected {images.shape}."
        )
    flat = adversarial.reshape(len(adversarial), math.prod(adversarial.shape[1:]))
    for values, problem in (
        (~np.isfinite(flat), "is not finite"),
        ((flat < threat.lower) | (flat > threat.upper), "leaves the pixel range"),
    ):
        bad = np.flatnonzero(values.any(axis=1))
        if len(bad):
            raise ThreatModelError(
                f"{name} left its threat model: image {indices[bad[0]]} {problem} "
                f"[{threat.lower:g}, {threat.upper:g}] ({len(bad)} such images)."
            )
    measured = distances(adversarial, images, threat.norm)
    # Each value may be off by one rounding.
    rounding = threat.distance_of(float(np.spacing(np.float32(threat.upper))), images.shape[1:])
    allowed = threat.epsilon * (1 + _RELATIVE_SLACK) + rounding
    worst = int(np.argmax(measured)) if len(measured) else 0
    if len(measured) and measured[worst] > allowed:
        raise ThreatModelError(
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


def network_hash(network: Any) -> str:
    """sha256 of a network's architecture and weights: of Keras, or from `logit_reg.adapters`."""
    if not isinstance(network, keras.Model):
        return network.sha256
    digest = hashlib.sha256(json.dumps(network.get_config(), default=str).encode())
    digest.update(content_hash(*network.get_weights()).encode())
    return digest.hexdigest()


def known_hash(network: Any) -> str | None:
    """`network_hash`; None for a plain function, which has no content to make a hash of."""
    is_known = isinstance(network, keras.Model) or hasattr(network, "sha256")
    return network_hash(network) if is_known else None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How long attacks take on this machine, and what a quick look at the first batch says."""

    seconds: float
    """If every image withstands every attack to its end."""
    early: float
    """Share of that which first stages of cascades, and attacks that are none, take."""
    right: float
    """Share of the first batch that is classified right."""
    left: float
    """Share of the first batch that withstands two steps of PGD, too."""

    @property
    def least(self) -> float:
        """Seconds, if no image withstands the first stage of a cascade."""
        return self.seconds * self.right * self.early

    @property
    def most(self) -> float:
        """Seconds, if every image that two steps of PGD leave withstands all."""
        return self.least + self.seconds * self.left * (1 - self.early)


def estimate(
    logits_fn, attacks: Mapping[str, Attack], images, labels, *, batch_size: int = 200, eot: int = 1
) -> Estimate:
    """How long attacks take, from one timed gradient step on this machine.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attacks: the attacks by name.
        images: (N, H, W, C) float32, pixel units.
        labels: (N,) int.
        batch_size: images sent through the network at once.
        eot: see `evaluate`.
    """
    sample, known = images[:batch_size], labels[:batch_size]
    threat = next(iter(attacks.values())).threat
    attacked_fn = copy_for_inference(logits_fn, sample)
    probe = PGD(threat, num_steps=2, step_size=threat.epsilon, random_start=False)
    probe.run(attacked_fn, sample, known, seed=0)
    started = time.monotonic()
    found = probe.run(attacked_fn, sample, known, seed=0)
    # Three forwards and two gradients; a gradient step costs about two forwards.
    seconds_per_forward = (time.monotonic() - started) / len(sample) / 5
    num_classes = count_classes(logits_fn, sample)
    passes = eot * sum(sum(attack.cost()) for attack in attacks.values())
    first = [_first_stage(attack, num_classes) for attack in attacks.values()]
    early = eot * sum(sum(attack.cost()) for attack in first)
    return Estimate(
        seconds=passes * seconds_per_forward * len(images),
        early=early / passes,
        right=float(np.mean(predict(logits_fn, sample, batch_size=batch_size) == known)),
        left=float(np.mean(~found.fooled)),
    )


def _first_stage(attack: Attack, num_classes: int) -> Attack:
    if not isinstance(attack, Cascade):
        return attack
    return next(iter(attack.attacks(num_classes).values()))


class _WorstCase:
    """What all attacks together have done to N examples; the only place that keeps N images."""

    def __init__(self, images, clean, share_right):
        self.images = images
        self.share_right = share_right
        """(N,) float: the share of passes that classify `adversarial` right."""
        self.robust = clean.copy()
        self.adversarial = images.copy()
        self.broken_by = ["" if is_clean else "clean" for is_clean in clean]
        self.distance = np.zeros(len(images))

    def credit(self, name, fooled):
        """Credit an attack, once all of its batches are there, with those that it fools."""
        newly = np.flatnonzero(self.robust & fooled)
        self.robust[newly] = False
        for example in newly:
            self.broken_by[example] = name


class _Attacked(ActiveSet):
    """What one attack does to the examples; its images go to the worst case of all attacks."""

    def __init__(self, worst, attacked, norm):
        super().__init__(worst.adversarial)
        self._worst, self._attacked, self._norm = worst, attacked.copy(), norm
        # Whoever is not attacked is not in the active set.
        self.fooled = ~attacked
        self.last_iterate_fooled = ~attacked
        self.not_finite = np.zeros(len(attacked), bool)
        """(N,) bool: whom logits that are not finite fool."""
        self.is_unconfirmed = np.zeros(len(attacked), bool)
        """(N,) bool: whom the attack called fooled and the returned image does not fool."""
        self.unconfirmed = 0
        self.seconds = 0.0

    def record(self, rows, candidates, fooled, last_iterate_fooled=None):
        """See `ActiveSet.record`; keeps the images of those that no attack before has broken."""
        worst = self._worst
        is_robust = worst.robust[rows]
        kept = np.where(is_robust[:, None, None, None], candidates, worst.adversarial[rows])
        robust = rows[is_robust]
        worst.distance[robust] = distances(kept[is_robust], worst.images[robust], self._norm)
        return super().record(rows, kept, fooled, last_iterate_fooled)

    def weakest(self, rows, found, share_right) -> AttackResult:
        """What was found; where more passes are right on it, the images of before."""
        worst = self._worst
        is_weaker = share_right > worst.share_right[rows]
        kept = np.where(is_weaker[:, None, None, None], worst.adversarial[rows], found.adversarial)
        updated = worst.robust[rows] & ~is_weaker
        worst.share_right[rows[updated]] = share_right[updated]
        return dataclasses.replace(found, adversarial=kept)

    def as_record(self) -> AttackRecord:
        return AttackRecord(
            correct=~self.fooled,
            correct_last_iterate=~self.last_iterate_fooled,
            attacked=self._attacked,
            forwards=self.forwards,
            backwards=self.backwards,
            seconds=self.seconds,
            unconfirmed=self.unconfirmed,
            stages=tuple(self.stages),
        )


class _Run:
    """One evaluation: the network, the examples, and where finished batches are kept."""

    def __init__(self, judge, attacked_fn, examples, batch_size, state, show_progress, eot):
        self._judge, self._attacked_fn = judge, attacked_fn
        self._examples, self._eot = examples, eot
        self._batch_size = batch_size
        self._state = state
        self._show_progress = show_progress
        arrays = (examples.images, examples.labels, examples.indices)
        self._data_key = content_hash(*arrays) if state else ""
        self._is_repeated = judge.num_passes > 1
        self.findings: list[Finding] = []
        """What the attacks show of the network."""

    def judge_clean(self) -> tuple[Judgement, np.ndarray]:
        """What the judge says of the images themselves."""
        examples = self._examples

        def judge():
            return self._judge.judge(examples.images, examples.labels, self._batch_size)

        if not self._is_repeated:
            return judge()
        description = f"{self._data_key} clean, {self._judge.num_passes} passes"
        arrays = self._kept(description, _JUDGED, lambda: _judged(*judge()), wait=True)
        return _judgement(arrays)

    def attack(self, name, attack, attacked):
        """Attack the active set of an attack, and record there what is found.

        The stages of a cascade each run on the whole active set, so that batches stay full as
        examples fall.
        """
        rows = attacked.rows
        if not isinstance(attack, Cascade):
            self._attack_all(name, attack, attacked, rows)
        elif len(rows):

            def run_stage(stage, attack, rows):
                self._attack_all(f"{name}: {stage}", attack, attacked, rows)

            num_classes = count_classes(self._judge.logits_fn, self._examples.images)
            self.findings += run_stages(attack, num_classes, attacked, run_stage)

    def _attack_all(self, name, attack, attacked, rows):
        """Attack batch by batch; what another worker is at comes last, from what it saved."""
        starts = range(0, len(rows), self._batch_size)
        batches = [rows[start : start + self._batch_size] for start in starts]
        is_shown = self._show_progress and batches
        with Progress(total=len(batches), desc=name, unit="batch", disable=not is_shown) as bar:
            for wait in (False, True):
                taken = []
                for batch in batches:
                    if self._attack_batch(name, attack, attacked, batch, wait=wait):
                        bar.update()
                    else:
                        taken.append(batch)
                batches = taken

    def _attack_batch(self, name, attack, attacked, batch, *, wait):
        """Attack one batch, or take its result from the state; either way it is checked.

        Returns:
            Whether it is done: not if another worker is at it and `wait` is off.
        """
        examples = self._examples.take(batch)
        description = f"{self._data_key} {attack!r} {examples.seed} {_hash_of(batch)}"
        if examples.gradient_logits_fn is not None:
            description += f" {examples.gradient_logits_fn!r}"
        if self._eot > 1:
            description += f" eot {self._eot}"
        # Who is attacked next depends on the judgement. Repeated passes would not give the same one
        # again, and a killed or shared evaluation would not find its batches.
        names = _SAVED | (_JUDGED if self._is_repeated else set())
        arrays = self._kept(
            description, names, lambda: self._compute(name, attack, examples), wait=wait
        )
        if arrays is None:
            return False
        forwards, backwards, seconds = arrays["counts"]
        found = AttackResult(
            arrays["adversarial"], arrays["fooled"], arrays["last"], int(forwards), int(backwards)
        )
        check_threat(name, found.adversarial, examples.images, examples.indices, attack.threat)
        judged = _judgement(arrays) if self._is_repeated else None
        self._confirm(attacked, batch, found, judged)
        attacked.seconds += float(seconds)
        return True

    def _kept(self, description, names, compute, *, wait):
        """Arrays from the state, else computed and kept there; None while another worker does."""
        if self._state is None:
            return compute()
        if (arrays := self._saved(description, names)) is not None:
            return arrays
        with self._state.claim(description, wait=wait) as is_mine:
            if not is_mine:
                return None
            # Another worker may have finished it meanwhile.
            arrays = self._saved(description, names)
            if arrays is None:
                arrays = compute()
                self._state.save(description, arrays)
            return arrays

    def _saved(self, description, names):
        arrays = self._state.load(description)
        return arrays if arrays is not None and arrays.keys() >= names else None

    def _compute(self, name, attack, examples):
        started = time.monotonic()
        found = run_attack(attack, *with_repeats(self._attacked_fn, examples, self._eot))
        seconds = time.monotonic() - started
        judged = {}
        if self._is_repeated:
            check_threat(name, found.adversarial, examples.images, examples.indices, attack.threat)
            judged = _judged(*self._judge_again(found.adversarial, examples.labels))
        return {
            **judged,
            "adversarial": found.adversarial,
            "fooled": found.fooled,
            "last": found.last_iterate_fooled,
            "counts": np.array([self._eot * found.forwards, self._eot * found.backwards, seconds]),
        }

    def _judge_again(self, images, labels):
        """Judge what an attack returned, in another batch size."""
        other_size = max(1, self._batch_size // 2) if self._batch_size > 1 else 2
        return self._judge.judge(images, labels, other_size)

    def _confirm(self, attacked, batch, found, judged):
        """Record an image as fooled only if it is so when read back.

        Of a randomised network, repeated passes decide on all of them, in `judged`.
        """
        candidates = np.flatnonzero(found.fooled | self._is_repeated)
        if judged is None:
            labels = self._examples.labels[batch[candidates]]
            judgement, share_right = self._judge_again(found.adversarial[candidates], labels)
        else:
            judgement, share_right = judged
        fooled = found.fooled.copy()
        fooled[candidates] = judgement.fooled
        last = found.last_iterate_fooled & fooled
        is_unconfirmed = found.fooled & ~fooled
        attacked.is_unconfirmed[batch] |= is_unconfirmed
        attacked.unconfirmed += int(is_unconfirmed.sum())
        attacked.not_finite[batch[candidates]] = judgement.not_finite
        if self._is_repeated:
            found = attacked.weakest(batch, found, share_right)
        attacked.add(batch, dataclasses.replace(found, fooled=fooled, last_iterate_fooled=last))


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What decides who is classified right: the network, in one pass or in most of several."""

    logits_fn: Any
    num_passes: int

    def judge(self, images, labels, batch_size) -> tuple[Judgement, np.ndarray]:
        """The judgement, and the (N,) float share of passes that are right.

        The prediction is that of most passes.
        """
        passes = [self._pass(images, labels, batch_size) for _ in range(self.num_passes)]
        share_right = 1 - np.mean([found.fooled for found in passes], axis=0)
        if self.num_passes == 1:
            return passes[0], share_right
        predictions = np.stack([found.prediction for found in passes])
        classes = np.arange(-1, predictions.max(initial=0) + 1)
        votes = (predictions[..., None] == classes).sum(axis=0)
        prediction = classes[votes.argmax(axis=1)]
        return _judgement({"prediction": prediction, "share_right": share_right})

    def _pass(self, images, labels, batch_size) -> Judgement:
        judgement = Judgement(np.zeros(len(images), np.int64), np.zeros(len(images), bool))
        for i in range(0, len(images), batch_size):
            part = slice(i, i + batch_size)
            found = _CLASSIFIER.judge(self.logits_fn, images[part], labels[part])
            for whole, values in zip(judgement, found, strict=True):
                whole[part] = values
        return judgement


def _judged(judgement, share_right) -> dict[str, np.ndarray]:
    """What is kept of a judgement by repeated passes."""
    return {"prediction": judgement.prediction, "share_right": share_right}


def _judgement(arrays) -> tuple[Judgement, np.ndarray]:
    """A judgement by repeated passes, from what is kept of it; a tie counts as wrong."""
    share_right = arrays["share_right"]
    return Judgement(arrays["prediction"], share_right <= 0.5), share_right


def _is_for_randomised(attack) -> bool:
    return getattr(attack, "for_randomised", False)


def repeated_finding(share_right) -> Finding:
    """What the verdicts over repeated passes leave out.

    Args:
        share_right: (N,) the share of passes that are right on each image.
    """
    mean, always = float(np.mean(share_right)), float(np.mean(share_right == 1))
    return Finding(
        "repeated_passes",
        f"an image counts as right if most of {NUM_VERDICT_PASSES} passes are; under the attacks "
        f"{100 * mean:.1f} % of the passes are right on average, and {100 * always:.1f} % of the "
        "images in every pass, all that survives an attacker who can retry.",
        mean,
    )


def unconfirmed_findings(count: int) -> list[Finding]:
    """What to say of images that an attack fooled and most of further passes do not call fooled.

    Args:
        count: how many of them count as right in the end.
    """
    if not count:
        return []
    message = (
        f"{count} {'image that counts' if count == 1 else 'images that count'} as right fooled the "
        f"passes of an attack, but not most of {NUM_VERDICT_PASSES} further ones: on the boundary "
        "the verdict is chance."
    )
    return [Finding("unconfirmed", message, count)]


def _check(logits_fn, attacks, examples, batch_size, eot):
    """What the first images show of the network, and the forwards and backwards that took."""
    examples = examples.take(slice(NUM_CHECKED))
    num_classes = count_classes(logits_fn, examples.images)
    findings: list[Finding] = []
    for attack in attacks.values():
        if isinstance(attack, Cascade):
            findings += attack.check_num_classes(num_classes)
    for_randomised = eot > 1 or all(map(_is_for_randomised, attacks.values()))
    findings += check_network(
        logits_fn,
        next(iter(attacks.values())).threat,
        examples.images,
        examples.labels,
        followed=followed_losses(attacks.values()),
        for_randomised=for_randomised,
        seed=examples.seed,
        indices=examples.indices,
        batch_size=batch_size,
        gradient_logits_fn=examples.gradient_logits_fn,
    )
    cost = cost_of_checks(len(examples.images))
    return list(dict.fromkeys(findings)), cost


def _check_inputs(images, attacks, batch_size, eot):
    if not len(images):
        raise ValueError("evaluate needs at least one image; got none.")
    if not attacks:
        raise ValueError("evaluate needs at least one attack; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if eot < 1:
        raise ValueError(f"eot must be at least 1; got {eot}.")
    for attack in attacks.values():
        images = within_bounds(images, attack.threat.lower, attack.threat.upper)
    return images


def _hash_of(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.tobytes()).hexdigest()
