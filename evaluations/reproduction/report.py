"""The report of a reproduced table as one HTML file, which holds its pictures and loads nothing.

What stands in it is prepared here and in `sections`, `figures` and `pictures`; how it looks is in templates/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.files import write_text

from ..pages.page import pages_of
from ..pages.pictures import shown_grid
from .figures import figures
from .pictures import Pictures, shown_overlay
from .sections import shown_sections
from .table_chart import chart_figure
from .tables import TIMED
from .verdicts import NOT_RUN
from .wording import DOES_NOT_APPLY, VERDICTS, facts, reading, row_titles, timed_where, written_count

_TIMED = (*TIMED, "images_per_second")


@dataclass(frozen=True)
class _Bar:
    """A number with the length of its bar."""

    text: str
    percent: str


@dataclass(frozen=True)
class _TimedRow:
    """What an image of a row costs, None where it is not known; device: "" where it is the same of all rows."""

    title: str
    bars: list[_Bar | None]
    device: str


@dataclass(frozen=True)
class _SampleFile:
    """The samples of a row, as text; "" where there are none."""

    name: str
    images: str
    heads: str
    seconds: str
    samples: str
    sha256: str


def write_report(path: str | Path, results: Mapping[str, Any], pictures: Pictures) -> None:
    """Writes the page, whole or not at all. Raises UserError where `path` cannot be written."""
    write_text(path, page(results, pictures))


def page(results: Mapping[str, Any], pictures: Pictures) -> str:
    """Returns the page. A grid stands in the section of its title, or in one of its own at the end."""
    sections = list(shown_sections(results))
    grids = {title: grid for title, rows in pictures.grids if (grid := shown_grid(rows)) is not None}
    known = [section.title for section in sections]
    others = {title: grid for title, grid in grids.items() if title not in known}
    published = any(section.published for section in sections)
    chart = chart_figure(results)
    words = reading(published, [verdict for section in sections for verdict in section.verdicts])
    pages = pages_of(__package__, ("report.css",), inline_styles=True)
    pages.environment.globals |= {"verdicts": VERDICTS, "not_run": NOT_RUN, "does_not_apply": DOES_NOT_APPLY}
    return pages.render(
        "report.html.jinja", results["title"],
        results=results, facts=facts(results), reading=words, counts=_verdict_counts(results) if published else {},
        titles=[*known, *others, *["Attention overlays"] * bool(pictures.overlays), "Timing"], chart=chart,
        sections=sections, figures=[figures(section) for section in sections], grids=grids, other_grids=others,
        overlays=[shown_overlay(*overlay) for overlay in pictures.overlays],
        timing=timed_where(results)[0], timed_rows=_timed_rows(results), files=_sample_files(results))


def _verdict_counts(results: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many rows have each verdict."""
    counts = Counter(row["verdict"] for section in results["sections"] for row in section["rows"])
    return {word: counts[word] for word in VERDICTS if counts[word]}


def _timed_rows(results: Mapping[str, Any]) -> list[_TimedRow]:
    """Returns what an image of each row costs."""
    rows, (_, where), titles = results["rows"], timed_where(results), row_titles(results)
    longest = {word: max([row[word] or 0 for row in rows.values()], default=0) for word in _TIMED}
    return [_TimedRow(titles[name], [_bar(row[word], longest[word]) for word in _TIMED],
                      where.get(name, DOES_NOT_APPLY) if where else "") for name, row in rows.items()]


def _bar(value: float | None, longest: float) -> _Bar | None:
    if value is None:
        return None
    return _Bar(written_count(value), f"{100 * value / longest if longest else 0:.1f}")


def _sample_files(results: Mapping[str, Any]) -> list[_SampleFile]:
    """Returns the files of all rows."""
    return [_SampleFile(name, f"{row['images']:,}", row["heads"],
                        "" if row["seconds"] is None else written_count(row["seconds"]), row["samples"] or "",
                        (row["sha256"] or "")[:16]) for name, row in results["rows"].items()]
