"""SPSA."""

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    LinearClassifier,
    check_closed_form,
    check_is_traced_once,
    check_never_asks_for_a_gradient,
    check_stays_within,
    curved,
    curved_examples,
)
from golden import trades_network

from logit_reg.attacks import PGD, SPSA, RandomNoise, margin
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.evaluation.run import check_threat
from logit_reg.threat import ThreatModel
from madry_compat import data
from madry_compat.challenges import CIFAR10, MNIST

LINF = ThreatModel("linf", 0.05)
L2 = ThreatModel("l2", 0.3)


@pytest.mark.parametrize("delta", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("upper", [1.0, 255.0])
def test_the_estimate_is_the_gradient_of_a_linear_loss_in_size_and_sign(upper, delta):
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(4, box_is_active=False)
    exact = (classifier.weights[:, 1 - labels] - classifier.weights[:, labels]).T / upper
    attack = SPSA(ThreatModel("linf", 1.0, 0.0, upper), num_samples=8192, delta=delta)
    estimate = attack.estimate_gradient(
        lambda x: classifier(x / upper), upper * images, labels, seed=0, indices=np.arange(4)
    ).reshape(exact.shape)
    squared, num_pairs = np.square(exact).sum(axis=1), 4096
    # Five standard deviations of a mean over the pairs' random signs.
    error = 5 * np.sqrt(squared / num_pairs)[:, None]
    assert np.all(np.abs(estimate - exact) < error)
    size = (estimate * exact).sum(axis=1) / squared
    np.testing.assert_allclose(size, 1.0, atol=5 * np.sqrt(2 / num_pairs))
    clear = np.abs(exact) > error
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(np.sign(estimate[clear]), np.sign(exact[clear]))


@pytest.mark.parametrize("box_is_active", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget(norm, box_is_active):
    check_closed_form(
        lambda threat: SPSA(threat, num_steps=60),
        LinearClassifier(2),
        norm,
        box_is_active=box_is_active,
    )


def test_directions_are_mirrored_signs_of_each_example_alone():
    seen = []

    def model(images):
        tf.py_function(lambda x: seen.append(x.numpy()), [images], [])
        return tf.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], axis=1)

    images = np.full((3, 20, 20, 1), 0.5, np.float32)
    SPSA(LINF, num_samples=40).estimate_gradient(
        model, images, np.zeros(3, int), seed=0, indices=np.arange(3)
    )
    (points,) = seen
    there, back = ((points - 0.5) / 0.01).reshape(3, 2, 20 * 400).swapaxes(0, 1)
    np.testing.assert_allclose(np.abs(there), 1.0, atol=1e-4)
    np.testing.assert_allclose(there, -back, atol=1e-4)
    correlation = there @ there.T / there.shape[1]
    np.testing.assert_allclose(correlation, np.eye(3), atol=5 / np.sqrt(8000))
    assert np.all(np.abs(there.mean(axis=1)) < 5 / np.sqrt(8000))
    # Nor do the directions of one example repeat.
    pairs = there[0].reshape(20, 400)
    np.testing.assert_allclose(pairs @ pairs.T / 400, np.eye(20), atol=5 / np.sqrt(400))


@pytest.mark.parametrize("threat", [LINF, L2])
def test_how_many_images_are_sent_at_once_does_not_matter(threat):
    images, labels = curved_examples(12)
    results = [
        SPSA(threat, num_steps=4, num_samples=150, images_per_forward=count).run(
            curved, images, labels, seed=0
        )
        for count in (2, 100, 10_000)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.fooled, results[0].fooled)
        np.testing.assert_allclose(result.adversarial, results[0].adversarial, atol=1e-5)
        assert result.forwards == results[0].forwards


def test_memory_is_bounded_by_images_per_forward():
    sizes = []

    def model(images):
        tf.py_function(lambda x: sizes.append(len(x)), [images], [])
        return curved(images)

    images, labels = curved_examples(7)
    attack = SPSA(ThreatModel("linf", 1e-6), 1, 150, images_per_forward=40)
    attack.run(model, images, labels, seed=0)
    assert max(sizes) == 28
    assert sum(sizes) == 7 * (1 + 1 + 151)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_batches_do_not_matter_and_seeds_do(threat):
    images, labels = curved_examples(20)
    attack = SPSA(threat, num_steps=5, num_samples=32)
    whole = attack.run(curved, images, labels, seed=3)
    again = attack.run(curved, images, labels, seed=3)
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    order = np.random.default_rng(0).permutation(20)
    for part in (order[:7], order[7:]):
        found = attack.run(curved, images[part], labels[part], seed=3, indices=part)
        np.testing.assert_array_equal(found.fooled, whole.fooled[part])
        np.testing.assert_allclose(found.adversarial, whole.adversarial[part], atol=1e-5)
    for other in ({"seed": 4}, {"seed": 3, "restart": 1}):
        found = attack.run(curved, images, labels, **other)
        assert not np.array_equal(whole.adversarial, found.adversarial)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_settings_mean_the_same_on_both_pixel_scales(norm):
    images, labels = curved_examples(20)
    epsilon = 0.05 if norm == "linf" else 0.3

    def attack(upper):
        threat = ThreatModel(norm, upper * epsilon, 0.0, upper)
        return SPSA(threat, num_steps=6, num_samples=64).run(
            lambda x: curved(x / upper), upper * images, labels, seed=0
        )

    small, large = attack(1.0), attack(255.0)
    np.testing.assert_array_equal(small.fooled, large.fooled)
    np.testing.assert_allclose(large.adversarial / 255, small.adversarial, atol=1e-3)
    assert 0 < small.fooled.mean() < 1


@pytest.mark.parametrize("threat", [LINF, L2])
def test_more_steps_break_more_and_an_image_is_left_at_its_first_success(threat):
    images, labels = curved_examples(20)
    runs = [
        SPSA(threat, num_steps, 32).run(curved, images, labels, seed=0)
        for num_steps in (1, 2, 3, 4)
    ]
    for fewer, more in zip(runs, runs[1:], strict=False):
        assert np.all(more.fooled[fewer.fooled])
        np.testing.assert_array_equal(
            more.adversarial[fewer.fooled], fewer.adversarial[fewer.fooled]
        )
        # One step more of those that stood, and of nobody else.
        assert more.forwards - fewer.forwards == 33 * np.sum(~fewer.fooled)
    assert runs[0].fooled.sum() < runs[-1].fooled.sum() < 20


def test_counts_forwards_only():
    images, labels = curved_examples(4)
    attack = SPSA(ThreatModel("linf", 1e-6), num_steps=3, num_samples=10)
    result = attack.run(curved, images, labels, seed=0)
    assert (result.forwards, result.backwards) == (4 * (2 + 3 * 11), 0)
    assert attack.cost() == (2 + 3 * 11, 0)
    wrong = (labels + 1) % 5
    misclassified = attack.run(curved, images, wrong, seed=0)
    assert misclassified.fooled.all()
    assert misclassified.forwards == 4
    np.testing.assert_array_equal(misclassified.adversarial, images)


def test_logit_scale_and_shift_do_not_matter():
    images, labels = curved_examples(30)
    attack = SPSA(LINF, num_steps=6, num_samples=64)
    plain = attack.run(curved, images, labels, seed=0)
    for changed in (
        lambda x: 1e-6 * curved(x),
        lambda x: 1e6 * curved(x),
        lambda x: curved(x) + 100.0,
    ):
        result = attack.run(changed, images, labels, seed=0)
        np.testing.assert_array_equal(result.fooled, plain.fooled)
    assert 0 < plain.fooled.mean() < 1


def test_never_asks_for_a_gradient():
    check_never_asks_for_a_gradient(SPSA(LINF, num_steps=6, num_samples=64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_within_ball_and_pixel_range(norm):
    threat = ThreatModel(norm, 8.0 if norm == "linf" else 60.0, 0.0, 255.0)
    check_stays_within(SPSA(threat, num_steps=5, num_samples=64, learning_rate=0.02))


@pytest.mark.parametrize("threat", [LINF, L2])
def test_network_is_traced_once(threat):
    check_is_traced_once(SPSA(threat, num_steps=3, num_samples=10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"num_samples": 7}, "num_samples must be even and at least 2; got 7"),
        ({"delta": 2.55}, "delta must be above 0 and at most 1, a fraction .*; got 2.55"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and at most 1.*; got 0.0"),
        ({"images_per_forward": 1}, "images_per_forward must be at least 2; got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SPSA(LINF, **settings)


def test_the_protocol_of_the_paper():
    for challenge, threat in (
        (MNIST, ThreatModel("linf", 0.3, 0.0, 1.0)),
        (CIFAR10, ThreatModel("linf", 8.0, 0.0, 255.0)),
    ):
        expected = {"spsa20": SPSA(threat, num_steps=20, num_samples=128)}
        assert protocol_attacks("paper-spsa", challenge) == expected


def golden_case(shared, count):
    digits = data.load("mnist", "test", shared / "data" / "tfds")
    images = data.to_pixels(digits.images[:count], "mnist")
    return trades_network(shared), images, digits.labels[:count]


@pytest.mark.shared
@pytest.mark.long
def test_on_a_real_network_the_estimate_follows_the_gradient_and_lowers_the_margin(shared):
    network, images, labels = golden_case(shared, 20)
    threat = ThreatModel("linf", 0.3)
    attack = SPSA(threat, num_steps=10, num_samples=128)
    estimate = attack.estimate_gradient(network, images, labels, seed=0, indices=np.arange(20))
    _, exact = logits_and_gradient(
        network, tf.constant(images), lambda logits: -margin(logits, labels)
    )
    estimate, exact = estimate.reshape(20, -1), exact.numpy().reshape(20, -1)
    along = (estimate * exact).sum(axis=1)
    size = along / np.square(exact).sum(axis=1)
    assert np.median(size) == pytest.approx(1.0, abs=0.15)
    # What 64 random directions catch of a gradient in 784 dimensions.
    cosine = along / np.linalg.norm(estimate, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.mean(cosine) == pytest.approx(np.sqrt(64 / (64 + 783)), abs=0.03)

    def mean_margin(points):
        return float(np.mean(margin(network(points), labels)))

    guided = attack.run(network, images, labels, seed=0)
    check_threat("spsa", guided.adversarial, images, np.arange(20), threat)
    unguided = RandomNoise(threat, num_draws=10).run(network, images, labels, seed=0)
    assert mean_margin(guided.adversarial) < mean_margin(unguided.adversarial) - 0.05
    assert mean_margin(unguided.adversarial) < mean_margin(images)


@pytest.mark.shared
@pytest.mark.long
def test_on_a_real_network_it_comes_near_pgd(shared):
    network, images, labels = golden_case(shared, 100)
    threat = ThreatModel("linf", 0.3)
    spsa = SPSA(threat, num_steps=100, num_samples=512).run(network, images, labels, seed=0)
    pgd = PGD(threat, "cw", 40, 0.01).run(network, images, labels, seed=0)
    assert abs(np.mean(spsa.fooled) - np.mean(pgd.fooled)) <= 0.03
