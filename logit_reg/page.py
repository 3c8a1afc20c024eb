"""The report as one HTML page that needs no other file."""

import base64
import functools
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from logit_reg import figures
from logit_reg.files import atomic_path
from logit_reg.report import comparable, results_table
from logit_reg.runs import Run

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5a5f68; --rule: #d5d8dd;
  --paper: #ffffff; --tint: #f5f6f8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a3a8b0; --rule: #3a3e45; --paper: #15171a; --tint: #1e2125; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
p, dl, caption { max-width: 44rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
.lead { font-size: 1.1rem; margin: 0; }
table, figcaption, caption, details, dt { font-family: system-ui, "Segoe UI", Roboto, Helvetica,
  Arial, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
tbody { border-bottom: 1.5px solid var(--ink); }
caption, figcaption { text-align: left; color: var(--soft); font-size: .875rem; line-height: 1.45; }
caption { caption-side: bottom; padding-top: .6rem; }
thead th { border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink);
  vertical-align: bottom; font-weight: 600; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; min-width: 11rem; white-space: normal; }
th:last-child, td:last-child { padding-right: 0; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
figure { margin: 0; display: grid; grid-template-columns: minmax(0, 42rem) minmax(12rem, 1fr);
  gap: .6rem 2rem; }
figure img { display: block; width: 100%; height: auto; }
dt { font-weight: 600; font-size: .9rem; }
dd { margin: 0 0 .7rem; }
details { border-top: 1px solid var(--rule); padding: .45rem 0; font-size: .875rem; }
details details { margin-left: 1rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .75rem; overflow-x: auto; font-size: .75rem;
  line-height: 1.4; max-height: 26rem; }
@media screen and (max-width: 60rem) {
  figure { grid-template-columns: minmax(0, 42rem); }
}
@media screen and (max-width: 48rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  table { display: flex; flex-direction: column; }
  caption { order: 1; }
  tbody { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { display: grid; grid-template-columns: 1fr; padding: .6rem 0;
    border-top: 1px solid var(--rule); }
  tbody tr:first-child { border-top: 1.5px solid var(--ink); }
  tbody tr + tr > * { border-top: 0; }
  tbody th { font-weight: 700; padding: 0 0 .2rem; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .06rem 0; }
  td::before { content: attr(data-label); color: var(--soft); white-space: normal;
    text-align: left; }
}
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .3rem; }
  figure, tr { break-inside: avoid; }
  h2, dt { break-after: avoid; }
  th:first-child { min-width: 3.5cm; }
  figure { display: block; }
  figure img { width: 10cm; margin-bottom: .3cm; }
}
""".strip()

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
) -> None:
    """Write a report on some runs as one HTML page, whole or not at all.

    Args:
        path: the file; needs nothing beside it, no network and no script.
        title: heading of the page.
        runs: in the order of rows, bars and colours.
        num_classes: K of the data set.
        introduction: what this is, in two sentences; a general text if None.

    Raises:
        ValueError: if there are no runs, or they were evaluated on different data sets.
    """
    page = _page(title, runs, num_classes, introduction or _introduction(runs))
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _page(title, runs, num_classes, introduction):
    sections = [_section("Results", results_table(runs).to_html())]
    if comparable(runs):
        sections.append(
            _section(
                "Accuracy under attack",
                _figure(
                    functools.partial(figures.accuracy_bars, runs),
                    "Bars: accuracy of each run clean, under FGSM, PGD and the strong attack.",
                    figures.accuracy_bars_caption(runs),
                ),
            )
        )
    if any(run.log for run in runs):
        sections.append(
            _section(
                "Training",
                _figure(
                    functools.partial(figures.training_curves, runs, num_classes),
                    "Curves: cross-entropy and mean logit norm of each run against the step.",
                    figures.training_curves_caption(runs, num_classes),
                ),
            )
        )
    if figures.examples_folder(runs):
        sections.append(
            _section(
                "Images and their adversarial versions",
                _figure(
                    functools.partial(figures.adversarial_grid, runs),
                    "Images in the top row, their adversarial versions for each run below.",
                    figures.adversarial_grid_caption(runs),
                ),
            )
        )
    terms = "\n".join(f"<dt>{term}</dt>\n<dd>{meaning}</dd>" for term, meaning in _READING)
    sections.append(_section("How to read it", f"<p>{_WARNING}</p>\n<dl>\n{terms}\n</dl>"))
    sections.append(_section("Provenance", "\n".join(map(_provenance, runs))))
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f'<main>\n<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(introduction)}</p>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _introduction(runs):
    names = sorted({str(run.settings["dataset"]) for run in runs if "dataset" in run.settings})
    trained = f" trained on {' and '.join(names)}" if names else ""
    count = f"{len(runs)} networks" if len(runs) > 1 else "one network"
    return (
        f"This page attacks {count}{trained} and shows what each defence costs and what is left of "
        "its accuracy. Every number is counted from verdicts on single images, and the numbers "
        "under FGSM and PGD stand beside those under a stronger attack."
    )


def _section(heading, content):
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"


def _figure(draw: Callable[..., Figure], alternative: str, caption: str) -> str:
    light, dark = (_data_uri(draw(theme=theme)) for theme in (figures.LIGHT, figures.DARK))
    return (
        '<figure>\n<picture>\n<source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{dark}">\n<img alt="{html.escape(alternative)}" src="{light}">\n</picture>\n'
        f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
    )


def _data_uri(figure):
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.to_svg(figure)).decode()}"


def _provenance(run):
    seed = "unknown" if run.seed is None else run.seed
    record = {"settings": run.settings, "seed": seed, "versions": run.versions}
    evaluations = "\n".join(
        _details(
            f"{folder}: {evaluation.dataset}, n = {len(evaluation.ledger.label)}, "
            f"{evaluation.attack_name}",
            _json(evaluation.result),
        )
        for folder, evaluation in run.evaluations.items()
    )
    summary = f"{run.name}: seed {seed}, commit {run.commit}"
    return _details(summary, f"{_json(record)}\n{evaluations}")


def _details(summary, content):
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def _json(value):
    return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
