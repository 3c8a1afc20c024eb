"""Minimum norm by bisection, and the curve of its distances."""

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    SHAPE,
    LinearClassifier,
    check_closed_form,
    check_is_traced_once,
    curved,
    curved_examples,
)
from golden import GOLDEN500_BROKEN, trades_network

from logit_reg.attacks import FABTargeted, MinimumNorm, Restarts, accuracy_curve
from logit_reg.evaluation.run import check_threat, distances, evaluate
from logit_reg.threat import ThreatModel
from madry_compat import data

LINF = ThreatModel("linf", 0.05)
L2 = ThreatModel("l2", 0.3)


@pytest.mark.parametrize("box_is_active", [False, True])
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distance_is_within_two_per_cent_of_the_exact_one(norm, num_classes, box_is_active):
    classifier = LinearClassifier(num_classes)
    images, labels = classifier.examples(20, box_is_active=box_is_active)
    margins = classifier.margins(images, labels, norm)
    # Whatever epsilon is: far above some margins here, far below others.
    attack = MinimumNorm(ThreatModel(norm, 0.05))
    found = attack.closest(classifier, images, labels, seed=0)
    reachable = np.isfinite(margins)
    assert reachable.sum() > 15
    ratio = found.distance[reachable] / margins[reachable]
    assert 0.9999 < ratio.min() <= ratio.max() < 1.02
    measured = distances(found.adversarial, images, norm)[reachable]
    np.testing.assert_allclose(found.distance[reachable], measured, rtol=1e-9)
    fools = np.argmax(classifier(found.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, np.isfinite(found.distance))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget(norm):
    check_closed_form(MinimumNorm, LinearClassifier(10), norm, box_is_active=True)


def test_curve_of_a_linear_classifier_is_that_of_its_margins():
    classifier = LinearClassifier(10)
    images, labels = classifier.examples(60, box_is_active=True)
    labels[:6] = (labels[:6] + 1) % 10
    margins = np.maximum(classifier.margins(images, labels, "linf"), 0.0)
    margins[:6] = 0.0
    found = MinimumNorm(LINF).closest(classifier, images, labels, seed=0)
    epsilons = np.linspace(0.0, 1.2 * margins.max(), 30)
    curve = accuracy_curve(found.distance, epsilons)
    assert curve[0] == pytest.approx(0.9)
    assert curve[-1] == 0.0
    assert np.all(np.diff(curve) <= 0)
    # Between the exact curves of margins as they are and 2 % larger.
    assert np.all(curve >= accuracy_curve(0.9999 * margins, epsilons))
    assert np.all(curve <= accuracy_curve(1.02 * margins, epsilons))


def test_curve_counts_what_is_above_epsilon():
    distance = [0.0, 0.1, 0.1, 0.3, np.inf]
    curve = accuracy_curve(distance, [0.0, 0.05, 0.1, 0.2, 0.3, 100.0])
    assert curve.tolist() == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]


@pytest.mark.parametrize("threat", [LINF, L2])
def test_as_an_attack_it_counts_what_is_within_epsilon(threat):
    images, labels = curved_examples(30)
    labels[0] = (labels[0] + 1) % 5
    attack = MinimumNorm(threat, num_steps=10)
    closest = attack.closest(curved, images, labels, seed=0)
    result = attack.run(curved, images, labels, seed=0)
    assert closest.distance[0] == 0.0
    np.testing.assert_array_equal(result.fooled, closest.distance <= threat.epsilon)
    assert 0 < result.fooled[1:].mean() < 1
    assert closest.distance.max() > threat.epsilon
    check_threat("minimum norm", result.adversarial, images, np.arange(30), threat)
    fools = np.argmax(curved(result.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, result.fooled)
    np.testing.assert_array_equal(result.adversarial[~fools], images[~fools])
    evaluation = evaluate(curved, {"closest": attack}, images, labels, batch_size=11)
    np.testing.assert_array_equal(~evaluation.robust, result.fooled)


def test_where_nothing_fools_the_distance_is_infinite():
    def model(images):
        dark = 0.0 * images[:, 0, 0, 0]
        return tf.stack([dark + 1.0, dark], axis=1)

    images = np.full((3, *SHAPE), 0.5, np.float32)
    attack = MinimumNorm(LINF, num_bisections=7, num_steps=5)
    found = attack.closest(model, images, np.array([0, 0, 1]), seed=0)
    assert found.distance.tolist() == [np.inf, np.inf, 0.0]
    np.testing.assert_array_equal(found.adversarial, images)
    assert (found.forwards, found.backwards) == (3 + 2 * 7 * (5 + 1), 2 * 7 * 5)
    assert not attack.run(model, images, np.zeros(3, int), seed=0).fooled.any()


def test_finds_its_way_where_the_image_itself_has_no_gradient():
    def model(images):
        brightness = tf.nn.relu(tf.reduce_mean(images, axis=(1, 2, 3)) - 0.55)
        return tf.stack([0.05 + 0.0 * brightness, brightness], axis=1)

    images = np.full((4, *SHAPE), 0.5, np.float32)
    found = MinimumNorm(L2).closest(model, images, np.zeros(4, int), seed=0)
    # The mean of 36 values has to rise by .1.
    np.testing.assert_allclose(found.distance, 0.6, rtol=0.02)


def test_more_targets_only_come_closer():
    images, labels = curved_examples(20)
    runs = [
        MinimumNorm(L2, num_targets=count, num_steps=5).closest(curved, images, labels, seed=0)
        for count in (1, 2, 4)
    ]
    for fewer, more in zip(runs, runs[1:], strict=False):
        assert np.all(more.distance <= fewer.distance)
        assert more.backwards > fewer.backwards
    assert runs[-1].distance.sum() < runs[0].distance.sum()


@pytest.mark.parametrize("threat", [LINF, L2])
def test_batches_hardly_matter_and_seeds_do(threat):
    images, labels = curved_examples(20)
    attack = MinimumNorm(threat, num_targets=2, num_steps=5)
    whole = attack.closest(curved, images, labels, seed=3)
    again = attack.closest(curved, images, labels, seed=3)
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    order = np.random.default_rng(0).permutation(20)
    for part in (order[:7], order[7:]):
        found = attack.closest(curved, images[part], labels[part], seed=3, indices=part)
        np.testing.assert_allclose(found.distance, whole.distance[part], rtol=0.02)
    for other in ({"seed": 4}, {"seed": 3, "restart": 1}):
        found = attack.closest(curved, images, labels, **other)
        assert not np.array_equal(whole.distance, found.distance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_settings_mean_the_same_on_both_pixel_scales(norm):
    images, labels = curved_examples(20)

    def distance(upper):
        attack = MinimumNorm(ThreatModel(norm, 0.1 * upper, 0.0, upper), num_targets=2)
        found = attack.closest(lambda x: curved(x / upper), images * upper, labels, seed=0)
        return found.distance / upper

    np.testing.assert_allclose(distance(255.0), distance(1.0), rtol=0.02)


def test_directions_may_come_from_another_network():
    images, labels = curved_examples(10)
    attack = MinimumNorm(LINF, num_targets=2, num_steps=5)
    same = attack.closest(curved, images, labels, seed=0)
    other = attack.closest(
        curved, images, labels, seed=0, gradient_logits_fn=lambda x: 2.0 * curved(x)
    )
    np.testing.assert_allclose(other.distance, same.distance, rtol=0.02)
    fools = np.argmax(curved(other.adversarial).numpy(), axis=-1) != labels
    assert fools.all()
    assert other.forwards > same.forwards


def test_network_is_traced_once():
    check_is_traced_once(MinimumNorm(L2, num_targets=2, num_bisections=3, num_steps=3))
    check_is_traced_once(Restarts(MinimumNorm(LINF, 2, 3, 3), 2))


def test_costs_no_more_than_it_says():
    images, labels = curved_examples(10)
    attack = MinimumNorm(ThreatModel("linf", 1e-6), 2, 4, 3)
    found = attack.closest(curved, images, labels, seed=0)
    assert attack.cost() == (2 * 4 * 4 + 1, 2 * 4 * 3)
    assert found.forwards <= 10 * attack.cost()[0]
    assert found.backwards == 10 * attack.cost()[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_targets": 0}, "num_targets must be at least 1; got 0"),
        ({"num_bisections": 0}, "num_bisections must be at least 1; got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"tolerance": 1.0}, "tolerance must be between 0 and 1; got 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MinimumNorm(LINF, **settings)


@pytest.mark.shared
@pytest.mark.slow
def test_on_a_real_network_it_agrees_with_autoattack_and_fab(shared):
    digits = data.load("mnist", "test", shared / "data" / "tfds")
    images, labels = data.to_pixels(digits.images[:20], "mnist"), digits.labels[:20]
    network = trades_network(shared)
    found = MinimumNorm(ThreatModel("linf", 0.3)).closest(network, images, labels, seed=0)
    broken = [index for index in GOLDEN500_BROKEN if index < 20]
    np.testing.assert_array_equal(np.flatnonzero(found.distance <= 0.3), broken)
    attack = FABTargeted(ThreatModel("linf", 1.0), num_targets=2, num_steps=50)
    fab = attack.run(network, images, labels, seed=0)
    assert found.distance.mean() < 1.02 * distances(fab.adversarial, images, "linf").mean()
