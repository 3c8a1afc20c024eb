"""The attacks that look for the closest image, FMN, DDN and MinimumNorm, and their curve."""

import dataclasses

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

from logit_reg.attacks import DDN, FMN, FABTargeted, MinimumNorm, Restarts, accuracy_curve
from logit_reg.attacks.engine.closest import NUM_CONFIRMATIONS
from logit_reg.attacks.engine.losses import is_fooled, margin
from logit_reg.evaluation.run import check_threat, distances, evaluate
from logit_reg.threat import ThreatModel
from madry_compat import data

LINF = ThreatModel("linf", 0.05)
L2 = ThreatModel("l2", 0.3)
CASES = [FMN(LINF), FMN(L2), DDN(L2), MinimumNorm(LINF), MinimumNorm(L2)]
each_attack = pytest.mark.parametrize(
    "attack", CASES, ids=lambda attack: f"{type(attack).__name__}-{attack.threat.norm}"
)


def short(attack, num_steps=12, **changes):
    return dataclasses.replace(attack, **{"num_targets": 2, "num_steps": num_steps} | changes)


@pytest.mark.parametrize("num_classes", [2, 10])
@each_attack
def test_distance_is_within_five_per_cent_of_the_exact_one(attack, num_classes):
    classifier = LinearClassifier(num_classes)
    for box_is_active in (False, True):
        images, labels = classifier.examples(20, box_is_active=box_is_active)
        margins = classifier.margins(images, labels, attack.threat.norm)
        # Whatever epsilon is: far above some margins here, far below others.
        found = attack.closest(classifier, images, labels, seed=0)
        reachable = np.isfinite(margins)
        assert reachable.sum() > 15
        ratio = found.distance[reachable] / margins[reachable]
        assert 0.999 < ratio.min() <= ratio.max() < 1.05
        measured = distances(found.adversarial, images, attack.threat.norm)[reachable]
        np.testing.assert_allclose(found.distance[reachable], measured, rtol=1e-9)
        # Images that lie within a rounding of the boundary have nowhere else to go.
        fools = margin(classifier(found.adversarial), labels).numpy() < 1e-6
        np.testing.assert_array_equal(fools, np.isfinite(found.distance))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget(norm):
    check_closed_form(FMN, LinearClassifier(10), norm, box_is_active=True)


def test_curve_of_a_linear_classifier_is_that_of_its_margins():
    classifier = LinearClassifier(10)
    images, labels = classifier.examples(60, box_is_active=True)
    labels[:6] = (labels[:6] + 1) % 10
    margins = np.maximum(classifier.margins(images, labels, "linf"), 0.0)
    margins[:6] = 0.0
    found = FMN(LINF).closest(classifier, images, labels, seed=0)
    epsilons = np.linspace(0.0, 1.2 * margins.max(), 30)
    curve = accuracy_curve(found.distance, epsilons)
    assert curve[0] == pytest.approx(0.9)
    assert curve[-1] == 0.0
    assert np.all(np.diff(curve) <= 0)
    # Between the exact curves of margins as they are and 2 % larger.
    assert np.all(curve >= accuracy_curve(0.999 * margins, epsilons))
    assert np.all(curve <= accuracy_curve(1.02 * margins, epsilons))


def test_curve_counts_what_is_above_epsilon():
    distance = [0.0, 0.1, 0.1, 0.3, np.inf]
    curve = accuracy_curve(distance, [0.0, 0.05, 0.1, 0.2, 0.3, 100.0])
    assert curve.tolist() == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]


@each_attack
def test_as_an_attack_it_counts_what_is_within_epsilon(attack):
    images, labels = curved_examples(30)
    labels[0] = (labels[0] + 1) % 5
    attack, threat = short(attack, num_targets=4), attack.threat
    closest = attack.closest(curved, images, labels, seed=0)
    result = attack.run(curved, images, labels, seed=0)
    assert closest.distance[0] == 0.0
    np.testing.assert_array_equal(result.fooled, closest.distance <= threat.epsilon)
    assert 0 < result.fooled[1:].mean() < 1
    assert threat.epsilon < closest.distance.max() < np.inf
    check_threat("minimum norm", result.adversarial, images, np.arange(30), threat)
    fools = is_fooled(curved(result.adversarial), labels).numpy()
    np.testing.assert_array_equal(fools, result.fooled)
    np.testing.assert_array_equal(result.adversarial[~fools], images[~fools])
    evaluation = evaluate(curved, {"closest": attack}, images, labels, batch_size=11)
    np.testing.assert_array_equal(~evaluation.robust, result.fooled)


@each_attack
def test_where_nothing_fools_the_distance_is_infinite(attack):
    def model(images):
        dark = 0.0 * images[:, 0, 0, 0]
        return tf.stack([dark + 1.0, dark], axis=1)

    images = np.full((3, *SHAPE), 0.5, np.float32)
    attack = short(attack)
    found = attack.closest(model, images, np.array([0, 0, 1]), seed=0)
    assert found.distance.tolist() == [np.inf, np.inf, 0.0]
    np.testing.assert_array_equal(found.adversarial, images)
    # There is one wrong class.
    forwards, backwards = attack.cost(num_classes=2)
    # Nothing is there to confirm.
    forwards -= NUM_CONFIRMATIONS
    assert (found.forwards, found.backwards) == (2 * forwards + 1, 2 * backwards)
    assert not attack.run(model, images, np.zeros(3, int), seed=0).fooled.any()


@each_attack
def test_finds_its_way_where_the_image_itself_has_no_gradient(attack):
    def model(images):
        brightness = tf.nn.relu(tf.reduce_mean(images, axis=(1, 2, 3)) - 0.52)
        return tf.stack([0.05 + 0.0 * brightness, brightness], axis=1)

    images = np.full((4, *SHAPE), 0.5, np.float32)
    found = short(attack, 110).closest(model, images, np.zeros(4, int), seed=0)
    # The mean of 36 values has to rise by 0.07.
    exact = {"linf": 0.07, "l2": 0.42}[attack.threat.norm]
    np.testing.assert_allclose(found.distance, exact, rtol=0.02)


@each_attack
def test_more_targets_only_come_closer(attack):
    images, labels = curved_examples(20)
    few, many = short(attack, num_targets=1), short(attack, num_targets=4)
    one, all_four = (each.closest(curved, images, labels, seed=0) for each in (few, many))
    assert np.all(all_four.distance <= 1.02 * one.distance)
    # Where there is nothing to leave out, nobody looks which target is nearest.
    passes = [20 * each.cost(num_classes=5)[1] for each in (few, many)]
    assert [one.backwards, all_four.backwards] == passes
    assert passes[1] == 4 * (passes[0] - 20 * 4)


@each_attack
def test_further_targets_find_what_the_nearest_linearised_boundary_hides(attack):
    def model(images):
        """Class 1 seems nearer than class 2 and is never reached."""
        upper, lower = (
            tf.reduce_mean(part, axis=(1, 2, 3)) for part in tf.split(images, 2, axis=1)
        )
        steep = 0.5 * tf.tanh(10 * (upper - 0.5)) - 1.0
        return tf.stack([0.0 * steep, steep, 4.0 * (lower - 0.5) - 1.0], axis=1)

    images = np.full((3, *SHAPE), 0.5, np.float32)
    few, many = short(attack, 40, num_targets=1), short(attack, 40, num_targets=2)
    one, both = (each.closest(model, images, np.zeros(3, int), seed=0) for each in (few, many))
    # The mean of 18 values has to rise by 0.25.
    exact = {"linf": 0.25, "l2": 0.25 * 18**0.5}[attack.threat.norm]
    np.testing.assert_allclose(both.distance, exact, rtol=0.02)
    assert both.distance.sum() < one.distance.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_searches_from_several_sides_beat_any_one(norm):
    images, labels = curved_examples(40)
    threat = ThreatModel(norm, 10.0)
    fab = FABTargeted(threat, num_targets=4, num_steps=40).run(curved, images, labels, seed=0)
    reference = distances(fab.adversarial, images, norm)
    kinds = (FMN, MinimumNorm) if norm == "linf" else (FMN, DDN, MinimumNorm)
    found = [kind(threat, num_targets=4).closest(curved, images, labels, seed=0) for kind in kinds]
    ratio = np.min([each.distance for each in found], axis=0) / reference
    assert np.median(ratio) <= 1.0
    assert np.mean(ratio < 1.05) >= 0.95


@each_attack
def test_batches_hardly_matter_and_seeds_do(attack):
    images, labels = curved_examples(20)
    attack = short(attack)
    whole = attack.closest(curved, images, labels, seed=3)
    again = attack.closest(curved, images, labels, seed=3)
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    order = np.random.default_rng(0).permutation(20)
    for part in (order[:7], order[7:]):
        found = attack.closest(curved, images[part], labels[part], seed=3, indices=part)
        np.testing.assert_allclose(found.distance, whole.distance[part], rtol=0.02)
    found = attack.closest(curved, images, labels, seed=3, restart=1)
    assert not np.array_equal(whole.distance, found.distance)


@each_attack
def test_the_same_settings_mean_the_same_on_both_pixel_scales(attack):
    images, labels = curved_examples(20)

    def distance(upper):
        threat = ThreatModel(attack.threat.norm, 0.1 * upper, 0.0, upper)
        found = short(attack, threat=threat).closest(
            lambda x: curved(x / upper), images * upper, labels, seed=0
        )
        return found.distance / upper

    np.testing.assert_allclose(np.median(distance(255.0)), np.median(distance(1.0)), rtol=0.02)


@each_attack
def test_directions_may_come_from_another_network(attack):
    images, labels = curved_examples(10)
    attack = short(attack)
    same = attack.closest(curved, images, labels, seed=0)
    other = attack.closest(
        curved, images, labels, seed=0, gradient_logits_fn=lambda x: curved(x) + 1.0
    )
    np.testing.assert_allclose(other.distance, same.distance, rtol=0.02)
    fools = is_fooled(curved(other.adversarial), labels).numpy()
    np.testing.assert_array_equal(fools, np.isfinite(other.distance))
    assert other.backwards == same.backwards and other.forwards > same.forwards


@each_attack
def test_network_is_traced_once(attack):
    check_is_traced_once(short(attack, 3))
    check_is_traced_once(Restarts(short(attack, 3), 2))


@each_attack
def test_budget_is_two_thousand_passes(attack):
    images, labels = curved_examples(5)
    assert 1900 < sum(attack.cost()) <= 2000
    attack = short(attack, 4)
    found = attack.closest(curved, images, labels, seed=0)
    forwards, backwards = attack.cost(num_classes=5)
    assert 5 * (forwards - NUM_CONFIRMATIONS) <= found.forwards <= 5 * forwards
    assert found.backwards == 5 * backwards


def test_one_search_for_the_nearest_class_is_the_published_attack():
    images, labels = LinearClassifier(2).examples(10, box_is_active=False)
    for kind in (FMN, DDN):
        found = kind(L2, num_targets=None).closest(LinearClassifier(2), images, labels, seed=0)
        same = kind(L2, num_targets=1).closest(LinearClassifier(2), images, labels, seed=0)
        # Two classes are one target.
        np.testing.assert_allclose(found.distance, same.distance, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (FMN, {"num_targets": 0}, "num_targets must be at least 1, or None; got 0"),
        (FMN, {"num_steps": 0}, "num_steps must be at least 1; got 0"),
        (FMN, {"step_size": 0.0}, "step_size must be above 0; got 0.0"),
        (FMN, {"gamma": 1.0}, "gamma must be between 0 and 1; got 1.0"),
        (DDN, {"initial_norm": 0.0}, "initial_norm must be above 0; got 0.0"),
        (DDN, {"threat": LINF}, "DDN is defined in l2; got norm 'linf'"),
        (MinimumNorm, {"num_targets": 0}, "num_targets must be at least 1; got 0"),
        (MinimumNorm, {"num_steps": 0}, "num_steps must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**{"threat": L2} | settings)


@pytest.mark.shared
@pytest.mark.slow
def test_on_a_real_network_they_agree_with_autoattack_and_fab(shared):
    digits = data.load("mnist", "test", shared / "data" / "tfds")
    images, labels = data.to_pixels(digits.images[:20], "mnist"), digits.labels[:20]
    network = trades_network(shared)
    broken = [index for index in GOLDEN500_BROKEN if index < 20]
    attack = FABTargeted(ThreatModel("linf", 1.0), num_targets=2, num_steps=50)
    fab = attack.run(network, images, labels, seed=0)
    reference = distances(fab.adversarial, images, "linf").mean()
    for kind in (FMN, MinimumNorm):
        attack = kind(ThreatModel("linf", 0.3), num_targets=2)
        found = attack.closest(network, images, labels, seed=0)
        np.testing.assert_array_equal(np.flatnonzero(found.distance <= 0.3), broken)
        assert found.distance.mean() < 1.02 * reference
