"""The chart of a study: how far each row is from the row that its section compares with, a panel for each section.

A section that names a numeric option is drawn against it; the rows of another one stand side by side.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_diffusion.options import comma_separated

from ..metrics import METRICS, Metric
from .charts import COLOURS, LEGEND_LINE, Drawing, style_axes
from .titles import symbol

WIDTH, PANEL_HEIGHT, COLUMNS = 720, 260, 3      # px
LABEL_LETTERS = 24
BASE_COLOUR = "#444444"


@dataclass(frozen=True)
class Mark:
    """A row in a panel.

    label: what sets it apart. x: the value of the section's option as titles say it, None where it has none.
    difference, interval: from the row that the section compares with, paired; 0 and None for that one.
    """

    label: str
    x: float | None
    difference: float
    interval: Sequence[float] | None

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return self.label if self.x is None else f"{self.x:g}"


@dataclass(frozen=True)
class Panel:
    """A section of which a metric is drawn.

    option: what it is drawn against, as titles call it, "" where the rows stand side by side.
    """

    title: str
    metric: Metric
    base: str
    option: str
    marks: tuple[Mark, ...]


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Returns the panels of the chart that results ask for: sections with rows that are compared with another one.

    A section that compares with another row than the first panel's says so in its title.
    """
    named = results["chart"].get("sections")
    found: list[Panel] = []
    for word in comma_separated(results["chart"]["y"]):
        for section in results["sections"]:
            marks = tuple(_marks(section, word, results)) if not named or section["title"] in named else ()
            if sum(mark.interval is not None for mark in marks):
                metric = METRICS[word].by(results.get("features_of", ""))
                base = results["rows"][section["against_row"]]["title"]
                other = f", against {base}" if found and base != found[0].base else ""
                option, _ = symbol(section["against"])
                found.append(Panel(section["title"] + other, metric, base, option, marks))
    return found


def _marks(section: Mapping[str, Any], word: str, results: Mapping[str, Any]) -> Iterator[Mark]:
    """Yields the rows of a section that have the metric, without its base where only options tell rows apart."""
    labels = _labels([results["rows"][row["row"]]["title"] for row in section["rows"]
                      if row["row"] != section["against_row"]])
    _, zero = symbol(section["against"])
    for row in section["rows"]:
        number, is_base = row["metrics"].get(word), row["row"] == section["against_row"]
        if number is None or (section["against"] and row["against"] is None) or (is_base and not section["against"]):
            continue
        versus = number["versus"] or {}
        if is_base or versus:
            title = results["rows"][row["row"]]["title"]
            x = None if row["against"] is None else row["against"] - zero
            yield Mark(labels.get(title, title), x, versus.get("difference", 0.0),
                       versus.get("interval95"))


def _labels(titles: Sequence[str]) -> dict[str, str]:
    """Returns the titles without the parts that all of them have, like "mask random" for "SAG s = 0.5, mask random"."""
    parts = {title: title.split(", ") for title in titles}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    return {title: ", ".join(part for part in words if part not in shared) or title for title, words in parts.items()}


def panel_drawing(results: Mapping[str, Any]) -> Drawing | None:
    """Returns the chart; None where no section has such a number."""
    found = panels(results)
    if not found:
        return None
    metrics = " and ".join(dict.fromkeys(panel.metric.label for panel in found))
    title = f"{metrics}: differences from {' and '.join(dict.fromkeys(panel.base for panel in found))}"
    said = [f"{panel.title}: {', '.join(f'{mark.difference:+.2f} at {mark.place}' for mark in panel.marks)}"
            for panel in found]
    rows = math.ceil(len(found) / COLUMNS)
    return Drawing(title, f"{title}, on the same image numbers; bars: 95 % intervals of the difference",
                   f"{title}. {'; '.join(said)}", WIDTH, PANEL_HEIGHT * rows + LEGEND_LINE,
                   lambda figure: _draw(figure, found, rows))


def _draw(figure: Any, found: Sequence[Panel], rows: int) -> None:
    """Draws the panels; those of one metric have the same vertical axis."""
    columns = min(COLUMNS, len(found))
    first: dict[str, Any] = {}
    for place, panel in enumerate(found, 1):
        axes = figure.add_subplot(rows, columns, place, sharey=first.get(panel.metric.word))
        first.setdefault(panel.metric.word, axes)
        _draw_panel(axes, panel)
        style_axes(axes, panel.option, "\n".join(textwrap.wrap(panel.title, 28)))
        if (place - 1) % columns == 0:
            axes.set_ylabel("\n".join(textwrap.wrap(f"{panel.metric.label}, difference", 28)), fontsize=10)


def _draw_panel(axes: Any, panel: Panel) -> None:
    """Draws the marks of a panel: joined along its option, or side by side."""
    numeric = bool(panel.option)
    places = [float(mark.x or 0) if numeric else float(place) for place, mark in enumerate(panel.marks)]
    axes.axhline(0, color=BASE_COLOUR, linewidth=1, linestyle="--")
    if numeric:
        line = sorted(zip(places, panel.marks, strict=True), key=lambda pair: pair[0])
        axes.plot([x for x, _ in line], [mark.difference for _, mark in line], color=COLOURS[0], alpha=0.5, linewidth=1)
    else:
        axes.set_xticks(places, ["\n".join(textwrap.wrap(mark.label, LABEL_LETTERS)) for mark in panel.marks],
                        rotation=90, fontsize=9)
        axes.set_xlim(-0.6, len(places) - 0.4)
    for x, mark in zip(places, panel.marks, strict=True):
        if mark.interval:
            axes.plot([x] * 2, mark.interval, color=COLOURS[0], linewidth=1.5)
        axes.plot([x], [mark.difference], "o", color=COLOURS[0], markersize=6, zorder=3)
