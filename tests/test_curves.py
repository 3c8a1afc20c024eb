"""Curves: closed forms on linear classifiers, where distance and reach are known exactly."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from linear import Linear

from logit_reg.analysis.curves import (
    CurveSettings,
    accuracy_against_epsilon,
    accuracy_against_steps_and_size,
    load_curves,
    losses_over_restarts,
    save_curves,
)
from logit_reg.attacks import FMN, PGD
from logit_reg.attacks.engine.attack import AttackResult
from logit_reg.attacks.minimum_norm import MinimumNorm
from logit_reg.evaluation.run import ThreatModelError
from logit_reg.files import read_json, write_json
from logit_reg.threat import ThreatModel

THREAT = ThreatModel("linf", 0.02, 0.0, 1.0)


@pytest.fixture
def linear():
    """A linear classifier of two classes, images, labels, and their exact distances."""
    linear = Linear(num_classes=2)
    # The grey image lies on the boundary: the images around it are at all distances.
    linear.bias = -0.5 * linear.weights.sum(0)
    images, labels = linear.images(12)
    # One is misclassified from the start.
    labels[3] = 1 - labels[3]
    return linear, images, labels, linear.distance(images, labels, "linf")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_accuracy_against_epsilon_counts_the_exact_distances(norm):
    linear = Linear()
    images, labels = linear.images(12)
    distances = np.sort(linear.distance(images, labels, norm))
    # Between two distances that are far enough apart for the search to tell.
    gaps = np.flatnonzero(distances[1:] > 1.1 * distances[:-1])
    epsilons = np.sqrt(distances[gaps] * distances[gaps + 1])
    threat = ThreatModel(norm, float(epsilons[0]), 0.0, 1.0)

    curve = accuracy_against_epsilon(
        linear,
        [FMN(threat, 50), MinimumNorm(threat, 9, 20)],
        images,
        labels,
        epsilons=epsilons,
        batch_size=5,
    )

    assert len(gaps) >= 2
    np.testing.assert_allclose(curve.accuracy, 1 - (gaps + 1) / 12)


def test_pgd_without_a_random_start_reaches_steps_times_size_until_epsilon(linear):
    network, images, labels, distances = linear
    epsilon = 1.1 * float(np.median(distances))
    threat = dataclasses.replace(THREAT, epsilon=epsilon)
    sizes, counts = epsilon * np.array([0.05, 0.22, 0.7]), [1, 3, 11]

    grid = accuracy_against_steps_and_size(
        network,
        PGD(threat, random_start=False),
        images,
        labels,
        step_sizes=sizes,
        num_steps=counts,
        batch_size=5,
    )

    reach = np.minimum(sizes[:, None] * counts, epsilon)
    np.testing.assert_array_equal(grid.correct, distances > reach[..., None])
    assert len(set(grid.accuracy.ravel())) > 3
    np.testing.assert_array_equal(grid.against_step_size().correct, grid.correct[:, -1])
    by_steps = grid.against_steps(0.25 * epsilon)
    np.testing.assert_array_equal(by_steps.correct, grid.correct[1])
    assert by_steps.label == f"steps of PGD, each of {sizes[1]:.3g}"


def test_accuracy_never_rises_with_steps_from_a_random_start(linear):
    network, images, labels, distances = linear
    threat = dataclasses.replace(THREAT, epsilon=float(np.median(distances)))
    options = {"step_sizes": [threat.epsilon / 10], "num_steps": [1, 2, 5, 10]}

    grid = accuracy_against_steps_and_size(network, PGD(threat), images, labels, **options)

    assert (np.diff(grid.correct[0].astype(int), axis=0) <= 0).all()
    # The last column is what PGD of that length says of all images at once.
    whole = PGD(threat, num_steps=10, step_size=threat.epsilon / 10)
    fooled = whole.run(network, images, labels, seed=0).fooled
    np.testing.assert_array_equal(grid.correct[0, -1], ~fooled)


@dataclasses.dataclass(frozen=True)
class Stride:
    """Restart r moves (r + 1) strides along the known direction of steepest ascent."""

    threat: ThreatModel
    weights: tuple
    stride: float

    def run(self, logits_fn, images, labels, *, seed, indices, restart):
        normals = np.array(self.weights)
        away = np.sign(normals[:, 1 - labels] - normals[:, labels]).T.reshape(images.shape)
        moved = (images + (restart + 1) * self.stride * away).astype(np.float32)
        fooled = np.ones(len(images), bool)
        return AttackResult(moved, fooled, fooled, 0, 0)


def test_restarts_judge_what_they_get_and_keep_the_losses_of_survivors(linear):
    network, images, labels, distances = linear
    stride = float(np.quantile(distances, 0.7)) / 3.5
    attack = Stride(
        dataclasses.replace(THREAT, epsilon=4 * stride),
        tuple(map(tuple, network.weights.tolist())),
        stride,
    )

    found = losses_over_restarts(network, attack, images, labels, num_restarts=4, batch_size=5)

    # `Stride` calls everything fooled; only what is read back counts.
    reach = stride * np.arange(1, 5)[:, None]
    np.testing.assert_array_equal(found.correct, distances > reach)
    survivors = np.flatnonzero(distances > 4 * stride)
    assert 0 < len(survivors) < 12
    np.testing.assert_array_equal(found.survivors, survivors)
    normals = network.weights[:, labels] - network.weights[:, 1 - labels]
    margins = (distances[survivors] - reach) * np.abs(normals).sum(0)[survivors]
    np.testing.assert_allclose(found.cross_entropy, np.logaddexp(0, -margins), rtol=1e-3)
    curve = found.against_restarts()
    np.testing.assert_array_equal(curve.x, [1, 2, 3, 4])
    np.testing.assert_array_equal(curve.correct, found.correct)


def test_an_attack_that_leaves_its_ball_is_refused(linear):
    network, images, labels, _ = linear
    attack = Stride(THREAT, tuple(map(tuple, network.weights.tolist())), 0.03)

    with pytest.raises(ThreatModelError, match="restarts left its threat model"):
        losses_over_restarts(network, attack, images, labels, num_restarts=1)


def test_without_survivors_there_are_no_losses(linear):
    network, images, labels, _ = linear
    wide = dataclasses.replace(THREAT, epsilon=0.5)

    found = losses_over_restarts(network, PGD(wide, step_size=0.2), images, labels, num_restarts=2)

    assert found.cross_entropy.shape == (2, 0)
    np.testing.assert_array_equal(found.correct, np.zeros((2, 12)))


SMALL = CurveSettings(
    THREAT,
    epsilon_factors=(0.5, 1.0, 2.0),
    num_targets=1,
    step_factors=(0.1, 0.5),
    num_steps=(2, 5),
    num_restarts=3,
)


def test_the_same_seed_gives_the_same_curves_and_a_file_keeps_them(linear, tmp_path):
    network, images, labels, _ = linear
    options = {"num_classes": 2, "settings": {"model": "linear"}}

    first, again = (SMALL.run(network, images, labels, seed=4, **options) for _ in range(2))
    save_curves(first, tmp_path / "curves.npz")

    for other in (again, load_curves(tmp_path / "curves.npz")):
        np.testing.assert_array_equal(other.epsilon.correct, first.epsilon.correct)
        np.testing.assert_array_equal(other.epsilon.x, first.epsilon.x)
        np.testing.assert_array_equal(other.grid.correct, first.grid.correct)
        np.testing.assert_array_equal(other.restarts.cross_entropy, first.restarts.cross_entropy)
        assert tf.nest.flatten(other.settings) == tf.nest.flatten(first.settings)
    assert first.settings["seed"] == 4
    assert first.settings["curves"]["step_factors"] == (0.1, 0.5)


def test_files_that_do_not_fit_together_are_refused(linear, tmp_path):
    network, images, labels, _ = linear
    path = tmp_path / "curves.npz"
    curves = SMALL.run(network, images, labels, num_classes=2)
    save_curves(dataclasses.replace(curves, epsilon=curves.grid.against_step_size()), path)
    with np.load(path) as file:
        arrays = dict(file)

    np.savez(path, **arrays | {"num_steps": arrays["num_steps"][:1]})
    with pytest.raises(ValueError, match=r"grid_correct has shape \(2, 2, 12\), expected"):
        load_curves(path)
    np.savez(path, **arrays | {"epsilons": arrays["epsilons"][None]})
    with pytest.raises(ValueError, match=r"epsilons is float64 of shape \(1, 2\), expected"):
        load_curves(path)
    np.savez(path, **arrays)
    write_json(path.with_suffix(".json"), read_json(path.with_suffix(".json")) | {"num_classes": 0})
    with pytest.raises(ValueError, match="num_classes is not a number of classes"):
        load_curves(path)


@pytest.mark.parametrize("sizes", [[], [0.2, 0.1], [0.1, 0.1]])
def test_knobs_that_do_not_increase_are_refused(linear, sizes):
    network, images, labels, _ = linear

    with pytest.raises(ValueError, match="step_sizes must be increasing"):
        accuracy_against_steps_and_size(
            network, PGD(THREAT), images, labels, step_sizes=sizes, num_steps=[1]
        )


def test_no_restarts_are_refused(linear):
    network, images, labels, _ = linear

    with pytest.raises(ValueError, match="num_restarts must be at least 1; got 0"):
        losses_over_restarts(network, PGD(THREAT), images, labels, num_restarts=0)
