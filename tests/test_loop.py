"""The training loop: log, checkpoints, exact resume, locks, refusals."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from logit_reg.loop import BatchOrder, LoopSettings, TrainingError, run_folder, train
from logit_reg.objectives import Objective
from logit_reg.state import saved_steps, state_path
from logit_reg.threat import ThreatModel
from logit_reg.training import FreeAdversary, RegularizedModel

SETTINGS = LoopSettings(
    max_num_training_steps=12,
    training_batch_size=8,
    num_output_steps=2,
    num_summary_steps=6,
    num_checkpoint_steps=5,
)


def fresh_model(adversary=None, noise_stddev=0.1):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    network = keras.Model(
        inputs, keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(inputs))
    )
    model = RegularizedModel(
        network,
        Objective("squeeze", beta=0.5),
        noise_stddev=noise_stddev,
        clip_noise=False,
        bounds=(0.0, 1.0),
        adversary=adversary,
        seed=3,
    )
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    return model


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (50, 4, 4, 1), np.uint8), rng.integers(0, 3, 50)


def run(folder, steps=12, model=None, **changes):
    settings = LoopSettings(**{**SETTINGS.__dict__, "max_num_training_steps": steps, **changes})
    model = model or fresh_model()
    train(model, *data(), settings, folder, show_progress=False)
    return model


def rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def weights(model):
    return [*model.network.get_weights(), *(v.numpy() for v in model.optimizer.variables)]


def test_log_has_the_contract_s_columns_and_steps(tmp_path):
    run(tmp_path)
    found = rows(tmp_path)
    columns = ["step", "lr", "xent", "penalty", "total", "accuracy", "mean_logit_norm"]
    assert list(found[0]) == columns
    assert [int(row["step"]) for row in found] == [1, 2, 4, 6, 8, 10, 12]
    for row in found:
        total = float(row["xent"]) + 0.5 * float(row["penalty"])
        assert float(row["total"]) == pytest.approx(total, rel=1e-5)


def test_tensorboard_events_are_written(tmp_path):
    run(tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("kind", ["plain", "free"])
def test_a_run_in_two_parts_ends_bit_identical_to_one(tmp_path, stop, kind):
    adversary = FreeAdversary(ThreatModel(), 8) if kind == "free" else None
    changes = {"replays": 4} if kind == "free" else {}
    whole = run(tmp_path / "whole", model=fresh_model(adversary), **changes)
    run(tmp_path / "parts", steps=stop, model=fresh_model(adversary), **changes)
    rest = run(tmp_path / "parts", model=fresh_model(adversary), **changes)
    for one, other in zip(weights(whole), weights(rest), strict=True):
        np.testing.assert_array_equal(one, other)
    if kind == "free":
        np.testing.assert_array_equal(whole.perturbation.numpy(), rest.perturbation.numpy())
    # A part ends with a row of its own, which the whole run does not have.
    of_parts = [row for row in rows(tmp_path / "parts") if int(row["step"]) != stop]
    of_whole = [row for row in rows(tmp_path / "whole") if int(row["step"]) != stop]
    assert of_parts == of_whole


def test_rows_after_the_restored_step_are_cut(tmp_path):
    run(tmp_path, steps=12)
    expected = (tmp_path / "log.csv").read_text()
    state_path(tmp_path, 12).unlink()  # as if killed before the last checkpoint
    with (tmp_path / "log.csv").open("a") as file:
        file.write("13,0.1,0")  # half a row
    run(tmp_path, steps=12)
    assert (tmp_path / "log.csv").read_text() == expected


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, caplog):
    whole = run(tmp_path, steps=12)
    newest = state_path(tmp_path, 12)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    again = run(tmp_path, steps=12)
    assert "state-12.npz is damaged" in caplog.text
    for one, other in zip(weights(whole), weights(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unreadable_states_are_never_overwritten(tmp_path):
    run(tmp_path, steps=5)
    state_path(tmp_path, 5).write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="none of its state"):
        run(tmp_path)
    assert state_path(tmp_path, 5).read_bytes() == b"not a zip file"


def test_old_states_are_removed_except_those_to_keep(tmp_path):
    run(tmp_path, keep_checkpoint_steps=(3,))
    assert sorted(saved_steps(tmp_path)) == [3, 10, 12]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    run(tmp_path, steps=5)
    with pytest.raises(TrainingError, match="no longer finite at step 6"):
        run(tmp_path, model=fresh_model(noise_stddev=1e38))
    assert sorted(saved_steps(tmp_path)) == [5]


def test_a_run_that_is_beyond_its_end_is_refused(tmp_path):
    run(tmp_path, steps=10)
    with pytest.raises(TrainingError, match="from step 10, beyond max_num_training_steps 5"):
        run(tmp_path, steps=5)


def test_order_is_a_new_permutation_every_epoch_and_a_function_of_the_step():
    order = BatchOrder(num_examples=50, batch_size=8, seed=1)
    batches = order.batches(0)
    epochs = [np.concatenate([next(batches) for _ in range(6)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == 48
    assert list(epochs[0]) != list(epochs[1])
    late = next(order.batches(9))
    np.testing.assert_array_equal(late, epochs[1][24:32])


def test_replays_repeat_the_minibatch():
    batches = BatchOrder(num_examples=50, batch_size=8, replays=3).batches(0)
    found = [tuple(next(batches)) for _ in range(6)]
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="exceeds the 50 training examples"):
        BatchOrder(num_examples=50, batch_size=51)


def test_other_settings_in_the_same_folder_are_refused_with_the_differences(tmp_path):
    record = {"settings": {"beta": 2.0, "max_num_training_steps": 10}}
    with run_folder(tmp_path, record):
        pass
    changed = {"settings": {"beta": 3.0, "max_num_training_steps": 10}}
    with (
        pytest.raises(TrainingError, match=r"beta 2.0 -> 3.0"),
        run_folder(tmp_path, changed, extend=True),
    ):
        pass
    longer = {"settings": {"beta": 2.0, "max_num_training_steps": 20}}
    with pytest.raises(TrainingError, match="--extend"), run_folder(tmp_path, longer):
        pass
    with run_folder(tmp_path, longer, extend=True):
        pass
    with (
        pytest.raises(TrainingError, match="above 20; got 10"),
        run_folder(tmp_path, record, extend=True),
    ):
        pass


def test_a_folder_in_use_is_refused(tmp_path):
    record = {"settings": {}}
    with (
        run_folder(tmp_path, record),
        pytest.raises(TrainingError, match="in use by another training process"),
        run_folder(tmp_path, record),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="cannot be written"),
        run_folder(tmp_path / "file" / "run", {"settings": {}}),
    ):
        pass


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_loop
from pathlib import Path
test_loop.run(Path({folder!r}), steps=4000, num_checkpoint_steps=50)
"""


@pytest.mark.slow
def test_killed_processes_end_bit_identical_to_an_uninterrupted_run(tmp_path):
    """SIGKILL at random moments, then the same command again; the last one runs to its end."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}

    def start(folder):
        code = _KILLED.format(tests=tests, folder=str(folder))
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    for wait in (0.5, 1.3):
        process = start(tmp_path / "killed")
        while not saved_steps(tmp_path / "killed") and process.poll() is None:
            time.sleep(0.05)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert max(saved_steps(tmp_path / "killed")) > 0
    assert start(tmp_path / "killed").wait() == 0
    with (
        np.load(state_path(tmp_path / "whole", 4000)) as whole,
        np.load(state_path(tmp_path / "killed", 4000)) as killed,
    ):
        for name in whole.files:
            if name != "meta":
                np.testing.assert_array_equal(whole[name], killed[name])
    whole_log = (tmp_path / "whole" / "log.csv").read_text()
    assert whole_log == (tmp_path / "killed" / "log.csv").read_text()
