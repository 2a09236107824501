"""The whole of a table: checked, planned, sampled, evaluated and reported. All ranks call `reproduce` together."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import __version__, dist_util
from guided_diffusion.checkpoint import locate
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import write, write_json
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, option
from guided_diffusion.runs.shards import locked

from ..attention.study import attention_method, overlay_strip
from ..evaluation import EvaluatorOptions, ExtractorOptions, check_reference
from ..extractors import find_extractor
from ..extractors.inception_graph import find_graph
from ..metrics import METRICS as KNOWN_METRICS
from ..references import find_reference
from .missing import missing_files
from .plan import plan
from .report import Pictures, markdown, write_report
from .results import Circumstances, measure, results, sampler, title
from .tables import METRICS, Row, Table, in_folder, load_table, table_names

FEWEST = max(KNOWN_METRICS[word].smallest_count for word in METRICS)
SHOWN = 12                      # images of each row in the report
FEATURES = "features"           # folder of what the networks saw, in that of a table
OVERLAID = 4                    # images whose attention is shown

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReproduceOptions(Options):
    """The table."""

    rows: str = option("", "which rows, comma-separated; unset: all")
    plan: bool = option(False, "say what the table costs and what is missing, and stop there")
    num_samples: int | None = option(None, f"images of every row, in place of the published number (which makes the "
                                     f"numbers not comparable); at least {FEWEST}", minimum=1)
    ranks: int | None = option(None, "number of ranks, which are started by mpiexec (or torchrun, where mpi4py is "
                               "missing) unless a launcher has done so; unset: those of the launcher", minimum=1)
    evaluation_seconds: float | None = option(None, "for the plan: seconds that your device takes for one evaluation "
                                              "of one image; unset: measured on this one", above=0)
    out: str = option("runs/reproduction", "folder for a folder of each table, with its samples, numbers and report")
    models: str = option("models", "folder of the checkpoints")
    references: str = option("references", "folder of the reference batches")
    reference: str = option("", "another reference batch for all rows (which makes the numbers not comparable)")
    heads: str = option("", "attention heads for all rows: exact or official; unset: as the rows have it",
                        choices=("", "exact", "official"))
    batch_size: int | None = option(None, "images at a time on each rank; unset: as the rows have it", minimum=1)
    inception: str = option("", "the official classify_image_graph_def.pb; unset: from the cache, else downloaded")
    bootstrap: int = option(200, "resamplings for 95 % intervals", minimum=2)
    allow_missing: bool = option(False, "leave out rows whose checkpoint or reference is missing: they are `not run "
                                 "here` in the table")


def choose(words: Sequence[str], options: ReproduceOptions) -> tuple[Table, dict[str, list[str]]]:
    """The table that was named, as the options change it, and for each row in what it is not as its file has it."""
    if len(words) != 1:
        raise UserError(f"{len(words)} tables given: name one of {', '.join(table_names())}")
    table = load_table(words[0]).chosen(options.rows)
    table = in_folder(table, Path(options.out) / table.name, options.num_samples)
    changed: dict[str, list[str]] = {name: [] for name in table.rows}
    rows = {}
    for name, row in table.rows.items():
        values: dict[str, Any] = {} if options.batch_size is None else {"batch_size": options.batch_size}
        for flag, file in row.run.checkpoints().items():
            path = Path(file)
            if path.parts[:1] == ("models",):
                values[flag] = str(Path(options.models).joinpath(*path.parts[1:]))
        row = row.changed(**values)
        if options.heads:
            guidance = tuple(method.with_heads(options.heads) for method in row.run.guidance)
            row = replace(row, run=replace(row.run, guidance=guidance))
        if options.reference:
            if Path(options.reference).name != row.evaluation.reference:
                changed[name].append(f"reference {Path(options.reference).name}, published with "
                                     f"{row.evaluation.reference or 'an unknown one'}")
            row = replace(row, evaluation=replace(row.evaluation, reference=options.reference))
        rows[name] = row
    return replace(table, rows=rows), changed


def reproduce(words: Sequence[str], options: ReproduceOptions) -> str:
    """Does what the options say; returns the plan or the table on rank 0, else "".

    Every sampling run, and the features of every sample file, lie in the folder of the table, where the same command
    goes on. Raises UserError for whatever is wrong with names, options and files, before the first image is sampled.
    """
    table, changed = choose(words, options)
    if options.plan:
        ranks = options.ranks or dist_util.world_size()
        return plan(table, options.references, options.inception, ranks, options.evaluation_seconds) \
            if dist_util.is_main() else ""
    dist_util.setup_dist()
    folder = Path(options.out) / table.name
    how = Circumstances(Path(options.references), ExtractorOptions(inception=options.inception), options.bootstrap,
                        changed)
    with ExitStack() as stack:
        with dist_util.together():
            check(table)
            why = check_files(table, options)
            if dist_util.is_main():
                stack.enter_context(_prepared(folder))
        sample(table, why)
        numbers = measure(table, [name for name in table.rows if name not in why], how, folder / FEATURES)
        with dist_util.together():
            if numbers is None:
                return ""
            described = {**results(table, numbers, why, how), "command": _command(), "version": __version__,
                         "device": _device(), "ranks": dist_util.world_size()}
            return write_all(folder, described, pictures(table, why))


def write_all(folder: Path, described: dict[str, Any], shown: Pictures) -> str:
    """table.json, table.md and report.html; returns the text of the second."""
    text = markdown(described)
    write_json(folder / "table.json", described)
    write(folder / "table.md", lambda file: file.write_text(text + "\n"))
    write_report(folder / "report.html", described, shown)
    return text


# Before the work


def check(table: Table) -> None:
    """Raises UserError for what is wrong with the rows themselves."""
    for name, row in table.rows.items():
        if row.images < FEWEST:
            raise UserError(f"--num_samples {row.images}: row {name} needs at least {FEWEST} images, for precision and "
                            "recall")
    used = {name: method.heads for name, row in table.rows.items() for method in row.run.active if method.heads}
    if len(set(used.values())) > 1:
        pairs = ", ".join(f"{name} {mode}" for name, mode in used.items())
        raise UserError(f"{table.name}: mixes attention heads ({pairs}), so that its rows cannot be compared: pass "
                        "--heads exact or --heads official")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib: install the extra `eval`")


def check_files(table: Table, options: ReproduceOptions) -> dict[str, str]:
    """Of each row that cannot be run, why; UserError where that is not allowed, and for files that do not fit."""
    lacking = {name: missing_files(row, options.references, options.inception) for name, row in table.rows.items()}
    lacking = {name: [str(thing) for thing in things if thing.blocks] for name, things in lacking.items()}
    why = {name: "; ".join(things) for name, things in lacking.items() if things}
    if why and not options.allow_missing:
        things = list(dict.fromkeys(thing for name in why for thing in lacking[name]))
        raise UserError(f"{len(why)} of {len(table.rows)} rows cannot be run, files are missing: {'; '.join(things)} "
                        "(--plan True lists all; --allow_missing True goes on with the other rows)")
    digests: dict[str, str] = {}
    for name, row in table.rows.items():
        if name not in why:
            _check_reference(row, Path(options.references))
            if dist_util.is_main():
                _check_folder(row, digests)
    if dist_util.is_main() and any(
            find_extractor(row.evaluation.backend).is_inception for name, row in table.rows.items()
            if name not in why and row.evaluation.reference):
        find_graph(options.inception or None)
    return why


def _check_reference(row: Row, references: Path) -> None:
    if not row.evaluation.reference:
        return
    file, size = BatchFile(find_reference(row.evaluation.reference, references)), row.run.model.image_size
    if len(file) and file.shape[1:3] != (size, size):
        raise UserError(f"{file.path}: its images are {file.resolution}, those of row {row.name} {size}x{size}")
    check_reference(file, EvaluatorOptions(metrics=",".join(METRICS)), find_extractor(row.evaluation.backend))
    if 0 < len(file) < FEWEST:
        raise UserError(f"{file.path}: has {len(file)} images, at least {FEWEST} are needed")


def _check_folder(row: Row, digests: dict[str, str]) -> None:
    """Raises UserError where the row's folder holds the images of another configuration."""
    if not (row.run.out / "run.json").exists() and not (row.run.out / "shards").exists():
        return
    paths = row.run.checkpoints()
    for path in paths.values():
        if path not in digests:
            digests[path] = sha256_of(locate(path))
    row.run.check_folder({name: digests[path] for name, path in paths.items()})


# The work


def sample(table: Table, why: Mapping[str, str]) -> None:
    """Samples what is not there yet."""
    rows = [row for name, row in table.rows.items() if name not in why]
    for number, row in enumerate(rows, 1):
        if dist_util.is_main():
            _log.info("row %d of %d, %s: %s, %s, %d images", number, len(rows), row.name, title(row.run, table),
                      sampler(row.run), row.images)
        row.run.run()


def pictures(table: Table, why: Mapping[str, str]) -> Pictures:
    """The first images of every row, and what the first row whose guidance reads attention attends to."""
    sampled = {name: row for name, row in table.rows.items() if name not in why}
    grids = []
    for section in table.sections:
        rows = {title(sampled[name].run, table): BatchFile(sampled[name].run.samples).first(SHOWN)
                for name in section.rows if name in sampled}
        if rows:
            grids.append((section.title, rows))
    guided = next((row for row in sampled.values() if attention_method(row.run) is not None), None)
    overlays = []
    if guided is not None:
        numbers = range(min(OVERLAID, guided.images))
        overlays.append((f"{guided.name}: the predicted image, and where the tokens receive more attention than "
                         f"average, over time; images {', '.join(map(str, numbers))}",
                         overlay_strip(guided.run, numbers)))
    return Pictures(grids, overlays)


@contextmanager
def _prepared(folder: Path) -> Iterator[None]:
    """Holds the table's folder for this job, with a folder for features that has nothing half made in it."""
    try:
        (folder / FEATURES).mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for left in (folder / FEATURES).glob(".*"):         # of an evaluation that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None


def _command() -> str:
    return " ".join(["python", *sys.argv])


def _device() -> str:
    device = dist_util.dev()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores, {threads} thread{'s' * (threads > 1)} a rank"


def launch(options: ReproduceOptions) -> int | None:
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
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    python = [sys.executable] if by_mpi else []
    return subprocess.call([*launcher, str(ranks), *python, *sys.argv], env={"OMP_NUM_THREADS": threads, **os.environ})
