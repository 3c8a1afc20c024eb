"""The figures of a report, each as a matplotlib figure and the caption that belongs to it."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from logit_reg.evaluation.statistics import Proportion
from logit_reg.report.attack_names import attack_title, in_order
from logit_reg.report.runs import Examples, Run, StoredEvaluation
from logit_reg.report.style import (
    COLORS,
    LIGHT,
    LINE_STYLES,
    SMALL_FONT_SIZE,
    Theme,
    drawn,
    legend,
    literal,
    log_ticks,
    mix,
    number,
    percent_bars,
    whiskers,
)
from logit_reg.report.tables import (
    FGSM_ATTACKS,
    accuracy_under,
    accuracy_under_pgd,
    comparable,
    pgd_attacks,
    pgd_lengths,
    shown_evaluations,
    strong_accuracy,
    strongest,
)
from logit_reg.training.overfitting import NUM_EXAMPLES, NUM_PROBE_STEPS

_LEAST_NORM = 1e-3

# From pale to full: the stronger the attack, the more of the run's colour.
_TINTS = (0.25, 0.5, 0.75, 1.0)


def accuracy_bars(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure:
    """Clean, FGSM, PGD and strong-attack accuracy of each run, with 95 % Wilson intervals.

    Args:
        runs: in order from the top; contaminated ones are left out.
        theme: neutral colours.

    Returns:
        The figure: a group of bars in its colour for each run.

    Raises:
        ValueError: if there are no runs, or they were evaluated on different data sets.
    """
    kept = comparable(runs)
    measures = _measures(kept)
    colored = [(color, run) for color, _, run in _styled(runs) if not run.is_contaminated]
    with drawn(theme, 1.0 + 0.62 * len(kept) + (0.3 if theme.is_narrow else 0)) as figure:
        axes = figure.subplots()
        height = 0.8 / len(measures)
        for group, (color, run) in enumerate(colored):
            for i, (_, measure) in enumerate(measures):
                y = group - 0.4 + (i + 0.5) * height
                _bar(axes, y, height, measure(run), color, _TINTS[i], theme)
        percent_bars(axes, [literal(run.name, 18) for _, run in colored], theme)
        axes.set_ylabel("run")
        handles = [
            Patch(facecolor=mix(theme.ink, theme.paper, tint), edgecolor=theme.ink, label=name)
            for tint, (name, _) in zip(_TINTS, measures, strict=True)
        ]
        legend(figure, handles, 1 if theme.is_narrow else 2)
    return figure


def accuracy_bars_caption(runs: Sequence[Run]) -> str:
    """What `accuracy_bars` shows, with n, and what a healthy model would show."""
    kept = comparable(runs)
    measures = _measures(kept)
    names = "; ".join(name for name, _ in measures)
    sizes = {found.num_examples for run in kept for _, m in measures if (found := m(run))}
    differ = (
        "Bars of another n are of other images: a difference of a few points may be that of the "
        "images. "
        if len(sizes) > 1
        else ""
    )
    return (
        f"Accuracy clean and under attack, worst case over the losses of each attack ({names}). "
        f"Whiskers are 95 % Wilson intervals. {differ}A healthy model loses a few points "
        "from PGD to the strong attack; bars that are long under FGSM and PGD and gone under "
        "the strong attack show masked gradients."
    )


def training_curves(runs: Sequence[Run], num_classes: int = 10, theme: Theme = LIGHT) -> Figure:
    """Cross-entropy and mean logit norm against the training step.

    Args:
        runs: those without a log are left out.
        num_classes: K of the reference line ln K, the cross-entropy of a constant prediction.
        theme: neutral colours.

    Returns:
        The figure: two panels, a line for each run.
    """
    logged = [(color, style, run) for color, style, run in _styled(runs) if run.log]
    num_columns = 1 if theme.is_narrow else 2
    with drawn(theme, 4.4 + 0.17 * math.ceil(len(logged) / num_columns)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        ceiling = math.log(num_classes)
        for color, style, run in logged:
            line = {"color": color, "linestyle": style, "linewidth": 1.3}
            upper.plot(run.log["step"], run.log["xent"], **line)
            lower.plot(run.log["step"], np.maximum(run.log["mean_logit_norm"], _LEAST_NORM), **line)
        upper.axhline(ceiling, color=theme.ink, linewidth=0.8, linestyle=(0, (1, 2)))
        upper.annotate(
            f"ln {num_classes} = {ceiling:.2f}",
            (1.0, ceiling),
            (0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=SMALL_FONT_SIZE,
        )
        # The first rows of a run, before it has learned anything, would squash all the rest.
        late_losses = [run.log["xent"][len(run.log["xent"]) // 10 :].max() for *_, run in logged]
        upper.set_ylim(0, 1.15 * max([ceiling, *late_losses]))
        upper.set_ylabel("cross-entropy (nats)")
        lower.set_yscale("log")
        log_ticks(lower.yaxis)
        lower.set_ylabel("mean l2 norm of the logits")
        _step_axis(lower)
        for axes in (upper, lower):
            axes.grid(color=theme.rule, linewidth=0.5)
        handles = [
            Line2D([], [], color=color, linestyle=style, label=literal(run.name, 34))
            for color, style, run in logged
        ]
        if handles:
            legend(figure, handles, num_columns)
    return figure


def training_curves_caption(runs: Sequence[Run], num_classes: int = 10) -> str:
    """What `training_curves` shows, with n, and what a healthy model would show."""
    sizes = sorted(
        {
            str(run.settings["training_batch_size"])
            for run in runs
            if run.log and "training_batch_size" in run.settings
        }
    )
    batch = f" (n = {' or '.join(sizes)} images)" if sizes else ""
    return (
        f"Cross-entropy on hard labels and mean norm of the logits in training, one batch{batch} "
        "at each point, on the images trained on, noise and training attack included. A healthy "
        f"run falls below ln {num_classes}, where it would say the same of every image. A logit "
        "norm that sinks towards 0 while the cross-entropy stays at that line is a collapse; a "
        "small one is what the regularisers ask for and no evidence of robustness. Norms below "
        f"{_LEAST_NORM:g} are drawn there."
    )


def robustness_curves(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure:
    """Accuracy under PGD in training against the training step, with that on clean images.

    Args:
        runs: those whose robustness was not watched are left out.
        theme: neutral colours.

    Returns:
        The figure: a full and a pale line for each run; a cross where it was stopped.
    """
    watched = [(color, style, run) for color, style, run in _styled(runs) if run.robustness]
    num_columns = 1 if theme.is_narrow else 2
    height = 2.6 + 0.17 * math.ceil(len(watched) / num_columns)
    with drawn(theme, height) as figure:
        axes = figure.subplots()
        handles = []
        for color, style, run in watched:
            step, label = run.robustness["step"], literal(run.name, 34)
            pgd = 100 * run.robustness["pgd_accuracy"]
            axes.plot(
                step,
                100 * run.robustness["clean_accuracy"],
                color=mix(color, theme.paper, 0.4),
                linestyle=style,
                linewidth=0.8,
            )
            axes.plot(step, pgd, color=color, linestyle=style, linewidth=1.3)
            handles.append(Line2D([], [], color=color, linestyle=style, label=label))
            if run.stop is not None:
                axes.plot(step[-1], pgd[-1], color=color, marker="x", clip_on=False)
        _step_axis(axes)
        axes.set_ylabel("images classified right (%)")
        axes.set_ylim(0, 100)
        axes.grid(color=theme.rule, linewidth=0.5)
        legend(figure, handles, num_columns)
    return figure


def robustness_curves_caption(runs: Sequence[Run]) -> str:
    """What `robustness_curves` shows, with n, and what a healthy run would show."""
    stopped = any(run.robustness and run.stop is not None for run in runs)
    cross = " A cross is where training was stopped." if stopped else ""
    return (
        f"Accuracy on {NUM_EXAMPLES} training images, always the same: under PGD of "
        f"{NUM_PROBE_STEPS} steps at the full epsilon (full lines) and clean (pale).{cross} A "
        "healthy run rises and stays; a full line that falls to nothing while the pale one stays "
        "is catastrophic overfitting. PGD this short flatters: the strong attack decides."
    )


def adversarial_grid(runs: Sequence[Run], num_images: int = 6, theme: Theme = LIGHT) -> Figure:
    """Images and, below them, what the attacks made of them for each run.

    Args:
        runs: those without examples are left out.
        num_images: most columns.
        theme: neutral colours.

    Returns:
        The figure: a row of originals whenever they differ from the row of originals above, and
        a row of adversarial images for each run, "true -> predicted" below each.

    Raises:
        ValueError: if no run has examples; see `with_examples`.
    """
    rows = _grid_rows(runs, num_images)
    num_columns = max(len(labels) for _, _, labels in rows)
    with drawn(theme, 0.85 * len(rows) * (0.8 if theme.is_narrow else 1)) as figure:
        grid = figure.subplots(len(rows), num_columns, squeeze=False)
        for axes_row, (name, images, labels) in zip(grid, rows, strict=True):
            for axes, image, label in itertools.zip_longest(axes_row, images, labels):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if image is None:
                    axes.set_axis_off()
                    continue
                axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="none")
                is_fooled = len(set(label.split(" → "))) == 2
                axes.set_xlabel(label, labelpad=2, weight="bold" if is_fooled else "normal")
            axes_row[0].set_ylabel(literal(name, 16), rotation=0, ha="right", va="center")
    return figure


def adversarial_grid_caption(runs: Sequence[Run], num_images: int = 6) -> str:
    """What `adversarial_grid` shows, with n, and what a healthy model would show."""
    shown = [evaluation for _, evaluation, _ in with_examples(runs)]
    attacks = "; ".join(in_order(attack_title(list(e.ledger.correct)) for e in shown))
    num_shown = max(min(num_images, len(e.examples.labels)) for e in shown if e.examples)
    return (
        f"n = {num_shown} images of the evaluation and the worst that the attack ({attacks}) made "
        "of each; below it the true class → the class predicted, in bold where they differ and the "
        "attack succeeded. A healthy model keeps most classes, and where it fails a person sees "
        "the other class coming."
    )


def with_examples(runs: Sequence[Run]) -> list[tuple[Run, StoredEvaluation, Examples]]:
    """The runs that have example images, each with the evaluation whose images are shown.

    That is the strongest attack's, else the largest.
    """
    found = []
    for run in runs:
        strong = strongest(run)
        having = [
            (evaluation is strong, len(evaluation.ledger.label), evaluation, examples)
            for evaluation in shown_evaluations(run).values()
            if (examples := evaluation.examples) and len(examples.labels)
        ]
        if having:
            *_, evaluation, examples = max(having, key=lambda entry: entry[:2])
            found.append((run, evaluation, examples))
    return found


def _measures(runs):
    """Up to four measures, weakest attack first: a name with n, and a function of a run."""
    num_steps = pgd_lengths(runs)[-1]
    strong = {attack_title(list(e.ledger.correct)) for run in runs if (e := strongest(run))}
    strong_name = strong.pop() if len(strong) == 1 else "strong attack"
    measures: list[tuple[str, Callable[[Run], Proportion | None]]] = [
        (attack_title(attacks), functools.partial(accuracy_under, attacks=attacks))
        for attacks in ((), FGSM_ATTACKS)
    ]
    under_pgd = functools.partial(accuracy_under_pgd, num_steps=num_steps)
    measures.append((attack_title(pgd_attacks(num_steps)), under_pgd))
    measures.append((strong_name, strong_accuracy))
    named = []
    for name, measure in measures:
        sizes = sorted({found.num_examples for run in runs if (found := measure(run))})
        size = f", n = {' or '.join(map(str, sizes))}" if sizes else ""
        named.append((literal(name, 40) + size, measure))
    return named


def _bar(axes, y, height, found, color, tint, theme):
    text = {"va": "center", "fontsize": SMALL_FONT_SIZE}
    if found is None:
        axes.text(1, y, "not measured", **text)
        return
    axes.barh(
        y,
        found.percent,
        height,
        color=mix(color, theme.paper, tint),
        edgecolor=color,
        linewidth=0.6,
        xerr=whiskers(found),
        error_kw={"ecolor": theme.ink, "elinewidth": 0.8, "capsize": 1.5},
    )
    axes.text(found.percent_interval[1] + 1.5, y, f"{found.percent:.1f}", **text)


def _step_axis(axes):
    axes.set_xlabel("training step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, place: number(value))


def _grid_rows(runs, num_images):
    rows: list[tuple[str, np.ndarray, list[str]]] = []
    originals = None
    for run, _, examples in with_examples(runs):
        lower, upper = examples.bounds
        images, adversarial = (
            np.clip((values[:num_images] - lower) / (upper - lower), 0, 1)
            for values in (examples.images, examples.adversarial)
        )
        labels = [int(label) for label in examples.labels[:num_images]]
        if originals is None or not np.array_equal(originals, images):
            originals = images
            rows.append(("original", images, [str(label) for label in labels]))
        answers = zip(labels, examples.predictions, strict=False)
        rows.append((run.name, adversarial, [f"{label} → {int(p)}" for label, p in answers]))
    if not rows:
        raise ValueError("no run has an examples.npz; there is nothing to show.")
    return rows


def _styled(runs):
    """A colour and a line style for each run: the same in every figure."""
    return [
        (COLORS[i % len(COLORS)], LINE_STYLES[i % len(LINE_STYLES)], run)
        for i, run in enumerate(runs)
    ]
