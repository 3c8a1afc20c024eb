"""The threat model: projections, directions and random starts."""

import numpy as np
import pytest
import tensorflow as tf

from logit_reg.threat import ThreatModel

THREATS = [
    ThreatModel("linf", 0.3, 0.0, 1.0),
    ThreatModel("l2", 1.5, 0.0, 1.0),
    ThreatModel("l1", 4.0, 0.0, 1.0),
]
IDS = ["linf", "l2", "l1"]


def some_images(count=200):
    return np.random.default_rng(0).random((count, 5, 5, 2)).astype(np.float32)


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_projection_lands_in_ball_and_range_and_keeps_what_is_inside(threat):
    images = some_images()
    far = images + np.random.default_rng(1).normal(0, 2, images.shape).astype(np.float32)
    projected = threat.project(far, images).numpy()
    assert projected.min() >= 0 and projected.max() <= 1
    assert threat.distance(projected, images).numpy().max() <= threat.epsilon * (1 + 1e-6)
    np.testing.assert_allclose(threat.project(projected, images), projected, atol=1e-6)


def test_l2_projection_is_the_nearest_point_of_the_ball():
    threat = ThreatModel("l2", 1.0, -10.0, 10.0)
    images = np.zeros((1, 1, 2, 1), np.float32)
    far = np.array([3.0, 4.0], np.float32).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(threat.project(far, images).numpy().ravel(), [0.6, 0.8], rtol=1e-6)


def test_distance_is_over_all_pixels():
    images = np.zeros((1, 1, 2, 1), np.float32)
    other = np.array([3.0, -4.0], np.float32).reshape(1, 1, 2, 1)
    assert float(ThreatModel("linf", 1.0).distance(images, other)[0]) == 4.0
    assert float(ThreatModel("l2", 1.0).distance(images, other)[0]) == 5.0
    assert float(ThreatModel("l1", 1.0).distance(images, other)[0]) == 7.0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_ascent_direction_does_not_depend_on_the_scale_of_the_gradient(scale):
    gradient = (scale * np.array([3.0, -4.0])).astype(np.float32).reshape(1, 1, 2, 1)
    linf = ThreatModel("linf", 1.0).ascent_direction(tf.constant(gradient)).numpy().ravel()
    l2 = ThreatModel("l2", 1.0).ascent_direction(tf.constant(gradient)).numpy().ravel()
    np.testing.assert_array_equal(linf, [1.0, -1.0])
    np.testing.assert_allclose(l2, [0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_a_zero_gradient_gives_no_direction(threat):
    gradient = tf.zeros((2, 3, 3, 1))
    assert not threat.ascent_direction(gradient).numpy().any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    ("threat", "slope"), list(zip(THREATS, [7.0, 5.0, 4.0], strict=True)), ids=IDS
)
def test_slope_is_the_dual_norm(threat, slope, scale):
    gradient = (scale * np.array([[3.0, -4.0], [0.0, 0.0]])).astype(np.float32)
    found = threat.slope(tf.constant(gradient.reshape(2, 1, 2, 1))).numpy()
    np.testing.assert_allclose(found, [scale * slope, 0.0], rtol=1e-6)


def test_random_starts_are_uniform_in_the_ball():
    """The radius of a uniform point of an n-ball has the distribution r^n."""
    rng = np.random.default_rng(0)
    count, shape = 4000, (1, 3, 1)
    images = np.zeros((count, *shape), np.float32)
    noise = rng.normal(size=(count, *shape)).astype(np.float32)
    radius = rng.random((count, 1, 1, 1)).astype(np.float32)
    threat = ThreatModel("l2", 2.0, -5.0, 5.0)
    start = threat.random_start(tf.constant(images), noise, radius).numpy().reshape(count, 3)
    volume = (np.linalg.norm(start, axis=1) / 2.0) ** 3
    assert abs(volume.mean() - 0.5) < 0.02
    assert abs(np.quantile(volume, 0.9) - 0.9) < 0.02
    assert np.abs(start.mean(0)).max() < 0.06


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l3"}, "norm must be one of linf, l2, l1; got 'l3'"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0"),
        ({"lower": 1.0, "upper": 0.0}, "bounds must be increasing"),
        ({"upper": float("inf")}, "bounds must be finite"),
    ],
)
def test_impossible_threat_models_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(**settings)
