"""The figures of an audit and of a landscape, each with the caption that belongs to it."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from logit_reg.analysis.curves import Curve, RestartLosses, StepGrid
from logit_reg.analysis.landscape import Comparison
from logit_reg.audit.records import Audit
from logit_reg.audit.records import Curve as AuditCurve
from logit_reg.report.style import (
    COLORS,
    LIGHT,
    SMALL_FONT_SIZE,
    Theme,
    drawn,
    legend,
    literal,
    log_ticks,
    mix,
    number,
    percent_bars,
)

_QUANTITIES = {"cross_entropy": "cross-entropy (nats)", "margin": "margin (logits)"}
_COLOR_MAPS = {"cross_entropy": "viridis", "margin": "RdBu"}

# Cross-entropies above so many ln K share one colour; the differences below would be lost.
_CEILING = 3.0
# A knob whose values span more than this is drawn on a logarithmic axis.
_LOG_RATIO = 20.0
_MAX_ATTACKS = 16
_MAX_SURVIVORS = 6

# A white line that is seen on every colour.
_OUTLINE = [patheffects.withStroke(linewidth=2.0, foreground="black")]


AccuracyCurve = AuditCurve | Curve
"""Accuracy against one knob: of an audit, or of `logit_reg.analysis.curves`."""


def attack_bars(audit: Audit, theme: Theme = LIGHT) -> Figure:
    """Accuracy clean, as claimed, under each attack, and under all of them together.

    Args:
        audit: of its attacks the strongest are drawn.
        theme: neutral colours.

    Returns:
        The figure: weakest attack first, the worst case with its 95 % interval last.
    """
    attacks = sorted(audit.accuracy_by_attack.items(), key=lambda item: -item[1])[-_MAX_ATTACKS:]
    worst = audit.worst_case
    rows = [
        ("clean", audit.clean_accuracy, COLORS[6]),
        ("claimed", audit.claim, None),
        *((name, accuracy, COLORS[0]) for name, accuracy in attacks),
        ("all attacks together", worst.accuracy, COLORS[1]),
    ]
    names = [literal(name, 18 if theme.is_narrow else 34) for name, *_ in rows]
    num_lines = 1 + max(name.count("\n") for name in names)
    with drawn(theme, 0.6 + (0.07 + 0.13 * num_lines) * len(rows)) as figure:
        axes = figure.subplots()
        for y, (_, accuracy, color) in enumerate(rows):
            face = mix(color, theme.paper, 0.75) if color else "none"
            axes.barh(
                y,
                100 * accuracy,
                0.7,
                color=face,
                edgecolor=color or theme.ink,
                linewidth=0.8,
                linestyle="-" if color else "--",
            )
            end = worst.interval[1] if y == len(rows) - 1 else accuracy
            axes.text(
                100 * end + 1.5,
                y,
                f"{100 * accuracy:.1f}",
                va="center",
                fontsize=SMALL_FONT_SIZE,
                # The line of the claim may pass behind.
                bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8},
            )
        low, high = worst.interval
        axes.plot([100 * low, 100 * high], [len(rows) - 1] * 2, color=theme.ink, linewidth=1.0)
        axes.axvline(100 * audit.claim, color=theme.ink, linewidth=0.7, linestyle="--")
        percent_bars(axes, names, theme)
        axes.set_ylabel("attack")
    return figure


def attack_bars_caption(audit: Audit) -> str:
    """What `attack_bars` shows, with n, and what a healthy model would show."""
    left_out = max(0, len(audit.accuracy_by_attack) - _MAX_ATTACKS)
    note = f" {left_out} weaker attacks are not drawn." if left_out else ""
    return (
        f"Accuracy on n = {audit.num_examples} images under each attack alone and, per image, "
        "under all of them together with the 95 % Wilson interval; the dashed line is the claim."
        f"{note} Under a healthy model the gradient attacks end within a few points of one "
        "another and of the claim; one attack far below the rest shows that the others, not the "
        "model, were weak."
    )


def accuracy_curves(
    curves: Sequence[AccuracyCurve], claim: float | None = None, theme: Theme = LIGHT
) -> Figure:
    """Accuracy against each knob of the attack.

    Args:
        curves: a panel for each.
        claim: claimed accuracy, a fraction, as a dashed line.
        theme: neutral colours.

    Returns:
        The figure: two panels a row.
    """
    num_columns, num_rows = _layout(len(curves), 1 if theme.is_narrow else 2)
    with drawn(theme, 0.35 + 1.65 * num_rows) as figure:
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes, curve in _panels(grid, curves):
            x, accuracy = np.asarray(curve.x), 100 * np.asarray(curve.accuracy)
            axes.plot(x, accuracy, color=COLORS[0], marker="o", markersize=3, linewidth=1.3)
            if claim is not None:
                axes.axhline(100 * claim, color=theme.ink, linewidth=0.8, linestyle="--")
            if curve.reported is not None:
                axes.axvline(curve.reported, color=COLORS[1], linewidth=0.8, linestyle=":")
            if len(x) > 1 and x[0] > 0 and x[-1] / x[0] > _LOG_RATIO:
                axes.set_xscale("log")
                log_ticks(axes.xaxis)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_ylim(-3, 103)
            axes.set_xlabel(literal(curve.label, 36))
            axes.set_ylabel("accuracy (%)")
            axes.grid(color=theme.rule, linewidth=0.5)
        handles = []
        if claim is not None:
            handles.append(_key("claimed", color=theme.ink, linestyle="--"))
        if any(curve.reported is not None for curve in curves):
            name = "ε of the threat model" if claim is None else "value that the claim is about"
            handles.append(_key(name, color=COLORS[1], linestyle=":"))
        if handles:
            legend(figure, handles, 1 if theme.is_narrow else 2)
    return figure


def accuracy_curves_caption(num_examples: int) -> str:
    """What `accuracy_curves` shows, with n, and what a healthy model would show."""
    return (
        f"Accuracy on n = {num_examples} images against one knob of the attack at a time. Under a "
        "healthy model accuracy falls steadily with epsilon and reaches 0 where every image can "
        "become grey; more steps, more restarts and other step sizes move it by a point or two. "
        "Accuracy that goes on falling, that some other value of a knob lowers by far, or that "
        "rises with epsilon, says that the attack was too weak, not that the model is strong."
    )


def step_map(grid: StepGrid, epsilon: float, theme: Theme = LIGHT) -> Figure:
    """Accuracy for each pair of a step size and a number of steps.

    Args:
        grid: of PGD.
        epsilon: unit of the step sizes, pixel units.
        theme: neutral colours.
    """
    percent = 100 * grid.accuracy
    colors = colormaps["cividis"]
    with drawn(theme, 1.0 + 0.27 * len(percent)) as figure:
        axes = figure.subplots()
        image = axes.imshow(percent, cmap=colors, vmin=0, vmax=100, origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(percent):
            axes.text(
                column,
                row,
                f"{value:.1f}",
                color="white" if value < 55 else "black",
                ha="center",
                va="center",
                fontsize=SMALL_FONT_SIZE,
            )
        axes.set_xticks(range(len(grid.num_steps)), [str(count) for count in grid.num_steps])
        axes.set_yticks(range(len(percent)), [f"{size / epsilon:.3g}" for size in grid.step_sizes])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("steps")
        axes.set_ylabel("step size (ε)")
        bar = figure.colorbar(image, ax=axes, label="accuracy (%)")
        bar.outline.set_visible(False)
    return figure


def step_map_caption(grid: StepGrid) -> str:
    """What `step_map` shows, with n, and what a healthy model would show."""
    gain = 100 * (grid.accuracy.max() - grid.accuracy.min())
    return (
        f"Accuracy in per cent of n = {grid.correct.shape[-1]} images under PGD, step sizes in "
        f"multiples of ε; best and worst cell differ by {gain:.1f} points. A healthy model varies "
        "by a few points once the steps are enough to cross the ball (Mosbach et al.: 0.91 to "
        "0.945 after adversarial training); a logit-squeezed one loses about 30 when the step "
        "grows to half of ε, because its surface is jagged."
    )


def restart_histograms(restarts: RestartLosses, num_classes: int, theme: Theme = LIGHT) -> Figure:
    """Histograms of the final losses over restarts, for the survivors whose losses vary most.

    Args:
        restarts: with at least one survivor.
        num_classes: K of the reference line ln K.
        theme: neutral colours.

    Raises:
        ValueError: if no example survives all restarts.
    """
    losses = restarts.cross_entropy
    if not len(restarts.survivors):
        raise ValueError("no example survives all restarts; there is no histogram to draw.")
    widest = np.argsort(-np.ptp(losses, axis=0), kind="stable")[:_MAX_SURVIVORS]
    ceiling = math.log(num_classes)
    # Beyond the wrong side of the decision there is nothing to see: these are survivors.
    edges = np.linspace(0, max(1.05 * ceiling, float(losses[:, widest].max())), 25)
    num_columns, num_rows = _layout(len(widest), 2 if theme.is_narrow else 3)
    with drawn(theme, 0.45 + 1.2 * num_rows) as figure:
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
        for axes, column in _panels(grid, widest):
            axes.hist(losses[:, column], edges, color=COLORS[0])
            axes.axvline(ceiling, color=theme.ink, linewidth=0.9, linestyle="--")
            axes.set_title(f"image {restarts.survivors[column]}", fontsize=SMALL_FONT_SIZE)
            axes.set_xlim(edges[0], edges[-1])
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.set_xlabel("cross-entropy (nats)")
            axes.set_ylabel("restarts")
        _label_outer(grid, len(widest))
        line = _key(f"ln {num_classes} = {ceiling:.2f}", color=theme.ink, linestyle="--")
        legend(figure, [line])
    return figure


def restart_histograms_caption(restarts: RestartLosses) -> str:
    """What `restart_histograms` shows, with n, and what a healthy model would show."""
    num_restarts, num_examples = restarts.correct.shape
    return (
        f"Final cross-entropy of {num_restarts} restarts on the images, of the "
        f"{len(restarts.survivors)} among n = {num_examples} that survive them all, whose losses "
        "vary most. Under a healthy model the restarts end close to one another. A wide or "
        "many-peaked histogram means that each restart stops in another hollow, and more of them "
        "would find adversarial images; a loss near ln K means logits that say little."
    )


def loss_maps(
    comparison: Comparison,
    quantity: str = "cross_entropy",
    example: int | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Heat maps with contours of several models, side by side on one colour scale.

    Args:
        comparison: the surfaces.
        quantity: "cross_entropy" or "margin".
        example: which of the chosen examples, counted from 0; the average if None.
        theme: neutral colours.

    Returns:
        The figure: a panel for each model and one colour bar.
    """
    surfaces = _surfaces(comparison, quantity, example)
    scale = _scale(comparison, quantity, surfaces)
    reference, reference_name = _reference(comparison, quantity)
    coordinates = comparison.coordinates
    half_cell = (coordinates[1] - coordinates[0]) / 2
    limits = (coordinates[0] - half_cell, coordinates[-1] + half_cell)
    num_columns, num_rows = _layout(len(surfaces), 2 if theme.is_narrow else 3)
    side = (theme.width - 1.2) / max(num_columns, 2)
    with drawn(theme, 0.75 + (side + 0.25) * num_rows) as figure:
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
        for axes, surface in _model_panels(grid, comparison, surfaces, theme):
            image = axes.imshow(
                surface,
                origin="lower",
                extent=limits * 2,
                cmap=_COLOR_MAPS[quantity],
                norm=scale,
                interpolation="bilinear",
            )
            if quantity == "cross_entropy":
                thin = MaxNLocator(8).tick_values(scale.vmin, scale.vmax)
                style = {"colors": "black", "linewidths": 0.3, "alpha": 0.6}
                _contour(axes, coordinates, surface, thin, **style)
            style = {"colors": "white", "linewidths": 1.0, "linestyles": "--"}
            _contour(axes, coordinates, surface, [reference], path_effects=_OUTLINE, **style)
            edge = {"color": "white", "linewidth": 1.0, "path_effects": _OUTLINE}
            axes.plot(*_ball_edge(comparison), **edge)
            axes.set_xlim(limits)
            axes.set_ylim(limits)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel("adversarial (ε)")
            axes.set_ylabel("random (ε)")
        _label_outer(grid, len(surfaces))
        bar = figure.colorbar(
            image,
            ax=figure.axes,
            label=_QUANTITIES[quantity],
            aspect=30,
            extend="max" if np.nanmax(surfaces) > scale.vmax else "neither",
        )
        _set_ticks(bar, scale, reference, reference_name)
        handles = [
            _key(name, color="white", linestyle=style, path_effects=_OUTLINE)
            for style, name in (("-", "edge of the ε ball"), ("--", reference_name))
        ]
        legend(figure, handles, 1 if theme.is_narrow else 2, "lower", handlelength=2.6)
    return figure


def loss_surfaces(
    comparison: Comparison,
    quantity: str = "cross_entropy",
    example: int | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """The surfaces of `loss_maps` in perspective, on one scale for height and colour.

    Args:
        comparison: the surfaces.
        quantity: "cross_entropy" or "margin".
        example: which of the chosen examples, counted from 0; the average if None.
        theme: neutral colours.
    """
    surfaces = _surfaces(comparison, quantity, example)
    scale = _scale(comparison, quantity, surfaces)
    a, b = np.meshgrid(comparison.coordinates, comparison.coordinates)
    num_columns, num_rows = _layout(len(surfaces), 1 if theme.is_narrow else 2)
    # Constrained layout does not see the labels of a perspective: the room for them is fixed.
    side, title = (theme.width - 0.4) / max(num_columns, 1.5), 0.5
    height = num_rows * (side + title)
    with drawn(theme, height, layout=None) as figure:
        figure.subplots_adjust(
            left=0.0,
            right=1 - 0.35 / theme.width,
            bottom=0.2 / height,
            top=1 - title / height,
            wspace=0.2,
            hspace=title / side,
        )
        panels = {"projection": "3d", "computed_zorder": False}
        grid = figure.subplots(num_rows, num_columns, squeeze=False, subplot_kw=panels)
        for axes, surface in _model_panels(grid, comparison, surfaces, theme):
            axes.plot_surface(
                a,
                b,
                np.clip(surface, scale.vmin, scale.vmax),
                cmap=_COLOR_MAPS[quantity],
                norm=scale,
                rcount=len(a),
                ccount=len(a),
                linewidth=0,
                antialiased=False,
                rasterized=True,
            )
            # The background would hide the label of the panel on the left.
            axes.patch.set_visible(False)
            axes.set_zlim(scale.vmin, scale.vmax)
            axes.set_xlabel("adversarial (ε)", labelpad=-4)
            axes.set_ylabel("random (ε)", labelpad=-4)
            axes.set_zlabel(_QUANTITIES[quantity], labelpad=-4)
            axes.tick_params(pad=-2)
            for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
                axis.set_pane_color((0, 0, 0, 0))
    return figure


def landscape_caption(
    comparison: Comparison, quantity: str = "cross_entropy", example: int | None = None
) -> str:
    """What `loss_maps` and `loss_surfaces` show, with n, and what a healthy model would show."""
    settings = comparison.settings
    landscape = settings["landscape"]
    threat, adversary = landscape["threat"], landscape["adversary"]
    examples = (
        f"average over n = {settings['num_examples']} images"
        if example is None
        else f"image {comparison.chosen[example]}, n = 1"
    )
    adversarial = f"the end of PGD-{adversary['num_steps']}" if adversary else "FGSM"
    random = {
        "linf": "signs (Rademacher)",
        "l2": "a Gaussian at a right angle",
        "l1": "signs of as few values",
    }[threat["norm"]]
    points = "clipped to the pixel range" if landscape["clip"] else "not clipped to the pixel range"
    return (
        f"{_QUANTITIES[quantity].split(' (')[0].capitalize()}, {examples}, over the plane of "
        f"{adversarial} and of random {random}, in multiples of ε = {threat['epsilon']:g} "
        f"({threat['norm']}), {points}. {landscape_reading(comparison, quantity, example)}"
    )


def landscape_reading(
    comparison: Comparison, quantity: str = "cross_entropy", example: int | None = None
) -> str:
    """The part of the caption on what a healthy model would show."""
    edge = "Within the white edge every point is within ε."
    if quantity == "margin":
        return (
            f"{edge} The margin is the true logit minus the largest other one; past the dashed "
            "line, below 0, the image is misclassified. Under a healthy model that line stays "
            "outside the ε ball in every direction. A margin that is small everywhere comes from "
            "small logits and says nothing of robustness."
        )
    surfaces = _surfaces(comparison, quantity, example)
    ceiling = _scale(comparison, quantity, surfaces).vmax
    cut = f" Values above {ceiling:.3g} are drawn as that." if np.nanmax(surfaces) > ceiling else ""
    return (
        f"{edge} The dashed line is ln {comparison.settings['num_classes']}, the loss of logits "
        f"that are all equal.{cut} Under a healthy model the loss stays low throughout the ε ball "
        "and rises smoothly along the adversarial direction. A plateau near the dashed line, or a "
        "hollow around the image with walls inside the ball, leaves an attack no gradient to "
        "follow while the errors are still there."
    )


def _key(name, **style):
    """A line of a legend."""
    return Line2D([], [], label=name, **style)


def _surfaces(comparison, quantity, example):
    """(M, P, P) values to draw."""
    if example is None:
        return getattr(comparison, f"mean_{quantity}")
    return getattr(comparison, quantity)[:, example]


def _scale(comparison, quantity, surfaces):
    """One scale for all models: without it nothing could be compared."""
    if quantity == "margin":
        limit = max(float(np.nanmax(np.abs(surfaces))), 1e-3)
        # Signs are told apart whatever the size of a model's logits.
        return AsinhNorm(limit / 30, -limit, limit)
    reference, _ = _reference(comparison, quantity)
    highest = max(float(np.nanmax(surfaces)), 1.2 * reference)
    return Normalize(0.0, min(highest, _CEILING * reference))


def _reference(comparison, quantity):
    """Value and name of the dashed line."""
    if quantity == "margin":
        return 0.0, "margin 0, the decision boundary"
    num_classes = comparison.settings["num_classes"]
    return math.log(num_classes), f"ln {num_classes}"


def _contour(axes, coordinates, surface, levels, path_effects=(), **style):
    """Contour lines at those of the levels that the surface crosses; others would be a warning."""
    crossed = [level for level in levels if np.nanmin(surface) < level < np.nanmax(surface)]
    if crossed:
        lines = axes.contour(coordinates, coordinates, surface, crossed, **style)
        lines.set_path_effects(path_effects)


def _set_ticks(bar, scale, reference, name):
    """Ticks of the colour bar, one of them at the reference, none so close that texts touch."""
    lowest, highest = scale.vmin, scale.vmax
    if isinstance(scale, AsinhNorm):
        powers = 10.0 ** np.arange(-4, 5)
        powers = powers[(powers > 2 * scale.linear_width) & (powers <= highest)]
        signed = [*-powers[::-1], 0.0, *powers]
        bar.set_ticks(signed, labels=[number(tick) for tick in signed])
        bar.minorticks_off()
        return
    ticks = np.asarray(MaxNLocator(5).tick_values(lowest, highest))
    is_far = np.abs(ticks - reference) > 0.06 * (highest - lowest)
    ticks = ticks[is_far & (ticks >= lowest) & (ticks <= highest)]
    bar.set_ticks([*ticks, reference], labels=[*map(number, ticks), name])
    bar.ax.axhline(reference, color="white", linewidth=1.0, linestyle="--", path_effects=_OUTLINE)


def _ball_edge(comparison):
    """Where a^2 + b^2 = 1 in l2, |a| + |b| = 1 else: inside, every point is within epsilon."""
    if comparison.settings["landscape"]["threat"]["norm"] != "l2":
        return np.array([[1, 0, -1, 0, 1], [0, 1, 0, -1, 0]])
    angles = np.linspace(0, 2 * np.pi, 97)
    return np.stack([np.cos(angles), np.sin(angles)])


def _layout(num_panels, most_columns):
    """Columns and rows of a grid of panels, as full as can be."""
    num_rows = math.ceil(num_panels / most_columns)
    return math.ceil(num_panels / num_rows), num_rows


def _panels(grid, items):
    """Axes and item of each panel; the axes that are left over are removed."""
    for axes in grid.flat[len(items) :]:
        axes.remove()
    return zip(grid.flat, items, strict=False)


def _model_panels(grid, comparison, surfaces, theme):
    """Axes, with the model's name above them, and surface of each model."""
    width = int(14 * theme.width) // grid.shape[1]
    models = list(zip(comparison.settings["models"], surfaces, strict=True))
    for axes, (name, surface) in _panels(grid, models):
        axes.set_title(literal(name, width), fontsize=SMALL_FONT_SIZE)
        yield axes, surface


def _label_outer(grid, num_panels):
    """Leave out the labels that a panel shares with the one below it or on its left."""
    num_columns = grid.shape[1]
    for place, axes in enumerate(grid.flat[:num_panels]):
        if place % num_columns:
            axes.tick_params(labelleft=False)
            axes.set_ylabel("")
        is_above = place + num_columns < num_panels
        axes.tick_params(labelbottom=not is_above)
        if is_above:
            axes.set_xlabel("")
