"""The commands as a user types them: the bare ones, mistakes, kill and resume."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT, assert_one_line_error, command, fork_command

SCRIPTS = (
    "train",
    "eval_challenge",
    "attack",
    "audit",
    "demo",
    "landscape",
    "report",
    "fetch_model",
    "export_checkpoint",
    "sweep",
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder in which the bare training command ran, cut to a few steps."""
    folder = tmp_path_factory.mktemp("bare")
    process = command(
        "train", "--reg=squeeze", "--beta=11", "--max_num_training_steps=6", cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return folder, process


def test_without_dataset_the_digits_stand_in_for_a_set_that_data_dir_lacks(tmp_path):
    (tmp_path / "empty").mkdir()
    few = ("--max_num_training_steps=1", "--training_batch_size=4", "--model_dir=a")
    for flag in ("data_dir", "data_path"):
        process = command("train", f"--{flag}=empty", *few, "--noprogress", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert "empty has no mnist: mnist_5k stands in for it" in process.stderr
    lacking = [
        ("train", "--dataset=mnist_5k", "--data_dir=empty", *few),
        ("train", "--data_dir=nowhere", *few),
        ("train", "--data_dir=empty", "--dataset=mnist", *few),
        # A challenge's network says nothing of its images: those of the folder are meant.
        (
            "eval_challenge",
            f"--model_dir={ROOT / 'checkpoints' / 'mnist-natural'}",
            "--data_dir=empty",
        ),
    ]
    words = ("mnist_5k is embedded", "no such file or folder", "mnist is not in", "no mnist there")
    for (script, *flags), word in zip(lacking, words, strict=True):
        assert_one_line_error(command(script, *flags, cwd=tmp_path), word)


def the_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def test_the_bare_training_command_says_what_it_does(bare):
    folder, process = bare
    assert "mnist_5k train, 4000 images" in process.stdout
    assert "--download" in process.stdout
    assert f"-> runs/{the_run(folder).name}" in process.stdout
    assert "beta 11 is at or above 10.73" in process.stderr


def test_a_run_holds_what_the_contract_lists(bare):
    run = the_run(bare[0])
    names = {path.name for path in run.iterdir()}
    assert {"run.json", "log.csv", "timing.csv", "tensorboard", "model.keras"} <= names
    assert {"checkpoint", "checkpoint-6.index", "config.json"} <= names
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["beta"] == 11.0
    assert record["settings"]["sigma"] == 0.5
    assert {"seed", "versions", "commit"} <= record.keys()


def test_the_bare_evaluation_command_takes_the_newest_run(bare):
    folder, _ = bare
    process = command("eval_challenge", "--num_eval_examples=20", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "the newest run" in process.stderr
    assert "protocol: madry-mnist" in process.stdout
    output = the_run(folder) / "evaluations" / "madry-mnist-n20"
    result = json.loads((output / "result.json").read_text())
    with (output / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert result["num_examples"] == len(rows) == 20
    robust = np.array([row["robust"] == "1" for row in rows])
    assert result["robust_accuracy"] == robust.mean()
    for name in result["protocols"]["madry-mnist"]["attacks"]:
        correct = np.array([row[f"correct_{name}"] == "1" for row in rows])
        clean = np.array([row["broken_by"] != "clean" for row in rows])
        assert not (robust & ~correct).any() and not (correct & ~clean).any()
    assert not (output / ".state").exists()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train", ["--reg=squash"], ["--reg=squash", "none|squeeze"]),
        ("train", ["--beta=much"], ["--beta=much"]),
        ("train", ["--betta=2"], ["betta"]),
        ("train", ["squeeze"], ["unexpected argument 'squeeze'"]),
        ("eval_challenge", ["--norm=l3"], ["--norm=l3", "linf|l2|l1"]),
        ("eval_challenge", ["--eval_batch_size=0"], ["--eval_batch_size=0", "positive"]),
        ("attack", ["--eval_batch_size=0"], ["--eval_batch_size=0", "positive"]),
    ],
)
def test_wrong_flags_are_refused_at_once(script, flags, words, tmp_path):
    assert_one_line_error(command(script, *flags, cwd=tmp_path), *words)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train", ["--reg=squeeze", "--beta=-1"], ["beta must be at least 0; got -1"]),
        ("train", ["--reg=squeeze"], ["--reg=squeeze needs --beta"]),
        ("train", ["--dataset=mnist", "--data_dir=nowhere"], ["--data_dir=nowhere: no such"]),
        ("train", ["--dataset=cifar10"], ["--data_dir", "--download", "mnist_5k"]),
        ("eval_challenge", ["--model_dir=nowhere"], ["--model_dir=nowhere: no such file"]),
        ("eval_challenge", ["--model_dir=."], ["no model there; expected model.keras"]),
        ("eval_challenge", [], ["no trained run in runs"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(script, flags, words, tmp_path):
    assert_one_line_error(command(script, *flags, cwd=tmp_path), *words)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    lines = [
        ("report", "--runs=file"),
        ("report", "--compare=file,file"),
        ("report", "--leaderboard=l.html", "--checkpoints=file"),
        ("train", "--dataset=mnist", "--data_dir=file"),
        ("train", "--data_dir=file"),
        ("eval_challenge", "--model_dir=file"),
    ]
    for script, *flags in lines:
        assert_one_line_error(command(script, *flags, cwd=tmp_path), "file")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_eval_examples=0"], ["--num_eval_examples must be at least 1; got 0"]),
        (["--protocol=paper-mnist,paper-99"], ["protocol must be one of", "got 'paper-99'"]),
        (["--protocol=paper-20"], ["paper-20 is defined on cifar only; use paper-mnist"]),
        (["--protocol=paper-fgsm", "--epsilon=0.1"], ["a protocol is frozen", "--epsilon"]),
        (["--dataset=cifar10"], ["(28, 28, 1)", "(32, 32, 3)"]),
        (["--epsilon=-1"], ["epsilon must be above 0"]),
    ],
)
def test_mistakes_in_an_evaluation(flags, words, bare):
    assert_one_line_error(command("eval_challenge", *flags, cwd=bare[0]), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_num_training_steps=7"], ["beta 11.0 -> 0.0", "--extend to raise"]),
        (["--reg=squeeze", "--beta=11", "--max_num_training_steps=5", "--extend"], ["above 6"]),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(flags, words, bare):
    folder, _ = bare
    process = command("train", f"--model_dir={the_run(folder)}", *flags, cwd=folder)
    assert_one_line_error(process, *words)


@pytest.mark.shared
def test_a_truncated_tfds_file_is_a_clear_error(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "mnist", tmp_path / "tfds" / "mnist", copy_function=shutil.copy)
    (shard,) = (tmp_path / "tfds").rglob("mnist-train.tfrecord*")
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.truncate(1_000_000)
    process = command("train", "--dataset=mnist", "--data_dir=tfds", cwd=tmp_path)
    assert_one_line_error(process, "is truncated or corrupt", "delete")


def test_help_is_for_newcomers_and_exits_with_0(tmp_path):
    for script in SCRIPTS:
        process = command(script, "--help", cwd=tmp_path)
        assert process.returncode == 0
        assert process.stdout.splitlines()[0].endswith(".")
        assert "Flags:" in process.stdout
        assert ">: " not in process.stdout, "absl's copy of the choices"


def test_help_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    shell = f"{sys.executable} {ROOT / 'scripts' / 'eval_challenge.py'} --help | true"
    process = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, cwd=tmp_path)
    assert process.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.001, 1])
def test_pgd_flatters_a_squeezed_run_of_which_it_leaves_something(bare, epsilon):
    flags = (f"--epsilon={epsilon}", "--num_steps=2", f"--step_size={epsilon}", "--output_dir=out")
    process = command("eval_challenge", *flags, "--num_eval_examples=200", cwd=bare[0])
    assert process.returncode == 0, process.stderr
    left = json.loads((bare[0] / "out" / "result.json").read_text())["robust_accuracy"]
    shutil.rmtree(bare[0] / "out")
    assert (left > 0) == (epsilon < 1)
    flatters = "PGD flatters this family, run --protocol=autoattack"
    assert (flatters in process.stdout.splitlines()) == (left > 0)
    assert "for 1 attack on 200 images" in process.stdout


def test_your_own_model_and_data(bare, tmp_path):
    folder, _ = bare
    rng = np.random.default_rng(0)
    images = (2 * rng.random((6, 28, 28, 1)) - 1).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=rng.integers(0, 10, 6))
    own = [f"--model={the_run(folder) / 'model.keras'}", "--data=images.npz", "--epsilon=0.1"]
    strong = ("--bounds=-1,1", "--protocol=autoattack", "--norm=l2", "--output_dir=strong")
    process = command("eval_challenge", *own, *strong, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "strong" / "result.json").read_text())
    assert result["num_examples"] == 6
    (attack,) = result["protocols"]["autoattack"]["attacks"].values()
    assert attack["settings"]["threat"]["norm"] == "l2"
    frozen = command("eval_challenge", *own, "--bounds=-1,1", "--protocol=paper-l2", cwd=tmp_path)
    assert_one_line_error(frozen, "--protocol=paper-l2: a protocol is frozen")
    outside = command("eval_challenge", *own, "--bounds=0,1", cwd=tmp_path)
    assert_one_line_error(outside, "outside --bounds=0,1")
    missing = command("eval_challenge", *own[:2], cwd=tmp_path)
    assert_one_line_error(missing, "missing --bounds, --epsilon")


def assert_workers_write_the_ledger_of_one(model_dir, folder, *runner):
    flags = [
        f"--model_dir={model_dir}",
        "--dataset=mnist_5k",
        "--protocol=paper-fgsm,autoattack",
        "--num_eval_examples=20",
        "--eval_batch_size=5",
    ]
    one = command("eval_challenge", *flags, "--output_dir=one", cwd=folder)
    assert one.returncode == 0, one.stderr

    two = command(
        "eval_challenge", *flags, "--output_dir=two", "--num_workers=2", *runner, cwd=folder
    )

    assert two.returncode == 0, two.stderr
    assert "workers: 2" in two.stdout
    assert "failed" not in two.stderr
    written = [
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("one", "two")
    ]
    assert written[0].keys() == written[1].keys()
    assert written[0]["ledger.csv"] == written[1]["ledger.csv"]


@pytest.mark.slow
def test_two_workers_write_the_ledger_of_one(bare, tmp_path):
    assert_workers_write_the_ledger_of_one(the_run(bare[0]), tmp_path)


@pytest.mark.slow
def test_workers_on_two_machines_write_the_ledger_of_one(bare, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray.cluster_utils")
    cluster = ray.Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert_workers_write_the_ledger_of_one(the_run(bare[0]), tmp_path, "--runner=ray")
    finally:
        cluster.shutdown()


def kill_when_kept(flags, folder, num_batches):
    """Start the evaluation; SIGKILL once so many batches are kept."""
    process = fork_command("eval_challenge", *flags, cwd=folder.parent)
    while process.exitcode is None:
        if len(list(folder.glob(".state/*.npz"))) >= num_batches:
            process.kill()
        time.sleep(0.02)
    assert process.exitcode == -signal.SIGKILL


def assert_kills_do_not_matter(model_dir, folder, flags, kills):
    flags = [
        f"--model_dir={model_dir}",
        "--dataset=mnist_5k",
        "--num_eval_examples=60",
        "--eval_batch_size=6",
        *flags,
    ]
    one_process = [*flags, "--output_dir=whole", "--num_workers=1"]
    whole = command("eval_challenge", *one_process, cwd=folder)
    assert whole.returncode == 0, whole.stderr
    for num_batches in kills:
        kill_when_kept([*flags, "--output_dir=killed"], folder / "killed", num_batches)
    assert command("eval_challenge", *flags, "--output_dir=killed", cwd=folder).returncode == 0
    ledgers = [(folder / name / "ledger.csv").read_text() for name in ("whole", "killed")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_identical_ledger(bare, tmp_path):
    folder, _ = bare
    assert_kills_do_not_matter(
        the_run(folder), tmp_path, ["--protocol=paper-fgsm,paper-mnist"], (1, 3)
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "kills"), [([], range(1, 31, 3)), (["--num_workers=3"], (1, 9, 20))]
)
def test_many_kills_of_autoattack_s_attacks_do_not_matter(tmp_path, flags, kills):
    train = ["--dataset=mnist_5k", "--max_num_training_steps=200", "--model_dir=natural"]
    assert command("train", *train, cwd=tmp_path).returncode == 0
    flags = ["--protocol=autoattack-each", *flags]
    assert_kills_do_not_matter(tmp_path / "natural", tmp_path, flags, kills)
