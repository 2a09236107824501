"""The tables that can be reproduced, as files: `configs/TABLE/table.yaml`, and a file for each row.

    title: what the table shows
    source: where its numbers were published
    note: what else there is to know
    extends: a file of the same kind, relative to this one, whose values this one starts from
    shared: {option: value, ...}            # of all rows
    rows:
      NAME: {option: value, ...}            # a row that needs no file; any other row NAME is the file NAME.yaml
    sections:                               # what is shown together; a row may stand in several
      - {title: ..., rows: [NAME, ...], against: an option that sets the rows apart and is drawn against,
         against_row: the row that the others are compared with; unset: the first one,
         images_seen: of the section's networks in training, for a chart}
    chart: {x: a cost of a row, y: a metric}        # of all rows together, a line for each sampler; further values of
                                                    # x: images_seen; sections, a panel for each. y: also several

Where a table extends another file, its options and rows change those of that file one by one, and a section takes the
place of the one with the same title. A row's values are options of a sampling run, so that the sampling scripts take
its file as `--config`, and a section `evaluation`, which only this package reads: the fields of `EvaluationSpec`, and
`published: {metric: number, ...}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.jobs import STATE
from guided_diffusion.options import (
    EVALUATION_SECTION,
    Options,
    check_numbers,
    comma_separated,
    fill,
    nearest,
    option,
    option_fields,
    read_yaml,
    shortened,
)
from guided_diffusion.places import configurations
from guided_diffusion.runs.chunk_files import ANEW, REMEDY
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.sampler import SMALLER

from ..extractors import ExtractorKind, check_backend, find_extractor
from ..extractors.own import NoSuchNetwork
from ..metrics import METRICS
from ..metrics.registry import metric_words

CONFIGS = configurations()
DFID = "dfid"
FLAG = "TABLE"                  # as the option that names one
DECIMALS = 2                    # of all published numbers
TABLE_JSON, TABLE_TEXT, PAGE, CHART_FILE = "table.json", "table.md", "report.html", "chart.png"
FEATURES = "features"           # folder of what the networks saw, in that of a table
TAKEN = {TABLE_JSON, TABLE_TEXT, PAGE, CHART_FILE, FEATURES, STATE}     # in that folder: no names of rows
PARTS = {"title", "source", "note", "extends", "shared", "rows", "sections", "chart"}
COSTS = {                       # of an image of a row: what a chart may be drawn against, with its label
    "evaluations": "network evaluations per image",
    "gradients": "backward passes per image",
    "work": "evaluations per image, all networks counted",
}
IMAGES_SEEN, SECTIONS = "images_seen", "sections"
FURTHER_AXES = {                # what else it may be drawn against
    IMAGES_SEEN: "images seen in training",
    SECTIONS: "the settings",
}
TIMED = ("evaluations", "gradients")    # of the costs: those that stand in the table of timing


@dataclass(frozen=True)
class EvaluationSpec(Options):
    """How the images of a row are evaluated, and under which circumstances its published numbers hold."""

    reference: str = option("", "reference batch: a file name, or a bundled one by name")
    backend: str = option("torch", "the network that sees the images, as --backend of the evaluator")
    metrics: str = option("fid,sfid,is,precision,recall", f"which numbers, of {','.join(METRICS)}; shown in this order")
    images: int | None = option(None, "number of images of the published numbers; unset: unknown", minimum=2)
    heads: str = option("", "attention heads that the published numbers were made with; unset: either",
                        choices=("exact", "official"))
    evaluator: str = option("", "what the published numbers were measured with, where that is not the official "
                            "evaluator")
    source: str = option("", "where the numbers were published")
    note: str = option("", "what else there is to know")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
        metric_words(self.metrics)

    @property
    def kind(self) -> ExtractorKind | None:
        """What is known of the network; None where it is a file that is missing."""
        try:
            return find_extractor(self.backend)
        except NoSuchNetwork:
            return None

    @property
    def words(self) -> list[str]:
        """The words of the metrics, in order."""
        return list(dict.fromkeys(metric_words(self.metrics)))

    @property
    def smallest_count(self) -> int:
        """The smallest number of images that the metrics need."""
        return max(METRICS[word].smallest_count for word in self.words)


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    published: the published numbers by the words of the metrics, empty where there are none. file: what the row was
    read from.
    """

    name: str
    run: SamplingRun
    evaluation: EvaluationSpec
    published: Mapping[str, float]
    file: Path

    @property
    def images(self) -> int:
        """The number of images that are sampled."""
        return self.run.sample.num_samples

    def sample(self) -> None:
        """Samples what is missing. Raises UserError as `SamplingRun.run`, with what commands of tables allow."""
        with as_of_a_table():
            self.run.run()

    def changed(self, **values: Any) -> Row:
        """Returns the row with other values of some flags of its sampling run."""
        return dataclasses.replace(self, run=self.run.changed(**values))


def as_of_a_table() -> AbstractContextManager[None]:
    """Lets a UserError of a row's run advise what commands of tables have, which is neither of two of its options."""
    def change(text: str) -> str:
        for words, others in ((REMEDY, "pass another --out, or remove that to have it sampled again"), (ANEW, ""),
                              (SMALLER, "pass a smaller --batch_size, and another --out where a row was begun")):
            text = text.replace(words, others)
        return text

    return said_otherwise(change)


@dataclass(frozen=True)
class Section:
    """Rows that are shown together, and compared with one row.

    against: a numeric option that sets the rows apart, or "". against_row: the row that they are compared with, which
    may stand in other sections alone; "" is the first one. images_seen: by its networks in training, None: not said.
    """

    title: str
    rows: tuple[str, ...]
    against: str = ""
    against_row: str = ""
    images_seen: int | None = None

    @property
    def base(self) -> str:
        """The name of the row that the others are compared with."""
        return self.against_row or self.rows[0]

    def says_less_than(self, other: Section) -> bool:
        """Whether another section has all of its rows, compared with the same row or with nothing to compare."""
        return set(self.rows) <= set(other.rows) and (self.base == other.base or len(self.rows) == 1)


@dataclass(frozen=True)
class ChartSpec:
    """A chart of the rows of a table.

    x: one of COSTS or of FURTHER_AXES. y: words of metrics, with commas. sections: by title; none: all.
    """

    x: str
    y: str
    sections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: all its rows by name, in the order of the sections. chart: None where it asks for none."""

    name: str
    title: str
    source: str
    note: str
    rows: Mapping[str, Row]
    sections: tuple[Section, ...]
    chart: ChartSpec | None = None

    @property
    def precision_recall(self) -> str:
        """How precision and recall are computed: as in the official evaluator where a row has a published one."""
        published = any({"precision", "recall"} & row.published.keys() for row in self.rows.values())
        return "official" if published else "exact"

    def chosen(self, names: str) -> Table:
        """Returns the table of the comma-separated rows alone, or of all where there are none.

        Raises UserError for a row that the table does not have.
        """
        words = [word for word in names.replace(" ", "").split(",") if word]
        for word in words:
            if word not in self.rows:
                raise UserError(f"--rows {names}: {self.name} has no row {word!r}{nearest(word, self.rows)}, there are "
                                f"{', '.join(self.rows)}")
        if not words:
            return self
        sections: list[Section] = []
        for section in self.sections:
            if rows := tuple(row for row in section.rows if row in words):
                base = section.against_row if section.against_row in words else ""
                left = dataclasses.replace(section, rows=rows, against_row=base)
                if not any(left.says_less_than(other) for other in sections):
                    sections.append(left)
        return dataclasses.replace(self, rows={name: row for name, row in self.rows.items() if name in words},
                                   sections=tuple(sections))


def table_names() -> list[str]:
    """Returns the names of all tables, sorted."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/table.yaml"))


def load_table(name: str) -> Table:
    """Returns the table of that name. Raises UserError for an unknown one, and for a file that is no table."""
    if name not in table_names():
        known = f"there are {', '.join(table_names())}"
        if Path(name).suffix or len(Path(name).parts) > 1:
            raise UserError(f"TABLE {name}: is no name of a table; a table is a folder of {CONFIGS} with a file "
                            f"table.yaml, and is called by the name of the folder, {known}")
        raise UserError(f"TABLE {name}: there is no such table{nearest(name, table_names())}, {known}")
    path = CONFIGS / name / "table.yaml"
    content = _read_parts(path)
    sections = tuple(content["sections"].values())
    rows = {}
    for row, (values, file) in _values_of_rows(content["rows"], sections, path).items():
        rows[row] = read_row(row, _over(content["shared"], values), file)
    _check_base_rows(sections, rows, path)
    title, source, note = (text_of(content, part, str(path)) for part in ("title", "source", "note"))
    return Table(name, title or name, source, note, rows, sections, _chart(content.get("chart"), path))


def _read_parts(path: Path, chain: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns the parts of a table file over those of the file that it extends: shared, rows, and sections by title.

    chain: the files that extend this one. Raises UserError for a part that is unknown or of another kind.
    """
    content = read_yaml(path, flag=FLAG)
    _known(content, PARTS, str(path))
    shared = _mapping(content.get("shared"), f"shared in {path}")
    rows = {row: _mapping(values, f"row {row} in {path}")
            for row, values in _mapping(content.get("rows"), f"rows in {path}").items()}
    if not isinstance(content.get("sections"), list):
        raise UserError(f"sections in {path}: must be a list of sections, each with title and rows")
    sections: dict[str, Section] = {}
    for number, part in enumerate(content["sections"]):
        section = _section(part, path)
        if sections.setdefault(section.title or str(number), section) is not section:
            raise UserError(f"sections in {path}: two have the title {section.title}, they must differ")
    base: dict[str, Any] = {"shared": {}, "rows": {}, "sections": {}}
    if "extends" in content:
        base = _read_parts(_extended(content["extends"], path, chain), (*chain, path))
    return {**base, **content, "shared": _over(base["shared"], shared), "rows": {**base["rows"], **rows},
            "sections": {**base["sections"], **sections}}


def _extended(name: Any, path: Path, chain: Sequence[Path]) -> Path:
    """Returns the file that a table extends."""
    if not isinstance(name, str):
        raise UserError(f"extends in {path}: must be the name of one file")
    file = (path.parent / name).resolve()
    if file in {other.resolve() for other in (*chain, path)}:
        raise UserError(f"extends {name} in {path}: goes round in a circle")
    return file


def _values_of_rows(inline: Mapping[str, dict[str, Any]], sections: Iterable[Section], path: Path,
                    ) -> dict[str, tuple[dict[str, Any], Path]]:
    """Returns the values of every row and the file that they stand in, in the order of the sections.

    inline: rows that stand in the table's own file. Raises UserError for a row that stands nowhere, or in no section.
    """
    names = list(dict.fromkeys(row for section in sections for row in section.rows))
    if not names:
        raise UserError(f"sections in {path}: must have a row")
    for row in names:
        _check_row_name(row, path)
    files = {file.stem: file for file in path.parent.glob("*.yaml") if file != path}
    for row in (*inline, *files):
        if row not in names:
            raise UserError(f"row {row} of {path}: stands in no section{nearest(str(row), names)}")
        if row in inline and row in files:
            raise UserError(f"row {row} of {path}: stands there and in {files[row]}, must stand in one of them")
    for row in names:
        if row not in (*inline, *files):
            raise UserError(f"row {row} of {path}: is neither among its rows nor a file {row}.yaml beside it"
                            f"{nearest(row, (*inline, *files))}")
    return {row: (inline[row], path) if row in inline else (read_yaml(files[row], flag=FLAG), files[row])
            for row in names}


def _check_row_name(row: str, path: Path) -> None:
    """Raises UserError where samples cannot have a folder of that name among the files of their table."""
    if not row or Path(row).name != row or row.startswith("."):
        raise UserError(f"row {row or repr(row)} of {path}: must be the name of a folder, without / and not beginning "
                        "with a dot")
    if row.lower() in TAKEN:
        raise UserError(f"row {row} of {path}: must be another name, as the table has a file {row.lower()} of its own")


def _section(part: Any, path: Path) -> Section:
    """Returns a section of a table file; raises UserError where it is none."""
    part = _mapping(part, f"a section in {path}")
    _known(part, {"title", "rows", "against", "against_row", IMAGES_SEEN}, f"a section of {path}")
    rows, against = part.get("rows"), part.get("against", "")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows) \
            or len(set(rows)) < len(rows):
        raise UserError(f"rows of a section in {path}: must be a list of different names of rows, in text")
    classes: list[type[Options]] = [SampleOptions, *option_classes()]
    numeric = [field.name for cls in classes for field in option_fields(cls) if field.type in (int, float)]
    if against and against not in numeric:
        raise UserError(f"against {against} in {path}: must be an option that is a number"
                        f"{nearest(str(against), numeric)}")
    seen = part.get(IMAGES_SEEN)
    if seen is not None and (isinstance(seen, bool) or not isinstance(seen, int) or seen < 1):
        raise UserError(f"{IMAGES_SEEN} {seen} in {path}: must be a whole number from 1 up")
    title, base = (text_of(part, name, f"a section of {path}") for name in ("title", "against_row"))
    return Section(title, tuple(rows), against, base, seen)


def _check_base_rows(sections: Iterable[Section], rows: Iterable[str], path: Path) -> None:
    """Raises UserError where a section compares with a row that the table does not have."""
    for section in sections:
        if section.base not in rows:
            raise UserError(f"against_row {section.base} in {path}: must be a row of the table"
                            f"{nearest(section.base, rows)}")


def _chart(values: Any, path: Path) -> ChartSpec | None:
    """Returns the chart that a table file asks for; raises UserError where it is none."""
    if values is None:
        return None
    values = _mapping(values, f"chart in {path}")
    _known(values, {"x", "y"}, f"chart in {path}")
    words = {"x": [str(values.get("x"))], "y": comma_separated(str(values.get("y"))) or ["unset"]}
    for axis, allowed in (("x", {**COSTS, **FURTHER_AXES}), ("y", METRICS)):
        for word in words[axis]:
            if word not in allowed:
                raise UserError(f"{axis} {word} of chart in {path}: must be one of {', '.join(allowed)}"
                                f"{nearest(word, allowed)}")
    return ChartSpec(values["x"], ",".join(words["y"]))


def _known(values: Mapping[str, Any], names: set[str], where: str) -> None:
    """Raises UserError for a name that is not among `names`."""
    for name in values:
        if name not in names:
            raise UserError(f"{name} in {where}: is none of {', '.join(sorted(names))}{nearest(str(name), names)}")


def text_of(values: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a text among the values, "" where there is none; raises UserError for anything else."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(f"{name} {shortened(value)} in {where}: must be text")
    return "" if value is None else str(value)


def _mapping(values: Any, where: str) -> dict[str, Any]:
    """Returns the mapping, or an empty one for None; raises UserError for anything else."""
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where}: must be names and values")
    return dict(values or {})


def _over(shared: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` over `shared`, and those of the section `evaluation` one by one."""
    sections = [_mapping(part.get(EVALUATION_SECTION), EVALUATION_SECTION) for part in (shared, values)]
    return {**shared, **values, EVALUATION_SECTION: sections[0] | sections[1]}


def read_row(name: str, values: Mapping[str, Any], file: Path) -> Row:
    """Returns the row of these values, read from `file`. Raises UserError for whatever is wrong with them."""
    values = dict(values)
    section = _mapping(values.pop(EVALUATION_SECTION, None), f"{EVALUATION_SECTION} in {file}")
    published = _mapping(section.pop("published", None), f"published in {file}")
    _known(published, set(METRICS), f"published of row {name} in {file}")
    check_numbers(published, "published", f"of row {name} in {file}")
    try:
        evaluation, = fill(section, [EvaluationSpec], None, source=str(file))
        run = SamplingRun.of(fill(values, [SampleOptions, *option_classes()], preset_values, source=str(file)))
    except UserError as error:
        raise UserError(f"row {name} in {file}: {str(error).replace(f' in {file}', '')}") from None
    return Row(name, run, evaluation, published, file)


def in_folder(table: Table, out: str | Path, num_samples: int | None = None) -> Table:
    """Returns the table with every row's samples in a folder of `out`.

    num_samples: another number of images for every row; None keeps those of the rows.
    """
    changes: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    return dataclasses.replace(table, rows={
        name: row.changed(out=str(Path(out) / name), **changes) for name, row in table.rows.items()})


def smallest(rows: Sequence[Row]) -> int:
    """Returns the number of images that all rows have."""
    return min(row.images for row in rows)
