"""Figures of a sweep: accuracy against a setting of the training, its step, or the attack's."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from logit_reg.evaluation.statistics import Proportion
from logit_reg.objectives import REGULARIZERS, collapse_threshold
from logit_reg.report.attack_names import CLEAN, attack_title, in_order, line_styles
from logit_reg.report.runs import Run, StoredEvaluation
from logit_reg.report.style import (
    LIGHT,
    SMALL_FONT_SIZE,
    Theme,
    drawn,
    legend,
    literal,
    whiskers,
)
from logit_reg.report.tables import (
    FGSM_ATTACKS,
    Table,
    accuracy_under,
    accuracy_under_pgd,
    comparable,
    differing_settings,
    pgd_attacks,
    pgd_lengths,
    strongest,
)

# Letters of a panel's title, beyond which it names as few settings as possible, these first.
_LONGEST_PANEL = 60
_TELLING = ("dataset", "reg", "adversary", "smoothing", "beta", "sigma")

TRAINING_STEP = "training_step"
ATTACK_STEPS = "attack_steps"

_LABELS = {
    "beta": "beta, weight of the penalty",
    "sigma": "sigma, stddev of the noise in training (pixel units)",
    "smoothing": "lambda of label smoothing",
    "omega": "omega, floor of the cross-entropy",
    TRAINING_STEP: "training step",
    ATTACK_STEPS: "iterations of PGD",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One accuracy of one network."""

    panel: str
    """What the runs of a panel share; "" where all share everything."""
    measure: str
    """"clean", or what it was attacked with; see `attack_title`."""
    x: float
    accuracy: Proportion
    seed: int | None
    """Of the training."""

    @property
    def curve(self) -> str:
        """The measure, with its n."""
        return f"{self.measure}, n = {self.accuracy.num_examples}"


def sweep_points(runs: Sequence[Run], against: str) -> list[Point]:
    """The points of a sweep's figure, counted from the ledgers.

    Args:
        runs: of the sweep.
        against: a setting of the training such as "beta"; `TRAINING_STEP` for evaluations of
            checkpoints on the way; `ATTACK_STEPS` for evaluations under PGD of several lengths.

    Returns:
        Points in the order of the runs, then of x.

    Raises:
        ValueError: if nothing varies, or the runs are on different data sets.
    """
    kept = comparable(runs)
    if against in (TRAINING_STEP, ATTACK_STEPS):
        points_of = _checkpoint_points if against == TRAINING_STEP else _attack_points
        pairs = zip(kept, _panels_of_networks(kept), strict=True)
        points = [point for run, panel in pairs for point in points_of(run, panel)]
    else:
        points = [p for run in kept for p in _setting_points(run, kept, against)]
    if len({point.x for point in points}) < 2:
        raise ValueError(
            f"these runs have no two values of {against!r} to draw; sweep it, or name another."
        )
    return sorted(points, key=lambda point: point.x)


def sweep_figure(
    runs: Sequence[Run], against: str, num_classes: int = 10, theme: Theme = LIGHT
) -> Figure:
    """Accuracy against what a sweep varies, a panel for each of the other settings that differ.

    Whiskers are 95 % Wilson intervals of one network; the line joins the means over seeds.

    Args:
        runs: of the sweep.
        against: see `sweep_points`.
        num_classes: K of the data set, for the collapse threshold.
        theme: neutral colours.

    Returns:
        The figure.

    Raises:
        ValueError: as `sweep_points`.
    """
    points = sweep_points(runs, against)
    panels = list(dict.fromkeys(point.panel for point in points))
    curves = _curves(points)
    styles = line_styles(measure for measure, _ in curves)
    with drawn(theme, 0.7 + 2.1 * len(panels)) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, panel in zip(grid, panels, strict=True):
            for measure, curve in curves:
                mine = [p for p in points if (p.panel, p.curve) == (panel, curve)]
                _draw(axes, mine, *styles[measure])
            if panel:
                axes.set_title(literal(panel, 60), fontsize=SMALL_FONT_SIZE, loc="left")
            axes.set_ylim(-3, 103)
            axes.set_yticks(range(0, 101, 20))
            axes.set_ylabel("images right (%)")
            axes.set_xlabel(_LABELS.get(against, against.replace("_", " ")))
            axes.grid(axis="y", color=theme.rule, linewidth=0.5)
            if against == ATTACK_STEPS:
                axes.set_xscale("log")
                ticks = sorted({p.x for p in points if p.panel == panel})
                axes.set_xticks(ticks[:: math.ceil(len(ticks) / 9)])
                axes.xaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
        if against == "beta":
            _draw_thresholds(grid, panels, comparable(runs), num_classes, theme)
        handles = [
            Line2D([], [], color=color, linestyle=style, label=literal(curve, 40))
            for measure, curve in curves
            for color, style in (styles[measure],)
        ]
        legend(figure, handles, handlelength=2.6)
    return figure


def sweep_caption(runs: Sequence[Run], against: str) -> str:
    """What `sweep_figure` shows: n, intervals, seeds, images."""
    points = sweep_points(runs, against)
    datasets = {evaluation.dataset for run in runs for evaluation in run.evaluations.values()}
    seeds = sorted({point.seed for point in points if point.seed is not None})
    parts = [
        f"Accuracy on {' and '.join(sorted(datasets))}, counted from the per-example ledgers, "
        "under the worst of the losses of each attack where it has several. Whiskers "
        "are 95 % Wilson intervals over the images of one network",
        f"; a mark for each of {len(seeds)} training seeds, the line joins their means."
        if len(seeds) > 1
        else "; one training seed.",
    ]
    if against == "beta":
        parts.append(
            " Dotted: beta from which all-zero logits minimise the objective over free logits."
        )
        if len({run.settings.get("reg") for run in runs}) > 1:
            batch = {run.settings.get("training_batch_size") for run in runs}
            sizes = " or ".join(str(size) for size in sorted(batch, key=str))
            parts.append(
                f" The batch-wise penalty is about the square root of the batch ({sizes}) weaker "
                "than the per-example one at the same beta, hence an axis for each."
            )
    return "".join(parts)


def sweep_table(runs: Sequence[Run], against: str) -> Table:
    """The points of the figure as a table: the mean over seeds, and n of each network."""
    points = sweep_points(runs, against)
    panels = list(dict.fromkeys(point.panel for point in points))
    curves = [curve for _, curve in _curves(points)]
    rows = []
    for panel in panels:
        for x in sorted({point.x for point in points if point.panel == panel}):
            cells = [
                [p.accuracy for p in points if (p.panel, p.curve, p.x) == (panel, curve, x)]
                for curve in curves
            ]
            name = f"{x:g}" if len(panels) == 1 else f"{panel}: {x:g}"
            rows.append((name, *map(_cell, cells)))
    return Table(
        columns=(against, *(curve.replace(", n", "\nn") for curve in curves)),
        rows=tuple(rows),
        caption=sweep_caption(runs, against)
        + " Brackets: that interval, or the lowest and highest of several seeds.",
    )


def _cell(found):
    if not found:
        return "–"
    low, high = found[0].percent_interval
    if len(found) > 1:
        low, high = (f(accuracy.percent for accuracy in found) for f in (min, max))
    return f"{np.mean([accuracy.percent for accuracy in found]):.1f} [{low:.1f}, {high:.1f}]"


def _setting_points(run, runs, against):
    x = run.settings.get(against)
    if isinstance(x, bool) or not isinstance(x, int | float):
        return
    panel = _panel(run, runs, against)
    measures = {attack_title(names): accuracy_under(run, names) for names in ((), FGSM_ATTACKS)}
    for num_steps in pgd_lengths([run])[-1:]:
        measures[attack_title(pgd_attacks(num_steps))] = accuracy_under_pgd(run, num_steps)
    if strong := strongest(run):
        measures[_title(strong)] = Proportion.of(strong.ledger.robust)
    for measure, accuracy in measures.items():
        if accuracy is not None:
            yield Point(panel, measure, float(x), accuracy, run.seed)


def _checkpoint_points(run, panel):
    clean: dict[int, StoredEvaluation] = {}
    for _, evaluation in sorted(run.evaluations.items()):
        match = re.search(r"checkpoint-(\d{1,12})$", str(evaluation.settings.get("model")))
        if not match or evaluation.is_slice:
            continue
        step = int(match[1])
        largest = clean.setdefault(step, evaluation)
        if len(evaluation.ledger.label) > len(largest.ledger.label):
            clean[step] = evaluation
        found = Proportion.of(evaluation.ledger.robust)
        yield Point(panel, _title(evaluation), float(step), found, run.seed)
    for step, evaluation in clean.items():
        yield Point(panel, CLEAN, float(step), Proportion.of(evaluation.ledger.clean), run.seed)


def _attack_points(run, panel):
    for name, evaluation in sorted(run.evaluations.items()):
        if "@" not in name or evaluation.is_slice:
            continue
        for attack, x in _pgd_steps(evaluation).items():
            # The axis has the number of steps.
            title = re.sub(r"-\d+", "", attack_title([attack]))
            accuracy = Proportion.of(evaluation.ledger.clean & evaluation.ledger.correct[attack])
            yield Point(panel, title, float(x), accuracy, run.seed)


def _pgd_steps(evaluation: StoredEvaluation) -> dict[str, int]:
    matches = {name: re.fullmatch(r"pgd(\d{1,5})-\w+", name) for name in evaluation.ledger.correct}
    return {name: int(match[1]) for name, match in matches.items() if match}


def _title(evaluation):
    return attack_title(list(evaluation.ledger.correct))


def _curves(points):
    """Measure and name of each curve, weakest attack first."""
    order = in_order(point.measure for point in points)
    pairs = {(point.measure, point.curve): point.accuracy.num_examples for point in points}
    return sorted(pairs, key=lambda pair: (order.index(pair[0]), -pairs[pair]))


def _panel(run, runs, against):
    """The other settings that differ between the runs, as words.

    Where that is long, only as many of them as tell the runs apart.
    """

    def values(names, run):
        return tuple(str(run.settings.get(name)) for name in names)

    def num_kinds(names):
        return len({values(names, run) for run in runs})

    names = [name for name in differing_settings(runs) if name not in (against, "random_seed")]
    if len(_setting_words(names, run)) > _LONGEST_PANEL:
        telling: list[str] = []
        for name in sorted(names, key=lambda name: name not in _TELLING):
            if num_kinds([*telling, name]) > num_kinds(telling):
                telling.append(name)
        names = [name for name in names if name in telling]
    return _setting_words(names, run)


def _setting_words(names, run):
    return ", ".join(f"{name} {run.settings.get(name)}" for name in names)


def _panels_of_networks(runs):
    """Names of the runs where they say as much as the settings that differ, else those."""
    names = [run.name for run in runs]
    settings = [_panel(run, runs, "") for run in runs]
    num_pairs = len(set(zip(names, settings, strict=True)))
    return names if 1 < num_pairs == len(set(names)) == len(set(settings)) else settings


def _draw(axes, points, color, style):
    if not points:
        return
    for point in points:
        axes.errorbar(
            point.x,
            point.accuracy.percent,
            yerr=whiskers(point.accuracy),
            color=color,
            marker="o",
            markersize=2.5,
            elinewidth=0.8,
            capsize=1.5,
        )
    xs = sorted({point.x for point in points})
    means = [np.mean([p.accuracy.percent for p in points if p.x == x]) for x in xs]
    axes.plot(xs, means, color=color, linestyle=style, linewidth=1.2)


def _draw_thresholds(grid, panels, runs, num_classes, theme):
    """A dotted line, with its value, at the collapse threshold of each panel."""
    for axes, panel in zip(grid, panels, strict=True):
        for run in runs:
            reg, batch = run.settings.get("reg"), run.settings.get("training_batch_size")
            known = reg in REGULARIZERS and isinstance(batch, int)
            if not known or _panel(run, runs, "beta") != panel:
                continue
            threshold = collapse_threshold(
                batch,
                num_classes,
                reg=reg,
                smoothing=float(run.settings.get("smoothing", 0.0)),
            )
            if math.isfinite(threshold):
                axes.axvline(threshold, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 2)))
                axes.annotate(
                    f"all-zero logits from {threshold:.4g}",
                    (threshold, 0.5),
                    (3, 0),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    rotation=90,
                    ha="left",
                    va="center",
                    fontsize=SMALL_FONT_SIZE,
                )
            break
