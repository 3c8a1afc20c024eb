"""Numbers in other units than the images: a notice that names the likely slip, and no false one."""

import pytest

from logit_reg.attacks import PGD, AutoAttack, Restarts
from logit_reg.evaluation import units
from logit_reg.evaluation.protocols import PROTOCOLS, protocol_attacks
from logit_reg.threat import ThreatModel
from madry_compat.challenges import challenge_for


@pytest.mark.parametrize(
    ("threat", "shape", "name", "slip"),
    [
        (ThreatModel("linf", 8.0, 0.0, 1.0), (32, 32, 3), "budget_large", "[0, 255]?"),
        (ThreatModel("linf", 1.0, -1.0, 1.0), (8, 8, 1), "budget_large", "[0, 255]?"),
        (ThreatModel("linf", 0.03137, 0.0, 255.0), (32, 32, 3), "budget_small", "[0, 1]?"),
        (ThreatModel("linf", 0.3, 0.0, 255.0), (28, 28, 1), "budget_small", "[0, 1]?"),
        (ThreatModel("linf", 8 / 255**2, 0.0, 1.0), (32, 32, 3), "budget_small", "own pixel"),
        (ThreatModel("l2", 127.5, 0.0, 1.0), (32, 32, 3), "budget_large", "[0, 255]?"),
        (ThreatModel("l2", 0.5, 0.0, 255.0), (32, 32, 3), "budget_small", "[0, 1]?"),
        (ThreatModel("l1", 3060.0, 0.0, 1.0), (32, 32, 3), "budget_large", "[0, 255]?"),
        (ThreatModel("l1", 2.0, 0.0, 255.0), (28, 28, 1), "budget_small", "[0, 1]?"),
    ],
)
def test_a_budget_in_other_units_is_noticed(threat, shape, name, slip):
    (found,) = units.threat_notices(threat, shape)
    assert found.name == name and slip in found.message and found.message.endswith(".")
    assert found.value == threat.epsilon / (threat.upper - threat.lower)
    assert units.attack_notices([AutoAttack(threat)] * 2, shape) == [found]


@pytest.mark.parametrize(
    ("threat", "shape"),
    [
        (ThreatModel("linf", 0.4, 0.0, 1.0), (28, 28, 1)),
        (ThreatModel("linf", 0.5 / 255, 0.0, 1.0), (224, 224, 3)),
        (ThreatModel("linf", 16.0, 0.0, 255.0), (32, 32, 3)),
        (ThreatModel("l2", 3.0, 0.0, 1.0), (224, 224, 3)),
        (ThreatModel("l2", 0.25, 0.0, 1.0), (32, 32, 3)),
        (ThreatModel("l1", 12.0, 0.0, 1.0), (32, 32, 3)),
        (ThreatModel("l1", 3060.0, 0.0, 255.0), (32, 32, 3)),
    ],
)
def test_a_budget_that_the_field_uses_is_not(threat, shape):
    assert not list(units.threat_notices(threat, shape))


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_no_protocol_is_noticed(dataset):
    challenge = challenge_for(dataset)
    for name in PROTOCOLS:
        try:
            attacks = protocol_attacks(name, challenge)
        except ValueError:
            continue
        assert units.attack_notices(attacks.values(), challenge.image_shape) == [], name


@pytest.mark.parametrize(
    ("epsilon", "num_steps", "step_size", "words"),
    [
        (0.3, 40, 2.0, "crosses the whole ball"),
        (8.0, 20, 0.01, "at most 0.025 of the budget"),
        (8.0, 1, 20.0, "crosses the whole ball"),
        (0.3, 40, 0.01, None),
        (0.3, 1, 0.3, None),
        (0.3, 0, 0.0, None),
    ],
)
def test_a_step_out_of_proportion_is_noticed(epsilon, num_steps, step_size, words):
    threat = ThreatModel("linf", epsilon, 0.0, 1.0 if epsilon < 1 else 255.0)
    found = list(units.step_notices(threat, num_steps, step_size))
    assert [words in one.message for one in found] == ([True] if words else [])
    if num_steps:
        attack = PGD(threat, num_steps=num_steps, step_size=step_size)
        assert units.attack_notices([Restarts(attack, 2)], (8, 8, 1)) == found


@pytest.mark.parametrize(
    ("stddev", "upper", "noticed"),
    [
        (20.0, 1.0, True),
        (1.5, 1.0, True),
        (0.5, 255.0, True),
        (0.5, 1.0, False),
        (20.0, 255.0, False),
        (0.0, 1.0, False),
    ],
)
def test_noise_in_other_units_is_noticed(stddev, upper, noticed):
    assert bool(list(units.noise_notices(stddev, 0.0, upper))) == noticed


@pytest.mark.parametrize(("claim", "meant"), [(0.93, "93 %"), (1.0, "100 %"), (0.5, "50 %")])
def test_a_claim_that_looks_like_a_fraction_is_noticed(claim, meant):
    (found,) = units.claim_notices(claim)
    assert meant in found.message
    assert not list(units.claim_notices(100 * claim)) and not list(units.claim_notices(0.0))
