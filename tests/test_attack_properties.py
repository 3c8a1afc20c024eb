"""What holds for every attack of AutoAttack, whatever the seed and the images."""

import dataclasses

import numpy as np
import pytest
from exact_margins import curved, curved_examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logit_reg.attacks import APGD, AutoAttack, Restarts, Square
from logit_reg.attacks.apgd import APGDTargeted
from logit_reg.attacks.fab import FAB, FABTargeted
from logit_reg.evaluation.run import distances, evaluate
from logit_reg.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore::logit_reg.attacks.engine.checks.AttackWarning")

LINF = ThreatModel("linf", 0.03)
L2 = ThreatModel("l2", 0.12)
NUM_IMAGES = 25
ATTACKS = {
    "apgd-ce": lambda threat: APGD(threat, num_steps=6),
    "apgd-dlr": lambda threat: APGD(threat, "dlr", num_steps=6),
    "apgd-t": lambda threat: APGDTargeted(threat, num_targets=2, num_steps=6),
    "fab": lambda threat: FAB(threat, num_steps=4),
    "fab-t": lambda threat: FABTargeted(threat, num_targets=2, num_steps=4, early_stop=True),
    "square": lambda threat: Square(threat, num_queries=40),
    "autoattack": lambda threat: AutoAttack(threat, num_steps=3, num_queries=20),
}
each_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS.keys())
each_norm = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
seeds = st.integers(0, 2**32 - 1)
# The first example of each test traces the attack.
few = settings(max_examples=4, deadline=None, derandomize=True)


def fooled(attack, seed):
    images, labels = curved_examples(NUM_IMAGES, seed)
    return attack.run(curved, images, labels, seed=seed).fooled


# (attack, field, values that grow)
GROWING = {
    "restarts": lambda threat: (
        Restarts(ATTACKS["apgd-dlr"](threat), 1),
        "num_restarts",
        (1, 2, 4),
    ),
    "restarts-fab": lambda threat: (Restarts(ATTACKS["fab"](threat), 1), "num_restarts", (1, 3)),
    "targets-apgd-t": lambda threat: (ATTACKS["apgd-t"](threat), "num_targets", (1, 2, 4)),
    "targets-fab-t": lambda threat: (ATTACKS["fab-t"](threat), "num_targets", (1, 2, 4)),
    "queries": lambda threat: (ATTACKS["square"](threat), "num_queries", (3, 40, 130)),
}


@pytest.mark.parametrize("make", GROWING.values(), ids=GROWING.keys())
@each_norm
def test_what_is_broken_stays_broken_with_a_larger_budget(threat, make):
    attack, field, budgets = make(threat)

    @few
    @given(seeds)
    def check(seed):
        broken = np.zeros(NUM_IMAGES, bool)
        for budget in budgets:
            now = fooled(dataclasses.replace(attack, **{field: budget}), seed)
            assert not np.any(broken & ~now)
            broken = now

    check()


@few
@given(seed=seeds, order=st.permutations(["apgd-ce", "fab-t", "square"]), is_shared=st.booleans())
def test_what_is_broken_stays_broken_with_more_attacks(seed, order, is_shared):
    images, labels = curved_examples(NUM_IMAGES, seed)
    robust = np.ones(NUM_IMAGES, bool)
    for number in range(1, len(order) + 1):
        attacks = {name: ATTACKS[name](LINF) for name in order[:number]}
        found = evaluate(
            curved, attacks, images, labels, batch_size=9, seed=seed, worst_case_only=is_shared
        )
        assert not np.any(found.robust & ~robust)
        robust = found.robust


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("upper", [1.0, 255.0])
def test_nothing_leaves_ball_or_pixel_range(upper, norm, make):
    epsilon = {"linf": 0.03, "l2": 0.12}[norm] * upper
    attack = make(ThreatModel(norm, epsilon, 0.0, upper))

    def model(images):
        return curved(images / upper)

    @few
    @given(seed=seeds, is_at_edge=st.booleans())
    @example(seed=1, is_at_edge=True)
    def check(seed, is_at_edge):
        images, _ = curved_examples(NUM_IMAGES, seed)
        if is_at_edge:
            images = np.round(images)
        images *= np.float32(upper)
        labels = np.argmax(model(images).numpy(), axis=-1)
        result = attack.run(model, images, labels, seed=seed)
        found = result.adversarial.astype(np.float64)
        assert found.min() >= 0
        assert found.max() <= upper
        # A rounding of each of the 36 pixels.
        slack = np.spacing(np.float32(upper)) * (6 if norm == "l2" else 1)
        assert distances(found, images, norm).max() <= epsilon * (1 + 1e-6) + slack
        fools = np.argmax(model(result.adversarial).numpy(), axis=-1) != labels
        np.testing.assert_array_equal(fools, result.fooled)

    check()


@pytest.mark.graph_optimiser
@each_attack
@each_norm
def test_same_seed_same_result(threat, make):
    attack = make(threat)

    @few
    @given(seeds)
    def check(seed):
        images, labels = curved_examples(NUM_IMAGES, seed)
        first, again = (attack.run(curved, images, labels, seed=seed) for _ in range(2))
        np.testing.assert_array_equal(first.adversarial, again.adversarial)
        np.testing.assert_array_equal(first.fooled, again.fooled)
        assert (first.forwards, first.backwards) == (again.forwards, again.backwards)

    check()


@each_attack
@each_norm
def test_batch_size_changes_hardly_any_verdict(threat, make):
    images, labels = curved_examples(400)
    attacks = {"attack": make(threat)}
    whole = evaluate(curved, attacks, images, labels, batch_size=400).robust
    assert 0.2 < whole.mean() < 0.95
    for batch_size in (13, 64):
        found = evaluate(curved, attacks, images, labels, batch_size=batch_size).robust
        assert np.mean(found != whole) <= 0.005
