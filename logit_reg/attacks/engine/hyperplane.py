"""The shortest way to a linearised boundary within the pixel range, and steps along it."""

import tensorflow as tf

from logit_reg.threat import ThreatModel

# Rounds of the exact line search; a handful is the rule, and each can only go further.
_MAX_ROUNDS = 60
# Share of the pixel range below which a projection counts as this long.
_SHORTEST = 1e-8


def project_on_hyperplane(points, normal, value, threat: ThreatModel):
    """The shortest move from points to a hyperplane that stays in the pixel range.

    In linf and l2 pixel i moves by min(t s_i, room_i), with s_i = 1 or |normal_i|. The distance
    gained is increasing, concave and piecewise linear in t, so Newton's method from t = 0 never
    overshoots and ends at the exact t. In l1 one pixel after the other moves by all its room,
    those with the largest |normal_i| first, until the last one gains what is left.

    Args:
        points: (N, D) float32, pixel units, within the bounds.
        normal: (N, D) float32; any scale.
        value: (N,) float32 normal . point - b, for the hyperplane normal . x = b.
        threat: its norm is minimised, its bounds are kept.

    Returns:
        (N, D) float32 move; where the hyperplane is out of reach, as near to it as the pixel
        range allows, and zero where the normal is zero.

    Source:
        The projection problem of Croce and Hein 2020, arXiv:1907.02044, section 2.2.
    """
    largest = tf.reduce_max(tf.abs(normal), axis=1, keepdims=True)
    normal = tf.math.divide_no_nan(normal, largest)
    value = tf.math.divide_no_nan(value[:, None], largest)
    direction = -tf.sign(normal) * tf.where(value >= 0, 1.0, -1.0)
    room = tf.where(direction < 0, points - threat.lower, threat.upper - points)
    weight, gap = tf.abs(normal), tf.abs(value)
    if threat.norm == "l1":
        return direction * _moves_in_turn(weight, room, gap)
    slope = tf.ones_like(weight) if threat.norm == "linf" else weight
    gain, speed = weight * room, weight * slope
    # As far as it gets: finite, so that 0 * length stays 0.
    furthest = tf.ones_like(gap) * normal.dtype.max
    length = tf.where(tf.reduce_sum(gain, axis=1, keepdims=True) <= gap, furthest, 0.0)

    def body(length, is_growing, count):
        free = room > length * slope
        missing = gap - tf.reduce_sum(tf.where(free, 0.0, gain), axis=1, keepdims=True)
        rate = tf.reduce_sum(tf.where(free, speed, 0.0), axis=1, keepdims=True)
        reached = tf.minimum(tf.where(rate > 0, missing / rate, furthest), furthest)
        # A row that is there stays, however long others of its batch take.
        longer = tf.where(is_growing, tf.maximum(length, reached), length)
        return longer, longer > length * (1 + 1e-6), count + 1

    length, _, _ = tf.while_loop(
        lambda length, is_growing, count: tf.logical_and(
            tf.reduce_any(is_growing), count < _MAX_ROUNDS
        ),
        body,
        (length, tf.ones_like(length, tf.bool), 0),
    )
    return direction * tf.minimum(length * slope, room)


def move_to_hyperplane(points, normal, value, threat: ThreatModel):
    """`project_on_hyperplane` of images: the move (N, H, W, C) and its length (N,)."""
    flat = (tf.shape(points)[0], -1)
    move = project_on_hyperplane(tf.reshape(points, flat), tf.reshape(normal, flat), value, threat)
    move = tf.reshape(move, tf.shape(points))
    return move, threat.distance(move, tf.zeros_like(move))


def boundary_step(threat: ThreatModel, current, images, value, normal, *, alpha_max, eta):
    """A step across the linearised boundary, drawn towards the image's own projection on it.

    Args:
        threat: its norm is minimised, its bounds are kept.
        current: (N, H, W, C) float32 points, pixel units.
        images: (N, H, W, C) float32.
        value: (N,) float32 what is 0 on the boundary, at `current`.
        normal: (N, H, W, C) float32 its gradient there.
        alpha_max: largest weight of the image's projection.
        eta: how far a projection goes, 1 being onto the boundary.

    Returns:
        (N, H, W, C) float32 within the pixel range.

    Source:
        Croce and Hein 2020, arXiv:1907.02044, Eq. 9 and 10.
    """
    shortest = _SHORTEST * (threat.upper - threat.lower)
    move, length = move_to_hyperplane(current, normal, value, threat)
    image_value = value + tf.reduce_sum(normal * (images - current), axis=(1, 2, 3))
    image_move, image_length = move_to_hyperplane(images, normal, image_value, threat)
    length = tf.maximum(length, shortest)
    image_length = tf.maximum(image_length, shortest)
    alpha = tf.minimum(length / (length + image_length), alpha_max)
    alpha = tf.reshape(alpha, (-1, 1, 1, 1))

    moved = (current + eta * move) * (1 - alpha) + (images + eta * image_move) * alpha
    return tf.clip_by_value(moved, threat.lower, threat.upper)


def _moves_in_turn(weight, room, gap):
    """(N, D) moves of at most their room that gain the gap (N, 1), the heaviest pixels first."""
    order = tf.argsort(weight, axis=1, direction="DESCENDING", stable=True)
    weight, room = (tf.gather(x, order, batch_dims=1) for x in (weight, room))
    # In float64: sums of thousands of gains are taken from each other.
    gained = tf.cumsum(tf.cast(weight * room, tf.float64), axis=1, exclusive=True)
    missing = tf.cast(tf.cast(gap, tf.float64) - gained, weight.dtype)
    moves = tf.clip_by_value(tf.math.divide_no_nan(missing, weight), 0.0, room)
    return tf.gather(moves, tf.argsort(order, axis=1), batch_dims=1)
