"""Every command of EXPERIMENTS.md parses; three of them, cut short, run."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from logit_reg.evaluation.protocols import PROTOCOLS, protocol_attacks
from logit_reg.experiments.sweep import expand_grid
from madry_compat.challenges import CIFAR10, MNIST

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "EXPERIMENTS.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line) for line in BLOCKS.splitlines() if line.strip()]
COMMANDS += [shlex.split(line) for line in re.findall(r"`(python scripts/[^`]*)`", TEXT)]
SWEEPS = [words for words in COMMANDS if words[1] == "scripts/sweep.py"]

# Parses each command's flags, and builds the jobs of each sweep: its grids, its evaluations, and
# the settings of every run.
_PARSE = """
import importlib, json, sys
from logit_reg.commands.command_line import FLAGS
script, *lines = json.loads(sys.argv[1])
module = importlib.import_module("logit_reg.commands." + script)
for words in lines:
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    rest = FLAGS(["", *words])[1:]
    if rest and script != "fetch_model":
        sys.exit(f"unexpected {rest} in {words}")
    if script == "sweep":
        jobs = module.planned_sweep().jobs
        print(json.dumps([[step.arguments for step in job.steps] for job in jobs]))
"""

_RESOLVE = """
import dataclasses, json, sys
from logit_reg.commands import train
from logit_reg.commands.command_line import FLAGS
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.settings import RunSettings
from madry_compat.challenges import CIFAR10, MNIST
names = {field.name for field in dataclasses.fields(RunSettings)}
for words in json.loads(sys.argv[1]):
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    FLAGS(["", *words])
    given = {name: FLAGS[name].value for name in names if name in FLAGS}
    for name in ("step_size_schedule", "beta_schedule"):
        given[name] = train.schedule(FLAGS[name].value, name)
    given["keep_checkpoint_steps"] = train.steps(FLAGS.keep_checkpoint_steps)
    resolve_settings(given)
"""


def python(code, value):
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(value)], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize("script", sorted({words[1] for words in COMMANDS} - {"scripts/sweep.py"}))
def test_every_command_parses(script):
    lines = [words[2:] for words in COMMANDS if words[1] == script]
    assert lines
    python(_PARSE, [Path(script).stem, *lines])


@pytest.mark.slow
def test_every_sweep_parses_and_the_settings_of_each_of_its_runs_go_together():
    output = python(_PARSE, ["sweep", *(words[2:] for words in SWEEPS)])
    jobs = [job for line in output.splitlines() for job in json.loads(line)]
    assert len(jobs) > 80
    python(_RESOLVE, [steps[0][2:] for steps in jobs])
    python(_PARSE, ["eval_challenge", *(step[2:] for steps in jobs for step in steps[1:])])


@pytest.mark.slow
def test_every_sweep_is_cut_short_by_one_flag_at_its_end():
    output = python(
        _PARSE, ["sweep", *([*words[2:], "--max_num_training_steps=200"] for words in SWEEPS)]
    )
    jobs = [job for line in output.splitlines() for job in json.loads(line)]
    assert len(jobs) > 80
    for train, *evaluations in jobs:
        lengths = [word for word in train if word.startswith("--max_num_training_steps=")]
        assert set(lengths) == {"--max_num_training_steps=200"}
        assert evaluations
        assert not re.search(r"/checkpoint-(?!200\b)", " ".join(sum(evaluations, [])))


def test_no_command_writes_below_results():
    for words in COMMANDS:
        reads = [word for word in words if word.startswith(("--runs=", "--compare=", "--redraw="))]
        assert not any("results/" in word for word in words if word not in reads)


@pytest.mark.slow
def test_a_trial_cuts_every_sweep_in_training_network_and_images():
    output = python(_PARSE, ["sweep", *([*words[2:], "--trial"] for words in SWEEPS)])
    jobs = [job for line in output.splitlines() for job in json.loads(line)]
    assert len(jobs) > 80
    for train, *evaluations in jobs:
        assert [word for word in train if "max_num_training_steps" in word] == [
            "--max_num_training_steps=20"
        ]
        is_cifar = any("--dataset=cifar" in word for word in train)
        assert [word for word in train if "--width" in word] == ["--width=1"] * is_cifar
        assert evaluations and all("--trial" in evaluation for evaluation in evaluations)
        assert re.search(r"--model_dir=runs/[\w-]+-trial/", " ".join(train))
        assert not re.search(r"/checkpoint-(?!20\b)", " ".join(sum(evaluations, [])))


def test_the_protocols_exist_and_fit_their_data():
    for words in COMMANDS:
        challenge = CIFAR10 if any("cifar" in word for word in words) else MNIST
        for names in re.findall(r"--protocol=([\w,-]+)", " ".join(words)):
            for name in names.split(","):
                if "adv_trained" not in " ".join(words):
                    assert name in PROTOCOLS
                    protocol_attacks(name, challenge)


def test_there_is_a_command_for_everything_in_the_paper():
    headings = "\n".join(re.findall(r"^## (.*)$", TEXT, re.MULTILINE))
    for what in [*(f"Fig. {i}" for i in range(1, 6)), *(f"Table {i}" for i in range(1, 5))]:
        assert what in headings
    for what in ("Restarts, L2 and SPSA", "Eq. 6", "Loss surfaces"):
        assert what in headings


def test_the_numbers_of_runs_are_those_of_the_grids():
    for figure, number in re.findall(r"^\| Fig\. (\d) \| (\d+) of", TEXT, re.MULTILINE):
        (words,) = [words for words in SWEEPS if f"--sweep_dir=runs/fig{figure}" in words]
        grids = [word.removeprefix("--grid=") for word in words if word.startswith("--grid=")]
        assert sum(len(expand_grid(grid)) for grid in grids or [""]) == int(number)


def cut_short(words, steps=200):
    """The same command as a newcomer tries it: at its end the flag that cuts it short.

    On the embedded digits, with few images and the first point of its first grid.
    """
    kept = []
    for word in words[2:]:
        if word.startswith("--grid=") and any(k.startswith("--grid=") for k in kept):
            continue
        if word.startswith("--grid="):
            word = re.sub(r",[^;]*", "", word)
        word = re.sub(r"--num_eval_examples=\d+", "--num_eval_examples=20", word)
        kept.append(re.sub(r"(num_steps=\d+)(,\d+)+", r"\1", word))
    return [*kept, "--dataset=mnist_5k", f"--max_num_training_steps={steps}"]


ON_MNIST = [words for words in SWEEPS if "--dataset=mnist" in words]


@pytest.mark.long
@pytest.mark.parametrize("words", random.Random(6).sample(ON_MNIST, 3), ids=lambda w: w[2])
def test_a_command_cut_to_200_steps_runs(words, tmp_path):
    short = [word for word in cut_short(words) if not word.startswith("--data_dir")]

    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sweep.py"), *short],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    logs = "\n".join(path.read_text()[-1500:] for path in tmp_path.rglob("sweep.log"))
    assert process.returncode == 0, process.stderr + logs
    evaluations = [word for word in words if word.startswith("--evaluate=")]
    assert len(list(tmp_path.rglob("result.json"))) == len(evaluations)
    assert list(tmp_path.rglob("model.keras"))
