"""The whole of a table: checked, planned, sampled, evaluated and reported. All ranks call `reproduce` together."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion import __version__, dist_util
from guided_diffusion.cores import usable_cores
from guided_diffusion.dtypes import AUTO, DTYPES
from guided_diffusion.errors import UserError, resumable
from guided_diffusion.files import check_folder, write_json, write_text
from guided_diffusion.jobs import command_line, job
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, batch_option, option
from guided_diffusion.presets import MODELS
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.record import recorded_dtype
from guided_diffusion.runs.shards import locked

from ..attention.study import attention_method, overlay_strip
from ..extractor_options import ExtractorOptions
from ..features import FeatureExtractor
from ..metrics.bootstrap import MOST_RESAMPLINGS
from .checks import check_extractors, check_files, check_rows, say_without_effect
from .markdown import markdown
from .measurements import EvaluationSettings, measure_rows
from .pictures import Pictures
from .plan import plan
from .report import write_report
from .results import results
from .table_chart import write_chart
from .tables import (
    CHART_FILE,
    FEATURES,
    PAGE,
    TABLE_JSON,
    TABLE_TEXT,
    Row,
    Table,
    in_folder,
    load_table,
    table_names,
)
from .titles import sampler, titles

SHOWN_IMAGES = 12               # of each row in the report
OVERLAID = 4                    # images whose attention is shown

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkOptions(Options):
    """What tables and benches have in common: their files, and how the work is done."""

    plan: bool = option(False, "say what the table costs and what is missing, and stop there")
    ranks: int | None = option(None, "number of ranks, which are started by mpiexec (or torchrun, where mpi4py is "
                               "missing) unless a launcher has done so; unset: those of the launcher", minimum=1)
    evaluation_seconds: float | None = option(None, "for the plan: seconds that your device takes for one evaluation "
                                              "of one image; unset: measured on this one", above=0)
    out: str = option("runs/reproduction", "folder for a folder of each table, with its samples, numbers and report")
    models: str = option("models", "folder of the checkpoints")
    references: str = option("references", "folder of the reference batches")
    batch_size: int | None = batch_option(None, "images at a time on each rank; unset: as the rows have it")
    dtype: str = option("", f"type in which the networks compute, for all rows: {', '.join(DTYPES)}, or {AUTO}, the "
                        "fastest one here, found once for the table; unset: as the rows have it",
                        choices=(AUTO, *DTYPES))
    compile: bool = option(False, "compile the networks of all rows with torch.compile, for GPUs")
    inception: str = option("", "the official classify_image_graph_def.pb; unset: from the cache, else downloaded")
    bootstrap: int = option(200, "resamplings for 95 % intervals", minimum=2, maximum=MOST_RESAMPLINGS)


@dataclass(frozen=True)
class ReproduceOptions(WorkOptions):
    """The table."""

    rows: str = option("", "which rows, comma-separated; unset: all")
    num_samples: int | None = option(None, "images of every row, in place of the published number (which makes the "
                                     "numbers not comparable)", minimum=1)
    reference: str = option("", "another reference batch for all rows (which makes the numbers not comparable)")
    heads: str = option("", "attention heads for all rows: exact or official; unset: as the rows have it",
                        choices=("exact", "official"))
    allow_missing: bool = option(False, "leave out rows whose checkpoint or reference is missing: they are `not run "
                                 "here` in the table")


def choose(words: Sequence[str], options: ReproduceOptions) -> tuple[Table, Table]:
    """Returns the table that was named, as the options change it, and with its rows as they are in their files.

    Raises UserError where no table is named, or an unknown table or row.
    """
    if len(words) != 1:
        raise UserError(f"{len(words)} tables given: name one of {', '.join(table_names())}")
    table = load_table(words[0]).chosen(options.rows)
    table = in_folder(table, Path(options.out) / table.name, options.num_samples)
    return replace(table, rows={name: _compared(as_asked(row, options), options)
                                for name, row in table.rows.items()}), table


def unlike_file(row: Row, in_file: Row) -> list[str]:
    """Returns in words in what a row is not as in its file: the reference and the type in which networks compute."""
    reference, before = row.evaluation.reference, in_file.evaluation.reference
    types = [one.run.configuration()["dtype"] for one in (row, in_file)]
    changed = []
    if before not in (reference, Path(reference).name):
        changed.append(f"reference {Path(reference).name}, published with {before or 'an unknown one'}")
    if AUTO not in types and types[0] != types[1]:
        changed.append(f"computed in {types[0]}, published with {types[1]}")
    return changed


def as_asked(row: Row, options: WorkOptions) -> Row:
    """Returns a row as the options change it: its files, the evaluation's network among them, batch and type."""
    values: dict[str, Any] = {flag: located(file, options) for flag, file in row.run.checkpoints().items()}
    if options.batch_size is not None:
        values["batch_size"] = options.batch_size
    if options.dtype:
        values["dtype"] = options.dtype
    if options.compile:
        values["compile"] = True
    evaluation = replace(row.evaluation, backend=located(row.evaluation.backend, options))
    return replace(row.changed(**values), evaluation=evaluation)


def _compared(row: Row, options: ReproduceOptions) -> Row:
    """Returns a row with the heads and the reference that the options name."""
    if options.heads:
        guidance = tuple(method.with_heads(options.heads) for method in row.run.guidance)
        row = replace(row, run=replace(row.run, guidance=guidance))
    if options.reference:
        row = replace(row, evaluation=replace(row.evaluation, reference=options.reference))
    return row


def located(file: str, options: WorkOptions) -> str:
    """Returns where a checkpoint is that a row names: in `--models`, or among the bundled ones of an installation."""
    path = Path(file)
    if path.parts[:1] == ("models",):
        return str(Path(options.models).joinpath(*path.parts[1:]))
    if path.parts[:2] == (MODELS.parent.name, MODELS.name) and not path.is_file():
        return str(MODELS.joinpath(*path.parts[2:]))
    return file


def reproduce(words: Sequence[str], options: ReproduceOptions) -> str:
    """Does what the options say; returns the plan or the table on rank 0, else "".

    Every sampling run, and the features of every sample file, lie in the folder of the table, where the same command
    goes on. Raises UserError for whatever is wrong with names, options and files, before the first image is sampled.
    """
    table, in_files = choose(words, options)
    if options.plan:
        ranks = options.ranks or dist_util.world_size()
        return plan(table, options.references, options.inception, ranks, options.evaluation_seconds) \
            if dist_util.is_main() else ""
    dist_util.connect()
    table = decided(table)
    changed = {name: unlike_file(row, in_files.rows[name]) for name, row in table.rows.items()}
    folder = Path(options.out) / table.name
    settings = EvaluationSettings(Path(options.references), ExtractorOptions(inception=options.inception),
                                  options.bootstrap, changed)
    extractors: dict[str, FeatureExtractor] = {}
    with ExitStack() as stack:
        with dist_util.together():
            check_rows(table)
            why = check_files(table, settings, options.allow_missing)
            say_without_effect(table.rows.values(), settings)
        check_extractors([row for name, row in table.rows.items() if name not in why], settings, extractors)
        with dist_util.together():
            if dist_util.is_main():
                stack.enter_context(prepared(folder))
                stack.enter_context(job("table", folder, table.name, resumes=True))
        sample(table, why)
        numbers = measure_rows(table, [name for name in table.rows if name not in why], settings, folder / FEATURES,
                               extractors)
        with dist_util.together():
            if numbers is None:
                return ""
            say_warnings(numbers.warnings)
            described = {**results(table, numbers, why, settings), **made_here()}
            return write_all(folder, described, lambda: pictures(table, why))


def say_warnings(warnings: Iterable[str]) -> None:
    """Says what readers of the numbers must know, on stderr."""
    for text in warnings:
        _log.warning("warning: %s", text)


def decided(table: Table) -> Table:
    """Returns the table with one type for all rows whose --dtype is auto; all ranks call it together.

    That is the type of the first of these rows that was begun, else the fastest one for the first of them.
    """
    rows = [row for row in table.rows.values() if row.run.sample.dtype == AUTO]
    if not rows:
        return table
    begun = [row for row in rows if not row.run.sample.overwrite and recorded_dtype(row.run.out)]
    dtype = (begun or rows)[0].run.decided().sample.dtype
    return replace(table, rows={name: row.changed(dtype=dtype) if row in rows else row
                                for name, row in table.rows.items()})


def write_all(folder: Path, described: dict[str, Any], draw: Callable[[], Pictures]) -> str:
    """Writes table.json, table.md, report.html and, where the table asks for a chart, chart.png; returns table.md.

    draw: gives the pictures of the report, once the numbers are written: none that fails loses them.
    """
    text = markdown(described)
    write_json(folder / TABLE_JSON, described)
    write_text(folder / TABLE_TEXT, text + "\n")
    write_report(folder / PAGE, described, draw())
    write_chart(folder / CHART_FILE, described)
    return text


def sample(table: Table, why: Mapping[str, str]) -> None:
    """Samples what is not there yet. why: of rows that are left out, the reason."""
    rows = [row for name, row in table.rows.items() if name not in why]
    named = titles(table)
    with progress_bar(len(rows), "rows", "row") as progress:
        for number, row in enumerate(rows, 1):
            if dist_util.is_main():
                _log.info("row %d of %d, %s: %s, %s, %d images", number, len(rows), row.name, named[row.name],
                          sampler(row.run), row.images)
            progress.note(row.name)
            row.sample()
            progress.update()


def pictures(table: Table, why: Mapping[str, str]) -> Pictures:
    """Returns the first images of every row, and what the first row whose guidance reads attention attends to."""
    sampled = {name: row for name, row in table.rows.items() if name not in why}
    named, grids = titles(table), []
    for section in table.sections:
        rows = {named[name]: BatchFile(sampled[name].run.samples).first(SHOWN_IMAGES)
                for name in section.rows if name in sampled}
        if rows:
            grids.append((section.title, rows))
    guided = next((row for row in sampled.values() if attention_method(row.run) is not None), None)
    overlays = []
    if guided is not None:
        image_ids = range(min(OVERLAID, guided.images))
        overlays.append((f"{guided.name}: the predicted image, and where the tokens receive more attention than "
                         f"average, over time; images {', '.join(map(str, image_ids))}",
                         overlay_strip(guided.run, image_ids)))
    return Pictures(grids, overlays)


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """Holds the table's folder for this job, with a folder for features that has nothing half made in it."""
    check_folder("--out", folder)
    with locked(folder):
        features = check_folder("--out", folder / FEATURES)
        for left in features.glob(".*"):         # of an evaluation that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def made_here() -> dict[str, Any]:
    """Returns what results say of this job: its command, version, device and number of ranks."""
    return {"command": command_line(), "version": __version__, "device": dist_util.device_name(),
            "ranks": dist_util.world_size()}


def launch(options: WorkOptions) -> int | None:
    """Starts this very command on `--ranks` ranks and returns its exit code; None where that is not asked for.

    Raises UserError where a launcher has started another number of ranks.
    """
    ranks, here = options.ranks, dist_util.world_size()
    if options.plan or ranks in (None, here):
        return None
    if here > 1:
        raise UserError(f"--ranks {ranks}: the launcher has started {here}")
    by_mpi = shutil.which("mpiexec") and importlib.util.find_spec("mpi4py")
    launcher = ["mpiexec", "-n"] if by_mpi else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    threads = str(max(1, usable_cores() // ranks))
    python = [sys.executable] if by_mpi else []
    with resumable():
        return subprocess.call([*launcher, str(ranks), *python, *sys.argv],
                               env={"OMP_NUM_THREADS": threads, **os.environ})
