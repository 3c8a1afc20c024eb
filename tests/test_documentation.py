"""What the documentation says is what the code does."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pytest

from logit_reg.evaluation.ledger import read_ledger
from logit_reg.evaluation.statistics import PairedDifference
from logit_reg.experiments.landscapes import load_landscape
from logit_reg.experiments.reports import ReportSettings, compare_evaluations, write_report
from logit_reg.report.audit_figures import loss_maps
from logit_reg.report.compare import shared_rows
from logit_reg.report.style import to_svg
from madry_compat import data

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

RESULTS = (ROOT / "results" / "README.md").read_text()

DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = "\n".join([README, RESULTS, *DOCS.values()])

COMMANDS = re.findall(r"^python (scripts/\w+\.py.*)$", PAGES, re.MULTILINE)
COMMANDS += re.findall(r"`python (scripts/\w+\.py[^`\n]*)`", README)

_PARSE = """
import importlib, shlex, sys
from absl import flags
importlib.import_module("logit_reg.commands." + sys.argv[1])
for line in sys.argv[2:]:
    flags.FLAGS.unparse_flags()
    rest = flags.FLAGS(["command", *shlex.split(line)])
    if rest[1:] and sys.argv[1] != "fetch_model":
        sys.exit(f"unexpected {rest[1:]} in {line}")
"""


def commands_of(script):
    lines = [shlex.split(command, comments=True) for command in COMMANDS]
    return [shlex.join(words[1:]) for words in lines if words[0] == f"scripts/{script}.py"]


@pytest.mark.parametrize("script", sorted({shlex.split(c)[0][8:-3] for c in COMMANDS}))
def test_every_command_of_the_readme_parses(script):
    lines = commands_of(script)
    assert lines
    subprocess.run([sys.executable, "-c", _PARSE, script, *lines], check=True)


def test_every_protocol_of_the_page_exists_and_the_other_way_round():
    from logit_reg.evaluation.protocols import PROTOCOLS

    lines = DOCS["protocols"].splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    named = set()
    for row in rows:
        names = re.findall(r"`([\w-]+)`", row)
        base = names[0].rsplit("-", 1)[0]
        named |= {base + name if name.startswith("-") else name for name in names}
    assert named == set(PROTOCOLS)


def python_examples(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize(
    ("page", "number"), [("README.md", 0), *(("docs/python.md", number) for number in range(7))]
)
def test_the_python_examples_run(page, number, tmp_path, monkeypatch):
    examples = python_examples((ROOT / page).read_text())
    assert len(examples) == (1 if page == "README.md" else 7)
    monkeypatch.chdir(tmp_path)
    network = keras.Sequential(
        [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    images = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    names = {"network": network, "images": images, "labels": network(images).numpy().argmax(1)}
    exec(compile(examples[number], page, "exec"), names)
    if "distance" in names:
        assert names["distance"].shape == (6,)
    elif "model" in names:
        assert (tmp_path / "squeezed.keras").is_file() == ("save(" in examples[number])
    else:
        assert len(getattr(names["found"], "robust", images)) == len(images)


def first_digits(name, split):
    digits = data.load(name, split)
    return dataclasses.replace(digits, images=digits.images[:256], labels=digits.labels[:256])


def test_the_worked_example_runs(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("squeeze", ROOT / "docs/examples/squeeze.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # All of it runs, on fewer digits.
    monkeypatch.setattr(example, "load", first_digits)
    assert len((ROOT / "docs/examples/squeeze.py").read_text().splitlines()) <= 80

    example.main(epochs=1, num_images=2)

    lines = capsys.readouterr().out.splitlines()[-1:]
    assert re.fullmatch(r"squeezed clean \d+ % FGSM \d+ % PGD-40 \d+ % AutoAttack \d+ %", *lines)


@pytest.mark.parametrize(
    ("page", "section", "folder"),
    [
        ("results/README.md", "results", "demo"),
        ("results/README.md", "results-mnist", "mnist-3000"),
        ("README.md", "results-mnist-20000", "mnist-20000"),
        ("results/README.md", "results-beta-3000", "beta-3000"),
        ("results/README.md", "results-sigma-3000", "sigma-3000"),
        ("results/README.md", "results-objectives-3000", "objectives-3000"),
        ("results/README.md", "results-cheap-defences", "cheap-defences"),
        ("results/README.md", "results-cifar10-narrow", "cifar10-narrow"),
    ],
)
def test_the_results_tables_are_what_the_committed_ledgers_give(page, section, folder):
    from logit_reg.report.runs import load_run
    from logit_reg.report.tables import replace_marked_section, results_table

    folder = ROOT / "results" / folder
    runs = [load_run(folder / name) for name in (folder / "order.txt").read_text().split()]
    table = results_table(runs).to_markdown()
    text = (ROOT / page).read_text()
    assert replace_marked_section(text, section, table) == text


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("squeeze", "26.9 26.4 +0.4 [−0.2, +1.1] 24 16 0.27"),
        ("adversarial", "85.8 86.2 −0.4 [−0.8, +0.1] 5 12 0.14"),
    ],
)
def test_attacks_in_bfloat16_agree_as_the_text_says(name, row, capsys):
    folder = ROOT / "results" / "bfloat16" / name
    compare_evaluations([str(folder / "float32"), str(folder / "bfloat16")])
    assert f"pgd40-xent {row}" in " ".join(capsys.readouterr().out.split())
    assert all(number in RESULTS for number in row.split()[:2])


def test_the_table_of_speeds_is_what_the_committed_measurements_give():
    from benchmarks.table import markdown_table
    from logit_reg.files import read_json
    from logit_reg.report.tables import replace_marked_section

    paths = sorted((ROOT / "results" / "speed").glob("*.json"))
    assert paths
    table = markdown_table([read_json(path) for path in paths])
    assert replace_marked_section(DOCS["speed"], "speed", table) == DOCS["speed"]
    memory = read_json(ROOT / "results" / "speed" / "memory" / "images.json")
    words = " ".join(DOCS["speed"].split())
    for case in memory["cases"]:
        peak = case["contenders"][0]["peak_bytes"] / 2**20
        assert f"{peak:,.0f} MiB for {case['case']['num_images']:,}" in words


def assert_same_figure(drawn, committed, word):
    """Another version of matplotlib draws other paths, and the same words and numbers."""
    drawn, committed = drawn.read_text(), committed.read_text()
    if matplotlib.__version__ == "3.11.2":
        assert drawn == committed
    said = re.findall("<!-- (.*?) -->", committed)
    assert word in said and re.findall("<!-- (.*?) -->", drawn) == said


@pytest.mark.parametrize(
    ("name", "against", "word"),
    [
        ("mnist-20000", None, "83.4"),
        ("beta-3000", "beta", "beta, weight of the penalty"),
        ("fig5", "attack_steps", "7-step adversarial"),
        ("objectives-3000", None, "72.7"),
        ("cifar10-narrow", None, "76.6"),
    ],
)
def test_the_figures_of_the_results_are_what_the_committed_ledgers_give(
    name, against, word, tmp_path
):
    runs, figure = [str(ROOT / "results" / name)], tmp_path / "figure.svg"
    write_report(ReportSettings(runs, against=against, figure=str(figure)))
    assert_same_figure(figure, ROOT / "results" / f"{name}.svg", word)


@pytest.mark.parametrize("direction", ["fgsm", "pgd"])
def test_the_loss_surfaces_are_what_the_committed_arrays_give(direction, tmp_path):
    folder = ROOT / "results" / f"landscape-{direction}"
    comparison, _ = load_landscape(folder / "landscape.npz")
    drawn = tmp_path / "margin-map.svg"
    drawn.write_bytes(to_svg(loss_maps(comparison, "margin")))
    assert_same_figure(drawn, folder / "margin-map.svg", "mnist-natural")


def test_what_the_text_says_of_the_loss_surfaces_is_in_the_arrays():
    """The natural, squeezed and adversarial network, along each adversarial direction."""

    def along(direction):
        with np.load(ROOT / "results" / f"landscape-{direction}" / "landscape.npz") as arrays:
            middle = len(arrays["coordinates"]) // 2
            return arrays["coordinates"][middle:], arrays["mean_margin"][:, middle, middle:]

    def crossing(direction, network):
        epsilons, margins = along(direction)[0], along(direction)[1][network]
        last = int(np.flatnonzero(margins > 0)[-1])
        share = margins[last] / (margins[last] - margins[last + 1])
        return epsilons[last] + share * (epsilons[last + 1] - epsilons[last])

    at_epsilon = int(np.flatnonzero(np.isclose(along("fgsm")[0], 1))[0])
    said = {
        f"{along('fgsm')[1][1][0]:.2f}": "3.39 at the image",
        f"{along('fgsm')[1][1][at_epsilon]:.2f}": "still 0.63 at epsilon",
        f"{crossing('fgsm', 0):.2f}": "crosses 0 at 0.32 epsilon",
        f"{crossing('pgd', 1):.2f}": "crosses 0 at 0.71 epsilon",
        f"{along('pgd')[1][1][at_epsilon]:.2f}": "is −1.98 at epsilon",
        f"{crossing('pgd', 2):.2f}": "crosses at 1.41 epsilon",
    }
    text = " ".join(RESULTS.split())
    for number, words in said.items():
        assert number.replace("-", "−") in words and words in text, number


def test_the_table_of_autoattack_s_parts_is_what_its_ledger_gives():
    ledger, result = read_ledger(ROOT / "results" / "trades-golden")
    parts = result["protocols"]["autoattack-each"]["attacks"]
    kept = [ledger.correct[name] for name in parts]
    counted = [ledger.clean, *kept, np.all(kept, axis=0)]
    cells = " | ".join(f"{100 * np.mean(column):.2f}" for column in counted)
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert f"| {len(ledger.clean)} | {cells} |" in RESULTS


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "seed",
            "keeps {} of 500 images under AutoAttack with seeds 0, 1 and 2, and {} of 1,000 under "
            "PGD-40;",
        ),
        ("other-order", "keep {}, and {} (["),
    ],
)
def test_the_spread_of_seeds_is_that_of_the_ledgers(kind, sentence):
    folder = ROOT / "results" / "fgsm-rs-published"

    def listed(evaluation):
        ledgers = [read_ledger(folder / f"{kind}-{seed}" / evaluation)[0] for seed in range(3)]
        kept = [100 * np.all(list(ledger.correct.values()), axis=0).mean() for ledger in ledgers]
        return "{:.1f}, {:.1f} and {:.1f} %".format(*kept), {len(led.clean) for led in ledgers}

    strong, strong_images = listed("autoattack-n500")
    pgd, pgd_images = listed("paper-mnist-n1000")
    assert (strong_images, pgd_images) == ({500}, {1000})
    assert sentence.format(strong, pgd) in " ".join(RESULTS.split())


def test_what_the_text_compares_was_measured_on_the_same_images():
    runs = {
        (run, folder): read_ledger(ROOT / "results" / "mnist-20000" / run / folder)
        for run in ("squeeze", "smoothing", "adversarial", "free")
        for folder in ("evaluation", "strong")
    }
    pgd = ("pgd40-xent", "pgd40-cw")

    def on_shared(run):
        rows, _ = shared_rows(runs[run, "evaluation"], runs[run, "strong"])
        return runs[run, "evaluation"][0].right_under(pgd)[rows]

    squeezed, smoothed = (100 * on_shared(run).mean() for run in ("squeeze", "smoothing"))
    gap = PairedDifference.of(on_shared("free"), on_shared("adversarial"))
    low, high = (100 * end for end in gap.interval)
    for words in (
        f"of the same images PGD-40 leaves {squeezed:.1f} % and {smoothed:.1f} %",
        f"of the same 500 PGD-40 leaves {100 * on_shared('adversarial').mean():.1f} %",
        f"on the same 500 images: PGD-40 +{100 * gap.value:.1f} points ({low:.1f} to {high:.1f})",
        f"{sum(runs['squeeze', 'evaluation'][0].right_under(pgd[:1])[:1000])} of them, the margin",
    ):
        assert words in " ".join(RESULTS.split()), words


def test_numbers_in_the_results_have_their_leading_zeros():
    assert not re.search(r"(?<![\w.])\.\d", RESULTS)
