"""The results as figures."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from logit_reg.report.style import COLORS, LIGHT, SMALL_FONT_SIZE, drawn


def times(results: Sequence[Mapping]) -> Figure:
    """Seconds of each repetition: a panel for each case, a row for each contender.

    Args:
        results: cases as `run.case_result` makes them, at least one.
    """
    sizes = [len(result["contenders"]) for result in results]
    with drawn(LIGHT, 0.3 + 0.65 * len(results) + 0.22 * sum(sizes)) as figure:
        panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for axes, result in zip(panels, results, strict=True):
            _case_panel(axes, result)
        panels[-1].set_xlabel("seconds a repetition (bar: median, dots: each; less is better)")
    return figure


def growth(results: Sequence[Mapping], quantity: str, sizes: Sequence[int]) -> Figure:
    """Median time, on a logarithmic axis, and peak memory, from 0, against a size.

    Args:
        results: cases as `run.case_result` makes them.
        quantity: what grows, for the axis.
        sizes: of each case.
    """
    names = dict.fromkeys(one["name"] for result in results for one in result["contenders"])
    with drawn(LIGHT, 2.6) as figure:
        left, right = figure.subplots(1, 2)
        for name, color in zip(names, COLORS, strict=False):
            points = [
                (size, one["median"], one["peak_bytes"] / 2**20)
                for size, result in zip(sizes, results, strict=True)
                for one in result["contenders"]
                if one["name"] == name
            ]
            x, seconds, memory = zip(*points, strict=True)
            left.plot(x, seconds, marker="o", markersize=4, color=color, label=name)
            right.plot(x, memory, marker="o", markersize=4, color=color, label=name)
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        # Names minor ticks, too, where the axis spans less than a decade and a half.
        left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.7)))
        right.set_ylim(bottom=0)
        for axes, label in ((left, "median seconds"), (right, "peak memory (MiB)")):
            axes.set_xscale("log")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(quantity)
            axes.set_ylabel(label)
            axes.grid(color=LIGHT.rule, linewidth=0.5)
        left.legend(frameon=False)
    return figure


def _case_panel(axes, result):
    contenders = result["contenders"]
    for row, one in enumerate(contenders):
        color = COLORS[0] if one["name"] == "ours" else COLORS[-1]
        axes.barh(row, one["median"], height=0.6, color=color, alpha=0.45)
        seconds = one["seconds"]
        axes.plot(seconds, [row] * len(seconds), ".", color=color, markersize=4)
    axes.set_title(result["case"]["name"], loc="left", fontsize=SMALL_FONT_SIZE)
    axes.set_yticks(range(len(contenders)), [one["name"] for one in contenders])
    axes.set_ylim(len(contenders) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT.rule, linewidth=0.5)
