"""Images whose iterate returns bit for bit: they take no more work, and nothing else changes."""

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import LinearClassifier, curved, curved_examples

from logit_reg.attacks import MD, ODI, PGD, MultiTargeted, Restarts
from logit_reg.attacks.engine.forward import batch_spec
from logit_reg.attacks.engine.repeats import Repeats, is_repeatable
from logit_reg.threat import ThreatModel

pytestmark = pytest.mark.graph_optimiser


def with_and_without(monkeypatch, attack, kind, model, images, labels):
    """The results of an attack that looks for repeats and of one that does not, and who slept."""
    slept = []
    look = Repeats.look

    def noted(self, step_fn, rows, *others):
        awake = look(self, step_fn, rows, *others)
        slept.append(len(rows) - len(awake))
        return awake

    monkeypatch.setattr(Repeats, "look", noted)
    found = attack.run(model, images, labels, seed=0)
    monkeypatch.setattr(kind, "same_steps", False)
    return found, attack.run(model, images, labels, seed=0), sum(slept)


def assert_same(found, plain):
    for name in ("fooled", "last_iterate_fooled", "adversarial"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    assert (found.forwards, found.backwards) == (plain.forwards, plain.backwards)


@pytest.mark.parametrize("num_steps", [57, 100])
@pytest.mark.parametrize("epsilon", [0.03, 0.05])
def test_nothing_but_the_work_changes(monkeypatch, epsilon, num_steps):
    images, labels = curved_examples(60)
    attack = PGD(ThreatModel("linf", epsilon), "cw", num_steps, epsilon / 3, early_stop=True)
    attack = Restarts(attack, 3)
    found, plain, slept = with_and_without(monkeypatch, attack, PGD, curved, images, labels)
    assert_same(found, plain)
    assert slept and 0 < found.fooled.mean() < 1


def test_a_circle_that_does_not_end_with_the_steps_is_walked_to_the_right_place(monkeypatch):
    """Two steps there and one back: the last iterate depends on the number of steps."""

    def model(images):
        value = tf.reduce_sum(images, axis=(1, 2, 3))
        return tf.stack([2 + tf.square(value - 0.5), 0 * value], axis=1)

    images, labels = np.full((4, 1, 1, 1), 0.5, np.float32), np.zeros(4, np.int64)
    images += np.linspace(0, 0.3, 4, dtype=np.float32).reshape(-1, 1, 1, 1)
    for num_steps in (20, 41, 99, 100):
        attack = PGD(ThreatModel("linf", 0.4), "cw", num_steps, 0.25, early_stop=True)
        with monkeypatch.context() as patch:
            found, plain, slept = with_and_without(patch, attack, PGD, model, images, labels)
        assert_same(found, plain)
        assert slept or num_steps == 20


def test_a_network_that_draws_is_asked_again(monkeypatch):
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(20, box_is_active=False)

    def noisy(images):
        return classifier(images) + 1e-3 * tf.random.normal((tf.shape(images)[0], 2))

    attack = PGD(ThreatModel("linf", 1e-4), "cw", 60, 1e-4, early_stop=True)
    *_, slept = with_and_without(monkeypatch, attack, PGD, noisy, images, labels)
    assert not slept
    monkeypatch.undo()
    *_, slept = with_and_without(monkeypatch, attack, PGD, classifier, images, labels)
    assert slept


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 2 * x, True),
        (lambda x: x + tf.random.stateless_uniform((1,), [1, 2]), True),
        (lambda x: x + tf.random.uniform((1,)), False),
        (lambda x: tf.numpy_function(lambda y: y, [x], tf.float32), False),
        (lambda x: tf.cond(tf.size(x) > 3, lambda: tf.nn.dropout(x, 0.5), lambda: x), False),
    ],
)
def test_what_may_change_between_calls_is_told_from_the_graph(function, expected):
    compiled = tf.function(function, input_signature=(batch_spec((3,)),), autograph=False)
    assert is_repeatable(compiled) is expected


def test_only_attacks_whose_steps_are_all_the_same_look_for_repeats():
    assert PGD.same_steps and MultiTargeted.same_steps
    assert not MD.same_steps and not ODI.same_steps
