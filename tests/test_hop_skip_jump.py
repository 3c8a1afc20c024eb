"""HopSkipJump."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    SHAPE,
    LinearClassifier,
    check_closed_form,
    check_is_traced_once,
    check_never_asks_for_a_gradient,
    check_stays_within,
    curved,
    curved_examples,
)

from logit_reg.attacks import HopSkipJump, MinimumNorm, Restarts
from logit_reg.threat import ThreatModel

LINF = ThreatModel("linf", 0.05)
L2 = ThreatModel("l2", 0.3)
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


@pytest.mark.parametrize("box_is_active", [False, True])
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget(norm, num_classes, box_is_active):
    """All of what 1.1 times its margin reaches, nothing of what 0.95 times does not."""
    check_closed_form(
        HopSkipJump, LinearClassifier(num_classes), norm, box_is_active=box_is_active, reach=1.1
    )


@each_threat
def test_sees_only_the_predicted_class(threat):
    def decisions(images):
        logits = curved(images)
        return tf.one_hot(tf.argmax(logits, axis=-1), 5)

    images, labels = curved_examples(12)
    attack = HopSkipJump(threat, num_steps=4)
    plain, hard = (attack.run(model, images, labels, seed=0) for model in (curved, decisions))
    np.testing.assert_array_equal(plain.adversarial, hard.adversarial)
    np.testing.assert_array_equal(plain.fooled, hard.fooled)
    assert 0 < plain.fooled.mean() < 1


def test_never_asks_for_a_gradient():
    check_never_asks_for_a_gradient(HopSkipJump(LINF, num_steps=4), count=12)


@each_threat
def test_the_normal_of_a_linear_boundary(threat):
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(4, box_is_active=False)
    exact = (classifier.weights[:, 1 - labels] - classifier.weights[:, labels]).T
    gaps = np.ptp(classifier(images).numpy(), axis=1)
    # On the boundary, and an all but invisible bit beyond.
    move = exact * (1.0001 * gaps / np.square(exact).sum(axis=1))[:, None]
    boundary = images + move.reshape(images.shape).astype(np.float32)
    normal = HopSkipJump(threat, num_samples=4096).estimate_normal(
        classifier, images, labels, boundary, seed=0, indices=np.arange(4)
    )
    normal = normal.reshape(4, -1)
    cosine = (normal * exact).sum(axis=1)
    cosine /= np.linalg.norm(normal, axis=1) * np.linalg.norm(exact, axis=1)
    # In d dimensions n signs of Gaussian samples leave 1 - pi (d - 1) / 4n of it on average.
    assert cosine.min() > 1 - 3 * np.pi * 35 / (4 * 4096)


def test_on_a_curved_classifier_it_comes_near_the_closest_image():
    images, labels = curved_examples(30)
    closest = MinimumNorm(L2).closest(curved, images, labels, seed=0).distance
    threat = ThreatModel("l2", float(np.median(closest)))
    found = HopSkipJump(threat).run(curved, images, labels, seed=0)
    assert not found.fooled[closest > 1.05 * threat.epsilon].any()
    assert found.fooled[closest < threat.epsilon / 1.2].mean() > 0.8


@each_threat
def test_more_steps_break_more_and_an_image_is_left_at_its_first_success(threat):
    images, labels = curved_examples(20)
    runs = [
        HopSkipJump(threat, num_steps, 30).run(curved, images, labels, seed=0)
        for num_steps in (1, 2, 5)
    ]
    for fewer, more in zip(runs, runs[1:], strict=False):
        assert np.all(more.fooled[fewer.fooled])
        np.testing.assert_array_equal(
            more.adversarial[fewer.fooled], fewer.adversarial[fewer.fooled]
        )
        assert more.forwards > fewer.forwards
    assert runs[0].fooled.sum() < runs[-1].fooled.sum()


@each_threat
def test_batches_do_not_matter_and_seeds_do(threat):
    images, labels = curved_examples(12)
    attack = HopSkipJump(threat, num_steps=3, num_samples=40)
    whole = attack.run(curved, images, labels, seed=3)
    again = attack.run(curved, images, labels, seed=3)
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    order = np.random.default_rng(0).permutation(12)
    forwards = 0
    for part in (order[:5], order[5:]):
        found = attack.run(curved, images[part], labels[part], seed=3, indices=part)
        np.testing.assert_array_equal(found.fooled, whole.fooled[part])
        np.testing.assert_allclose(found.adversarial, whole.adversarial[part], atol=1e-3)
        forwards += found.forwards
    assert forwards == whole.forwards
    for other in ({"seed": 4}, {"seed": 3, "restart": 1}):
        found = attack.run(curved, images, labels, **other)
        assert not np.array_equal(whole.adversarial, found.adversarial)


@each_threat
def test_how_many_images_are_sent_at_once_does_not_matter(threat):
    images, labels = curved_examples(8)
    few, many = (
        HopSkipJump(threat, 3, 70, images_per_forward=count).run(curved, images, labels, seed=0)
        for count in (5, 10_000)
    )
    np.testing.assert_array_equal(few.fooled, many.fooled)
    np.testing.assert_allclose(few.adversarial, many.adversarial, atol=1e-3)
    assert few.forwards == many.forwards


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_settings_mean_the_same_on_both_pixel_scales(norm):
    images, labels = curved_examples(20)
    epsilon = 0.05 if norm == "linf" else 0.3

    def attack(upper):
        threat = ThreatModel(norm, upper * epsilon, 0.0, upper)
        return HopSkipJump(threat, num_steps=4).run(
            lambda x: curved(x / upper), upper * images, labels, seed=0
        )

    small, large = attack(1.0), attack(255.0)
    # A walk that sees decisions only may turn at a rounding.
    assert np.mean(small.fooled == large.fooled) >= 0.9
    assert 0 < small.fooled.mean() < 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_within_ball_and_pixel_range(norm):
    threat = ThreatModel(norm, 12.0 if norm == "linf" else 80.0, 0.0, 255.0)
    check_stays_within(HopSkipJump(threat, num_steps=5))


def test_counts_forwards_only_and_no_more_than_it_says():
    images, labels = curved_examples(4)
    # Nothing falls, and every image finds its start at once.
    attack = HopSkipJump(ThreatModel("linf", 1e-6), num_steps=2, num_samples=10, num_starts=7)
    result = attack.run(curved, images, labels, seed=0)
    samples = 10 + 14
    assert (result.forwards, result.backwards) == (4 * (1 + 7 + 3 * 17 + 2 * 10 + samples), 0)
    assert attack.cost() == (1 + 7 + 3 * 17 + 2 * 10 + samples, 0)
    wrong = (labels + 1) % 5
    misclassified = attack.run(curved, images, wrong, seed=0)
    assert misclassified.fooled.all() and misclassified.forwards == 4
    np.testing.assert_array_equal(misclassified.adversarial, images)


def test_without_a_start_an_image_stands():
    def model(images):
        dark = 0.0 * images[:, 0, 0, 0]
        return tf.stack([dark + 1.0, dark], axis=1)

    images = np.full((3, *SHAPE), 0.5, np.float32)
    attack = HopSkipJump(LINF, num_starts=25)
    found = attack.run(model, images, np.array([0, 0, 1]), seed=0)
    assert found.fooled.tolist() == [False, False, True]
    np.testing.assert_array_equal(found.adversarial, images)
    assert found.forwards == 3 + 2 * 25


def test_a_start_need_not_be_fine_noise():
    """Here only squares of four pixels a side, and larger ones, change the class."""

    def model(images):
        blocks = tf.nn.avg_pool2d(images, 4, 4, "VALID")
        contrast = tf.reduce_max(blocks, (1, 2, 3)) - tf.reduce_min(blocks, (1, 2, 3))
        return tf.stack([0.6 + 0.0 * contrast, contrast], axis=1)

    images = np.full((6, 12, 12, 1), 0.5, np.float32)
    found = HopSkipJump(ThreatModel("linf", 0.45), num_steps=1).run(
        model, images, np.zeros(6, int), seed=0
    )
    assert found.forwards > 6 * 17
    assert found.fooled.any()


@each_threat
def test_network_is_traced_once(threat):
    attack = HopSkipJump(threat, num_steps=2, num_samples=10)
    check_is_traced_once(attack)
    check_is_traced_once(Restarts(dataclasses.replace(attack, num_samples=11), 2))


@pytest.mark.parametrize("name", ["num_steps", "num_samples", "num_starts", "images_per_forward"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        HopSkipJump(LINF, **{name: 0})
