"""The charts of a section of a report: precision against recall, and its metrics against the section's option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from ..metrics import METRICS
from .charts import Point, chart
from .sections import ShownSection
from .titles import symbol
from .verdicts import NOT_RUN


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    caption: str
    svg: Markup


def figures(section: ShownSection) -> list[Figure]:
    """Returns the charts of a section."""
    return [*_precision_recall(section), *(figure for word in section.words for figure in _against(section, word))]


def _precision_recall(section: ShownSection) -> Iterator[Figure]:
    """Yields the chart of precision against recall, where there are two different points for it."""
    points, said = [], []
    for style, row in enumerate(section.data["rows"]):
        recall, precision = (row["metrics"].get(word) for word in ("recall", "precision"))
        if not recall or not precision:
            continue
        title = section.row_title(row)
        measured = None not in (recall["value"], precision["value"])
        if None not in (recall["published"], precision["published"]):
            points.append(Point(recall["published"], precision["published"], style, hollow=True,
                                label="" if measured else f"{title}, {NOT_RUN}"))
        if measured:
            points.append(Point(recall["value"], precision["value"], style, recall["interval95"],
                                precision["interval95"], label=title))
            said.append(f"{title} {precision['value']:.3f} against {recall['value']:.3f}")
    if len({(point.x, point.y) for point in points}) >= 2:
        hollow = "; hollow: published" if section.published else ""
        yield Figure(f"Precision against recall; bars: 95 % intervals{hollow}", chart(
            points, "recall", "precision", f"Precision against recall: {', '.join(said) or 'published alone'}",
            x_range=METRICS["recall"].range, y_range=METRICS["precision"].range))


def _against(section: ShownSection, word: str) -> Iterator[Figure]:
    """Yields the chart of a metric against the section's option, where that has two values."""
    points, (option, zero) = [], symbol(section.data["against"])
    for row in section.data["rows"]:
        number, value = row["metrics"].get(word), row["against"]
        if number is None or value is None:
            continue
        value -= zero
        if number["published"] is not None:
            points.append(Point(value, number["published"], hollow=True))
        if number["value"] is not None:
            points.append(Point(value, number["value"], y_interval=number["interval95"]))
    if len({point.x for point in points}) >= 2:
        metric = section.metric(word)
        said = ", ".join(f"{point.y:.{section.places(word)}f} at {point.x:g}" for point in points if not point.hollow)
        reading = f" ({metric.direction.reading})" if metric.direction.reading else ""
        yield Figure(f"{metric.label} against {option}", chart(
            points, option, metric.label + reading, f"{metric.label} against {option}: {said}", joined=True,
            y_range=metric.range))
