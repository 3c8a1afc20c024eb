"""The AutoAttack cascade, its checks and its golden results."""

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    LinearClassifier,
    check_closed_form,
    check_is_traced_once,
    curved,
    curved_examples,
)
from golden import GOLDEN500_BROKEN, GOLDEN500_CLEAN, GOLDEN500_ROBUST, trades_network

from logit_reg.attacks.apgd import APGD, APGDTargeted
from logit_reg.attacks.autoattack import AutoAttack
from logit_reg.attacks.engine.checks import AttackWarning
from logit_reg.attacks.fab import FAB, FABTargeted
from logit_reg.attacks.square import Square
from logit_reg.evaluation.run import check_threat, evaluate
from logit_reg.threat import ThreatModel
from madry_compat import data

LINF = ThreatModel("linf", 0.03)
LIGHT = {"num_steps": 10, "num_queries": 60}


def findings_of(attack, model, images, labels):
    """What a run warns of: names and findings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack.run(model, images, labels, seed=0)
    findings = [w.message.finding for w in caught if isinstance(w.message, AttackWarning)]
    return {finding.name: finding for finding in findings}


def test_versions_are_the_published_cascades():
    standard = AutoAttack(LINF).attacks(10)
    assert standard == {
        "apgd-ce": APGD(LINF, "xent", 100),
        "apgd-t": APGDTargeted(LINF, 9, 100),
        "fab-t": FABTargeted(LINF, 9, 100, early_stop=True),
        "square": Square(LINF, 5000, 0.8),
    }
    plus = AutoAttack(LINF, "plus").attacks(10)
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [plus[name].num_restarts for name in ("apgd-ce", "apgd-dlr", "fab")] == [5, 5, 5]
    rand = AutoAttack(LINF, "rand").attacks(10)
    assert [(name, attack.num_samples) for name, attack in rand.items()] == [
        ("apgd-ce", 20),
        ("apgd-dlr", 20),
    ]
    with pytest.raises(ValueError, match="version must be one of standard, plus, rand; got 'x'"):
        AutoAttack(LINF, "x")


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")
@pytest.mark.parametrize(
    ("norm", "box_is_active", "num_classes"),
    [
        *itertools.product(("linf", "l2"), (False, True), (10,)),
        # Few classes leave attacks out, whatever the norm and the box.
        ("linf", True, 2),
        ("l2", False, 2),
        ("linf", False, 3),
        ("l2", True, 3),
    ],
)
def test_finds_what_lies_just_within_the_budget(norm, box_is_active, num_classes):
    check_closed_form(
        lambda threat: AutoAttack(threat, num_queries=20),
        LinearClassifier(num_classes),
        norm,
        box_is_active=box_is_active,
        pool=500,
    )


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")
@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", 0.1), ThreatModel("linf", 8, 0, 255)])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_each_stage_leaves_fewer_robust(version, threat):
    def model(images):
        return curved(images / threat.upper)

    images, labels = curved_examples(30)
    images *= threat.upper
    labels[0] = (labels[0] + 1) % 5
    attack = AutoAttack(threat, version, **LIGHT)
    result = attack.run(model, images, labels, seed=0)
    assert [name for name, _ in result.stages] == list(attack.attacks(5))
    robust = np.arange(30) > 0
    for _, after in result.stages:
        assert not np.any(after & ~robust)
        robust = after
    assert 3 < robust.sum() < 27
    np.testing.assert_array_equal(robust, ~result.fooled)
    check_threat("autoattack", result.adversarial, images, np.arange(30), threat)
    np.testing.assert_array_equal(result.adversarial[0], images[0])
    fools = np.argmax(model(result.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, result.fooled)
    forwards, backwards = attack.cost()
    assert result.forwards <= 30 * forwards
    assert result.backwards <= 30 * backwards


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")
def test_worst_case_is_that_of_its_attacks_in_an_evaluation():
    images, labels = curved_examples(20)
    attack = AutoAttack(LINF, **LIGHT)
    found = evaluate(curved, {"autoattack": attack}, images, labels, batch_size=8)
    stages = dict(found.records["autoattack"].stages)
    np.testing.assert_array_equal(stages["square"], found.robust)
    first = evaluate(curved, {"apgd-ce": attack.attacks(5)["apgd-ce"]}, images, labels)
    np.testing.assert_array_equal(stages["apgd-ce"], first.robust)


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")
def test_networks_are_traced_once():
    check_is_traced_once(AutoAttack(ThreatModel("linf", 1e-6), num_steps=3, num_queries=12))


@pytest.mark.parametrize(
    ("num_classes", "names", "targets"),
    [(2, ["apgd-ce", "fab-t", "square"], 1), (3, ["apgd-ce", "fab-t", "square"], 2)],
)
def test_what_is_undefined_for_few_classes_is_left_out(num_classes, names, targets):
    classifier = LinearClassifier(num_classes)
    images, labels = classifier.examples(4, box_is_active=False)
    attack = AutoAttack(ThreatModel("linf", 1e-6), num_steps=3, num_queries=3)
    findings = {f.name: f for f in attack.checks(classifier, images, labels)}
    assert findings["num_classes"].value == num_classes
    assert "apgd-t is not defined and left out" in findings["num_classes"].message
    assert findings["num_targets"].value == targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        result = attack.run(classifier, images, labels, seed=0)
    assert [name for name, _ in result.stages] == names
    plus = AutoAttack(LINF, "plus").attacks(num_classes)
    assert ("apgd-dlr" in plus) == (num_classes == 3)


def test_probabilities_are_noticed_with_the_remedy():
    images, labels = curved_examples(3)
    attack = AutoAttack(LINF, **LIGHT)
    (finding,) = (
        finding
        for finding in attack.checks(lambda x: tf.nn.softmax(curved(x)), images, labels)
        if finding.name == "probabilities"
    )
    assert "pass the network without its softmax" in finding.message
    logarithm = attack.checks(lambda x: tf.nn.log_softmax(curved(x)), images, labels)
    assert "probabilities" not in {finding.name for finding in logarithm}


def test_a_randomised_network_is_noticed():
    images, labels = curved_examples(5)

    def randomised(images):
        return curved(images) + tf.random.normal((), stddev=0.01)

    names = {f.name for f in AutoAttack(LINF, **LIGHT).checks(randomised, images, labels)}
    assert "randomised" in names
    names = {f.name for f in AutoAttack(LINF, "rand", **LIGHT).checks(randomised, images, labels)}
    assert "randomised" not in names


def test_a_network_that_takes_gradients_itself_is_noticed():
    def purified(images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            confidence = tf.reduce_sum(tf.reduce_max(curved(images), axis=-1))
        return curved(images + 0.01 * tape.gradient(confidence, images))

    images, labels = curved_examples(5)
    for model in (purified, tf.function(purified)):
        findings = AutoAttack(LINF, **LIGHT).checks(model, images, labels)
        assert {f.name: f for f in findings}["dynamic"].value > 0
    names = {f.name for f in AutoAttack(LINF, **LIGHT).checks(curved, images, labels)}
    assert "dynamic" not in names


def test_vanishing_gradients_and_what_square_finds_behind_them_are_noticed():
    def quantised(images):
        return curved(tf.round(images * 50.0) / 50.0)

    images, _ = curved_examples(12)
    labels = np.argmax(quantised(images).numpy(), axis=-1)
    findings = findings_of(
        AutoAttack(LINF, num_steps=4, num_queries=200), quantised, images, labels
    )
    assert findings["zero_gradients"].value == 12
    assert findings["square_lowers"].value > 0.002
    assert "points that the attacks with gradients leave" in findings["square_lowers"].message


def test_a_sound_network_raises_no_warning():
    images, labels = curved_examples(6)
    attack = AutoAttack(ThreatModel("linf", 1e-6), num_targets=4, num_steps=3, num_queries=3)
    assert findings_of(attack, curved, images, labels) == {}


class ScaledAndShifted:
    """scale * logits + shift of a network, traced once for all values, in float32."""

    def __init__(self, network):
        self._network = network
        self._scale, self._shift = tf.Variable(1.0), tf.Variable(0.0)

    def __call__(self, images):
        return self._scale * self._network(images) + self._shift

    def robust_accuracies(self, attack, images, labels, squeezed_by=1):
        """Per cent robust under each scale and shift of the squeezed logits; first without."""
        robust = []
        for scale, shift in ((1, 0), (1e-6, 0), (1e6, 0), (1, 100), (1, -100), (1, 3)):
            self._scale.assign(scale / squeezed_by)
            self._shift.assign(shift)
            fooled = attack.run(self, images, labels, seed=0).fooled
            robust.append(100 * (1 - fooled.mean()))
        return robust


SCALED = ScaledAndShifted(curved)


# As they are the logits are about 4; squeezed, about 0.04, where the float32 numbers around 100
# are 8e-6 apart.
@pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")
@pytest.mark.parametrize("squeezed_by", [1, 100])
@pytest.mark.parametrize(
    "attack",
    [
        APGD(LINF, "dlr", num_steps=20),
        APGD(ThreatModel("l2", 0.12), "dlr", num_steps=20),
        APGDTargeted(LINF, num_steps=20),
        FAB(LINF, num_steps=20, early_stop=True),
        FABTargeted(ThreatModel("l2", 0.12), num_steps=20, early_stop=True),
        Square(LINF, num_queries=150),
        Square(ThreatModel("l2", 0.12), num_queries=150),
        AutoAttack(LINF, num_steps=20, num_queries=100),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{attack.threat.norm}",
)
def test_scale_and_shift_of_the_logits_do_not_matter(attack, squeezed_by):
    images, labels = curved_examples(500)
    robust = SCALED.robust_accuracies(attack, images, labels, squeezed_by)
    assert 20 < robust[0] < 80
    assert max(robust) - min(robust) <= 0.6, robust


def test_cross_entropy_notes_progress_that_float32_does_not_show():
    # Near 0 its direction is that of the logits less their mean, whatever their scale; at 1e-9 its
    # value is ln 5 to float32, wherever the image goes.
    images, labels = curved_examples(500)
    attack = APGD(ThreatModel("linf", 0.05), num_steps=10)
    robust = [
        100 * (1 - attack.run(model, images, labels, seed=0).fooled.mean())
        for model in (lambda x: 1e-3 * curved(x), lambda x: 1e-9 * curved(x))
    ]
    assert 20 < robust[0] < 80
    assert robust[1] == pytest.approx(robust[0], abs=0.6)


@pytest.mark.shared
@pytest.mark.long
def test_scale_and_shift_do_not_matter_to_a_squeezed_mnist_network(shared, tfds_dir):
    network, images, labels = _golden(shared, tfds_dir, 200)
    model = ScaledAndShifted(lambda images: 0.01 * network(images, training=False))
    robust = model.robust_accuracies(APGD(ThreatModel(), "dlr", 20), images, labels)
    assert 85 < robust[0] < 97
    assert max(robust) - min(robust) <= 0.6, robust


@pytest.mark.shared
@pytest.mark.long
def test_golden_500(shared, tfds_dir):
    network, images, labels = _golden(shared, tfds_dir, 500)
    found = evaluate(network, {"autoattack": AutoAttack(ThreatModel())}, images, labels)
    assert 100 * found.clean.mean() == pytest.approx(GOLDEN500_CLEAN)
    for name, robust in found.records["autoattack"].stages:
        assert 100 * robust.mean() == pytest.approx(GOLDEN500_ROBUST[name], abs=0.6), name
    broken = set(np.flatnonzero(~found.robust).tolist())
    assert len(broken ^ set(GOLDEN500_BROKEN)) <= 3


@pytest.mark.shared
@pytest.mark.slow
def test_golden_first_images_fall_to_apgd(shared, tfds_dir):
    network, images, labels = _golden(shared, tfds_dir, 100)
    result = APGD(ThreatModel()).run(network, images, labels, seed=0)
    fooled = set(np.flatnonzero(result.fooled).tolist())
    # Image 20 falls to Square only.
    assert fooled == {index for index in GOLDEN500_BROKEN if index < 100} - {20}


def _golden(shared, tfds_dir, count):
    test_set = data.load("mnist", "test", data_dir=tfds_dir)
    images = data.to_pixels(test_set.images[:count], "mnist")
    return trades_network(shared), images, test_set.labels[:count]
