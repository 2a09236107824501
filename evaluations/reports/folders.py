"""What the commands leave in folders, read as the content of a page: one function for each kind of folder."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guided_diffusion.adapters.run import LatentRun
from guided_diffusion.build import DiffusionOptions
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import without_secrets
from guided_diffusion.files import reason
from guided_diffusion.foreign import read_json
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.jobs import JobState, read_state
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, option_fields
from guided_diffusion.progress import clock, in_bytes, plural
from guided_diffusion.runs.comparison import class_words
from guided_diffusion.runs.options import SampleOptions
from guided_diffusion.runs.previews import GRIDS
from guided_diffusion.runs.record import READ_ERRORS, active_guidance, finished_run, recorded_command, sampler_title
from guided_diffusion.sampling import SAMPLERS
from guided_diffusion.training.folder import Record

from ..early_fid import COLUMN
from ..metrics import METRICS
from ..plots import require_matplotlib
from ..reproduction.charts import line_chart
from ..reproduction.reproduce import PAGE
from ..reproduction.wording import UNKNOWN, decimals, machine, written, written_count, written_interval
from .content import Content, Drawing, ShownChart, ShownTable, ShownText

SNAPSHOTS = 4                   # pictures of samples while a network was trained
MOST_IMAGES, MOST_DRAWINGS, MOST_LINES, MOST_ROWS = 64, 24, 400, 200
TEXTS, TABLES, DRAWN = (".md", ".txt"), (".csv",), (".png",)
LOSSES = ("loss", "val_loss", "mse", "val_mse", "vb", "val_vb", "acc@1", "val_acc@1")       # that a chart shows


# Sampling runs and likelihoods


def of_samples(folder: Path) -> Content:
    """The content of the folder of a finished sampling run."""
    path, configuration, guidance = finished_run(folder)
    record, file = read_json(folder / "run.json"), BatchFile(path)
    images = file.first(MOST_IMAGES)
    numbers = [str(number) for number in range(len(images))]
    if file.labels is not None:
        words = class_words(configuration, map(int, file.labels[:len(images)]))
        numbers = [f"{number}: {word}" for number, word in zip(numbers, words, strict=True)]
    return Content(
        f"{folder.resolve().name}: {guidance}", [
            ("guidance", guidance), *_sampler(configuration), *_model(configuration, record),
            ("images", f"{len(file):,} of {file.resolution}, seed {configuration.get('seed')}"), *_made(record)],
        _command(record), images, numbers, len(file), [*_measured(folder, record), *_changed(configuration)],
        options=_options(configuration), files=_files(folder))


def of_likelihood(folder: Path) -> Content:
    """The content of the folder of measured likelihoods."""
    record = read_json(folder / "run.json", lambda found: bool(found["bits_per_dimension"].items()))
    configuration = record["configuration"]
    values = record["bits_per_dimension"]
    rows = [[name.removesuffix("_bpd"), *(_number(found.get(key)) for key in ("mean", "low", "high"))]
            for name, found in values.items() if isinstance(found, dict)]
    return Content(
        f"{folder.resolve().name}: bits per dimension", [*_model(configuration, record), *_made(record)],
        _command(record), tables=[ShownTable("Bits per dimension", [
            ("term", ""), ("mean", ""), ("from", "95 % interval"), ("to", "")], rows)] if rows else [],
        charts=_chart_of("terms.csv", _read_rows(folder / "terms.csv"), "step",
                         lambda name: not name.endswith(("_low", "_high", "_step")), "bits per dimension"),
        options=_options(configuration), files=_files(folder))


def _sampler(configuration: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "diffusion_steps" in configuration:
        yield "sampler", sampler_title(configuration)
    elif "steps" in configuration:
        yield "sampler", f"{configuration.get('sampler')}, {_counted(configuration['steps'], 'step')}"


def _model(configuration: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    path = str(configuration.get("model_path") or configuration.get("pipeline") or "")
    digests = record["sha256"] if isinstance(record.get("sha256"), dict) else {}
    digest = str(digests.get("model") or digests.get("pipeline") or "")
    name = configuration.get("model") or Path(path).name
    yield "model", without_secrets(str(name)) + (f", sha256 {digest[:16]}" if digest else "")


def _made(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What run.json says of the time, the device and the version."""
    timing = record.get("timing") or {}
    chunks = [chunk for chunk in timing.get("chunks", []) if chunk.get("seconds")]
    if timing.get("seconds"):
        seconds = sum(chunk["seconds"] for chunk in chunks)
        images = sum(chunk["images"] for chunk in chunks)
        speed = f", {written_count(images / seconds)} images/s of a rank" if seconds else ""
        yield "time", f"{clock(timing['seconds'])} from the last start to the end{speed}"
    yield "made by", (f"version {record.get('versions', {}).get('guided_diffusion', 'unknown')} on "
                      f"{machine(record) or UNKNOWN}")


def _command(record: Mapping[str, Any]) -> str:
    return shlex.join(recorded_command(record))


def _changed(configuration: Mapping[str, Any]) -> Iterator[ShownTable]:
    """The options of sampling, and of guidance that is on, that are not as they are by default."""
    guidance = list(map(type, active_guidance(configuration)))
    classes: list[type[Options]] = [DiffusionOptions, *SAMPLERS.values(), *guidance, SampleOptions]
    if "pipeline" in configuration:
        classes = [kind for kind in LatentRun.classes() if kind in guidance or not issubclass(kind, GuidanceOptions)]
    defaults = {field.name: field.default for cls in classes for field in option_fields(cls)
                if cls is not DiffusionOptions or field.name == "timestep_respacing"}
    rows = [[name, shown(value), shown(defaults[name])] for name, value in configuration.items()
            if name in defaults and value != defaults[name]]
    if rows:
        yield ShownTable("Options that differ from their defaults",
                         [("option", ""), ("value", ""), ("default", "")], rows, words=True)


def _measured(folder: Path, record: Mapping[str, Any]) -> Iterator[ShownTable]:
    """What was measured of these samples, as far as it lies in the folder or in the one around it."""
    digest = record.get("sha256", {}).get("samples")
    for path in sorted([*folder.glob("*.json"), *folder.resolve().parent.glob("*.json")]):
        with suppress(UserError, *READ_ERRORS):         # of files that are something else
            found = read_json(path, lambda content: isinstance(content, list | dict))
            if isinstance(found, list):
                yield from _evaluated(path, found, digest)
            elif "sections" in found:
                yield from _in_table(path, found, digest)


def _evaluated(path: Path, results: Sequence[Any], digest: Any) -> Iterator[ShownTable]:
    """The results of the evaluator that are of the samples of this digest."""
    for result in results:
        if not isinstance(result, dict) or result.get("sample", {}).get("sha256") != digest or "metrics" not in result:
            continue
        network, bounds = result["backend"].get("features_of", ""), result.get("intervals95", {})
        rows = [_metric_row(METRICS[word].by(network).label, value, bounds.get(word))
                for word, value in result["metrics"].items() if word in METRICS]
        reference = Path(str(result["reference"]["file"])).name
        yield ShownTable("Metrics", [("metric", ""), ("value", ""), ("95 % interval", "")], rows,
                         f"Against {reference}, by {result['backend']['name']}; from {path.name}.")


def _in_table(path: Path, results: Mapping[str, Any], digest: Any) -> Iterator[ShownTable]:
    """The numbers of a table that are of the samples of this digest."""
    names = [name for name, row in results["rows"].items() if row.get("sha256") == digest]
    for section in results["sections"]:
        for row in section["rows"]:
            if row["row"] in names and row["metrics"]:
                network = results.get("features_of", "")
                yield ShownTable("Metrics", [("metric", ""), ("value", ""), ("95 % interval", "")], [
                    _metric_row(METRICS[word].by(network).label, number["value"], number["interval95"])
                    for word, number in row["metrics"].items() if word in METRICS],
                    f"{section['images']:,} images, from {path.name}: {results['title']}.")
                return


def _metric_row(label: str, value: float | None, bounds: Sequence[float] | None) -> list[str]:
    places = decimals(bounds, value)
    return [label, "none" if value is None else written(value, places), written_interval(bounds, places) or "none"]


# Trainings


def of_training(folder: Path) -> Content:
    """The content of the folder of a training."""
    record = Record.read(folder) or Record({}, {})
    log = "progress.csv"
    rows = _read_rows(folder / log)
    job = _job(folder)
    facts = [("data", without_secrets(str(record.training.get("data_dir", "unknown")))), *_ended(job)]
    if rows:
        last = rows[-1]
        facts += [("trained", f"{_counted(last.get('step'), 'step')}, {_counted(last.get('samples'), 'image')}, at "
                   f"last {_counted(last.get('images_per_second'), 'image')}/s"), *_losses(last)]
    facts += [("classes", f"{len(record.classes)}")] if record.classes else []
    facts += [("ranks", str(record.ranks))] if record.ranks else []
    charts = [*_chart_of(log, rows, "step", lambda name: name in LOSSES, "loss"),
              *_chart_of(log, rows, "step", lambda name: bool(COLUMN.fullmatch(name)), "metric")]
    return Content(f"{folder.resolve().name}: training", facts, job.command if job else "", charts=charts, drawings=[
        replace(_drawing(path), caption=f"Samples at step {path.stem}") for path in _snapshots(folder / GRIDS)],
        options=_options(record.options), files=_files(folder))


def _snapshots(folder: Path) -> list[Path]:
    """The pictures of samples of a training from the first to the last, SNAPSHOTS of them at most."""
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if len(paths) <= SNAPSHOTS:
        return paths
    return [paths[round(place * (len(paths) - 1) / (SNAPSHOTS - 1))] for place in range(SNAPSHOTS)]


def _losses(row: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in LOSSES:
        if row.get(name):
            yield f"last {name}", row[name]


# Studies, and whatever else has texts, tables and pictures


def of_study(folder: Path) -> Content:
    """The content of a folder of texts, tables and pictures."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    texts = [ShownText(path.name, list(_paragraphs(path))) for path in paths if path.suffix in TEXTS]
    tables = [_table(path, rows) for path in paths if path.suffix in TABLES and (rows := _read_rows(path))]
    drawn = [path for path in paths if path.suffix in DRAWN]
    job = _job(folder)
    facts = [("folder", str(folder)), *_ended(job)]
    if len(drawn) > MOST_DRAWINGS:
        facts.append(("pictures", f"the first {MOST_DRAWINGS} of {len(drawn)}"))
    name = folder.resolve().name
    return Content(f"{name}: {job.job}" if job else name, facts, job.command if job else "", data=tables, texts=texts,
                   drawings=[_drawing(path) for path in drawn[:MOST_DRAWINGS]], options=_config(folder),
                   files=_files(folder))


def _paragraphs(path: Path) -> Iterator[str | ShownTable]:
    """The paragraphs of the first lines of a text, and the tables where it is Markdown."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for kind, part in groupby(lines[:MOST_LINES], lambda line: line[:1] if line[:1] in ("", "|") else "text"):
        rows = list(part)
        if kind == "|" and len(rows) > 2:
            head, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
            yield ShownTable(path.name, [(title, "") for title in head], body)
        elif kind:
            yield "\n".join(row.lstrip("# ") for row in rows)
    if len(lines) > MOST_LINES:
        yield f"... and {_counted(len(lines) - MOST_LINES, 'more line')}"


def _table(path: Path, rows: Sequence[Mapping[str, str]]) -> ShownTable:
    note = f"The first {MOST_ROWS} of {len(rows)} rows." if len(rows) > MOST_ROWS else ""
    return ShownTable(path.name, [(name, "") for name in rows[0]], [
        [str(value) for value in row.values()] for row in rows[:MOST_ROWS]], note)


def _drawing(path: Path) -> Drawing:
    with Image.open(path) as picture:
        return Drawing(path.name, np.asarray(picture.convert("RGB")))


def _config(folder: Path) -> list[tuple[str, str]]:
    with suppress(UserError):
        return _options(read_json(folder / "config.json"))
    return []


# Parts of several


def _job(folder: Path) -> JobState | None:
    """What the last job of a folder said of itself, if there is such a word."""
    with suppress(UserError):
        return read_state(folder)
    return None


def _ended(job: JobState | None) -> Iterator[tuple[str, str]]:
    """How and when the last start ended, or that it has not."""
    if job is not None:
        yield "last start", f"{job.state} after {clock(job.written - job.began)}" + (f": {job.why}" if job.why else "")


def _options(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, shown(value)) for name, value in values.items()]


def shown(value: Any) -> str:
    """The value of an option as text."""
    if value is None or value == "":
        return "unset"
    return without_secrets(value if isinstance(value, str) else json.dumps(value))


def _files(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, in_bytes(path.stat().st_size)) for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.startswith(".") and path.name != PAGE]


def _counted(value: Any, unit: str) -> str:
    """So many units, like "1 step"; "? steps" where the value is no number."""
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        return f"{written_count(number)} {unit if number == 1 else plural(unit)}"
    return f"? {plural(unit)}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and not isinstance(value, bool) else "none"


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no such file. Raises UserError where it is damaged."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def _chart_of(name: str, rows: Sequence[Mapping[str, str]], x: str, wanted: Callable[[str], bool], y: str,
              ) -> list[ShownChart]:
    """The chart of the wanted columns of the rows of a file against column x; none where there is nothing to draw."""
    lines = {column: points for column in (rows[0] if rows else ()) if column != x and wanted(column)
             and (points := list(_points(rows, x, column)))}
    if not lines:
        return []
    require_matplotlib("the charts need")
    told = f"{y} by {x}: {', '.join(lines)}"
    return [ShownChart(f"{name}: {y} by {x}", line_chart(lines, x, y, told))]


def _points(rows: Iterable[Mapping[str, str]], x: str, y: str) -> Iterator[tuple[float, float]]:
    for row in rows:
        with suppress(ValueError, KeyError):
            point = float(row[x]), float(row[y])
            if all(map(math.isfinite, point)):
                yield point
