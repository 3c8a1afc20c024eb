"""Classifiers for the attacks of AutoAttack: linear ones with exact margins, and a curved one."""

import dataclasses

import numpy as np
import tensorflow as tf

from logit_reg.evaluation.run import check_threat
from logit_reg.threat import ThreatModel

SHAPE = (6, 6, 1)
_NUM_VALUES = 36


class LinearClassifier:
    """z = W x + b on images in [0, 1]; the pixel range may bind."""

    def __init__(self, num_classes, seed=0, shape=SHAPE):
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.weights = rng.normal(size=(np.prod(shape), num_classes)).astype(np.float32)
        # Grey images lie near all boundaries, so that margins differ by large factors.
        self.bias = (-0.5 * self.weights.sum(axis=0)).astype(np.float32)

    def __call__(self, images):
        return tf.reshape(images, (-1, len(self.weights))) @ self.weights + self.bias

    def examples(self, count, *, box_is_active, seed=1):
        """Images and the classes that the classifier gives them.

        Half of the pixels are 0 or 1 where the box is active; else none is near.
        """
        low, high = (-0.5, 1.5) if box_is_active else (0.45, 0.55)
        images = np.random.default_rng(seed).uniform(low, high, (count, *self.shape))
        images = np.clip(images, 0, 1).astype(np.float32)
        return images, np.argmax(self(images).numpy(), axis=-1)

    def margins(self, images, labels, norm):
        """(N,) exact distance to the nearest other class within [0, 1], in float64."""
        weights, flat = self.weights.astype(float), images.reshape(len(images), -1).astype(float)
        logits = flat @ weights + self.bias
        rows = np.arange(len(labels))
        margins = np.full(len(images), np.inf)
        for wrong in range(weights.shape[1]):
            others = labels != wrong
            normals = (weights[:, labels] - weights[:, [wrong]]).T[others]
            gaps = (logits[rows, labels] - logits[:, wrong])[others]
            moves = shortest_moves(flat[others], normals, gaps, norm)
            margins[others] = np.minimum(margins[others], lengths(moves, norm))
        return margins


def shortest_moves(points, normals, gaps, norm, lower=0.0, upper=1.0):
    """The shortest moves within the range that lower normal . x by gap > 0, by bisection.

    (N, D), (N, D), (N,) -> (N, D); infinite where the range does not allow it.
    """
    rooms = np.where(normals > 0, points - lower, upper - points)
    weights = np.abs(normals)
    if norm == "l1":
        return _moves_in_turn(weights, rooms, gaps) * -np.sign(normals)
    slopes = np.ones_like(weights) if norm == "linf" else weights

    def gains(reach):
        return (weights * np.minimum(reach[:, None] * slopes, rooms)).sum(axis=1)

    # Far enough for every pixel that matters to reach the end of its room.
    smallest = np.where(slopes > 0, slopes, np.inf).min(axis=1)
    low, high = np.zeros(len(points)), (upper - lower) / np.minimum(smallest, 1.0)
    is_reachable = gains(high) >= gaps
    for _ in range(100):
        middle = 0.5 * (low + high)
        too_short = gains(middle) < gaps
        low, high = np.where(too_short, middle, low), np.where(too_short, high, middle)
    moves = -np.sign(normals) * np.minimum(high[:, None] * slopes, rooms)
    return np.where(is_reachable[:, None], moves, np.inf)


def _moves_in_turn(weights, rooms, gaps):
    """In l1, image by image: the heaviest pixel moves by all its room, then the next one."""
    moves = np.zeros_like(weights)
    for move, weight, room, missing in zip(moves, weights, rooms, gaps, strict=True):
        for pixel in np.argsort(-weight):
            if weight[pixel] > 0 and missing > 0:
                move[pixel] = min(room[pixel], missing / weight[pixel])
                missing -= weight[pixel] * move[pixel]
        if missing > 1e-9:
            move[:] = np.inf
    return moves


def lengths(moves, norm):
    """(N, D) -> (N,)."""
    if norm == "l1":
        return np.abs(moves).sum(axis=1)
    return np.abs(moves).max(axis=1) if norm == "linf" else np.sqrt(np.square(moves).sum(axis=1))


def check_closed_form(
    make_attack, classifier, norm, *, box_is_active, reach=1.05, share=1.0, pool=30, count=20
):
    """The attack fools what has `reach` times its margin as budget, and nothing at 0.95 times.

    One budget for all images, so that the attack is traced once: the median of the margins of a
    pool. Looked at are, on either side, the `count` images nearest to it: the larger the pool,
    the tighter the budget.

    Args:
        make_attack: ThreatModel -> attack.
        classifier: a `LinearClassifier`.
        norm: "linf", "l2" or "l1".
        box_is_active: whether many pixels are at the edge of the range.
        reach: how many times its margin an image has as budget, at least.
        share: of those images, how many must fall.
        pool: images from which those nearest to the budget are taken.
        count: images to look at on either side, at most.
    """
    images, labels = classifier.examples(pool, box_is_active=box_is_active)
    margins = classifier.margins(images, labels, norm)
    threat = ThreatModel(norm, float(np.median(margins[np.isfinite(margins)])))
    order = np.argsort(margins)
    within = order[margins[order] * reach <= threat.epsilon][-count:]
    beyond = order[margins[order] * 0.95 >= threat.epsilon][:count]
    assert min(len(within), len(beyond)) >= min(count, pool // 5)
    rows = np.concatenate([within, beyond])
    result = make_attack(threat).run(classifier, images[rows], labels[rows], seed=0)
    assert result.fooled[: len(within)].mean() >= share
    assert not result.fooled[len(within) :].any()


_RNG = np.random.default_rng(3)
_HIDDEN = _RNG.normal(size=(_NUM_VALUES, 16)).astype(np.float32)
_OUT = _RNG.normal(size=(16, 5)).astype(np.float32)


def curved(images):
    """A smooth classifier of 6 x 6 images in [0, 1] into 5 classes."""
    return tf.sin(0.5 * tf.reshape(images, (-1, _NUM_VALUES)) @ _HIDDEN) @ _OUT


def curved_examples(count, seed=4):
    """Images and the classes that `curved` gives them."""
    images = np.random.default_rng(seed).random((count, *SHAPE)).astype(np.float32)
    return images, np.argmax(curved(images).numpy(), axis=-1)


class CountedCalls:
    """A classifier that counts how often Python calls it: once for each trace."""

    def __init__(self, function):
        self.function = function
        self.num_calls = 0

    def __call__(self, images):
        self.num_calls += 1
        return self.function(images)


def check_is_traced_once(attack):
    """Another batch size does not call the network's Python again."""
    model = CountedCalls(curved)
    images, labels = curved_examples(9)
    attack.run(model, images, labels, seed=0)
    num_calls = model.num_calls
    attack.run(model, images[:4], labels[:4], seed=0)
    attack.run(model, images[:7], labels[:7], seed=1, restart=1)
    assert num_calls == model.num_calls


def check_seeds_and_batches(attack, count, *, first=7, most_different=0):
    """A seed gives one result, another seed another; batches hardly matter.

    Args:
        attack: with random numbers.
        count: images.
        first: of them in the first batch; the others are in the second.
        most_different: images whose verdict may depend on the batch, by rounding.
    """
    images, labels = curved_examples(count)
    whole = attack.run(curved, images, labels, seed=5)
    again = attack.run(curved, images, labels, seed=5)
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    other = attack.run(curved, images, labels, seed=6)
    assert not np.array_equal(whole.adversarial, other.adversarial)
    order = np.random.default_rng(0).permutation(count)
    parts = [
        attack.run(curved, images[part], labels[part], seed=5, indices=part)
        for part in (order[:first], order[first:])
    ]
    fooled = np.concatenate([part.fooled for part in parts])
    assert np.sum(fooled != whole.fooled[order]) <= most_different


def check_counts_passes(attack, forwards, backwards):
    """Of six images two are wrong from the start and cost a forward; the others stand to the end.

    Args:
        attack: whatever its budget.
        forwards: for each image that stands, beside the first.
        backwards: for each image that stands.

    Returns:
        The same attack with a budget in which nothing falls, and the six images and labels.
    """
    images, labels = curved_examples(6)
    labels[:2] = (labels[:2] + 1) % 5
    attack = dataclasses.replace(attack, threat=ThreatModel("linf", 1e-6))
    result = attack.run(curved, images, labels, seed=0)
    assert result.fooled.tolist() == [True, True, False, False, False, False]
    np.testing.assert_array_equal(result.adversarial[:2], images[:2])
    assert (result.forwards, result.backwards) == (6 + 4 * forwards, 4 * backwards)
    return attack, images, labels


def check_never_asks_for_a_gradient(attack, count=20):
    """An attack without gradients breaks something on a network that refuses to give one."""

    @tf.custom_gradient
    def without_gradient(images):
        def refuse(upstream):
            raise AssertionError("a gradient was asked for")

        return tf.identity(images), refuse

    images, labels = curved_examples(count)
    result = attack.run(lambda x: curved(without_gradient(x)), images, labels, seed=0)
    assert result.fooled.any()
    assert result.backwards == 0


def check_stays_within(attack):
    """On the 0-255 scale: ball, pixel range, and what is called fooled is what fools."""
    images, _ = curved_examples(20)
    images = np.round(255 * images).astype(np.float32)

    def model(images):
        return curved(images / 255.0)

    labels = np.argmax(model(images).numpy(), axis=-1)
    result = attack.run(model, images, labels, seed=0)
    assert result.adversarial.dtype == np.float32
    check_threat(type(attack).__name__, result.adversarial, images, np.arange(20), attack.threat)
    fools = np.argmax(model(result.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, result.fooled)
    assert 0 < result.fooled.mean() < 1
    assert attack(model, images, labels, seed=0).shape == (20, *SHAPE)


# For classifiers on which a plain ascent goes astray.
_CHECKERBOARD = (np.indices(SHAPE[:2]).sum(axis=0) % 2 * 2.0 - 1.0)[..., None].astype(np.float32)


def brightness(images):
    """(N,) how far an image is from grey."""
    return tf.reduce_mean(images - 0.5, axis=(1, 2, 3))


def ripple(images):
    """(N,) how much of a pattern is in an image that leaves its brightness as it is."""
    return tf.reduce_sum(_CHECKERBOARD * images, axis=(1, 2, 3))


def grey_images(count=20):
    """Images that are nearly grey, all of class 0."""
    images = np.random.default_rng(0).uniform(0.45, 0.55, (count, *SHAPE)).astype(np.float32)
    return images, np.zeros(count, int)
