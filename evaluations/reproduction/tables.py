"""The tables that can be reproduced, as files: `configs/TABLE/table.yaml`, and a file for each row.

    title: what the table shows
    source: where its numbers were published
    shared: {option: value, ...}            # of all rows
    rows:
      NAME: {option: value, ...}            # a row that needs no file; any other row NAME is the file NAME.yaml
    sections:
      - {title: ..., rows: [NAME, ...]}     # what is shown together; a row may stand in several sections

A row's values are options of a sampling run, so that the sampling scripts take its file as `--config`, and a section
`evaluation`, which only this package reads.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.options import NOT_OPTIONS, Options, fill, nearest, option, read_yaml
from guided_diffusion.sample_util import OPTION_CLASSES, SampleOptions, SamplingRun, preset_values

from ..evaluator import BACKENDS, NAMES

CONFIGS = Path(__file__).parents[2] / "configs"
DFID = "dfid"
METRICS = ("fid", "sfid", "is", "precision", "recall")


@dataclass(frozen=True)
class Judging(Options):
    """How the images of a row are evaluated, and under which circumstances its published numbers hold."""

    reference: str = option("", "reference batch: a file name, or a shipped one by name")
    backend: str = option("torch", "the network that sees the images", choices=BACKENDS)
    images: int | None = option(None, "number of images of the published numbers; unset: unknown", minimum=2)
    heads: str = option("", "attention heads that the published numbers were made with; unset: either",
                        choices=("", "exact", "official"))
    source: str = option("", "where the numbers were published")
    note: str = option("", "what else there is to know")


@dataclass(frozen=True)
class Row:
    """One setting. published: by the words of the metrics, empty where nothing was; file: what it was read from."""

    name: str
    run: SamplingRun
    judging: Judging
    published: Mapping[str, float]
    file: Path

    @property
    def images(self) -> int:
        return self.run.sample.num_samples

    def changed(self, **values: Any) -> Row:
        """With other values of the sampling run's own options."""
        return dataclasses.replace(self, run=dataclasses.replace(
            self.run, sample=dataclasses.replace(self.run.sample, **values), began=time.time()))


@dataclass(frozen=True)
class Section:
    """Rows that are shown together, the first of which the others are compared with. against: a numeric option that
    sets them apart, or none."""

    title: str
    rows: tuple[str, ...]
    against: str = ""


@dataclass(frozen=True)
class Table:
    """All rows by name, in the order of the sections."""

    name: str
    title: str
    source: str
    note: str
    rows: Mapping[str, Row]
    sections: tuple[Section, ...]

    def chosen(self, names: str) -> Table:
        """The table of the comma-separated rows alone, of all where there are none; UserError for unknown ones."""
        words = [word for word in names.replace(" ", "").split(",") if word]
        for word in words:
            if word not in self.rows:
                raise UserError(f"--rows {names}: {self.name} has no row {word!r}{nearest(word, self.rows)}, there are "
                                f"{', '.join(self.rows)}")
        if not words:
            return self
        sections = [dataclasses.replace(section, rows=tuple(row for row in section.rows if row in words))
                    for section in self.sections]
        return dataclasses.replace(self, rows={name: row for name, row in self.rows.items() if name in words},
                                   sections=tuple(section for section in sections if section.rows))


def table_names() -> list[str]:
    return sorted(path.parent.name for path in CONFIGS.glob("*/table.yaml"))


def load_table(name: str) -> Table:
    """The table of that name. Raises UserError for an unknown one, and for a file that is no table."""
    if name not in table_names():
        raise UserError(f"TABLE {name}: there is no such table{nearest(name, table_names())}, there are "
                        f"{', '.join(table_names())}")
    path = CONFIGS / name / "table.yaml"
    content = read_yaml(path)
    known = {"title", "source", "note", "shared", "rows", "sections"}
    if unknown := set(content) - known:
        word = sorted(map(str, unknown))[0]
        raise UserError(f"{word} in {path}: is none of {', '.join(sorted(known))}{nearest(word, known)}")
    try:
        sections = tuple(Section(part["title"], tuple(part["rows"]), part.get("against", ""))
                         for part in content["sections"])
    except (KeyError, TypeError):
        raise UserError(f"sections in {path}: must be a list of title and rows") from None
    inline = content.get("rows") or {}
    names = list(dict.fromkeys(name for section in sections for name in section.rows))
    if spare := [name for name in inline if name not in names]:
        raise UserError(f"rows in {path}: {spare[0]} stands in no section")
    rows = {}
    for row in names:
        file = path.parent / f"{row}.yaml"
        values = inline[row] if row in inline else read_yaml(file)
        rows[row] = read_row(row, _over(content.get("shared") or {}, values), path if row in inline else file)
    return Table(name, content["title"], content.get("source", ""), content.get("note", ""), rows, sections)


def _over(shared: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    section = {**shared.get(NOT_OPTIONS, {}), **values.get(NOT_OPTIONS, {})}
    return {**shared, **values, NOT_OPTIONS: section}


def read_row(name: str, values: Mapping[str, Any], file: Path) -> Row:
    """The row of these values, read from `file`. Raises UserError for whatever is wrong with them."""
    values = dict(values)
    section = dict(values.pop(NOT_OPTIONS, {}))
    published = section.pop("published", None) or {}
    for metric, value in published.items():
        if metric not in (*NAMES, DFID) or isinstance(value, bool) or not isinstance(value, int | float) \
                or not math.isfinite(value):
            raise UserError(f"published {metric}: {value} in {file}: must be a number for one of "
                            f"{', '.join((*NAMES, DFID))}")
    judging, = fill(section, [Judging], None, source=str(file))
    run = SamplingRun(*fill(values, [SampleOptions, *OPTION_CLASSES], preset_values, source=str(file)))
    return Row(name, run, judging, published, file)


def in_folder(table: Table, out: str | Path, num_samples: int | None = None) -> Table:
    """The table with every row's samples in a folder of `out`, and another number of images where one is given."""
    changes: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    return dataclasses.replace(table, rows={
        name: row.changed(out=str(Path(out) / name), **changes) for name, row in table.rows.items()})


def smallest(rows: Sequence[Row]) -> int:
    """The number of images that all rows have."""
    return min(row.images for row in rows)
