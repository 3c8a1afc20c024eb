"""The training loop: log, checkpoints, exact resume, locks, refusals."""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from commands import fork

from logit_reg.objectives import Objective
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.free import FreeAdversary
from logit_reg.training.feeding import BatchOrder
from logit_reg.training.folder import TrainingError, run_folder
from logit_reg.training.loop import LoopSettings, train
from logit_reg.training.model import RegularizedModel
from logit_reg.training.state import restore_newest_state, save_state, saved_steps, state_path

SETTINGS = LoopSettings(
    max_num_training_steps=12,
    training_batch_size=8,
    num_output_steps=2,
    num_summary_steps=6,
    num_checkpoint_steps=5,
)


def fresh_model(adversary=None, sigma=0.1):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    network = keras.Model(
        inputs, keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(inputs))
    )
    model = RegularizedModel(
        network,
        Objective("squeeze", beta=0.5),
        sigma=sigma,
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
    adversary = FreeAdversary(ThreatModel(), 8, replays=4) if kind == "free" else None
    whole = run(tmp_path / "whole", model=fresh_model(adversary))
    run(tmp_path / "parts", steps=stop, model=fresh_model(adversary))
    rest = run(tmp_path / "parts", model=fresh_model(adversary))
    for one, other in zip(weights(whole), weights(rest), strict=True):
        np.testing.assert_array_equal(one, other)
    if kind == "free":
        np.testing.assert_array_equal(whole.adversary_state.numpy(), rest.adversary_state.numpy())
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


def test_a_damaged_log_is_never_overwritten(tmp_path):
    run(tmp_path, steps=5)
    (tmp_path / "log.csv").write_bytes(b"step,lr\n\xff\xfe")
    with pytest.raises(TrainingError, match="log.csv is damaged .* move it away"):
        run(tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == b"step,lr\n\xff\xfe"


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
    run(tmp_path, keep_checkpoint_steps=(3,), max_to_keep=2)
    assert sorted(saved_steps(tmp_path)) == [3, 10, 12]


def test_the_newest_states_are_those_of_the_largest_steps_whatever_the_clock_says(tmp_path):
    """A clock that was set back must neither remove the newest state nor restore an old one."""
    run(tmp_path, steps=10, max_to_keep=2)
    os.utime(state_path(tmp_path, 5), (2**32, 2**32))
    os.utime(state_path(tmp_path, 10), (0, 0))
    run(tmp_path, steps=12, max_to_keep=2)
    assert sorted(saved_steps(tmp_path)) == [10, 12]
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 4, 6, 8, 10, 12]


def test_the_caller_hears_of_every_removed_checkpoint(tmp_path):
    removed = []
    settings = LoopSettings(**{**SETTINGS.__dict__, "max_to_keep": 1})
    train(
        fresh_model(), *data(), settings, tmp_path, on_removal=removed.append, show_progress=False
    )
    assert removed == [5, 10] and saved_steps(tmp_path) == [12]


def test_a_state_under_another_step_s_name_is_passed_over(tmp_path, caplog):
    model = run(tmp_path, steps=5)
    variables = [*model.network.variables, *model.optimizer.variables]
    state_path(tmp_path, 5).rename(state_path(tmp_path, 9))
    save_state(tmp_path, 4, variables, {})
    assert restore_newest_state(tmp_path, variables)["step"] == 4
    assert "state-9.npz is damaged" in caplog.text and "it is of step 5" in caplog.text


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    for name in (".state-5.abc.npz", ".model.x1.keras", ".checkpoint-5.partial.index"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".note").write_text("mine")
    with run_folder(tmp_path, {"settings": {}}):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".note", "run.json"}


def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_last_good_checkpoint(tmp_path):
    run(tmp_path, steps=5)
    before = state_path(tmp_path, 5).read_bytes()
    message = r"finite at step 6 \(total .*checkpoint, of step 5, stays in .* smaller learning rate"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, model=fresh_model(sigma=1e38), num_output_steps=4)
    assert saved_steps(tmp_path) == [5]
    assert state_path(tmp_path, 5).read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of the step that spoils the weights is still finite."""
    model = fresh_model()
    model.compile(optimizer=keras.optimizers.SGD(float("inf")))
    with pytest.raises(TrainingError, match="weights are no longer finite after step 1; there is"):
        run(tmp_path, model=model, num_checkpoint_steps=1)
    assert saved_steps(tmp_path) == []


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


def test_a_full_disk_stops_with_one_line_and_loses_nothing(tmp_path):
    """No file may grow beyond 2 KiB: the state does not fit, the rows do."""
    run(tmp_path, steps=5)
    before = state_path(tmp_path, 5).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(TrainingError) as caught:
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large); the last good checkpoint, of step 5" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert saved_steps(tmp_path) == [5] and state_path(tmp_path, 5).read_bytes() == before
    assert not list(tmp_path.glob(".state-*"))
    again, whole = run(tmp_path), run(tmp_path / "whole")
    for one, other in zip(weights(again), weights(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_folder_that_vanishes_stops_with_one_line(tmp_path, monkeypatch):
    batches = BatchOrder.batches

    def batches_and_then_none(self, first_step):
        for number, batch in enumerate(batches(self, first_step)):
            if number == 7:
                shutil.rmtree(tmp_path / "run")
            yield batch

    monkeypatch.setattr(BatchOrder, "batches", batches_and_then_none)
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingError, match="has vanished; put it back"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_going_on_with_other_versions_or_threads_says_that_it_is_not_bit_exact(tmp_path, caplog):
    record = {
        "settings": {},
        "versions": {"tensorflow": "2.20.0"},
        "execution": {"intra_op_threads": 2},
    }
    other = record | {"versions": {"tensorflow": "2.21.0"}, "execution": {"intra_op_threads": 8}}
    with run_folder(tmp_path, record):
        pass
    with run_folder(tmp_path, other):
        assert not caplog.text  # nothing has been trained yet
    state_path(tmp_path, 5).touch()
    with run_folder(tmp_path, other):
        assert not caplog.text
    with run_folder(tmp_path, record):
        pass
    expected = "not bit-exactly: tensorflow '2.21.0' -> '2.20.0', intra_op_threads 8 -> 2"
    assert expected in caplog.text


def test_going_on_under_another_rule_of_training_says_so(tmp_path, caplog):
    """The run of a version that took free training's gradient after the clip has no entry."""
    with run_folder(tmp_path, {"settings": {}}):
        pass
    state_path(tmp_path, 5).touch()
    with run_folder(tmp_path, {"settings": {}, "rules": {}}):
        assert not caplog.text
    with run_folder(
        tmp_path, {"settings": {}, "rules": dict(FreeAdversary(ThreatModel(), 8).rules)}
    ):
        pass
    expected = "not bit-exactly: free gradient None -> 'with respect to the perturbation'"
    assert expected in caplog.text


def test_a_run_of_a_version_with_fewer_settings_goes_on_at_their_defaults(tmp_path):
    with run_folder(tmp_path, {"settings": {"beta": 2.0}}):
        pass
    newer = {"settings": {"beta": 2.0, "train_dtype": "float32"}}
    with run_folder(tmp_path, newer, defaults={"train_dtype": "float32"}):
        pass
    other = {"settings": {"beta": 2.0, "train_dtype": "float64"}}
    with (
        pytest.raises(TrainingError, match="train_dtype 'float32' -> 'float64'"),
        run_folder(tmp_path, other, defaults={"train_dtype": "float32"}),
    ):
        pass


def run_long(folder):
    run(folder, steps=2000, num_checkpoint_steps=50)


def finish(process):
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
def test_killed_processes_end_bit_identical_to_an_uninterrupted_run(tmp_path):
    """SIGKILL at random moments, then the same again; the last one runs to its end."""
    finish(fork(run_long, tmp_path / "whole"))
    for step in (50, 500):
        process = fork(run_long, tmp_path / "killed")
        while max(saved_steps(tmp_path / "killed"), default=0) < step and process.is_alive():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(fork(run_long, tmp_path / "killed"))
    with (
        np.load(state_path(tmp_path / "whole", 2000)) as whole,
        np.load(state_path(tmp_path / "killed", 2000)) as killed,
    ):
        for name in whole.files:
            if name != "meta":
                np.testing.assert_array_equal(whole[name], killed[name])
    whole_log = (tmp_path / "whole" / "log.csv").read_text()
    assert whole_log == (tmp_path / "killed" / "log.csv").read_text()


# The real networks on random images: what is resumed does not depend on the images.
_REAL = """
import sys
import numpy as np
from pathlib import Path
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.runs import train_run
given = {"max_num_training_steps": int(sys.argv[3]), "num_checkpoint_steps": 5,
         "num_output_steps": 1, "num_summary_steps": 10, "training_batch_size": 8}
kinds = {
    "squeeze": {"dataset": "mnist", "reg": "squeeze", "beta": 0.5},
    "adversarial": {"dataset": "mnist", "adversary": "pgd"},
    "cifar": {"dataset": "cifar10", "width": 1, "reg": "squeeze", "beta": 0.5},
}
settings = resolve_settings(given | kinds[sys.argv[2]])
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (100, *settings.challenge.image_shape), np.uint8)
train_run(settings, images, rng.integers(0, 10, 100), Path(sys.argv[1]), show_progress=False)
"""


def start_real(folder, kind, steps):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", _REAL, str(folder), kind, str(steps)]
    return subprocess.Popen(command, env=environment)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "steps", "kills"), [("squeeze", 400, 20), ("adversarial", 300, 20), ("cifar", 60, 3)]
)
def test_random_kills_leave_the_real_networks_bit_identical(tmp_path, kind, steps, kills):
    """SIGKILL from the first moment of a process on, while it starts, trains or writes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_real(whole, kind, steps).wait() == 0
    rng = random.Random(0)
    for _ in range(kills):
        before = max(saved_steps(killed), default=0)
        process = start_real(killed, kind, steps)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 10))
        else:
            # Past one more checkpoint, so that the kills are spread over the whole run.
            while max(saved_steps(killed), default=0) <= before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
        process.kill()
        process.wait()
        if max(saved_steps(killed), default=0) == steps:
            break
    assert start_real(killed, kind, steps).wait() == 0
    with (
        np.load(state_path(whole, steps)) as expected,
        np.load(state_path(killed, steps)) as found,
    ):
        for name in set(expected.files) - {"meta"}:
            np.testing.assert_array_equal(expected[name], found[name])
    assert (whole / "log.csv").read_text() == (killed / "log.csv").read_text()
    for suffix in (".index", ".data-00000-of-00001"):
        name = f"checkpoint-{steps}{suffix}"
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


# A disk of its own for one command: a tmpfs in a name space that the process makes for itself.
_TMPFS = """
set -e
mount -t tmpfs -o size=100m none "$1"
run() { "$2" -m logit_reg.commands.train --dataset=mnist_5k --reg=squeeze --beta=0.5 \
  --training_batch_size=4 --num_checkpoint_steps=2 --model_dir="$1/run" --noprogress \
  --max_num_training_steps="$3" $4; }
run "$1" "$2" 6 || echo "status $?"
mount -o remount,size=600m "$1"
run "$1" "$2" 6
mount -o remount,ro "$1"
run "$1" "$2" 8 --extend || echo "status $?"
cp "$1/run/log.csv" "$3"
"""


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_are_one_line_each_and_lose_nothing(tmp_path):
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no name space of its own is allowed here")
    arguments = [str(tmp_path / "disk"), sys.executable, str(tmp_path / "log.csv")]
    command = ["unshare", "-rm", "bash", "-c", _TMPFS, "bash", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("status 1") == 2 and process.stdout.count("done:") == 1
    assert "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert "cannot be written (No space left on device); the last good checkpoint, of" in errors[0]
    assert "cannot be written (Read-only file system)" in errors[1]
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["step", "1", "6"]
