"""The parts of an HTML page that needs no other file: style sheet, figures, folded details."""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from logit_reg.report.style import DARK, LIGHT, narrow, to_svg

_STYLE = Path(__file__).with_name("page.css").read_text().strip()
_DARK = "(prefers-color-scheme: dark)"
# Below it the whole figure would be drawn with letters too small to read.
_NARROW = "(max-width: 32rem)"


def document(title: str, *parts: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: in the window's title bar, plain text.
        parts: HTML; empty ones are left out.
        style: rules to add to the common style sheet.

    Returns:
        HTML.
    """
    body = "\n".join(filter(None, parts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def heading(title: str, lead: str) -> str:
    """The page's title and, below it, what the page is; both plain text."""
    return f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>'


def section(heading: str, content: str) -> str:
    """A section: a heading in plain text over HTML."""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>"


def figure(draw: Callable[..., Figure], alternative: str, caption: str) -> str:
    """A figure for light and for dark screens, wide and narrow ones.

    Args:
        draw: makes the figure for a `theme`.
        alternative: what it shows, for those who do not see it.
        caption: plain text.

    Returns:
        HTML with all of the images in it.
    """
    # The first source that fits counts.
    sources = "".join(
        f'<source media="screen{condition}" srcset="{_data_uri(draw(theme=theme))}">\n'
        for condition, theme in (
            (f" and {_DARK} and {_NARROW}", narrow(DARK)),
            (f" and {_NARROW}", narrow(LIGHT)),
            (f" and {_DARK}", DARK),
        )
    )
    light = _data_uri(draw(theme=LIGHT))
    return (
        f'<figure>\n<picture>\n{sources}<img alt="{html.escape(alternative)}" src="{light}">\n'
        "</picture>\n"
        f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
    )


def details(summary: str, content: str) -> str:
    """HTML folded under a line of plain text."""
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def json_block(value) -> str:
    """A value as indented JSON."""
    return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def _data_uri(drawn):
    return f"data:image/svg+xml;base64,{base64.b64encode(to_svg(drawn)).decode()}"
