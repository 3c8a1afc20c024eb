"""A landscape and the curves of its models as one HTML page that needs no other file."""

import functools
from collections.abc import Mapping
from pathlib import Path

from logit_reg.analysis.curves import Curves
from logit_reg.analysis.landscape import Comparison
from logit_reg.files import write_text
from logit_reg.report import audit_figures
from logit_reg.report import html as html_page

_INTRODUCTION = (
    "What an attacker sees: how the loss of each model changes around an image, along the "
    "direction of an attack and a random one. All models share one scale."
)
_NAMES = {"cross_entropy": "Cross-entropy", "margin": "Margin"}


def write_landscape_page(
    path: Path | str, comparison: Comparison, curves: Mapping[str, Curves] | None = None
) -> None:
    """Write the figures of a landscape, whole or not at all.

    Args:
        path: the file; needs nothing beside it, no network and no script.
        comparison: the surfaces.
        curves: of some of the models, by name.
    """
    parts = [html_page.heading("Loss landscape", _INTRODUCTION)]
    for quantity, name in _NAMES.items():
        drawn = [
            figure
            for example in (None, *range(len(comparison.chosen)))
            for figure in _surfaces(comparison, quantity, example)
        ]
        parts.append(html_page.section(name, "\n".join(drawn)))
    for model, found in (curves or {}).items():
        parts.append(html_page.section(f"Attacks on {model}", "\n".join(_curves(found))))
    settings = {"landscape": comparison.settings}
    settings |= {model: found.settings for model, found in (curves or {}).items()}
    provenance = html_page.details("Settings", html_page.json_block(settings))
    parts.append(html_page.section("Provenance", provenance))
    write_text(path, html_page.document("Loss landscape", *parts))


def _surfaces(comparison, quantity, example):
    arguments = (comparison, quantity, example)
    where = "on average" if example is None else f"around image {comparison.chosen[example]}"
    yield html_page.figure(
        functools.partial(audit_figures.loss_maps, *arguments),
        f"Heat maps: {_NAMES[quantity].lower()} {where}, a panel for each model.",
        audit_figures.landscape_caption(*arguments),
    )
    yield html_page.figure(
        functools.partial(audit_figures.loss_surfaces, *arguments),
        f"Surfaces: {_NAMES[quantity].lower()} {where}, a panel for each model.",
        "The same in perspective.",
    )


def _curves(found):
    pgd_size = found.settings["curves"]["restart_factor"] * found.epsilon.reported
    lines = (
        found.epsilon,
        found.grid.against_steps(pgd_size),
        found.grid.against_step_size(),
        found.restarts.against_restarts(),
    )
    yield html_page.figure(
        functools.partial(audit_figures.accuracy_curves, lines),
        "Curves: accuracy against epsilon, steps, step size and restarts.",
        audit_figures.accuracy_curves_caption(found.settings["num_examples"]),
    )
    yield html_page.figure(
        functools.partial(audit_figures.step_map, found.grid, found.epsilon.reported),
        "Heat map: accuracy for each step size and number of steps.",
        audit_figures.step_map_caption(found.grid),
    )
    if len(found.restarts.survivors):
        yield html_page.figure(
            functools.partial(
                audit_figures.restart_histograms, found.restarts, found.settings["num_classes"]
            ),
            "Histograms: final losses of the restarts, a panel for each surviving image.",
            audit_figures.restart_histograms_caption(found.restarts),
        )
