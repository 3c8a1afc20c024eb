"""The l1 threat model and what attacks make of it."""

import numpy as np
import pytest
from exact_margins import LinearClassifier, check_closed_form, check_stays_within, curved
from scipy.optimize import minimize

from logit_reg.attacks import (
    DDN,
    FAB,
    FMN,
    MD,
    ODI,
    PGD,
    SPSA,
    APGDTargeted,
    AutoAttack,
    FABTargeted,
    HopSkipJump,
    MinimumNorm,
    MultiTargeted,
    Restarts,
    Square,
)
from logit_reg.attacks.apgd import APGD, sparse_stages
from logit_reg.audit import audit
from logit_reg.commands import flag_groups
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.threat import NORMS, ThreatModel
from madry_compat.challenges import challenge_for


def nearest_point(point, image, epsilon, lower, upper):
    """The projection as a quadratic programme: (D,) arrays, in units of the range."""
    size = len(point)
    wanted = point - image

    def loss(parts):
        missing = parts[:size] - parts[size:] - wanted
        return missing @ missing, 2 * np.concatenate([missing, -missing])

    room = np.concatenate([upper - image, image - lower])
    found = minimize(
        loss,
        np.zeros(2 * size),
        jac=True,
        method="SLSQP",
        bounds=[(0, max(most, 0)) for most in room],
        constraints={
            "type": "ineq",
            "fun": lambda parts: epsilon - parts.sum(),
            "jac": lambda parts: -np.ones_like(parts),
        },
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return image + found.x[:size] - found.x[size:]


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_projection_is_the_nearest_point_of_ball_and_range(lower, upper):
    rng, width = np.random.default_rng(0), upper - lower
    epsilons, stddevs = np.array([0.02, 0.3, 1.0, 4.0, 100.0] * 3), np.repeat([0.05, 0.5, 3.0], 5)
    images = rng.uniform(lower, upper, (15, 12))
    images[:, :6] = rng.choice([lower, upper], (15, 6))
    points = images + width * stddevs[:, None] * rng.normal(size=(15, 12))
    points[:, 11] = images[:, 11]
    both = (x.reshape(15, 2, 6, 1).astype(np.float32) for x in (points, images))
    scale = epsilons.reshape(-1, 1, 1, 1).astype(np.float32)
    found = ThreatModel("l1", width, lower, upper).project(*both, scale).numpy()
    for near, point, image, epsilon in zip(found, points, images, epsilons, strict=True):
        given = (point / width, image / width, epsilon, lower / width, upper / width)
        np.testing.assert_allclose(near.ravel() / width, nearest_point(*given), atol=1e-5)


def test_projection_takes_a_scale_for_each_image():
    rng = np.random.default_rng(1)
    images = rng.random((3, 5, 5, 2)).astype(np.float32)
    points = images + rng.normal(size=images.shape).astype(np.float32)
    threat, scale = ThreatModel("l1", 2.0), np.array([0.0, 0.5, 3.0], np.float32)
    found = threat.project(points, images, scale.reshape(-1, 1, 1, 1))
    np.testing.assert_allclose(threat.distance(found, images), 2.0 * scale, rtol=1e-5, atol=1e-6)


def test_direction_moves_the_largest_values_by_the_same_amount():
    gradient = np.arange(-8, 12, dtype=np.float32).reshape(1, 4, 5, 1)
    threat = ThreatModel("l1", 1.0)
    for share, moved in ((0.05, [19]), (0.1, [18, 19]), (0.25, [0, 16, 17, 18, 19]), (0.0, [19])):
        direction = threat.ascent_direction(gradient, share).numpy().ravel()
        assert np.flatnonzero(direction).tolist() == moved
        np.testing.assert_allclose(direction[moved], np.sign(gradient.ravel()[moved]) / len(moved))
    of_each = threat.ascent_direction(np.repeat(gradient, 2, axis=0), np.float32([0.05, 0.25]))
    assert np.count_nonzero(of_each, axis=(1, 2, 3)).tolist() == [1, 5]


def test_values_that_the_pixel_range_stops_are_not_moved():
    images = np.array([0.0, 0.0, 1.0, 0.5], np.float32).reshape(1, 2, 2, 1)
    points = np.array([0.0, 0.4, 1.0, 1.0], np.float32).reshape(1, 2, 2, 1)
    gradient = np.array([-1.0, -1.0, 1.0, 1.0], np.float32).reshape(1, 2, 2, 1)
    left = ThreatModel("l1", 1.0).without_stopped(gradient, points, images).numpy().ravel()
    np.testing.assert_array_equal(left, [0.0, -1.0, 0.0, 1.0])
    other = ThreatModel("linf", 1.0).without_stopped(gradient, points, images)
    np.testing.assert_array_equal(other, gradient)


def test_random_starts_are_uniform_in_the_ball():
    """The radius of a uniform point of an n-ball has the distribution r^n."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (4000, 1, 3, 1)).astype(np.float32)
    noise[0] = -1.0
    radius = rng.random((4000, 1, 1, 1)).astype(np.float32)
    threat = ThreatModel("l1", 2.0, -5.0, 5.0)
    start = threat.random_start(np.zeros_like(noise), noise, radius).numpy().reshape(-1, 3)
    length = np.abs(start).sum(axis=1)
    assert abs(((length / 2.0) ** 3).mean() - 0.5) < 0.02
    # On the surface a coordinate's share s has the distribution 1 - (1 - s)^(n - 1).
    assert abs((np.abs(start[:, 0]) < 0.5 * length).mean() - 0.75) < 0.03
    assert np.abs(start.mean(axis=0)).max() < 0.06


def test_apgd_goes_through_the_published_balls():
    assert sparse_stages(100) == [(3.0, 30), (2.0, 30), (1.0, 40)]
    for num_steps in (1, 2, 3, 4, 10, 37):
        stages = sparse_stages(num_steps)
        assert sum(steps for _, steps in stages) == num_steps
        assert stages[-1][0] == 1.0 and stages[-1][1] >= 1


# Cross-entropy of 10 classes does not head for the nearest boundary.
@pytest.mark.parametrize(
    ("make", "num_classes", "box_is_active"),
    [
        (APGD, 2, False),
        (APGD, 2, True),
        pytest.param(APGDTargeted, 10, False, marks=pytest.mark.slow),
        pytest.param(APGDTargeted, 10, True, marks=pytest.mark.slow),
        (lambda threat: FAB(threat, early_stop=True), 10, True),
        (lambda threat: FABTargeted(threat, early_stop=True), 10, False),
        (lambda threat: PGD(threat, "cw", 60, threat.epsilon / 20), 2, False),
        (lambda threat: MultiTargeted(threat, 60, threat.epsilon / 20), 2, False),
        (MD, 2, False),
        (lambda threat: Restarts(ODI(threat), 2), 2, False),
        (MinimumNorm, 2, False),
    ],
)
def test_finds_what_lies_just_within_the_budget(make, num_classes, box_is_active):
    classifier = LinearClassifier(num_classes)
    check_closed_form(make, classifier, "l1", box_is_active=box_is_active, pool=400)


@pytest.mark.slow
def test_square_finds_what_lies_well_within_the_budget():
    check_closed_form(
        lambda threat: Square(threat, 2000),
        LinearClassifier(2),
        "l1",
        box_is_active=True,
        reach=1.5,
        share=0.9,
        pool=400,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda threat: APGD(threat, num_steps=20),
        lambda threat: FABTargeted(threat, num_steps=20, early_stop=True),
        lambda threat: Square(threat, num_queries=120),
        lambda threat: PGD(threat, num_steps=10, step_size=30.0),
    ],
)
def test_stays_within_ball_and_pixel_range(make):
    check_stays_within(make(ThreatModel("l1", 120.0, 0.0, 255.0)))


def test_apgd_counts_its_passes_and_batches_do_not_matter():
    images = np.random.default_rng(4).random((20, 6, 6, 1)).astype(np.float32)
    labels = np.argmax(curved(images).numpy(), axis=-1)
    attack = APGD(ThreatModel("l1", 1e-5), num_steps=10)
    tiny = attack.run(curved, images, labels, seed=0)
    assert not tiny.fooled.any()
    assert (tiny.forwards, tiny.backwards) == (20 + 20 * 13, 20 * 13)
    assert attack.cost() == (14, 13)
    attack = APGD(ThreatModel("l1", 0.4), num_steps=20)
    whole = attack.run(curved, images, labels, seed=3)
    assert 0 < whole.fooled.mean() < 1
    part = np.arange(7, 20)
    found = attack.run(curved, images[part], labels[part], seed=3, indices=part)
    np.testing.assert_array_equal(found.fooled, whole.fooled[part])


@pytest.mark.parametrize(("dataset", "epsilon"), [("mnist", 10.0), ("cifar10", 12 * 255.0)])
def test_protocol_is_the_published_cascade(dataset, epsilon):
    (attack,) = protocol_attacks("autoattack-l1", challenge_for(dataset)).values()
    assert (attack.threat.norm, attack.threat.epsilon) == ("l1", epsilon)
    stages = attack.attacks(10)
    assert list(stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (stages["apgd-ce"].num_restarts, stages["apgd-t"].num_targets) == (5, 5)
    assert (stages["fab-t"].num_targets, stages["square"].num_queries) == (9, 5000)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (SPSA, "SPSA is defined in linf and l2; got norm 'l1'"),
        (HopSkipJump, "HopSkipJump is defined in linf and l2"),
        (FMN, "FMN is defined in linf and l2"),
        (DDN, "DDN is defined in l2; got norm 'l1'"),
        (lambda threat: AutoAttack(threat, "plus"), 'AutoAttack "plus" is defined in linf and l2'),
        (
            lambda threat: audit(curved, threat, np.zeros((1, 6, 6, 1)), [0], claim=0.5),
            "the audit is defined in linf and l2",
        ),
    ],
)
def test_what_is_not_defined_in_l1_says_so(what, words):
    with pytest.raises(ValueError, match=words):
        what(ThreatModel("l1", 1.0))


def test_the_flag_knows_every_norm():
    assert flag_groups.NORMS == NORMS
