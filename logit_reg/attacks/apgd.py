"""Auto-PGD: projected gradient ascent that finds its own step size, in l1 its sparsity, too."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import (
    attack_loss,
    is_fooled,
    label_mask,
    margin,
    target_difference,
)
from logit_reg.attacks.engine.low_precision import is_screened, judged_logits, num_forwards
from logit_reg.attacks.engine.random_numbers import example_noise, random_direction
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses, with_repeats
from logit_reg.attacks.engine.target_distances import MOST_CANDIDATES, class_distances
from logit_reg.threat import ThreatModel

LOSSES = ("xent", "dlr")
TARGET_ORDERS = ("logits", "distance")

# Share of the new step; the rest repeats the last one.
_STEP_SHARE = 0.75
# The step size is halved unless the loss increased in more than this share of a period's steps.
_INCREASING_SHARE = 0.75
# In l1: radii of the balls, in epsilon, and the share of the steps that each but the last takes.
_SCALES = (3.0, 2.0, 1.0)
_STAGE_SHARE = 0.3
# In l1: share of a ball's steps after which step size and sparsity are adapted.
_SPARSE_PERIOD = 0.04
# In l1: how much sparser the best point has to have become for the step size to start again;
# else it is divided, down to a smallest share of the radius.
_SPARSER = 0.95
_STEP_DIVISOR = 1.5
_SMALLEST_STEP = 0.1
# In l1: a step moves so many times fewer values than the best point has moved.
_FEWER_VALUES = 1.5
# In l1: least number of steps before images that are fooled are taken out.
_STEPS_PER_CHUNK = 10
# Keeps 0 / 0 out of DLR, as published.
_TINY = 1e-12


class _AutoPGD(ActiveSetAttack):
    """Runs of Algorithm 1, or of its form in l1, on the active set, one after the other."""

    threat: ThreatModel
    num_steps: int
    num_samples: int
    num_targets = 1

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        num_begins = len(sparse_stages(self.num_steps)) if self.threat.norm == "l1" else 1
        backwards = (self.num_steps + num_begins) * self.num_targets
        forwards = backwards + 1
        if self.num_samples > 1:
            # One look at the start, two after each period, in l1 at most after each step.
            num_periods = sum(1 for _ in periods(self.num_steps))
            if self.threat.norm == "l1":
                num_periods = sparse_stages(self.num_steps)[-1][1]
            forwards += (2 * num_periods + 1) * self.num_targets
        return self.num_samples * forwards, self.num_samples * backwards

    @property
    def for_randomised(self) -> bool:
        """Whether it averages over several passes."""
        return self.num_samples > 1

    def _run(self, logits_fn, examples):
        found = super()._run(*with_repeats(logits_fn, examples, self.num_samples))
        return dataclasses.replace(
            found,
            forwards=self.num_samples * found.forwards,
            backwards=self.num_samples * found.backwards,
        )

    def _ascent(self, loss: str) -> "_Ascent | _SparseAscent":
        kind = _SparseAscent if self.threat.norm == "l1" else _Ascent
        return kind(self.threat, loss)

    def _starts(self, active) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """For each run the names of its random stream, and the targets."""
        raise NotImplementedError

    @property
    def _followed_loss(self) -> str:
        raise NotImplementedError

    def _attack(self, active):
        for names, targets in self._starts(active):
            stream = active.examples.stream(self, *names)
            self._ascent(self._followed_loss).run(active, targets, self.num_steps, stream=stream)


@dataclasses.dataclass(frozen=True)
class APGD(_AutoPGD):
    """Auto-PGD on the cross-entropy or on the difference of logits ratio (DLR).

    An image is left once it is fooled, at any iterate, unless repeated passes judge. In l1 a step
    moves few values, and the run goes through balls of 3, 2 and 1 times epsilon; only the iterates
    in the last one count.

    Source:
        Croce and Hein 2020, arXiv:2003.01690, Algorithm 1, Eq. 6 (DLR), and its public code. l1:
        Croce and Hein 2021, arXiv:2103.01208, and the same code, as AutoAttack runs it there.
        Deviations: whether the loss increased is decided in float64 on a quantity that grows
        with it and does not round near ln K (the direction is that of the float32 loss, as
        published); random numbers belong to each image.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    loss: str = "xent"
    """"xent" (cross-entropy) or "dlr", which needs at least 3 classes."""
    num_steps: int = 100
    """Number of updates; the schedule of the step size depends on it."""
    num_samples: int = 1
    """Passes over which gradients and verdicts are averaged, see `RepeatedPasses`; above 1 for
    randomised networks only."""

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}.")
        _check_counts(self, "num_steps", "num_samples")

    @property
    def _followed_loss(self):
        return self.loss

    def _starts(self, active):
        if self.loss == "dlr":
            _check_num_classes("DLR", 3, active)
        yield (self.loss,), active.examples.labels


@dataclasses.dataclass(frozen=True)
class APGDTargeted(_AutoPGD):
    """Auto-PGD on the targeted DLR, one target class after the other.

    Targets are the wrong classes with the largest clean logits, or the nearest. Needs at least 4
    classes.

    Source:
        APGD-T of AutoAttack: Croce and Hein 2020, arXiv:2003.01690, Eq. 7, and its public code.
        Deviations as for `APGD`. The nearest first: Melamed et al. 2024, arXiv:2407.02240 (MALT),
        see `class_distances`.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_targets: int = 9
    """Number of target classes, cut to the number of wrong classes."""
    num_steps: int = 100
    """Number of updates for each target."""
    num_samples: int = 1
    """Passes over which gradients and verdicts are averaged, see `RepeatedPasses`; above 1 for
    randomised networks only."""
    target_order: str = "logits"
    """Which classes come first: "logits", those with the largest, or "distance", those that are
    nearest if the network is linear; it takes one more gradient for each wrong class."""

    def __post_init__(self):
        _check_counts(self, "num_targets", "num_steps", "num_samples")
        if self.target_order not in TARGET_ORDERS:
            orders = ", ".join(TARGET_ORDERS)
            raise ValueError(f"target_order must be one of {orders}; got {self.target_order!r}.")

    def cost(self, num_classes: int = 10):
        """Return the most forwards and backwards that one image can take.

        Args:
            num_classes: K; counts with `target_order` "distance" only.
        """
        forwards, backwards = super().cost()
        if self.target_order == "distance":
            looks = self.num_samples * min(num_classes - 1, MOST_CANDIDATES)
            return forwards + looks, backwards + looks
        return forwards, backwards

    @property
    def _followed_loss(self):
        return "dlr-targeted"

    def _starts(self, active):
        _check_num_classes("targeted DLR", 4, active)
        distances = None
        if self.target_order == "distance":
            distances = class_distances(active, self.threat)
        for name, targets in active.targets(self.num_targets, distances):
            yield (name,), targets


def periods(num_steps: int) -> Iterator[int]:
    """Numbers of steps after which the step size is adapted.

    Args:
        num_steps: N of the paper, at least 1.

    Yields:
        22, 19, 16, 13, 10, 7, 6, 6, 1 for 100 steps: the sum is `num_steps`.

    Source:
        Croce and Hein 2020, section 3.1, in the rounding of the public code.
    """
    length = max(int(0.22 * num_steps), 1)
    shortest = max(int(0.06 * num_steps), 1)
    decrease = max(int(0.03 * num_steps), 1)
    left = num_steps
    while left > 0:
        yield min(length, left)
        left -= length
        length = max(length - decrease, shortest)


def sparse_stages(num_steps: int) -> list[tuple[float, int]]:
    """The balls of a run in l1, one after the other.

    Args:
        num_steps: of all together, at least 1.

    Returns:
        Radii in epsilon and numbers of steps: (3, 30), (2, 30), (1, 40) for 100 steps.

    Source:
        The public code of Croce and Hein 2021, arXiv:2103.01208. Deviation: where so few steps
        would leave none for the last ball, the larger ones get fewer.
    """
    larger = min(math.ceil(_STAGE_SHARE * num_steps), (num_steps - 1) // 2)
    steps = (larger, larger, num_steps - 2 * larger)
    return [(scale, count) for scale, count in zip(_SCALES, steps, strict=True) if count]


class _State(NamedTuple):
    """What each of N images carries from one period to the next."""

    current: Any
    """(N, H, W, C) x^(k)."""
    previous: Any
    """(N, H, W, C) x^(k-1), for the momentum."""
    gradient: Any
    """(N, H, W, C) at `current`."""
    best: Any
    """(N, H, W, C) x_max."""
    best_gradient: Any
    """(N, H, W, C) at `best`."""
    step_size: Any
    """(N,) pixel units."""
    best_loss: Any
    """(N,) float64, of `best`."""
    last_loss: Any
    """(N,) float64, of `current`."""
    halved: Any
    """(N,) bool: whether the step size was halved the last time."""


class _SparseState(NamedTuple):
    """What each of N images carries in l1."""

    current: Any
    """(N, H, W, C)."""
    gradient: Any
    """(N, H, W, C) at `current`."""
    best: Any
    """(N, H, W, C)."""
    best_gradient: Any
    """(N, H, W, C) at `best`."""
    step_size: Any
    """(N,) pixel units."""
    best_loss: Any
    """(N,) float64, of `best`."""
    num_moved: Any
    """(N,) float: how many values of `best` had moved when that was last looked at."""
    share: Any
    """(N,) share of the values that a step moves."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What runs of Auto-PGD have in common."""

    threat: ThreatModel
    loss: str

    def _judge(self, logits_fn, gradient_logits_fn, points, labels, targets, fooled):
        """Logits that judge, the loss to rank by, the unscaled gradient, the number of rechecks."""
        logits, gradient = self._logits_and_gradient(gradient_logits_fn, points, labels, targets)
        judged, num_again = judged_logits(
            logits_fn, gradient_logits_fn, points, logits, labels, fooled
        )
        # Losses of one precision, or rounding would tell iterates apart.
        ranked = logits if is_screened(gradient_logits_fn) else judged
        return judged, _rank_loss(self.loss, ranked, labels, targets), gradient, num_again

    def _logits_and_gradient(self, logits_fn, points, labels, targets):
        def loss(logits):
            if self.loss == "xent":
                return attack_loss("xent", logits, labels)
            return _rank_loss(self.loss, logits, labels, targets)

        return logits_and_gradient(logits_fn, points, loss)


@dataclasses.dataclass(frozen=True)
class _Ascent(_Run):
    """One run of Algorithm 1 from one random start."""

    def run(self, active, targets, num_steps, *, stream):
        """Attack who is still robust; `targets` are those of all."""
        rows, given, functions = active.rows, active.examples, active.functions
        if not len(rows):
            return
        examples = take((given.images, given.labels, targets, given.indices), rows)
        # Another network's logits may judge the iterates: one more forward each.
        passes = num_forwards(*functions)
        state, fooled, num_again = self.begin(
            functions, examples, stream=stream, restart=given.restart
        )
        active.count(len(rows), forwards=passes, backwards=1)
        active.count(num_again, forwards=1)
        candidates = state.current
        is_first = True
        for steps in (*periods(num_steps), 0):
            if active.is_repeated and not is_first:
                active.record(rows, state.best, fooled)
            keep = active.record(rows, candidates, fooled)
            rows, examples, state = rows[keep], take(examples, keep), _State(*take(state, keep))
            if not len(rows) or not steps:
                return
            state, *found = self._compiled_advance(functions, examples[0])(
                *examples[:3], state, steps, is_first
            )
            candidates, fooled, num_again = (tensor.numpy() for tensor in found)
            active.count(len(rows), forwards=steps * passes, backwards=steps)
            active.count(int(num_again), forwards=1)
            is_first = False

    def begin(self, functions, examples, *, stream, restart):
        """The state at the random start, who is fooled there, and the number of rechecks."""
        image = batch_spec(examples[0].shape[1:])
        numbers, scalar = batch_spec((), tf.int64), tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, numbers, scalar, scalar)
        begin = compiled(self, "_begin", functions, signature)
        state, fooled, num_again = begin(*examples, stream, restart)
        return _State(*(part.numpy() for part in state)), fooled.numpy(), int(num_again)

    def _compiled_advance(self, functions, images):
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        losses = batch_spec((), tf.float64)
        state = _State(*(image,) * 5, batch_spec(()), losses, losses, batch_spec((), tf.bool))
        scalars = (tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.bool))
        return compiled(self, "_advance", functions, (image, numbers, numbers, state, *scalars))

    def _begin(
        self, logits_fn, gradient_logits_fn, images, labels, targets, indices, stream, restart
    ):
        draw = {"stream": stream, "indices": indices, "restart": restart}
        direction = random_direction(self.threat, images, **draw)
        start = self.threat.project(images + self.threat.epsilon * direction, images)
        nobody = tf.zeros_like(labels, tf.bool)
        logits, loss, gradient, num_again = self._judge(
            logits_fn, gradient_logits_fn, start, labels, targets, nobody
        )
        step_size = tf.fill((tf.shape(images)[0],), 2.0 * self.threat.epsilon)
        # The public code compares the first loss of all with 0, not with that of the start.
        last_loss = tf.fill(tf.shape(loss), _zero_loss(self.loss))
        halved = tf.ones_like(labels, tf.bool)
        state = _State(start, start, gradient, start, gradient, step_size, loss, last_loss, halved)
        return state, is_fooled(logits, labels), num_again

    def _advance(
        self, logits_fn, gradient_logits_fn, images, labels, targets, state, num_steps, is_first
    ):
        """Take the steps of a period, then adapt the step size."""
        length = _per_image(state.step_size)

        def body(step, state, increases, candidates, fooled, num_again):
            is_very_first = tf.logical_and(is_first, tf.equal(step, 0))
            share = tf.where(is_very_first, 1.0, _STEP_SHARE)
            stepped = state.current + length * self.threat.ascent_direction(state.gradient)
            stepped = self.threat.project(stepped, images)
            moved = state.current + share * (stepped - state.current)
            moved += (1 - share) * (state.current - state.previous)
            current = self.threat.project(moved, images)

            logits, loss, gradient, again = self._judge(
                logits_fn, gradient_logits_fn, current, labels, targets, fooled
            )
            candidates = _candidates(logits_fn, candidates, current, fooled)
            fooled = tf.logical_or(fooled, is_fooled(logits, labels))
            increases += tf.cast(loss > state.last_loss, tf.float32)
            improved = loss > state.best_loss
            state = state._replace(
                current=current,
                previous=state.current,
                gradient=gradient,
                best=tf.where(_per_image(improved), current, state.best),
                best_gradient=tf.where(_per_image(improved), gradient, state.best_gradient),
                best_loss=tf.where(improved, loss, state.best_loss),
                last_loss=loss,
            )
            return step + 1, state, increases, candidates, fooled, num_again + again

        none = tf.zeros_like(state.step_size), state.current, tf.zeros_like(labels, tf.bool), 0
        _, new, increases, candidates, fooled, num_again = tf.while_loop(
            lambda step, *_: step < num_steps, body, (tf.constant(0, tf.int64), state, *none)
        )
        oscillates = increases <= _INCREASING_SHARE * tf.cast(num_steps, tf.float32)
        stuck = tf.logical_and(tf.logical_not(state.halved), new.best_loss <= state.best_loss)
        halved = tf.logical_or(oscillates, stuck)
        new = new._replace(
            current=tf.where(_per_image(halved), new.best, new.current),
            gradient=tf.where(_per_image(halved), new.best_gradient, new.gradient),
            step_size=tf.where(halved, 0.5 * state.step_size, state.step_size),
            halved=halved,
        )
        return new, candidates, fooled, num_again


@dataclasses.dataclass(frozen=True)
class _SparseAscent(_Run):
    """One run in l1 from one random start, through balls that shrink to epsilon."""

    def run(self, active, targets, num_steps, *, stream):
        """Attack who is still robust; `targets` are those of all."""
        rows, given, functions = active.rows, active.examples, active.functions
        image, numbers = batch_spec(given.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        start = compiled(self, "_start", (), (image, numbers, scalar, scalar))
        examples = take((given.images, given.labels, targets), rows)
        point = start(examples[0], given.indices[rows], stream, given.restart)
        # Another network's logits may judge the iterates: one more forward each.
        passes = num_forwards(*functions)
        for scale, stage_steps in sparse_stages(num_steps):
            if not len(rows):
                return
            period = max(int(_SPARSE_PERIOD * stage_steps), 1)
            chunk = period * math.ceil(_STEPS_PER_CHUNK / period)
            state, fooled, num_again = self._begun(functions, *examples, point, scale)
            candidates, num_done, steps = state.current, 0, 1
            while True:
                active.count(len(rows), forwards=steps * passes, backwards=steps)
                active.count(int(num_again), forwards=1)
                if scale == _SCALES[-1]:
                    if active.is_repeated and num_done:
                        active.record(rows, np.asarray(state[2]), fooled.numpy())
                    keep = active.record(rows, candidates.numpy(), fooled.numpy())
                    rows, examples, state = rows[keep], take(examples, keep), take(state, keep)
                state = _SparseState(*state)
                if not len(rows) or num_done == stage_steps:
                    break
                steps = min(chunk, stage_steps - num_done)
                state, candidates, fooled, num_again = self._advanced(
                    functions, *examples, state, scale, period, steps
                )
                num_done += steps
            point = state.best

    def _begun(self, functions, images, *inputs):
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        signature = (image, numbers, numbers, image, tf.TensorSpec(()))
        return compiled(self, "_begin", functions, signature)(images, *inputs)

    def _advanced(self, functions, images, *inputs):
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        number, losses = batch_spec(()), batch_spec((), tf.float64)
        state = _SparseState(*(image,) * 4, number, losses, number, number)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, state, tf.TensorSpec(()), scalar, scalar)
        return compiled(self, "_advance", functions, signature)(images, *inputs)

    def _start(self, images, indices, stream, restart):
        """Normal noise, as wide as the pixel range; each ball takes its projection."""
        draw = {"stream": stream, "indices": indices, "restart": restart}
        noise = example_noise("normal", images.shape[1:], **draw)
        points = images + (self.threat.upper - self.threat.lower) * noise
        return self.threat.project(points, images, _SCALES[0])

    def _begin(self, logits_fn, gradient_logits_fn, images, labels, targets, point, scale):
        """The state where a ball is entered, who is fooled there, and the number of rechecks."""
        start = self.threat.project(point, images, scale)
        nobody = tf.zeros_like(labels, tf.bool)
        logits, loss, gradient, num_again = self._judge(
            logits_fn, gradient_logits_fn, start, labels, targets, nobody
        )
        step_size = tf.fill(tf.shape(images)[:1], scale * self.threat.epsilon)
        moved = _num_moved(start, images)
        share = _next_share(moved, images)
        state = _SparseState(start, gradient, start, gradient, step_size, loss, moved, share)
        return state, is_fooled(logits, labels), num_again

    def _advance(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        targets,
        state,
        scale,
        period,
        num_steps,
    ):
        """Take steps; after each period adapt their length and their sparsity."""
        radius = scale * self.threat.epsilon

        def adapted(state):
            moved = _num_moved(state.best, images)
            is_sparser = moved < _SPARSER * state.num_moved
            shorter = tf.maximum(state.step_size / _STEP_DIVISOR, _SMALLEST_STEP * radius)
            back = _per_image(is_sparser)
            return state._replace(
                current=tf.where(back, state.best, state.current),
                gradient=tf.where(back, state.best_gradient, state.gradient),
                step_size=tf.where(is_sparser, radius, shorter),
                num_moved=moved,
                share=_next_share(moved, images),
            )

        def body(step, state, candidates, fooled, num_again):
            gradient = self.threat.without_stopped(state.gradient, state.current, images)
            direction = self.threat.ascent_direction(gradient, state.share)
            moved = state.current + _per_image(state.step_size) * direction
            current = self.threat.project(moved, images, scale)
            logits, loss, gradient, again = self._judge(
                logits_fn, gradient_logits_fn, current, labels, targets, fooled
            )
            candidates = _candidates(logits_fn, candidates, current, fooled)
            fooled = tf.logical_or(fooled, is_fooled(logits, labels))
            improved = loss > state.best_loss
            state = state._replace(
                current=current,
                gradient=gradient,
                best=tf.where(_per_image(improved), current, state.best),
                best_gradient=tf.where(_per_image(improved), gradient, state.best_gradient),
                best_loss=tf.where(improved, loss, state.best_loss),
            )
            is_check = tf.equal((step + 1) % period, 0)
            state = tf.cond(is_check, lambda: adapted(state), lambda: state)
            return step + 1, state, candidates, fooled, num_again + again

        nobody = tf.zeros_like(labels, tf.bool)
        _, *found = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (tf.constant(0, tf.int64), state, state.current, nobody, 0),
        )
        return tuple(found)


def _num_moved(points, images):
    """(N,) float: in how many values points differ from images."""
    return tf.cast(tf.math.count_nonzero(points - images, axis=(1, 2, 3)), points.dtype)


def _next_share(num_moved, images):
    """(N,) share of the values that a step is to move."""
    return num_moved / (_FEWER_VALUES * math.prod(images.shape[1:]))


def _rank_loss(loss, logits, labels, targets):
    """A float64 number that orders iterates exactly as the loss does.

    Cross-entropy is log(1 + exp(r)) with r = log sum_{j != y} exp(z_j - z_y): r does not round
    near ln K, where float32 cross-entropy loses changes of the logits below 1e-6, nor near 0.
    """
    logits = tf.cast(logits, tf.float64)
    if loss == "xent":
        differences = logits - tf.gather(logits, labels, batch_dims=1)[:, None]
        return tf.reduce_logsumexp(
            tf.where(label_mask(logits, labels), tf.constant(-np.inf, tf.float64), differences),
            axis=-1,
        )
    if loss == "dlr":
        top = tf.math.top_k(logits, 3).values
        return -margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)
    top = tf.math.top_k(logits, 4).values
    difference = target_difference(logits, labels, targets)
    return difference / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


def _zero_loss(loss):
    """What `_rank_loss` is where the loss is 0."""
    return tf.constant(-np.inf if loss == "xent" else 0.0, tf.float64)


def _candidates(logits_fn, candidates, current, fooled):
    """The first iterate that fools; where repeated passes judge, the last one."""
    if isinstance(logits_fn, RepeatedPasses):
        return current
    return tf.where(_per_image(fooled), candidates, current)


def _per_image(numbers):
    """(N,) -> (N, 1, 1, 1)."""
    return tf.reshape(numbers, (-1, 1, 1, 1))


def _check_counts(attack, *names):
    for name in names:
        if getattr(attack, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(attack, name)}.")


def _check_num_classes(loss, least, active):
    if active.num_classes < least:
        raise ValueError(
            f"{loss} needs at least {least} classes; got {active.num_classes}: use APGD with loss "
            "'xent'."
        )
