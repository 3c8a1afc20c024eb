"""Projected gradient ascent from one start: the loop that PGD and its relatives share."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveExamples, ActiveSet, ActiveSetAttack, take
from logit_reg.attacks.engine.attack import AttackResult, ImageAttack
from logit_reg.attacks.engine.examples import Examples
from logit_reg.attacks.engine.forward import batch_spec, call_logits, clean_logits, compiled
from logit_reg.attacks.engine.gradients import gradient_step, logits_and_gradient
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.low_precision import is_screened, judged_logits, num_forwards
from logit_reg.attacks.engine.random_numbers import (
    example_noise,
    random_direction,
    uniform_in_ball,
)
from logit_reg.attacks.engine.repeats import Repeats
from logit_reg.threat import ThreatModel

# How many steps pass before images that are fooled are taken out, with early_stop, or before
# repeated passes judge.
_STEPS_PER_CHUNK = 10
# Share of the steps, the last ones, that leave a lower precision: it cannot follow fine changes.
_PRECISE_SHARE = 0.25


class GradientAttack(ImageAttack):
    """What tells PGD and its relatives, frozen dataclasses all, from each other."""

    if TYPE_CHECKING:

        @property
        def threat(self) -> ThreatModel: ...

    same_steps = False
    """Whether loss and length of a step do not depend on its number: images that walk in a circle
    then take no more work, see `Repeats`, and `unit` shares a trace."""

    def step_loss(self, step, logits, labels, loss_inputs):
        """The loss to ascend at a step.

        Args:
            step: () int64 number of the step, from 0.
            logits: (N, K) float.
            labels: (N,) int.
            loss_inputs: (N, ...) whatever else the loss of an image depends on, a target class say.

        Returns:
            (N,) float.
        """
        raise NotImplementedError

    def step_length(self, step) -> Any:
        """Length of a step in the threat model's norm, pixel units: () float."""
        raise NotImplementedError

    def unit(self) -> tuple[Any, float, float]:
        """What a trace is made of: an attack, and what scales its epsilon and its steps' length.

        Where all steps are the same, epsilon, length and number of steps are 1, so that one trace
        serves for any of them; else it is this attack as it is.
        """
        if not self.same_steps:
            return self, 1.0, 1.0
        threat = dataclasses.replace(self.threat, epsilon=1.0)
        # Dataclasses with these fields, all that have the same steps.
        unit = dataclasses.replace(self, threat=threat, num_steps=1, step_size=1.0)  # type: ignore
        return unit, self.threat.epsilon, self.step_length(0)


class ActiveGradientAttack(GradientAttack, ActiveSetAttack):
    """Gradient steps from one start or several, on the active set.

    Steps are by default all `step_size` long, epsilon / 4 if that is None.
    """

    if TYPE_CHECKING:

        @property
        def num_steps(self) -> int: ...

        @property
        def step_size(self) -> float | None: ...

    random_start = True
    starts_far = False
    """Whether a random start is as far from the image as epsilon allows: see `GradientLoop`."""

    def step_length(self, step):
        """See `GradientAttack.step_length`."""
        del step
        return self.step_size or self.threat.epsilon / 4

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        return self._num_updates + 2, self._num_updates

    @property
    def _num_updates(self) -> int:
        return self.num_steps

    def _starts(self, active: ActiveExamples) -> Iterator[tuple[tuple[str, ...], Any]]:
        """For each start the names of its random stream and the `loss_inputs`."""
        raise NotImplementedError

    def _attack(self, active):
        loop = GradientLoop(self, self._num_updates, self.random_start, starts_far=self.starts_far)
        for names, loss_inputs in self._starts(active):
            if len(rows := active.rows):
                examples, stream = active.examples.take(rows), active.examples.stream(self, *names)
                inputs = loss_inputs[rows]
                active.add(rows, loop.run(active.logits_fn, examples, inputs, stream=stream))


@dataclasses.dataclass(frozen=True)
class GradientLoop:
    """Every iterate is judged, the start and the last one included; the first that fools stays.

    Where repeated passes judge, every image goes on to the last step; see `ActiveSet`.
    """

    attack: GradientAttack
    num_steps: int
    random_start: bool = True
    """Start uniformly in the ball instead of at the image."""
    early_stop: bool = True
    """Leave an image once it is fooled; its last iterate is then the one that fools."""
    start_stddev: float | None = None
    """Standard deviation, pixel units, of Gaussian noise that a random start adds and cuts to ball
    and pixel range; uniform in the ball if None."""
    starts_far: bool = False
    """Start at distance epsilon, in linf at a random corner of the ball."""

    def run(self, logits_fn, examples: Examples, loss_inputs, *, stream: int) -> AttackResult:
        """Ascend from one start.

        Args:
            logits_fn: images -> logits.
            examples: N of them.
            loss_inputs: (N, ...) array for `GradientAttack.step_loss`.
            stream: where the random numbers come from; see `random_stream`.

        Returns:
            An `AttackResult` for the N images.
        """
        images = examples.images
        image, flags = batch_spec(images.shape[1:]), batch_spec((), tf.bool)
        whole, number = tf.TensorSpec((), tf.int64), tf.TensorSpec(())
        loss_input = batch_spec(loss_inputs.shape[1:], loss_inputs.dtype)
        scalars = (whole, whole, tf.TensorSpec((), tf.bool), number, number)
        signature = (image, batch_spec((), tf.int64), loss_input, image, image, flags, *scalars)
        unit, *scales = self.attack.unit()

        functions = examples.functions(logits_fn)
        passes = num_forwards(*functions)
        current = self._starting_points(examples, stream)
        active = ActiveSet(current.copy(), functions[0], examples.labels)
        rows, repeats = active.rows, Repeats(len(images))
        stops = self.early_stop and not active.is_repeated
        chunk = _STEPS_PER_CHUNK if stops or active.is_repeated else self.num_steps
        for begin, end, pair in self._chunks(chunk, *functions):
            is_last = end == self.num_steps
            advance = compiled(_Steps(unit), "advance", pair, signature)
            awake = repeats.awake(rows, begin)
            if stops and self.attack.same_steps and not is_screened(pair[1]):
                awake = repeats.look(advance, awake, current[awake], begin, self.num_steps)
            # Iterates that are known count like those that are computed.
            steps = end - begin
            active.count(len(rows), forwards=steps * passes + is_last, backwards=steps)
            if is_last and stops:
                # Of those who sleep; the others' follow.
                active.adversarial[rows] = current[rows]
            if not len(awake):
                continue
            given = take((images, examples.labels, loss_inputs), awake)
            state = take((current, active.adversarial, active.fooled), awake)
            try:
                moved = advance(*given, *state, begin, end, is_last, *scales)
            except tf.errors.InvalidArgumentError:
                # One line for the usual reason: other than one row of logits an image.
                clean_logits(logits_fn, images[:2])
                raise
            current[awake], adversarial, fooled, last_fooled, num_again = (
                tensor.numpy() for tensor in moved
            )
            last_fooled = fooled if stops else last_fooled
            candidates = current[awake] if active.is_repeated else adversarial
            active.record(awake, candidates, fooled, last_fooled)
            active.count(int(num_again), forwards=1)
            if stops:
                rows = active.rows
                if not len(rows):
                    break
        return active.result()

    def _chunks(self, chunk, logits_fn, gradient_logits_fn):
        """(first step, last step + 1, the two functions) of stretches in one compiled call."""
        switch = self.num_steps
        if is_screened(gradient_logits_fn):
            switch -= math.ceil(_PRECISE_SHARE * self.num_steps)
        begin = 0
        while begin < self.num_steps:
            is_precise = begin >= switch
            end = min(begin + chunk, self.num_steps if is_precise else switch)
            yield begin, end, (logits_fn, logits_fn if is_precise else gradient_logits_fn)
            begin = end

    def _starting_points(self, examples, stream):
        """(N, H, W, C) float32 arrays to start from."""
        images, threat = examples.images, self.attack.threat
        if not self.random_start:
            return images.copy()
        draw = _Start(dataclasses.replace(threat, epsilon=1.0), self.start_stddev, self.starts_far)
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, scalar, scalar, tf.TensorSpec(()))
        start = compiled(draw, "draw", (), signature)
        return start(images, examples.indices, stream, examples.restart, threat.epsilon).numpy()


@dataclasses.dataclass(frozen=True)
class _Start:
    """Random starts, for a threat model with epsilon 1."""

    threat: ThreatModel
    stddev: float | None
    is_far: bool

    def draw(self, images, indices, stream, restart, epsilon):
        """Compiled: see `GradientLoop`."""
        threat, draw = self.threat, {"stream": stream, "indices": indices, "restart": restart}
        if self.is_far:
            direction = threat.ascent_direction(random_direction(threat, images, **draw))
            return threat.project(images + epsilon * direction, images, epsilon)
        if self.stddev is None:
            return uniform_in_ball(threat, images, scale=epsilon, **draw)
        noise = example_noise("normal", images.shape[1:], **draw)
        return threat.project(images + self.stddev * noise, images, epsilon)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Steps of an attack's `unit`."""

    attack: GradientAttack

    def advance(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        loss_inputs,
        current,
        adversarial,
        fooled,
        begin,
        end,
        is_last,
        epsilon_scale,
        length_scale,
    ):
        """Compiled: take some steps; each judges the current iterate before it moves."""

        def judge(logits, current, adversarial, fooled):
            now = is_fooled(logits, labels)
            keep = tf.reshape(fooled, (-1, 1, 1, 1))
            return tf.where(keep, adversarial, current), tf.logical_or(fooled, now), now

        def body(step, current, adversarial, fooled, num_again):
            logits, gradient = logits_and_gradient(
                gradient_logits_fn,
                current,
                lambda logits: self.attack.step_loss(step, logits, labels, loss_inputs),
            )
            logits, again = judged_logits(
                logits_fn, gradient_logits_fn, current, logits, labels, fooled
            )
            adversarial, fooled, _ = judge(logits, current, adversarial, fooled)
            length = length_scale * self.attack.step_length(step)
            moved = gradient_step(
                self.attack.threat, current, gradient, images, length, epsilon_scale
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
