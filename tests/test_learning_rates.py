"""Learning rates that are stretched over a training."""

import math

import numpy as np
import pytest

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.runs import train_run
from logit_reg.messages import UsageError

STEPS = 50


def rates(name, peak=0.4, steps=STEPS):
    settings = resolve_settings(
        {
            "dataset": "mnist_5k",
            "learning_rate_schedule": name,
            "step_size_schedule": ((0, peak),),
            "max_num_training_steps": steps,
        }
    )
    return [float(settings.learning_rate(step)) for step in range(steps)]


def test_cyclic_is_the_published_interpolation():
    """Wong et al. count from 1: the first update has a rate above 0, the last one 0."""
    expected = np.interp(np.arange(1, STEPS + 1), [0, STEPS * 2 // 5, STEPS], [0, 0.4, 0])
    np.testing.assert_allclose(rates("cyclic"), expected, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_cycle_of_few_steps_has_finite_rates(steps):
    found = rates("cyclic", steps=steps)
    assert max(found) == pytest.approx(0.4) and min(found) >= 0


def test_cosine_falls_from_the_peak_to_0_at_the_end():
    expected = [0.2 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    np.testing.assert_allclose(rates("cosine"), expected, atol=1e-7)


@pytest.mark.parametrize(("dataset", "peak"), [("mnist", 1e-4), ("cifar10", 0.1)])
def test_the_usual_peak_is_the_challenge_s_first_rate(dataset, peak):
    settings = resolve_settings(
        {"dataset": dataset, "learning_rate_schedule": "cosine", "reg": "squeeze", "beta": 1.0}
    )
    assert settings.step_size_schedule == ((0, peak),)


def test_several_rates_with_one_peak_are_refused():
    given = {"learning_rate_schedule": "cyclic", "step_size_schedule": ((0, 0.1), (9, 0.01))}
    message = r"takes one rate, its peak, as --step_size_schedule=\[\[0, 0.1\]\]; got"
    with pytest.raises(ValueError, match=message):
        resolve_settings({"dataset": "mnist", **given})
    with pytest.raises(ValueError, match="must be one of steps, cosine, cyclic; got 'linear'"):
        resolve_settings({"dataset": "mnist", "learning_rate_schedule": "linear"})


def test_a_stretched_rate_is_not_extended(tmp_path):
    settings = resolve_settings({"dataset": "mnist", "learning_rate_schedule": "cosine"})
    with pytest.raises(UsageError, match="--extend: .* stretched over the whole training"):
        train_run(settings, np.zeros(0), np.zeros(0), tmp_path, extend=True)
    assert not list(tmp_path.iterdir())
