"""The chart of a whole table: metrics of every row against what an image costs, a line for each sampler.

Where sections say how many images their networks had seen in training, it may also be drawn against these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_diffusion.options import comma_separated

from ..metrics import METRICS, Metric
from .charts import COLOURS, LEGEND_LINE, SHAPES, Drawing, end_axis, style_axes
from .tables import COSTS, FURTHER_AXES, IMAGES_SEEN

WIDTH, HEIGHT = 720, 400            # px, without the legend
LONGEST_COLUMN = 6                  # samplers in a column of the legend
MORE_COLOURS = ("#5b3a9e", "#7f4f24", "#00838f", "#ad1457", "#4f6d00")      # of further samplers
SIGMA_FLAGS = ("_sigma_min", "_sigma_max")      # how the flags of windows of noise levels end
LOGARITHMIC = 3                     # axes are so where the largest number is so many times the smallest


@dataclass(frozen=True)
class CostPoint:
    """A number of a row. x: its cost. interval: of y, None where it is not known. published: it was not measured."""

    x: float
    y: float
    interval: Sequence[float] | None
    published: bool


@dataclass(frozen=True)
class CostLine:
    """The rows of one sampler with the same guidance in the same windows of noise levels, by their cost."""

    sampler: str
    guidance: str
    points: tuple[CostPoint, ...]


def cost_lines(results: Mapping[str, Any], word: str) -> list[CostLine]:
    """Returns the lines of a metric in the chart that results ask for; none where they hold no such number.

    Rows of sections with another number of images than the first one that is shown are left out, as their numbers do
    not compare.
    """
    lines: dict[tuple[str, str, tuple[tuple[str, Any], ...]], list[CostPoint]] = {}
    for name, point in _points(results, word):
        row = results["rows"][name]
        windows = tuple(flag for flag in row.get("flags", {}).items() if flag[0].endswith(SIGMA_FLAGS))
        lines.setdefault((row["sampler"], row["guidance"], windows), []).append(point)
    return [CostLine(sampler, guidance, tuple(sorted(points, key=lambda point: point.x)))
            for (sampler, guidance, _), points in lines.items()]


def _points(results: Mapping[str, Any], word: str) -> Iterator[tuple[str, CostPoint]]:
    """Yields the point of every row that has one, with the row's name, once."""
    axis, seen, sections = results["chart"]["x"], set(), _shown(results)
    for section in sections:
        for row in section["rows"]:
            number = row["metrics"].get(word)
            if section["images"] != sections[0]["images"] or number is None or row["row"] in seen:
                continue
            seen.add(row["row"])
            published = number["value"] is None
            value = number["published"] if published else number["value"]
            x = section[IMAGES_SEEN] if axis == IMAGES_SEEN else results["rows"][row["row"]][axis]
            yield row["row"], CostPoint(x, value, number["interval95"], published)


def _shown(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the sections that the chart shows: those that it names, of which its axis tells something."""
    axis, named = results["chart"]["x"], results["chart"].get("sections")
    return [section for section in results["sections"]
            if (not named or section["title"] in named) and (axis != IMAGES_SEEN or axis in section)]


def cost_drawing(results: Mapping[str, Any]) -> Drawing | None:
    """Returns the chart that results ask for, a panel for each metric; None where they hold no such number."""
    axis = {**COSTS, **FURTHER_AXES}[results["chart"]["x"]]
    panels = {METRICS[word].by(results.get("features_of", "")): lines
              for word in comma_separated(results["chart"]["y"]) if (lines := cost_lines(results, word))}
    if not panels:
        return None
    every = [line for lines in panels.values() for line in lines]
    points = [point for line in every for point in line.points]
    title = f"{' and '.join(metric.label for metric in panels)} against {axis}"
    caption = f"{title}, {_shown(results)[0]['images']:,} images of each row"
    caption += "; bars: 95 % intervals" * any(point.interval for point in points)
    caption += "; hollow: published" * any(point.published for point in points)
    said = [f"{line.sampler}, {line.guidance}: " + ", ".join(f"{point.y:.2f} at {point.x:g}" for point in line.points)
            for line in every]
    return Drawing(title, caption, f"{title}. {'; '.join(said)}", WIDTH, HEIGHT + _legend_height(every),
                   lambda figure: _draw(figure, panels, axis))


def _entries(lines: Sequence[CostLine]) -> tuple[list[str], list[str]]:
    """Returns the samplers and the guidance of lines, each once; their places pick colours and shapes."""
    return list(dict.fromkeys(line.sampler for line in lines)), list(dict.fromkeys(line.guidance for line in lines))


def _legend_height(lines: Sequence[CostLine]) -> int:
    samplers, guidance = _entries(lines)
    return LEGEND_LINE * (max(math.ceil(len(samplers) / _columns(samplers)), len(guidance)) + 1)


def _columns(samplers: Sequence[str]) -> int:
    """Returns the columns of the legend of samplers."""
    return 1 + (len(samplers) > LONGEST_COLUMN)


def _draw(figure: Any, panels: Mapping[Metric, Sequence[CostLine]], axis: str) -> None:
    """Draws the lines of each metric, with their legends: colours are samplers, shapes are guidance."""
    samplers, guidance = _entries([line for lines in panels.values() for line in lines])
    for axes, (metric, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for line in lines:
            colour = _colour(samplers.index(line.sampler) if len(samplers) > 1 else guidance.index(line.guidance))
            _draw_line(axes, line, colour, guidance.index(line.guidance))
        points = [point for line in lines for point in line.points]
        if _wide([point.x for point in points]):
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis, (1, 2, 5) if len(panels) > 1 else (1, 1.5, 2, 3, 5, 7))
        elif len(panels) > 1:
            axes.locator_params(axis="x", nbins=4)
        if _wide([point.y for point in points]):
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        end_axis(axes, "y", metric.range)
        style_axes(axes, axis, metric.label)
    _legends(figure, samplers, guidance)


def _draw_line(axes: Any, line: CostLine, colour: str, place: int) -> None:
    """Draws a line with its points and their intervals. place: of its guidance in the legend."""
    axes.plot([point.x for point in line.points], [point.y for point in line.points], linestyle="--" if place else "-",
              color=colour, alpha=0.6, linewidth=1)
    for point in line.points:
        if point.interval:
            axes.plot([point.x] * 2, point.interval, color=colour, alpha=0.4, linewidth=1)
        axes.plot([point.x], [point.y], SHAPES[place % len(SHAPES)], color=colour, markersize=7, markeredgewidth=1.5,
                  zorder=3, clip_on=False, markerfacecolor="#ffffff" if point.published else colour)


def _colour(place: int) -> str:
    """Returns the colour of the sampler at that place of the legend."""
    return (*COLOURS, *MORE_COLOURS)[place % (len(COLOURS) + len(MORE_COLOURS))]


def _wide(values: Sequence[float]) -> bool:
    """Whether an axis of these numbers is logarithmic."""
    return min(values) > 0 and max(values) >= LOGARITHMIC * min(values)


def _plain_numbers(axis: Any, digits: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Writes plain numbers beside a logarithmic axis, at these digits of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.6g}"))
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
