"""Sweeps: the grid, what is skipped, what is tried again, the same on Ray, one machine lost."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, command

from logit_reg.experiments.sweep import (
    BAD_INPUT,
    Job,
    Step,
    expand_grid,
    last_words,
    point_name,
    run_job,
    run_local,
    run_on_ray,
    run_sweep,
    sweep_lines,
)

LOCAL = functools.partial(run_local, num_parallel=2)
RAY = functools.partial(run_on_ray, num_cpus=1, num_gpus=0)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)

# Appends a line to the product, and fails as long as a file says so.
STUB = """
import pathlib, sys
product, budget, status = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
left = int(budget.read_text()) if budget.exists() else 0
if left:
    budget.write_text(str(left - 1))
    print("not this time")
    sys.exit(status)
product.parent.mkdir(exist_ok=True)
with product.open("a") as file:
    file.write("ran\\n")
"""


def stub_job(folder, name, *, failures=0, status=1, steps=("train", "evaluation")):
    """A job whose first step fails so many times, with this status."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    budget = folder / "failures"
    if failures:
        budget.write_text(str(failures))
    commands = []
    for step in steps:
        product = f"{step}/product"
        arguments = ("-c", STUB, str(folder / product), str(budget), str(status))
        commands.append(Step(step, arguments, product))
    return Job(name, folder, folder, tuple(commands))


def runs_of(job, step):
    return (job.folder / step / "product").read_text().count("ran")


# The grid


def test_a_grid_is_every_combination_in_order():
    rates = "[[0,5e-4],[6800,1e-4]]"
    assert [point["rates"] for point in expand_grid(f"rates={rates},[[0,1]];beta=1")] == [
        rates,
        "[[0,1]]",
    ]
    assert expand_grid("beta=0.5,2; sigma = 0,0.3") == [
        {"beta": "0.5", "sigma": "0"},
        {"beta": "0.5", "sigma": "0.3"},
        {"beta": "2", "sigma": "0"},
        {"beta": "2", "sigma": "0.3"},
    ]


def test_no_grid_is_one_run():
    assert [point_name(point) for point in expand_grid("")] == ["run"]


def test_names_hold_all_of_a_point_and_nothing_that_leaves_the_folder():
    assert point_name({"beta": "0.5", "reg": "squeeze"}) == "beta-0.5-reg-squeeze"
    assert "/" not in point_name({"config": "../../etc/passwd"})


@pytest.mark.parametrize("text", ["beta", "beta=", "beta=1,,2", "beta=1,1", "beta=1;beta=2", "=3"])
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(ValueError, match="a grid"):
        expand_grid(text)


# One job


def test_a_finished_job_runs_nothing_again(tmp_path):
    job = stub_job(tmp_path, "a")
    assert (run_job(job), run_job(job)) == (0, 0)
    assert (runs_of(job, "train"), runs_of(job, "evaluation")) == (1, 1)


def test_a_lost_product_is_made_again(tmp_path):
    job = stub_job(tmp_path, "a")
    run_job(job)
    (job.folder / "evaluation" / "product").unlink()
    assert run_job(job) == 0
    assert (runs_of(job, "train"), runs_of(job, "evaluation")) == (1, 1)


def test_other_arguments_of_an_evaluation_run_it_alone(tmp_path):
    job = stub_job(tmp_path, "a")
    run_job(job)
    train, evaluation = job.steps
    changed = Step("evaluation", (*evaluation.arguments, "more"), evaluation.product)
    assert run_job(Job("a", job.folder, job.folder, (train, changed))) == 0
    assert (runs_of(job, "train"), runs_of(job, "evaluation")) == (1, 2)


def test_a_model_trained_further_is_evaluated_again(tmp_path):
    job = stub_job(tmp_path, "a")
    run_job(job)
    train, evaluation = job.steps
    changed = Step("train", (*train.arguments, "--extend"), train.product)
    assert run_job(Job("a", job.folder, job.folder, (changed, evaluation))) == 0
    assert (runs_of(job, "train"), runs_of(job, "evaluation")) == (2, 1)
    # What was found of the network before is kept, out of the way.
    assert (job.folder / "earlier" / "evaluation-1" / "product").read_text().count("ran") == 1


def test_a_step_that_fails_ends_the_job(tmp_path):
    job = stub_job(tmp_path, "a", failures=1, status=7)
    assert run_job(job) == 7
    assert not (job.folder / "evaluation").exists()
    assert last_words(job) == "not this time"


def test_a_command_stops_when_its_sweep_is_killed(tmp_path):
    """SIGTERM, so that training saves its state."""
    child = (
        "import os, pathlib, signal, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "def stop(*_):\n    (here / 'stopped').write_text('')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(here / 'started').write_text('')\ntime.sleep(60)\n"
    )
    parent = (
        "import pathlib, sys\nfrom logit_reg.experiments.sweep import *\n"
        f"here = pathlib.Path(sys.argv[1])\nstep = Step('a', ('-c', {child!r}, str(here)), 'a')\n"
        "run_job(Job('a', here, here, (step,)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], cwd=ROOT)
    wait_for(tmp_path / "started")
    process.kill()
    process.wait()
    wait_for(tmp_path / "stopped")


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


# Many jobs


def test_failed_jobs_are_tried_again_and_bad_input_is_not(tmp_path):
    jobs = [
        stub_job(tmp_path, "good"),
        stub_job(tmp_path, "twice", failures=2),
        stub_job(tmp_path, "always", failures=9),
        stub_job(tmp_path, "wrong", failures=9, status=BAD_INPUT),
        stub_job(tmp_path, "later", steps=("train",)),
    ]

    statuses = run_sweep(jobs, LOCAL, retries=2)

    assert statuses == {"good": 0, "twice": 0, "always": 1, "wrong": BAD_INPUT, "later": 0}
    left = [int((jobs[i].folder / "failures").read_text()) for i in (1, 2, 3)]
    assert left == [0, 6, 8]


def test_the_table_says_where_each_run_is(tmp_path):
    jobs = [stub_job(tmp_path, name) for name in ("one", "two", "three", "four")]
    for job in jobs[:3]:
        (job.folder / "sweep.log").write_text("")
    rows = ["step,lr,xent,penalty,total,accuracy,mean_logit_norm", "1,1,2,0,2,.1,3"]
    rows += ["100,1e-4,0.51234,0,1,0.9125,2.5", "200,1e-4,0.4"]
    (jobs[1].folder / "log.csv").write_text("\n".join(rows[:3]) + "\n")
    (jobs[0].folder / "log.csv").write_text("\n".join(rows))
    (jobs[0].folder / "evaluation").mkdir()
    (jobs[0].folder / "evaluation" / "result.json").write_text('{"robust_accuracy": 0.125}')

    lines = sweep_lines(jobs, {"one": 0, "three": 137})

    assert [line.split() for line in lines[1:]] == [
        ["one", "done", "–", "–", "–", "evaluation", "12.5"],
        ["two", "running", "100", "0.512", "91.2", "–"],
        ["three", "failed", "(137)", "–", "–", "–", "–"],
        ["four", "waiting", "–", "–", "–", "–"],
        ["4", "runs:", "1", "running,", "1", "failed,", "1", "waiting,", "1", "done"],
    ]
    assert [line.split()[0] for line in sweep_lines(jobs, {"one": 0, "three": 137}, 4)] == [
        "run",
        "two",
        "three",
        "4",
    ]


# Ray


@needs_ray
@pytest.mark.slow
def test_a_sweep_on_two_machines_is_the_local_one_even_if_one_of_them_dies(tmp_path):
    """Jobs that take two seconds each; the machine that runs half of them is lost at work."""
    import ray
    from ray.cluster_utils import Cluster

    slow = "import time; time.sleep(2)\n" + STUB

    def jobs_in(folder):
        jobs = [stub_job(folder, f"job{i}", failures=int(i == 3)) for i in range(6)]
        change = lambda step: Step(step.name, ("-c", slow, *step.arguments[2:]), step.product)  # noqa: E731
        return [Job(j.name, j.folder, j.folder, tuple(map(change, j.steps))) for j in jobs]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=2)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        jobs, was_lost = jobs_in(tmp_path / "ray"), []

        def lose_a_machine(statuses):
            if not was_lost and sum((job.folder / "sweep.log").exists() for job in jobs) >= 3:
                cluster.remove_node(lost, allow_graceful=False)
                was_lost.append(True)

        statuses = run_sweep(jobs, RAY, retries=3, show=lose_a_machine)
    finally:
        ray.shutdown()
        cluster.shutdown()

    local = jobs_in(tmp_path / "local")
    assert was_lost
    assert statuses == run_sweep(local, LOCAL, retries=3) == {job.name: 0 for job in jobs}
    for job, other in zip(jobs, local, strict=True):
        assert runs_of(job, "evaluation") == runs_of(other, "evaluation") == 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_message_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"pip install '\.\[ray\]'"):
        run_sweep([stub_job(tmp_path, "a")], RAY, retries=0)


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--sweep_dir is missing"),
        (["--sweep_dir=s", "--model_dir=a"], "--sweep_dir is the folder of a sweep's"),
        (["--sweep_dir=s", "--grid=betta=1"], "betta is no flag of train.py"),
        (["--sweep_dir=s", "--grid=beta=one"], "--grid: beta=one: could not convert"),
        (["--sweep_dir=s", "--grid=beta=1", "--beta=2"], "leave one out"),
        (["--sweep_dir=s", "--reg=squeeze", "--grid=beta=1,-1"], "error: beta--1: beta must be"),
        (["--sweep_dir=s", "--grid=beta=1", "--grid=beta=1"], "have a run in common"),
        (["--sweep_dir=s", "--evaluate=autoattack"], "--evaluate looks like"),
        (["--sweep_dir=s", "--evaluate=a: --protocol=paper-99"], "got 'paper-99'"),
        (["--sweep_dir=s", "--evaluate=a: --protokol=x"], "Unknown command line flag 'protokol'"),
        (["--sweep_dir=s", "--evaluate=a: --protocol=paper-20"], "use paper-mnist here"),
        (
            ["--sweep_dir=s", "--evaluation_grid=num_steps=1"],
            "has an effect only with --evaluate",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(words, message, tmp_path):
    process = command("sweep", *words, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert message in process.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_sweep_trains_evaluates_is_skipped_the_second_time_and_tells_of_failures(tmp_path):
    words = ["--sweep_dir=runs/s", "--grid=beta=1,2", "--dataset=mnist_5k", "--reg=squeeze"]
    words += ["--max_num_training_steps=4", "--training_batch_size=16"]
    words += ["--keep_checkpoint_steps=2", "--num_parallel=2"]
    words += ["--evaluate=at: --num_eval_examples=20 --num_steps=1"]
    words += ["--evaluation_grid=checkpoint=2", "--retries=0"]

    first = command("sweep", *words, cwd=tmp_path)

    assert first.returncode == 0, first.stderr
    results = sorted(path for path in (tmp_path / "runs/s").glob("*/at@*/result.json"))
    assert [path.parent.parent.name + "/" + path.parent.name for path in results] == [
        "beta-1/at@checkpoint-2",
        "beta-2/at@checkpoint-2",
    ]
    models = {json.loads(path.read_text())["settings"]["model"] for path in results}
    assert "runs/s/beta-1/checkpoint-2" in models
    times = [path.stat().st_mtime for path in results]

    second = command("sweep", *words, cwd=tmp_path)

    assert second.returncode == 0, second.stderr
    assert [path.stat().st_mtime for path in results] == times

    # A run that fails is told with its last words.
    (tmp_path / "runs/s/beta-1/model.keras").unlink()
    (tmp_path / "runs/s/beta-1/run.json").write_text("{}")
    third = command("sweep", *words, cwd=tmp_path)

    assert third.returncode == 1
    *_, last, error = third.stderr.strip().splitlines()
    assert last.startswith("beta-1: error: runs/s/beta-1/run.json: not the settings of a run")
    assert error == "error: 1 of 2 runs failed; the same command goes on."


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(tmp_path):
    words = ["--sweep_dir=s", "--dataset=mnist_5k", "--max_num_training_steps=40"]
    words += ["--training_batch_size=16", "--num_checkpoint_steps=10", "--num_output_steps=10"]
    code = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *words]
    process = subprocess.Popen(
        code, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(tmp_path / "s" / "run" / "state-10.npz", 300)
    # As a terminal does it: to the sweep and to its commands.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors

    again = command("sweep", *words, cwd=tmp_path)

    assert again.returncode == 0, again.stderr
    log = (tmp_path / "s" / "run" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in log[1:]] == ["1", *map(str, range(10, 41, 10))]
