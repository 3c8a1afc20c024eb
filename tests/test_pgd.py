"""PGD, FGSM and restarts against linear classifiers and their own contracts."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from linear import SHAPE, Linear

from logit_reg.attacks import FGSM, PGD, Restarts
from logit_reg.attacks.engine.losses import attack_loss, is_fooled, margin
from logit_reg.attacks.engine.random_numbers import example_noise
from logit_reg.evaluation.run import check_threat
from logit_reg.threat import ThreatModel

# A smooth, curved classifier, so that steps and restarts matter.
_RNG = np.random.default_rng(3)
_HIDDEN = _RNG.normal(size=(16, 12)).astype(np.float32)
_OUT = _RNG.normal(size=(12, 4)).astype(np.float32)


def curved(images):
    return tf.sin(3.0 * tf.reshape(images, (-1, 16)) @ _HIDDEN) @ _OUT


def curved_images(count=60):
    images = np.random.default_rng(4).random((count, *SHAPE)).astype(np.float32)
    return images, np.argmax(curved(images).numpy(), -1)


# With more classes than two, cross-entropy does not head for the nearest boundary.
@pytest.mark.parametrize(("loss", "num_classes"), [("xent", 2), ("cw", 2), ("cw", 10)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_succeeds_just_beyond_the_exact_margin_and_never_below(norm, loss, num_classes):
    model = Linear(num_classes)
    images, labels = model.images(1)
    distance = float(model.distance(images, labels, norm)[0])
    for factor, succeeds in ((1.05, True), (0.95, False)):
        threat = ThreatModel(norm, factor * distance, -5.0, 5.0)
        attack = PGD(threat, loss, num_steps=60, step_size=threat.epsilon / 8)
        assert attack.run(model, images, labels, seed=0).fooled[0] == succeeds


def test_fgsm_is_one_signed_step_from_the_image():
    model = Linear(2)
    images, labels = model.images(3)
    threat = ThreatModel("linf", 0.1, 0.0, 1.0)
    other = 1 - labels
    direction = np.sign(model.weights[:, other] - model.weights[:, labels]).T
    expected = np.clip(images + 0.1 * direction.reshape(images.shape), 0, 1)
    result = FGSM(threat).run(model, images, labels, seed=0)
    correct_clean = ~is_fooled(model(images), labels).numpy()
    np.testing.assert_allclose(result.adversarial[correct_clean], expected, atol=1e-6)


def test_xent_and_cw_losses_are_the_published_formulas():
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    labels = np.array([0])
    assert float(margin(logits, labels)[0]) == pytest.approx(1.5)
    assert float(attack_loss("cw", logits, labels, 50.0)[0]) == pytest.approx(-51.5)
    # Eq. 4 has no constant: its gradient stops where the example is misclassified.
    assert float(attack_loss("cw", -logits, labels, 0.0)[0]) == 0.0
    expected = -np.log(np.exp(2) / (np.exp(2) + np.exp(-1) + np.exp(0.5)))
    assert float(attack_loss("xent", logits, labels)[0]) == pytest.approx(expected, rel=1e-6)


def test_margins_do_not_mistake_a_masked_logit_for_the_largest():
    """All logits negative, or far beyond the 1e4 that the challenges subtract."""
    assert float(margin(np.array([[-5.0, -7.0]], np.float32), [0])[0]) == 2.0
    assert float(margin(np.array([[3e5, 1e5]], np.float32), [0])[0]) == pytest.approx(2e5)


@pytest.mark.parametrize("logits", [[1.0, 1.0], [np.nan, 0.0], [0.0, np.nan]])
def test_ties_and_nans_count_as_fooled(logits):
    assert bool(is_fooled(np.array([logits], np.float32), np.array([0]))[0])


@pytest.mark.parametrize("early_stop", [False, True])
def test_the_broken_set_grows_with_steps(early_stop):
    images, labels = curved_images()
    attack = PGD(ThreatModel("linf", 0.04), "cw", 1, 0.01, early_stop=early_stop)
    before = np.zeros(len(images), bool)
    for num_steps in (1, 3, 9, 10, 11, 25):
        attack = dataclasses.replace(attack, num_steps=num_steps)
        fooled = attack.run(curved, images, labels, seed=5).fooled
        assert not (before & ~fooled).any()
        before = fooled
    assert 0 < before.sum() < len(images)


def test_the_broken_set_grows_with_restarts_and_starts_differ():
    images, labels = curved_images()
    single = PGD(ThreatModel("linf", 0.03), "cw", 3, 0.01)
    found = [Restarts(single, n).run(curved, images, labels, seed=5).fooled for n in (1, 2, 6)]
    assert not (found[0] & ~found[1]).any() and not (found[1] & ~found[2]).any()
    assert found[2].sum() > found[0].sum()
    np.testing.assert_array_equal(found[0], single.run(curved, images, labels, seed=5).fooled)


def test_early_stop_breaks_the_same_examples_with_less_work():
    images, labels = curved_images()
    full = PGD(ThreatModel("linf", 0.04), "cw", 30, 0.01)
    stopping = dataclasses.replace(full, early_stop=True)
    everything = full.run(curved, images, labels, seed=5)
    less = stopping.run(curved, images, labels, seed=5)
    np.testing.assert_array_equal(everything.fooled, less.fooled)
    assert less.backwards < everything.backwards == 30 * len(images)
    assert everything.forwards == 31 * len(images)


def test_the_last_iterate_may_be_right_again():
    """Success at any iterate is what counts; the challenges only look at the last one."""
    images, labels = curved_images()
    # Steps as long as the budget make the iterate jump to and fro.
    result = PGD(ThreatModel("linf", 0.2), "xent", 7, 0.2).run(curved, images, labels, seed=1)
    assert (result.fooled & ~result.last_iterate_fooled).any()
    assert not (result.last_iterate_fooled & ~result.fooled).any()


def test_the_returned_image_is_the_one_that_fools():
    images, labels = curved_images()
    result = PGD(ThreatModel("linf", 0.2), "xent", 7, 0.2).run(curved, images, labels, seed=1)
    wrong = is_fooled(curved(result.adversarial), labels).numpy()
    np.testing.assert_array_equal(wrong, result.fooled)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_nothing_leaves_ball_or_range(norm, scale):
    images = (scale * np.random.default_rng(0).random((50, *SHAPE))).astype(np.float32)
    labels = np.argmax(curved(images / scale).numpy(), -1)
    threat = ThreatModel(norm, 0.2 * scale, 0.0, scale)
    result = PGD(threat, "xent", 10, 0.05 * scale).run(
        lambda x: curved(x / scale), images, labels, seed=0
    )
    check_threat("pgd", result.adversarial, images, np.arange(50), threat)


@pytest.mark.graph_optimiser
def test_same_seed_same_result_and_another_seed_another_start():
    images, labels = curved_images()
    attack = PGD(ThreatModel("l2", 0.5), "xent", 5, 0.1)
    first, again, other = (attack.run(curved, images, labels, seed=s) for s in (7, 7, 8))
    np.testing.assert_array_equal(first.adversarial, again.adversarial)
    assert not np.array_equal(first.adversarial, other.adversarial)


def test_an_example_is_attacked_alike_in_any_batch():
    """Random numbers belong to the example's index in the data set."""
    images, labels = curved_images()
    attack = PGD(ThreatModel("linf", 0.12), "xent", 5, 0.05)
    whole = attack.run(curved, images, labels, seed=7)
    some = np.array([40, 3, 17])
    part = attack.run(curved, images[some], labels[some], seed=7, indices=some)
    np.testing.assert_allclose(part.adversarial, whole.adversarial[some], atol=1e-6)


def test_random_numbers_have_their_distributions():
    draw = {"stream": 11, "indices": np.arange(500), "restart": 0}
    uniform = example_noise("uniform", (40,), **draw).numpy()
    normal = example_noise("normal", (40,), **draw).numpy()
    assert abs(uniform.mean()) < 0.02 and abs(uniform.std() - 1 / np.sqrt(3)) < 0.01
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02
    assert uniform.min() < -0.99 and uniform.max() > 0.99
    correlation = np.corrcoef(uniform[:250].ravel(), uniform[250:].ravel())[0, 1]
    assert abs(correlation) < 0.04


def test_one_trace_for_all_batches():
    model = Linear(3)
    images, labels = model.images(20)
    attack = PGD(ThreatModel("linf", 0.1), num_steps=3, step_size=0.05)
    model.calls = 0
    attack.run(model, images, labels, seed=0)
    calls_of_first_batch = model.calls
    attack.run(model, images[:7], labels[:7], seed=1)
    assert model.calls == calls_of_first_batch


def test_gradients_of_another_network_give_directions_but_not_success():
    """A gradient source that always points the wrong way must not be counted as success."""
    model = Linear(2)
    images, labels = model.images(10)
    epsilon = 1.2 * float(model.distance(images, labels, "linf").max())
    threat = ThreatModel("linf", epsilon, -5.0, 5.0)
    attack = PGD(threat, "xent", 10, epsilon / 4, random_start=False)
    astray = attack.run(model, images, labels, seed=0, gradient_logits_fn=lambda x: -model(x))
    guided = attack.run(model, images, labels, seed=0)
    assert guided.fooled.all() and astray.fooled.sum() == 0
    assert astray.forwards == 21 * len(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ce"}, "loss must be one of xent, cw; got 'ce'"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"step_size": 0.0}, "step_size must be above 0"),
        ({"confidence": -1.0}, "confidence must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(ThreatModel(), **settings)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 16), np.float32), np.zeros(2, int), r"images must be float \(N, H, W, C\)"),
        (np.zeros((2, *SHAPE), np.uint8), np.zeros(2, int), "images must be float"),
        (np.zeros((2, *SHAPE), np.float32), np.zeros(3, int), r"labels must be \(2,\) integers"),
        (np.zeros((2, *SHAPE), np.float32), np.zeros(2), "labels must be"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        PGD(ThreatModel()).run(Linear(), images, labels, seed=0)


def test_something_else_than_logits_is_refused():
    images, labels = Linear().images(2)
    with pytest.raises(ValueError, match=r"logits_fn must return \(N, K\) logits"):
        PGD(ThreatModel()).run(lambda x: tf.reduce_sum(x, (1, 2, 3)), images, labels, seed=0)
