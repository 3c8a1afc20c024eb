"""The AutoAttack cascade, its checks and its golden results."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import LinearClassifier, check_is_traced_once, curved, curved_examples
from golden import GOLDEN500_BROKEN, GOLDEN500_CLEAN, GOLDEN500_STANDING, trades_network

from logit_reg.attacks.apgd import APGD, APGDTargeted
from logit_reg.attacks.autoattack import AutoAttack
from logit_reg.attacks.checks import AttackWarning
from logit_reg.attacks.fab import FAB, FABTargeted
from logit_reg.attacks.square import Square
from logit_reg.evaluation import check_threat, evaluate
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


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.checks.AttackWarning")
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_each_stage_leaves_fewer_standing(version):
    images, labels = curved_examples(30)
    labels[0] = (labels[0] + 1) % 5
    attack = AutoAttack(LINF, version, **LIGHT)
    result = attack.run(curved, images, labels, seed=0)
    assert [name for name, _ in result.stages] == list(attack.attacks(5))
    standing = np.arange(30) > 0
    for _, after in result.stages:
        assert not np.any(after & ~standing)
        standing = after
    np.testing.assert_array_equal(standing, ~result.fooled)
    check_threat("autoattack", result.adversarial, images, np.arange(30), LINF)
    np.testing.assert_array_equal(result.adversarial[0], images[0])
    fools = np.argmax(curved(result.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, result.fooled)
    forwards, backwards = attack.cost()
    assert result.forwards <= 30 * forwards
    assert result.backwards <= 30 * backwards


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.checks.AttackWarning")
def test_worst_case_is_that_of_its_attacks_in_an_evaluation():
    images, labels = curved_examples(20)
    attack = AutoAttack(LINF, **LIGHT)
    found = evaluate(curved, {"autoattack": attack}, images, labels, batch_size=8)
    stages = dict(found.records["autoattack"].stages)
    np.testing.assert_array_equal(stages["square"], found.robust)
    first = evaluate(curved, {"apgd-ce": attack.attacks(5)["apgd-ce"]}, images, labels)
    np.testing.assert_array_equal(stages["apgd-ce"], first.robust)


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.checks.AttackWarning")
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


def test_probabilities_are_refused_with_the_remedy():
    images, labels = curved_examples(3)
    attack = AutoAttack(LINF, **LIGHT)
    with pytest.raises(ValueError, match="returns probabilities.*pass the network without its so"):
        attack.run(lambda x: tf.nn.softmax(curved(x)), images, labels, seed=0)
    attack.checks(lambda x: tf.nn.log_softmax(curved(x)), images, labels)


def test_a_randomised_network_is_noticed():
    images, labels = curved_examples(5)

    def randomised(images):
        return curved(images) + tf.random.normal((), stddev=0.01)

    names = {f.name for f in AutoAttack(LINF, **LIGHT).checks(randomised, images, labels)}
    assert "randomised" in names
    names = {f.name for f in AutoAttack(LINF, "rand", **LIGHT).checks(randomised, images, labels)}
    assert "randomised" not in names


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


@pytest.mark.filterwarnings("ignore::logit_reg.attacks.checks.AttackWarning")
@pytest.mark.parametrize(
    "attack",
    [
        APGD(LINF, "dlr", num_steps=30),
        FAB(LINF, num_steps=30, early_stop=True),
        Square(LINF, num_queries=150),
        AutoAttack(LINF, num_steps=30, num_queries=150),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_scale_and_shift_of_the_logits_do_not_matter(attack):
    scale, shift = tf.Variable(1.0), tf.Variable(0.0)

    def model(images):
        return scale * curved(images) + shift

    images, labels = curved_examples(200)
    robust = {}
    for settings in ((1.0, 0.0), (1e-6, 0.0), (1e6, 0.0), (1.0, 100.0), (1.0, -100.0)):
        scale.assign(settings[0])
        shift.assign(settings[1])
        robust[settings] = 100 * (1 - attack.run(model, images, labels, seed=0).fooled.mean())
    assert 20 < robust[1.0, 0.0] < 80
    assert max(robust.values()) - min(robust.values()) <= 0.6, robust


@pytest.mark.shared
@pytest.mark.long
def test_golden_500(shared, tfds_dir):
    network, images, labels = _golden(shared, tfds_dir, 500)
    found = evaluate(network, {"autoattack": AutoAttack(ThreatModel())}, images, labels)
    assert 100 * found.clean.mean() == pytest.approx(GOLDEN500_CLEAN)
    for name, standing in found.records["autoattack"].stages:
        assert 100 * standing.mean() == pytest.approx(GOLDEN500_STANDING[name], abs=0.6), name
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
