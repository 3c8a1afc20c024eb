"""The Square attack: random search with squares, without gradients."""

import bisect
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveSetAttack, take
from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.incremental_forward import FullForward, cheapest_forward
from logit_reg.attacks.engine.losses import margin
from logit_reg.attacks.engine.low_precision import judged_logits, query_fn
from logit_reg.attacks.engine.random_numbers import example_noise
from logit_reg.threat import ThreatModel

# The fraction of pixels in a square is halved from each of these queries on.
_HALVED_FROM = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
# Most queries before images that are fooled are taken out; random numbers are drawn for as
# many, whatever the budget, so that a smaller budget's queries are a larger one's first.
_QUERIES_PER_CHUNK = 100
_TINY = 1e-12
# The network sees multiples of so many images, so that it meets few batch sizes.
_BLOCK = 4


@dataclasses.dataclass(frozen=True)
class Square(ActiveSetAttack):
    """Square attack on the margin: a random square is kept if it lowers the margin.

    Needs forwards only; of a `gradient_logits_fn` a `LowPrecision` alone has a use, for the
    queries. An image is left once it is fooled; else the point with the lowest
    margin is returned. It does not claim to find minimal perturbations: a square of two pixels
    and more (in l2 and l1, three) cannot follow each pixel of a boundary.

    Source:
        Andriushchenko et al. 2020, arXiv:1912.00049, with the schedule, starts and budget of
        AutoAttack's public code (the schedule is not rescaled to the budget); l1: Croce and Hein
        2021, arXiv:2103.01208, and the same code. Deviations: a start in l1 is at least epsilon
        long before it is projected; squares
        are drawn for each image instead of once for the batch; they reach the last row and
        column, which the public code's never do (without them not even a linear classifier falls
        near its exact margin); a query that would change nothing is not sent to the network.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    num_queries: int = 5000
    """Number of squares to try, after the start."""
    p: float = 0.8
    """Fraction of the pixels that a square covers at first."""

    def __post_init__(self):
        if self.num_queries < 1:
            raise ValueError(f"num_queries must be at least 1; got {self.num_queries}.")
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be above 0 and at most 1; got {self.p}.")

    def _attack(self, active):
        rows, examples = active.rows, active.examples
        if not len(rows):
            return
        logits_fn, queried = active.logits_fn, query_fn(*active.functions)
        image, numbers = batch_spec(examples.images.shape[1:]), batch_spec((), tf.int64)
        scalar = tf.TensorSpec((), tf.int64)
        functions: tuple = (logits_fn, queried, FullForward(queried))
        begin = compiled(self, "_begin", functions, (image, numbers, numbers, scalar, scalar))
        signature = (
            *(image, image, numbers, batch_spec((), tf.float64), numbers),
            *(scalar, scalar, scalar, tf.TensorSpec((2, None, None), tf.float32)),
        )
        parts = (examples.images, examples.labels, examples.indices)
        images, labels, indices = take(parts, rows)
        stream, restart = examples.stream(self, "start"), examples.restart
        best, lowest, num_again = begin(images, labels, indices, stream, restart)
        active.count(len(rows) + int(num_again), forwards=1)
        for first, count in (*_chunks(self.num_queries), (0, 0)):
            best, lowest = best.numpy(), lowest.numpy()
            keep = active.record(rows, best, ~(lowest > 0))
            state = take((rows, images, best, labels, lowest, indices), keep)
            rows, images, best, labels, lowest, indices = state
            if not len(rows) or not count:
                break
            shape = images.shape[1:]
            patterns = self._patterns(first, shape[:2])
            if self.threat.norm == "linf" and queried is logits_fn:
                forward = cheapest_forward(logits_fn, shape, self.side(first, *shape[:2]))
                functions = (logits_fn, queried, forward)
            advance = compiled(self, "_advance", functions, signature)
            stream = examples.stream(self, f"queries {first}")
            best, lowest, num_sent = advance(
                images, best, labels, lowest, indices, stream, restart, count, patterns
            )
            active.count(int(num_sent), forwards=1)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        return self.num_queries + 2, 0

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the square of a query, in pixels.

        Args:
            query: number of the query, from 0.
            height: of the images.
            width: of the images.

        Returns:
            At least 1 in linf; in l2 and l1 odd and at least 3; never above height or width.
        """
        fraction = self.p / 2 ** bisect.bisect_right(_HALVED_FROM, query)
        side = max(round(math.sqrt(fraction * height * width)), 1)
        if self.threat.norm != "linf":
            side = max(side, 3)
            side += side % 2 == 0
        return min(side, height, width)

    def _patterns(self, query, size):
        """(2, s, s) what a square adds, upright and transposed; linf only takes its size."""
        side = self.side(query, *size)
        if self.threat.norm == "linf":
            return np.ones((2, side, side), np.float32)
        bumps = two_bumps(side, self._order)
        return np.stack([bumps, bumps.T])

    @property
    def _order(self):
        """Of the norm: the power that lengths are made of, in l2 and l1."""
        return {"l2": 2, "l1": 1}[self.threat.norm]

    def _begin(self, logits_fn, queried, forward, images, labels, indices, stream, restart):
        if self.threat.norm == "linf":
            start = self._stripes(images, indices, stream, restart)
        else:
            start = self._tiles(images, indices, stream, restart)
        logits = forward.logits(start, forward.features(start))
        return start, *self._margin(logits_fn, queried, start, logits, labels)

    def _stripes(self, images, indices, stream, restart):
        """Vertical stripes of +-epsilon, for each column and channel."""
        _, height, width, num_channels = images.shape
        draw = {"stream": stream, "indices": indices, "restart": restart}
        signs = _signs(example_noise("unit", (1, width, num_channels), **draw))
        delta = tf.tile(self.threat.epsilon * signs, (1, height, 1, 1))
        return self.threat.project(images + delta, images)

    def _tiles(self, images, indices, stream, restart):
        """A grid of five by five tiles, each of random direction, and sign for each channel."""
        _, height, width, num_channels = images.shape
        side = max(min(height, width) // 5, 1)
        tops = _tile_starts(height, side)
        lefts = _tile_starts(width, side)
        draw = {"stream": stream, "indices": indices, "restart": restart}
        noise = example_noise("unit", (len(tops), len(lefts), 1 + num_channels), **draw)
        upright = two_bumps(side, self._order)[:, :, None]
        tiles = []
        for row in range(len(tops)):
            in_row = []
            for column in range(len(lefts)):
                numbers = noise[:, row, column, None, None, :]
                flipped = numbers[..., :1] > 0.5
                pattern = tf.where(flipped, upright.transpose(1, 0, 2)[None], upright[None])
                in_row.append(pattern * _signs(numbers[..., 1:]))
            tiles.append(tf.concat(in_row, axis=2))
        grid = tf.concat(tiles, axis=1)
        below, right = height - tops[-1] - side, width - lefts[-1] - side
        delta = tf.pad(grid, ((0, 0), (tops[0], below), (lefts[0], right), (0, 0)))
        # In l1 as high as the pixel range is wide, and together at least epsilon long.
        width = self.threat.upper - self.threat.lower
        total = len(tops) * len(lefts) * num_channels
        return self._fitted(images, delta * max(width, self.threat.epsilon / total))

    def _advance(
        self,
        logits_fn,
        queried,
        forward,
        images,
        best,
        labels,
        lowest,
        indices,
        stream,
        restart,
        num_queries,
        patterns,
    ):
        num_channels = images.shape[-1]
        propose = self._propose_linf if self.threat.norm == "linf" else self._propose_window
        num_numbers = (2 if self.threat.norm == "linf" else 5) + num_channels
        noise = example_noise(
            "unit",
            (_QUERIES_PER_CHUNK, num_numbers),
            stream=stream,
            indices=indices,
            restart=restart,
        )

        def body(query, best, features, lowest, num_sent):
            candidate, window = propose(images, best, noise[:, query], patterns)
            # An image that is fooled stays as it is until it is taken out.
            is_new = tf.reduce_any(tf.not_equal(candidate, best), axis=(1, 2, 3))
            is_new = tf.logical_and(is_new, lowest > 0)
            count = tf.reduce_sum(tf.cast(is_new, tf.int32))
            size = tf.maximum(_BLOCK * ((count + _BLOCK - 1) // _BLOCK), _BLOCK)
            sent = tf.math.top_k(
                tf.cast(is_new, tf.float32), tf.minimum(size, tf.size(is_new))
            ).indices
            points, old, *starts = (
                tf.nest.map_structure(lambda part: tf.gather(part, sent), whole)
                for whole in (candidate, features, window.top, window.left)
            )
            new = forward.changed_features(points, old, starts, window.side)
            logits = forward.logits(points, new)
            margins, again = self._margin(
                logits_fn, queried, points, logits, tf.gather(labels, sent)
            )
            reached = tf.tensor_scatter_nd_update(lowest, sent[:, None], margins)
            better = tf.logical_or(reached < lowest, tf.logical_not(reached > 0))
            better = tf.logical_and(better, is_new)
            best = tf.where(tf.reshape(better, (-1, 1, 1, 1)), candidate, best)
            kept = tf.where(tf.gather(better, sent))
            features = tuple(
                tf.tensor_scatter_nd_update(
                    whole, tf.gather_nd(sent, kept)[:, None], tf.gather_nd(part, kept)
                )
                for whole, part in zip(features, new, strict=True)
            )
            lowest = tf.where(better, reached, lowest)
            return query + 1, best, features, lowest, num_sent + count + again

        _, best, _, lowest, num_sent = tf.while_loop(
            lambda query, *_: query < num_queries,
            body,
            (tf.constant(0, tf.int64), best, forward.features(best), lowest, 0),
        )
        return best, lowest, num_sent

    def _propose_linf(self, images, best, numbers, patterns):
        """Move a square by +-2 epsilon in each channel, clipped: onto the faces of the ball."""
        window = _Window(images, tf.shape(patterns)[1], numbers[:, 0], numbers[:, 1])
        signs = _signs(numbers[:, None, None, 2:])
        # Not from `best`: rounding would tell apart what has moved there and what stood there.
        on_faces = self.threat.project(images + self.threat.epsilon * signs, images)
        return tf.where(window.mask, on_faces, best), window

    def _propose_window(self, images, best, numbers, patterns):
        """In l2 and l1: move a window's perturbation, and what is left of epsilon, into another."""
        num_channels, order = images.shape[-1], self._order
        side = tf.shape(patterns)[1]
        window = _Window(images, side, numbers[:, 0], numbers[:, 1])
        source = _Window(images, side, numbers[:, 2], numbers[:, 3])
        delta = best - images
        old = tf.where(window.mask, delta, 0.0)
        old = old / (_TINY + _length(old, (1, 2), order))
        both = tf.where(tf.logical_or(window.mask, source.mask), delta, 0.0)
        left = self.threat.epsilon**order - _length(delta, (1, 2, 3), order) ** order
        left = tf.maximum(left, 0.0) / num_channels
        length = _root(left + _length(both, (1, 2), order) ** order, order)
        flipped = tf.cast(numbers[:, 4] > 0.5, tf.int32)
        new = window.place(patterns, flipped) * _signs(numbers[:, None, None, 5:]) + old
        new = length * new / (_TINY + _length(new, (1, 2), order))
        if self.threat.norm == "l1":
            # As in the public code: the projection takes off what is too much.
            new *= num_channels
        kept = tf.where(source.mask, 0.0, delta)
        # All of the image changes, as its length does.
        return self._fitted(images, tf.where(window.mask, new, kept)), window

    def _fitted(self, images, delta):
        """The images moved by delta, in l2 made epsilon long, within ball and pixel range."""
        if self.threat.norm == "l2":
            delta = self.threat.epsilon * self.threat.unit(delta)
        return self.threat.project(images + delta, images)

    def _margin(self, logits_fn, queried, points, logits, labels):
        """(N,) float64 margins, and the number of rechecks."""
        nobody = tf.zeros_like(labels, tf.bool)
        logits, num_again = judged_logits(logits_fn, queried, points, logits, labels, nobody)
        return tf.cast(margin(logits, labels), tf.float64), num_again


def two_bumps(side: int, order: int = 2) -> np.ndarray:
    """The perturbation of a square in l2 or l1: a positive bump above a negative one, of length 1.

    Args:
        side: s, in pixels.
        order: of the norm, 2 or 1.

    Returns:
        (s, s) float32.

    Source:
        Andriushchenko et al. 2020, arXiv:1912.00049, section 3.4; l1: AutoAttack's public code.
    """
    half = side // 2
    bumps = np.concatenate([_bump(half, side, order), -_bump(side - half, side, order)])
    return (bumps / _root(np.sum(np.abs(bumps) ** order), order)).astype(np.float32)


def _bump(height, width, order):
    """(height, width) concentric squares around the middle, the inner ones higher; length 1."""
    if not height:
        return np.zeros((0, width))
    rings = max(height // 2, width // 2) + 1
    ring = np.maximum(
        np.abs(np.arange(height) - height // 2)[:, None],
        np.abs(np.arange(width) - width // 2)[None, :],
    )
    # Flat in l2, peaked in l1.
    steps = 1.0 / np.arange(1, rings + 1) ** {2: 2, 1: 4}[order]
    values = np.cumsum(steps[::-1])[::-1][ring]
    return values / _root(np.sum(values**order), order)


def _chunks(num_queries) -> Iterator[tuple[int, int]]:
    """(first query, number of queries) of stretches with squares of one size."""
    first = 0
    while first < num_queries:
        stage = bisect.bisect_right(_HALVED_FROM, first)
        end = _HALVED_FROM[stage] if stage < len(_HALVED_FROM) else num_queries
        count = min(end, num_queries, first + _QUERIES_PER_CHUNK) - first
        yield first, count
        first += count


def _tile_starts(size, side):
    """Where the tiles of one axis start."""
    margin_before = max((size - 5 * side) // 2, 0)
    return [margin_before + i * side for i in range((size - margin_before) // side)]


class _Window:
    """A square at a random place of each image."""

    def __init__(self, images, side, down, across):
        """Place squares: `down` and `across` are (N,) uniform on [0, 1)."""
        height, width = images.shape[1:3]
        self.top, self.left = _place(down, height - side), _place(across, width - side)
        """(N,) int32 first row and first column."""
        self.side = side
        self._rows = tf.range(height)[None, :] - self.top[:, None]
        self._columns = tf.range(width)[None, :] - self.left[:, None]
        self.mask = tf.logical_and(
            self._inside(self._rows)[:, :, None, None],
            self._inside(self._columns)[:, None, :, None],
        )
        """(N, H, W, 1) bool."""

    def place(self, patterns, choice):
        """One of the (2, s, s) patterns in each square, 0 elsewhere: (N, H, W, 1)."""
        rows = tf.clip_by_value(self._rows, 0, self.side - 1)[:, :, None]
        columns = tf.clip_by_value(self._columns, 0, self.side - 1)[:, None, :]
        flat = (choice[:, None, None] * self.side + rows) * self.side + columns
        values = tf.gather(tf.reshape(patterns, (-1,)), flat)[..., None]
        return tf.where(self.mask, values, 0.0)

    def _inside(self, offsets):
        return tf.logical_and(offsets >= 0, offsets < self.side)


def _place(uniform, last):
    """A whole number from 0 to `last`: (N,) int32."""
    number = tf.cast(uniform * tf.cast(last + 1, uniform.dtype), tf.int32)
    return tf.minimum(number, last)


def _signs(unit):
    """-1 or 1 from uniform numbers on [0, 1)."""
    return tf.where(unit < 0.5, -1.0, 1.0)


def _length(x, axes, order):
    """Length in l2 or l1 over some axes, which are kept."""
    powers = tf.square(x) if order == 2 else tf.abs(x)
    return _root(tf.reduce_sum(powers, axis=axes, keepdims=True), order)


def _root(x, order):
    """Square root, or the number itself."""
    if order == 1:
        return x
    return np.sqrt(x) if isinstance(x, np.floating) else tf.sqrt(x)
