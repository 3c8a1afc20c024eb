"""MultiTargeted, ODI, MD and PGD on rescaled logits: the gradient attacks of the leaderboards."""

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
from golden import GOLDEN500_BROKEN, trades_network
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_reg.attacks import MD, ODI, PGD, MultiTargeted, Restarts, ScaledPGD
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.threat import ThreatModel
from madry_compat import data

LINF = ThreatModel("linf", 0.05)

# Few steps, for the properties that do not depend on how strong an attack is.
SHORT = {
    "multitargeted": MultiTargeted(LINF, num_steps=5),
    "odi": ODI(LINF, num_steps=5),
    "md-label": MD(LINF, "label", num_steps=7),
    "md-other": MD(LINF, "other", num_steps=7),
    "mifpe": ScaledPGD(LINF, num_steps=7),
    "scaled": ScaledPGD(LINF, 0.1, num_steps=7),
}
each_attack = pytest.mark.parametrize("attack", SHORT.values(), ids=SHORT.keys())


# The margin has several local maxima from three classes on, so attacks that do not aim at every
# class need restarts to be sure.
@pytest.mark.parametrize(
    "make",
    [
        MultiTargeted,
        lambda threat: Restarts(ODI(threat), 5),
        lambda threat: Restarts(MD(threat, "other"), 5),
        lambda threat: Restarts(ScaledPGD(threat), 5),
    ],
    ids=["multitargeted", "odi", "md-other", "mifpe"],
)
@pytest.mark.parametrize(("num_classes", "box_is_active"), [(2, True), (3, False), (10, True)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_what_lies_just_within_the_budget_and_nothing_beyond(
    norm, num_classes, box_is_active, make
):
    check_closed_form(make, LinearClassifier(num_classes), norm, box_is_active=box_is_active)


# Where more classes than two meet, lowering the true logit need not lead to the nearest.
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_lowering_the_true_logit_first_does_so_too(norm):
    check_closed_form(MD, LinearClassifier(2), norm, box_is_active=True)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_dlr_is_a_loss_of_pgd(norm):
    check_closed_form(
        lambda threat: Restarts(PGD(threat, "dlr", 20, threat.epsilon / 4, early_stop=True), 5),
        LinearClassifier(3),
        norm,
        box_is_active=False,
    )


def test_dlr_is_the_published_formula_and_needs_three_classes():
    logits = np.array([[2.0, -1.0, 0.5, 1.0]], np.float32)
    assert float(attack_loss("dlr", logits, [0])[0]) == pytest.approx(-(2.0 - 1.0) / (2.0 - 0.5))
    assert float(attack_loss("dlr", logits, [1])[0]) == pytest.approx(-(-1.0 - 2.0) / (2.0 - 0.5))
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(3, box_is_active=False)
    with pytest.raises(ValueError, match="dlr needs at least 3 classes; got 2: use xent or cw"):
        PGD(LINF, "dlr").run(classifier, images, labels, seed=0)


# On the classifiers below a plain ascent of the margin goes astray.
_WIDE = ThreatModel("linf", 0.2)
_MARGIN_PGD = Restarts(PGD(_WIDE, "cw", 20, 0.05, early_stop=True), 10)


def test_multitargeted_reaches_a_class_that_is_not_the_nearest_in_logits():
    def decoy(images):
        """Class 1 is just below class 0 wherever one goes; class 2 is far below, and in reach."""
        almost = -0.1 + 0.01 * tf.tanh(ripple(images))
        return tf.stack([tf.zeros_like(almost), almost, -1.0 + 10.0 * brightness(images)], axis=-1)

    images, labels = grey_images()
    assert not _MARGIN_PGD.run(decoy, images, labels, seed=0).fooled.any()
    assert not MultiTargeted(_WIDE, num_targets=1).run(decoy, images, labels, seed=0).fooled.any()
    assert MultiTargeted(_WIDE, num_targets=2).run(decoy, images, labels, seed=0).fooled.all()


def test_odi_leaves_a_plateau_of_the_margin():
    def plateau(images):
        """The margin moves only where an image is brighter than noise makes it; the way there
        shows in a class that never wins.
        """
        way = tf.reduce_mean(images[:, :, :3] - 0.5, axis=(1, 2, 3))
        rises = 20.0 * tf.nn.relu(brightness(images) - 0.07)
        return tf.stack([tf.fill(tf.shape(way), 1.5), rises, -5.0 + way], axis=-1)

    images, labels = grey_images()
    assert not _MARGIN_PGD.run(plateau, images, labels, seed=0).fooled.any()
    once = ODI(_WIDE).run(plateau, images, labels, seed=0).fooled
    # The random weight of that class decides which way it goes.
    assert 0.2 < once.mean() < 0.8
    assert Restarts(ODI(_WIDE), 20).run(plateau, images, labels, seed=0).fooled.all()


@pytest.mark.parametrize("smooth", ["label", "other"])
def test_md_is_not_misled_by_a_term_whose_gradient_drowns_the_other(smooth):
    def rippled(images):
        """One term decides but is nearly flat; the other's ripples are steep and lead nowhere."""
        flat, ripples = 10.0 * brightness(images) - 1.5, 0.3 * tf.sin(400.0 * ripple(images))
        terms = (-flat, ripples) if smooth == "label" else (-ripples, flat)
        return tf.stack(terms, axis=-1)

    images, labels = grey_images()
    assert not _MARGIN_PGD.run(rippled, images, labels, seed=0).fooled.any()
    fooled = {
        first: MD(_WIDE, first).run(rippled, images, labels, seed=0).fooled
        for first in ("label", "other")
    }
    assert fooled.pop(smooth).all()
    assert not next(iter(fooled.values())).any()


def test_rescaled_logits_have_a_gradient_where_cross_entropy_has_none():
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(30, box_is_active=False)
    margins = classifier.margins(images, labels, "linf")
    # An image at the boundary has logits that cross-entropy can still tell from each other.
    far = margins > 0.2 * margins.max()
    images, labels, margins = images[far], labels[far], margins[far]
    threat = ThreatModel("linf", 1.05 * float(margins.max()))

    def confident(images):
        return 1e4 * classifier(images)

    plain = PGD(threat, "xent", 10, threat.epsilon / 4, random_start=False)
    result = plain.run(confident, images, labels, seed=0)
    assert not result.fooled.any()
    np.testing.assert_array_equal(result.adversarial, images)
    for scale in (None, 1e-4):
        assert ScaledPGD(threat, scale).run(confident, images, labels, seed=0).fooled.all()


def test_a_fixed_factor_is_cross_entropy_of_multiplied_logits():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    labels = np.arange(5) % 4
    loss = ScaledPGD(LINF, 30.0).step_loss(0, logits, labels, labels)
    np.testing.assert_array_equal(loss, attack_loss("xent", 30.0 * logits, labels))


def _mifpe_gradient(logits, labels):
    logits = tf.constant(logits, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = ScaledPGD(LINF).step_loss(0, logits, labels, labels)
    return tape.gradient(loss, logits).numpy()


def test_mifpe_is_cross_entropy_of_logits_whose_top_two_differ_by_one():
    logits = np.array([[3.0, 1.0, -2.0, 0.0], [0.5, 0.2, 0.4, -0.3]])
    scaled = logits / np.array([[2.0], [0.1]])
    softmax = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    expected = softmax - np.eye(4)[[0, 0]]
    np.testing.assert_allclose(_mifpe_gradient(logits, [0, 0]), expected, rtol=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 100.0)])
def test_mifpe_does_not_depend_on_scale_and_shift(scale, shift):
    # Multiples of 1/64, so that a shift does not round them.
    logits = np.round(64 * np.random.default_rng(0).normal(size=(50, 10))) / 64
    labels = np.arange(50) % 10
    np.testing.assert_allclose(
        _mifpe_gradient(scale * logits + shift, labels), _mifpe_gradient(logits, labels), atol=1e-6
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_mifpe_has_a_gradient_where_logits_tie(scale):
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    gradient = _mifpe_gradient(scale * logits, [0, 0, 0, 0])
    assert np.isfinite(gradient).all()
    assert (gradient[:, 0] < -0.4).all()


@pytest.mark.shared
@pytest.mark.long
def test_verdicts_on_the_golden_network_do_not_depend_on_scale_and_shift(shared, tfds_dir):
    test = data.load("mnist", "test", str(tfds_dir))
    chosen = np.union1d(np.arange(30), GOLDEN500_BROKEN[-30:])
    images, labels = data.to_pixels(test.images[chosen], "mnist"), test.labels[chosen]
    network = trades_network(shared)
    threat = ThreatModel("linf", 0.3)
    attacks = {
        "margin": PGD(threat, "cw", 15, 0.075, early_stop=True),
        "dlr": PGD(threat, "dlr", 15, 0.075, early_stop=True),
        "mifpe": ScaledPGD(threat, num_steps=15),
        "multitargeted": MultiTargeted(threat, num_steps=10, num_targets=2),
        "xent": PGD(threat, "xent", 15, 0.075, early_stop=True),
    }

    def verdicts(attack, scale=1.0, shift=0.0):
        return attack.run(lambda x: scale * network(x) + shift, images, labels, seed=0).fooled

    xent = attacks.pop("xent")
    # What the others are spared.
    assert verdicts(xent, 1e6).sum() < verdicts(xent).sum()
    for name, attack in attacks.items():
        plain = verdicts(attack)
        assert 8 < plain.sum() < 40, name
        for scale, shift in ((1e-6, 0.0), (1e6, 0.0), (1.0, 100.0)):
            np.testing.assert_array_equal(verdicts(attack, scale, shift), plain, err_msg=name)


def _only_grows(sets):
    return all(not (before & ~after).any() for before, after in zip(sets, sets[1:], strict=False))


seeds = st.integers(0, 2**31)


@settings(max_examples=5, deadline=None)
@given(seed=seeds, norm=st.sampled_from(["linf", "l2"]))
def test_the_broken_set_grows_with_steps(seed, norm):
    images, labels = curved_examples(40)
    attack = PGD(ThreatModel(norm, 0.04 if norm == "linf" else 0.15), "cw", 1, 0.01)
    found = [
        dataclasses.replace(attack, num_steps=num_steps, early_stop=True)
        .run(curved, images, labels, seed=seed)
        .fooled
        for num_steps in (1, 9, 12)
    ]
    assert _only_grows(found)


@settings(max_examples=5, deadline=None)
@given(seed=seeds, attack=st.sampled_from(list(SHORT.values())))
def test_the_broken_set_grows_with_restarts(seed, attack):
    images, labels = curved_examples(40)
    found = [Restarts(attack, n).run(curved, images, labels, seed=seed).fooled for n in (1, 2, 4)]
    assert _only_grows(found)


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_the_broken_set_grows_with_targets(seed):
    images, labels = curved_examples(40)
    attack = SHORT["multitargeted"]
    found = [
        dataclasses.replace(attack, num_targets=num_targets)
        .run(curved, images, labels, seed=seed)
        .fooled
        for num_targets in (1, 2, 3, 4, None)
    ]
    assert _only_grows(found)
    np.testing.assert_array_equal(found[-1], found[-2])
    assert found[-1].any()


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_within_ball_and_pixel_range(norm, attack):
    threat = ThreatModel(norm, 8.0 if norm == "linf" else 30.0, 0.0, 255.0)
    check_stays_within(dataclasses.replace(attack, threat=threat))


@each_attack
def test_a_seed_gives_one_result_and_batches_do_not_matter(attack):
    check_seeds_and_batches(attack, 200, most_different=1)


@each_attack
def test_network_is_traced_once(attack):
    check_is_traced_once(attack)


@pytest.mark.parametrize(
    ("attack", "steps", "runs"),
    [
        (MultiTargeted(LINF, num_steps=11), 11, 4),
        (MultiTargeted(LINF, num_steps=11, num_targets=3), 11, 3),
        (ODI(LINF, num_odi_steps=3, num_steps=10), 13, 1),
        (MD(LINF, num_steps=11), 11, 1),
        (ScaledPGD(LINF, num_steps=11), 11, 1),
    ],
    ids=["multitargeted", "three-targets", "odi", "md", "mifpe"],
)
def test_counts_passes_of_images_that_still_stand(attack, steps, runs):
    attack, images, labels = check_counts_passes(attack, runs * (steps + 1), runs * steps)
    num_classes = {"num_classes": 5} if isinstance(attack, MultiTargeted) else {}
    assert attack.cost(**num_classes) == (1 + runs * (steps + 1), runs * steps)
    guided = attack.run(curved, images, labels, seed=0, gradient_logits_fn=lambda x: curved(x))
    assert guided.forwards == 6 + 4 * runs * (2 * steps + 1)


def test_images_drop_out_once_fooled():
    images, labels = curved_examples(40)
    attack = MultiTargeted(ThreatModel("linf", 0.2), num_steps=12)
    result = attack.run(curved, images, labels, seed=0)
    assert result.fooled.all()
    assert result.backwards < 40 * 12 * 2


def test_steps_are_as_long_as_published():
    threat = ThreatModel("linf", 8.0, 0.0, 255.0)
    odi = [float(ODI(threat).step_length(step)) for step in (0, 1, 2, 21)]
    assert odi == [8.0, 8.0, 2.0, 2.0]
    lengths = [float(MD(threat).step_length(step)) for step in range(50)]
    expected = [8.0 * (1 + np.cos(np.pi * step / 25)) for step in range(25)]
    np.testing.assert_allclose(lengths, expected * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (MultiTargeted, {"num_steps": 0}, "num_steps must be at least 1; got 0"),
        (MultiTargeted, {"num_targets": 0}, "num_targets must be at least 1; got 0"),
        (ODI, {"num_odi_steps": 0}, "num_odi_steps must be at least 1; got 0"),
        (ODI, {"step_size": 0.0}, "step_size must be above 0, in pixel units; got 0.0"),
        (MD, {"first": "logit"}, "first must be one of label, other; got 'logit'"),
        (MD, {"num_steps": 1}, "num_steps must be at least 2; got 1"),
        (ScaledPGD, {"logit_scale": 0.0}, "logit_scale must be above 0, or None; got 0.0"),
        (ScaledPGD, {"step_size": float("nan")}, "step_size must be above 0"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(LINF, **settings)


def test_called_like_a_function_it_returns_images():
    images, labels = curved_examples(3)
    for attack in SHORT.values():
        assert attack(curved, images, labels, seed=0).shape == (3, *SHAPE)
