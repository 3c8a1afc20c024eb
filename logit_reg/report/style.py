"""The look that all figures share: fonts, colours, light and dark, and how they become SVG."""

import contextlib
import dataclasses
import io
import math
import textwrap

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator, NullLocator

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
    """A number as text, with a minus sign and not a hyphen."""
    return f"{value:g}".replace("-", "−")


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


def settled(figure):
    """Lay the figure out once, while the house style is in force."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


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
