"""What a bench is, as a file: `configs/bench/NAME.yaml`, or any other file of this kind.

    title: what is compared
    source, note: where its model comes from, and what else there is to know
    shared: {option: value, ...}      # of all rows, as in a table: the model, the sampler, how images are evaluated
    bench: {option: value, ...}       # the fields of `BenchSpec`; the command line changes them

The methods, and the settings among which the best one is looked for, are not named here: each method says its own
(`GuidanceOptions.search`). Options of a method that is off, such as its blocks, may stand in `shared`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.options import (
    EVALUATION_SECTION,
    Options,
    comma_separated,
    cut,
    fill,
    nearest,
    option,
    read_yaml,
    seed_option,
    whole_number,
)

from ..extractor_options import ExtractorOptions
from ..metrics import METRICS
from ..reproduction import tables
from ..reproduction.costs import steps_within
from ..reproduction.reproduce import WorkOptions, as_asked, located
from ..reproduction.tables import Row, read_row, text_of

METRIC_WORDS = "fid,sfid,mind,precision,recall,density,coverage,saturation"
PARTS = {"title", "source", "note", "shared", "bench"}
SET_BY_BENCH = ("seed", "num_samples", "out")


@dataclass(frozen=True)
class BenchSpec(Options):
    """What is compared at which cost."""

    evaluations: int = option(40, "network evaluations of an image, of all networks and counted by their operations, "
                              "that every row may have at most", minimum=1)
    other_evaluations: str = option("", "further numbers of evaluations, comma-separated, at which the methods are "
                                    "compared alone, with the settings that were best at the first one")
    search_images: int = option(500, "images of each setting in the search", minimum=2)
    search_seed: int = seed_option("seed of the search", 2)
    images: int = option(2000, "images of each row that is reported", minimum=2)
    seed: int = seed_option("seed of what is reported, another one than that of the search", 1)
    metric: str = option("fid", "what the search chooses by", choices=tuple(METRICS))
    pairs: bool = option(True, "compare pairs of methods too")
    same_steps: bool = option(True, "compare with no guidance of as many steps too, which tells what a method does "
                              "from what its smaller number of steps does")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed == self.search_seed:
            raise UserError(f"--seed {self.seed} --search_seed {self.search_seed}: must differ, as the best of a "
                            "search is too good on the images that it was chosen by")
        if not METRICS[self.metric].direction.reading:
            raise UserError(f"--metric {self.metric}: must be one of which a way is better")
        if self.evaluations in self.others or len(set(self.others)) < len(self.others):
            raise UserError(f"--other_evaluations {self.other_evaluations}: must differ from each other and from "
                            f"--evaluations {self.evaluations}")

    @property
    def others(self) -> list[int]:
        """The further numbers of evaluations. Raises UserError for anything else."""
        found = []
        for word in comma_separated(self.other_evaluations):
            number = whole_number(word)
            if not number:
                raise UserError(f"--other_evaluations {cut(self.other_evaluations)}: {cut(word)!r} is no whole number "
                                "above 0")
            found.append(number)
        return found

    def better(self, one: float, other: float) -> bool:
        """Whether the first number of the metric is better than the second."""
        return one < other if METRICS[self.metric].direction.lower_is_better else one > other


@dataclass(frozen=True)
class Bench:
    """A bench. base: the row of all shared options, without guidance. folder: where its samples and results lie."""

    name: str
    title: str
    source: str
    note: str
    spec: BenchSpec
    base: Row
    folder: Path

    def metric_label(self) -> str:
        """Returns what the metric of the search is called with the features that rows are evaluated by."""
        kind = ExtractorOptions(backend=self.base.evaluation.backend).kind
        return METRICS[self.spec.metric].by(kind.network).label

    def searched(self, flags: Mapping[str, Any]) -> Row:
        """Returns the row of the search with these flags of guidance."""
        spec = self.spec
        return self.by_metric(self._row(flags, spec.evaluations, spec.search_seed, spec.search_images,
                                        self.folder / "search"))

    def by_metric(self, row: Row) -> Row:
        """Returns a row evaluated by the metric of the search alone."""
        return replace(row, evaluation=replace(row.evaluation, metrics=self.spec.metric))

    def reported(self, flags: Mapping[str, Any], evaluations: int) -> Row:
        """Returns the row that is reported with these flags of guidance, at so many evaluations."""
        return self._row(flags, evaluations, self.spec.seed, self.spec.images, self.folder / "report")

    def in_strip(self, row: Row, images: int) -> Row:
        """Returns a reported row for a strip: its first images, beginning with the same noise in every row."""
        out = str(self.folder / "strip" / row.name)
        return row.changed(num_samples=images, batch_size=images, shared_start=True, out=out)

    def _row(self, flags: Mapping[str, Any], evaluations: int, seed: int, images: int, folder: Path) -> Row:
        """Returns a row with as many steps as its evaluations allow, named by its guidance and its evaluations."""
        run = steps_within(self.base.run.changed(**flags, seed=seed, num_samples=images), evaluations)
        name = f"{row_name(run.title())}_{evaluations}"
        return replace(self.base, name=name, run=run.changed(out=str(folder / name)))


def row_name(title: str) -> str:
    """Returns the words of a title as the name of a folder, like "sag_s_0.25_with_cg_scale_1"."""
    return re.sub(r"[^a-z0-9.-]+", "_", title.lower().replace(" + ", " with ")).strip("_")


def bench_names() -> list[str]:
    """Returns the names of the benches that come with this library, sorted."""
    return sorted(path.stem for path in (tables.CONFIGS / "bench").glob("*.yaml"))


def load_bench(words: Sequence[str], options: WorkOptions, changed: Mapping[str, Any]) -> Bench:
    """Returns the one bench that the words name.

    options: where models and references are, and what all rows change, as for tables. changed: fields of its
    `BenchSpec` in place of those of the file. Raises UserError for an unknown bench and for a file that is none.
    """
    if len(words) != 1:
        raise UserError(f"{len(words)} benches given: name one of {', '.join(bench_names())}, or a file")
    path = _path(words[0])
    content = read_yaml(path, flag="BENCH")
    for part in content:
        if part not in PARTS:
            raise UserError(f"{part} in {path}: is none of {', '.join(sorted(PARTS))}{nearest(str(part), PARTS)}")
    shared, values = (_mapping(content.get(part), part, path) for part in ("shared", "bench"))
    for flag in SET_BY_BENCH:
        if flag in shared:
            raise UserError(f"{flag} in {path}: is set by the bench, leave it out")
    spec, = fill({**values, **changed}, [BenchSpec], None, source=str(path))
    evaluation = {"metrics": METRIC_WORDS, **_mapping(shared.get(EVALUATION_SECTION), EVALUATION_SECTION, path)}
    base = _with_files(as_asked(read_row("shared", {**shared, EVALUATION_SECTION: evaluation}, path), options), options)
    if base.published:
        raise UserError(f"published in {path}: a bench has settings and steps of its own, leave it out")
    if base.run.active:
        raise UserError(f"shared in {path}: switches {base.run.title()} on; a bench does that itself")
    if spec.metric not in base.evaluation.words:
        raise UserError(f"--metric {spec.metric}: must be one of the metrics of {path}, {base.evaluation.metrics}")
    texts = [text_of(content, part, str(path)) for part in ("title", "source", "note")]
    return Bench(path.stem, texts[0] or path.stem, texts[1], texts[2], spec, base, Path(options.out) / path.stem)


def _with_files(base: Row, options: WorkOptions) -> Row:
    """Returns the row with the files of all methods where the options say that they are."""
    files: dict[str, str] = {}
    for method in base.run.guidance:
        files |= replace(method, **method.switched_on).files()
    return base.changed(**{flag: located(file, options) for flag, file in files.items() if file})


def _path(word: str) -> Path:
    """Returns the file of a bench by its name, or the file itself."""
    if word in bench_names():
        return tables.CONFIGS / "bench" / f"{word}.yaml"
    if not Path(word).is_file():
        raise UserError(f"BENCH {word}: there is no such bench and no such file{nearest(word, bench_names())}, there "
                        f"are {', '.join(bench_names())}")
    return Path(word)


def _mapping(values: Any, part: str, path: Path) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{part} in {path}: must be names and values")
    return dict(values or {})
