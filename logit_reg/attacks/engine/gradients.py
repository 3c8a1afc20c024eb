"""Gradients of images, and steps along them."""

import math

import tensorflow as tf

from logit_reg.attacks.engine.forward import call_logits, isolated
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses
from logit_reg.threat import ThreatModel

# Of the largest upstream entry, where float16 loses a gradient that starts at 1, or overflows.
_OTHER_POWERS = (12.0, -12.0)
# So that the smallest float16 can be scaled back in float32.
_LEAST_EXPONENT = -90.0


def logits_and_gradient(logits_fn, points, loss):
    """Logits of some points, and the gradient of a loss with respect to them.

    Where the network computes in float16, in which small gradients are lost, the gradient of the
    logits is scaled to a largest entry of about 1 for each image, and what comes back is scaled
    back in float32. The gradients of `RepeatedPasses` are averaged.

    Args:
        logits_fn: images -> logits.
        points: (N, H, W, C) float, pixel units.
        loss: (N, K) logits -> (N,) losses, summed before the gradient.

    Returns:
        (N, K) logits and the (N, H, W, C) gradient, see `usable_gradient`.
    """
    if isinstance(logits_fn, RepeatedPasses):
        one = logits_fn.logits_fn
        return logits_fn.average(lambda: logits_and_gradient(one, points, loss))

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


def gradient_step(threat: ThreatModel, current, gradient, images, step_length, scale=1.0):
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
    gradient = threat.without_stopped(gradient, current, images)
    direction = threat.ascent_direction(gradient)
    return threat.project(current + step_length * direction, images, scale)


def ascend(logits_fn, start, images, loss, threat: ThreatModel, num_steps, step_size, scale=1.0):
    """Steps of one length up a gradient, for training: inside a traced step, with nothing tracked.

    Args:
        logits_fn: images -> logits, in the mode that training wants.
        start: (N, H, W, C) float, pixel units.
        images: (N, H, W, C) float centres of the balls.
        loss: (N, K) logits -> (N,) losses.
        threat: norm, budget and pixel range.
        num_steps: number of steps.
        step_size: length of one, pixel units.
        scale: () fraction of epsilon and of the step size, for a ramp.

    Returns:
        (N, H, W, C) float, the last iterate.
    """

    def body(step, current):
        _, gradient = logits_and_gradient(logits_fn, current, loss)
        length = step_size * scale
        return step + 1, gradient_step(threat, current, gradient, images, length, scale)

    _, current = tf.while_loop(lambda step, _: step < num_steps, body, (0, start))
    return tf.stop_gradient(current)
