"""The chart of a whole table: a metric of every row against what an image costs, a line for each sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.files import write

from ..metrics import METRICS
from .charts import COLOURS, LEGEND_LINE, PT, SHAPES, inline_svg, style_axes, styled_figure
from .figures import Figure
from .tables import COSTS

CHART_FILE = "chart.png"            # beside table.md
WIDTH, HEIGHT = 720, 400            # px, without the legend
LONGEST_COLUMN = 6                  # samplers in a column of the legend
MORE_COLOURS = ("#5b3a9e", "#7f4f24", "#00838f", "#ad1457", "#4f6d00")      # of further samplers
LOGARITHMIC = 3                     # axes are so where the largest number is so many times the smallest
PNG_SCALE = 2                       # px of the file for each px of the page


@dataclass(frozen=True)
class CostPoint:
    """A number of a row. x: its cost. interval: of y, None where it is not known. published: it was not measured."""

    x: float
    y: float
    interval: Sequence[float] | None
    published: bool


@dataclass(frozen=True)
class CostLine:
    """The rows of one sampler with the same guidance, by their cost."""

    sampler: str
    guidance: str
    points: tuple[CostPoint, ...]


def cost_lines(results: Mapping[str, Any]) -> list[CostLine]:
    """Returns the lines of the chart that results ask for; none where they ask for none, or hold no such number.

    Rows of sections with another number of images than the first section are left out, as their numbers do not compare.
    """
    lines: dict[tuple[str, str], list[CostPoint]] = {}
    for name, point in _points(results):
        row = results["rows"][name]
        lines.setdefault((row["sampler"], row["guidance"]), []).append(point)
    return [CostLine(*key, tuple(sorted(points, key=lambda point: point.x))) for key, points in lines.items()]


def _points(results: Mapping[str, Any]) -> Iterator[tuple[str, CostPoint]]:
    """Yields the point of every row that has one, with the row's name, once."""
    chart, seen = results.get("chart"), set()
    if not chart:
        return
    shown = chart.get("sections") or [section["title"] for section in results["sections"]]
    for section in results["sections"]:
        for row in section["rows"] if section["title"] in shown else ():
            number = row["metrics"].get(chart["y"])
            if section["images"] != results["sections"][0]["images"] or number is None or row["row"] in seen:
                continue
            seen.add(row["row"])
            published = number["value"] is None
            value = number["published"] if published else number["value"]
            yield row["row"], CostPoint(results["rows"][row["row"]][chart["x"]], value, number["interval95"], published)


def cost_figure(results: Mapping[str, Any]) -> Figure | None:
    """Returns the chart with its caption; None where there is none."""
    lines = cost_lines(results)
    if not lines:
        return None
    description = _description(results, lines)
    with styled_figure(WIDTH, HEIGHT + _legend_height(lines), description) as figure:
        _draw(figure, lines, results)
        return Figure(chart_caption(results), inline_svg(figure, description))


def write_cost_chart(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the chart as a PNG file, where there is one. Raises UserError where it cannot be written."""
    if not (lines := cost_lines(results)):
        return
    with styled_figure(WIDTH, HEIGHT + _legend_height(lines), chart_title(results)) as figure:
        _draw(figure, lines, results)
        write(path, lambda file: figure.savefig(file, format="png", dpi=PNG_SCALE * PT, facecolor="#ffffff",
                                                metadata={"Software": None}))


def chart_title(results: Mapping[str, Any]) -> str:
    """Returns what the chart shows, like "FID against network evaluations per image"."""
    return f"{_metric_label(results)} against {COSTS[results['chart']['x']]}"


def _metric_label(results: Mapping[str, Any]) -> str:
    return METRICS[results["chart"]["y"]].by(results.get("features_of", "")).label


def chart_caption(results: Mapping[str, Any]) -> str:
    """Returns what the chart shows, and how to read it; "" where there is none."""
    points = [point for line in cost_lines(results) for point in line.points]
    if not points:
        return ""
    caption = f"{chart_title(results)}, {results['sections'][0]['images']:,} images of each row"
    caption += "; bars: 95 % intervals" * any(point.interval for point in points)
    return caption + "; hollow: published" * any(point.published for point in points)


def _description(results: Mapping[str, Any], lines: Sequence[CostLine]) -> str:
    """Returns what those read who do not see the chart."""
    said = [f"{line.sampler}, {line.guidance}: " + ", ".join(f"{point.y:.2f} at {point.x:g}" for point in line.points)
            for line in lines]
    return f"{chart_title(results)}. {'; '.join(said)}"


def _entries(lines: Sequence[CostLine]) -> tuple[list[str], list[str]]:
    """Returns the samplers and the guidance of lines, each once; their places pick colours and shapes."""
    return list(dict.fromkeys(line.sampler for line in lines)), list(dict.fromkeys(line.guidance for line in lines))


def _legend_height(lines: Sequence[CostLine]) -> int:
    samplers, guidance = _entries(lines)
    return LEGEND_LINE * (max(math.ceil(len(samplers) / _columns(samplers)), len(guidance)) + 1)


def _columns(samplers: Sequence[str]) -> int:
    """Returns the columns of the legend of samplers."""
    return 1 + (len(samplers) > LONGEST_COLUMN)


def _draw(figure: Any, lines: Sequence[CostLine], results: Mapping[str, Any]) -> None:
    """Draws the lines with their legends: colours are samplers, shapes are guidance."""
    axes = figure.add_subplot()
    samplers, guidance = _entries(lines)
    for line in lines:
        colour = _colour(samplers.index(line.sampler) if len(samplers) > 1 else guidance.index(line.guidance))
        shape = SHAPES[guidance.index(line.guidance) % len(SHAPES)]
        axes.plot([point.x for point in line.points], [point.y for point in line.points],
                  linestyle="-" if line.guidance == guidance[0] else "--", color=colour, alpha=0.6, linewidth=1)
        for point in line.points:
            if point.interval:
                axes.plot([point.x] * 2, point.interval, color=colour, alpha=0.4, linewidth=1)
            axes.plot([point.x], [point.y], shape, color=colour, markersize=7, markeredgewidth=1.5, zorder=3,
                      markerfacecolor="#ffffff" if point.published else colour)
    points = [point for line in lines for point in line.points]
    if _wide([point.x for point in points]):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    if _wide([point.y for point in points]):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    style_axes(axes, COSTS[results["chart"]["x"]], _metric_label(results))
    _legends(figure, samplers, guidance)


def _colour(place: int) -> str:
    """Returns the colour of the sampler at that place of the legend."""
    return (*COLOURS, *MORE_COLOURS)[place % (len(COLOURS) + len(MORE_COLOURS))]


def _wide(values: Sequence[float]) -> bool:
    """Whether an axis of these numbers is logarithmic."""
    return min(values) > 0 and max(values) >= LOGARITHMIC * min(values)


def _plain_numbers(axis: Any) -> None:
    """Writes plain numbers beside a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _legends(figure: Any, samplers: Sequence[str], guidance: Sequence[str]) -> None:
    """Adds the legends: colours are samplers, and guidance where there is one sampler alone."""
    from matplotlib.lines import Line2D

    single = len(samplers) == 1
    colours = [Line2D([], [], color=_colour(place), linewidth=0 if single else 3) for place in range(len(samplers))]
    shapes = [Line2D([], [], color=_colour(place) if single else "#444444", marker=SHAPES[place % len(SHAPES)],
                     linestyle="--" if place else "-")
              for place in range(len(guidance))]
    for place, handles, labels, columns in (("left", colours, samplers, _columns(samplers)),
                                            ("right", shapes, guidance, 1)):
        figure.legend(handles, labels, loc=f"outside lower {place}", ncols=columns, frameon=False, borderpad=0,
                      labelspacing=0.5)
