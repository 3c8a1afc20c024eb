"""HopSkipJump: a walk along the decision boundary that sees nothing but the predicted class."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.forward import batch_spec, call_logits, compiled
from logit_reg.attacks.engine.losses import is_fooled
from logit_reg.attacks.engine.random_numbers import example_noise, random_stream
from logit_reg.threat import ThreatModel

# How often the way back to the boundary is halved, and a jump that does not fool.
_BISECTIONS = 16
_HALVINGS = 10
# How far the samples are from the boundary, of its own l2 distance to the image.
_SAMPLE_SHARE = 0.01
# Directions are drawn for this many samples at once, whatever is sent forward at once, so that
# `images_per_forward` does not change them.
_SAMPLES_PER_DRAW = 32
# Most starts before images that have one are taken out.
_STARTS_PER_CHUNK = 10
# Sides of the squares that a start is made of, in pixels, in turn.
_NUM_SIDES = 4


@dataclasses.dataclass(frozen=True)
class HopSkipJump(ActiveSetAttack):
    """From a misclassified image along the boundary, towards the attacked one.

    Each step takes the normal of the boundary from the decisions at random points around it,
    jumps that way as far as still fools, and goes straight back to the boundary. Needs forwards
    only, and of each only whether the class is wrong. An image is left once a point within epsilon
    fools; before that the points of the walk are farther away, and what is returned is the last
    one, projected.

    Source:
        Chen, Jordan and Wainwright 2020, arXiv:1904.02144, and its public code: the lengths of
        jumps, the numbers of samples, uniform samples in linf and Gaussian ones in l2.
        Deviations: the way back to the boundary first tries epsilon, and a fixed number of
        times in all; a jump is halved at most 10 times; samples are as far from the boundary as
        1 % of its l2 distance to the image in either norm, where float32 leaves no decision at
        the published 1 / d; starts are noise of coarser squares, too, because networks send all
        fine noise to a few classes.
    """

    threat: ThreatModel
    """Norm, budget and pixel range. The walk takes place outside of the ball."""
    num_steps: int = 40
    """Number of jumps."""
    num_samples: int = 100
    """Points around the boundary for the first jump; the t-th takes sqrt(t) times as many."""
    num_starts: int = 100
    """Most images of noise to try for one that is misclassified; without one an image is not
    attacked."""
    images_per_forward: int = 1024
    """Most images sent through the network at once, which bounds the memory; one of each example
    is the least. Changes the result by rounding only."""

    def __post_init__(self):
        self.threat.check_norm("HopSkipJump", "linf", "l2")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}.")

    def _attack(self, active):
        logits_fn, examples = active.logits_fn, active.examples
        image, numbers = batch_spec(examples.images.shape[1:]), batch_spec((), tf.int64)
        approach = compiled(self, "_approach", (logits_fn,), (image, numbers, image))
        jump = compiled(self, "_jump", (logits_fn,), (numbers, image, image, batch_spec(())))

        rows, outer = self._starts(active)
        parts = (examples.images, examples.labels, examples.indices)
        images, labels, indices = take(parts, rows)
        for step in range(self.num_steps + 1):
            if not len(rows):
                break
            inside, fooled, boundary, reach = approach(images, labels, outer)
            active.count(len(rows), forwards=1 + _BISECTIONS)
            keep = active.record(rows, inside.numpy(), fooled.numpy())
            state = (rows, images, labels, indices, boundary, reach)
            rows, images, labels, indices, boundary, reach = take(state, keep)
            if not len(rows) or step == self.num_steps:
                break
            draw = {"seed": examples.seed, "indices": indices, "restart": examples.restart}
            normal = self.estimate_normal(logits_fn, images, labels, boundary, step=step, **draw)
            outer = jump(labels, boundary, normal, reach / math.sqrt(step + 1))
            active.count(len(rows), forwards=self._samples_of(step) + _HALVINGS)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        samples = sum(self._samples_of(step) for step in range(self.num_steps))
        walk = (self.num_steps + 1) * (1 + _BISECTIONS) + self.num_steps * _HALVINGS
        return 1 + self.num_starts + walk + samples, 0

    def estimate_normal(
        self, logits_fn, images, labels, boundary, *, seed, indices, restart=0, step=0
    ) -> np.ndarray:
        """Estimate the normal of the decision boundary, on the side of the wrong classes.

        Args:
            logits_fn: images -> logits, of which only the decision is used.
            images: (N, H, W, C) float32, pixel units, that are classified right.
            labels: (N,) int64.
            boundary: (N, H, W, C) float32 misclassified points next to the boundary.
            seed: source of the random directions.
            indices: (N,) int64 places of the images in their data set.
            restart: number of the restart, a further source of the directions.
            step: number of the jump, another one; sets the number of samples, too.

        Returns:
            (N, H, W, C) float32 of any length.
        """
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        scalar, sums = tf.TensorSpec((), tf.int64), batch_spec((2, *images.shape[1:]))
        signature = (image, numbers, image, numbers, sums, batch_spec(()), scalar, scalar, scalar)
        add_samples = compiled(self, "_add_samples", (logits_fn,), signature)
        num_samples = self._samples_of(step)
        directions = np.zeros((len(images), 2, *images.shape[1:]), np.float32)
        wrong = np.zeros(len(images), np.float32)
        for first in range(0, num_samples, _SAMPLES_PER_DRAW):
            count = min(_SAMPLES_PER_DRAW, num_samples - first)
            stream = random_stream(seed, type(self).__name__, f"step {step} samples {first}")
            directions, wrong = add_samples(
                *(images, labels, boundary, indices, directions, wrong, stream, restart, count)
            )
        of_wrong, of_all = np.moveaxis(np.asarray(directions), 1, 0)
        share = (np.asarray(wrong) / num_samples)[:, None, None, None]
        # The mean decision is taken off, which lowers the variance; where all agree, the mean
        # direction is all there is.
        weighted = np.where(share == 0, -of_all, of_wrong - share * of_all)
        return np.where(share == 1, of_all, weighted)

    def _samples_of(self, step):
        return int(self.num_samples * math.sqrt(step + 1))

    def _starts(self, active):
        """Rows that have a start, and their misclassified images of noise."""
        examples = active.examples
        images = examples.images
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        signature = (image, numbers, numbers, scalar, scalar, scalar, scalar)
        draw_starts = compiled(self, "_draw_starts", (active.logits_fn,), signature)
        starts, needing = images.copy(), active.rows
        has_start = np.zeros(len(images), bool)
        for first in range(0, self.num_starts, _STARTS_PER_CHUNK):
            if not len(needing):
                break
            count = min(_STARTS_PER_CHUNK, self.num_starts - first)
            stream = examples.stream(self, f"starts {first}")
            attacked = take((images, examples.labels, examples.indices), needing)
            drawn = draw_starts(*attacked, stream, examples.restart, first, count)
            starts[needing], has_start[needing] = (tensor.numpy() for tensor in drawn)
            active.count(len(needing), forwards=count)
            needing = needing[~has_start[needing]]
        rows = np.flatnonzero(has_start)
        return rows, starts[rows]

    def _draw_starts(self, logits_fn, images, labels, indices, stream, restart, first, count):
        """The first misclassified noise of some draws, the image itself where there is none."""
        height, width = images.shape[1:3]
        lower, upper = self.threat.lower, self.threat.upper

        def body(draw, starts, found):
            noise = example_noise(
                "unit", images.shape[1:], stream=stream + draw, indices=indices, restart=restart
            )
            side = tf.bitwise.left_shift(1, tf.cast((first + draw) % _NUM_SIDES, tf.int32))
            squares = tf.gather(noise, tf.range(height) // side, axis=1)
            squares = tf.gather(squares, tf.range(width) // side, axis=2)
            point = lower + (upper - lower) * squares
            now = tf.logical_not(found) & is_fooled(call_logits(logits_fn, point), labels)
            return draw + 1, tf.where(_wide(now), point, starts), tf.logical_or(found, now)

        _, starts, found = tf.while_loop(
            lambda draw, *_: draw < count,
            body,
            (tf.constant(0, tf.int64), images, tf.zeros_like(labels, tf.bool)),
        )
        return starts, found

    def _approach(self, logits_fn, images, labels, outer):
        """Go from misclassified points towards the images.

        Returns:
            Their projections on the ball, where these fool, the last misclassified points on the
            way, and their distances.
        """
        epsilon = self.threat.epsilon
        inside = self.threat.project(outer, images)
        fooled = is_fooled(call_logits(logits_fn, inside), labels)
        reach = self.threat.distance(outer, images)

        def body(number, boundary, low, high):
            middle = (low + high) / 2
            point = self.threat.project(outer, images, _wide(middle) / epsilon)
            is_wrong = is_fooled(call_logits(logits_fn, point), labels)
            boundary = tf.where(_wide(is_wrong), point, boundary)
            low, high = tf.where(is_wrong, low, middle), tf.where(is_wrong, middle, high)
            return number + 1, boundary, low, high

        _, boundary, _, high = tf.while_loop(
            lambda number, *_: number < _BISECTIONS,
            body,
            (0, outer, tf.minimum(epsilon, reach), reach),
        )
        return inside, fooled, boundary, high

    def _add_samples(
        self,
        logits_fn,
        images,
        labels,
        boundary,
        indices,
        directions,
        wrong,
        stream,
        restart,
        num_samples,
    ):
        """Add samples to the sums of the misclassified ones' directions and of all, and count."""
        shape = images.shape[1:]
        noise = example_noise(
            "uniform" if self.threat.norm == "linf" else "normal",
            (_SAMPLES_PER_DRAW, *shape),
            stream=stream,
            indices=indices,
            restart=restart,
        )[:, :num_samples]
        distance = _length(boundary - images, (1, 2, 3))[:, None]
        moves = _SAMPLE_SHARE * distance * noise / _length(noise, (2, 3, 4))
        chunk = tf.maximum(self.images_per_forward // tf.shape(images, tf.int64)[0], 1)

        def body(first, directions, wrong):
            move = moves[:, first : first + chunk]
            points = tf.clip_by_value(
                boundary[:, None] + move, self.threat.lower, self.threat.upper
            )
            flat = tf.reshape(points, (-1, *shape))
            count = tf.shape(move)[1]
            decisions = is_fooled(call_logits(logits_fn, flat), tf.repeat(labels, count))
            weights = tf.reshape(tf.cast(decisions, points.dtype), (-1, count))
            # Where the pixel range cut a sample short, so is its direction.
            moved = (points - boundary[:, None]) / distance
            both = tf.stack([weights, tf.ones_like(weights)], axis=1)
            directions += tf.einsum("nbs,nshwc->nbhwc", both, moved)
            return first + chunk, directions, wrong + tf.reduce_sum(weights, axis=1)

        _, directions, wrong = tf.while_loop(
            lambda first, *_: first < num_samples,
            body,
            (tf.constant(0, tf.int64), directions, wrong),
        )
        return directions, wrong

    def _jump(self, logits_fn, labels, boundary, normal, length):
        """The farthest of ever shorter jumps that fools; where none does, the boundary."""
        direction = self.threat.ascent_direction(normal)

        def body(number, outer, found):
            size = length / 2 ** tf.cast(number, length.dtype)
            point = boundary + _wide(size) * direction
            point = tf.clip_by_value(point, self.threat.lower, self.threat.upper)
            now = tf.logical_not(found) & is_fooled(call_logits(logits_fn, point), labels)
            return number + 1, tf.where(_wide(now), point, outer), tf.logical_or(found, now)

        _, outer, _ = tf.while_loop(
            lambda number, *_: number < _HALVINGS,
            body,
            (0, boundary, tf.zeros_like(labels, tf.bool)),
        )
        return outer


def _wide(values):
    """(N,) -> (N, 1, 1, 1)."""
    return tf.reshape(values, (-1, 1, 1, 1))


def _length(x, axes):
    """l2 length over some axes, which are kept."""
    return tf.sqrt(tf.reduce_sum(tf.square(x), axis=axes, keepdims=True))
