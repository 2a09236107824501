"""The report of a table as Markdown: of what its numbers are, a table for each section with its reasons, and timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sections import SectionRow, ShownSection, shown_sections
from .table_chart import chart_drawing
from .tables import CHART_FILE, COSTS, TIMED
from .verdicts import NOT_RUN
from .wording import DOES_NOT_APPLY, facts, reading, row_titles, timed_where, written_count


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the report of results as table.json has them."""
    sections = list(shown_sections(results))
    words = reading(any(shown.published for shown in sections),
                    [verdict for shown in sections for verdict in shown.verdicts])
    lines = [f"# {results['title']}", "", *(f"- {term}: {text}" for term, text in facts(results)), "",
             f"    {results['command']}", "", "How to read the tables:", "",
             *(f"- *{word}*: {meaning}" for word, meaning in words), ""]
    if drawing := chart_drawing(results):
        lines += [f"![{drawing.title}]({CHART_FILE})", "", f"{drawing.caption}.", ""]
    for shown in sections:
        lines += [f"## {shown.title}", "", shown.sentence, ""]
        lines += _published_lines(shown) if shown.published else _compared_lines(shown)
        lines += ["", *(f"- {title}: {note}" for title, note in shown.notes), *[""] * bool(shown.notes)]
    return "\n".join([*lines, "## Timing", "", *_timing_lines(results)]).rstrip() + "\n"


def _published_lines(shown: ShownSection) -> list[str]:
    """Returns a line for each number, beside the published one."""
    lines = []
    for row in shown.rows:
        title = row.title
        for cell in row.cells.values():
            lines.append([title, cell.metric, cell.published or DOES_NOT_APPLY, str(cell),
                          cell.difference or DOES_NOT_APPLY, cell.verdict,
                          *([str(cell.against or "")] if shown.compared else [])])
            title = ""
        if not row.cells:
            lines.append([title, "", "", NOT_RUN, "", NOT_RUN, *[""] * shown.compared])
    last = [f"against {shown.base}"] if shown.compared else []
    return _table_lines(["row", "metric", "published", "measured", "difference", "verdict", *last], lines)


def _compared_lines(shown: ShownSection) -> list[str]:
    """Returns a line for each row, and one for the own values of each reference."""
    cost = [shown.cost_head] if shown.cost_head else []
    lines = [[row.title, *[row.cost for _ in cost], *(_compared_cell(row, word) for word in shown.words)]
             for row in shown.rows]
    for title, own in shown.references:
        lines.append([title, *[DOES_NOT_APPLY for _ in cost],
                      *(str(own.get(word, DOES_NOT_APPLY)) for word in shown.words)])
    return _table_lines(["row", *cost, *(shown.metric(word).label for word in shown.words)], lines)


def _compared_cell(row: SectionRow, word: str) -> str:
    cell = row.cells.get(word)
    if cell is None:
        return DOES_NOT_APPLY if row.ran else NOT_RUN
    return str(cell) + (f", {cell.against.verdict}" if cell.against else "")


def _timing_lines(results: Mapping[str, Any]) -> list[str]:
    (sentence, where), titles = timed_where(results), row_titles(results)
    lines = [[titles[name], *([where.get(name, DOES_NOT_APPLY)] if where else []), f"{row['images']:,}",
              *(NOT_RUN if row[word] is None else written_count(row[word])
                for word in (*TIMED, "images_per_second"))] for name, row in results["rows"].items()]
    head = ["row", *["device"] * bool(where), "images", *(COSTS[word] for word in TIMED), "images/s of a rank"]
    return [sentence, "", *_table_lines(head, lines, numbers=2 + len(TIMED))]


def _table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> list[str]:
    """Returns the lines of a Markdown table, the last `numbers` columns of which are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (head, rule, *rows)]
