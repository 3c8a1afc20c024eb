"""The parts of an HTML page that needs no other file: style sheet, figures, folded details."""

import base64
import html
import json
from collections.abc import Callable

from matplotlib.figure import Figure

from logit_reg.figure_style import DARK, LIGHT, to_svg

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


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: in the window's title bar, plain text.
        body: HTML.
        style: rules to add to the common style sheet.

    Returns:
        HTML.
    """
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
    """A figure for light and for dark screens.

    Args:
        draw: makes the figure for a `theme`.
        alternative: what it shows, for those who do not see it.
        caption: plain text.

    Returns:
        HTML with both images in it.
    """
    light, dark = (_data_uri(draw(theme=theme)) for theme in (LIGHT, DARK))
    return (
        '<figure>\n<picture>\n<source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{dark}">\n<img alt="{html.escape(alternative)}" src="{light}">\n</picture>\n'
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
