"""Networks, functions and images as other people have them: the right number, or one line."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg.attacks import PGD, AttackWarning, Square
from logit_reg.attacks.engine.checks import check_network, check_outputs
from logit_reg.audit import audit
from logit_reg.evaluation.run import evaluate, predict
from logit_reg.threat import ThreatModel

SHAPE, NUM_CLASSES = (8, 8, 1), 4
THREAT = ThreatModel("linf", 0.01)
SMALL = {"pgd": PGD(THREAT, num_steps=2, step_size=0.01)}
WEIGHTS = np.random.default_rng(0).normal(size=(64, NUM_CLASSES)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(size=(6, *SHAPE)).astype(np.float32)


def linear(images, weights=WEIGHTS):
    return (tf.reshape(images, (-1, 64)) - 0.5) @ weights


LABELS = np.argmax(linear(IMAGES).numpy(), axis=-1)


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        return evaluate(*arguments, **options)


@dataclasses.dataclass
class Defence:
    """No hash, as a dataclass that can be compared."""

    weights: np.ndarray = dataclasses.field(default_factory=WEIGHTS.copy)
    sign: float = 1.0

    def __call__(self, images):
        return self.logits(images)

    def logits(self, images):
        return self.sign * linear(images, self.weights)


def negated_number(defence):
    defence.sign = -1.0


def negated_array(defence):
    defence.weights *= -1


class Mask(keras.layers.Layer):
    """A layer of somebody's own that Keras cannot describe."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def call(self, images):
        return images * self.mask


def test_a_network_with_a_layer_that_has_no_config_is_attacked():
    inputs = keras.Input(SHAPE)
    x = Mask(np.ones(SHAPE, np.float32))(inputs)
    logits = keras.layers.Dense(NUM_CLASSES, use_bias=False)(keras.layers.Flatten()(x))
    network = keras.Model(inputs, logits)
    network.layers[-1].kernel.assign(WEIGHTS)
    with pytest.raises(NotImplementedError):
        network.get_config()
    labels = np.argmax(network(IMAGES), axis=-1)
    assert quietly(network, SMALL, IMAGES, labels).clean.all()


@pytest.mark.parametrize(
    ("part", "negate"),
    [("function", negated_array), ("object", negated_number), ("method", negated_array)],
)
def test_what_a_function_has_become_is_evaluated_not_what_it_was(part, negate):
    defence = Defence()
    network = {"function": lambda x: defence(x), "object": defence, "method": defence.logits}[part]
    assert quietly(network, SMALL, IMAGES, LABELS).clean.all()
    negate(defence)
    found = quietly(network, SMALL, IMAGES, LABELS)
    assert not found.clean.any()
    np.testing.assert_array_equal(predict(network, IMAGES), found.clean_prediction)


def test_a_network_whose_softmax_was_taken_off_is_evaluated_without_it():
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Conv2D(2, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(NUM_CLASSES, activation="softmax"),
        ]
    )
    names = []
    for _ in range(2):
        found = quietly(network, SMALL, IMAGES, LABELS)
        names.append([finding.name for finding in found.findings])
        network.layers[-1].activation = keras.activations.linear
    assert names == [["probabilities"], []]


def test_the_same_function_is_traced_once_over_evaluations():
    traces = []

    def network(images):
        traces.append(images)
        return linear(images)

    for labels in (LABELS, LABELS[::-1].copy()):
        before = len(traces)
        quietly(network, SMALL, IMAGES, labels)
    # The look at what it is now.
    assert len(traces) == before + 1


def test_a_function_without_a_hash_is_attacked():
    square = {"square": Square(THREAT, num_queries=3)}
    expected = quietly(linear, square, IMAGES, LABELS)
    found = quietly(Defence(), square, IMAGES, LABELS)
    np.testing.assert_array_equal(found.adversarial, expected.adversarial)


@pytest.mark.parametrize("thing", ["model.keras", None, tf.Module()])
def test_what_cannot_be_called_is_refused_in_one_line(thing):
    with pytest.raises(ValueError, match="must be a function from images to logits; got") as error:
        evaluate(thing, SMALL, IMAGES, LABELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_probabilities_are_told_in_any_precision(dtype, num_classes):
    logits = np.random.default_rng(2).normal(size=(50, num_classes), scale=3)
    outputs = tf.cast(tf.nn.softmax(tf.cast(logits, dtype)), tf.float32).numpy()
    assert [finding.name for finding in check_outputs(outputs)] == ["probabilities"]
    assert check_outputs(tf.cast(tf.cast(logits, dtype), tf.float32).numpy()) == []
    squashed = tf.sigmoid(tf.cast(logits, dtype))
    assert check_outputs(tf.cast(squashed, tf.float32).numpy()) == []


@pytest.mark.parametrize("batch_size", [1, 4, 200])
def test_the_checks_look_at_as_many_images_whatever_the_batch(batch_size):
    def rounded_where_dark(images):
        is_dark = tf.reduce_mean(images, axis=(1, 2, 3)) < np.median(IMAGES.mean(axis=(1, 2, 3)))
        return tf.where(is_dark[:, None], linear(tf.round(images * 255) / 255), linear(images))

    found = quietly(rounded_where_dark, SMALL, IMAGES, LABELS, batch_size=batch_size)
    (finding,) = found.findings
    assert finding.name == "zero_gradients" and "3 of 6 images" in finding.message
    assert found.cost_of_checks == (6 * 7, 6 * 2)
    with pytest.warns(AttackWarning):
        direct = evaluate(rounded_where_dark, SMALL, IMAGES, LABELS)
    assert direct.findings == found.findings
    part = {"followed": ("xent",), "batch_size": batch_size}
    assert check_network(rounded_where_dark, THREAT, IMAGES, LABELS, **part) == (finding,)


NORMALISED = (-0.1307 / 0.3081, (1 - 0.1307) / 0.3081)


@pytest.mark.parametrize("bounds", [NORMALISED, (-1 / 3, 0.7), (0.0, 255.0)])
@pytest.mark.parametrize("excess", [0.0, 1e-7])
def test_pixels_that_leave_the_bounds_by_a_rounding_are_clipped(bounds, excess):
    lower, upper = bounds
    threat = ThreatModel("linf", 0.01 * (upper - lower), lower, upper)
    images = (IMAGES - IMAGES.min()) / np.ptp(IMAGES) * (upper - lower) + lower
    images = (images * (1 + excess)).astype(np.float32)
    pgd = {"pgd": PGD(threat, num_steps=2, step_size=threat.epsilon)}
    found = quietly(linear, pgd, images, LABELS)
    assert found.adversarial.max() <= np.float32(upper)
    assert found.adversarial.min() >= np.float32(lower)


@pytest.mark.parametrize("factor", [1.0001, 255.0, np.nan, np.inf])
def test_pixels_out_of_bounds_are_refused_with_digits_that_show_it(factor):
    images = IMAGES / IMAGES.max() * np.float32(factor)
    shown = rf"images span \[\S+, ({factor:.6g}\d*|nan|inf)\], but .* bounds \[0, 1\]"
    with pytest.raises(ValueError, match=shown):
        evaluate(linear, SMALL, images, LABELS)
    with pytest.raises(ValueError, match=shown):
        audit(linear, THREAT, images, LABELS, claim=50.0)
