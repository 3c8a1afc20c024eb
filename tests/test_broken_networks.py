"""Networks that make numbers worthless: the right verdict and a notice, whatever the attack."""

import dataclasses
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg import attacks
from logit_reg.analysis.curves import CurveSettings, losses_over_restarts
from logit_reg.attacks import AttackWarning
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.attacks.engine.attack import Attack
from logit_reg.attacks.engine.forward import Classifier
from logit_reg.attacks.engine.losses import is_fooled, margin
from logit_reg.audit import audit
from logit_reg.evaluation.ledger import build_result, read_ledger
from logit_reg.evaluation.protocols import (
    ANY_THREAT,
    PROTOCOLS,
    any_threat_attacks,
    protocol_attacks,
)
from logit_reg.evaluation.run import evaluate, predict
from logit_reg.experiments import evaluations
from logit_reg.threat import ThreatModel
from madry_compat.challenges import CIFAR10, MNIST

# The optimiser rewrites comparisons, which decides what becomes of NaN.
pytestmark = pytest.mark.graph_optimiser

SHAPE, NUM_CLASSES = (8, 8, 1), 4
THREAT = ThreatModel("linf", 0.1)
WEIGHTS = np.random.default_rng(0).normal(size=(64, NUM_CLASSES)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(size=(5, *SHAPE)).astype(np.float32)


def linear(images):
    # An average of 0 in every class.
    return (tf.reshape(images, (-1, 64)) - 0.5) @ WEIGHTS


LABELS = np.argmax(linear(IMAGES).numpy(), axis=-1)


def with_nan_weights(images):
    weights = WEIGHTS.copy()
    weights[3, 2] = np.nan
    return tf.reshape(images, (-1, 64)) @ weights


def with_logits(*special):
    """The linear network, some classes' logits replaced."""

    def network(images):
        return tf.where(tf.math.is_nan(special), linear(images), tf.constant(special, tf.float32))

    return network


OWN = np.nan
BROKEN = {
    "nan weights": with_nan_weights,
    "inf": with_logits(np.inf, OWN, OWN, OWN),
    # The other logits would decide for the label.
    "-inf of another class": lambda images: tf.where(
        linear(images) == tf.reduce_min(linear(images), axis=1, keepdims=True),
        -np.inf,
        linear(images),
    ),
}


def without_gradients(images):
    return linear(tf.round(images * 64) / 64)


def tied(images):
    return tf.zeros((tf.shape(images)[0], NUM_CLASSES)) + 0 * linear(images)


SOURCE = linear
SMALL: dict[str, Attack] = {
    "APGD": attacks.APGD(THREAT),
    "APGDTargeted": attacks.APGDTargeted(THREAT),
    "Adaptive": attacks.Adaptive(THREAT),
    "AutoAttack": attacks.AutoAttack(THREAT),
    "DDN": attacks.DDN(ThreatModel("l2", 0.6)),
    "FAB": attacks.FAB(THREAT),
    "FABTargeted": attacks.FABTargeted(THREAT),
    "FGSM": attacks.FGSM(THREAT),
    "FMN": attacks.FMN(THREAT),
    "GAMA": attacks.GAMA(THREAT),
    "HopSkipJump": attacks.HopSkipJump(THREAT),
    "MD": attacks.MD(THREAT),
    "MinimumNorm": attacks.MinimumNorm(THREAT),
    "MultiTargeted": attacks.MultiTargeted(THREAT),
    "ODI": attacks.ODI(THREAT),
    "PGD": attacks.PGD(THREAT),
    "RandomNoise": attacks.RandomNoise(THREAT),
    "Replay": attacks.Replay(THREAT, IMAGES),
    "Restarts": attacks.Restarts(attacks.PGD(THREAT, "cw"), 2),
    "SPSA": attacks.SPSA(THREAT),
    "ScaledPGD": attacks.ScaledPGD(THREAT),
    "Square": attacks.Square(THREAT),
    "Transfer": attacks.Transfer(attacks.PGD(THREAT), SOURCE, "linear"),
}
# The least that each setting of an attack's length can be.
LEAST = {
    "num_steps": 2,
    "num_odi_steps": 1,
    "num_queries": 3,
    "num_samples": 2,
    "num_starts": 2,
    "num_draws": 2,
    "num_targets": 1,
    "num_restarts": 1,
}


def shortened(attack):
    """The same attack with as few steps as it takes, whatever it is made of."""
    names = {field.name for field in dataclasses.fields(attack)}
    changes: dict[str, object] = {name: LEAST[name] for name in LEAST if name in names}
    if isinstance(attack, attacks.APGD | attacks.APGDTargeted):
        changes["num_samples"] = 1
    if isinstance(attack, attacks.Restarts):
        changes["attack"] = shortened(attack.attack)
    return dataclasses.replace(attack, **changes) if changes else attack


def quietly(*arguments, **options):
    """`evaluate` without its warnings, and its findings by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        found = evaluate(*arguments, **options)
    return found, {finding.name: finding for finding in found.findings}


CHALLENGES = {"mnist": MNIST, "cifar": CIFAR10}


def every_protocol():
    for family, challenge in CHALLENGES.items():
        for name in PROTOCOLS:
            try:
                yield family, name, protocol_attacks(name, challenge)
            except ValueError as error:
                # A protocol of the other family.
                assert "is defined on" in str(error)


EVERY_PROTOCOL = list(every_protocol())
each_attack = pytest.mark.parametrize("name", SMALL)
each_protocol = pytest.mark.parametrize(
    ("family", "protocol"), [(family, name) for family, name, _ in EVERY_PROTOCOL]
)


def attack_of(name):
    # A replacement would want the source or the images again.
    kept = ("Transfer", "Replay")
    return SMALL[name] if name in kept else shortened(SMALL[name])


def test_the_table_holds_every_attack():
    public = {
        name
        for name, value in vars(attacks).items()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and hasattr(value, "run")
    }
    assert public == SMALL.keys()
    assert {name for _, name, _ in EVERY_PROTOCOL} == PROTOCOLS.keys()


def nan_or_inf(images):
    """NaN for one image, inf or -inf for others."""
    shade = tf.argmax(images[:, 0, :3, 0], axis=1)[:, None]
    broken = [network(images) for network in BROKEN.values()]
    return tf.where(shade == 0, broken[0], tf.where(shade == 1, broken[1], broken[2]))


@each_attack
def test_no_image_is_robust_where_logits_are_not_finite(name):
    network, attack = nan_or_inf, attack_of(name)
    logits = network(IMAGES).numpy()
    assert np.isnan(logits).any() and np.isposinf(logits).any() and np.isneginf(logits).any()
    found, findings = quietly(network, {name: attack}, IMAGES, LABELS, batch_size=3)
    assert not found.clean.any() and not found.robust.any()
    assert findings["not_finite"].value == len(IMAGES)
    assert "not finite for 5 of 5 images" in findings["not_finite"].message
    assert findings.keys() <= {"not_finite", "num_targets"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        result = attack.run(network, IMAGES, LABELS, seed=0)
    assert result.fooled.all()
    assert np.isfinite(result.adversarial).all()


@each_protocol
def test_no_image_is_robust_under_any_protocol_where_logits_are_not_finite(family, protocol):
    cases = protocol_attacks(protocol, CHALLENGES[family])
    upper = next(iter(cases.values())).threat.upper
    found, findings = quietly(nan_or_inf, cases, upper * IMAGES, LABELS)
    assert not found.robust.any()
    assert findings["not_finite"].value == len(IMAGES)


SEARCHES = ["APGD", "DDN", "FABTargeted", "FMN", "MinimumNorm", "PGD", "SPSA", "Square"]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_network_that_breaks_down_beside_the_image_is_fooled_by_valid_images(name):
    """NaN, and NaN gradients, for every pixel above 1/2 but those of the image itself."""

    def network(images):
        is_clean = tf.reduce_all(images[:, None] == IMAGES[None], axis=(2, 3, 4))
        logits = linear(images) + tf.sqrt(0.5 - images[:, 0, 0, :])
        return tf.where(tf.reduce_any(is_clean, axis=1)[:, None], 9 * linear(images), logits)

    found, findings = quietly(network, {name: attack_of(name)}, IMAGES, LABELS)
    assert found.clean.all()
    assert np.isfinite(found.adversarial).all()
    broken = ~np.isfinite(network(found.adversarial).numpy()).all(axis=1)
    assert not (found.robust & broken).any()
    if broken.any():
        assert findings["not_finite"].value == broken.sum()


def without_gradients_255(images):
    return without_gradients(images / 255)


ROUNDED = np.argmax(without_gradients(IMAGES).numpy(), axis=-1)


@each_attack
def test_vanishing_gradients_are_noticed_whatever_the_attack(name):
    attack = attack_of(name)
    # To trace them all would take a minute; the network is looked at before any attack runs.
    labels = ROUNDED if name in ("PGD", "Square") else (ROUNDED + 1) % NUM_CLASSES
    with pytest.warns(AttackWarning, match="the gradient vanishes for 5 of 5 images"):
        found = evaluate(without_gradients, {name: attack}, IMAGES, labels)
    names = [finding.name for finding in found.findings]
    assert names.count("zero_gradients") == 1
    assert found.forwards == found.cost_of_checks[0] + found.records[name].forwards
    assert found.cost_of_checks == (5 * 7, 5 * 2)


@each_protocol
def test_vanishing_gradients_are_noticed_under_every_protocol(family, protocol):
    cases = protocol_attacks(protocol, CHALLENGES[family])
    upper = next(iter(cases.values())).threat.upper
    network = {1.0: without_gradients, 255.0: without_gradients_255}[upper]
    _, findings = quietly(network, cases, upper * IMAGES, (ROUNDED + 1) % NUM_CLASSES)
    assert findings["zero_gradients"].value == len(IMAGES)


@each_attack
def test_a_tie_counts_as_fooled(name):
    attack = attack_of(name)
    found, _ = quietly(tied, {name: attack}, IMAGES, LABELS)
    assert not found.clean.any() and not found.robust.any()


@each_protocol
def test_a_tie_counts_as_fooled_under_every_protocol(family, protocol):
    cases = protocol_attacks(protocol, CHALLENGES[family])
    upper = next(iter(cases.values())).threat.upper
    found, _ = quietly(tied, cases, upper * IMAGES, LABELS)
    assert not found.clean.any() and not found.robust.any()


def test_a_constant_decision_is_robust_for_its_class():
    def network(images):
        return tf.one_hot(tf.zeros_like(tf.reduce_sum(images, (1, 2, 3)), tf.int32), 4) * 0.7 + 0.1

    labels = np.array([0, 1, 0, 2, 3])
    found, findings = quietly(network, {"pgd": attacks.PGD(THREAT, num_steps=2)}, IMAGES, labels)
    np.testing.assert_array_equal(found.robust, labels == 0)
    assert findings["zero_gradients"].value == 5


NAN, INF = np.nan, np.inf
ROWS = [
    ([NAN, 1, 2, 3], True),
    ([3, 1, 2, NAN], True),
    ([INF, 1, 2, 3], True),
    ([3, 1, 2, -INF], True),
    ([-INF, 1, 2, 3], True),
    ([3, 1, INF, -INF], True),
    ([3, 1, 2, 3], True),
    ([3, 1, 2, 2.9], False),
    ([3e38, -3e38, 1, 1], False),
]


@pytest.mark.parametrize(("logits", "expected"), ROWS)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_eager_compiled_and_numpy_verdicts_agree(dtype, logits, expected):
    logits = tf.constant([logits], dtype)
    judge = functools.partial(is_fooled, labels=[0])
    for verdict in (judge, tf.function(judge), tf.function(judge, jit_compile=True)):
        assert bool(verdict(logits)[0]) == expected
    assert (not clean_margin(logits.numpy(), np.array([0]))[0] > 0) == expected
    assert not np.isnan(margin(logits, [0]).numpy()).any()

    def network(images):
        return tf.repeat(logits, tf.shape(images)[0], axis=0)

    decided = Classifier().judge(network, IMAGES[:1], np.array([0]))
    assert decided.fooled[0] == expected
    assert (decided.prediction[0] == -1) == (not np.isfinite(logits.numpy()).all())


def test_predictions_where_logits_are_not_finite_are_no_class():
    assert set(predict(with_nan_weights, IMAGES)) == {-1}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_audit_refutes_a_broken_network_and_names_the_cause():
    found = audit(nan_or_inf, THREAT, IMAGES, LABELS, claim=90.0)
    assert found.verdict == "REFUTED" and not found.worst_case.robust.any()
    (squeeze,) = (test for test in found.tests if test.number == 6)
    assert "the logits of 5 of 5 clean images are not finite" in squeeze.reason


def test_curves_of_a_broken_network_are_zero():
    few = CurveSettings(
        THREAT,
        epsilon_factors=(1.0,),
        num_targets=1,
        step_factors=(0.5,),
        num_steps=(2,),
        num_restarts=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        curves = few.run(with_nan_weights, IMAGES, LABELS, num_classes=NUM_CLASSES)
    assert not curves.epsilon.correct.any()
    assert not curves.grid.correct.any()
    assert not curves.restarts.correct.any()


# What default PGD says nothing of, and the loss that it follows.
MISLEADING = {
    "hot": (lambda x: 1000 * linear(x), "zero_gradients", "(xent)"),
    "rounded": (lambda x: linear(tf.round(255 * x) / 255), "zero_gradients", "(xent)"),
    "softmax": (lambda x: tf.nn.softmax(linear(x)), "probabilities", "without its softmax"),
    "per cent": (lambda x: 100 * tf.nn.softmax(9 * linear(x)), "probabilities", "its softmax"),
    "one-hot": (
        lambda x: tf.one_hot(tf.argmax(linear(x), axis=-1), NUM_CLASSES),
        "decisions",
        "one-hot decisions",
    ),
    "random": (lambda x: linear(x) + tf.random.normal((), stddev=0.1), "randomised", "differ"),
}


@pytest.mark.parametrize(("network", "name", "message"), MISLEADING.values(), ids=MISLEADING)
def test_what_misleads_the_default_attack_is_noticed_once(network, name, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttackWarning)
        found = evaluate(network, {"pgd": attacks.PGD(THREAT)}, IMAGES, LABELS)
    noticed = [w.message.finding for w in caught if isinstance(w.message, AttackWarning)]
    assert tuple(noticed) == found.findings
    (finding,) = (finding for finding in found.findings if finding.name == name)
    assert message in finding.message
    result = build_result(
        found,
        {"p": {"pgd": attacks.PGD(THREAT)}},
        dataset="made-up",
        settings={},
        seed=0,
    )
    assert {"name": name, "message": finding.message, "value": finding.value} in result["notices"]


def test_a_sound_network_has_no_notice_and_the_margin_is_not_blamed_for_hot_logits():
    pgd = {"pgd": attacks.PGD(THREAT, num_steps=2)}
    assert quietly(linear, pgd, IMAGES, LABELS)[1] == {}
    margin_pgd = {"pgd": attacks.PGD(THREAT, "cw", num_steps=2)}
    assert quietly(lambda x: 1000 * linear(x), margin_pgd, IMAGES, LABELS)[1] == {}


def test_checks_run_once_and_not_again_in_a_cascade():
    small = attacks.AutoAttack(THREAT, num_targets=1, num_steps=2, num_queries=2)
    cases = {"one": small, "two": dataclasses.replace(small, num_queries=3)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttackWarning)
        found = evaluate(without_gradients, cases, IMAGES, (ROUNDED + 1) % NUM_CLASSES)
    names = [w.message.finding.name for w in caught if isinstance(w.message, AttackWarning)]
    assert names == [finding.name for finding in found.findings] == ["zero_gradients"]


@pytest.mark.parametrize(("policy", "norm"), [("float16", "linf"), ("mixed_float16", "l2")])
def test_attacks_follow_float16_networks_where_their_gradients_would_be_lost(policy, norm):
    def network(dtype):
        keras.utils.set_random_seed(0)
        layers = [
            keras.Input(SHAPE),
            keras.layers.Conv2D(4, 3, activation="relu", dtype=dtype),
            keras.layers.Flatten(dtype=dtype),
            keras.layers.Dense(NUM_CLASSES, dtype=dtype),
        ]
        return keras.Sequential(layers)

    wide, half = network("float32"), network(policy)
    # So sure that a gradient of the cross-entropy is below the smallest float16.
    kernel, bias = wide.layers[-1].get_weights()
    wide.layers[-1].set_weights([200 * kernel, 200 * bias])
    half.set_weights(wide.get_weights())
    images = np.random.default_rng(2).uniform(size=(40, *SHAPE)).astype(np.float32)
    labels = np.argmax(wide(images).numpy(), axis=-1)
    threat = ThreatModel(norm, {"linf": 0.1, "l2": 0.6}[norm])
    attack = attacks.PGD(threat, num_steps=10, step_size=threat.epsilon / 4)
    expected = attack.run(wide, images, labels, seed=0).fooled.mean()
    assert expected > 0.5
    for given in (half, lambda x: tf.cast(half(x, training=False), tf.float32)):
        found = attack.run(given, images, labels, seed=0).fooled.mean()
        assert found == pytest.approx(expected, abs=0.1)


def outputs(build):
    image = keras.Input(SHAPE)
    logits = keras.layers.Dense(NUM_CLASSES, name="logits")(keras.layers.Flatten()(image))
    network = keras.Model(image, build(logits))
    network.get_layer("logits").set_weights([WEIGHTS, -0.5 * WEIGHTS.sum(axis=0)])
    return network


ONE_OUTPUT = {
    "dictionary": outputs(lambda z: {"digits": z}),
    "list": outputs(lambda z: [z]),
    "tuple": lambda x: (linear(x),),
    "nested": lambda x: {"out": [linear(x)]},
    "float64": lambda x: tf.cast(linear(x), tf.float64),
    "bfloat16": lambda x: tf.cast(64 * linear(x), tf.bfloat16),
}


@pytest.mark.parametrize("network", ONE_OUTPUT.values(), ids=ONE_OUTPUT)
def test_one_output_is_the_logits_in_whatever_it_comes(network):
    small = {"pgd": attacks.PGD(THREAT, "cw", num_steps=2, step_size=0.1)}
    expected, _ = quietly(linear, small, IMAGES, LABELS)
    found, _ = quietly(network, small, IMAGES, LABELS)
    np.testing.assert_array_equal(found.robust, expected.robust)


def in_numpy(images):
    return np.asarray(images).reshape(-1, 64) @ WEIGHTS


REFUSED = {
    "two outputs": (
        outputs(lambda z: {"a": z, "b": z}),
        r"got 2 outputs \(a, b\): pass .*\['a'\]",
    ),
    "pair": (lambda x: (linear(x), linear(x)), r"got 2 outputs: pass .*\[0\]"),
    "numpy": (in_numpy, "must be written in TensorFlow.*tf.numpy_function"),
    "python": (lambda x: linear(x) if x[0, 0, 0, 0] > 0 else 0, "must be written in TensorFlow"),
    "one row": (lambda x: linear(x)[:1], "a row of logits for each image; it returns 1 "),
    "two rows each": (
        lambda x: tf.repeat(linear(x), 2, axis=0),
        "it returns (4 for 2|10 for 5) images",
    ),
    "ragged": (lambda x: tf.RaggedTensor.from_tensor(linear(x)), "got a RaggedTensor"),
    "complex": (lambda x: tf.cast(linear(x), tf.complex64), "real numbers; got complex64"),
    "one class": (lambda x: linear(x)[:, :1], r"K >= 2; got shape \(None, 1\)"),
    "images": (lambda x: x, r"\(N, K\) logits"),
}


@pytest.mark.parametrize(("network", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["PGD", "Square"])
def test_what_gives_no_logits_is_refused_in_one_line(name, network, message):
    attack = attack_of(name)
    for call in (
        lambda: attack.run(network, IMAGES, LABELS, seed=0),
        lambda: evaluate(network, {name: attack}, IMAGES, LABELS),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Square", "SPSA", "PGD"])
def test_numpy_behind_tensorflow_is_attacked_without_gradients(name):
    def wrapped(images):
        return tf.numpy_function(lambda x: in_numpy(x - 0.5), [images], tf.float32)

    attack = {name: attack_of(name)}
    found, findings = quietly(wrapped, attack, IMAGES, LABELS)
    assert findings["zero_gradients"].value == 5
    if name != "PGD":
        np.testing.assert_array_equal(
            found.robust, quietly(linear, attack, IMAGES, LABELS)[0].robust
        )


BAD_LABELS = {
    "above": (LABELS + np.array([0, 0, 9, 9, 0]), r"0 to 3, .* 4 classes; label 2 is .*\(2 such"),
    "below": (np.where(np.arange(5) == 4, -1, LABELS), "label 4 is -1"),
    "one-hot": (np.eye(4, dtype=int)[LABELS], r"labels.argmax\(axis=1\)"),
    "one-hot float": (np.eye(4)[LABELS], r"labels.argmax\(axis=1\)"),
    "float": (LABELS.astype(np.float32), "must be integers.*float32"),
    "too few": (LABELS[:3], r"labels must be \(5,\) integers"),
}


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
@each_attack
def test_labels_that_are_no_classes_are_refused(name, labels, message):
    attack = attack_of(name)
    with pytest.raises(ValueError, match=message):
        attack.run(linear, IMAGES, labels, seed=0)


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_are_no_classes_are_refused_by_whoever_judges(labels, message):
    pgd = attacks.PGD(THREAT, num_steps=1)
    for call in (
        lambda: evaluate(linear, {"pgd": pgd}, IMAGES, labels),
        lambda: losses_over_restarts(linear, pgd, IMAGES, labels, num_restarts=1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["PGD", "Square", "Restarts", "FAB"])
def test_labels_in_a_column_are_as_good(name):
    attack = {name: attack_of(name)}
    column, _ = quietly(linear, attack, IMAGES, LABELS[:, None].astype(np.uint8))
    plain, _ = quietly(linear, attack, IMAGES, LABELS)
    np.testing.assert_array_equal(column.adversarial, plain.adversarial)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("protocol", ANY_THREAT)
def test_protocols_for_any_threat_model_take_few_classes_and_say_what_they_leave_out(
    protocol, num_classes, tmp_path
):
    image = keras.Input(SHAPE)
    logits = keras.layers.Dense(num_classes)(keras.layers.Flatten()(image))
    network = keras.Model(image, logits)
    labels = np.argmax(network(IMAGES).numpy(), axis=-1)
    cases = {protocol: any_threat_attacks(protocol, THREAT, num_classes)}
    # Nothing stands, so that nothing takes time.
    test = evaluations.TestImages("made-up", IMAGES, (labels + 1) % num_classes, (0.0, 1.0))
    _, result = evaluations.evaluate_protocols(
        network, test, cases, tmp_path, batch_size=5, seed=0, settings={}, show_progress=False
    )
    messages = {entry["name"]: entry["message"] for entry in result["notices"]}
    # AutoAttack's version for randomised networks has no targets.
    left_out = "apgd-dlr" if protocol == "autoattack-rand" else "apgd-t"
    if protocol == "autoattack-rand" and num_classes == 3:
        assert "num_classes" not in messages
    else:
        assert f"{left_out} is not defined and left out" in messages["num_classes"]
    assert read_ledger(tmp_path)[1]["notices"] == result["notices"]
