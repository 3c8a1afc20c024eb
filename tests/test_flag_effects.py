"""Flags without effect, values that no flag can have, and outputs of another kind are refused."""

import json
import subprocess
import sys

import pytest
from commands import assert_flags_exist, flags_of

# Judges many command lines in one process, before TensorFlow would start.
_JUDGE = """
import importlib, json, sys
from absl import flags
from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
script, lines = json.loads(sys.argv[1])
module = importlib.import_module("logit_reg.commands." + script)
for words in lines:
    for name in FLAGS:
        FLAGS[name].unparse()
    try:
        FLAGS(["", *words])
        command_line.check_values()
        getattr(module, "check_flags", lambda: None)()
        if script == "sweep":
            module.planned_sweep()
        print()
    except (ValueError, flags.Error) as error:
        print(" ".join(str(error).split()))
assert "tensorflow" not in sys.modules
"""

OWN = ("--model=m.keras", "--data=x.npz", "--bounds=0,1", "--epsilon=0.1")
SWEEP = ("--sweep_dir=s",)
WIDE = "on cifar10 and cifar100"

# The last flag of each line has no effect, for the reason beside it.
WITHOUT_EFFECT = {
    "train": [
        (("--epsilon=0.3",), "--adversary=pgd"),
        (("--adversary=none", "--num_steps=7"), "--adversary=pgd"),
        (("--adversary=free", "--step_size=0.1"), "--adversary=pgd"),
        (("--adversary=free", "--norandom_start"), "--adversary=pgd"),
        (("--adversary=pgd", "--replays=8"), "--adversary=free"),
        (("--adversary=fgsm_rs", "--free_gradient=image"), "--adversary=free"),
        (("--ramp_steps=10",), "--adversary=pgd or --adversary=free"),
        (("--reg=squeeze", "--beta=2", "--gamma=1"), "--reg=similarity"),
        (("--smoothing=0.5", "--beta=0"), "--reg=squeeze or squeeze_example"),
        (("--reg=clip_xent", "--beta=2"), "--reg=squeeze or squeeze_example"),
        (("--reg=squeeze", "--beta=2", "--omega=1.5"), "--reg=clip_xent"),
        (("--sigma=0", "--noclip_noise"), "--sigma above 0"),
        (("--clip_noise",), "--sigma above 0"),
        (("--dataset=mnist", "--width=1"), WIDE),
        (("--dataset=fashion_mnist", "--momentum=0.9"), WIDE),
        (
            ("--dataset=mnist", "--adversary=pgd", "--attack_batch_norm=training"),
            WIDE,
        ),
        (("--dataset=mnist_5k", "--data_dir=d"), "mnist_5k is embedded"),
        (("--dataset=mnist_5k", "--download"), "mnist_5k is embedded"),
        (("--data_dir=d", "--data_path=p"), "without --data_dir"),
        (("--noema", "--ema_momentum=0.9"), "--ema"),
        (("--stop_on_overfitting",), "where robustness is watched"),
        (
            ("--adversary=pgd", "--num_robustness_steps=0", "--stop_on_overfitting"),
            "where robustness is watched",
        ),
    ],
    "eval_challenge": [
        (("--pred_path=pred.npy",), "--attack_file"),
        (("--attack_file=a.npy", "--protocol=paper-mnist"), "without --attack_file"),
        (("--attack_file=a.npy", "--store_adv_path=b.npy"), "without --attack_file"),
        (("--attack_file=a.npy", "--num_eval_examples=3"), "without --attack_file"),
        (("--attack_file=a.npy", "--trial"), "without --attack_file"),
        (("--merge=a,b", "--output_dir=o", "--eot=5"), "without --merge"),
        (("--protocol=autoattack", "--step_size=0.1"), "a protocol is frozen"),
        (("--protocol=paper-mnist", "--restarts=1"), "a protocol is frozen"),
        (("--loss_func=xent", "--confidence=0"), "--loss_func=cw"),
        (("--bounds=0,1",), "with --model and --data"),
        ((*OWN, "--model_dir=run"), "without --model and --data"),
        ((*OWN, "--download"), "without --model and --data"),
        ((*OWN, "--attack_file=a.npy"), "without --model and --data"),
        (("--runner=ray",), "--num_workers above 1"),
        (("--num_workers=2", "--num_gpus=1"), "--runner=ray"),
        (("--dataset=mnist_5k", "--data_dir=d"), "mnist_5k is embedded"),
    ],
    "attack": [
        (("--confidence=50",), "--loss_func=cw"),
        (("--data_dir=d", "--data_path=p"), "without --data_dir"),
        (("--dataset=mnist_5k", "--download"), "mnist_5k is embedded"),
    ],
    "audit": [
        (("--claim=50", "--controls=run"), "--budget=standard"),
        (("--claim=50", "--control_steps=100"), "--budget=standard"),
        (
            ("--claim=5", "--budget=full", "--controls=none", "--control_steps=100"),
            "without --controls=none",
        ),
        (("--claim=50", *OWN, "--dataset=mnist"), "without --model and --data"),
        (("--claim=50", "--loss_func=xent", "--confidence=1"), "--loss_func=cw"),
    ],
    "landscape": [
        (("--step_size=0.1",), "--direction=pgd"),
        (("--redraw=l.npz", "--model_dir=run"), "without --redraw"),
        (("--redraw=l.npz", "--clip"), "without --redraw"),
        (("--redraw=l.npz", "--extent=2"), "without --redraw"),
    ],
    "report": [
        (("--runs=a", "--title=T"), "--page"),
        (("--runs=a", "--section=results"), "--readme"),
        (("--compare=a,b", "--figure=f.svg"), "--runs"),
        (("--leaderboard=l.html", "--stamp"), "--runs"),
        (("--audits=a", "--figure=f.svg"), "--runs"),
        (("--compare=a,b", "--readme=r.md"), "--runs or --audits"),
        (("--runs=a", "--checkpoints=c"), "--leaderboard"),
    ],
    "sweep": [
        ((*SWEEP, "--num_gpus=1"), "--runner=ray"),
        ((*SWEEP, "--runner=ray", "--num_parallel=2"), "--runner=local"),
        ((*SWEEP, "--evaluation_grid=num_steps=1,2"), "--evaluate"),
        ((*SWEEP, "--grid=adversary=none,free", "--replays=4"), "--adversary=free"),
        ((*SWEEP, "--grid=sigma=0,0.5;clip_noise=true"), "--sigma above 0"),
        ((*SWEEP, "--dataset=mnist", "--grid=width=1,10"), WIDE),
    ],
}

WITH_EFFECT = {
    "train": [
        (),
        ("--adversary=pgd", "--num_steps=7", "--step_size=0.1", "--epsilon=0.3"),
        ("--adversary=free", "--replays=4", "--epsilon=0.3", "--ramp_steps=1"),
        ("--smoothing=0.5", "--noclip_noise"),
        ("--reg=similarity", "--beta=2", "--gamma=1"),
        ("--dataset=cifar10", "--width=1", "--momentum=0.9"),
        ("--width=1",),
        ("--ema", "--ema_momentum=0.9", "--learning_rate_schedule=cyclic"),
        ("--adversary=free", "--stop_on_overfitting"),
        ("--reg=squeeze", "--beta=2", "--num_robustness_steps=50", "--stop_on_overfitting"),
    ],
    "eval_challenge": [
        OWN,
        ("--protocol=autoattack", "--norm=l2", "--epsilon=1"),
        ("--loss_func=cw", "--confidence=0"),
        ("--attack_file=a.npy", "--epsilon=0.1", "--pred_path=p.npy", "--eval_batch_size=5"),
        # What a worker of a shared evaluation is started with.
        ("--num_workers=2", "--runner=ray", "--num_workers=1", "--worker"),
    ],
    "audit": [
        ("--claim=50", "--budget=standard", "--controls=run", "--control_steps=100"),
        ("--fake=temperature",),
        ("--claim=50", "--known_accuracy=50"),
    ],
    "landscape": [("--direction=pgd", "--num_steps=3"), ("--redraw=l.npz", "--output_dir=o")],
    "report": [
        ("--runs=a", "--page=p.html", "--title=T"),
        ("--audits=a", "--readme=r.md", "--section=s"),
    ],
    "sweep": [(*SWEEP, "--grid=adversary=free;replays=2,4", "--num_parallel=2")],
}

# Nothing of a command has such a value.
IMPOSSIBLE = {
    "train": ["--beta=nan", "--sigma=inf", "--random_seed=-1", "--model_dir=", "--model_dir=F"],
    "eval_challenge": [
        "--epsilon=nan",
        "--step_size=-inf",
        "--protocol=",
        "--store_adv_path=adv.png",
        "--pred_path=pred.txt",
        "--output_dir=F",
        "--output_dir=F/below",
        "--random_seed=4294967296",
    ],
    "attack": ["--store_adv_path=attack", "--store_adv_path=D.npy", "--store_adv_path=F/a.npy"],
    "audit": ["--claim=nan", "--claim=150", "--claim=-1", "--output_dir=F", "--known_accuracy=101"],
    "landscape": ["--extent=inf", "--output_dir=F", "--redraw="],
    "report": ["--figure=f.png", "--page=page", "--leaderboard=l.svg", "--export=F", "--runs="],
    "export_checkpoint": ["--zip=model.tar", "--output_dir=F", "--model_dir="],
    "fetch_model": ["--cache_dir=F", "--name="],
    "demo": ["--demo_dir=F", "--demo_dir="],
    "sweep": ["--sweep_dir=F", "--sweep_dir="],
}


def judge(script, lines, cwd):
    """What each command line is refused with, or "", where F is a file and D.npy a folder."""
    (cwd / "F").write_text("")
    (cwd / "D.npy").mkdir(exist_ok=True)
    words = json.dumps([script, lines])
    process = subprocess.run(
        [sys.executable, "-c", _JUDGE, words], capture_output=True, text=True, cwd=cwd
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split("\n")[: len(lines)]


@pytest.mark.parametrize("script", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused_with_what_it_needs(script, tmp_path):
    lines = [words for words, _ in WITHOUT_EFFECT[script]]
    for (words, reason), said in zip(
        WITHOUT_EFFECT[script], judge(script, lines, tmp_path), strict=True
    ):
        name = words[-1].removeprefix("--").partition("=")[0]
        name = name if script != "sweep" or name != "grid" else ""
        flag = name if name in flags_of(script) else name.removeprefix("no")
        assert f"--{flag}" in said and " has an effect only " in said, (words, said)
        assert reason in said.split(" has an effect only ")[1], (words, said)
        assert_flags_exist(script, said)


@pytest.mark.parametrize("script", WITH_EFFECT)
def test_a_flag_with_an_effect_is_taken(script, tmp_path):
    said = judge(script, WITH_EFFECT[script], tmp_path)
    assert said == [""] * len(said)


def test_the_keys_of_a_challenge_s_config_are_no_flags_that_were_given(tmp_path):
    config = {"k": 40, "a": 0.01, "epsilon": 0.3, "loss_func": "xent", "random_start": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = "--config=config.json"
    lines = [
        (given, "--adversary=none"),
        (given, "--num_steps=7"),
        (given, "--adversary=none", "--num_steps=7"),
    ]
    first, second, third = judge("train", lines, tmp_path)
    assert (first, second) == ("", "")
    assert "--num_steps has an effect only" in third
    assert judge("eval_challenge", [(given, "--protocol=paper-mnist")], tmp_path) == [""]


@pytest.mark.parametrize("script", IMPOSSIBLE)
def test_values_that_a_flag_cannot_have_are_refused_before_any_work(script, tmp_path):
    lines = [(word,) for word in IMPOSSIBLE[script]]
    for (word,), said in zip(lines, judge(script, lines, tmp_path), strict=True):
        assert said.removeprefix("flag ").startswith(word.partition("=")[0]), (word, said)


def test_every_table_is_of_flags_that_its_command_has():
    from logit_reg.commands import flag_effects

    tables = {
        "train": flag_effects.TRAINING,
        "attack": flag_effects.ATTACK,
        "eval_challenge": flag_effects.EVALUATION,
        "audit": flag_effects.AUDIT,
        "landscape": flag_effects.LANDSCAPE,
        "report": flag_effects.REPORT,
        "sweep": flag_effects.SWEEP,
    }
    for script, table in tables.items():
        flags = flags_of(script)
        for effect in table:
            assert flags & set(effect.flags), (script, effect.flags)
            assert_flags_exist(script, effect.words)
