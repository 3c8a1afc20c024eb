"""The adaptive cascade: its stages, its books, and that it finds what is there to find."""

import numpy as np
import pytest
import tensorflow as tf
from linear import SHAPE, Linear

from logit_reg.attacks import PGD
from logit_reg.attacks.adaptive import Adaptive, NoisyStart
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.evaluation.run import evaluate
from logit_reg.threat import ThreatModel
from madry_compat.challenges import CIFAR10

THREAT = ThreatModel("linf", 0.022, 0.0, 1.0)
SHORT = Adaptive(THREAT, num_steps=10, num_targets=3, num_restarts=2, num_queries=20)


def case(num_classes):
    model = Linear(num_classes)
    model.bias = -0.5 * model.weights.sum(axis=0)
    images = np.random.default_rng(1).uniform(0.2, 0.8, (12, *SHAPE)).astype(np.float32)
    labels = model(images).numpy().argmax(axis=1)
    return model, images, labels, model.distance(images, labels, "linf") <= THREAT.epsilon


def test_the_protocol_takes_the_reference_settings():
    (attack,) = protocol_attacks("adaptive", CIFAR10).values()
    assert attack == Adaptive(ThreatModel("linf", 8.0, 0.0, 255.0))
    stages = attack.attacks(num_classes=10)
    assert {"apgd-t", "multitargeted", "odi", "cw-x100", "square-p0.3"} <= stages.keys()
    assert stages["square-p0.3"].attack.num_queries == 20_000
    assert stages["cw-zero-start"].random_start is False
    assert stages["cw-noise-start"].attack.stddev == 16.0
    sizes = [stage.step_size / 8 for name, stage in stages.items() if name.startswith("cw-step")]
    assert sizes == pytest.approx([0.04, 0.1, 0.25, 0.5, 0.65, 1.0, 2.0])


def test_losses_that_need_more_classes_are_left_out():
    assert "apgd-dlr" not in SHORT.attacks(2) and "apgd-t" not in SHORT.attacks(3)
    assert len(SHORT.attacks(4)) == len(SHORT.attacks(10))


def test_the_noise_of_the_training_is_where_a_stage_starts():
    attack = Adaptive(THREAT, noise_stddev=0.5)
    assert attack.attacks(5)["cw-noise-start"].attack.stddev == 0.5
    # The state of an evaluation goes by this: other noise is another stage.
    assert repr(attack.attacks(5)) != repr(SHORT.attacks(5))
    with pytest.raises(ValueError, match="stddev must be above 0, in pixel units; got 0"):
        Adaptive(THREAT, noise_stddev=0.0)


def start_of(attack, images, **options):
    """Where an attack starts: of a constant model no gradient leads away from there."""

    def constant(x):
        return tf.zeros((tf.shape(x)[0], 3)) + tf.constant([1.0, 0.0, 0.0])

    labels = np.zeros(len(images), int)
    return attack.run(constant, images, labels, **{"seed": 0} | options).adversarial - images


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_noisy_start_is_gaussian_within_the_ball(norm):
    images = np.full((200, *SHAPE), 0.5, np.float32)
    attack = NoisyStart(ThreatModel(norm, 0.4), stddev=0.05, num_steps=1)
    noise = start_of(attack, images)
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    # A share of values that no uniform start has.
    assert np.mean(np.abs(noise) < 0.05) == pytest.approx(0.683, abs=0.02)
    cut = start_of(NoisyStart(ThreatModel(norm, 0.1), stddev=0.5, num_steps=1), images)
    length = np.abs(cut).max((1, 2, 3)) if norm == "linf" else np.linalg.norm(cut, axis=(1, 2))
    np.testing.assert_allclose(length.ravel(), 0.1, rtol=1e-3)


def test_a_noisy_start_belongs_to_the_image_the_seed_and_the_restart():
    images = np.full((6, *SHAPE), 0.5, np.float32)
    attack = NoisyStart(ThreatModel("linf", 0.4), stddev=0.05, num_steps=1)
    whole = start_of(attack, images)
    part = start_of(attack, images[:2], indices=np.array([4, 2]))
    np.testing.assert_array_equal(part, whole[[4, 2]])
    for other in ({"seed": 1}, {"restart": 1}):
        assert not np.any(start_of(attack, images, **other) == whole)


def test_from_a_noisy_start_all_that_can_be_broken_breaks():
    model, images, labels, is_breakable = case(5)
    attack = NoisyStart(THREAT, 0.5, num_steps=40, step_size=0.002)
    found = attack.run(model, images, labels, seed=0)
    np.testing.assert_array_equal(found.fooled, is_breakable)
    assert found.backwards <= 12 * attack.cost()[1]
    plain = PGD(THREAT, "cw", 40, 0.002, early_stop=True).run(model, images, labels, seed=0)
    np.testing.assert_array_equal(found.fooled, plain.fooled)


@pytest.mark.slow
def test_stages_share_the_active_set_and_reach_the_exact_worst_case():
    model, images, labels, is_breakable = case(5)
    attack = SHORT
    found = evaluate(model, {"adaptive": attack}, images, labels, batch_size=5)
    np.testing.assert_array_equal(found.robust, ~is_breakable)
    stages = dict(found.records["adaptive"].stages)
    assert list(stages) == list(attack.attacks(5))
    counts = [robust.sum() for robust in stages.values()]
    assert counts == sorted(counts, reverse=True)
    np.testing.assert_array_equal(list(stages.values())[-1], found.robust)
    forwards, backwards = attack.cost()
    assert 0 < found.forwards <= forwards * 12 and 0 < found.backwards <= backwards * 12


@pytest.mark.slow
def test_a_batch_run_on_its_own_gives_the_same():
    model, images, labels, is_breakable = case(2)
    found = SHORT.run(model, images, labels, seed=0)
    np.testing.assert_array_equal(found.fooled, is_breakable)
    fools = tf.argmax(model(found.adversarial), -1).numpy() != labels
    np.testing.assert_array_equal(fools, is_breakable)
