"""Catastrophic overfitting: noticed, and what is left is the checkpoint before it."""

import csv

import keras
import numpy as np
import pytest

from logit_reg.attacks import PGD
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.evaluations import training_notices
from logit_reg.experiments.runs import train_run
from logit_reg.experiments.sources import find_model
from logit_reg.files import read_json, write_json
from logit_reg.objectives import Objective
from logit_reg.report.runs import load_run
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.pgd import PGDAdversary
from logit_reg.training.folder import Stop, TrainingError
from logit_reg.training.loop import LoopSettings, train
from logit_reg.training.model import RegularizedModel
from logit_reg.training.overfitting import (
    ROBUSTNESS_COLUMNS,
    RobustnessProbe,
    best_row,
    is_overfitted,
)
from logit_reg.training.state import restore_newest_state, saved_steps

THREAT = ThreatModel("linf", 0.2, 0.0, 1.0)
FALL = 40


def data():
    """Ten classes, each a bright pixel among dark ones."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300)
    images = rng.integers(0, 60, (300, 4, 4, 1), np.uint8)
    images.reshape(300, 16)[np.arange(300), labels] = 255
    return images, labels


def model():
    """Learns until step `FALL`, from which on it climbs the loss instead."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    network = keras.Model(
        inputs, keras.layers.Dense(10, name="logits")(keras.layers.Flatten()(inputs))
    )
    adversary = PGDAdversary(PGD(THREAT, "xent", 1, 0.2), ramp_steps=10)
    model = RegularizedModel(network, Objective(), bounds=(0.0, 1.0), adversary=adversary, seed=1)
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([FALL], [0.1, -0.2])
    model.compile(optimizer=keras.optimizers.Adam(rate))
    return model


def run(folder, steps=70, *, watched=True, **changes):
    trained = model()
    given = {"num_robustness_steps": 5} if watched else {}
    settings = LoopSettings(
        steps, 32, num_output_steps=5, num_checkpoint_steps=20, **given | changes
    )
    return trained, train(trained, *data(), settings, folder, show_progress=False)


def robustness(folder):
    with (folder / "robustness.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_a_fall_is_noticed_once_and_the_watch_changes_nothing(tmp_path, capsys):
    _, outcome = run(tmp_path / "watched")
    said = capsys.readouterr().err
    assert said.count("warning: catastrophic overfitting: accuracy under PGD on") == 1
    assert outcome == (70, True, None)
    run(tmp_path / "plain", watched=False)
    assert not (tmp_path / "plain" / "robustness.csv").exists()
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("watched", "plain")]
    assert logs[0] == logs[1]
    found = robustness(tmp_path / "watched")
    assert [row["step"] for row in found] == list(range(5, 75, 5))
    assert max(row["pgd_accuracy"] for row in found) > 0.9 and found[-1]["pgd_accuracy"] < 0.1
    assert list((tmp_path / "watched" / "tensorboard").glob("events*"))


def test_training_stops_and_the_best_checkpoint_is_what_is_left(tmp_path):
    exported, removed = [], []
    trained = model()
    settings = LoopSettings(
        70,
        32,
        num_output_steps=5,
        num_checkpoint_steps=5,
        num_robustness_steps=5,
        stop_on_overfitting=True,
        max_to_keep=1,
    )
    outcome = train(
        trained,
        *data(),
        settings,
        tmp_path,
        on_checkpoint=exported.append,
        on_removal=removed.append,
        show_progress=False,
    )
    found = robustness(tmp_path)
    best = best_row(found)
    assert outcome.is_finished and outcome.stop == Stop(found[-1]["step"], best["step"])
    assert FALL < outcome.stop.step < 70 and outcome.step == best["step"] <= FALL
    # Newest of all, for whoever reads the folder, and exported last.
    assert saved_steps(tmp_path) == [outcome.step] and exported[-1] == outcome.step
    assert set(exported) - set(removed) == {outcome.step}
    fresh = model()
    fresh.optimizer.build(fresh.network.trainable_variables)
    restore_newest_state(tmp_path, [*fresh.network.variables, *fresh.optimizer.variables])
    for left in (trained, fresh):
        measured = RobustnessProbe(left.network, *data(), THREAT).measure()
        assert measured["pgd_accuracy"] == best["pgd_accuracy"] > 0.9


@pytest.mark.parametrize("stop", [8, 44])
def test_a_watched_run_in_two_parts_has_the_rows_of_one(tmp_path, stop):
    _, whole = run(tmp_path / "whole", stop_on_overfitting=True)
    run(tmp_path / "parts", steps=stop, stop_on_overfitting=True)
    _, rest = run(tmp_path / "parts", stop_on_overfitting=True)
    assert whole == rest and whole.stop is not None
    expected = robustness(tmp_path / "whole")
    # A part is measured at its end, too.
    assert [row for row in robustness(tmp_path / "parts") if row["step"] != stop] == expected


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.0, 0.01, 0.0], False),
        ([0.19, 0.0], False),
        ([0.1, 0.5, 0.1], False),
        ([0.1, 0.5, 0.095], True),
        ([0.2, 0.0], True),
        ([0.6, 0.0, 0.3], False),
        ([], False),
    ],
)
def test_only_robustness_that_was_learned_can_be_lost(accuracies, expected):
    """A ramp of epsilon, or a slow start, is no overfitting."""
    rows = [{"step": i, "pgd_accuracy": value} for i, value in enumerate(accuracies)]
    assert is_overfitted(rows) is expected


def test_robustness_that_never_came_is_noticed_in_the_second_half(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        RobustnessProbe, "measure", lambda _: {"clean_accuracy": 1.0, "pgd_accuracy": 0.05}
    )
    run(tmp_path, steps=30)
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "overfitted to its adversary" in said
    assert "warning: at step 20" in said


def test_a_run_to_which_robustness_never_came_stops_and_leaves_its_best(tmp_path, monkeypatch):
    accuracies = iter([0.01, 0.08, 0.0, 0.04])
    monkeypatch.setattr(
        RobustnessProbe,
        "measure",
        lambda _: {"clean_accuracy": 1.0, "pgd_accuracy": next(accuracies)},
    )
    _, outcome = run(tmp_path, steps=32, stop_on_overfitting=True)
    found = robustness(tmp_path)
    # Not before half of the training is over.
    assert [row["pgd_accuracy"] for row in found] == [0.01, 0.08, 0.0, 0.04][: len(found)]
    assert outcome.stop == Stop(found[-1]["step"], found[1]["step"])
    assert 16 < outcome.stop.step <= 32


def test_settings_watch_with_an_adversary_only_and_old_runs_keep_their_names():
    def steps(**given):
        return resolve_settings({"dataset": "mnist", **given}).loop.num_robustness_steps

    assert steps() == 0
    assert steps(num_robustness_steps=7) == 7
    assert steps(adversary="pgd", num_robustness_steps=0) == 0
    lengths = (30, 2000, 10**5)
    usual = [steps(adversary="pgd", max_num_training_steps=length) for length in lengths]
    assert usual == [100, 200, 500]
    settings = resolve_settings({"dataset": "mnist", "adversary": "pgd"})
    assert settings.name == "mnist-7-step-adversarial-100000steps-seed0-f14537"


@pytest.mark.parametrize(
    "given", [{"num_robustness_steps": 0}, {"num_robustness_steps": 11}, {}], ids=str
)
def test_stopping_without_a_measurement_is_refused(given):
    with pytest.raises(ValueError, match="stop_on_overfitting needs num_robustness_steps from 1"):
        LoopSettings(10, stop_on_overfitting=True, **given)


def test_a_stopped_run_stays_stopped_and_says_so(tmp_path, monkeypatch, capsys):
    """On the challenge's network, with measurements that are planted."""
    accuracies = iter([0.3, 0.6, 0.0])

    def planted(probe):
        return {"clean_accuracy": 0.9, "pgd_accuracy": next(accuracies)}

    monkeypatch.setattr(RobustnessProbe, "measure", planted)
    settings = resolve_settings(
        {
            "dataset": "mnist",
            "adversary": "pgd",
            "num_steps": 1,
            "max_num_training_steps": 6,
            "training_batch_size": 4,
            "num_robustness_steps": 1,
            "num_checkpoint_steps": 2,
            "stop_on_overfitting": True,
        }
    )
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 28, 28, 1), np.uint8), rng.integers(0, 10, 8)
    stop = Stop(step=3, result_step=2)
    for _ in range(2):
        # The second time no measurement is left: nothing is trained.
        outcome = train_run(settings, images, labels, tmp_path, show_progress=False)
        assert outcome == (2, True, stop)
        assert read_json(tmp_path / "run.json")["stopped"] == {"step": 3, "result_step": 2}
    assert 'model_checkpoint_path: "checkpoint-2"' in (tmp_path / "checkpoint").read_text()
    found = find_model(tmp_path)
    assert found.training == {"steps_done": 2, "steps_planned": 6, "stopped_at": 3}
    message = "overfitted catastrophically at step 3 of 6 and was stopped; this is its network of"
    assert message in capsys.readouterr().err
    assert training_notices(found.training)[0]["name"] == "stopped_run"
    loaded = load_run(tmp_path)
    assert loaded.stop == stop and loaded.steps == 2
    assert list(loaded.robustness["pgd_accuracy"]) == [0.3, 0.6, 0.0]


@pytest.mark.parametrize("said", [None, 3, {}, {"step": 3}, {"step": "3", "result_step": 2}])
def test_a_damaged_stop_is_none(said, tmp_path):
    write_json(tmp_path / "run.json", {"stopped": said})
    assert load_run(tmp_path).stop is None


def test_a_damaged_table_is_one_line(tmp_path):
    run(tmp_path, steps=20)
    (tmp_path / "robustness.csv").write_text(",".join(ROBUSTNESS_COLUMNS) + "\n5,a,b,c\n")
    with pytest.raises(TrainingError, match=r"robustness.csv is damaged .* move it away"):
        run(tmp_path)


def test_a_threat_model_is_needed(tmp_path):
    plain = RegularizedModel(model().network, Objective(), bounds=(0.0, 1.0))
    plain.compile(optimizer="adam")
    settings = LoopSettings(10, 32, num_robustness_steps=5)
    with pytest.raises(ValueError, match="needs an adversary, or a threat model"):
        train(plain, *data(), settings, tmp_path, show_progress=False)
