"""The binarisation test: read-outs whose adversarial example is known, attacks good and bad."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg.attacks import APGD, PGD, APGDTargeted, AutoAttack, RandomNoise, Restarts
from logit_reg.audit import binarization as module
from logit_reg.audit import binarization_test
from logit_reg.audit.evidence import Evidence
from logit_reg.audit.run import DIAGNOSTICS, run_test
from logit_reg.threat import ThreatModel
from madry_compat.networks import mnist_cnn, wide_resnet

THREAT = ThreatModel("linf", 8.0, 0.0, 255.0)
SMALL = {"num_inner": 99, "seed": 3, "num_draws": 0}


class Rounds(keras.layers.Layer):
    """Rounded pixels, whose gradient is zero."""

    def call(self, images):
        return tf.round(images / 4) * 4


class Reverses(keras.layers.Layer):
    """Images as they are, with a gradient that leads down."""

    def call(self, images):
        @tf.custom_gradient
        def reverse(images):
            return tf.identity(images), lambda upstream: -upstream

        return reverse(images)


def network(*first, last=()):
    """A small convolutional network with layers before the first and after the last one."""
    keras.utils.set_random_seed(0)
    layers = [
        *first,
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(6),
        *last,
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def images_of(count=12, shape=(8, 8, 3)):
    return np.random.default_rng(0).uniform(0, 255, (count, *shape)).astype(np.float32)


def pgd(**changes):
    return {"pgd": PGD(THREAT, **({"num_steps": 40, "step_size": 0.5} | changes))}


@pytest.fixture(scope="module")
def sound():
    return network()


def test_an_attack_that_works_finds_all_and_noise_and_few_steps_do_not(sound):
    attacks = pgd() | {
        "few-steps": PGD(THREAT, num_steps=3, step_size=0.1),
        "noise": RandomNoise(THREAT, num_draws=100),
    }
    found = binarization_test(sound, THREAT, attacks, images_of(), num_inner=99)
    assert found.is_set_up.all() and found.success.value == 1.0
    assert found.found_by["few-steps"].mean() < 0.5 and found.found_by["noise"].mean() < 0.5
    np.testing.assert_array_equal(found.found, found.found_by["pgd"])
    # As many draws as the costliest attack has forward passes.
    assert found.random_success.value < 0.5 and found.num_draws == 101
    assert found.forwards > 12 * 101 and found.backwards > 0


@pytest.mark.slow
def test_the_same_attack_on_a_reversed_gradient_fails():
    found = binarization_test(network(Reverses()), THREAT, pgd(), images_of(), **SMALL)
    assert found.is_set_up.all() and found.success.value < 0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inner_points_lie_inside_and_the_boundary_point_at_epsilon(norm):
    threat = ThreatModel(norm, 8.0 if norm == "linf" else 200.0, 0.0, 255.0)
    image = np.where(images_of(1)[0] < 128, 0, images_of(1)[0])
    points = module._Settings(threat, 0, 50, 0.95).points(image, 7)
    apart = threat.distance(points, np.broadcast_to(image, points.shape)).numpy()
    assert points.shape == (52, 8, 8, 3) and points.min() >= 0 and points.max() <= 255
    assert apart[0] == 0 and apart[-1] == pytest.approx(threat.epsilon, rel=1e-5)
    assert apart[1:-1].max() == pytest.approx(0.95 * threat.epsilon, rel=0.01)
    assert len(np.unique(points.reshape(52, -1), axis=0)) == 52
    again = module._Settings(threat, 0, 50, 0.95).points(image, 7)
    np.testing.assert_array_equal(points, again)
    assert not np.array_equal(points, module._Settings(threat, 1, 50, 0.95).points(image, 7))


@pytest.mark.slow
def test_l2_and_logits_of_another_scale_pass():
    threat = ThreatModel("l2", 60.0, 0.0, 255.0)
    attacks = {"pgd": PGD(threat, num_steps=40, step_size=6.0)}
    small = network(last=(keras.layers.Rescaling(1e-6),))
    assert binarization_test(small, threat, attacks, images_of(), **SMALL).success.value == 1.0


def test_features_that_say_nothing_leave_nothing_to_find():
    dead = network()
    weights, bias = dead.layers[1].get_weights()
    dead.layers[1].set_weights([0 * weights, bias - 1])
    found = binarization_test(dead, THREAT, pgd(), images_of(3), **SMALL)
    assert not found.is_set_up.any() and not found.found.any()


@dataclasses.dataclass(frozen=True)
class Counts(PGD):
    """PGD that counts how often its loss is traced."""

    def step_loss(self, step, logits, labels, loss_inputs):
        TRACES.append(step)
        return super().step_loss(step, logits, labels, loss_inputs)


TRACES: list = []


@pytest.mark.slow
def test_an_image_is_judged_by_its_own_readout_in_any_company_and_all_share_one_trace(sound):
    images = images_of()
    # Twins, whose balls are one, and neighbours, whose balls touch.
    images = np.concatenate([images, images[:2], np.clip(images[2:4] + 10, 0, 255)])
    # Too few steps to find all, so that there is something to tell apart.
    attacks = {"pgd": Counts(THREAT, num_steps=8, step_size=0.6, random_start=False)}
    TRACES.clear()
    together = binarization_test(sound, THREAT, attacks, images, **SMALL)
    traces = len(TRACES)
    alone = binarization_test(sound, THREAT, attacks, images, **SMALL, batch_size=1)
    assert len(TRACES) == 2 * traces
    assert 0 < together.found.sum() < len(images)
    np.testing.assert_array_equal(together.found, alone.found)
    np.testing.assert_array_equal(together.is_set_up, alone.is_set_up)


def nested():
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, network()(keras.layers.Rescaling(0.9)(inputs)))


def behind_a_nested_body():
    body = network()
    body = keras.Model(body.inputs, body.layers[-2].output)
    return keras.Sequential([keras.Input((8, 8, 3)), body, keras.layers.Dense(4)])


@pytest.mark.parametrize(
    ("make", "num_features"),
    [
        (network, 64),
        (nested, 64),
        (behind_a_nested_body, 64),
        (lambda: network(last=(keras.layers.Softmax(),)), 64),
        (lambda: network(last=(keras.layers.Rescaling(1e4), keras.layers.Dropout(0.5))), 64),
        (lambda: network(last=(keras.layers.Activation("linear"),)), 64),
        (mnist_cnn, 1024),
        (lambda: wide_resnet(1), 64),
    ],
)
def test_features_are_what_the_last_dense_layer_gets(make, num_features):
    model = make()
    features = module.features_of(model)
    images = images_of(3, model.input_shape[1:])
    found = features(images, training=False).numpy()
    assert found.shape == (3, num_features)
    layer = model
    while isinstance(layer, keras.Model):
        layer = next(
            part
            for part in reversed(layer.layers)
            if isinstance(part, keras.Model | keras.layers.Dense)
        )
    logits = found @ layer.kernel.numpy() + layer.bias.numpy()
    order = model(images, training=False).numpy().argsort(axis=1)
    np.testing.assert_array_equal(logits.argsort(axis=1), order)


class Own(keras.Model):
    def call(self, images):
        return images[:, 0, :5, 0]


def ends_in_a_relu():
    return network(last=(keras.layers.ReLU(),))


def ends_in_a_convolution():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(5, 3)(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda x: x[:, 0, :5, 0], "functional or Sequential Keras network only; got func"),
        (Own, "functional or Sequential Keras network with one input"),
        (ends_in_a_relu, "ends in a dense layer of logits; .* ends in .*ReLU"),
        (ends_in_a_convolution, "ends in .*GlobalAveragePooling2D"),
    ],
)
def test_without_features_the_test_is_refused_and_the_audit_skips_it_with_the_reason(make, message):
    model, images = make(), images_of(4)
    with pytest.raises(ValueError, match=message):
        binarization_test(model, THREAT, pgd(), images)
    labels = np.zeros(4, np.int64)
    evidence = Evidence(model, THREAT, images, labels, claim=0.5, budget="standard")
    record, _ = run_test(evidence, DIAGNOSTICS[34])
    assert record.status == "skipped" and "features can be cut off" in record.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inner": 0}, "num_inner must be at least 1; got 0"),
        ({"inner_radius": 1.5}, "inner_radius must be between 0 and 1; got 1.5"),
        ({"closeness": 1.0}, "closeness must be between 0 and 1"),
        ({"attacks": {}}, "at least one attack"),
        (
            {"attacks": {"far": PGD(ThreatModel("linf", 9.0, 0.0, 255.0))}},
            "far attacks in .*not wi",
        ),
        ({"images": np.zeros((0, 8, 8, 3), np.float32)}, "at least one; got float32"),
        ({"images": np.full((1, 8, 8, 3), 300, np.float32)}, "must share pixel units"),
    ],
)
def test_wrong_input_is_refused(changes, message, sound):
    arguments = {"attacks": pgd(), "images": images_of(2)} | changes
    attacks, images = arguments.pop("attacks"), arguments.pop("images")
    with pytest.raises(ValueError, match=message):
        binarization_test(sound, THREAT, attacks, images, **arguments)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (APGD(THREAT, "dlr", 20), APGD(THREAT, "xent", 20)),
        (APGDTargeted(THREAT, 9, 20), APGD(THREAT, "xent", 20)),
        (Restarts(PGD(THREAT, "dlr"), 2), Restarts(PGD(THREAT, "xent"), 2)),
        (PGD(THREAT, "cw"), PGD(THREAT, "cw")),
        (AutoAttack(THREAT), AutoAttack(THREAT)),
    ],
)
def test_attacks_on_dlr_run_on_the_cross_entropy(attack, expected):
    assert module._for_two_classes(attack) == expected


@pytest.mark.slow
def test_the_record_has_the_figure_and_judges_the_attacks_of_the_claim(monkeypatch):
    monkeypatch.setattr(module, "_NUM_INNER", 99)
    images = images_of(40)

    def record_of(model):
        labels = model(images, training=False).numpy().argmax(axis=1)
        options = {"claim": 0.5, "budget": "standard", "attacks": pgd()}
        evidence = Evidence(model, THREAT, images, labels, **options)
        return run_test(evidence, DIAGNOSTICS[34])[0]

    found = record_of(network())
    assert found.decisive and found.threshold_origin == "src"
    assert found.figure["found"]["value"] == 1.0 and found.figure["set_up"] == 40
    assert found.figure["found_by"] == {"pgd": 1.0} and found.figure["found_at_random"] < 0.5
    # Forty images are too few for the whole interval.
    assert found.status == "not_decided" and "images would decide" in found.reason
    broken = record_of(network(Rounds()))
    assert broken.status == "fail" and "at least 95 needed" in broken.reason


def test_without_a_claimed_attack_the_audit_s_own_are_judged():
    images = images_of(2)
    evidence = Evidence(network(), THREAT, images, np.zeros(2, np.int64), claim=0.5)
    assert set(module._binarization_attacks(evidence)) >= {"apgd-ce", "pgd40-xent", "pgd40-cw"}
    far = {"far": PGD(ThreatModel("linf", 9.0, 0.0, 255.0)), **pgd()}
    options = {"claim": 0.5, "attacks": far}
    evidence = Evidence(network(), THREAT, images, np.zeros(2, np.int64), **options)
    assert set(module._binarization_attacks(evidence)) == {"pgd"}
