"""Randomised networks: averaged gradients, verdicts over repeated passes, and the hook for BPDA."""

import csv
import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import command

from logit_reg import (
    APGD,
    FAB,
    PGD,
    AttackWarning,
    AutoAttack,
    Restarts,
    Square,
    ThreatModel,
    evaluate,
)
from logit_reg.attacks.engine.checks import check_network
from logit_reg.attacks.engine.forward import call_logits, clean_logits
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.attacks.engine.low_precision import LowPrecision
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses, repeated
from logit_reg.evaluation.run import NUM_VERDICT_PASSES
from logit_reg.evaluation.state import EvaluationState

THREAT = ThreatModel("linf", 0.1)
SHAPE, NUM_CLASSES = (8, 8, 1), 4
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(64, NUM_CLASSES)).astype(np.float32)
IMAGES = RNG.uniform(size=(12, *SHAPE)).astype(np.float32)


def linear(images):
    return (tf.reshape(images, (-1, 64)) - 0.5) @ WEIGHTS


LABELS = linear(IMAGES).numpy().argmax(axis=-1)


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        found = evaluate(*arguments, **{"with_checks": False} | options)
    return found, {finding.name: finding for finding in found.findings}


def small(*layers):
    return keras.Sequential(
        [keras.Input(SHAPE), *layers, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)]
    )


def monte_carlo_dropout():
    """A functional model that is random in evaluation, too, as its file is."""
    images = keras.Input(SHAPE)
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(images), training=True)
    return keras.Model(images, keras.layers.Dense(NUM_CLASSES)(x))


def training_mode(network):
    return lambda images: network(images, training=True)


def nested():
    images = keras.Input(SHAPE)
    return keras.Model(images, small(keras.layers.GaussianNoise(0.5))(images, training=True))


def with_generator():
    generator = keras.random.SeedGenerator(3)

    def network(images):
        return linear(images + keras.random.normal(tf.shape(images)[1:], seed=generator))

    return network


RANDOM = {
    "tf.random": lambda: lambda x: linear(x) + tf.random.normal(tf.shape(linear(x))),
    "op seed": lambda: lambda x: linear(x) * tf.random.uniform((), seed=5),
    "Dropout called in training": lambda: training_mode(small(keras.layers.Dropout(0.5, seed=1))),
    "GaussianNoise called in training": lambda: training_mode(
        small(keras.layers.GaussianNoise(0.5))
    ),
    "functional model of its own": monte_carlo_dropout,
    "nested model": nested,
    "seed generator": with_generator,
    "numpy function": lambda: (
        lambda x: (
            linear(x)
            + tf.numpy_function(lambda: np.float32(np.random.normal(size=4)), [], tf.float32)
        )
    ),
}


class Cycle:
    """A network whose logits take the factors 1, 2, 3, 1, ... pass by pass."""

    def __init__(self):
        self.count = tf.Variable(0)

    def __call__(self, images):
        factor = tf.cast(self.count.assign_add(1) - 1, tf.float32) % 3 + 1
        return factor * linear(images)


def xent(logits):
    return attack_loss("xent", logits, LABELS)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_are_averaged_each_at_its_own_logits(is_compiled):
    def look():
        return logits_and_gradient(RepeatedPasses(Cycle(), 3), tf.constant(IMAGES), xent)

    cycle = RepeatedPasses(Cycle(), 3)
    if is_compiled:
        look = tf.function(lambda: logits_and_gradient(cycle, tf.constant(IMAGES), xent))
    logits, gradient = look()
    ones = [
        logits_and_gradient(lambda x, k=k: k * linear(x), tf.constant(IMAGES), xent)
        for k in (1, 2, 3)
    ]
    np.testing.assert_allclose(gradient, np.mean([g for _, g in ones], axis=0), atol=1e-6)
    _, of_mean = logits_and_gradient(lambda x: 2 * linear(x), tf.constant(IMAGES), xent)
    assert np.abs(gradient - of_mean).max() > 1e-3
    probabilities = np.mean([tf.nn.softmax(logits) for logits, _ in ones], axis=0)
    np.testing.assert_allclose(np.exp(logits), probabilities, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_a_compiled_network_draws_anew_in_each_pass(name):
    network = RANDOM[name]()
    single = np.stack([clean_logits(network, IMAGES) for _ in range(8)])
    assert single.std(axis=0).max() > 1e-3

    def one_pass(images):
        logits = call_logits(network, images)
        return logits, logits, tf.square(logits)

    def variance(images):
        """Of two passes within one call of a compiled loop."""
        _, mean, square = RepeatedPasses(network, 2).average(lambda: one_pass(images))
        return square - tf.square(mean)

    assert tf.function(variance)(tf.constant(IMAGES)).numpy().max() > 1e-3
    means = np.stack(
        [tf.nn.softmax(clean_logits(RepeatedPasses(network, 50), IMAGES)) for _ in range(8)]
    )
    spread = tf.nn.softmax(single).numpy().std(axis=0).mean()
    assert means.std(axis=0).mean() < 0.4 * spread


def test_a_network_is_told_to_be_random_and_what_to_do():
    (finding,) = check_network(RANDOM["tf.random"](), THREAT, IMAGES, LABELS)
    assert finding.name == "randomised"
    assert "--eot=20" in finding.message and "--protocol=autoattack-rand" in finding.message


@pytest.mark.parametrize("for_randomised", [False, True])
def test_random_numbers_of_python_that_a_trace_freezes_are_told(for_randomised):
    def frozen(images):
        return linear(images) * np.random.uniform(size=NUM_CLASSES).astype(np.float32)

    found = check_network(frozen, THREAT, IMAGES, LABELS, for_randomised=for_randomised)
    assert [finding.name for finding in found] == ["frozen"]


def test_passes_that_are_all_the_same_are_told():
    network = small(keras.layers.Dropout(0.5))
    labels = network(IMAGES).numpy().argmax(axis=1)
    attacks = {"pgd": PGD(THREAT, num_steps=2)}
    _, findings = quietly(network, attacks, IMAGES, labels, eot=2, with_checks=True)
    assert "training=True" in findings["not_randomised"].message


def flipping(images):
    """Right in most passes where the first pixel is dark, in a third of them where it is bright."""
    is_bright = images[:, 0, 0, 0] > 0.5
    flips = tf.random.uniform(tf.shape(is_bright)) < tf.where(is_bright, 0.7, 0.1)
    logits = tf.one_hot(LABELS[0], NUM_CLASSES) + 1e-3 * linear(images)
    return tf.where(flips[:, None], tf.roll(logits, 1, axis=1), logits)


def test_most_passes_decide_and_the_share_is_reported():
    images = IMAGES.copy()
    images[:, 0, 0, 0] = np.arange(12) % 2
    labels = np.full(12, LABELS[0])
    tf.random.set_seed(0)
    found, findings = quietly(
        flipping, {"pgd": PGD(ThreatModel("linf", 1e-3), num_steps=2)}, images, labels, eot=8
    )
    assert found.clean.tolist() == found.robust.tolist() == [True, False] * 6
    assert abs(found.share_right[::2].mean() - 0.9) < 0.1
    assert abs(found.share_right[1::2].mean() - 0.3) < 0.15
    assert findings["repeated_passes"].value == pytest.approx(found.share_right.mean())
    passes = NUM_VERDICT_PASSES * found.share_right
    np.testing.assert_allclose(passes, passes.round(), atol=1e-9)
    record = found.records["pgd"]
    # What is returned is judged by passes of its own.
    assert (record.forwards, record.backwards) == (8 * 6 * (3 + 1), 8 * 6 * 2)


def masked(images):
    """A linear network whose gradient drowns in noise that is drawn for each pass."""
    noise = tf.random.normal(tf.shape(images), stddev=6.0)
    through = tf.reduce_sum((images - tf.stop_gradient(images)) * noise, axis=(1, 2, 3))
    return (
        linear(images) + through[:, None] * tf.one_hot(LABELS, NUM_CLASSES)[: tf.shape(images)[0]]
    )


def test_averaging_finds_what_one_pass_misses():
    attacks = {"pgd": PGD(ThreatModel("linf", 0.02), "cw", num_steps=6, step_size=0.01)}
    tf.random.set_seed(0)
    single, _ = quietly(masked, attacks, IMAGES, LABELS)
    averaged, _ = quietly(masked, attacks, IMAGES, LABELS, eot=60)
    clear, _ = quietly(linear, attacks, IMAGES, LABELS)
    assert clear.robust.sum() <= averaged.robust.sum() < single.robust.sum()


@pytest.mark.parametrize(
    "attack",
    [FAB(THREAT, num_steps=3), Square(THREAT, num_queries=5), APGD(THREAT, "dlr", 4, 2)],
    ids=lambda attack: type(attack).__name__,
)
def test_every_kind_of_attack_takes_repeated_passes(attack):
    found, _ = quietly(linear, {"it": attack}, IMAGES, LABELS, eot=3)
    once, _ = quietly(linear, {"it": attack}, IMAGES, LABELS)
    # The same network in every pass: the same verdicts.
    assert found.robust.tolist() == once.robust.tolist()
    assert set(found.share_right[found.robust]) <= {1.0}


DIFFERENCE = WEIGHTS[:, 1] - WEIGHTS[:, 0]
NUM_MANY = 60
MANY = np.random.default_rng(1).uniform(0.2, 0.8, (NUM_MANY, *SHAPE)).astype(np.float32)
PLAIN = linear(MANY).numpy()[:, :2]
DUALS = {"linf": np.abs(DIFFERENCE).sum(), "l1": np.abs(DIFFERENCE).max()}


@pytest.mark.parametrize(
    ("norm", "make", "eot"),
    [
        ("linf", lambda t: PGD(t, num_steps=20, step_size=t.epsilon / 12), 8),
        ("linf", lambda t: PGD(t, num_steps=20, step_size=t.epsilon / 12, early_stop=True), 8),
        ("linf", lambda t: Restarts(PGD(t, num_steps=20, step_size=t.epsilon / 12), 2), 8),
        ("linf", lambda t: AutoAttack(t, "rand", num_steps=10), 1),
        ("l1", lambda t: AutoAttack(t, "rand", num_steps=20), 1),
        pytest.param("linf", lambda t: FAB(t, num_steps=5), 8, marks=pytest.mark.slow),
    ],
    ids=["pgd", "early stop", "restarts", "rand", "rand in l1", "fab"],
)
def test_a_noisy_linear_network_keeps_no_more_than_its_closed_form(norm, make, eot):
    """Two classes with noise: right in most passes if the margin is above what epsilon takes."""

    def noisy(images):
        logits = linear(images)[:, :2]
        return logits + tf.random.normal(tf.shape(logits), stddev=0.3)

    margins = np.abs(PLAIN[:, 1] - PLAIN[:, 0])
    epsilon = float(np.quantile(margins, 0.6) / DUALS[norm])
    threat = ThreatModel(norm, epsilon)
    exact = (margins > epsilon * DUALS[norm]).mean()
    tf.random.set_seed(0)
    found, findings = quietly(noisy, {"it": make(threat)}, MANY, PLAIN.argmax(axis=1), eot=eot)
    assert 0.3 < exact < 0.5
    assert found.robust.mean() <= exact + 0.05
    unconfirmed = findings["unconfirmed"].value if "unconfirmed" in findings else 0
    assert unconfirmed <= found.records["it"].unconfirmed


def test_an_interrupted_randomised_evaluation_goes_on_with_the_same_verdicts(tmp_path):
    class Fragile(EvaluationState):
        num_left = 4

        def save(self, description, arrays):
            if not self.num_left:
                raise KeyboardInterrupt
            self.num_left -= 1
            super().save(description, arrays)

    network, names = RANDOM["tf.random"](), ("one", "two")
    # The second attacks what is left of the first.
    attacks = {
        name: PGD(ThreatModel("linf", 0.02), num_steps=2 + i) for i, name in enumerate(names)
    }
    options = {"eot": 2, "batch_size": 4, "worst_case_only": True}
    with pytest.raises(KeyboardInterrupt):
        quietly(network, attacks, IMAGES, LABELS, state=Fragile(tmp_path, "key"), **options)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    state = EvaluationState(tmp_path, "key")
    found, _ = quietly(network, attacks, IMAGES, LABELS, state=state, **options)
    assert len(kept) == 4 and all(path.read_bytes() == held for path, held in kept.items())
    num_files = len(list(tmp_path.glob("*.npz")))
    again, _ = quietly(network, attacks, IMAGES, LABELS, state=state, **options)
    assert len(list(tmp_path.glob("*.npz"))) == num_files
    for name in ("robust", "clean", "share_right", "adversarial"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_a_lower_precision_is_left_out_of_repeated_passes():
    network = small(keras.layers.Flatten(), keras.layers.Dense(8))
    low = bfloat16_stand_in(network)
    judging, followed = repeated((network, low), 4)
    assert followed is judging
    assert repeated((network, low), 1) == (network, low)
    assert repeated((network, linear), 4)[1].logits_fn is linear


def bfloat16_stand_in(network):
    """A `LowPrecision` whose agreement nobody measured."""
    low = object.__new__(LowPrecision)
    low._network, low.tolerance = network, 0.1
    return low


def test_the_version_for_randomised_networks_decides_by_repeated_passes():
    network = RANDOM["tf.random"]()
    rand = AutoAttack(THREAT, "rand", num_steps=3)
    found, findings = quietly(network, {"autoattack-rand": rand}, IMAGES, LABELS, with_checks=True)
    assert found.share_right is not None and "repeated_passes" in findings
    assert "randomised" not in findings and "not_randomised" not in findings


@pytest.mark.parametrize("eot", [0, -1])
def test_an_impossible_number_of_passes_is_refused(eot):
    with pytest.raises(ValueError, match=f"eot must be at least 1; got {eot}"):
        evaluate(linear, {"pgd": PGD(THREAT)}, IMAGES, LABELS, eot=eot)


def test_what_is_followed_is_what_is_checked_for_vanishing_gradients():
    def quantised(images):
        return linear(tf.round(images * 16) / 16)

    def followed(images):
        return linear(images + tf.stop_gradient(tf.round(images * 16) / 16 - images))

    labels = quantised(IMAGES).numpy().argmax(axis=1)
    attacks = {"pgd": PGD(ThreatModel("linf", 0.3), "cw", num_steps=8, step_size=0.1)}
    blind, findings = quietly(quantised, attacks, IMAGES, labels, with_checks=True)
    assert "zero_gradients" in findings
    hook = {"gradient_logits_fn": followed}
    found, findings = quietly(quantised, attacks, IMAGES, labels, with_checks=True, **hook)
    assert "zero_gradients" not in findings
    assert found.robust.sum() < blind.robust.sum()
    both, _ = quietly(quantised, attacks, IMAGES, labels, eot=2, **hook)
    assert both.robust.tolist() == found.robust.tolist()
    assert both.records["pgd"].forwards == 2 * (found.records["pgd"].forwards + len(IMAGES))


@pytest.mark.slow
def test_the_command_evaluates_a_random_file_and_reports_the_share(tmp_path):
    network = monte_carlo_dropout()
    network.save(tmp_path / "mine.keras")
    labels = network(IMAGES, training=False).numpy().argmax(axis=1)
    np.savez(tmp_path / "images.npz", images=IMAGES, labels=labels)
    own = ("--model=mine.keras", "--data=images.npz", "--bounds=0,1", "--epsilon=0.05")
    done = command(
        "eval_challenge", *own, "--num_steps=2", "--eot=4", "--output_dir=out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "most of 20 passes" in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["eot"] == 4
    assert "repeated_passes" in [notice["name"] for notice in result["notices"]]
    with (tmp_path / "out" / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["share_right"]) for row in rows]
    assert result["passes"]["mean_right"] == pytest.approx(np.mean(shares))
    assert 0 < np.mean(shares) < 1
    again = command("eval_challenge", *own, "--num_steps=2", "--output_dir=out", cwd=tmp_path)
    assert again.returncode == 2 and "eot 4 -> 1" in again.stderr
