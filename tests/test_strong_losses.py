"""The margin in probabilities (PMA, GAMA) and targets in the order of their distance (MALT)."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    SHAPE,
    LinearClassifier,
    brightness,
    check_closed_form,
    check_counts_passes,
    check_is_traced_once,
    check_seeds_and_batches,
    check_stays_within,
    curved,
    curved_examples,
    grey_images,
    ripple,
)

from logit_reg.attacks import GAMA, MD, PGD, APGDTargeted, Restarts
from logit_reg.attacks.engine.active_set import ActiveExamples
from logit_reg.attacks.engine.examples import Examples
from logit_reg.attacks.engine.losses import probability_margin_terms
from logit_reg.attacks.engine.target_distances import class_distances
from logit_reg.threat import ThreatModel

LINF = ThreatModel("linf", 0.05)
SHORT = {
    "pma-label": MD(LINF, "label", num_steps=7, space="probabilities"),
    "pma-other": MD(LINF, "other", num_steps=7, space="probabilities"),
    "gama": GAMA(LINF, num_steps=7),
    "nearest-first": APGDTargeted(LINF, num_targets=2, num_steps=5, target_order="distance"),
}
each_attack = pytest.mark.parametrize("attack", SHORT.values(), ids=SHORT.keys())


@pytest.mark.parametrize(
    ("make", "num_classes"),
    [
        (lambda threat: Restarts(MD(threat, "other", space="probabilities"), 5), 3),
        (lambda threat: Restarts(GAMA(threat), 5), 3),
        (lambda threat: APGDTargeted(threat, target_order="distance"), 5),
    ],
    ids=["pma", "gama", "nearest-first"],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget_and_nothing_beyond(norm, make, num_classes):
    check_closed_form(make, LinearClassifier(num_classes), norm, box_is_active=True)


@each_attack
def test_network_is_traced_once(attack):
    check_is_traced_once(attack)


@each_attack
def test_stays_within_ball_and_pixel_range(attack):
    check_stays_within(dataclasses.replace(attack, threat=ThreatModel("linf", 12.0, 0.0, 255.0)))


@each_attack
def test_a_seed_gives_one_result_and_batches_do_not_matter(attack):
    check_seeds_and_batches(attack, 60, most_different=1)


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (MD(LINF, num_steps=11, space="probabilities"), (12, 11)),
        (GAMA(LINF, num_steps=11), (12, 11)),
        # A look at each of the four wrong classes, then two runs of Auto-PGD.
        (APGDTargeted(LINF, 2, 11, target_order="distance"), (4 + 2 * 12, 4 + 2 * 12)),
    ],
    ids=["pma", "gama", "nearest-first"],
)
def test_counts_passes_of_images_that_still_stand(attack, passes):
    check_counts_passes(attack, *passes)
    forwards, backwards = passes
    num_classes = {"num_classes": 5} if isinstance(attack, APGDTargeted) else {}
    assert attack.cost(**num_classes) == (1 + forwards, backwards)


def _gradient(loss, logits):
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss(logits)
    return tape.gradient(value, logits).numpy()


def _terms_difference(logits):
    true, other = probability_margin_terms(logits, np.zeros(len(logits), int))
    return other - true


def test_margin_in_probabilities_is_that_of_the_softmax():
    logits = np.random.default_rng(0).normal(0, 3, (200, 10))

    def of_softmax(logits):
        probabilities = tf.nn.softmax(logits)
        other = tf.reduce_max(probabilities[:, 1:], axis=-1)
        return (other - probabilities[:, 0]) / tf.stop_gradient(other)

    found, expected = _gradient(_terms_difference, logits), _gradient(of_softmax, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 20.0, 200.0, 3e4])
def test_margin_in_probabilities_has_a_gradient_however_sure_the_network_is(gap):
    gradient = _gradient(_terms_difference, np.array([[gap, 0.0, -1.0]], np.float32))
    # Of p_other - p_true over p_other, where p_true is 1: 2 (e_other - e_true) and the last one.
    if gap > 0:
        third = np.exp(-1)
        np.testing.assert_allclose(gradient, [[-2 - third, 2.0, third]], rtol=1e-5)
    assert np.isfinite(gradient).all() and gradient[0, 0] < 0


@pytest.mark.parametrize("make", [GAMA, lambda threat: MD(threat, space="probabilities")])
def test_finds_the_boundary_of_a_network_that_is_sure(make):
    classifier = LinearClassifier(3)
    check_closed_form(make, _Scaled(classifier, 1e4), "linf", box_is_active=False, share=0.8)


class _Scaled:
    def __init__(self, classifier, factor):
        self.examples, self.margins = classifier.examples, classifier.margins
        self._classifier, self._factor = classifier, factor

    def __call__(self, images):
        return self._factor * self._classifier(images)


_WIDE = ThreatModel("linf", 0.2)


def test_relaxation_leads_off_a_plateau_of_the_margin():
    def plateau(images):
        """Class 1 rises only where an image is brighter than noise makes it, and a little along
        ripples that lead nowhere; the way up shows in the probabilities of two classes that never
        win, and not in their sum.
        """
        rises = 40.0 * tf.nn.relu(brightness(images) - 0.12) + 0.1 * tf.tanh(ripple(images))
        share = tf.sigmoid(20.0 * brightness(images))
        rest = [tf.math.log(0.5 * share), tf.math.log(0.5 * (1.0 - share))]
        return tf.stack([tf.fill(tf.shape(rises), 1.5), rises, *rest], axis=-1)

    images, labels = grey_images()
    margin = Restarts(GAMA(_WIDE, weight=0.0), 5)
    assert not margin.run(plateau, images, labels, seed=0).fooled.any()
    # Each start lies on one side or the other, and the relaxation leads further away.
    fooled = Restarts(GAMA(_WIDE), 5).run(plateau, images, labels, seed=0).fooled
    assert fooled.mean() > 0.7


def test_steps_and_weights_are_as_published():
    attack = GAMA(ThreatModel("linf", 8.0, 0.0, 255.0))
    lengths = [float(attack.step_length(step)) for step in range(100)]
    np.testing.assert_allclose(lengths, [16.0] * 60 + [1.6] * 25 + [0.16] * 15, rtol=1e-6)
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    clean = np.array([[0.2, 0.5, 0.3]])
    softmax = np.exp(logits[0]) / np.exp(logits[0]).sum()

    def expected(logits, weight):
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float64))
        relaxation = weight * tf.reduce_sum((probabilities - clean) ** 2, axis=-1)
        return probabilities[:, 1] - probabilities[:, 0] + relaxation

    for step, weight in ((0, 50.0), (5, 40.0), (24, 2.0), (25, 0.0), (99, 0.0)):
        found = _gradient(lambda x, step=step: attack.step_loss(step, x, [0], clean), logits)
        wanted = _gradient(lambda x, weight=weight: expected(x, weight), logits)
        unit = softmax[1] + weight * np.linalg.norm(softmax - clean)
        np.testing.assert_allclose(found, wanted / unit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_as_far_as_epsilon_allows(norm):
    images = np.full((5, *SHAPE), 0.5, np.float32)
    threat = ThreatModel(norm, 0.1)

    def logits(points):
        bright = brightness(points)
        return tf.stack([bright * 0 + 1.0, bright, bright - 1], axis=-1)

    result = GAMA(threat, num_steps=1, step_size=1e-6).run(logits, images, np.zeros(5, int), seed=0)
    np.testing.assert_allclose(threat.distance(result.adversarial, images), 0.1, rtol=1e-3)
    assert len({point.tobytes() for point in result.adversarial}) == 5


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distances_of_classes_are_exact_where_the_network_is_linear(norm):
    classifier = LinearClassifier(6)
    images, labels = classifier.examples(12, box_is_active=False)
    labels[:3] = (labels[:3] + 1) % 6
    active = ActiveExamples(classifier, Examples(images, labels, np.arange(12), seed=0))
    found = class_distances(active, ThreatModel(norm, 0.1))
    assert np.isinf(found[:3]).all()
    rows = np.arange(3, 12)
    assert np.isinf(found[rows, labels[rows]]).all()
    # No pixel reaches the edge of the range on its way, in linf and l2.
    nearest = classifier.margins(images[rows], labels[rows], norm)
    closest = found[rows].min(axis=1)
    if norm == "l1":
        assert (closest <= nearest * (1 + 1e-4)).all()
        normals = classifier.weights[:, labels[rows]].T[:, None] - classifier.weights.T
        logits = classifier(images[rows]).numpy()
        gaps = logits[np.arange(9), labels[rows]][:, None] - logits
        wrong = np.isfinite(found[rows])
        expected = gaps[wrong] / np.abs(normals).max(axis=-1)[wrong]
        np.testing.assert_allclose(found[rows][wrong], expected, rtol=1e-3)
    else:
        np.testing.assert_allclose(closest, nearest, rtol=1e-3)


def test_the_nearest_class_comes_first_though_its_logit_is_small():
    def decoy(images):
        """Class 1 is just below class 0 wherever one goes; class 2 is far below, and in reach."""
        almost = -0.1 + 0.01 * tf.tanh(ripple(images))
        never = tf.fill(tf.shape(almost), -50.0)
        steep = -1.0 + 10.0 * brightness(images)
        return tf.stack([tf.zeros_like(almost), almost, steep, never], axis=-1)

    images, labels = grey_images()
    one = APGDTargeted(_WIDE, num_targets=1, num_steps=20)
    assert not one.run(decoy, images, labels, seed=0).fooled.any()
    nearest = dataclasses.replace(one, target_order="distance")
    assert nearest.run(decoy, images, labels, seed=0).fooled.all()


def test_nothing_beyond_reach_is_worth_a_pass():
    images, labels = curved_examples(4)
    attack = SHORT["nearest-first"]
    result = attack.run(curved, images, (labels + 1) % 5, seed=0)
    assert result.fooled.all() and (result.forwards, result.backwards) == (4, 0)


def test_plain_pgd_is_what_a_sure_network_misleads():
    """Else the tests above would show nothing."""
    classifier = _Scaled(LinearClassifier(3), 1e4)
    images, labels = classifier.examples(30, box_is_active=False)
    far = classifier.margins(images, labels, "linf") > 0.005
    threat = ThreatModel("linf", 0.3)
    result = PGD(threat, "xent", 20, 0.05, random_start=False).run(
        classifier, images[far], labels[far], seed=0
    )
    assert not result.fooled.any()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (MD, {"space": "odds"}, "space must be one of logits, probabilities; got 'odds'"),
        (GAMA, {"num_steps": 0}, "num_steps must be at least 1; got 0"),
        (GAMA, {"weight": -1.0}, "weight must be at least 0; got -1"),
        (GAMA, {"weight": float("nan")}, "weight must be at least 0; got nan"),
        (APGDTargeted, {"target_order": "near"}, "target_order must be one of logits, distance"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(LINF, **settings)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distances_of_classes_within_the_pixel_range_are_exact_there(norm):
    classifier = LinearClassifier(6)
    images, labels = classifier.examples(12, box_is_active=True)
    # From a black image nothing gets darker: a class that only that would help is out of reach.
    images[0] = 0.0
    labels[0] = int(np.argmax(classifier(images[:1]).numpy()))
    active = ActiveExamples(classifier, Examples(images, labels, np.arange(12), seed=0))
    rows = active.rows
    assert 0 in rows
    found = class_distances(active, ThreatModel(norm, 0.1), in_range=True)[rows]
    nearest = classifier.margins(images[rows], labels[rows], norm)
    np.testing.assert_allclose(found.min(axis=1), nearest, rtol=1e-3)
    without = class_distances(active, ThreatModel(norm, 0.1))[rows]
    assert np.all(found >= (1 - 1e-4) * without)
    reaches = np.isfinite(found).any(axis=1)
    assert (found[reaches].min(axis=1) > 1.001 * without[reaches].min(axis=1)).any()


def test_a_class_that_the_pixel_range_keeps_out_is_infinitely_far():
    def logits(images):
        dark = -tf.reduce_sum(images, axis=(1, 2, 3))
        return tf.stack([0.0 * dark + 0.1, dark, 0.01 * (0.0 - dark)], axis=1)

    images = np.zeros((1, *SHAPE), np.float32)
    active = ActiveExamples(logits, Examples(images, np.array([0]), np.arange(1), seed=0))
    found = class_distances(active, ThreatModel("l2", 0.1), in_range=True)[0]
    assert np.isinf(found[:2]).all()
    # 36 pixels rise alike until their sum is 10.
    assert found[2] == pytest.approx(10 / 6, rel=1e-3)
