"""Projected gradient descent, the challenges' attack."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from logit_reg.attacks.attack import (
    LOSSES,
    AttackResult,
    attack_inputs,
    attack_loss,
    batch_spec,
    call_logits,
    compiled,
    example_noise,
    is_fooled,
    random_stream,
)
from logit_reg.threat import ThreatModel

# With early_stop, how many steps pass between two looks at which images still stand.
_STEPS_PER_CHUNK = 10


@dataclasses.dataclass(frozen=True)
class PGD:
    """Projected gradient descent (ascent of the loss) on all images at once.

    Source:
        Madry et al. 2018, arXiv:1706.06083; the challenges' `pgd_attack.py`. Deviation: success
        at any iterate counts, the start included; the challenges look at the last one, which
        `last_iterate_fooled` gives.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    loss: str = "xent"
    """"xent" or "cw" (margin)."""
    num_steps: int = 40
    """Number of updates."""
    step_size: float = 0.01
    """Length of an update in the threat model's norm, pixel units."""
    random_start: bool = True
    """Start uniformly in the ball instead of at the image."""
    confidence: float = 0.0
    """Kappa of "cw": 0 as in the paper's Eq. 4, 50 as in the challenges' code."""
    early_stop: bool = False
    """Leave an image once it is fooled. `fooled` stays the same; `last_iterate_fooled` then
    equals it, because the iterate that fools is the last one."""

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1; got {self.num_steps}.")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be above 0, in pixel units; got {self.step_size}.")
        if self.confidence < 0:
            raise ValueError(f"confidence must be at least 0; got {self.confidence}.")

    def run(
        self,
        logits_fn,
        images,
        labels,
        *,
        seed,
        indices=None,
        restart=0,
        gradient_logits_fn=None,
    ) -> AttackResult:
        """Attack a batch; see `Attack.run`."""
        images, labels, indices = attack_inputs(images, labels, indices)
        image, flags = batch_spec(images.shape[1:]), batch_spec((), tf.bool)
        numbers, scalar = batch_spec((), tf.int64), tf.TensorSpec((), tf.int64)
        start = compiled(self, "_start", (), (image, numbers, scalar, scalar))
        advance = compiled(
            self,
            "_advance",
            (logits_fn, gradient_logits_fn or logits_fn),
            (image, numbers, image, image, flags, scalar, tf.TensorSpec((), tf.bool)),
        )

        stream = random_stream(seed, type(self).__name__, self.loss)
        current = start(images, indices, stream, restart).numpy()
        adversarial = current.copy()
        fooled = np.zeros(len(images), bool)
        last_fooled = np.zeros(len(images), bool)
        active = np.arange(len(images))
        forwards = backwards = 0
        chunk = _STEPS_PER_CHUNK if self.early_stop else self.num_steps
        for begin in range(0, self.num_steps, chunk):
            steps = min(chunk, self.num_steps - begin)
            is_last = begin + steps == self.num_steps
            moved = advance(
                images[active],
                labels[active],
                current[active],
                adversarial[active],
                fooled[active],
                steps,
                is_last,
            )
            current[active], adversarial[active], fooled[active], last_fooled[active] = (
                tensor.numpy() for tensor in moved
            )
            looks = 1 if gradient_logits_fn is None else 2
            forwards += len(active) * (steps * looks + is_last)
            backwards += len(active) * steps
            if self.early_stop:
                active = active[~fooled[active]]
                if not len(active):
                    break
        if self.early_stop:
            last_fooled = fooled.copy()
        return AttackResult(adversarial, fooled, last_fooled, forwards, backwards)

    def __call__(self, logits_fn, images, labels, *, seed):
        """Return the adversarial images as a tensor (N, H, W, C)."""
        return tf.convert_to_tensor(self.run(logits_fn, images, labels, seed=seed).adversarial)

    def cost(self):
        """Return the forwards and backwards that one image takes."""
        return self.num_steps + 1, self.num_steps

    def perturb(self, logits_fn, images, labels, *, noise, radius, scale=1.0):
        """The last iterate, for training: inside a traced step, with nothing tracked.

        Args:
            logits_fn: images -> logits, in the mode that training wants.
            images: (B, H, W, C) float32, pixel units.
            labels: (B,) int.
            noise: (B, H, W, C) float for `ThreatModel.random_start`.
            radius: (B, 1, 1, 1) float for `ThreatModel.random_start`.
            scale: () fraction of epsilon and of the step size, for a ramp.

        Returns:
            (B, H, W, C) float32 within ball and range.
        """
        current = images
        if self.random_start:
            current = self.threat.random_start(images, noise, radius, scale)

        def body(step, current):
            _, gradient = self._logits_and_gradient(logits_fn, current, labels)
            return step + 1, self._move(current, gradient, images, scale)

        _, current = tf.while_loop(lambda step, _: step < self.num_steps, body, (0, current))
        return tf.stop_gradient(current)

    def _start(self, images, indices, stream, restart):
        if not self.random_start:
            return tf.identity(images)
        shape, draw = images.shape[1:], {"indices": indices, "restart": restart}
        if self.threat.norm == "linf":
            noise = example_noise("uniform", shape, stream=stream, **draw)
            return self.threat.random_start(images, noise, 1.0)
        noise = example_noise("normal", shape, stream=stream, **draw)
        # A stream of its own: the same one would tie the radius to the first pixels.
        radius = example_noise("unit", (1, 1, 1), stream=stream + 1, **draw)
        return self.threat.random_start(images, noise, radius)

    def _advance(
        self,
        logits_fn,
        gradient_logits_fn,
        images,
        labels,
        current,
        adversarial,
        fooled,
        num_steps,
        is_last,
    ):
        """Take some steps; each judges the iterate it stands on before it moves."""

        def judge(logits, current, adversarial, fooled):
            now = is_fooled(logits, labels)
            keep = tf.reshape(fooled, (-1, 1, 1, 1))
            return tf.where(keep, adversarial, current), tf.logical_or(fooled, now), now

        def body(step, current, adversarial, fooled):
            logits, gradient = self._logits_and_gradient(gradient_logits_fn, current, labels)
            if gradient_logits_fn is not logits_fn:
                logits = call_logits(logits_fn, current)
            adversarial, fooled, _ = judge(logits, current, adversarial, fooled)
            return step + 1, self._move(current, gradient, images), adversarial, fooled

        _, current, adversarial, fooled = tf.while_loop(
            lambda step, *_: step < num_steps,
            body,
            (tf.constant(0, tf.int64), current, adversarial, fooled),
        )

        def finish():
            logits = call_logits(logits_fn, current)
            return judge(logits, current, adversarial, fooled)

        adversarial, fooled, now = tf.cond(
            is_last, finish, lambda: (adversarial, fooled, tf.identity(fooled))
        )
        return current, adversarial, fooled, now

    def _logits_and_gradient(self, logits_fn, current, labels):
        # Only the images are watched: gradients of the weights would double the cost.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(current)
            logits = call_logits(logits_fn, current)
            loss = tf.reduce_sum(attack_loss(self.loss, logits, labels, self.confidence))
        gradient = tape.gradient(loss, current, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return logits, gradient

    def _move(self, current, gradient, images, scale=1.0):
        step = self.step_size * scale * self.threat.ascent_direction(gradient)
        return self.threat.project(current + step, images, scale)
