"""The benchmark harness: its arithmetic, its checks, and one contender from end to end."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import attack_contenders, figures, run
from benchmarks.cases import CASES, Case, choose
from benchmarks.contenders import CONTENDERS, as_installed, names
from benchmarks.machine import BusyError, busy_processors, wait_until_idle
from benchmarks.networks import export, forward_flops, trades_cnn
from benchmarks.prepare import prepare, starts
from benchmarks.problem import Outcome
from benchmarks.processes import ContenderError, Worker
from benchmarks.summary import (
    Measurement,
    collect,
    disagreements,
    num_different,
    ratio,
    share_of_peak,
)
from benchmarks.table import case_table
from benchmarks.table import main as table_main
from benchmarks.worker import answers
from logit_reg import attacks
from logit_reg.attacks.engine import low_precision as precision
from logit_reg.report.style import to_svg
from logit_reg.threat import ThreatModel
from madry_compat.networks import mnist_cnn, wide_resnet

ROOT = Path(__file__).resolve().parents[1]

PGD = Case("pgd", "pgd", "mnist_cnn", num_images=8, batch_size=4, num_steps=2, repeats=2)


def measured(name, seconds=(1.0,), correct=None):
    return Measurement(name, tuple(seconds), 0.0, 2**20, correct)


def right(count, total):
    return tuple(i < count for i in range(total))


def test_median_and_spread_are_those_of_the_repetitions():
    one = measured("ours", (3.0, 1.0, 2.0, 9.0, 2.5))
    assert one.median == 2.5
    assert one.spread == (1.0, 9.0)


def test_the_ratio_compares_medians_and_its_range_repetitions_side_by_side():
    ours, peer = measured("ours", (1.0, 2.0, 4.0)), measured("peer", (3.0, 5.0, 4.0))
    assert ratio(peer, ours) == (2.0, 1.0, 3.0)
    assert ratio(ours, ours) == (1.0, 1.0, 1.0)


def test_collect_takes_the_largest_peak_and_the_first_verdicts():
    turns = [
        {"seconds": 1.0, "peak_bytes": 7, "correct": [True], "correct_any_iterate": [False]},
        {"seconds": 2.0, "peak_bytes": 9, "correct": [False], "correct_any_iterate": [False]},
    ]
    one = collect("ours", {"seconds": 5.0}, turns)
    assert one == Measurement("ours", (1.0, 2.0), 5.0, 9, (True,), (False,))


def test_share_of_peak_counts_two_forwards_a_gradient():
    case = dataclasses.replace(PGD, num_images=100, num_steps=40)
    # 4,000 gradients of 2 x 50 operations in 2 s are 200,000 a second.
    assert share_of_peak(case, measured("ours", (2.0,)), 50, 1e6) == pytest.approx(0.2)
    early = dataclasses.replace(case, kind="restarts")
    assert share_of_peak(early, measured("ours"), 50, 1e6) is None


@pytest.mark.parametrize(
    "total, ours, peer, agree",
    [
        (1000, 500, 510, True),
        (1000, 500, 511, False),
        (1000, 500, 489, False),
        (50, 20, 21, True),
        (50, 20, 22, False),
    ],
)
def test_accuracies_have_to_agree_within_a_point_or_one_image(total, ours, peer, agree):
    pair = [measured("ours", correct=right(ours, total)), measured("p", correct=right(peer, total))]
    found = disagreements(pair)
    assert found == [] if agree else "p leaves" in found[0]


def test_a_peer_as_installed_lacks_what_our_commands_turn_on(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    seen = []
    as_installed(lambda problem: seen.append((problem, os.environ.copy())))("problem")
    ((problem, environment),) = seen
    assert problem == "problem"
    assert "TF_ENABLE_ONEDNN_OPTS" not in environment
    assert "keras as installed" in names("training")


def test_cases_that_attack_nothing_cannot_disagree():
    assert disagreements([measured("ours"), measured("keras")]) == []
    assert num_different(measured("keras"), measured("ours")) is None


def test_different_verdicts_are_counted_even_where_accuracies_are_equal():
    ours = measured("ours", correct=(True, False, True))
    assert num_different(measured("p", correct=(False, True, True)), ours) == 2


def test_flops_are_those_that_the_layers_take():
    # By hand, two for each weight met: 5 x 5 convolutions on 28 x 28 and 14 x 14, two matrices.
    by_hand = 2 * (784 * 25 * 32 + 196 * 25 * 32 * 64 + 3136 * 1024 + 1024 * 10)
    assert forward_flops(mnist_cnn()) == by_hand
    assert round(by_hand / 1e6, 1) == 27.8
    assert round(2 * by_hand / 1e6, 1) == 55.5
    assert round(forward_flops(trades_cnn()) / 1e6, 1) == 19.9


def test_a_network_that_pytorch_cannot_be_given_is_refused():
    images = keras.Input((28, 28, 1))
    x = keras.layers.Conv2D(4, 3, activation="tanh")(images)
    with pytest.raises(ValueError, match="tanh"):
        export(keras.Model(images, x))
    x = keras.layers.Dropout(0.5)(images)
    with pytest.raises(ValueError, match="Dropout.*no counterpart"):
        export(keras.Model(images, x))


@pytest.mark.parametrize("make", [mnist_cnn, trades_cnn, lambda: wide_resnet(1)])
def test_pytorch_has_the_same_logits(make):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_networks import build

    keras.utils.set_random_seed(1)
    network = make()
    generator = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([generator.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    images = generator.uniform(0, 1, (4, *network.input_shape[1:])).astype(np.float32)
    ours = np.asarray(network(images, training=False))
    theirs = build(export(network))(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(ours).max())


def test_cases_are_chosen_by_name_and_by_what_they_begin_with():
    assert [case.name for case in choose(["startup", "pgd40"])] == ["pgd40", "startup"]
    assert [case.name for case in choose(["restarts"])] == ["restarts-natural", "restarts-squeezed"]
    assert choose(["all"]) == list(CASES)
    with pytest.raises(ValueError, match="no case 'pgd'; there are pgd40"):
        choose(["pgd"])


def test_we_take_part_in_every_case_and_come_first():
    for case in CASES:
        chosen = case.contenders or names(case.kind)
        assert chosen[0] == "ours"
        assert set(chosen) <= set(names(case.kind))


def test_busy_processors_come_from_proc_stat():
    before = "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n"
    # Of 100 ticks 60 are idle and 15 wait for disks; 5 of the rest were stolen.
    after = "cpu  110 0 60 860 65 0 0 5 0 0\ncpu0 1\ncpu1 1\nintr 6\n"
    assert busy_processors(before, after) == pytest.approx(2 * 0.25)


def test_waiting_for_an_idle_machine_says_so_once_and_ends_when_it_is():
    loads, said = iter([1.5, 1.2, 0.1]), list[str]()
    assert wait_until_idle(0.2, 60, measure=lambda: next(loads), say=said.append) == 0.1
    (line,) = said
    assert "1.50 processors are busy" in line and "0.2" in line and "60 s" in line


def test_an_idle_machine_is_not_waited_for():
    said: list[str] = []
    assert wait_until_idle(0.2, 60, measure=lambda: 0.2, say=said.append) == 0.2
    assert said == []


def test_a_machine_that_stays_busy_ends_the_run_with_what_to_do():
    def measure():
        time.sleep(0.01)
        return 1.7

    with pytest.raises(BusyError, match=r"1\.70 processors.*0\.2 are allowed.*--idle_timeout"):
        wait_until_idle(0.2, 0.03, measure=measure, say=lambda line: None)


# In a process of its own: the tests before may have had more memory than these take.
_PEAKS = """
import subprocess, sys
import numpy as np
from benchmarks.worker import peak_bytes
peaks = [peak_bytes()]
block = np.ones(2**28, np.uint8)
peaks.append(peak_bytes())
del block
peaks.append(peak_bytes())
subprocess.run([sys.executable, "-c", f"b'1' * {peaks[0] + 2**29}"], check=True)
peaks.append(peak_bytes())
print(*peaks)
"""


def test_peak_memory_stays_when_memory_is_given_back_and_counts_commands():
    process = subprocess.run(
        [sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, held, given_back, with_command = map(int, process.stdout.split())
    assert held - before > 2**27
    assert given_back - before > 2**27
    assert with_command >= before + 2**29


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Folder of a problem with eight embedded digits and fresh weights, and what was said of it."""
    folder = tmp_path_factory.mktemp("problem")
    request = {
        "case": dataclasses.asdict(PGD),
        "data_dir": str(folder),
        "networks_dir": str(folder),
        "folder": str(folder),
    }
    return folder, prepare(request)


def request_for(folder, contender, case=PGD):
    return {
        "case": json.loads(json.dumps(dataclasses.asdict(case))),
        "contender": contender,
        "folder": str(folder),
        "threads": 1,
    }


@pytest.mark.slow
def test_a_worker_attacks_eight_images_in_a_process_of_its_own(problem, tmp_path):
    folder, prepared = problem
    assert prepared["forward_flops"] == forward_flops(mnist_cnn())
    with Worker(request_for(folder, "ours"), tmp_path / "log") as worker:
        assert worker.answer()["seconds"] > 0
        first, second = worker.repeat(), worker.repeat()
    assert len(first["correct"]) == 8
    # The same seed gives the same verdicts; last-iterate verdicts are never stricter.
    assert first["correct"] == second["correct"]
    assert all(last or not every for last, every in zip(*verdicts(first), strict=True))
    # TensorFlow alone takes more than 100 MiB, a repetition far less than 8 GiB.
    assert 100 * 2**20 < first["peak_bytes"] < 8 * 2**30


def test_the_starts_of_the_peers_are_ours():
    images = np.random.default_rng(0).uniform(0, 1, (3, 28, 28, 1)).astype(np.float32)
    case = dataclasses.replace(PGD, num_restarts=2, seed=5)
    found = starts(case, images)
    assert found.shape == (3, 2, 28, 28, 1)
    # A step too short to be seen leaves an attack where it began; nothing is fooled by 2 < 3.
    still = attacks.PGD(ThreatModel("linf", 0.3, 0.0, 1.0), "xent", num_steps=1, step_size=1e-7)
    for restart in range(2):
        begun = still.run(
            lambda x: tf.constant([[3.0, 2.0]] * 3), images, [0, 0, 0], seed=5, restart=restart
        )
        assert np.abs(begun.adversarial - found[:, restart]).max() < 1e-6


def verdicts(answer):
    return answer["correct"], answer["correct_any_iterate"]


@pytest.mark.slow
def test_a_worker_that_dies_says_where_to_look(tmp_path):
    message = r"ours \(pgd\) ended with status 1; see .*log"
    request = request_for(tmp_path / "nothing", "ours")
    with Worker(request, tmp_path / "log") as worker, pytest.raises(ContenderError, match=message):
        worker.answer()
    assert "nothing" in (tmp_path / "log").read_text()


def test_a_peer_that_is_not_installed_is_missing_with_its_reason(monkeypatch, problem):
    for module in ("eagerpy", "foolbox"):
        monkeypatch.setitem(sys.modules, module, None)
    (answer,) = answers(request_for(problem[0], "foolbox"), [])
    assert "import of eagerpy halted" in answer["missing"]


@pytest.mark.parametrize("own", [None, 1e-9])
def test_a_contender_may_leave_out_what_comes_after_the_work(monkeypatch, problem, own):
    monkeypatch.setitem(CONTENDERS["pgd"], "clocked", lambda problem: lambda: Outcome(seconds=own))
    _, turn = answers(request_for(problem[0], "clocked"), [None])
    assert turn["seconds"] == own if own else turn["seconds"] > 1e-9
    assert turn["correct"] is None


def test_the_reference_of_autoattack_is_missing_without_its_folder(problem):
    case = dataclasses.replace(PGD, kind="autoattack")
    (answer,) = answers(request_for(problem[0], "reference", case), [])
    assert "--autoattack_dir" in answer["missing"]


OPTIONS = argparse.Namespace(threads=1, autoattack_dir=None, max_busy=1, idle_timeout=1)


class FakeWorker:
    """Answers at once and notes whose turn it was."""

    turns: list[str] = []
    missing: tuple[str, ...] = ()

    def __init__(self, request, log):
        self.name = request["contender"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer(self):
        if self.name in self.missing:
            return {"missing": "No module named 'x'"}
        return {"seconds": 1.0}

    def repeat(self):
        self.turns.append(self.name)
        seconds = 1.0 if self.name == "ours" else 3.0
        verdict = {"correct": [True, self.name != "art"], "correct_any_iterate": None}
        return {"seconds": seconds, "peak_bytes": 2**20, **verdict}


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(FakeWorker, "turns", [])
    monkeypatch.setattr(run, "Worker", FakeWorker)
    monkeypatch.setattr(run, "wait_until_idle", lambda *_: 0.05)
    return FakeWorker


def test_contenders_take_turns_and_nobody_is_always_first(fake_workers, tmp_path):
    case = dataclasses.replace(PGD, contenders=("ours", "foolbox", "art"), repeats=3)
    measurements, missing, busy = run.measure(case, tmp_path, OPTIONS)
    o, f, a = case.contenders
    assert fake_workers.turns == [o, f, a, f, a, o, a, o, f]
    assert [one.contender for one in measurements] == [o, f, a]
    assert (missing, busy) == ({}, 0.05)


def test_a_case_goes_on_without_peers_that_are_missing(fake_workers, monkeypatch, tmp_path):
    monkeypatch.setattr(FakeWorker, "missing", ("art", "cleverhans"))
    measurements, missing, _ = run.measure(PGD, tmp_path, OPTIONS)
    present = [one.contender for one in measurements]
    assert present == ["ours", "ours float32", "foolbox", "pytorch", "cleverhans as installed"]
    assert missing == dict.fromkeys(["art", "cleverhans"], "No module named 'x'")


def test_ours_in_float32_is_a_contender_only_where_ours_is_not(monkeypatch):
    contender = attack_contenders.in_float32(lambda problem, attack_dtype: attack_dtype)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    assert contender(None) == "float32"
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    with pytest.raises(ImportError, match="ours is float32"):
        contender(None)


def test_no_case_goes_on_without_us(fake_workers, monkeypatch, tmp_path):
    monkeypatch.setattr(FakeWorker, "missing", ("ours",))
    with pytest.raises(ContenderError, match="we cannot take part"):
        run.measure(PGD, tmp_path, OPTIONS)


def test_the_results_hold_settings_numbers_and_what_follows_from_them(fake_workers, tmp_path):
    case = dataclasses.replace(PGD, num_images=2, contenders=("ours", "foolbox", "art"))
    case = dataclasses.replace(case, network=str(tmp_path / "mine.keras"))
    measured = run.measure(case, tmp_path, OPTIONS)
    prepared = {"forward_flops": 100, "network_sha256": "0", "data": "two digits"}
    result = json.loads(json.dumps(run.case_result(case, *measured[:2], prepared, 1e3, 0.0)))
    ours, foolbox, art = result["contenders"]
    # 2 images x 2 steps in 1 s, 200 operations each.
    assert (ours["rate"], ours["share_of_peak"], ours["accuracy"]) == (4.0, 0.8, 1.0)
    assert foolbox["ratio"] == [3.0, 3.0, 3.0]
    assert (art["accuracy"], art["num_different"]) == (0.5, 1)
    # Verdicts are short, and no folder of the machine is passed on.
    assert (ours["correct"], art["correct"], art["correct_any_iterate"]) == ("11", "10", None)
    assert result["case"]["network"] == "mine.keras"
    table = case_table(result)
    assert "two digits" in table and "3.00 [3.00, 3.00]" in table
    svg = to_svg(figures.times([result])).decode()
    assert svg.startswith("<?xml") and "</svg>" in svg


def test_results_become_a_table_in_a_page(fake_workers, tmp_path, capsys):
    case = dataclasses.replace(PGD, num_images=2, contenders=("ours", "art"))
    prepared = {"forward_flops": 100, "network_sha256": "0", "data": "two digits"}
    result = run.case_result(case, *run.measure(case, tmp_path, OPTIONS)[:2], prepared, 1e3, 0.0)
    record = {"cases": [result], "provenance": {"commit": "abcdef0123"}}
    record["matrix_peak"] = {"flops_per_second": 2e9}
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text(json.dumps(record))
    page.write_text("before\n<!-- begin speed -->\n<!-- end speed -->\nafter\n")
    assert table_main([str(results), f"--page={page}"]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| pgd | ours | 4.00 | 1.00 [1.00, 1.00] | 0.80 | 100.0 |" in lines
    assert "| pgd | art | 1.33 | 3.00 [3.00, 3.00] | 0.27 | 50.0 |" in lines
    (note,) = [line for line in lines if line.startswith("- pgd: ")]
    assert "2 images, batch 4, 2 turns" in note and "2 GFLOP/s" in note and "`abcdef0`" in note
    assert table_main([str(results)]) == 0
    assert note in capsys.readouterr().out
    page.write_text("no section")
    for arguments in ([str(results), f"--page={page}"], [str(tmp_path / "none.json")]):
        assert table_main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert page.read_text() == "no section"


def test_growth_is_drawn_against_its_quantity(fake_workers, tmp_path):
    results = []
    for count in (100, 1000):
        case = dataclasses.replace(PGD, num_images=count, contenders=("ours",))
        measurements, missing, _ = run.measure(case, tmp_path, OPTIONS)
        prepared = {"forward_flops": 1, "network_sha256": "0", "data": "digits"}
        results.append(run.case_result(case, measurements, missing, prepared, 1e9, 0.0))
    time_axes, memory_axes = figures.growth(results, "images", (100, 1000)).axes
    assert time_axes.get_xlabel() == memory_axes.get_xlabel() == "images"
    assert np.array_equal(time_axes.lines[0].get_xdata(), [100, 1000])
    assert np.array_equal(memory_axes.lines[0].get_ydata(), [1.0, 1.0])
    assert "seconds" in time_axes.get_ylabel() and "MiB" in memory_axes.get_ylabel()


def test_an_unknown_case_is_a_usage_error(capsys):
    assert run.main(["--cases=nonsense"]) == 2
    assert "no case 'nonsense'" in capsys.readouterr().err
