"""Landscapes: exact planes on linear classifiers, one trace, the same arrays for the same seed."""

import dataclasses
import html
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import assert_one_line_error, command
from linear import Linear
from readable import check_html

from logit_reg.analysis.curves import CurveSettings
from logit_reg.analysis.landscape import Landscape, compare, load_comparison, save_comparison
from logit_reg.attacks import FGSM, PGD
from logit_reg.experiments.attack_choice import AttackChoice
from logit_reg.experiments.landscapes import LandscapeSettings, compute_landscape
from logit_reg.experiments.sources import find_model
from logit_reg.files import read_json, write_json
from logit_reg.messages import UsageError
from logit_reg.report.landscape_page import write_landscape_page
from logit_reg.threat import ThreatModel
from madry_compat.data import load

EPSILON = 0.02


def threat_of(norm):
    return ThreatModel(norm, EPSILON, 0.0, 1.0)


def two_classes(count=4):
    """A linear classifier of two classes, images, labels, and gradient and value of the margin."""
    linear = Linear(num_classes=2)
    images, labels = linear.images(count)
    normals = linear.weights[:, labels].T - linear.weights[:, 1 - labels].T
    flat = images.reshape(count, -1).astype(np.float64)
    offsets = linear.bias[labels] - linear.bias[1 - labels]
    return linear, images, labels, normals, (flat * normals).sum(-1) + offsets


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("direction", ["fgsm", "pgd"])
def test_the_margin_of_a_linear_classifier_is_a_plane_with_known_slopes(norm, direction):
    linear, images, labels, normals, clean = two_classes()
    threat = threat_of(norm)
    pgd = PGD(threat, num_steps=40, step_size=EPSILON) if direction == "pgd" else None
    landscape = Landscape(threat, pgd, num_points=5)

    surfaces = landscape.run(linear, images, labels, seed=0)

    dual_norm = np.abs(normals).sum(-1) if norm == "linf" else np.linalg.norm(normals, axis=-1)
    a = surfaces.coordinates
    along_adversarial = surfaces.margin[:, 2, :]
    np.testing.assert_allclose(
        along_adversarial, clean[:, None] - EPSILON * dual_norm[:, None] * a, atol=1e-4
    )
    # A plane: the value at (a, b) is the sum of its two axes less the value at the image.
    along_random = surfaces.margin[:, :, 2]
    np.testing.assert_allclose(
        surfaces.margin,
        along_adversarial[:, None, :] + along_random[:, :, None] - clean[:, None, None],
        atol=1e-4,
    )
    if norm == "l2":
        # At a right angle to the gradient nothing changes.
        np.testing.assert_allclose(along_random, np.repeat(clean[:, None], 5, axis=1), atol=1e-4)


def test_a_random_direction_in_linf_is_made_of_fair_coins():
    """On a network whose margin is one pixel, the slope along b is that pixel's sign."""
    weights = np.zeros((16, 2), np.float32)
    weights[5, 0] = 1.0
    images = np.full((400, 4, 4, 1), 0.5, np.float32)
    labels = np.zeros(400, np.int64)

    surfaces = Landscape(threat_of("linf"), num_points=3, extent=1.0).run(
        lambda images: tf.reshape(images, (-1, 16)) @ weights, images, labels, seed=0
    )

    slopes = (surfaces.margin[:, 2, 1] - surfaces.margin[:, 1, 1]) / EPSILON
    np.testing.assert_allclose(np.abs(slopes), 1, atol=1e-4)
    # Five standard deviations of 400 coins.
    assert abs(slopes.mean()) < 0.25


def test_cross_entropy_of_two_classes_is_the_softplus_of_the_negative_margin():
    linear, images, labels, *_ = two_classes()

    surfaces = Landscape(threat_of("linf"), num_points=3).run(linear, images, labels, seed=0)

    np.testing.assert_allclose(
        surfaces.cross_entropy, np.logaddexp(0, -surfaces.margin.astype(np.float64)), atol=1e-5
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_middle_is_the_image_and_the_fgsm_point_that_of_the_attack(norm):
    linear = Linear()
    images, labels = linear.images(5)
    # At the edge of the range, so that clipping matters.
    images -= images.min()
    threat = threat_of(norm)

    surfaces = Landscape(threat, num_points=5, clip=True).run(linear, images, labels, seed=0)

    flat = linear.weights.T @ images.reshape(5, -1).T
    logits = flat.T + linear.bias
    rows = np.arange(5)
    others = logits.copy()
    others[rows, labels] = -np.inf
    np.testing.assert_allclose(
        surfaces.margin[:, 2, 2], logits[rows, labels] - others.max(-1), atol=1e-5
    )
    # coordinates[3] is 1. FGSM returns the image itself where that is misclassified already.
    is_right = surfaces.margin[:, 2, 2] > 0
    attacked = FGSM(threat).run(linear, images, labels, seed=0).adversarial
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, linear(attacked))
    assert is_right.any()
    np.testing.assert_allclose(
        surfaces.cross_entropy[is_right, 2, 3], losses.numpy()[is_right], atol=1e-5
    )


def test_without_a_gradient_the_adversarial_axis_is_flat():
    def constant_in_the_image(images):
        return tf.stop_gradient(tf.reshape(images, (-1, 16))[:, :2])

    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 1)).astype(np.float32)

    surfaces = Landscape(threat_of("linf"), num_points=5).run(
        constant_in_the_image, images, np.zeros(2, np.int64), seed=0
    )

    assert (np.ptp(surfaces.margin, axis=2) == 0).all()
    assert (np.ptp(surfaces.margin, axis=1) > 0).any()


def test_neither_batches_nor_neighbours_change_an_example():
    linear = Linear()
    images, labels = linear.images(7)
    landscape = Landscape(threat_of("linf"), PGD(threat_of("linf")), num_points=5)

    whole = landscape.run(linear, images, labels, seed=3)
    small = dataclasses.replace(landscape, batch_size=4).run(linear, images, labels, seed=3)
    one = landscape.run(linear, images[5:6], labels[5:6], seed=3, indices=[5])

    np.testing.assert_allclose(small.margin, whole.margin, atol=1e-5)
    np.testing.assert_allclose(small.cross_entropy, whole.cross_entropy, atol=1e-5)
    np.testing.assert_allclose(one.margin[0], whole.margin[5], atol=1e-5)


def test_the_network_sees_batches_of_bounded_size_in_one_trace():
    linear = Linear()
    sizes, traces = [], []

    def watched(images):
        traces.append(images.shape)
        tf.py_function(lambda size: sizes.append(int(size)), [tf.shape(images)[0]], [])
        return linear(images)

    landscape = Landscape(threat_of("linf"), num_points=5, batch_size=8)
    images, labels = linear.images(19)

    landscape.run(watched, images, labels, seed=0)
    num_traces = len(traces)
    landscape.run(watched, images[:3], labels[:3], seed=1)

    # Once for the number of classes, for the gradient and for the points.
    assert num_traces == len(traces) == 3
    # 19 images and, for 8 + 8 + 3 of them, 25 points each in batches of 8.
    assert max(sizes) == 8
    assert sum(sizes[: 3 + 25 + 25 + 10]) == 19 + 8 * (25 + 25 + 10)


def test_the_same_seed_gives_the_same_arrays_and_another_does_not():
    linear = Linear()
    images, labels = linear.images(3)
    landscape = Landscape(threat_of("l2"), num_points=5)

    first, again, other = (landscape.run(linear, images, labels, seed=s).margin for s in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    # The adversarial axis has nothing random; the rest has.
    np.testing.assert_allclose(first[:, 2], other[:, 2], atol=1e-6)
    assert not np.allclose(first, other, atol=1e-3)


# Several models


@pytest.fixture
def comparison():
    linear = Linear()
    images, labels = linear.images(6)
    networks = {"one": linear, "<two>": Linear(seed=5)}
    landscape = Landscape(threat_of("linf"), num_points=5)
    options = {"chosen": [4, 0], "seed": 2, "settings": {"dataset": "made up"}}
    return compare(landscape, networks, images, labels, num_classes=3, **options)


def test_a_comparison_averages_all_examples_and_keeps_the_chosen_ones(comparison):
    linear = Linear()
    images, labels = linear.images(6)
    surfaces = Landscape(threat_of("linf"), num_points=5).run(linear, images, labels, seed=2)

    np.testing.assert_allclose(comparison.mean_margin[0], surfaces.margin.mean(0), atol=1e-5)
    np.testing.assert_array_equal(comparison.cross_entropy[0], surfaces.cross_entropy[[4, 0]])
    assert comparison.settings["models"] == ["one", "<two>"]
    assert comparison.settings["num_examples"] == 6
    assert comparison.settings["landscape"]["threat"]["epsilon"] == EPSILON


def test_a_comparison_is_read_back_whole(comparison, tmp_path):
    save_comparison(comparison, tmp_path / "landscape.npz")

    again = load_comparison(tmp_path / "landscape.npz")

    assert again.settings == comparison.settings
    for name in ("coordinates", "mean_cross_entropy", "mean_margin", "margin", "chosen"):
        np.testing.assert_array_equal(getattr(again, name), getattr(comparison, name))


def test_files_that_do_not_fit_together_are_refused(comparison, tmp_path):
    path = tmp_path / "landscape.npz"
    save_comparison(comparison, path)
    settings = read_json(path.with_suffix(".json"))

    write_json(path.with_suffix(".json"), settings | {"models": ["one"]})
    with pytest.raises(ValueError, match=r"mean_cross_entropy has shape \(2, 5, 5\), expected"):
        load_comparison(path)
    write_json(path.with_suffix(".json"), settings | {"num_classes": "ten"})
    with pytest.raises(ValueError, match="num_classes is 'ten'"):
        load_comparison(path)
    write_json(path.with_suffix(".json"), settings | {"landscape": {"threat": {"norm": "l7"}}})
    with pytest.raises(ValueError, match="describes no landscape .*norm must be one of"):
        load_comparison(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not an .npz of plain arrays"):
        load_comparison(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extent": 0.0}, "extent must be above 0"),
        ({"num_points": 10}, "num_points must be odd"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"adversary": PGD(ThreatModel("linf", 0.5))}, "the axes have one unit"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Landscape(threat_of("linf"), **settings)


def test_an_example_that_is_not_there_is_refused():
    linear = Linear()
    images, labels = linear.images(2)

    with pytest.raises(ValueError, match="example 2 is not among the 2 images"):
        compare(
            Landscape(threat_of("linf")), {"a": linear}, images, labels, num_classes=3, chosen=[2]
        )


# The page and the command


def test_the_page_has_every_figure_and_escapes_the_names_of_models(comparison, tmp_path):
    linear = Linear()
    images, labels = linear.images(6)
    small = CurveSettings(
        threat_of("linf"),
        epsilon_factors=(1.0,),
        num_targets=1,
        step_factors=(0.5,),
        num_steps=(2,),
        num_restarts=2,
    )
    curves = {"<two>": small.run(linear, images, labels, num_classes=3)}
    assert len(curves["<two>"].restarts.survivors)

    write_landscape_page(tmp_path / "page.html", comparison, curves)

    checker = check_html(tmp_path / "page.html")
    # Map and surface of two quantities on average and for two examples; curves, map, histograms.
    assert checker.tags.count("img") == 2 * 2 * 3 + 3
    assert all(reference.startswith("data:") for reference in checker.references)
    text = (tmp_path / "page.html").read_text()
    assert "Attacks on &lt;two&gt;" in text and "<two>" not in text
    assert "image 4, n = 1" in html.unescape(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders with a linear network for MNIST each."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        inputs = keras.Input((28, 28, 1))
        network = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs)))
        (folder / name).mkdir()
        network.save(folder / name / "model.keras")
    return folder


@pytest.mark.slow
def test_the_command_compares_models_and_draws_again_from_its_arrays(models):
    flags = ["--num_eval_examples=3", "--num_points=3", "--examples=1", "--dataset=mnist_5k"]
    process = command("landscape", "--model_dir=a,b", *flags, "--output_dir=first", cwd=models)
    assert process.returncode == 0, process.stderr
    again = command("landscape", "--redraw=first/landscape.npz", "--output_dir=again", cwd=models)
    assert again.returncode == 0, again.stderr
    nowhere = command("landscape", "--redraw=nowhere.npz", cwd=models)
    assert_one_line_error(nowhere, "--redraw=nowhere.npz: no such file")

    settings = read_json(models / "first" / "landscape.json")
    assert settings["models"] == ["a", "b"]
    assert settings["num_classes"] == 10 and settings["num_examples"] == 3
    names = {path.name for path in (models / "first").iterdir()}
    figures = {f"{q}-{k}.svg" for q in ("cross_entropy", "margin") for k in ("map", "surface")}
    assert names == figures | {"landscape.npz", "landscape.json", "landscape.html"}
    for name in (*figures, "landscape.html"):
        assert (models / "again" / name).read_bytes() == (models / "first" / name).read_bytes()


def test_every_landscape_has_a_folder_of_its_own(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (find_model(models / name) for name in ("a", "b"))
    digits = load("mnist_5k", "test")
    cheap = LandscapeSettings(num_points=3, num_examples=2, chosen=(), show_progress=False)
    others = (
        ([a], {"seed": 1}),
        ([a], {"extent": 1.0}),
        ([a], {"clip": True}),
        ([a], {"attack": AttackChoice(epsilon=0.2)}),
        ([a], {"direction": "pgd", "attack": AttackChoice(num_steps=1)}),
        ([b], {}),
        ([b, a], {}),
    )

    folder, *_ = compute_landscape([a], digits, cheap)
    assert compute_landscape([a], digits, cheap)[0] == folder
    assert folder.parent == Path("runs/landscapes/a") and folder.name.startswith("fgsm-linf0.3-n2-")
    before = (folder / "landscape.npz").read_bytes()
    found = {folder}
    for chosen, changes in others:
        changed = dataclasses.replace(cheap, **changes)
        with pytest.raises(UsageError, match="->|other.*choose another --output_dir"):
            compute_landscape(chosen, digits, dataclasses.replace(changed, output_dir=folder))
        found.add(compute_landscape(chosen, digits, changed)[0])
    assert len(found) == 1 + len(others)
    assert (folder / "landscape.npz").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--redraw=nowhere.npz"], ["--model_dir has an effect only without --redraw"]),
        (["--num_steps=5"], ["--num_steps has an effect only with --direction=pgd"]),
        (["--examples=one"], ["--examples must be places of test images"]),
    ],
)
def test_mistakes_are_one_line(models, flags, words):
    process = command(
        "landscape", "--model_dir=a", "--dataset=mnist_5k", *flags, "--num_points=3", cwd=models
    )

    assert_one_line_error(process, *words)
