"""The report of a reproduced table: Markdown, and one HTML file that holds its pictures and loads nothing.

Numbers that could not be had are written `not run here`. A metric that a row does not know is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.files import write

from .figures import STYLE, Point, chart, grid, key, overlay
from .results import DIFFERS, GOOD, NOT_COMPARABLE, NOT_RUN, REPRODUCED
from .tables import DECIMALS

NAMES = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "precision": "precision", "recall": "recall",
         "dfid": "dFID"}
DOES_NOT_APPLY = "-"
VERDICTS = {
    REPRODUCED: "the published number lies within the 95 % interval of the measured one, widened by the square root "
                  "of two, as both are of random samples, and by half a unit of its last digit",
    DIFFERS: "it lies outside",
    NOT_COMPARABLE: "measured under other circumstances, which are listed below the table",
    NOT_RUN: "there is no measured number",
}


@dataclass(frozen=True)
class Pictures:
    """grids: titles of sections with row title -> (n, H, W, 3) uint8, the images number 0 to n - 1 of each row.
    overlays: captions with RGB pictures (H, W, 3) uint8.
    """

    grids: Sequence[tuple[str, Mapping[str, np.ndarray]]] = field(default_factory=list)
    overlays: Sequence[tuple[str, np.ndarray]] = field(default_factory=list)


# What both reports say


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers are of, as terms and texts."""
    rows = results["rows"].values()
    counts = sorted({row["images"] for row in rows})
    network, reference = results["network"], results["reference"]
    run = sum(row["state"] == "measured" for row in rows)
    return [(term, text) for term, text in (
        ("source", results["source"]),
        ("note", results["note"]),
        ("rows", f"{len(rows)}, of which {run} were run here" if run < len(rows) else f"{run}, all of them run here"),
        ("settings", f"{results['settings']}, where a row says nothing else" if results["settings"] else ""),
        ("images", " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) + " a row; image "
                   "number i of every row is drawn from the same seed" if counts else ""),
        ("network", f"{network['name']}, sha256 {network['sha256'][:16]}" if network else NOT_RUN),
        ("reference", f"{reference['file']}, {reference['images']:,} images, sha256 {reference['sha256'][:16]}"
                      if reference else NOT_RUN),
        ("intervals", f"95 %, of {results['bootstrap']:,} resamplings of the images"),
        ("made by", f"version {results['version']} on {results['device']}, "
                    f"{results['ranks']} rank{'s' * (results['ranks'] != 1)}"),
    ) if text]


def _reading(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the tables are to be read: words and their meanings."""
    sections = list(_shown(results))
    words = [("interval", "from the lower to the upper 95 % bound, beside or below its number")]
    if any(shown.published for shown in sections):
        words += [("difference", "measured minus published"), *VERDICTS.items()]
    else:
        words.append((NOT_RUN, VERDICTS[NOT_RUN]))
    if any(shown.compared for shown in sections):
        words += [("better, worse", "than the first row, by the paired difference on the same image numbers"),
                  ("no difference", "the 95 % interval of the paired difference holds 0")]
    return words


@dataclass(frozen=True)
class _Shown:
    """A section with its rows. words: its metrics in order; places: their decimals."""

    section: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def words(self) -> list[str]:
        return [word for word in NAMES if any(word in row["metrics"] for row in self.section["rows"])]

    @property
    def metrics(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [item for row in self.section["rows"] for item in row["metrics"].items()]

    @property
    def published(self) -> bool:
        return any(number["published"] is not None for _, number in self.metrics)

    @property
    def compared(self) -> bool:
        return any(number["versus"] for _, number in self.metrics)

    @property
    def first(self) -> str:
        return self.title(self.section["rows"][0]) if self.section["rows"] else ""

    def title(self, row: Mapping[str, Any]) -> str:
        return self.rows[row["row"]]["title"]

    def ran(self, row: Mapping[str, Any]) -> bool:
        return self.rows[row["row"]]["state"] == "measured"

    def places(self, word: str) -> int:
        """Decimals that show two digits of the narrowest interval, and all of what was published."""
        numbers = [number for other, number in self.metrics if other == word]
        return max([_places(number["interval95"], number["value"]) for number in numbers]
                   + [DECIMALS for number in numbers if number["published"] is not None])

    @property
    def sentence(self) -> str:
        """What the table is of."""
        text = f"{self.section['images']:,} images of each row" + f", compared with {self.first}" * self.compared
        sources = dict.fromkeys(filter(None, (self.rows[row["row"]].get("published_source")
                                              for row in self.section["rows"])))
        return f"{text}. " + (f"Published in: {'; '.join(sources)}." if self.published and sources else "")

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Titles of rows with their verdict and the reasons for it."""
        notes = []
        for row in self.section["rows"]:
            ran = self.ran(row)
            reasons = list(dict.fromkeys([*row["reasons"], *([] if ran else [self.rows[row["row"]]["why"]])]))
            if reasons := [reason for reason in reasons if reason]:
                verdict = row["verdict"] if ran else NOT_RUN
                notes.append((self.title(row), ": ".join(filter(None, (verdict, "; ".join(reasons))))))
        return notes


def _shown(results: Mapping[str, Any]) -> Iterator[_Shown]:
    return (_Shown(section, results["rows"]) for section in results["sections"])


def _places(interval: Sequence[float] | None, value: float | None) -> int:
    width = interval[1] - interval[0] if interval else 0.0
    if width > 0:
        return min(6, max(0, 1 - math.floor(math.log10(width))))
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0


def _number(value: float, places: int, sign: str = "") -> str:
    return f"{value:{sign}z.{places}f}"


def _interval(bounds: Sequence[float], places: int, sign: str = "") -> str:
    return " to ".join(_number(bound, places, sign) for bound in bounds)


def _count(value: float | None) -> str:
    """Like 40, 7.36, 12,400; NOT_RUN for None."""
    if value is None:
        return NOT_RUN
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.3g}"


# Markdown


def markdown(results: Mapping[str, Any]) -> str:
    """The table as text: of what, a table for each section with its reasons, timing."""
    lines = [f"# {results['title']}", "", *(f"- {term}: {text}" for term, text in _facts(results)), "",
             f"    {results['command']}", "", "How to read the tables:", "",
             *(f"- *{word}*: {meaning}" for word, meaning in _reading(results)), ""]
    for shown in _shown(results):
        lines += [f"## {shown.section['title']}", "", shown.sentence.strip(), ""]
        lines += _published_lines(shown) if shown.published else _compared_lines(shown)
        lines += ["", *(f"- {title}: {note}" for title, note in shown.notes), *[""] * bool(shown.notes)]
    lines += ["## Timing", "", *_lines(
        ["row", "images", "network evaluations per image", "backward passes per image", "images/s of a rank"],
        [[row["title"], f"{row['images']:,}", _count(row["evaluations"]), _count(row["gradients"]),
          _count(row["images_per_second"])] for row in results["rows"].values()], numbers=4)]
    return "\n".join(lines).rstrip() + "\n"


def _published_lines(shown: _Shown) -> list[str]:
    rows = []
    for row in shown.section["rows"]:
        title = shown.title(row)
        for word in (word for word in shown.words if word in row["metrics"]):
            number, places = row["metrics"][word], shown.places(word)
            published, difference = number["published"], number["difference"]
            rows.append([title, NAMES[word], DOES_NOT_APPLY if published is None else _number(published, DECIMALS),
                         _measured(number, places),
                         DOES_NOT_APPLY if difference is None else _number(difference, places, "+"), number["verdict"],
                         *([_versus(number)] if shown.compared else [])])
            title = ""
        if not row["metrics"]:
            rows.append([title, "", "", NOT_RUN, "", NOT_RUN, *[""] * shown.compared])
    last = [f"against {shown.first}"] if shown.compared else []
    return _lines(["row", "metric", "published", "measured", "difference", "verdict", *last], rows, 0)


def _compared_lines(shown: _Shown) -> list[str]:
    rows = []
    for row in shown.section["rows"]:
        cells = []
        for word in shown.words:
            number = row["metrics"].get(word)
            if number is None:
                cells.append(DOES_NOT_APPLY if shown.ran(row) else NOT_RUN)
                continue
            versus = number["versus"]
            cells.append(_measured(number, shown.places(word)) + (f", {versus['verdict']}" if versus else ""))
        rows.append([shown.title(row), *cells])
    return _lines(["row", *(NAMES[word] for word in shown.words)], rows, 0)


def _measured(number: Mapping[str, Any], places: int) -> str:
    if number["value"] is None:
        return NOT_RUN
    bounds = number["interval95"]
    return _number(number["value"], places) + (f" ({_interval(bounds, places)})" if bounds else "")


def _versus(number: Mapping[str, Any]) -> str:
    versus = number["versus"]
    if not versus:
        return ""
    places = _places(versus["interval95"], versus["difference"])
    return (f"{_number(versus['difference'], places, '+')} ({_interval(versus['interval95'], places, '+')}), "
            f"{versus['verdict']}")


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """A Markdown table, the last `numbers` columns of which are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (head, rule, *rows)]


# HTML


def write_report(path: str | Path, results: Mapping[str, Any], pictures: Pictures) -> None:
    """Writes the page, whole or not at all. Raises UserError where `path` cannot be written."""
    text = page(results, pictures)
    write(path, lambda file: file.write_text(text, encoding="utf-8"))


def page(results: Mapping[str, Any], pictures: Pictures) -> str:
    """The report as one HTML file. A grid stands in the section of its title, or in one of its own at the end."""
    grids = dict(pictures.grids)
    blocks = [(shown.section["title"], _section(shown, grids.pop(shown.section["title"], {})))
              for shown in _shown(results)]
    blocks += [(title, grid(title, rows)) for title, rows in grids.items()]
    if pictures.overlays:
        blocks.append(("Attention overlays", "".join(overlay(*one) for one in pictures.overlays)))
    blocks.append(("Timing", _timing(results)))
    title = escape(results["title"])
    links = "".join(f'<li><a href="#part{number}">{escape(name)}</a></li>'
                    for number, (name, _) in enumerate(blocks, 1))
    facts = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in _facts(results))
    reading = "".join(f"<dt>{_mark(word) if word in VERDICTS else word}</dt><dd>{meaning}</dd>"
                      for word, meaning in _reading(results))
    parts = "\n".join(f'<section id="part{number}"><h2>{escape(name)}</h2>\n{content}</section>'
                      for number, (name, content) in enumerate(blocks, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body><main>
<header><h1>{title}</h1>
{_verdict_counts(results)}
<dl class="facts">{facts}<dt>command</dt><dd><code>{escape(results["command"])}</code></dd></dl>
<h2 class="reading">How to read the tables</h2>
<dl>{reading}</dl>
<nav aria-label="Contents"><ul>{links}</ul></nav></header>
{parts}
{_files(results)}
</main></body>
</html>
"""


def _verdict_counts(results: Mapping[str, Any]) -> str:
    counts = Counter(row["verdict"] for section in results["sections"] for row in section["rows"] if row["verdict"])
    marks = "".join(f"<li>{_mark(word, f'{counts[word]} {word}')}</li>" for word in VERDICTS if counts[word])
    return f'<ul class="count" aria-label="Verdicts of the rows">{marks}</ul>' if any(
        shown.published for shown in _shown(results)) else ""


def _section(shown: _Shown, images: Mapping[str, np.ndarray]) -> str:
    text = f"<p class='soft'>{escape(shown.sentence)}</p>"
    table = _published_table(shown) if shown.published else _compared_table(shown)
    notes = "".join(f"<li><strong>{escape(title)}</strong>: {escape(note)}</li>" for title, note in shown.notes)
    return "\n".join(filter(None, (text, table, f'<ul class="notes">{notes}</ul>' if notes else "",
                                   grid(shown.section["title"], images), _figures(shown)))) + "\n"


def _table(caption: str, kind: str, head: Sequence[str], body: str) -> str:
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
            f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n{body}</table></div>")


def _compared_table(shown: _Shown) -> str:
    lines = []
    for row in shown.section["rows"]:
        cells = "".join(_compared_cell(row["metrics"].get(word), shown.places(word)) for word in shown.words)
        if not shown.ran(row):
            cells = f'<td class="words" colspan="{max(1, len(shown.words))}">{_mark(NOT_RUN)}</td>'
        lines.append(f'<tr><th scope="row">{escape(shown.title(row))}</th>{cells}</tr>\n')
    head = ["row", *(f"{NAMES[word]}<small>{_direction(word)}</small>" for word in shown.words)]
    return _table(shown.section["title"], "compared", head, f"<tbody>{''.join(lines)}</tbody>")


def _compared_cell(number: Mapping[str, Any] | None, places: int) -> str:
    if number is None:
        return f"<td>{DOES_NOT_APPLY}</td>"
    versus = number["versus"]
    mark = ""
    if versus:
        mark = f'<span title="paired difference {_html(_versus(number))}">{_mark(versus["verdict"])}</span>'
    return f"<td>{_value(number, places)}{mark}</td>"


def _published_table(shown: _Shown) -> str:
    head = ["metric", "published", "measured<small>interval</small>", "difference<small>verdict</small>",
            *([f"against {escape(shown.first)}"] if shown.compared else [])]
    groups = []
    for row in shown.section["rows"]:
        lines = [f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup"><span>{escape(shown.title(row))} '
                 f'{_mark(row["verdict"] if shown.ran(row) else NOT_RUN)}</span></th></tr>\n']
        for word in (word for word in shown.words if word in row["metrics"]):
            number, places = row["metrics"][word], shown.places(word)
            published, difference = number["published"], number["difference"]
            versus = number["versus"]
            cells = [DOES_NOT_APPLY if published is None else _html(_number(published, DECIMALS)),
                     _value(number, places),
                     (_html(_number(difference, places, "+")) if difference is not None else "") +
                     f"<div>{_mark(number['verdict'])}</div>"]
            if shown.compared:
                cells.append(f"{_mark(versus['verdict'])}<small>{_html(_versus(number).rpartition(', ')[0])}</small>"
                             if versus else "")
            lines.append(f'<tr><th scope="row">{NAMES[word]}</th>'
                         f'{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n')
        groups.append(f"<tbody>{''.join(lines)}</tbody>\n")
    return _table(shown.section["title"], "published", head, "".join(groups))


def _value(number: Mapping[str, Any], places: int) -> str:
    if number["value"] is None:
        return _mark(NOT_RUN)
    bounds = number["interval95"]
    interval = f"<small>{_html(_interval(bounds, places))}</small>" if bounds else ""
    return f"<b>{_html(_number(number['value'], places))}</b>{interval}"


def _mark(word: str, text: str = "") -> str:
    return f'<em class="mark {word.replace(" ", "-")}">{escape(text or word)}</em>' if word else ""


def _html(text: str) -> str:
    """With the sign that minus has."""
    return escape(text.replace("-", "\N{MINUS SIGN}"))


def _direction(word: str) -> str:
    return "lower is better" if GOOD[word] < 0 else "higher is better"


# Figures


def _figures(shown: _Shown) -> str:
    figures = [_precision_recall(shown)]
    if shown.section["against"]:
        figures += [_against(shown, word) for word in shown.words]
    figures = [figure for figure in figures if figure]
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _precision_recall(shown: _Shown) -> str:
    points, legend, said = [], "", []
    for style, row in enumerate(shown.section["rows"]):
        recall, precision = (row["metrics"].get(word) for word in ("recall", "precision"))
        if not recall or not precision:
            continue
        measured = None not in (recall["value"], precision["value"])
        if None not in (recall["published"], precision["published"]):
            points.append(Point(recall["published"], precision["published"], style, hollow=True))
        if measured:
            points.append(Point(recall["value"], precision["value"], style, recall["interval95"],
                                precision["interval95"]))
            said.append(f"{shown.title(row)} {precision['value']:.3f} against {recall['value']:.3f}")
        legend += f"<li>{key(style, not measured)}{escape(shown.title(row))}{'' if measured else ', ' + NOT_RUN}</li>"
    if len(points) < 2:
        return ""
    hollow = "; hollow: published" if shown.published else ""
    svg = chart(points, "recall", "precision", f"Precision against recall: {', '.join(said) or 'published alone'}")
    return (f"<figure><figcaption>Precision against recall; bars: 95 % intervals{hollow}</figcaption>"
            f'<div class="plot">{svg}<ul class="legend">{legend}</ul></div></figure>\n')


def _against(shown: _Shown, word: str) -> str:
    points = []
    for row in shown.section["rows"]:
        number, option = row["metrics"].get(word), row["against"]
        if number is None or option is None:
            continue
        if number["published"] is not None:
            points.append(Point(option, number["published"], hollow=True))
        if number["value"] is not None:
            points.append(Point(option, number["value"], y_interval=number["interval95"]))
    if len({point.x for point in points}) < 2:
        return ""
    option, name = shown.section["against"], NAMES[word]
    said = ", ".join(f"{point.y:.{shown.places(word)}f} at {point.x:g}" for point in points if not point.hollow)
    svg = chart(points, option, f"{name} ({_direction(word)})", f"{name} against {option}: {said}", joined=True)
    return f'<figure><figcaption>{name} against {escape(option)}</figcaption><div class="plot">{svg}</div></figure>'


def _timing(results: Mapping[str, Any]) -> str:
    rows = results["rows"].values()
    words = ("evaluations", "gradients", "images_per_second")
    longest = {word: max([row[word] or 0 for row in rows], default=0) for word in words}
    lines = []
    for row in rows:
        cells = "".join(f"<td>{_bar(row[word], longest[word])}</td>" for word in words)
        lines.append(f'<tr><th scope="row">{escape(row["title"])}</th>{cells}</tr>\n')
    head = ["row", "network evaluations<small>per image</small>", "backward passes<small>per image</small>",
            "speed<small>images/s of a rank</small>"]
    return (f"<p class='soft'>What an image costs, and how many a rank made in a second on "
            f"{escape(results['device'])}.</p>" + _table("Timing", "timing", head, f"<tbody>{''.join(lines)}</tbody>"))


def _bar(value: float | None, longest: float) -> str:
    if value is None:
        return _mark(NOT_RUN)
    share = 100 * value / longest if longest else 0
    return f'{_count(value)}<span class="bar" style="width:{share:.1f}%"></span>'


def _files(results: Mapping[str, Any]) -> str:
    lines = []
    for name, row in results["rows"].items():
        sha256 = f"<code>{escape(row['sha256'][:16])}</code>" if row["sha256"] else DOES_NOT_APPLY
        seconds = DOES_NOT_APPLY if row["seconds"] is None else _count(row["seconds"])
        samples = _mark(NOT_RUN) if row["samples"] is None else f"<code>{escape(row['samples'])}</code>"
        lines.append(f'<tr><th scope="row">{escape(name)}</th><td>{row["images"]:,}</td><td>{escape(row["heads"])}</td>'
                     f'<td>{seconds}</td><td class="words path">{samples}</td><td class="words">{sha256}</td></tr>\n')
    head = ["row", "images", "attention heads", "seconds<small>of all ranks</small>", "samples", "sha256"]
    return ("<details><summary>Files of samples</summary>"
            + _table("Files of samples", "files", head, f"<tbody>{''.join(lines)}</tbody>") + "</details>")
