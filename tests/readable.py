"""What a reader needs: texts of a figure that do not overlap, HTML whose tags close."""

import html.parser
import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg


def axes_of(panel):
    """The two or three axes of a panel."""
    return [getattr(panel, name) for name in ("xaxis", "yaxis", "zaxis") if hasattr(panel, name)]


def visible_texts(figure):
    """The texts that are drawn, tick labels outside the limits left out."""
    FigureCanvasAgg(figure)
    figure.canvas.draw()
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title]
        if not axes.axison:
            continue
        for axis in axes_of(axes):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [axis.label, *(t.label1 for t in ticks if low <= t.get_loc() <= high)]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def assert_readable(figure):
    texts = visible_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    for (text, box), (other, other_box) in itertools.combinations(
        zip(texts, boxes, strict=True), 2
    ):
        assert not box.overlaps(other_box), f"{text.get_text()!r} over {other.get_text()!r}"
    for text, box in zip(texts, boxes, strict=True):
        inside = figure.bbox.padded(1)
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, f"{text.get_text()!r} is cut off"
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, f"{text.get_text()!r} is cut off"


class Checker(html.parser.HTMLParser):
    """Every tag is closed in order; collects what the page refers to."""

    VOID = frozenset({"meta", "img", "br", "source", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def check_html(path):
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    assert checker.open == []
    return checker


def labelled_axes(figure):
    """Whether every axis that shows numbers or names has a label, the colour bar's included."""
    for axes in figure.axes:
        for axis in axes_of(axes):
            if axis.label.get_text():
                continue
            assert not any(
                tick.label1.get_visible() and tick.label1.get_text()
                for tick in axis.get_major_ticks()
            ), f"an axis with ticks has no label: {axes.get_title()!r}"
    return bool(figure.axes)
