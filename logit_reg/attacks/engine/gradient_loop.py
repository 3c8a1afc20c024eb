"""Projected gradient ascent from one start: the loop that PGD and its relatives share."""

import dataclasses
import math
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import Standing, take
from logit_reg.attacks.engine.attack import AttackResult
from logit_reg.attacks.engine.forward import (
    batch_spec,
    call_logits,
    clean_logits,
    compiled,
    isolated,
)
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.low_precision import is_screened, judged_logits, num_looks
from logit_reg.attacks.engine.random_numbers import example_noise, uniform_in_ball
from logit_reg.threat import ThreatModel

# With early_stop, how many steps pass between two looks at which images still stand.
_STEPS_PER_CHUNK = 10
# Of the largest upstream entry, where float16 loses a gradient that starts at 1, or overflows.
_OTHER_POWERS = (12.0, -12.0)
# So that the smallest float16 can be scaled back in float32.
_LEAST_EXPONENT = -90.0
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

        logits_fn, _ = functions
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
            rows = (images, labels, guides, current, adversarial, fooled)
            try:
                moved = advance(*take(rows, active), begin, end, is_last)
            except tf.errors.InvalidArgumentError:
                # One line for the usual reason: other than one row of logits an image.
                clean_logits(logits_fn, images[:2])
                raise
            *state, num_again = (tensor.numpy() for tensor in moved)
            current[active], adversarial[active], fooled[active], last_fooled[active] = state
            forwards += len(active) * ((end - begin) * looks + is_last) + int(num_again)
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

        def body(step, current, adversarial, fooled, num_again):
            logits, gradient = logits_and_gradient(
                gradient_logits_fn,
                current,
                lambda logits: self.attack.ascended_loss(step, logits, labels, guides),
            )
            logits, again = judged_logits(
                logits_fn, gradient_logits_fn, current, logits, labels, fooled
            )
            adversarial, fooled, _ = judge(logits, current, adversarial, fooled)
            moved = climb(
                self.attack.threat, current, gradient, images, self.attack.step_length(step)
            )
            return step + 1, moved, adversarial, fooled, num_again + again

        _, current, adversarial, fooled, num_again = tf.while_loop(
            lambda step, *_: step < end, body, (begin, current, adversarial, fooled, 0)
        )

        def finish():
            logits = call_logits(logits_fn, current)
            return judge(logits, current, adversarial, fooled)

        adversarial, fooled, now = tf.cond(
            is_last, finish, lambda: (adversarial, fooled, tf.identity(fooled))
        )
        return current, adversarial, fooled, now, num_again


def logits_and_gradient(logits_fn, points, loss):
    """Logits of some points, and the gradient of a loss with respect to them.

    Where the network computes in float16, in which small gradients are lost, the gradient of the
    logits is scaled to a largest entry of about 1 for each image, and what comes back is scaled
    back in float32.

    Args:
        logits_fn: images -> logits.
        points: (N, H, W, C) float, pixel units.
        loss: (N, K) logits -> (N,) losses, summed before the gradient.

    Returns:
        (N, K) logits and the (N, H, W, C) gradient, see `usable_gradient`.
    """

    def both(points):
        # Only the images are watched: gradients of the weights would double the cost.
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as tape:
            tape.watch(points)
            logits = call_logits(logits_fn, points)
            is_half = _computes_in_half()
            total = None if is_half else tf.reduce_sum(loss(logits))
        if is_half:
            gradient = _gradient_through_half(tape, logits, points, loss)
        else:
            unconnected = tf.UnconnectedGradients.ZERO
            gradient = tape.gradient(total, points, unconnected_gradients=unconnected)
        return logits, usable_gradient(gradient)

    return isolated(both)(points)


def usable_gradient(gradient):
    """A gradient that moves no image to NaN.

    Args:
        gradient: (N, H, W, C) float.

    Returns:
        The same where it is finite, 0 where it is NaN, a very large number where it is infinite.
    """
    gradient = tf.where(tf.math.is_nan(gradient), tf.zeros_like(gradient), gradient)
    # Sums of a thousand such stay finite.
    largest = gradient.dtype.max / 1024
    return tf.clip_by_value(gradient, -largest, largest)


def _computes_in_half() -> bool:
    """Whether a network that was called just now, in a graph of its own, computes in float16."""
    if tf.executing_eagerly():
        return False
    definition = tf.compat.v1.get_default_graph().as_graph_def()
    functions = definition.library.function
    nodes = [*definition.node, *(node for function in functions for node in function.node_def)]
    return any(
        value.type == tf.float16.as_datatype_enum for node in nodes for value in node.attr.values()
    )


def _gradient_through_half(tape, logits, points, loss):
    """The gradient of the sum of losses, by a tape that saw a network in float16."""
    with tf.GradientTape() as of_loss:
        of_loss.watch(logits)
        total = tf.reduce_sum(loss(logits))
    upstream = of_loss.gradient(total, logits, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    largest = tf.reduce_max(tf.abs(upstream), axis=-1)
    exponent = tf.math.round(tf.math.log(tf.where(largest > 0, largest, 1.0)) / math.log(2.0))
    exponent = tf.maximum(exponent, _LEAST_EXPONENT)

    def gradient_at(power):
        """With a largest upstream entry of about 2 ** power; and where it is of use."""
        factor = 2.0 ** (power - exponent)
        scaled = upstream * factor[:, None]
        unconnected = tf.UnconnectedGradients.ZERO
        found = tape.gradient(
            logits, points, output_gradients=scaled, unconnected_gradients=unconnected
        )
        is_sound = tf.reduce_all(tf.math.is_finite(found), axis=(1, 2, 3))
        is_sound &= tf.reduce_any(found != 0, axis=(1, 2, 3))
        factor = tf.reshape(tf.cast(factor, found.dtype), (-1, 1, 1, 1))
        return found / factor, is_sound

    gradient, is_sound = gradient_at(0.0)
    for power in _OTHER_POWERS:

        def once_more(gradient=gradient, is_sound=is_sound, power=power):
            other, is_sound_now = gradient_at(power)
            takes = tf.reshape(~is_sound & is_sound_now, (-1, 1, 1, 1))
            return tf.where(takes, other, gradient), is_sound | is_sound_now

        gradient, is_sound = tf.cond(
            tf.reduce_all(is_sound | (largest == 0)),
            lambda gradient=gradient, is_sound=is_sound: (gradient, is_sound),
            once_more,
        )
    return gradient


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
