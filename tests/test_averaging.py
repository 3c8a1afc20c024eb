"""Averages of the weights over training: their values, what is exported, exact resume."""

import keras
import numpy as np
import pytest
from test_loop import data, fresh_model, rows, run, weights

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.exports import export_model
from logit_reg.experiments.runs import train_run
from logit_reg.experiments.sources import find_model, load_keras
from logit_reg.files import read_json
from logit_reg.objectives import Objective
from logit_reg.report.runs import load_run
from logit_reg.training.loop import LoopSettings, train
from logit_reg.training.model import RegularizedModel
from logit_reg.training.state import state_path
from madry_compat.optimizers import TF1Adam, TF1Momentum
from madry_compat.tf1_checkpoints import has_training_state, load_network, read_step

STEPS, MOMENTUM = 12, 0.5


def model_with_batch_norm(optimizer):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.BatchNormalization(momentum=0.5, name="norm")(keras.layers.Flatten()(inputs))
    network = keras.Model(
        inputs, keras.layers.Dense(3, name="logits")(keras.layers.Dropout(0.1)(x))
    )
    model = RegularizedModel(network, Objective("squeeze", beta=0.5), bounds=(0.0, 1.0), seed=3)
    model.compile(optimizer=optimizer)
    return model


def saved(folder, step):
    """Values of a state in order: the network's, then all others."""
    with np.load(state_path(folder, step)) as arrays:
        return [(name[5:], arrays[name]) for name in sorted(arrays.files) if name != "meta"]


@pytest.mark.parametrize("optimizer", [TF1Adam(0.01), TF1Momentum(0.1)], ids=["adam", "momentum"])
def test_averages_are_those_of_all_updates_batch_norm_included(tmp_path, optimizer):
    """TF1Adam updates the weights in one fused operation; the average has to see its result."""
    model = model_with_batch_norm(optimizer)
    start = [value for value in model.network.get_weights() if value.dtype == np.float32]
    steps = tuple(range(1, STEPS + 1))
    run(tmp_path, STEPS, model, ema=True, ema_momentum=MOMENTUM, keep_checkpoint_steps=steps)
    network = [v.name for v in model.network.variables]
    averages = start
    for step in steps:
        state = saved(tmp_path, step)
        assert [name for name, _ in state[: len(network)]] == network
        raw = [value for _, value in state[: len(network)] if value.dtype == np.float32]
        momentum = min(MOMENTUM, step / (9 + step))
        averages = [
            momentum * average + (1 - momentum) * value
            for average, value in zip(averages, raw, strict=True)
        ]
        found = [value for name, value in state if name.endswith("_average")]
        for one, other in zip(averages, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in state if name.endswith("_average")]
    assert {"moving_mean_average", "moving_variance_average"} <= set(names)
    # The average is another network than the last one.
    assert max(np.abs(a - b).max() for a, b in zip(averages, raw, strict=True)) > 1e-3


def test_exports_hold_the_averages_and_leave_training_as_it_was(tmp_path):
    plain = run(tmp_path / "plain")
    model, exported = fresh_model(), {}
    settings = LoopSettings(12, 8, num_output_steps=2, num_checkpoint_steps=5, ema=True)
    train(
        model,
        *data(),
        settings,
        tmp_path / "averaged",
        on_checkpoint=lambda step: exported.update({step: model.network.get_weights()}),
        show_progress=False,
    )
    assert rows(tmp_path / "plain") == rows(tmp_path / "averaged")
    for one, other in zip(weights(plain), weights(model), strict=True):
        np.testing.assert_array_equal(one, other)
    for step, values in exported.items():
        state = saved(tmp_path / "averaged", step)
        averages = [value for name, value in state if name.endswith("_average")]
        for one, other in zip(values, averages, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stop", [1, 7])
def test_an_averaged_run_in_two_parts_ends_bit_identical_to_one(tmp_path, stop):
    run(tmp_path / "whole", ema=True)
    run(tmp_path / "parts", steps=stop, ema=True)
    run(tmp_path / "parts", ema=True)
    for one, other in zip(
        saved(tmp_path / "whole", 12), saved(tmp_path / "parts", 12), strict=True
    ):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


def test_keras_own_averages_go_on_working_in_fit():
    images, labels = data()
    images = images.astype(np.float32) / 255
    model, seen = fresh_model(), []
    model.compile(optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
    remember = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(model.network.get_weights())
    )
    model.fit(images, labels, batch_size=8, callbacks=[remember], verbose=0)
    averages = seen[0]
    for values in seen[1:]:
        averages = [0.5 * a + 0.5 * v for a, v in zip(averages, values, strict=True)]
    for one, other in zip(averages, model.network.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_run_says_that_its_weights_are_averages_and_exports_no_slots(tmp_path):
    settings = resolve_settings(
        {"dataset": "mnist", "max_num_training_steps": 2, "training_batch_size": 4, "ema": True}
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 28, 28, 1), np.uint8)
    folder = tmp_path / "run"
    train_run(settings, images, rng.integers(0, 10, 8), folder, show_progress=False)
    assert "natural-ema" in settings.name and load_run(folder).name == "natural + ema"
    assert load_run(folder).has_averaged_weights
    averages = [value for name, value in saved(folder, 2) if name.endswith("_average")]
    for network in (load_keras(folder / "model.keras"), load_network(folder)):
        for one, other in zip(network.get_weights(), averages, strict=True):
            np.testing.assert_array_equal(one, other)
    # The optimiser's state is of other weights: whoever goes on from these begins without.
    assert not has_training_state(folder) and read_step(folder) == 2
    export_model(find_model(folder), tmp_path / "export")
    assert read_json(tmp_path / "export" / "model_card.json")["averaged_weights"] is True


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_an_impossible_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match="ema_momentum must be in"):
        LoopSettings(10, ema=True, ema_momentum=momentum)
