"""The look that all figures share: fonts, colours, light and dark, and how they become SVG."""

import contextlib
import dataclasses
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Literal

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from logit_reg.evaluation.statistics import Proportion

# Width in inches of a figure beside its caption.
WIDTH = 5.2
# What a telephone shows at full size.
NARROW_WIDTH = 3.7
FONT_SIZE = 8.0
SMALL_FONT_SIZE = 7.0

# Okabe and Ito's colours, safe for colour-blind readers, without the yellow that is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))


@dataclasses.dataclass(frozen=True)
class Theme:
    """The neutral colours of a figure, and its width."""

    ink: str
    """Text."""
    rule: str
    """Grid and axes."""
    paper: str
    """Background."""
    width: float = WIDTH
    """Of the figure, in inches."""

    @property
    def is_narrow(self) -> bool:
        """Whether panels and legends have room for one column only."""
        return self.width < WIDTH


LIGHT = Theme(ink="#1b1d21", rule="#c9ccd1", paper="#ffffff")
DARK = Theme(ink="#e6e6e3", rule="#4a4e55", paper="#15171a")


def narrow(theme: Theme) -> Theme:
    """The same colours for a telephone: letters keep their size, panels stand below each other."""
    return dataclasses.replace(theme, width=NARROW_WIDTH)


def to_svg(figure) -> bytes:
    """The figure as SVG, the same bytes each time."""
    file = io.BytesIO()
    with house_style(LIGHT):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def mix(color: str, background: str, share: float) -> tuple[float, float, float]:
    """A share of a colour on a background, as red, green and blue in [0, 1]."""
    red, green, blue = (
        share * c + (1 - share) * b for c, b in zip(to_rgb(color), to_rgb(background), strict=True)
    )
    return red, green, blue


def literal(text: str, width: int) -> str:
    """Text that matplotlib takes as it is, in at most three lines of `width` characters."""
    lines = textwrap.wrap(text, width, max_lines=3, placeholder=" …") or ["?"]
    return "\n".join(lines).replace("$", r"\$")


def number(value: float) -> str:
    """A number as text, with a minus sign and not a hyphen, and commas at the thousands."""
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 and value == round(value) else f"{value:g}"
    return text.replace("-", "−")


def log_ticks(axis) -> None:
    """Ticks of a logarithmic axis, at least three: at 1, 2 and 5 where few powers of 10 are in it.

    Args:
        axis: whose limits are set.
    """
    low, high = sorted(axis.get_view_interval())
    steps = [1, 2, 5] if math.log10(high / low) < 2 else [1, 3] if high < 1e3 * low else [1]
    axis.set_major_locator(LogLocator(subs=steps, numticks=15))
    axis.set_major_formatter(lambda value, place: number(value))
    axis.set_minor_locator(NullLocator())


def percent_bars(axes, names: Sequence[str], theme: Theme) -> None:
    """The axes of horizontal bars of accuracies in per cent, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("images classified right (%)")
    # Room on the right for the number beside a bar of 100 %.
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.grid(axis="x", color=theme.rule, linewidth=0.5)


def whiskers(found: Proportion) -> list[list[float]]:
    """The interval of an accuracy as matplotlib's error bars take it, in per cent."""
    # The ends of an interval around 0 or 100 % miss them by a rounding.
    low, high = found.percent_interval
    return [[max(0.0, found.percent - low)], [max(0.0, high - found.percent)]]


def legend(figure, handles, num_columns: int = 2, place: str = "upper", **options) -> None:
    """A legend outside of the panels, without a frame."""
    where = f"outside {place} center"
    figure.legend(handles=handles, loc=where, ncols=num_columns, frameon=False, **options)


@contextlib.contextmanager
def drawn(theme: Theme, height: float, layout: Literal["constrained"] | None = "constrained"):
    """A figure in the house style, laid out once, when it is left.

    Args:
        theme: neutral colours, and the width.
        height: in inches.
        layout: matplotlib's layout engine; None to place the panels by hand.
    """
    with house_style(theme):
        figure = Figure(figsize=(theme.width, height), layout=layout)
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@contextlib.contextmanager
def house_style(theme: Theme):
    """Matplotlib's own defaults, whatever the user's are, and our few departures from them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": FONT_SIZE,
                "text.color": theme.ink,
                "axes.edgecolor": theme.rule,
                "axes.labelcolor": theme.ink,
                "axes.labelsize": FONT_SIZE,
                "axes.facecolor": theme.paper,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "figure.facecolor": theme.paper,
                "grid.color": theme.rule,
                "legend.fontsize": FONT_SIZE,
                # Of the parts of an SVG that are pictures.
                "savefig.dpi": 200,
                "xtick.color": theme.rule,
                "ytick.color": theme.rule,
                "xtick.labelcolor": theme.ink,
                "ytick.labelcolor": theme.ink,
                "xtick.labelsize": FONT_SIZE,
                "ytick.labelsize": FONT_SIZE,
                # Without it the names inside an SVG are drawn at random.
                "svg.hashsalt": "logit-reg",
            }
        )
        yield
