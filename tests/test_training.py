"""The training step: noise, augmentation, weight decay, adversaries, one trace."""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg.attacks import PGD
from logit_reg.experiments.building import build_model, build_network
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.provenance import commit
from logit_reg.experiments.runs import read_run, train_run
from logit_reg.objectives import Objective
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.free import FreeAdversary
from logit_reg.training.adversaries.pgd import PGDAdversary
from logit_reg.training.augmentation import random_crop_and_flip
from logit_reg.training.feeding import traced_train_step
from logit_reg.training.model import RegularizedModel
from madry_compat.tf1_checkpoints import load_network

THREAT = ThreatModel("linf", 0.3, 0.0, 1.0)


def small_network(dropout=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten()(keras.layers.ReLU()(x))
    if dropout:
        x = keras.layers.Dropout(0.5, seed=0)(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def small_model(optimizer=None, **settings):
    settings = {"objective": Objective(), "bounds": (0.0, 1.0)} | settings
    model = RegularizedModel(small_network(), **settings)
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1))
    return model


def some_data(count=32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    images = rng.random((count, 6, 6, 1)).astype(np.float32) * 0.3
    images[np.arange(count), labels] += 0.6
    return images, labels


class Seen(keras.layers.Layer):
    """Keeps the last images that it was shown in training mode."""

    def __init__(self, shape):
        super().__init__()
        self.images = self.add_weight(shape=shape, trainable=False)

    def call(self, images, training=None):
        if training:
            self.images.assign(images)
        return images


def model_that_remembers(batch_size=32, **settings):
    inputs = keras.Input((6, 6, 1))
    seen = Seen((batch_size, 6, 6, 1))
    network = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(seen(inputs))))
    settings = {"objective": Objective(), "bounds": (0.0, 1.0)} | settings
    model = RegularizedModel(network, **settings)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model, seen


@pytest.mark.parametrize("reg", ["squeeze", "squeeze_example"])
def test_fit_learns_and_reports_its_terms(reg):
    model = small_model(keras.optimizers.Adam(0.01), objective=Objective(reg, beta=0.1))
    history = model.fit(*some_data(96), batch_size=32, epochs=12, verbose=0).history
    assert history["accuracy"][-1] > 0.9 > history["accuracy"][0]
    total = np.array(history["xent"]) + 0.1 * np.array(history["penalty"])
    np.testing.assert_allclose(history["total"], total, rtol=1e-5)


def test_evaluate_uses_neither_noise_nor_adversary():
    adversary = PGDAdversary(PGD(THREAT, num_steps=2, step_size=0.1))
    images, labels = some_data()
    results = [
        small_model(**settings).evaluate(images, labels, verbose=0, return_dict=True)
        for settings in ({}, {"sigma": 5.0, "adversary": adversary})
    ]
    assert results[0] == results[1]


def test_noise_has_its_deviation_and_is_new_at_every_step():
    model, seen = model_that_remembers(512, sigma=0.5, clip_noise=False)
    images = np.full((512, 6, 6, 1), 0.5, np.float32)
    noises = []
    for _ in range(2):
        model.update(images, np.zeros(512, int))
        noises.append(seen.images.numpy() - images)
    assert noises[0].std() == pytest.approx(0.5, rel=0.02)
    assert abs(noises[0].mean()) < 0.01
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.03


def test_clipped_noise_stays_in_the_pixel_range():
    model, seen = model_that_remembers(sigma=0.5)
    model.update(*some_data())
    assert seen.images.numpy().min() == 0.0 and seen.images.numpy().max() == 1.0


def test_weight_decay_is_half_the_squared_norm_of_kernels_only():
    images, labels = some_data()
    plain, decayed = small_model(), small_model(weight_decay=0.5)
    kernels = [v for v in plain.network.trainable_variables if v.name == "kernel"]
    expected = 0.5 * sum(np.square(kernel.numpy()).sum() / 2 for kernel in kernels)
    difference = float(decayed.update(images, labels)["total"]) - float(
        plain.update(images, labels)["total"]
    )
    assert len(kernels) == 2
    assert difference == pytest.approx(expected, rel=1e-4)


def test_augmentation_shifts_by_at_most_two_and_flips_half():
    image = np.arange(36, dtype=np.float32).reshape(1, 6, 6, 1) + 1
    images = np.repeat(image, 400, axis=0)
    draws = np.random.default_rng(0).random((400, 3), np.float32)
    augmented = random_crop_and_flip(tf.constant(images), draws).numpy()
    padded = np.pad(image, [(0, 0), (2, 2), (2, 2), (0, 0)])[0]
    crops = {}
    for y in range(5):
        for x in range(5):
            crop = padded[y : y + 6, x : x + 6]
            crops[crop.tobytes()] = (y, x, False)
            crops[crop[:, ::-1].tobytes()] = (y, x, True)
    found = [crops[one.tobytes()] for one in augmented]
    assert len({(y, x) for y, x, _ in found}) == 25
    assert 150 < sum(flipped for _, _, flipped in found) < 250


def test_pgd_adversary_trains_on_images_inside_the_ball_that_raise_the_loss():
    model, seen = model_that_remembers(adversary=PGDAdversary(PGD(THREAT, "xent", 5, 0.1)))
    images, labels = some_data()
    clean = model.objective(model.network(images), labels).total
    adversarial = model.update(images, labels)["total"]
    distance = np.abs(seen.images.numpy() - images).max(axis=(1, 2, 3))
    assert float(adversarial) > float(clean) + 0.1
    assert 0.29 < distance.max() <= 0.3 * (1 + 1e-6)


def test_the_ramp_raises_epsilon_linearly():
    adversary = PGDAdversary(PGD(THREAT, "xent", 5, 0.1), ramp_steps=3)
    model, seen = model_that_remembers(adversary=adversary)
    images, labels = some_data()
    reached = []
    for _ in range(4):
        model.update(images, labels)
        reached.append(np.abs(seen.images.numpy() - images).max())
    np.testing.assert_allclose(reached, [0.1, 0.2, 0.3, 0.3], rtol=1e-4)


@pytest.mark.parametrize(("mode", "updates"), [("evaluation", 1), ("training", 4)])
def test_batch_norm_averages_move_with_attack_passes_only_in_training_mode(mode, updates):
    attack = PGD(THREAT, "xent", 3, 1e-9, random_start=False)
    model = small_model(keras.optimizers.SGD(0.0), adversary=PGDAdversary(attack, batch_norm=mode))
    images, labels = some_data()
    norm = model.network.get_layer("norm")
    batch_mean = model.network.get_layer("conv")(images).numpy().mean(axis=(0, 1, 2))
    model.update(images, labels)
    expected = batch_mean * (1 - 0.99**updates)
    np.testing.assert_allclose(norm.moving_mean.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_free_adversary_moves_one_persistent_perturbation_by_epsilon():
    model, seen = model_that_remembers(8, adversary=FreeAdversary(THREAT, 8))
    images, labels = some_data(8)
    assert not model.adversary_state.numpy().any()
    model.update(images, labels)
    first = model.adversary_state.numpy()
    np.testing.assert_allclose(np.abs(first), 0.3, rtol=1e-6)
    model.update(images, labels)
    # The second step trains on what the first left behind.
    np.testing.assert_allclose(seen.images.numpy(), np.clip(images + first, 0, 1), atol=1e-6)
    assert np.abs(model.adversary_state.numpy()).max() <= 0.3 * (1 + 1e-6)


def test_the_ramp_raises_the_perturbation_of_free_training_linearly():
    model, _ = model_that_remembers(8, adversary=FreeAdversary(THREAT, 8, ramp_steps=3))
    images, labels = some_data(8)
    reached = []
    for _ in range(4):
        model.update(images, labels)
        reached.append(np.abs(model.adversary_state.numpy()).max())
    np.testing.assert_allclose(reached, [0.1, 0.2, 0.3, 0.3], rtol=1e-6)


def test_free_adversary_takes_a_smaller_last_batch():
    """It moves the first images of the perturbation and leaves the others as they were."""
    model = small_model(adversary=FreeAdversary(THREAT, 8))
    images, labels = some_data(20)
    for begin in (0, 8):
        model.update(images[begin : begin + 8], labels[begin : begin + 8])
    before = model.adversary_state.numpy()
    weights = model.network.get_weights()
    model.update(images[16:], labels[16:])
    after = model.adversary_state.numpy()
    np.testing.assert_array_equal(after[4:], before[4:])
    assert (after[:4] != before[:4]).mean() > 0.1
    assert np.abs(model.network.get_weights()[0] - weights[0]).max() > 0
    with pytest.raises(ValueError, match="perturbation of 8 images; the batch has 20"):
        model.fit(images, labels, batch_size=20, verbose=0)


def plain_free_perturbation(weights, images, labels, perturbation, epsilon, gradient_of):
    """One replay of free training on a linear network, in plain numpy.

    With respect to the perturbation it is that of the authors' `free_train.py`.
    """
    kernel, bias = (np.asarray(weight, np.float64) for weight in weights)
    summed = images.astype(np.float64) + perturbation
    logits = np.clip(summed, 0, 1).reshape(len(images), -1) @ kernel + bias
    error = np.exp(logits - logits.max(-1, keepdims=True))
    error /= error.sum(-1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    gradient = (error @ kernel.T / len(labels)).reshape(images.shape)
    if gradient_of == "perturbation":
        # TensorFlow's clip lets the gradient through on the bounds themselves.
        gradient[(summed < 0) | (summed > 1)] = 0
    return np.clip(perturbation + epsilon * np.sign(gradient), -epsilon, epsilon)


@pytest.mark.parametrize("gradient_of", ["perturbation", "image"])
def test_free_adversary_moves_as_a_plain_loop_over_24_replays(gradient_of):
    """Three minibatches of eight replays each, from the same weights at every replay."""
    model, seen = model_that_remembers(8, adversary=FreeAdversary(THREAT, 8, gradient=gradient_of))
    model.compile(optimizer=keras.optimizers.SGD(0.5))
    images, labels = some_data(24)
    # Black and white pixels, where the sum leaves the range, and some between.
    images = np.clip(2 * images - 0.4, 0, 1).astype(np.float32)
    expected = np.zeros((8, 6, 6, 1))
    differ, stayed = [], []
    for replay in range(24):
        batch = slice(replay // 8 * 8, replay // 8 * 8 + 8)
        before = expected
        weights = model.network.layers[-1].get_weights()
        by_rule = {
            rule: plain_free_perturbation(weights, images[batch], labels[batch], before, 0.3, rule)
            for rule in ("perturbation", "image")
        }
        expected = by_rule.pop(gradient_of)
        (other,) = by_rule.values()
        model.update(images[batch], labels[batch])
        shown = seen.images.numpy()
        np.testing.assert_allclose(shown, np.clip(images[batch] + before, 0, 1), atol=1e-6)
        assert shown.min() >= 0 and shown.max() <= 1
        np.testing.assert_allclose(model.adversary_state.numpy(), expected, atol=1e-6)
        differ.append(np.mean(expected != other))
        stayed.append(np.mean((expected == before) & (np.abs(before) > 0)))
    assert max(differ) > 0.1, "the rule has to matter here"
    if gradient_of == "perturbation":
        # A gradient after the clip would move more of them.
        assert np.mean(stayed) > 0.1


def test_the_default_of_free_training_is_the_published_rule():
    assert FreeAdversary(THREAT, 8).gradient == "perturbation"
    with pytest.raises(ValueError, match="perturbation, image; got 'sum'"):
        FreeAdversary(THREAT, 8, gradient="sum")


def test_all_replays_of_a_minibatch_have_one_crop_and_the_next_one_another():
    adversary = FreeAdversary(ThreatModel("linf", 1e-3), 8, replays=3)
    model, seen = model_that_remembers(8, adversary=adversary, augment=True)
    images, labels = some_data(8)
    shown = []
    for _ in range(4):
        model.update(images, labels)
        shown.append(seen.images.numpy())
    assert max(np.abs(shown[0] - other).max() for other in shown[1:3]) < 0.01
    assert np.abs(shown[0] - shown[3]).max() > 0.1


def test_one_trace_after_fifty_steps():
    adversary = PGDAdversary(PGD(THREAT, num_steps=2, step_size=0.1), ramp_steps=5)
    model = small_model(objective=Objective("squeeze", beta=2.0), sigma=0.5, adversary=adversary)
    images, labels = some_data(40)
    model.optimizer.build(model.network.trainable_variables)
    step = traced_train_step(model, (images * 255).astype(np.uint8), labels, 16)
    for number in range(50):
        step(np.arange(16) + number % 8)
    assert step.experimental_get_tracing_count() == 1


def test_dropout_is_on_in_training_and_off_in_attacks():
    model = RegularizedModel(
        small_network(dropout=True),
        Objective(),
        bounds=(0.0, 1.0),
        adversary=PGDAdversary(PGD(THREAT, num_steps=2, step_size=0.1)),
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    images, labels = some_data()
    attack = PGD(THREAT, num_steps=2, step_size=0.1)
    found = [attack.run(model.network, images, labels, seed=0).adversarial for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert np.isfinite(float(model.update(images, labels)["total"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -1.0}, "sigma must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"bounds": (1.0, 0.0)}, "bounds must be increasing"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**settings)


def test_free_training_in_l2_is_refused():
    with pytest.raises(ValueError, match="defined in linf"):
        FreeAdversary(ThreatModel("l2", 1.0), 8)


@pytest.mark.slow
def test_float64_networks_train_in_float64_and_load_in_safe_mode(tmp_path):
    settings = resolve_settings(
        {
            "dataset": "mnist",
            "adversary": "pgd",
            "reg": "squeeze",
            "beta": 0.5,
            "train_dtype": "float64",
            "training_batch_size": 4,
            "max_num_training_steps": 2,
        }
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 28, 28, 1), np.uint8)
    train_run(settings, images, rng.integers(0, 10, 8), tmp_path, show_progress=False)
    with np.load(tmp_path / "state-2.npz") as state:
        arrays = [state[name] for name in state.files if state[name].dtype.kind == "f"]
    # Weights and Adam's two slots; counts and the like are integers.
    assert len(arrays) >= 8 * 3 and {array.dtype for array in arrays} <= {np.dtype("float64")}
    network = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_array_equal(network.get_weights()[0], arrays[0])
    assert network(images[:2] / 255.0).dtype == tf.float64
    # What is built afterwards is unaffected.
    assert keras.config.floatx() == "float32" and keras.layers.Dense(1).dtype == "float32"


def test_training_in_bfloat16_keeps_and_exports_float32_weights(tmp_path):
    given = {"dataset": "mnist", "reg": "squeeze", "beta": 0.5, "step_size_schedule": ((0, 1e-3),)}
    given |= {"training_batch_size": 4, "max_num_training_steps": 3, "train_dtype": "bfloat16"}
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 28, 28, 1), np.uint8), rng.integers(0, 10, 8)
    settings = resolve_settings(given)
    for name in ("bfloat16", "float32"):
        chosen = dataclasses.replace(settings, train_dtype=name)
        train_run(chosen, images, labels, tmp_path / name, show_progress=False)

    with np.load(tmp_path / "bfloat16" / "state-3.npz") as state:
        dtypes = {state[name].dtype for name in state.files if state[name].dtype.kind == "f"}
    assert dtypes == {np.dtype("float32")}
    low, high = (
        keras.saving.load_model(tmp_path / name / "model.keras", compile=False, safe_mode=True)
        for name in ("bfloat16", "float32")
    )
    assert {layer.compute_dtype for layer in low.layers} == {"float32"}
    start = build_network(settings).get_weights()
    moves = [
        np.concatenate([(w - w0).ravel() for w, w0 in zip(n.get_weights(), start, strict=True)])
        for n in (low, high)
    ]
    # Updates far below bfloat16's resolution of the weights, along those of float32.
    assert np.abs(moves[0] - moves[1]).max() > 0
    assert np.corrcoef(*moves)[0, 1] > 0.9
    # The challenge's checkpoint holds the same weights.
    other = load_network(tmp_path / "bfloat16" / "checkpoint-3")
    np.testing.assert_array_equal(other.get_weights()[0], low.get_weights()[0])


def test_penalty_and_logits_stay_in_float32():
    settings = resolve_settings(
        {"dataset": "mnist", "reg": "squeeze", "beta": 0.5, "train_dtype": "bfloat16"}
    )
    network = build_network(settings)
    model = build_model(settings, network)
    dtypes = [layer.compute_dtype for layer in model.network.layers if layer.weights]
    assert dtypes == ["bfloat16", "bfloat16", "bfloat16", "float32"]
    assert {layer.variable_dtype for layer in model.network.layers} == {"float32"}
    images = np.random.default_rng(0).random((4, 28, 28, 1), dtype=np.float32)
    logits = model.network(images)
    assert logits.dtype == tf.float32
    difference = np.abs(logits - network(images)).max()
    assert 0 < difference < 0.05 * np.abs(logits).max()


def test_settings_of_older_runs_keep_their_names_and_are_still_read():
    """A run's default folder is named after its settings: new settings must not move it."""
    settings = resolve_settings({"dataset": "mnist_5k", "reg": "squeeze", "beta": 2.0})
    assert settings.name == "mnist_5k-squeeze-beta2-noise-sigma0.5-100000steps-seed0-ac0bb8"
    other = dataclasses.replace(settings, train_dtype="float64")
    assert other.name != settings.name
    results = Path(__file__).parents[1] / "results"
    paths = list(results.glob("*/*/run.json"))
    assert paths
    for path in paths:
        assert read_run(path.parent).train_dtype == "float32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="train_dtype must be one of float32, float64, bfloat16"):
        resolve_settings({"dataset": "mnist", "train_dtype": "float16"})


def test_the_commit_of_the_code_is_known_in_a_clone():
    root = Path(__file__).resolve().parents[1]
    assert bool(commit()) == (root / ".git").exists()
