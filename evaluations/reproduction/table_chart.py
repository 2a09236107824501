"""The chart that a table asks for, in the page and as a file beside it; `cost_chart` and `panels` say how it looks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_diffusion.files import write

from .charts import PT, Drawing, inline_svg, styled_figure
from .cost_chart import cost_drawing
from .figures import Figure
from .panels import panel_drawing
from .tables import SECTIONS

PNG_SCALE = 2                       # px of the file for each px of the page


def chart_drawing(results: Mapping[str, Any]) -> Drawing | None:
    """Returns the chart that results ask for; None where they ask for none, or hold none of its numbers."""
    if not results.get("chart"):
        return None
    return (panel_drawing if results["chart"]["x"] == SECTIONS else cost_drawing)(results)


def chart_figure(results: Mapping[str, Any]) -> Figure | None:
    """Returns the chart for the page, with its caption; None where there is none."""
    drawing = chart_drawing(results)
    if drawing is None:
        return None
    with styled_figure(drawing.width, drawing.height, drawing.described) as figure:
        drawing.draw(figure)
        return Figure(drawing.caption, inline_svg(figure, drawing.described))


def write_chart(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the chart as a PNG file, where there is one. Raises UserError where it cannot be written."""
    drawing = chart_drawing(results)
    if drawing is None:
        return
    with styled_figure(drawing.width, drawing.height, drawing.title) as figure:
        drawing.draw(figure)
        write(path, lambda file: figure.savefig(file, format="png", dpi=PNG_SCALE * PT, facecolor="#ffffff",
                                                metadata={"Software": None}))
