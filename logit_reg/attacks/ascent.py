"""Projected gradient ascent from one start: the loop that PGD and its relatives share."""

import dataclasses
import math
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from logit_reg.attacks.attack import (
    AttackResult,
    batch_spec,
    call_logits,
    compiled,
    example_noise,
    is_fooled,
    isolated,
    uniform_in_ball,
)
from logit_reg.attacks.precision import is_screened, judged_logits, num_looks
from logit_reg.attacks.standing import Standing, take
from logit_reg.threat import ThreatModel

# With early_stop, how many steps pass between two looks at which images still stand.
_STEPS_PER_CHUNK = 10
# Share of the steps, the last ones, that leave a lower precision: it cannot follow fine changes.
_PRECISE_SHARE = 0.25


class Climber(Protocol):
    """What tells an attack from its relatives: a frozen dataclass with a loss and its steps."""

    @property
    def threat(self) -> ThreatModel:
        """Norm, budget and pixel range."""
        ...

    def ascended_loss(self, step, logits, labels, guides):
        """The loss to climb at a step.

        Args:
            step: () int64 number of the step, from 0.
            logits: (N, K) float.
            labels: (N,) int.
            guides: (N, ...) whatever else the loss of an image depends on, a target class say.

        Returns:
            (N,) float.
        """
        ...

    def step_length(self, step) -> Any:
        """Length of a step in the threat model's norm, pixel units: () float."""
        ...


@dataclasses.dataclass(frozen=True)
class Ascent:
    """Every iterate is judged, the start and the last one included; the first that fools stays."""

    attack: Climber
    num_steps: int
    random_start: bool = True
    """Start uniformly in the ball instead of at the image."""
    early_stop: bool = True
    """Leave an image once it is fooled; its last iterate is then the one that fools."""
    start_stddev: float | None = None
    """Standard deviation, pixel units, of Gaussian noise that a random start adds and cuts to ball
    and pixel range; uniform in the ball if None."""

    def run(
        self, functions, images, labels, guides, indices, *, stream: int, restart: int
    ) -> AttackResult:
        """Climb from one start.

        Args:
            functions: the two callables images -> logits that judge and that give directions.
            images: (N, H, W, C) float32, pixel units.
            labels: (N,) int64.
            guides: (N, ...) array for `ascended_loss`.
            indices: (N,) int64 places of the images in their data set.
            stream: where the random numbers come from; see `random_stream`.
            restart: number of the restart.

        Returns:
            An `AttackResult` for the N images.
        """
        image, flags = batch_spec(images.shape[1:]), batch_spec((), tf.bool)
        numbers, scalar = batch_spec((), tf.int64), tf.TensorSpec((), tf.int64)
        guide = batch_spec(guides.shape[1:], guides.dtype)
        start = compiled(self, "_start", (), (image, numbers, scalar, scalar))
        examples = (image, numbers, guide, image, image, flags)
        signature = (*examples, scalar, scalar, tf.TensorSpec((), tf.bool))

        current = start(images, indices, stream, restart).numpy()
        adversarial = current.copy()
        fooled = np.zeros(len(images), bool)
        last_fooled = np.zeros(len(images), bool)
        active = np.arange(len(images))
        forwards = backwards = 0
        looks = num_looks(*functions)
        for begin, end, pair in self._chunks(*functions):
            is_last = end == self.num_steps
            advance = compiled(self, "_advance", pair, signature)
            moved = advance(
                images[active],
                labels[active],
                guides[active],
                current[active],
                adversarial[active],
                fooled[active],
                begin,
                end,
                is_last,
            )
            current[active], adversarial[active], fooled[active], last_fooled[active] = (
                tensor.numpy() for tensor in moved
            )
            forwards += len(active) * ((end - begin) * looks + is_last)
            backwards += len(active) * (end - begin)
            if self.early_stop:
                active = active[~fooled[active]]
                if not len(active):
                    break
        if self.early_stop:
            last_fooled = fooled.copy()
        return AttackResult(adversarial, fooled, last_fooled, forwards, backwards)

    def run_on_standing(
        self, standing: Standing, functions, examples, *, stream: int, restart: int
    ) -> None:
        """Climb with whoever stands and note what was found.

        Args:
            standing: the books.
            functions: as for `run`.
            examples: images, labels, guides and indices of all images of the books.
            stream: as for `run`.
            restart: as for `run`.
        """
        rows = standing.rows
        if not len(rows):
            return
        found = self.run(functions, *take(examples, rows), stream=stream, restart=restart)
        standing.record(rows, found.adversarial, found.fooled)
        standing.forwards += found.forwards
        standing.backwards += found.backwards

    def _chunks(self, logits_fn, gradient_logits_fn):
        """(first step, last step + 1, the two functions) of stretches without a look outside."""
        chunk = _STEPS_PER_CHUNK if self.early_stop else self.num_steps
        switch = self.num_steps
        if is_screened(gradient_logits_fn):
            switch -= math.ceil(_PRECISE_SHARE * self.num_steps)
        begin = 0
        while begin < self.num_steps:
            is_precise = begin >= switch
            end = min(begin + chunk, self.num_steps if is_precise else switch)
            yield begin, end, (logits_fn, logits_fn if is_precise else gradient_logits_fn)
            begin = end

    def _start(self, images, indices, stream, restart):
        if not self.random_start:
            return tf.identity(images)
        threat, draw = self.attack.threat, {"indices": indices, "restart": restart}
        if self.start_stddev is None:
            return uniform_in_ball(threat, images, stream=stream, **draw)
        noise = example_noise("normal", images.shape[1:], stream=stream, **draw)
        return threat.project(images + self.start_stddev * noise, images)

    def _advance(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        guides,
        current,
        adversarial,
        fooled,
        begin,
        end,
        is_last,
    ):
        """Take some steps; each judges the iterate it stands on before it moves."""

        def judge(logits, current, adversarial, fooled):
            now = is_fooled(logits, labels)
            keep = tf.reshape(fooled, (-1, 1, 1, 1))
            return tf.where(keep, adversarial, current), tf.logical_or(fooled, now), now

        def body(step, current, adversarial, fooled):
            logits, gradient = logits_and_gradient(
                gradient_logits_fn,
                current,
                lambda logits: self.attack.ascended_loss(step, logits, labels, guides),
            )
            logits = judged_logits(logits_fn, gradient_logits_fn, current, logits, labels, fooled)
            adversarial, fooled, _ = judge(logits, current, adversarial, fooled)
            moved = climb(
                self.attack.threat, current, gradient, images, self.attack.step_length(step)
            )
            return step + 1, moved, adversarial, fooled

        _, current, adversarial, fooled = tf.while_loop(
            lambda step, *_: step < end, body, (begin, current, adversarial, fooled)
        )

        def finish():
            logits = call_logits(logits_fn, current)
            return judge(logits, current, adversarial, fooled)

        adversarial, fooled, now = tf.cond(
            is_last, finish, lambda: (adversarial, fooled, tf.identity(fooled))
        )
        return current, adversarial, fooled, now


def logits_and_gradient(logits_fn, points, loss):
    """Logits of some points, and the gradient of a loss with respect to them.

    Args:
        logits_fn: images -> logits.
        points: (N, H, W, C) float, pixel units.
        loss: (N, K) logits -> (N,) losses, summed before the gradient.

    Returns:
        (N, K) logits and the (N, H, W, C) gradient.
    """

    def both(points):
        # Only the images are watched: gradients of the weights would double the cost.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            logits = call_logits(logits_fn, points)
            total = tf.reduce_sum(loss(logits))
        unconnected = tf.UnconnectedGradients.ZERO
        return logits, tape.gradient(total, points, unconnected_gradients=unconnected)

    return isolated(both)(points)


def climb(threat: ThreatModel, current, gradient, images, step_length, scale=1.0):
    """One step up the gradient, projected on ball and pixel range.

    Args:
        threat: norm, budget and pixel range.
        current: (N, H, W, C) float, pixel units.
        gradient: (N, H, W, C) float.
        images: (N, H, W, C) float centres of the balls.
        step_length: () float in the threat model's norm, pixel units.
        scale: () fraction of epsilon to allow, for a ramp in training.

    Returns:
        (N, H, W, C) float.
    """
    return threat.project(current + step_length * threat.ascent_direction(gradient), images, scale)


def check_steps(num_steps: int, step_size: float | None, *, least: int = 1) -> None:
    """Refuse impossible numbers and lengths of steps.

    Args:
        num_steps: number of updates.
        step_size: length of an update, pixel units; None for a default.
        least: smallest number of updates.

    Raises:
        ValueError: if there are too few steps or a step has no length.
    """
    if num_steps < least:
        raise ValueError(f"num_steps must be at least {least}; got {num_steps}.")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be above 0, in pixel units; got {step_size}.")
