"""The adaptive cascade: its stages, its books, and that it finds what is there to find."""

import numpy as np
import pytest
import tensorflow as tf
from linear import SHAPE, Linear

from logit_reg.attacks.adaptive import Adaptive
from logit_reg.evaluation import evaluate
from logit_reg.protocols import protocol_attacks
from logit_reg.threat import ThreatModel

THREAT = ThreatModel("linf", 0.022, 0.0, 1.0)
SHORT = Adaptive(THREAT, num_steps=10, num_targets=3, num_restarts=2, num_queries=20)


def case(num_classes):
    model = Linear(num_classes)
    model.bias = -0.5 * model.weights.sum(axis=0)
    images = np.random.default_rng(1).uniform(0.2, 0.8, (12, *SHAPE)).astype(np.float32)
    labels = model(images).numpy().argmax(axis=1)
    return model, images, labels, model.distance(images, labels, "linf") <= THREAT.epsilon


def test_the_protocol_takes_the_reference_settings():
    (attack,) = protocol_attacks("adaptive", "cifar").values()
    assert attack == Adaptive(ThreatModel("linf", 8.0, 0.0, 255.0))
    stages = attack.attacks(num_classes=10)
    assert {"apgd-t", "multitargeted", "odi", "cw-x100", "square-p0.3"} <= stages.keys()
    assert stages["square-p0.3"].attack.num_queries == 20_000
    sizes = [stage.step_size / 8 for name, stage in stages.items() if name.startswith("cw-step")]
    assert sizes == pytest.approx([0.04, 0.1, 0.25, 0.5, 0.65, 1.0, 2.0])


def test_losses_that_need_more_classes_are_left_out():
    assert "apgd-dlr" not in SHORT.attacks(2) and "apgd-t" not in SHORT.attacks(3)
    assert len(SHORT.attacks(4)) == len(SHORT.attacks(10))


@pytest.mark.slow
def test_stages_share_the_standing_examples_and_reach_the_exact_worst_case():
    model, images, labels, is_breakable = case(5)
    attack = SHORT
    found = evaluate(model, {"adaptive": attack}, images, labels, batch_size=5)
    np.testing.assert_array_equal(found.robust, ~is_breakable)
    stages = dict(found.records["adaptive"].stages)
    assert list(stages) == list(attack.attacks(5))
    counts = [standing.sum() for standing in stages.values()]
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
