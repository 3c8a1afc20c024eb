"""Classifiers for the attacks of AutoAttack: linear ones with exact margins, and a curved one."""

import numpy as np
import tensorflow as tf

from logit_reg.threat import ThreatModel

SHAPE = (6, 6, 1)
_NUM_VALUES = 36


class LinearClassifier:
    """z = W x + b on 6 x 6 images in [0, 1]; the pixel range may bind."""

    def __init__(self, num_classes, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = rng.normal(size=(_NUM_VALUES, num_classes)).astype(np.float32)
        # Grey images lie near all boundaries, so that margins differ by large factors.
        self.bias = (-0.5 * self.weights.sum(axis=0)).astype(np.float32)
        self.num_calls = 0

    def __call__(self, images):
        self.num_calls += 1
        return tf.reshape(images, (-1, _NUM_VALUES)) @ self.weights + self.bias

    def examples(self, count, *, box_is_active, seed=1):
        """Images and the classes that the classifier gives them."""
        spread = (0.0, 1.0) if box_is_active else (0.45, 0.55)
        images = np.random.default_rng(seed).uniform(*spread, (count, *SHAPE)).astype(np.float32)
        return images, np.argmax(self(images).numpy(), axis=-1)

    def margins(self, images, labels, norm):
        """(N,) exact distance to the nearest other class within [0, 1], in float64."""
        weights, flat = self.weights.astype(float), images.reshape(len(images), -1).astype(float)
        logits = flat @ weights + self.bias
        margins = np.full(len(images), np.inf)
        for row, label in enumerate(labels):
            for wrong in set(range(weights.shape[1])) - {int(label)}:
                normal = weights[:, label] - weights[:, wrong]
                gap = logits[row, label] - logits[row, wrong]
                move = shortest_move(flat[row], normal, gap, norm)
                margins[row] = min(margins[row], length(move, norm))
        return margins


def shortest_move(point, normal, gap, norm, lower=0.0, upper=1.0):
    """The shortest move within the range that lowers normal . x by gap > 0, by bisection.

    Infinite where the range does not allow it.
    """
    room = np.where(normal > 0, point - lower, upper - point)
    weight = np.abs(normal)
    slope = np.ones_like(weight) if norm == "linf" else weight
    if weight @ room < gap:
        return np.full_like(point, np.inf)
    low, high = 0.0, 1.0
    while weight @ np.minimum(high * slope, room) < gap:
        high *= 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        too_short = weight @ np.minimum(middle * slope, room) < gap
        low, high = (middle, high) if too_short else (low, middle)
    return -np.sign(normal) * np.minimum(high * slope, room)


def length(move, norm):
    return np.abs(move).max() if norm == "linf" else np.sqrt(np.square(move).sum())


def check_closed_form(make_attack, classifier, norm, *, box_is_active, reach=1.05, count=30):
    """The attack fools at `reach` times the exact margin, and never at 0.95 times.

    One budget for all images, so that the attack is traced once: those whose margin lies between
    are left out.
    """
    images, labels = classifier.examples(count, box_is_active=box_is_active)
    margins = classifier.margins(images, labels, norm)
    threat = ThreatModel(norm, float(np.median(margins)))
    result = make_attack(threat).run(classifier, images, labels, seed=0)
    within, beyond = margins * reach <= threat.epsilon, margins * 0.95 >= threat.epsilon
    assert within.sum() > count // 5
    assert beyond.sum() > count // 5
    assert result.fooled[within].all()
    assert not result.fooled[beyond].any()


_RNG = np.random.default_rng(3)
_HIDDEN = _RNG.normal(size=(_NUM_VALUES, 16)).astype(np.float32)
_OUT = _RNG.normal(size=(16, 5)).astype(np.float32)


def curved(images):
    """A smooth classifier of 6 x 6 images in [0, 1] into 5 classes."""
    return tf.sin(0.5 * tf.reshape(images, (-1, _NUM_VALUES)) @ _HIDDEN) @ _OUT


def curved_examples(count):
    images = np.random.default_rng(4).random((count, *SHAPE)).astype(np.float32)
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
