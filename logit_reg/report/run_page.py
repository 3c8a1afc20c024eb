"""The report as one HTML page that needs no other file."""

import functools
import html
from collections.abc import Sequence
from pathlib import Path

from logit_reg.files import write_text
from logit_reg.report import figures
from logit_reg.report import html as html_page
from logit_reg.report.runs import Run
from logit_reg.report.tables import (
    accuracy_under_pgd,
    comparable,
    pgd_lengths,
    results_table,
    strong_accuracy,
)

_READING = (
    ("clean", "Share of images classified right without an attack."),
    (
        "FGSM",
        "One gradient step of the full size. An image counts as right only if it withstands both "
        "losses: cross-entropy (xent) and the margin between the true logit and the largest other "
        "one (CW).",
    ),
    (
        "PGD, xent and CW",
        "Many small gradient steps on one of the two losses from a random start. An image counts "
        "as broken if any step on the way fools the network.",
    ),
    (
        "worst case",
        "Right clean and under every attack of these columns; with its 95 % interval.",
    ),
    (
        "strong attack",
        "The strongest attack at hand, on fewer images because it is slow. It is the number to "
        "quote, and still only an upper bound: a stronger attack can lower it, none can raise it.",
    ),
    (
        "training steps, minutes",
        "What the defence cost, in optimiser steps and wall-clock time on the machine of the run.",
    ),
)

_WARNING = (
    "<strong>FGSM and PGD flatter this family of defences.</strong> Logit squeezing, logit "
    "similarity and label smoothing make logits small and the loss flat around each image, so "
    "the gradient that these attacks follow says little about where the errors are. A high "
    "number under PGD and a low one under the strong attack is masking, not robustness; "
    "adversarial training, whose two numbers lie close together once it has trained for long, is "
    "the yardstick."
)


def write_page(
    path: Path | str,
    title: str,
    runs: Sequence[Run],
    *,
    num_classes: int = 10,
    introduction: str | None = None,
    released: Sequence[Run] = (),
) -> None:
    """Write a report on some runs as one HTML page, whole or not at all.

    Args:
        path: the file; needs nothing beside it, no network and no script.
        title: heading of the page.
        runs: in the order of rows, bars and colours.
        num_classes: K of the data set.
        introduction: what this is, in two sentences; a general text if None.
        released: networks that were trained elsewhere, whose evaluations come first.

    Raises:
        ValueError: if there are neither runs nor released networks, or either were evaluated on
            different data sets.
    """
    every = [*released, *runs]
    page = _page(title, runs, num_classes, introduction or _introduction(every), released)
    write_text(path, page)


def _page(title, runs, num_classes, introduction, released):
    sections = _released_sections(released) if released else []
    if runs or not released:
        sections += _run_sections(runs, num_classes)
    terms = "\n".join(f"<dt>{term}</dt>\n<dd>{meaning}</dd>" for term, meaning in _READING)
    sections.append(html_page.section("How to read it", f"<p>{_WARNING}</p>\n<dl>\n{terms}\n</dl>"))
    every = "\n".join(map(_provenance, [*released, *runs]))
    sections.append(html_page.section("Provenance", every))
    return html_page.document(title, html_page.heading(title, introduction), *sections)


def _released_sections(released):
    """What PGD promises of each network and what the strong attack leaves: figure, then table."""
    items = "".join(f"<li>{html.escape(text)}</li>\n" for text in map(_promise, released))
    heading = "Released networks: what PGD promises and what the strong attack leaves"
    content = f"<ul>\n{items}</ul>\n{_bars(released)}\n{results_table(released).to_html()}"
    return [html_page.section(heading, content)]


def _promise(run):
    num_steps = pgd_lengths([run])[-1]
    parts = []
    for name, found in (
        (f"PGD-{num_steps}", accuracy_under_pgd(run, num_steps)),
        ("the strong attack", strong_accuracy(run)),
    ):
        if found is not None:
            parts.append(f"{found.percent:.1f} % of {found.num_examples} images under {name}")
    return f"{run.name}: {', '.join(parts) or 'not attacked'}"


def _bars(runs):
    return html_page.figure(
        functools.partial(figures.accuracy_bars, runs),
        "Bars: accuracy of each run clean, under FGSM, PGD and the strong attack.",
        figures.accuracy_bars_caption(runs),
    )


def _run_sections(runs, num_classes):
    sections = [html_page.section("Results", results_table(runs).to_html())]

    def add_figure(heading, draw, caption, alternative, *options):
        figure = html_page.figure(
            functools.partial(draw, runs, *options), alternative, caption(runs, *options)
        )
        sections.append(html_page.section(heading, figure))

    if comparable(runs):
        sections.append(html_page.section("Accuracy under attack", _bars(runs)))
    if any(run.log for run in runs):
        add_figure(
            "Training",
            figures.training_curves,
            figures.training_curves_caption,
            "Curves: cross-entropy and mean logit norm of each run against the step.",
            num_classes,
        )
    if any(run.robustness for run in runs):
        add_figure(
            "Robustness in training",
            figures.robustness_curves,
            figures.robustness_curves_caption,
            "Curves: accuracy of each run under PGD and clean against the training step.",
        )
    if figures.with_examples(runs):
        add_figure(
            "Images and their adversarial versions",
            figures.adversarial_grid,
            figures.adversarial_grid_caption,
            "Images in the top row, their adversarial versions for each run below.",
        )
    return sections


def _introduction(runs):
    names = sorted({str(run.settings["dataset"]) for run in runs if "dataset" in run.settings})
    trained = f" trained on {' and '.join(names)}" if names else ""
    count = f"{len(runs)} networks" if len(runs) > 1 else "one network"
    return (
        f"This page attacks {count}{trained} and shows what each defence costs and what is left of "
        "its accuracy. Every number is counted from verdicts on single images, and the numbers "
        "under FGSM and PGD are shown beside those under a stronger attack."
    )


def _provenance(run):
    seed = "unknown" if run.seed is None else run.seed
    record = {"settings": run.settings, "seed": seed, "versions": run.versions}
    evaluations = "\n".join(
        html_page.details(
            f"{folder}: {evaluation.dataset}, n = {len(evaluation.ledger.label)}, "
            f"{evaluation.attack_name}",
            html_page.json_block(evaluation.result),
        )
        for folder, evaluation in run.evaluations.items()
    )
    summary = f"{run.name}: seed {seed}, commit {run.commit}"
    return html_page.details(summary, f"{html_page.json_block(record)}\n{evaluations}")
