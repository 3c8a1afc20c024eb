"""Several replicas and workers take the steps of one process; a supervisor outlives its worker."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import fork

from logit_reg.training.distribution import (
    Workers,
    check_cluster,
    make_strategy,
    own_slice,
    whole_batch,
)
from logit_reg.training.feeding import traced_train_step
from logit_reg.training.records import LOG_COLUMNS
from logit_reg.training.state import saved_steps, state_path
from logit_reg.training.supervisor import INTERRUPTED, supervise
from madry_compat.data import load, to_pixels

WORKER = Path(distributed_worker.__file__)
# Past the ramps, a change of the schedule, a checkpoint and a look at robustness.
STEPS = 24


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """All kinds, trained in float64 by this process alone."""
    folder = tmp_path_factory.mktemp("one")
    before = keras.config.floatx(), keras.config.dtype_policy()
    strategy = tf.distribute.get_strategy()
    distributed_worker.train_kinds(folder, STEPS, distributed_worker.KINDS, strategy)
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
    return folder


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_workers(folder, steps, kinds, *, supervised=False):
    """Two processes on this machine."""
    folder.mkdir(exist_ok=True)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        prefix = ["supervised"] if supervised else []
        command = [sys.executable, str(WORKER), *prefix, str(folder), str(steps), *kinds]
        processes.append(subprocess.Popen(command, env={**os.environ, "TF_CONFIG": config}))
    return processes


def assert_same_training(folder, other, kinds, steps, atol):
    for kind in kinds:
        with (
            np.load(state_path(folder / kind, steps)) as ours,
            np.load(state_path(other / kind, steps)) as theirs,
        ):
            assert set(ours.files) == set(theirs.files)
            for name in set(ours.files) - {"meta"}:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol)
        logs = [read_log(one / kind) for one in (folder, other)]
        assert len(logs[0]) == steps
        np.testing.assert_allclose(*logs, rtol=1e-8, atol=1e-8)


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return [[float(value) for value in row.values()] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one_process(one_process, tmp_path):
    """Every objective, noise, adversaries and weight decay, in float64."""
    kinds = [kind for kind in distributed_worker.KINDS if kind != "batch norm"]
    for process in start_workers(tmp_path, STEPS, kinds):
        assert process.wait(timeout=300) == 0
    assert_same_training(one_process, tmp_path, kinds, STEPS, atol=1e-9)


@pytest.mark.slow
def test_two_devices_of_one_process_take_the_steps_of_one(one_process, tmp_path):
    kinds = [kind for kind in distributed_worker.KINDS if kind != "batch norm"]
    process = fork(distributed_worker.work_on_devices, 2, tmp_path, STEPS, kinds)
    process.join(300)
    assert process.exitcode == 0
    assert_same_training(one_process, tmp_path, kinds, STEPS, atol=1e-9)


@pytest.mark.slow
def test_a_worker_that_is_killed_starts_again_and_the_run_ends_with_the_same_weights(tmp_path):
    """With BatchNorm, whose moving averages every replica has to keep alike."""
    kinds, steps = ["batch norm"], 300
    for process in start_workers(tmp_path / "whole", steps, kinds, supervised=True):
        assert process.wait(timeout=300) == 0
    folder = tmp_path / "killed"
    processes = start_workers(folder, steps, kinds, supervised=True)
    deadline = time.monotonic() + 300
    while not saved_steps(folder / kinds[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)
    for process in processes:
        assert process.wait(timeout=300) == 0
    assert_same_training(tmp_path / "whole", folder, kinds, steps, atol=0)


def train_by_command(folder, flags, *, num_workers=1):
    """`train.py`, in one process or as two workers under their supervisors."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
    command = [sys.executable, "-m", "logit_reg.commands.train", "--noprogress"]
    command += [f"--model_dir={folder}", "--num_output_steps=1", *flags]
    if num_workers > 1:
        command.append("--strategy=multi_worker")
    processes = []
    for index in range(num_workers):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        processes.append(subprocess.Popen(command, env={**os.environ, "TF_CONFIG": config}))
    for process in processes:
        assert process.wait() == 0


_SQUEEZE = ("--dataset=mnist_5k", "--reg=squeeze", "--beta=2")


@pytest.mark.long
def test_two_workers_have_the_losses_of_one_process_in_float32(tmp_path):
    flags = [*_SQUEEZE, "--training_batch_size=16", "--max_num_training_steps=10"]
    train_by_command(tmp_path / "one", flags)
    train_by_command(tmp_path / "two", flags, num_workers=2)
    total = LOG_COLUMNS.index("total")
    losses = [[row[total] for row in read_log(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 10
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", [_SQUEEZE, ("--dataset=mnist_5k", "--adversary=pgd")])
def test_two_workers_train_the_challenge_s_network_as_one_process(tmp_path, method):
    flags = [*method, "--training_batch_size=16", "--max_num_training_steps=50"]
    flags.append("--train_dtype=float64")
    train_by_command(tmp_path / "one" / "run", flags)
    train_by_command(tmp_path / "two" / "run", flags, num_workers=2)
    assert_same_training(tmp_path / "one", tmp_path / "two", ["run"], 50, atol=1e-9)


@pytest.mark.long
def test_two_workers_end_as_accurate_as_one_process(tmp_path, tfds_dir):
    """3,000 steps in float32, where the last bits of the sums differ: within .3 points clean."""
    flags = ["--dataset=mnist", f"--data_dir={tfds_dir}", "--reg=squeeze", "--beta=2"]
    flags.append("--max_num_training_steps=3000")
    train_by_command(tmp_path / "one", flags)
    train_by_command(tmp_path / "two", flags, num_workers=2)
    test = load("mnist", "test", str(tfds_dir))
    pixels = to_pixels(test.images, "mnist")
    accuracies = []
    for name in ("one", "two"):
        network = keras.saving.load_model(tmp_path / name / "model.keras", safe_mode=True)
        predictions = network.predict(pixels, batch_size=500, verbose=0).argmax(axis=-1)
        accuracies.append((predictions == test.labels).mean())
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.003)


def test_a_batch_that_replicas_cannot_share_evenly_is_refused():
    class Three:
        precision = "float32"
        bounds = (0.0, 1.0)
        distribute_strategy = type("Strategy", (), {"num_replicas_in_sync": 3})

    images, labels = distributed_worker.tiny_data()
    with pytest.raises(ValueError, match="training_batch_size 8 cannot be shared evenly by 3"):
        traced_train_step(Three, images, labels, 8)


def test_one_process_is_its_own_chief_and_has_the_whole_batch():
    workers = Workers(make_strategy("none"))
    assert workers.is_chief and workers.any(True) and not workers.any(False)
    workers.check_same({"beta": 2.0}, np.zeros(3))
    batch = tf.constant([1.0, 2.0])
    assert own_slice(batch) is batch and whole_batch(batch) is batch


def test_a_worker_with_other_settings_or_data_than_the_chief_is_refused(monkeypatch):
    """What the chief sends is kept and given to the other worker."""
    sent = []
    images = np.arange(4)

    def workers(number, exchange):
        one = Workers(make_strategy("none"))
        one.number, one.count = number, 2
        monkeypatch.setattr(one, "_sum", exchange)
        return one

    def send(values):
        sent.append(float(values[0]))
        return values

    workers(0, send).check_same({"beta": 2.0}, images)
    other = workers(1, lambda values: [values[0] + sent[0]])
    other.check_same({"beta": 2.0}, images)
    for parts in (({"beta": 3.0}, images), ({"beta": 2.0}, images[::-1])):
        with pytest.raises(ValueError, match="worker 1 has other settings or data than the chief"):
            other.check_same(*parts)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy must be one of none, mirrored, multi_worker"):
        make_strategy("parameter_server")


@pytest.mark.parametrize(
    "config",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_a_cluster_that_is_none_is_refused(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="needs \\$TF_CONFIG, such as"):
        check_cluster()


def test_a_chief_beside_workers_is_a_cluster(monkeypatch):
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    check_cluster()


# Counts its starts in a file; what it does then differs.
_COUNTING = """
import os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
starts = int(path.read_text()) + 1 if path.exists() else 1
path.write_text(str(starts))
"""


def counting(tmp_path, then):
    return [sys.executable, "-c", _COUNTING + then, str(tmp_path / "starts")]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_worker_starts_again_when_it_is_killed_or_asks_for_it(tmp_path, at_once, capfd):
    then = """
if starts == 1: os.kill(os.getpid(), signal.SIGKILL)
if starts == 2: sys.exit(75)
sys.exit(3)
"""
    assert supervise(counting(tmp_path, then)) == 3
    assert (tmp_path / "starts").read_text() == "3"
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "this worker was killed by signal 9; it starts again from the last checkpoint.",
        "this worker lost the others; it starts again from the last checkpoint.",
    ]


def test_a_worker_that_always_dies_is_given_up(tmp_path, at_once):
    assert supervise(counting(tmp_path, "sys.exit(75)")) == 1
    assert (tmp_path / "starts").read_text() == "10"


_SUPERVISED = """
import os, signal, sys, time
from logit_reg.training import supervisor
if not supervisor.is_supervised():
    sys.exit(supervisor.supervise([sys.executable, "-c", sys.argv[1], *sys.argv[1:]]))
supervisor.follow_supervisor()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_supervisor_that_ends_takes_its_worker_with_it(number):
    command = [sys.executable, "-c", _SUPERVISED, _SUPERVISED]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.send_signal(number)
    status = process.wait(timeout=20)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    elif number == signal.SIGTERM:
        assert status == INTERRUPTED
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
