"""The report: tables counted from ledgers, figures that can be read, one page, one section."""

import csv
import dataclasses
import re
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from readable import assert_readable, check_html, visible_texts

from logit_reg.evaluation.ledger import build_result, write_ledger
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.evaluation.run import AttackRecord, Evaluation
from logit_reg.files import read_json, write_json
from logit_reg.report import figures
from logit_reg.report.attack_names import attack_title, line_styles
from logit_reg.report.leaderboard import leaderboard_tables, read_cards, write_leaderboard
from logit_reg.report.published import PUBLISHED
from logit_reg.report.run_page import write_page
from logit_reg.report.style import LIGHT, narrow, number, to_svg
from logit_reg.report.sweep_figures import (
    ATTACK_STEPS,
    TRAINING_STEP,
    sweep_caption,
    sweep_figure,
    sweep_points,
    sweep_table,
)
from logit_reg.report.tables import (
    Table,
    accuracy_under,
    load_run,
    replace_marked_section,
    results_table,
)
from logit_reg.training.folder import Stop
from madry_compat.challenges import CIFAR10, MNIST

PROTOCOLS = ("paper-fgsm", "paper-mnist")
PROTOCOLS_OF_CIFAR = ("paper-fgsm", "paper-20", "paper-50", "paper-200", "autoattack")
ATTACKS = ("fgsm-xent", "fgsm-cw", "pgd40-xent", "pgd40-cw")


def first(count, total):
    """(total,) bool: right on the first `count` examples."""
    return np.arange(total) < count


def save_evaluation(
    directory,
    clean,
    correct,
    *,
    dataset="mnist_5k",
    protocols=None,
    indices=None,
    contaminated=False,
):
    """Write made-up verdicts through the project's own writer.

    Args:
        clean: (N,) bool.
        correct: name of each attack -> (N,) bool.
    """
    num = len(clean)
    correct = {name: clean & right for name, right in correct.items()}
    robust = np.all([clean, *correct.values()], axis=0)
    labels = np.arange(num) % 10
    evaluation = Evaluation(
        labels=labels,
        clean_prediction=np.where(clean, labels, (labels + 1) % 10),
        clean=clean,
        robust=robust,
        correct=correct,
        adversarial=np.zeros((num, 28, 28, 1), np.float32),
        broken_by=[
            "clean" if not clean[i] else next((a for a, c in correct.items() if not c[i]), "")
            for i in range(num)
        ],
        distance=np.where(clean & ~robust, 0.3, 0.0),
        records={
            name: AttackRecord(right, right, clean, 40 * num, 40 * num, 1.5, 0)
            for name, right in correct.items()
        },
    )
    if protocols is None:
        protocols = {name: protocol_attacks(name, MNIST) for name in PROTOCOLS}
    settings = {"contaminated": contaminated}
    result = build_result(evaluation, protocols, dataset=dataset, settings=settings, seed=0)
    write_ledger(directory, evaluation, result, np.arange(num) if indices is None else indices)


def save_strong(directory, num_correct, num_examples, *, clean=None, name="autoattack", **settings):
    attack = protocol_attacks("autoattack", MNIST)["autoattack"]
    clean = np.ones(num_examples, bool) if clean is None else clean
    save_evaluation(
        directory,
        clean,
        {name: first(num_correct, num_examples)},
        protocols={name: {name: attack}},
        **settings,
    )


def save_l2(directory, num_correct, num_examples):
    protocols = {"paper-l2": protocol_attacks("paper-l2", MNIST)}
    correct = {"l2-pgd100-cw-x10": first(num_correct, num_examples)}
    save_evaluation(directory, np.ones(num_examples, bool), correct, protocols=protocols)


def save_examples(directory, num=6, seed=0):
    """Blocks with a little noise, and with more of it."""
    images = np.zeros((num, 28, 28, 1), np.float32)
    for i in range(num):
        images[i, 6 : 10 + 2 * i, 8 : 12 + i] = 1
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, images.shape).astype(np.float32)
    np.savez(
        directory / "examples.npz",
        images=images,
        adversarial=np.clip(images + noise, 0, 1),
        labels=np.arange(num),
        predictions=(np.arange(num) + seed % 2) % 10,
        bounds=np.array([0.0, 1.0]),
    )


def save_training(folder, name, *, xent=0.3, norm=20.0, dataset="mnist_5k", minutes=1.5, seed=3):
    folder.mkdir(parents=True)
    settings = {"dataset": dataset, "reg": "squeeze", "beta": 2.0, "training_batch_size": 128}
    versions = {"tensorflow": "2.21.0", "keras": "3.15.0"}
    record = {"name": name, "settings": settings, "seed": seed, "versions": versions}
    write_json(folder / "run.json", record | {"commit": "0123abc"})
    steps = [1, *range(100, 1001, 100)]
    rng = np.random.default_rng(len(name))
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "lr", "xent", "penalty", "total", "accuracy", "mean_logit_norm"])
        for step in steps:
            decay = np.exp(-step / 250)
            loss = xent + (4 - xent) * decay + 0.02 * rng.random()
            writer.writerow([step, 1e-4, loss, 0.1, loss, 0.9, norm * (1.05 - decay)])
    with (folder / "timing.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "seconds", "examples_per_second"])
        for step in steps:
            writer.writerow([step, 60 * minutes * step / 1000, 2000])
    with (folder / "robustness.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "clean_accuracy", "pgd_accuracy", "training_accuracy"])
        for step in steps[1:]:
            writer.writerow([step, 0.9 + step / 1e4, step / 2e3, 0.8])
    return folder


def save_run(folder, name, counts=(490, 400, 300, 250), clean=495, strong=5, **training):
    """A run with everything: 500 examples under four attacks, 100 under a strong one."""
    save_training(folder, name, **training)
    correct = {a: first(count, 500) for a, count in zip(ATTACKS, counts, strict=True)}
    save_evaluation(folder / "evaluation", first(clean, 500), correct)
    save_strong(folder / "strong", strong, 100)
    save_examples(folder / "strong", seed=strong)
    return folder


def demo_runs(folder):
    """Six runs with the names and about the numbers of the demo."""
    rows = (
        ("natural", (60, 40, 0, 0), 494, 0, 0.02, 30.0),
        ("noise only", (210, 190, 30, 25), 492, 0, 0.06, 22.0),
        ("squeeze beta=2", (430, 425, 330, 300), 489, 1, 0.4, 3.0),
        ("similarity beta=2 gamma=1", (428, 420, 320, 290), 488, 1, 0.42, 4.0),
        ("label smoothing 0.75", (420, 400, 250, 240), 487, 0, 0.9, 1.5),
        ("7-step adversarial training", (400, 398, 330, 328), 480, 60, 0.5, 9.0),
    )
    return [
        load_run(
            save_run(
                folder / str(i), name, counts, clean, strong, xent=xent, norm=norm, minutes=1 + i
            )
        )
        for i, (name, counts, clean, strong, xent, norm) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_runs(tmp_path_factory.mktemp("demo"))


# Loading


def test_the_evaluation_over_more_passes_counts_and_says_so(tmp_path):
    folder = tmp_path / "run"
    save_run(folder, "run", counts=(490, 400, 300, 250))
    # Fewer images do not outweigh more passes.
    save_evaluation(folder / "averaged", first(99, 100), {a: first(20, 100) for a in ATTACKS})
    result = read_json(folder / "averaged/result.json")
    result["settings"]["eot"] = 4
    write_json(folder / "averaged/result.json", result)

    run = load_run(folder)

    assert accuracy_under(run, ["pgd40-cw"]).percent == 20
    table = results_table([run])
    cells = dict(zip((" ".join(c.split()) for c in table.columns), table.rows[0], strict=True))
    assert cells["PGD-40 CW n = 100 eot 4"] == "20.0"
    label = run.evaluations["evaluation"].label
    assert run.evaluations["averaged"].label == f"{label}-eot4"
    titles = [name for name in cells if name.startswith("worst case")]
    assert len(titles) == 2 and any("averaged-eot4" in title for title in titles)


def test_a_run_is_read_back_whole(tmp_path):
    run = load_run(save_run(tmp_path / "a", "squeeze beta=2", minutes=2.5))

    assert (run.name, run.seed, run.commit) == ("squeeze beta=2", 3, "0123abc")
    assert run.settings["beta"] == 2.0
    assert run.steps == 1000
    assert run.minutes == pytest.approx(2.5)
    assert set(run.evaluations) == {"evaluation", "strong"}
    assert run.evaluations["evaluation"].examples is None
    assert run.evaluations["strong"].examples.images.shape == (6, 28, 28, 1)


def test_absent_parts_are_none_or_empty(tmp_path):
    write_json(tmp_path / "mine" / "run.json", {"settings": {}})

    run = load_run(tmp_path / "mine")

    assert run.name == "mine"
    assert (run.log, run.minutes, run.steps, run.evaluations) == ({}, None, None, {})


def test_a_half_written_last_row_of_a_log_does_not_count(tmp_path):
    folder = save_training(tmp_path / "a", "a")
    with (folder / "log.csv").open("a") as file:
        file.write("1100,0.0001,0.5,0.1,0.5,0.9,1")

    assert load_run(folder).steps == 1000


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run\.json; give the model_dir"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "[]", "expected a JSON object"),
        ("run.json", '{"settings": 3}', "settings is 3, expected a dict"),
        ("log.csv", "step,loss\n1,2\n", "not a log with columns step, lr"),
        ("timing.csv", "step,seconds,examples_per_second\n1,long,3\n", "could not convert"),
        ("timing.csv", "step,seconds,examples_per_second\n1,nan,3\n", "not finite"),
        ("strong/ledger.csv", "index\n1\n", "not a ledger"),
        ("strong/examples.npz", "no zip", "not the examples of an evaluation"),
    ],
)
def test_a_bad_file_is_named(tmp_path, file, content, message):
    folder = save_run(tmp_path / "a", "a")
    (folder / file).write_text(content)

    with pytest.raises(ValueError, match=rf"{Path(file).name}.*{message}"):
        load_run(folder)


def test_a_ledger_whose_verdicts_contradict_its_attacks_is_refused(tmp_path):
    folder = save_run(tmp_path / "a", "a", counts=(490, 400, 300, 250))
    path = folder / "evaluation" / "ledger.csv"
    path.write_text(re.sub(r"(\n0,0,0,1,,0,1,1,1),1\n", r"\1,0\n", path.read_text()))
    result = read_json(path.with_name("result.json"))
    # Without the hash, as a forger or the first version would leave it.
    del result["ledger_sha256"]
    write_json(path.with_name("result.json"), result)

    with pytest.raises(ValueError, match="robust is not what clean and the correct_ columns give"):
        load_run(folder)


def test_examples_with_a_header_that_lies_about_its_size_are_refused(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    path = folder / "strong" / "examples.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    images = members["images.npy"].replace(b"(6, 28, 28, 1), }", b"(6**9, 28,28,1)}")
    members["images.npy"] = images.replace(b"(6**9, 28,28,1)}", b"(9999,99,28,1)}  ")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)

    with pytest.raises(ValueError, match="images is no array of numbers of its stated size"):
        load_run(folder)


# The table


def test_every_number_of_the_table_is_counted_from_the_ledgers(tmp_path):
    """Ten examples whose verdicts are written out, so that each cell can be checked by eye."""
    folder = save_training(tmp_path / "a", "squeeze beta=2", minutes=2.0)
    flags = lambda text: np.array([mark == "1" for mark in text])  # noqa: E731
    correct = {
        "fgsm-xent": flags("1111110100"),
        "fgsm-cw": flags("1111101110"),
        "pgd40-xent": flags("1111000000"),
        "pgd40-cw": flags("0111100000"),
    }
    save_evaluation(folder / "evaluation", flags("1111111110"), correct)
    save_strong(folder / "strong", 1, 4, name="autoattack")

    table = results_table([load_run(folder)])

    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "run": "squeeze beta=2",
        "clean\nn = 10": "90.0",
        # Both right on 0-4 and 7.
        "FGSM\nn = 10": "60.0",
        "PGD-40\nxent\nn = 10": "40.0",
        "PGD-40\nCW\nn = 10": "40.0",
        # 3 of 10 and 1 of 4, Wilson's formula by hand.
        "worst case\n[95 %]\nn = 10": "30.0 [10.8, 60.3]",
        "strong attack\n[95 %]\nautoattack\nn = 4": "25.0 [4.6, 69.9]",
        "training\nsteps": "1,000",
        "training\nminutes": "2.0",
    }


def test_the_table_does_not_take_its_numbers_from_result_json(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    before = results_table([load_run(folder)])
    path = folder / "evaluation" / "result.json"
    result = read_json(path)
    for protocol in result["protocols"].values():
        protocol["robust_accuracy"] = 1.0
        for attack in protocol["attacks"].values():
            attack["accuracy"] = 1.0
    write_json(path, result)

    assert results_table([load_run(folder)]) == before


def test_what_was_not_measured_is_an_en_dash(tmp_path):
    bare = load_run(save_training(tmp_path / "bare", "bare"))
    whole = load_run(save_run(tmp_path / "whole", "whole"))
    (tmp_path / "bare" / "log.csv").unlink()
    (tmp_path / "bare" / "timing.csv").unlink()
    nothing = load_run(tmp_path / "bare")

    rows = results_table([bare, whole, nothing]).rows

    assert rows[0] == ("bare", *"––––––", "1,000", "1.5")
    assert "–" not in rows[1]
    assert rows[2] == ("bare", *"––––––––")


def test_attacks_that_shared_an_active_set_have_no_accuracy_of_their_own(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    path = folder / "evaluation" / "result.json"
    result = read_json(path)
    write_json(path, result | {"settings": {"worst_case_only": True}})

    row = results_table([load_run(folder)]).rows[0]

    assert row[1:6] == ("99.0", "–", "–", "–", "50.0 [45.6, 54.4]")


def test_numbers_of_examples_that_differ_stand_in_the_cells(tmp_path):
    small = save_training(tmp_path / "small", "small")
    save_evaluation(small / "evaluation", first(9, 10), dict.fromkeys(ATTACKS, first(5, 10)))

    table = results_table([load_run(save_run(tmp_path / "a", "a")), load_run(small)])

    assert table.columns[1] == "clean"
    assert [row[1] for row in table.rows] == ["99.0 (n = 500)", "90.0 (n = 10)"]
    assert "The images differ between runs." in table.caption


def test_other_pgd_lengths_get_their_own_columns(tmp_path):
    folder = save_training(tmp_path / "a", "a", dataset="cifar10")
    protocols = {"paper-20": protocol_attacks("paper-20", CIFAR10)}
    correct = {"pgd20-xent": first(4, 10), "pgd20-cw": first(3, 10)}
    save_evaluation(
        folder / "evaluation", first(9, 10), correct, dataset="cifar10", protocols=protocols
    )

    columns = results_table([load_run(folder)]).columns

    assert columns[2:4] == ("PGD-20\nxent\nn = 10", "PGD-20\nCW\nn = 10")


def test_a_run_measured_on_its_own_training_images_never_enters(tmp_path):
    clean = load_run(save_run(tmp_path / "a", "honest"))
    folder = save_training(tmp_path / "b", "full mnist", dataset="mnist")
    save_strong(folder / "strong", 5, 100, contaminated=True)
    contaminated = load_run(folder)

    table = results_table([contaminated, clean])

    assert [row[0] for row in table.rows] == ["honest"]
    assert "Left out: full mnist (measured on images of the training)" in table.caption
    texts = [
        text.get_text() for text in visible_texts(figures.accuracy_bars([contaminated, clean]))
    ]
    assert "honest" in texts
    assert "full mnist" not in texts


def test_runs_on_different_data_sets_are_not_put_side_by_side(tmp_path):
    here = load_run(save_run(tmp_path / "a", "a"))
    folder = save_training(tmp_path / "b", "b")
    correct = dict.fromkeys(ATTACKS, first(1, 2))
    save_evaluation(folder / "evaluation", first(2, 2), correct, dataset="fashion_mnist")

    with pytest.raises(ValueError, match=r"fashion_mnist \(b\), mnist_5k \(a\)"):
        results_table([here, load_run(folder)])


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        results_table([])


def test_runs_of_one_name_are_told_apart_by_the_settings_that_differ(tmp_path):
    runs = [load_run(save_run(tmp_path / str(i), "squeeze")) for i in range(2)]
    runs[1].settings["beta"] = 5.0
    other = load_run(save_run(tmp_path / "c", "natural"))

    names = [row[0] for row in results_table([*runs, other]).rows]

    assert names == ["squeeze, beta 2.0", "squeeze, beta 5.0", "natural"]


def test_a_further_evaluation_has_a_column_and_those_of_a_grid_have_none(tmp_path):
    folder = save_run(tmp_path / "a", "a")
    save_l2(folder / "l2", 3, 10)
    save_l2(folder / "l2@num_steps-20", 3, 10)

    table = results_table([load_run(folder)])

    (column,) = [i for i, name in enumerate(table.columns) if name.startswith("l2")]
    assert table.columns[column] == "l2\n[95 %]\nn = 10"
    assert table.rows[0][column] == "30.0 [10.8, 60.3]"


def test_what_was_published_of_the_same_training_stands_beside(tmp_path):
    run = load_run(save_run(tmp_path / "a", "7-step adversarial"))
    assert "published" not in results_table([run]).columns
    settings = {"dataset": "cifar10", "width": 10, "adversary": "pgd", "num_steps": 7}
    run.settings.update(settings | {"reg": "none"})

    table = results_table([run])

    cell = dict(zip(table.columns, table.rows[0], strict=True))["published"]
    assert "clean 87.25" in cell
    assert "pgd20-xent 45.84" in cell
    assert "MadryLab's public model" in table.caption
    run.settings["width"] = 1
    assert "published" not in results_table([run]).columns


def test_published_numbers_are_shares_under_attacks_that_exist():
    attacks = {"clean"} | {
        name for p in PROTOCOLS_OF_CIFAR for name in protocol_attacks(p, CIFAR10)
    }
    for entry in PUBLISHED:
        assert set(entry.accuracy) <= attacks
        assert all(0 <= value <= 100 for value in entry.accuracy.values())


# Sweeps


def beta_sweep(folder, betas=(0.5, 2.0, 10.0, 12.0), seeds=(0,), reg="squeeze"):
    runs = []
    for seed in seeds:
        for i, beta in enumerate(betas):
            path = folder / f"{reg}-{beta}-{seed}"
            counts = (400, 390, 300 - 40 * i + 5 * seed, 290 - 40 * i)
            run = load_run(save_run(path, reg, counts, 495 - 10 * i, i, seed=seed))
            run.settings.update({"beta": beta, "reg": reg, "random_seed": seed})
            runs.append(run)
    return runs


def test_a_point_of_a_sweep_is_counted_from_its_ledger(tmp_path):
    points = sweep_points(beta_sweep(tmp_path), "beta")

    found = {(p.x, p.curve): p.accuracy.percent for p in points}
    assert found[0.5, "clean, n = 500"] == 99.0
    # 400 and 390 under the two losses of FGSM.
    assert found[0.5, "FGSM, n = 500"] == 78.0
    assert found[10.0, "PGD-40, n = 500"] == pytest.approx(42.0)
    assert found[12.0, "AutoAttack, n = 100"] == 3.0
    assert [p.x for p in points] == sorted(p.x for p in points)
    assert {p.panel for p in points} == {""}


def test_the_figure_of_a_sweep_reads_like_a_papers(tmp_path):
    runs = beta_sweep(tmp_path, seeds=(0, 1))
    figure = sweep_figure(runs, "beta")
    (axes,) = figure.axes

    assert_readable(figure)
    assert axes.get_xlabel() == "beta, weight of the penalty"
    assert axes.get_ylabel() == "images right (%)"
    # sqrt(.9 * 128), where all-zero logits become optimal.
    (threshold,) = [
        line.get_xdata()[0]
        for line in axes.lines
        if len(set(line.get_xdata())) == 1 and list(line.get_ydata()) == [0, 1]
    ]
    assert threshold == pytest.approx(10.733, abs=1e-3)
    assert "all-zero logits from 10.73" in [text.get_text() for text in axes.texts]
    assert "2 training seeds" in sweep_caption(runs, "beta")
    assert to_svg(sweep_figure(runs, "beta")) == to_svg(figure)


def test_two_regularisers_have_a_panel_each_and_the_scale_is_said(tmp_path):
    runs = beta_sweep(tmp_path)
    runs += beta_sweep(tmp_path, (0.1, 0.5, 0.9), reg="squeeze_example")
    figure = sweep_figure(runs, "beta")

    assert_readable(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["reg squeeze_example", "reg squeeze"]
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert labels == ["all-zero logits from 0.9487", "all-zero logits from 10.73"]
    assert "square root of the batch (128) weaker" in sweep_caption(runs, "beta")


def test_the_table_of_a_sweep_has_the_mean_and_spread_of_its_seeds(tmp_path):
    table = sweep_table(beta_sweep(tmp_path, seeds=(0, 10)), "beta")
    assert table.columns[:2] == ("beta", "clean\nn = 500")
    # 290 of 500 under CW, 300 and 350 under xent: the first is the worst of both.
    assert table.columns[2:4] == ("FGSM\nn = 500", "PGD-40\nn = 500")
    assert table.rows[0][3] == "58.0 [58.0, 58.0]"
    assert [row[0] for row in table.rows] == ["0.5", "2", "10", "12"]


def test_checkpoints_of_one_run_are_a_curve_over_training_steps(tmp_path):
    folder = save_run(tmp_path / "a", "squeeze")
    for step, count in ((1000, 8), (20000, 3)):
        directory = folder / f"at@checkpoint-{step}"
        save_evaluation(
            directory,
            first(9, 10),
            dict.fromkeys(ATTACKS[2:], first(count, 10)),
            protocols={"paper-mnist": protocol_attacks("paper-mnist", MNIST)},
        )
        result = read_json(directory / "result.json")
        model = {"model": f"runs/a/checkpoint-{step}"}
        write_json(directory / "result.json", result | {"settings": model})

    points = sweep_points([load_run(folder)], TRAINING_STEP)

    assert {(p.x, p.curve, p.accuracy.successes) for p in points} == {
        (1000, "clean, n = 10", 9),
        (1000, "PGD-40, n = 10", 8),
        (20000, "clean, n = 10", 9),
        (20000, "PGD-40, n = 10", 3),
    }
    assert_readable(sweep_figure([load_run(folder)], TRAINING_STEP))


def test_pgd_of_several_lengths_is_a_curve_over_its_iterations(tmp_path):
    folder = save_run(tmp_path / "a", "squeeze")
    attack = protocol_attacks("paper-mnist", MNIST)["pgd40-cw"]
    for steps, count in ((1, 9), (20, 5), (400, 1)):
        name = f"pgd{steps}-cw"
        save_evaluation(
            folder / f"e@num_steps-{steps}",
            first(10, 10),
            {name: first(count, 10)},
            protocols={"flags": {name: attack}},
        )

    points = sweep_points([load_run(folder)], ATTACK_STEPS)

    assert [(p.x, p.accuracy.percent) for p in points] == [(1, 90), (20, 50), (400, 10)]
    figure = sweep_figure([load_run(folder)], ATTACK_STEPS)
    assert_readable(figure)
    assert figure.axes[0].get_xscale() == "log"


def test_networks_attacked_for_several_lengths_have_a_panel_each_by_their_names(tmp_path):
    attack = protocol_attacks("paper-mnist", MNIST)["pgd40-cw"]
    runs = []
    for reg in ("squeeze", "similarity"):
        folder = save_run(tmp_path / reg, reg)
        for steps in (1, 20):
            save_evaluation(
                folder / f"e@num_steps-{steps}",
                first(10, 10),
                {f"pgd{steps}-cw": first(5, 10)},
                protocols={"flags": {f"pgd{steps}-cw": attack}},
            )
        runs.append(load_run(folder))
        runs[-1].settings["reg"] = reg

    figure = sweep_figure(runs, ATTACK_STEPS)

    assert_readable(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [run.name for run in runs]


@pytest.mark.parametrize(
    ("attacks", "title"),
    [
        ((), "clean"),
        (("fgsm-xent", "fgsm-cw"), "FGSM"),
        (("pgd200-cw", "pgd200-xent"), "PGD-200"),
        (("pgd20-cw",), "PGD-20, CW"),
        (("pgd100-cw-x10",), "PGD-100, CW, 10 restarts"),
        (("pgd20-xent", "pgd50-cw"), "PGD-20, xent + PGD-50, CW"),
        (("autoattack",), "AutoAttack"),
        (("their-own",), "their-own"),
    ],
)
def test_attacks_have_one_name_everywhere(attacks, title):
    assert attack_title(attacks) == title


def test_series_keep_their_colour_and_order_whatever_else_is_drawn():
    everything = ["AutoAttack", "PGD-40, CW", "clean", "PGD-40", "PGD-40, xent", "FGSM"]
    styles = line_styles(everything)

    assert list(styles) == ["clean", "FGSM", "PGD-40", "PGD-40, xent", "PGD-40, CW", "AutoAttack"]
    assert len({color for color, _ in styles.values()}) == 6
    for some in (everything[:2], everything[3:], ["FGSM"]):
        assert line_styles(some).items() <= styles.items()
    assert line_styles(["PGD-20"])["PGD-20"] == styles["PGD-40"]
    assert len(set(line_styles(["PGD-20", "PGD-50", "PGD-200"]).values())) == 3


def test_panels_of_runs_of_many_kinds_name_as_few_settings_as_tell_them_apart(tmp_path):
    kinds = [{"reg": "squeeze"}, {"reg": "none"}, {"reg": "none", "adversary": "pgd"}]
    others = ("epsilon", "num_steps", "step_size", "loss_func", "ramp_steps")
    runs = [
        dataclasses.replace(run, settings=run.settings | kind | dict.fromkeys(others, i))
        for i, kind in enumerate(kinds)
        for run in beta_sweep(tmp_path / str(i))
    ]
    panels = {point.panel for point in sweep_points(runs, "beta")}
    words = ["reg squeeze, adversary None", "reg none, adversary None", "reg none, adversary pgd"]
    assert panels == set(words)


def test_a_sweep_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no two values of 'sigma' to draw"):
        sweep_figure(beta_sweep(tmp_path), "sigma")


# The leaderboard


def save_card(folder, place, clean, claim, strong, **changes):
    evaluations = [{"protocol": "paper-mnist", "num_examples": 1000}]
    if strong is not None:
        evaluations.append({"protocol": "autoattack", "num_examples": 200})
    card = {
        "name": place,
        "dataset": "mnist",
        "norm": "Linf",
        "eps": 0.3,
        "clean_acc": clean,
        "reported": claim,
        "reported_protocol": "paper-mnist" if claim is not None else None,
        "autoattack_acc": strong,
        "additional_data": False,
        "evaluations": evaluations,
    }
    write_json(folder / place / "model_card.json", card | changes)


def test_the_leaderboard_ranks_by_autoattack_and_not_by_the_claim(tmp_path):
    save_card(tmp_path, "squeezed", 98.0, 70.0, 2.5)
    save_card(tmp_path, "adversarial", 97.0, 60.0, 55.0)
    save_card(tmp_path, "unmeasured", 99.0, 90.0, None)

    ((title, table),) = leaderboard_tables(read_cards(tmp_path))

    assert title == "mnist, Linf 0.3 on [0, 1]"
    assert table.rows == (
        ("adversarial", "97.0", "60.0 (paper-mnist, n = 1,000)", "55.0 (n = 200)", "–", "no"),
        ("squeezed", "98.0", "70.0 (paper-mnist, n = 1,000)", "2.5 (n = 200)", "–", "no"),
        ("unmeasured", "99.0", "90.0 (paper-mnist, n = 1,000)", "–", "–", "no"),
    )


def test_a_network_of_an_unfinished_run_is_marked_on_the_leaderboard(tmp_path):
    notices = [{"name": "unfinished_run", "message": "this run is unfinished", "value": 60}]
    save_card(tmp_path, "early", 98.0, 70.0, 2.5, notices=notices)

    ((_, table),) = leaderboard_tables(read_cards(tmp_path))

    assert table.rows[0][0] == "early*"
    assert table.notes == ("* early: this run is unfinished",)


def save_claim_and_autoattack(folder, *, first_image=0, notices=()):
    """PGD leaves 8 of 10 images; AutoAttack, on 5 from some image on, leaves 2 of these."""
    protocols = {"paper-mnist": protocol_attacks("paper-mnist", MNIST)}
    correct = dict.fromkeys(ATTACKS[2:], first(8, 10))
    save_evaluation(folder / "main", first(10, 10), correct, protocols=protocols, dataset="mnist")
    strong = {"autoattack": protocol_attacks("autoattack", MNIST)}
    indices = np.arange(first_image, first_image + 5)
    save_evaluation(
        folder / "aa",
        first(5, 5),
        {"autoattack": first(2, 5)},
        protocols=strong,
        dataset="mnist",
        indices=indices,
    )
    for name, said in (("main", ()), ("aa", notices)):
        path = folder / name / "result.json"
        result = read_json(path) | {"settings": {"network_sha256": "0a"}, "notices": list(said)}
        write_json(path, result)


CLAIM_AND_AUTOATTACK = {
    "network_sha256": "0a",
    "evaluations": [
        {
            "protocol": "paper-mnist",
            "attacks": list(ATTACKS[2:]),
            "accuracy": 80.0,
            "num_examples": 10,
        },
        {"protocol": "autoattack", "attacks": ["autoattack"], "accuracy": 40.0, "num_examples": 5},
    ],
}


def test_the_gap_of_the_leaderboard_is_that_on_the_shared_images(tmp_path):
    save_claim_and_autoattack(tmp_path / "a")
    save_card(tmp_path, "a", 100.0, 80.0, 40.0, **CLAIM_AND_AUTOATTACK)

    ((_, table),) = leaderboard_tables(read_cards(tmp_path))

    # All five shared images are right under PGD: 60 points, where 80 - 40 would say 40.
    (row,) = table.rows
    assert row[2:4] == ("80.0 (paper-mnist, n = 10)", "40.0 (n = 5)")
    assert row[4].startswith("60.0 [") and row[4].endswith("] (n = 5)")


@pytest.mark.parametrize(
    "changes",
    [
        {"network_sha256": "1b"},
        {"reported": 90.0, "evaluations": [{"protocol": "paper-mnist", "num_examples": 10}]},
        {"reported_protocol": "paper-fgsm"},
    ],
)
def test_without_ledgers_of_both_on_the_same_images_there_is_no_gap(tmp_path, changes):
    save_claim_and_autoattack(tmp_path / "a")
    save_card(tmp_path, "a", 100.0, 80.0, 40.0, **CLAIM_AND_AUTOATTACK | changes)
    save_claim_and_autoattack(tmp_path / "b", first_image=20)
    save_card(tmp_path, "b", 100.0, 80.0, 40.0, **CLAIM_AND_AUTOATTACK)

    ((_, table),) = leaderboard_tables(read_cards(tmp_path))

    assert [row[4] for row in table.rows] == ["–", "–"]


def test_numbers_with_a_notice_are_marked_in_the_leaderboard(tmp_path):
    notices = [{"name": "gradients", "message": "no gradient for 3 of 5 images", "value": 3}]
    save_claim_and_autoattack(tmp_path / "a", notices=notices)
    save_card(tmp_path, "a", 100.0, 80.0, 40.0, **CLAIM_AND_AUTOATTACK)

    ((_, table),) = leaderboard_tables(read_cards(tmp_path))

    assert table.rows[0][3] == "40.0* (n = 5)"
    assert table.notes == ("* a, autoattack: no gradient for 3 of 5 images",)


def test_the_leaderboard_is_a_sound_page(tmp_path):
    save_card(tmp_path, "squeezed", 98.0, 70.0, 2.5)
    save_card(tmp_path, "hostile", 98.0, 70.0, 2.5, name="<script>alert(1)</script>")

    write_leaderboard(tmp_path / "page.html", tmp_path)

    assert "script" not in check_html(tmp_path / "page.html").tags


@pytest.mark.parametrize(
    "changes", [{"name": 3}, {"eps": None}, {"clean_acc": "98"}, {"evaluations": [{}]}]
)
def test_what_is_no_card_is_named(tmp_path, changes):
    save_card(tmp_path, "a", 98.0, 70.0, 2.5, **changes)
    with pytest.raises(ValueError, match=r"a/model_card\.json: "):
        read_cards(tmp_path)


def test_a_folder_without_cards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        read_cards(tmp_path)


# Notices


def test_notices_stand_below_the_table_with_the_name_of_their_run(tmp_path):
    folder = save_run(tmp_path / "a", "squeeze")
    path = folder / "strong" / "result.json"
    message = "no gradient for 3 of 100 images <b>"
    write_json(
        path,
        read_json(path) | {"notices": [{"name": "zero", "message": message, "value": 3}]},
    )
    runs = [load_run(save_run(tmp_path / "b", "natural")), load_run(folder)]

    table = results_table(runs)

    line = f"squeeze, strong: {message}"
    assert table.notes == (line,)
    assert table.to_text().endswith("\n" + line)
    assert table.to_markdown().endswith(
        "\n\n- squeeze, strong: no gradient for 3 of 100 images &lt;b&gt;"
    )
    write_page(tmp_path / "report.html", "Notices", runs)
    check_html(tmp_path / "report.html")
    assert "<br>\nsqueeze, strong: no gradient" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("notices", [None, "text", [3, {"name": "no message"}], {"message": "x"}])
def test_notices_of_another_form_are_none(tmp_path, notices):
    folder = save_run(tmp_path / "a", "a")
    path = folder / "strong" / "result.json"
    write_json(path, read_json(path) | {"notices": notices})

    assert results_table([load_run(folder)]).notes == ()


# Its three forms

SMALL = Table(("run", "clean\nn = 5"), (("a|<b>", "90.0"), ("longer", "7.5")), "Caption & more.")


def test_text_is_aligned():
    assert SMALL.to_text().splitlines() == [
        "        clean",
        "run     n = 5",
        "-" * 13,
        "a|<b>    90.0",
        "longer    7.5",
        "-" * 13,
        "Caption &",
        "more.",
    ]


def test_markdown_escapes_what_would_break_the_table():
    assert SMALL.to_markdown().splitlines() == [
        "| run | clean<br>n = 5 |",
        "|---|---:|",
        r"| a\|&lt;b&gt; | 90.0 |",
        "| longer | 7.5 |",
        "",
        "Caption &amp; more.",
    ]


def test_html_is_escaped():
    page = SMALL.to_html()

    assert '<th scope="row">a|&lt;b&gt;</th><td data-label="clean n = 5">90.0</td>' in page
    assert "<caption>Caption &amp; more.</caption>" in page


# Figures


def draw_all(runs, theme=LIGHT):
    return {
        "bars": figures.accuracy_bars(runs, theme),
        "curves": figures.training_curves(runs, theme=theme),
        "robustness": figures.robustness_curves(runs, theme),
        "grid": figures.adversarial_grid(runs, theme=theme),
    }


@pytest.fixture(scope="module")
def drawn(demo):
    return draw_all(demo)


@pytest.mark.parametrize("name", ["bars", "curves", "robustness", "grid"])
def test_no_text_overlaps_or_is_cut_off(drawn, name):
    assert_readable(drawn[name])


@pytest.mark.parametrize("name", ["bars", "curves", "robustness", "grid"])
def test_a_narrow_figure_is_readable_at_the_width_of_a_telephone(demo, name):
    figure = draw_all(demo, narrow(LIGHT))[name]

    assert_readable(figure)
    # 390 pixels, less the margins of a page; at 96 pixels an inch nothing is scaled down.
    assert 96 * figure.get_size_inches()[0] <= 390 - 32
    assert all(text.get_fontsize() >= 7 for text in visible_texts(figure))


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    names = [r"$\frac{1}$ and <b>", "a very long name of a run that nobody would want to read " * 4]
    runs = [load_run(save_run(tmp_path / str(i), name)) for i, name in enumerate(names)]

    for figure in draw_all(runs).values():
        assert_readable(figure)
        assert any(r"\frac{1}" in text.get_text() for text in visible_texts(figure))


def test_all_axes_are_labelled(drawn):
    assert [a.get_xlabel() for a in drawn["bars"].axes] == ["images classified right (%)"]
    assert [a.get_ylabel() for a in drawn["bars"].axes] == ["run"]
    assert [a.get_ylabel() for a in drawn["curves"].axes] == [
        "cross-entropy (nats)",
        "mean l2 norm of the logits",
    ]
    # The panels share their x axis.
    assert drawn["curves"].axes[-1].get_xlabel() == "training step"
    assert all(axes.get_xlabel() for axes in drawn["grid"].axes)


def test_bars_and_whiskers_are_those_of_the_ledgers(tmp_path):
    run = load_run(save_run(tmp_path / "a", "a", counts=(490, 400, 300, 250), clean=495, strong=5))

    (axes,) = figures.accuracy_bars([run]).axes

    # Clean, FGSM worst of 490 and 400, PGD worst of 300 and 250, 5 of 100.
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([99.0, 80.0, 50.0, 5.0])
    whisker = axes.collections[-1].get_segments()[0]
    assert whisker[:, 0] == pytest.approx([2.15, 11.18], abs=0.01)


def test_bars_of_different_images_are_said_to_be(tmp_path, demo):
    folder = save_training(tmp_path / "a", "a")
    save_evaluation(folder / "evaluation", first(9, 10), dict.fromkeys(ATTACKS, first(5, 10)))

    assert "Bars of another n are of other images" in figures.accuracy_bars_caption(demo)
    assert "other images" not in figures.accuracy_bars_caption([load_run(folder)])


def test_curves_are_those_of_the_log_and_the_reference_is_ln_k(demo):
    upper, lower = figures.training_curves(demo, num_classes=100).axes

    for line, run in zip(upper.lines, demo, strict=False):
        np.testing.assert_array_equal(line.get_xydata()[:, 1], run.log["xent"])
    assert upper.lines[-1].get_ydata() == pytest.approx([4.60517, 4.60517])
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), demo[0].log["mean_logit_norm"])


def test_robustness_curves_are_those_of_the_table_and_a_stop_is_marked(tmp_path):
    whole = load_run(save_training(tmp_path / "whole", "whole"))
    stopped = dataclasses.replace(whole, name="stopped", stop=Stop(1000, 600))
    (axes,) = figures.robustness_curves([whole, stopped]).axes

    for clean, pgd in (axes.lines[:2], axes.lines[2:4]):
        np.testing.assert_allclose(clean.get_ydata(), 100 * whole.robustness["clean_accuracy"])
        np.testing.assert_allclose(pgd.get_ydata(), 100 * whole.robustness["pgd_accuracy"])
    (cross,) = axes.lines[4:]
    assert cross.get_xydata().tolist() == [[1000, 50]]
    assert "A cross is where" in figures.robustness_curves_caption([whole, stopped])
    assert "A cross is where" not in figures.robustness_curves_caption([whole])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (999, "999"), (10000, "10,000"), (1234.5, "1234.5"), (-2000, "−2,000")],
)
def test_numbers_on_axes_read_as_in_the_text(value, text):
    assert number(value) == text


@pytest.mark.parametrize("norms", [(20.0, 21.0), (4.0, 40.0), (0.01, 30.0)])
def test_the_logarithmic_axis_of_the_logit_norm_has_ticks_to_read(tmp_path, norms):
    runs = [
        load_run(save_training(tmp_path / str(i), str(i), norm=norm))
        for i, norm in enumerate(norms)
    ]
    figure = figures.training_curves(runs)

    axis = figure.axes[1].yaxis
    low, high = axis.get_view_interval()
    shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    assert 2 <= len(shown) <= 8
    assert_readable(figure)


def test_a_run_keeps_its_colour_in_every_figure(demo, drawn):
    outlines = [bar.get_edgecolor()[:3] for bar in drawn["bars"].axes[0].patches][::4]
    lines = [line.get_color() for line in drawn["curves"].axes[0].lines[: len(demo)]]

    assert outlines == [matplotlib.colors.to_rgb(color) for color in lines]
    assert len(set(lines)) == len(demo)


def test_the_grid_names_true_and_predicted_class(demo):
    figure = figures.adversarial_grid(demo[2:4], num_images=3)

    labels = [axes.get_xlabel() for axes in figure.axes]
    # Both runs were shown the same originals: one row of them is enough.
    assert labels == ["0", "1", "2", "0 → 1", "1 → 2", "2 → 3", "0 → 1", "1 → 2", "2 → 3"]
    drawn = figure.axes[3].images[0].get_array()
    expected = demo[2].evaluations["strong"].examples.adversarial[0, ..., 0]
    np.testing.assert_allclose(drawn, expected, atol=1e-6)


def test_figures_leave_no_trace_and_are_the_same_each_time(demo):
    before = dict(matplotlib.rcParams)

    drawings = [to_svg(figures.accuracy_bars(demo[:2])) for _ in range(2)]

    assert drawings[0] == drawings[1]
    assert b"<svg" in drawings[0]
    assert dict(matplotlib.rcParams) == before


# The page


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "Demo", demo)
    return path


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    checker = check_html(page)

    assert all(r.startswith("data:image/svg+xml;base64,") for r in checker.references)
    assert checker.tags.count("img") == 4
    assert "script" not in checker.tags and "link" not in checker.tags
    without_data = re.sub(r"data:[^\"]*", "", page.read_text())
    assert not re.search(r"https?:|@import|url\(", without_data)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_the_page_says_where_each_number_comes_from(demo, page):
    text = page.read_text()

    assert results_table(demo).to_html() in text
    assert "squeeze beta=2: seed 3, commit 0123abc" in text
    assert "evaluation: mnist_5k, n = 500, fgsm-xent + fgsm-cw + pgd40-xent + pgd40-cw" in text
    assert "&quot;step_size&quot;: 0.01" in text


def test_what_comes_from_files_is_escaped(tmp_path):
    run = load_run(save_training(tmp_path / "a", "<script>alert(1)</script>"))

    write_page(tmp_path / "report.html", "<b>", [run])

    assert "script" not in check_html(tmp_path / "report.html").tags


def test_a_page_of_a_run_with_nothing_yet(tmp_path):
    write_json(tmp_path / "a" / "run.json", {"name": "a", "settings": {}})

    write_page(tmp_path / "report.html", "Nothing yet", [load_run(tmp_path / "a")])

    assert check_html(tmp_path / "report.html").tags.count("img") == 1


def test_a_page_of_contaminated_runs_only_has_no_bars(tmp_path):
    folder = save_training(tmp_path / "a", "full mnist", dataset="mnist")
    save_strong(folder / "strong", 1, 2, contaminated=True)

    write_page(tmp_path / "report.html", "Left out", [load_run(folder)])

    # The training and the robustness curves.
    assert check_html(tmp_path / "report.html").tags.count("img") == 2


def many_columns(num_columns, num_rows):
    columns = ("run", *(f"attack {i}\n[95 %]\nn = 10,000" for i in range(num_columns)))
    row = tuple(f"{i}.9 [10.0, 20.5]" for i in range(num_columns))
    return Table(columns, tuple((f"run {i}", *row) for i in range(num_rows)), "Caption.")


def test_a_table_that_is_too_wide_for_a_page_changes_rows_and_columns():
    small, wide = many_columns(4, 5).to_html(), many_columns(14, 5).to_html()

    assert '<th scope="row">run 4</th>' in small
    assert wide.count("<tr>") == 15
    assert (
        '<th scope="row">attack 13 [95 %] n&nbsp;=&nbsp;10,000</th><td data-label="run 0">' in wide
    )
    assert '<span>13.9 <span class="part">[10.0, 20.5]</span></span>' in wide
    assert 'class="table long"' not in small + wide
    both = many_columns(14, 20).to_html()
    assert 'class="table long"' in both and both.count("<tr>") == 21


# The README's section


def test_a_marked_section_is_replaced_and_stays_the_same_the_second_time():
    text = "# Top\n<!-- begin results -->\nold\n<!-- end results -->\nBottom\n"

    once = replace_marked_section(text, "results", "| a |\n")

    assert once == ("# Top\n<!-- begin results -->\n\n| a |\n\n<!-- end results -->\nBottom\n")
    assert replace_marked_section(once, "results", "| a |\n") == once


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- begin results -->",
        "<!-- end results --> <!-- begin results -->",
        "<!-- begin results --><!-- end results -->" * 2,
        "<!-- begin other --><!-- end other -->",
    ],
)
def test_missing_or_doubled_markers_are_an_error(text):
    with pytest.raises(ValueError, match="expected <!-- begin results --> and, after it,"):
        replace_marked_section(text, "results", "content")


def test_content_with_the_markers_themselves_is_refused():
    text = "<!-- begin results --><!-- end results -->"

    with pytest.raises(ValueError, match="the section's own markers"):
        replace_marked_section(text, "results", text)
