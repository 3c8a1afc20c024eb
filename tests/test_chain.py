"""From training to the table: names of evaluations, what is never overwritten, the next command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from commands import ROOT, assert_one_line_error, command
from test_report import ATTACKS, first, save_evaluation, save_run, save_strong, save_training

from logit_reg.attacks import PGD, Adaptive, AutoAttack, Restarts
from logit_reg.commands import command_line
from logit_reg.evaluation.ledger import evaluation_label, evaluation_name, planned_result
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.experiments import evaluations
from logit_reg.experiments.evaluations import TestImages, claim_file, evaluate_protocols, note_file
from logit_reg.files import read_json, write_json
from logit_reg.messages import UsageError
from logit_reg.report.runs import load_run, run_folders
from logit_reg.report.tables import results_table, split_by_dataset
from logit_reg.threat import ThreatModel
from madry_compat.challenges import CIFAR10, MNIST

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SMALL = ThreatModel("linf", 0.1, 0.0, 1.0)
L2 = ThreatModel("l2", 2.0, 0.0, 1.0)


def plan(protocols, seed=0, count=100, **settings):
    return planned_result(
        protocols, dataset="mnist", num_examples=count, settings=settings, seed=seed
    )


# Names


@pytest.mark.parametrize(
    ("planned", "name"),
    [
        (plan({"autoattack": protocol_attacks("autoattack", MNIST)}), "autoattack-n100"),
        (plan({"paper-20": protocol_attacks("paper-20", CIFAR10)}, 1), "paper-20-n100-seed1"),
        (
            plan({"autoattack": {"a": AutoAttack(SMALL)}}, data="a.npz"),
            "autoattack-linf0.1-n100",
        ),
        # A challenge's images under another threat model than the protocol's.
        (plan({"adaptive": {"adaptive-l2-2": Adaptive(L2)}}), "adaptive-l2-2-n100"),
        (
            plan({"autoattack": {"autoattack-linf-0.1": AutoAttack(SMALL)}}),
            "autoattack-linf0.1-n100",
        ),
        (plan({"autoattack-l2": protocol_attacks("autoattack-l2", MNIST)}), "autoattack-l2-n100"),
        (plan({"adaptive": {"a": Adaptive(L2)}}, data="a.npz"), "adaptive-l2-2-n100"),
        (
            plan({"flags": {"pgd40-xent": PGD(SMALL)}}, count=9),
            "pgd40-xent-step0.01-linf0.1-n9",
        ),
        (
            plan({"flags": {"pgd4-cw-x2": Restarts(PGD(SMALL, "cw", 4, 0.1, confidence=50), 2)}}),
            "pgd4-cw-x2-step0.1-kappa50-linf0.1-n100",
        ),
        (
            plan(
                {p: protocol_attacks(p, MNIST) for p in ("paper-fgsm", "paper-mnist")},
                worst_case_only=True,
                attack_dtype="bfloat16",
                training={"steps_done": 4, "steps_planned": 9},
            ),
            "paper-fgsm-paper-mnist-n100-step4-worst-case-only-bfloat16",
        ),
    ],
)
def test_an_evaluation_is_named_by_what_it_is(planned, name):
    assert evaluation_name(planned) == name
    assert evaluation_name({}) == "-nNone" and evaluation_label({"protocols": 3}) == ""


# Nothing is written over something else


def tiny(seed=0):
    keras.utils.set_random_seed(seed)
    # Keras numbers what has no name anew in every process.
    inputs = keras.Input((8, 8, 1), name="images")
    flat = keras.layers.Flatten(name="flat")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(flat), name="tiny")


def tiny_images(seed=0, num=6):
    rng = np.random.default_rng(seed)
    images = rng.random((num, 8, 8, 1)).astype(np.float32)
    return TestImages("mine", images, rng.integers(0, 4, num), (0.0, 1.0))


def evaluate_tiny(folder, network=None, test=None, attack=None, seed=0, **options):
    protocols = {"flags": {"pgd2-xent": attack or PGD(SMALL, num_steps=2)}}
    return evaluate_protocols(
        network or tiny(),
        test or tiny_images(),
        protocols,
        folder,
        batch_size=6,
        seed=seed,
        settings={},
        show_progress=False,
        **options,
    )[1]


OTHERS = {
    "network": {"network": tiny(1)},
    "images": {"test": tiny_images(1)},
    "labels": {"test": TestImages("mine", tiny_images().images, np.zeros(6, int), (0.0, 1.0))},
    "num_eval_examples 6 -> 3": {"test": tiny_images().first(3)},
    "dataset mine -> yours": {
        "test": TestImages("yours", tiny_images().images, tiny_images().labels, (0.0, 1.0))
    },
    "random_seed 0 -> 1": {"seed": 1},
    "threat.epsilon 0.1 -> 0.2": {"attack": PGD(ThreatModel("linf", 0.2, 0.0, 1.0), num_steps=2)},
    "step_size 0.01 -> 0.05": {"attack": PGD(SMALL, num_steps=2, step_size=0.05)},
    "worst_case_only False -> True": {"worst_case_only": True},
}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    evaluate_tiny(folder)
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_a_result_of_other_settings_is_refused_and_stays(what, held):
    before = {path.name: path.read_bytes() for path in held.iterdir()}

    with pytest.raises(UsageError, match=rf"{re.escape(what)}.*choose another --output_dir"):
        evaluate_tiny(held, **OTHERS[what])

    assert {path.name: path.read_bytes() for path in held.iterdir()} == before


def test_the_same_evaluation_goes_where_it_was(held):
    again = evaluate_tiny(held)
    assert again["robust_accuracy"] == read_json(held / "result.json")["robust_accuracy"]
    assert not (held / ".state").exists()


def test_an_unfinished_evaluation_is_kept_from_another(tmp_path):
    protocols = {"flags": {"pgd2-xent": PGD(SMALL, num_steps=2)}}
    planned = evaluations.plan_evaluation(tiny(), tiny_images(), protocols, seed=0)
    evaluations.claim_output_dir(tmp_path, planned)

    with pytest.raises(UsageError, match="random_seed 0 -> 7"):
        evaluate_tiny(tmp_path, seed=7)
    evaluate_tiny(tmp_path)


def test_a_file_of_images_is_kept_from_other_settings(tmp_path):
    path = tmp_path / "attack.npy"
    claim_file(path, {"seed": 0}, "--store_adv_path")
    path.write_bytes(b"images")
    with pytest.raises(UsageError, match="does not say how it was made"):
        claim_file(path, {"seed": 0}, "--store_adv_path")
    note_file(path, {"seed": 0})
    claim_file(path, {"seed": 0}, "--store_adv_path")
    with pytest.raises(UsageError, match="seed 0 -> 1.*another --store_adv_path"):
        claim_file(path, {"seed": 1}, "--store_adv_path")


def test_an_export_goes_to_a_folder_of_its_own(tmp_path):
    save_run(tmp_path / "runs" / "a", "a")
    save_run(tmp_path / "runs" / "b", "b")
    for _ in range(2):
        done = command("report", "--runs=runs", "--export=out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    one = command("report", "--runs=runs/a", "--export=out", cwd=tmp_path)
    assert_one_line_error(one, "--export=out: the folder holds other runs (b)")
    record = read_json(tmp_path / "runs" / "a" / "run.json")
    record["settings"]["beta"] = 5.0
    write_json(tmp_path / "runs" / "a" / "run.json", record)
    other = command("report", "--runs=runs", "--export=out", cwd=tmp_path)
    assert_one_line_error(other, "out/a holds", "beta 2.0 -> 5.0")
    assert load_run(tmp_path / "out" / "a").settings["beta"] == 2.0


# The table


def save_named(run, protocol, num_correct, count=50, **changes):
    """An evaluation where `eval_challenge.py` puts it."""
    attacks = protocol_attacks(protocol, MNIST)
    folder = run / "evaluations" / "new"
    correct = dict.fromkeys(attacks, first(num_correct, count))
    save_evaluation(folder, np.ones(count, bool), correct, protocols={protocol: attacks})
    result = read_json(folder / "result.json") | changes
    write_json(folder / "result.json", result)
    return folder.rename(folder.with_name(evaluation_name(result)))


def cells(run):
    table = results_table([run] if not isinstance(run, list) else run)
    return dict(zip([c.replace("\n", " ") for c in table.columns], table.rows[0], strict=True))


def test_what_is_evaluated_by_hand_stands_in_the_table_by_its_protocol(tmp_path):
    folder = save_training(tmp_path / "a", "a")
    save_named(folder, "madry-mnist", 20)
    save_named(folder, "paper-l2", 30)
    save_named(folder, "autoattack", 10)
    save_named(folder, "adaptive", 5)

    assert cells(load_run(folder)) == {
        "run": "a",
        "clean n = 50": "100.0",
        "madry-PGD-40 xent n = 50": "40.0",
        "madry-PGD-40 CW n = 50": "40.0",
        "worst case [95 %] n = 50": "40.0 [27.6, 53.8]",
        "paper-l2 [95 %] n = 50": "60.0 [46.2, 72.4]",
        "autoattack [95 %] n = 50": "20.0 [11.2, 33.0]",
        "strong attack [95 %] adaptive n = 50": "10.0 [4.3, 21.4]",
        "training steps": "1,000",
        "training minutes": "1.5",
    }


def test_folder_names_have_no_meaning(tmp_path):
    one = save_run(tmp_path / "one", "a")
    other = save_run(tmp_path / "other", "a")
    (other / "strong").rename(other / "evaluation2")
    (other / "evaluation").rename(other / "strong")

    assert results_table([load_run(one)]) == results_table([load_run(other)])


def test_two_seeds_of_one_protocol_stand_side_by_side(tmp_path):
    folder = save_training(tmp_path / "a", "a")
    save_named(folder, "autoattack", 10)
    save_named(folder, "autoattack", 12, seed=3)

    found = cells(load_run(folder))

    assert [name for name in found if "attack" in name] == [
        "autoattack-n50 [95 %] n = 50",
        "strong attack [95 %] autoattack n = 50",
    ]


def test_an_attack_of_flags_never_stands_for_that_of_a_protocol(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    flags = {"pgd40-xent": PGD(SMALL), "pgd40-cw": PGD(SMALL, "cw")}
    correct = dict.fromkeys(flags, first(999, 1000))
    save_evaluation(
        folder / "mild",
        np.ones(1000, bool),
        correct,
        dataset="mnist_5k",
        protocols={"flags": flags},
    )

    assert cells(load_run(folder))["PGD-40 xent n = 500"] == "60.0"


def test_an_unfinished_run_is_marked(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    run = load_run(folder)
    run.settings["max_num_training_steps"] = 20020
    assert cells(run)["training steps"] == "1,000 of 20,020 (unfinished)"
    run.settings["max_num_training_steps"] = 1000
    assert cells(run)["training steps"] == "1,000"


def test_evaluations_of_an_earlier_network_do_not_mix_with_those_of_the_last(tmp_path):
    folder = save_training(tmp_path / "a", "a")
    training = {"steps_done": 442, "steps_planned": 1000}
    save_named(folder, "madry-mnist", 40, settings={"training": training})
    early = cells(load_run(folder))
    save_named(folder, "autoattack", 10, settings={"training": training | {"steps_done": 1000}})
    run = load_run(folder)

    assert early["training steps"] == "442"
    assert not any("PGD" in name for name in cells(run))
    assert "Left out: evaluations of a at step 442" in results_table([run]).caption


def test_all_of_a_folder_of_runs_is_found_networks_from_elsewhere_too(tmp_path):
    save_run(tmp_path / "sweep" / "beta-10", "c")
    save_run(tmp_path / "sweep" / "beta-2", "b")
    save_training(tmp_path / "a", "a")
    save_strong(tmp_path / "evaluations" / "mine-012345-images" / "autoattack-n10", 1, 10)
    # As earlier versions named them.
    save_strong(tmp_path / "evaluations" / "mine-images", 1, 10)

    found = run_folders(tmp_path)

    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a",
        "evaluations/mine-012345-images",
        "evaluations/mine-images",
        "sweep/beta-2",
        "sweep/beta-10",
    ]
    assert cells(load_run(found[1]))["run"] == "mine-012345-images"


def test_every_data_set_has_a_table_of_its_own(tmp_path):
    here = load_run(save_run(tmp_path / "a", "a"))
    folder = save_run(tmp_path / "b", "b")
    correct = dict.fromkeys(ATTACKS, first(1, 2))
    save_evaluation(folder / "other", first(2, 2), correct, dataset="fashion_mnist")

    groups = split_by_dataset([here, load_run(folder)])

    assert sorted([[run.name for run in group] for group in groups]) == [["a", "b"], ["b"]]
    assert [len(results_table(group).rows) for group in groups] == [2, 1]


# The next command


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("clone/scripts/train.py", "python clone/scripts/eval_challenge.py"),
        ("a b/train.py", "python 'a b/eval_challenge.py'"),
        ("/opt/x/bin/logit-reg-train", "/opt/x/bin/logit-reg-eval"),
        ("-c", "python -m logit_reg.commands.eval_challenge"),
    ],
)
def test_the_next_command_is_started_as_this_one_was(program, start, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    command_line.print_next("eval_challenge", {"model_dir": Path("a run"), "bounds": ["0", "1"]})
    assert capsys.readouterr().out == f"next: {start} '--model_dir=a run' --bounds=0,1\n"


def test_a_process_that_a_command_starts_prints_the_name_that_was_typed(tmp_path):
    code = (
        "import subprocess, sys\n"
        "from logit_reg.commands import command_line\n"
        "def main():\n"
        "    command_line.print_next('report', {})\n"
        "    if len(sys.argv) == 1: subprocess.run([sys.executable, 'inner.py', 'again'])\n"
        "command_line.run(lambda words: main(), '', takes_arguments=True, needs_tensorflow=False)"
    )
    (tmp_path / "train.py").write_text(code)
    (tmp_path / "inner.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "train.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == f"next: python {tmp_path / 'report.py'}\n" * 2, done.stderr


@pytest.mark.slow
def test_the_chain_of_the_readme_leads_to_a_table_and_a_comparison(tmp_path):
    """Its own lines, cut short; then the lines that the commands print."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    block = next(block for block in blocks if "scripts/train.py --reg=squeeze" in block)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    lines = [words[1:] for words in lines if words[:1] == ["python"]]
    commands = [Path(words[0]).stem for words in lines]
    assert commands[0] == "train"
    # What follows is a command of its own.
    lines = lines[: commands.index("report") + 1]
    short = {
        "train": ["--max_num_training_steps=5", "--num_checkpoint_steps=5"],
        "eval_challenge": ["--num_eval_examples=10"],
    }

    def start(words):
        name = Path(words[0]).stem
        done = command(name, *words[1:], *short.get(name, []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        following = re.search(r"^next: python (.*)$", done.stdout, re.MULTILINE)
        return done.stdout, shlex.split(following[1]) if following else None

    printed = [start(words) for words in lines]

    table = printed[-1][0]
    assert "–" not in table and "madry-PGD-40" in table and "autoattack" in table
    # What each printed is the line of the README that follows, with its flags.
    for (_, following), written in zip(printed[:-1], lines[1:], strict=True):
        assert Path(following[0]).name == Path(written[0]).name
        # How many images depends on how many there were before.
        flags = {word for word in written[1:] if not word.startswith("--num_eval_examples")}
        assert flags <= set(following)
    comparison, _ = start(printed[-1][1])
    assert "worst case, each of its own attacks" in comparison
    (run,) = (tmp_path / "runs").iterdir()
    names = sorted(path.name for path in (run / "evaluations").iterdir())
    assert names == ["autoattack-n10", "madry-mnist-n10"]
    result = read_json(run / "evaluations" / "autoattack-n10" / "result.json")
    assert result["settings"]["training"] == {"steps_done": 5, "steps_planned": 5}
