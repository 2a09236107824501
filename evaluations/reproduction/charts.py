"""Charts of a report: matplotlib's drawings as SVG within the page, with letters of 12 px on a phone too.

The same points give the same bytes, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..plots import add_legend, new_figure

WIDTH, HEIGHT = 340, 270            # px, without the legend
LEGEND_LINE, LEGEND_LETTERS = 20, 44

Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)

# Okabe and Ito's colours, darkened where they would be faint on white; every one goes with a shape.
COLOURS = ("#0072b2", "#c44e00", "#007a5a", "#a8447f", "#6b5900", "#2b8cbe", "#444444", "#b0202a")
SHAPES = ("o", "s", "^", "D", "v", "P", "h")

_INK, _SOFT_INK, _GRID = "#1c2127", "#3a434c", "#e3e7ea"
PT = 72                             # units of the drawing in an inch: a point of matplotlib is a px of the page
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12, "font.sans-serif": ["DejaVu Sans", "Arial"],
    "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "axes.labelweight": "bold", "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.titlecolor": _INK, "xtick.color": _GRID, "ytick.color": _GRID,
    "xtick.labelcolor": _SOFT_INK, "ytick.labelcolor": _SOFT_INK, "grid.color": _GRID, "text.color": _SOFT_INK,
    "axes.formatter.useoffset": False, "axes.xmargin": 0.07, "axes.ymargin": 0.07,
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08,
}


@dataclass(frozen=True)
class Point:
    """A number against another one, with their intervals.

    style: picks colour and shape. hollow: it was published rather than measured. label: its line in the legend, "" for
    none.
    """

    x: float
    y: float
    style: int = 0
    x_interval: Sequence[float] | None = None
    y_interval: Sequence[float] | None = None
    hollow: bool = False
    label: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart that is not drawn yet. draw: draws it on an empty figure of so many px. described: to those who see none.

    title: what it shows. caption: the same, and how to read it.
    """

    title: str
    caption: str
    described: str
    width: float
    height: float
    draw: Callable[[Any], None]


def chart(points: Sequence[Point], x_label: str, y_label: str, description: str, joined: bool = False,
          x_range: Range = ANY, y_range: Range = ANY) -> Markup:
    """Returns the points on axes that just hold them, as an SVG element.

    description: what those read who do not see it. joined: a line goes through the measured points, from left to right.
    x_range, y_range: the least and the largest number that there can be.
    """
    labels = ["\n".join(textwrap.wrap(point.label, LEGEND_LETTERS)) for point in points if point.label]
    legend = LEGEND_LINE * sum(1 + label.count("\n") for label in labels) + 4 * bool(labels)
    with styled_figure(WIDTH, HEIGHT + legend, description) as figure:
        axes = figure.add_subplot()
        _plot_points(axes, points, joined)
        end_axis(axes, "x", x_range)
        end_axis(axes, "y", y_range)
        axes.locator_params(axis="x", nbins=5)
        axes.locator_params(axis="y", nbins=6)
        style_axes(axes, x_label, y_label)
        if labels:
            handles = [_marker(axes, point) for point in points if point.label]
            figure.legend(handles, labels, loc="outside lower left", frameon=False, handlelength=1, borderpad=0,
                          labelspacing=0.5)
        return inline_svg(figure, description)


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, description: str,
               ) -> Markup:
    """Returns lines through points from left to right, by their names, as an SVG element.

    The vertical axis is logarithmic where all values are above 0 and the largest is more than ten times the smallest.
    """
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    with styled_figure(WIDTH, HEIGHT + LEGEND_LINE * len(lines), description) as figure:
        axes = figure.add_subplot()
        drawn = [axes.plot(*zip(*points, strict=True), "-" if len(points) > 1 else "o", linewidth=1.5,
                           color=COLOURS[place % len(COLOURS)])[0] for place, points in enumerate(lines.values())]
        values = [y for points in lines.values() for _, y in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.locator_params(axis="x", nbins=5)
        style_axes(axes, x_label, y_label)
        add_legend(figure, drawn, list(lines), loc="outside lower left", frameon=False, borderpad=0)
        return inline_svg(figure, description)


@contextmanager
def styled_figure(width: float, height: float, description: str) -> Iterator[Any]:
    """Gives an empty figure in the style of the charts; it must be saved inside the context.

    width, height: px. description: the same one gives the same bytes.
    """
    import matplotlib

    with (matplotlib.rc_context({**_STYLE, "svg.hashsalt": description}),
          new_figure(width / PT, height / PT, dpi=PT) as figure):
        yield figure


def inline_svg(figure: Any, description: str) -> Markup:
    """Returns a figure as an SVG element. description: what those read who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(file.getvalue(), description)


def _plot_points(axes: Any, points: Sequence[Point], joined: bool) -> None:
    """Plots the points with their intervals, and the line through them."""
    if joined:
        measured = sorted((point.x, point.y) for point in points if not point.hollow)
        axes.plot([x for x, _ in measured], [y for _, y in measured], color=COLOURS[0], alpha=0.5, linewidth=1)
    for point in points:
        colour = COLOURS[point.style % len(COLOURS)]
        if point.x_interval:
            axes.plot(point.x_interval, [point.y] * 2, color=colour)
        if point.y_interval:
            axes.plot([point.x] * 2, point.y_interval, color=colour)
    for point in points:
        _marker(axes, point)


def _marker(axes: Any, point: Point) -> Any:
    """Plots the mark of a point."""
    colour = COLOURS[point.style % len(COLOURS)]
    line, = axes.plot([point.x], [point.y], SHAPES[point.style % len(SHAPES)], color=colour, markersize=9,
                      markerfacecolor="#ffffff" if point.hollow else colour,
                      markeredgewidth=1.5, zorder=3, clip_on=False)
    return line


def end_axis(axes: Any, name: str, possible: Range) -> None:
    """Ends the axis of that name where no number can be: its margin would show shares below 0, say."""
    low, high = getattr(axes, f"get_{name}lim")()
    getattr(axes, f"set_{name}lim")(max(low, possible[0]), min(high, possible[1]))


def style_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Gives the axes a grid and their labels."""
    axes.tick_params(length=0)
    axes.grid()
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left")


def _inline(svg: str, description: str) -> Markup:
    """Returns a drawing of matplotlib as an element of a page, without what only a file of its own needs.

    Ids that nothing refers to would occur once in every chart, and its style sheet would hold for the whole page.
    """
    found = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert found is not None, "matplotlib wrote no SVG"
    size, drawing = found.groups()
    drawing = re.sub(r"\s*<style[^>]*>.*?</style>|\s*<metadata>.*?</metadata>|\s*<!--.*?-->", "", drawing,
                     flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", drawing)
    head = Markup('<svg class="chart" viewBox="{}" role="img" aria-label="{}">').format(size, description)
    return head + Markup(drawing.strip()) + Markup("</svg>")
