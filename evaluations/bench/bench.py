"""A bench from its file to its two tables: the search, and what is reported. All ranks call `run_bench` together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.dtypes import AUTO
from guided_diffusion.errors import UserError
from guided_diffusion.jobs import job
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import option
from guided_diffusion.pictures import save_comparison
from guided_diffusion.progress import Progress, progress_bar

from ..extractor_options import ExtractorOptions
from ..features import FeatureExtractor
from ..reproduction.checks import check_extractors, check_files, check_rows, say_without_effect
from ..reproduction.measurements import EvaluationSettings, Measurements, measure_rows
from ..reproduction.pictures import Pictures
from ..reproduction.plan import probe
from ..reproduction.reproduce import FEATURES, PAGE, WorkOptions, made_here, pictures, prepared, say_warnings, write_all
from ..reproduction.results import results
from ..reproduction.tables import ChartSpec, Row, Section, Table
from ..reproduction.titles import titles
from .candidates import FURTHER, Candidate, Flags, beyond, candidates
from .hours import Hours, count_killed
from .plan import plan
from .settings import Bench, load_bench
from .units import Unit, alone, elsewhere, fewer_steps, in_pairs, missing_cost, unguided

STRIP, STRIP_IMAGES = "strip.png", 10
FEWER = "No guidance, fewer steps"      # title of a section
CHOICE_RESAMPLINGS = 2          # the search chooses by the values themselves

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchOptions(WorkOptions):
    """The bench."""

    methods: str = option("", "which methods, comma-separated, by their short names, like SAG,PAG; unset: all that the "
                          "model supports")
    hours: float | None = option(None, "hours that all starts of this command together may take: what does not fit is "
                                 "left out and said", above=0)
    plan: bool = option(False, "say what the bench does, in which order, and what fits into the hours; stop there")
    evaluation_seconds: float | None = option(None, "seconds that your device takes for one evaluation of one image; "
                                              "unset: measured on this one", above=0)
    out: str = option("runs/bench", "folder for a folder of each bench, with its samples, tables and pictures")


def run_bench(words: Sequence[str], options: BenchOptions, changed: Mapping[str, Any]) -> str:
    """Does what the options say; returns the plan or the reported table on rank 0, else "".

    changed: fields of `BenchSpec` that the command line gives. Whatever was sampled stays in the folder of the bench,
    where the same command goes on. Raises UserError for what is wrong with names, options and files, before the first
    image is sampled.
    """
    bench = load_bench(words, options, changed)
    bench.reported({}, bench.spec.evaluations)          # without which there is nothing to compare with
    if options.plan:
        return _plan(bench, options) if dist_util.is_main() else ""
    dist_util.connect()
    if bench.base.run.sample.dtype == AUTO:
        dtype = bench.reported({}, bench.spec.evaluations).run.decided().sample.dtype
        bench = replace(bench, base=bench.base.changed(dtype=dtype))
    settings = EvaluationSettings(Path(options.references), ExtractorOptions(inception=options.inception),
                                  options.bootstrap, {})
    first = {"images": bench.reported({}, bench.spec.evaluations), "search_images": bench.searched({})}
    extractors: dict[str, FeatureExtractor] = {}
    with ExitStack() as stack:
        with dist_util.together():
            for flag, row in first.items():
                table = Table(bench.name, "", "", "", {row.name: row}, (Section("", (row.name,)),))
                check_rows(table, flag)
                check_files(table, settings, allow_missing=False)
            say_without_effect(first.values(), settings)
        check_extractors(first.values(), settings, extractors)
        with dist_util.together():
            found, why = _chosen(bench, options)
            if dist_util.is_main():
                stack.enter_context(prepared(bench.folder))
                count_killed(bench.folder)
                stack.enter_context(job("bench", bench.folder, bench.title, resumes=True))
        why |= {one.short: "; ".join(map(str, one.missing)) for one in found if one.missing}
        found = [one for one in found if not one.missing]
        seconds = _rank_seconds(bench, options) / dist_util.world_size()
        work = BenchRun(bench, settings, Hours(bench.folder, options.hours, seconds), why, extractors)
        try:
            work.sample(found)
            return work.write()
        finally:                        # also the time of what was stopped
            work.count()


def page_of(words: Sequence[str], options: BenchOptions, changed: Mapping[str, Any]) -> Path:
    """Returns where the page of the reported table of a bench will be. changed, and UserErrors: see `load_bench`."""
    return load_bench(words, options, changed).folder / "report" / PAGE


def _chosen(bench: Bench, options: BenchOptions) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the methods that were asked for and are supported, and the reasons against the others.

    Raises UserError for an unknown method, and for one that was asked for and is not supported.
    """
    found, why = candidates(bench.base, options.references)
    named = [word.strip().lower() for word in options.methods.split(",") if word.strip()]
    known = {method.short.lower(): method.short for method in bench.base.run.guidance}
    for word in named:
        if word not in known:
            raise UserError(f"--methods {options.methods}: there is no {word!r}, there are {', '.join(known.values())}")
        if known[word] in why:
            raise UserError(f"--methods {options.methods}: {known[word]} cannot be compared: {why[known[word]]}")
    return [one for one in found if not named or one.short.lower() in named], {} if named else why


def _plan(bench: Bench, options: BenchOptions) -> str:
    found, why = _chosen(bench, options)
    ranks = options.ranks or dist_util.world_size()
    return plan(bench, found, why, options.references, _rank_seconds(bench, options) / ranks, options.hours)


def _rank_seconds(bench: Bench, options: BenchOptions) -> float:
    """Returns the seconds of an evaluation of one image on one rank."""
    return probe(bench.base).seconds if options.evaluation_seconds is None else options.evaluation_seconds


class BenchRun:
    """The work of a bench on all ranks, in the order of `units`.

    why: by method, the reason why it is not compared. extractors: by backend, those that are loaded. The rows are kept
    for the tables by the titles of their sections.
    """

    def __init__(self, bench: Bench, settings: EvaluationSettings, hours: Hours, why: Mapping[str, str],
                 extractors: dict[str, FeatureExtractor]) -> None:
        self.bench, self.settings, self.hours, self.why = bench, settings, hours, dict(why)
        self.searches: dict[str, list[Row]] = {}
        self.reports: dict[str, list[Row]] = {}
        self.left_out: list[str] = []
        self.impossible: list[str] = []
        self.fewer: set[int] = set()                # evaluations of no guidance with fewer steps, done or left out
        self.values: dict[str, float] = {}          # by method, the best of its search
        self.best: dict[str, Flags] = {}
        self.tried: dict[str, Sequence[Flags]] = {}     # by method, the settings of its search
        self._report_seconds = self._search_seconds = 0.0       # of the evaluation of a row at the end
        self._extractors = extractors
        self._warned: set[str] = set()

    def sample(self, found: Sequence[Candidate]) -> None:
        """Samples all pieces of work that fit into the hours. Raises UserError where not even the first one does."""
        with progress_bar(None, "pieces of work", "piece") as progress:
            self._do(unguided(self.bench, self.bench.spec.evaluations), progress)
            if not self.reports:
                raise UserError(f"--hours {self.hours.limit:g}: are too few for the row without guidance: "
                                f"{'; '.join(self.left_out)}")
            self._time_evaluation()
            for unit in alone(self.bench, found):
                self._do(unit, progress)
            self._do_fewer_steps(progress)
            for unit in elsewhere(self.bench, dict(self.best)):
                self._do(unit, progress)
            order = dist_util.told_by_main(self._in_order())
            best = {**{one.short: one.settings[0] for one in found if one.transforms}, **self.best}
            searched = [replace(one, settings=self.tried.get(one.short, one.settings)) for one in found]
            for unit in in_pairs(self.bench, searched, best, order):
                self._do(unit, progress)
            self._do_fewer_steps(progress)

    def _do_fewer_steps(self, progress: Progress) -> None:
        """Samples no guidance with the steps of the rows so far, where that was not tried yet."""
        for unit in fewer_steps(self.bench, ((row.name, row) for row in self._guided())):
            if unit.evaluations not in self.fewer:
                self.fewer.add(unit.evaluations)
                self._do(unit, progress)

    def _guided(self) -> list[Row]:
        """Returns the reported rows with guidance at the main number of evaluations."""
        titles = [_section_title(self.bench.spec.evaluations, pair) for pair in (False, True)]
        return [row for title in titles for row in self.reports.get(title, []) if row.run.active]

    def _in_order(self) -> list[str]:
        """Returns the methods from the best search to the worst."""
        lower = self.bench.spec.better(0, 1)
        return sorted(self.values, key=lambda short: self.values[short] if lower else -self.values[short])

    def _do(self, unit: Unit, progress: Progress) -> None:
        """Searches and samples a piece of work, where it can be had and there is time for it."""
        try:
            key, cost = unit.key(self.bench), unit.cost(self.bench)
        except UserError as error:
            self.impossible.append(f"{unit.what} ({error})")
            return
        if not self._fits(unit.what, 0.0 if key in self.hours.done else cost, len(unit.settings) * unit.searched):
            return
        progress.note(unit.what)
        flags = self._searched_best(unit) if unit.searched else unit.settings[-1]
        if flags is None:
            return
        row = self.bench.reported(flags, unit.evaluations)
        self._sample(row)
        title = FEWER if unit.steps_of else _section_title(unit.evaluations, unit.pair)
        self.reports.setdefault(title, []).append(row)
        self.hours.reserve += self._report_seconds
        self.count(key)
        progress.update()

    def _fits(self, what: str, cost: float, searched: int) -> bool:
        """Whether there is time for so many network evaluations; else notes what is left out.

        searched: rows of the search that are evaluated at the end, beside the one that is reported.
        """
        left = self.hours.left - self._report_seconds - searched * self._search_seconds
        expected = self.hours.expected(cost)
        if dist_util.told_by_main(expected <= left or not expected):
            return True
        self.left_out.append(f"{what} (would take {expected / 3600:.2g} h of the {max(left, 0) / 3600:.2g} h that are "
                             "left)")
        return False

    def _searched_best(self, unit: Unit) -> Flags | None:
        """Searches the settings of a piece of work, and beyond them where an end is best; returns the best one.

        None where there is no time to report that one, as where the images that are there are of another setting.
        """
        settings, rows = unit.settings, unit.rows(self.bench)
        self._search(rows)
        place, value = self._best_of(rows)
        for _ in range(FURTHER):
            wider = beyond(settings, place, unit.scale)
            further = self._allowed(wider[-1 if place else 0]) if wider else None
            if further is None or not self._fits(f"{further.run.title()} in the search",
                                                 missing_cost(further), len(rows) + 1):
                break
            self._search([further])
            settings, rows = wider, [*rows, further] if place else [further, *rows]
            place, value = self._best_of(rows)
        self.searches[unit.title] = rows
        self.hours.reserve += len(rows) * self._search_seconds
        if not self._fits(unit.what, missing_cost(self.bench.reported(settings[place], unit.evaluations)), 0):
            return None
        if not unit.pair:
            self.best[unit.title], self.values[unit.title], self.tried[unit.title] = settings[place], value, settings
        return settings[place]

    def _allowed(self, flags: Flags) -> Row | None:
        """Returns the row of the search with these flags; None where the method allows no such value."""
        try:
            return self.bench.searched(flags)
        except UserError:
            return None

    def count(self, key: str = "", evaluations: float = 0.0) -> None:
        """Counts the time since the last call, on rank 0; see `Hours.count`."""
        if dist_util.is_main():
            self.hours.count(key, evaluations)

    def _search(self, rows: Sequence[Row]) -> None:
        """Samples the rows of a search."""
        with progress_bar(len(rows), "search", "row", enabled=bool(rows)) as progress:
            for row in rows:
                progress.note(row.name)
                self._sample(row)
                progress.update()

    def _sample(self, row: Row) -> None:
        """Samples a row, and counts the evaluations of the images that were not there yet."""
        cost = 0.0
        if dist_util.is_main():
            cost = missing_cost(row)
            _log.info("%s: %s, %d images", row.name, row.run.title(), row.images)
        row.sample()
        self.count(evaluations=cost)

    def _best_of(self, rows: Sequence[Row]) -> tuple[int, float]:
        """Returns the place of the best row, and its value, by the metric of the bench alone."""
        spec = self.bench.spec
        numbers = self._measured(_table(self.bench, {"": rows}), replace(self.settings, bootstrap=CHOICE_RESAMPLINGS))
        best: tuple[int, float] = (0, 0.0)
        with dist_util.together():
            if numbers is not None:
                values = [self._searched(numbers, row) for row in rows]
                place = 0
                for other in range(1, len(values)):
                    place = other if spec.better(values[other], values[place]) else place
                best = place, values[place]
        chosen, value = dist_util.told_by_main(list(best))
        return int(chosen), float(value)

    def _measured(self, table: Table, settings: EvaluationSettings) -> Measurements | None:
        """Evaluates all rows of a table; see `measure_rows`."""
        return measure_rows(table, list(table.rows), settings, self.bench.folder / FEATURES, self._extractors)

    def _searched(self, numbers: Measurements, row: Row) -> float:
        """Returns the metric of a row of a search; where that is no number, what is worse than all numbers."""
        metric = self.bench.spec.metric
        found = numbers.replicates[row.name, row.images].get(metric)
        if found is not None:
            return found.estimate
        _log.warning("%s: its %s is not a number; it counts as the worst", row.name, self.bench.metric_label())
        return math.inf if self.bench.spec.better(0, 1) else -math.inf

    def _time_evaluation(self) -> None:
        """Evaluates the row without guidance as at the end, to keep as much time for every row that is reported.

        And once more as a row of the search, of which each rank evaluates its share. A later start takes what the first
        one measured: the features of this row are there then, those of others are not.
        """
        (row,), = self.reports.values()
        rows = f"{row.images} images, {row.evaluation.backend}"
        seconds = dist_util.told_by_main(self.hours.evaluating.get(rows, []))
        for one in () if seconds else (row, self.bench.by_metric(row)):
            began = time.monotonic()
            self._measured(_table(self.bench, {"": [one]}), self.settings)
            seconds.append(time.monotonic() - began)
        self.hours.evaluating[rows] = seconds
        self._report_seconds, self._search_seconds = seconds[0], seconds[1] / dist_util.world_size()
        self.hours.reserve += self._report_seconds
        self.count()

    # The tables

    def write(self) -> str:
        """Evaluates and writes both tables and the strip; returns the reported table as Markdown on rank 0, else ""."""
        if self.searches:
            self._write_table("search", self._search_table())
        table = self._report_table()
        text = self._write_table("report", table)
        self._draw_strip(titles(table))
        return text

    def _draw_strip(self, named: Mapping[str, str]) -> None:
        """Samples the first images of the methods alone from one noise, whatever their steps, and draws them.

        named: titles by row.
        """
        rows = [self.bench.in_strip(row, STRIP_IMAGES) for row in next(iter(self.reports.values()))]
        for row in rows:
            row.sample()
        with dist_util.together():
            if dist_util.is_main():
                save_comparison({named[row.name]: BatchFile(row.run.samples).first(STRIP_IMAGES) for row in rows},
                                self.bench.folder / "report" / STRIP)

    def _search_table(self) -> Table:
        label = self.bench.metric_label()
        note = (f"The setting that is best here, by {label}, is reported in the other table on other images. Its "
                "number here is too good, as it was chosen by these images.")
        return _table(self.bench, self.searches, title=f"{self.bench.title}: the search", note=note)

    def _report_table(self) -> Table:
        """Returns the reported table.

        Methods stand beside no guidance, pairs beside the method that was best alone, and both once more beside no
        guidance with as many steps.
        """
        main = next(iter(self.reports))
        table = _table(self.bench, self.reports, title=self.bench.title, note=self._note())
        alone_rows = {short: self.bench.reported(flags, self.bench.spec.evaluations).name
                      for short, flags in self.best.items()}
        first = next((alone_rows[short] for short in self._in_order()), self.reports[main][0].name)
        against = {title: first if title.startswith("Pairs") else self.reports[main][0].name if title == FEWER else ""
                   for title in self.reports}
        sections = [replace(section, against_row=against[section.title]) for section in table.sections]
        shown = tuple(title for title in self.reports if not title.startswith("Pairs"))
        return replace(table, sections=(*sections, *self._by_steps()),
                       chart=ChartSpec("work", self.bench.spec.metric, shown))

    def _by_steps(self) -> Iterator[Section]:
        """Yields a section for each row of no guidance with fewer steps: the methods that have as many."""
        for plain in self.reports.get(FEWER, []):
            steps = plain.run.num_steps
            rows = [row.name for row in self._guided() if row.run.num_steps == steps]
            yield Section(f"As many steps: {steps}", (plain.name, *dict.fromkeys(rows)))

    def _note(self) -> str:
        """Returns what else is to know: how the settings were chosen, and what was left out."""
        spec, label = self.bench.spec, self.bench.metric_label()
        only = f", for those at {spec.evaluations} evaluations alone" * bool(spec.others)
        shown = f"; what these do by themselves is shown by rows without guidance that have as many{only}"
        parts = [self.bench.note, "Every row has at most the evaluations that its section names, all networks counted "
                 "by their operations, so that methods that cost more have fewer steps"
                 f"{shown * spec.same_steps}. Each has the setting that had the best {label} of "
                 f"{spec.search_images:,} images of seed {spec.search_seed} at {spec.evaluations} evaluations; pairs "
                 "are compared with the method that was best alone there."]
        if spec.others:
            parts.append(f"At {' and '.join(map(str, spec.others))} evaluations nothing was searched: another setting "
                         "may be the best one there.")
        if self.left_out:
            parts.append(f"Left out for lack of time: {'; '.join(self.left_out)}.")
        if self.impossible:
            parts.append(f"Left out, as they cannot be had: {'; '.join(self.impossible)}.")
        parts += [f"{section}: no guidance was left out; " + (
            f"the others are compared with {rows[0].run.title()}." if len(rows) > 1 else "nothing is compared.")
            for section, rows in self.reports.items() if not section.startswith("Pairs") and rows[0].run.active]
        if self.why:
            reasons = "; ".join(f"{short} ({reason})" for short, reason in self.why.items())
            parts.append(f"Not compared: {reasons}.")
        return " ".join(filter(None, parts))

    def _write_table(self, part: str, table: Table) -> str:
        """Evaluates a table, and writes it into its folder; returns it as Markdown on rank 0, else ""."""
        numbers = self._measured(table, self.settings)
        with dist_util.together():
            if numbers is None:
                return ""
            say_warnings(text for text in numbers.warnings if text not in self._warned)
            self._warned.update(numbers.warnings)
            described = {**results(table, numbers, {}, self.settings), **made_here()}
            draw = (lambda: pictures(table, {})) if part == "report" else Pictures
            return write_all(self.bench.folder / part, described, draw)


def _section_title(evaluations: int, pair: bool) -> str:
    """Returns the title of the section of the methods at so many evaluations, alone or in pairs."""
    return f"{'Pairs' if pair else 'Methods alone'}, {evaluations} evaluations"


def _table(bench: Bench, sections: Mapping[str, Sequence[Row]], title: str = "", note: str = "") -> Table:
    """Returns the table of these rows by the titles of their sections."""
    rows = {row.name: row for part in sections.values() for row in part}
    parts = tuple(Section(name, tuple(dict.fromkeys(row.name for row in part))) for name, part in sections.items())
    return Table(bench.name, title, bench.source, note, rows, parts)
