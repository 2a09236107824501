"""The table of depth-aware guidance: unguided, depth consistency (DCG), depth prior (DPG) and both, with their scales.

Every row is a sampling run of the same seed in a folder of its own, which goes on where it was stopped; then all rows
are evaluated as `scripts/depth_metrics.py` does it. All ranks sample, the first one evaluates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import __version__, dist_util
from guided_diffusion.build import build_model
from guided_diffusion.checkpoint import locate
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import write, write_json
from guided_diffusion.guidance import DagOptions, Networks
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, nearest, option
from guided_diffusion.runs.options import SampleOptions
from guided_diffusion.runs.sample import SamplingRun

from ..extractors.bundled import IMAGE_SIZE
from ..metrics import EQUAL, FeatureSet
from .features import DepthExtractor
from .metrics import DepthReference, compare, header, markdown, read_reference, real_sharpness

UNGUIDED = "unguided"
ROWS = (UNGUIDED, "dcg", "dpg", "both")
TERMS = ("dcg", "dpg")
SCALES = {"dcg_scale", "dpg_scale"}
DRAWN = {"dfid": "dFID", "fid": "FID", "sharpness": "edge sharpness, m / pixel"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableOptions(Options):
    """The table."""

    rows: str = option(",".join(ROWS), f"which rows, of {', '.join(ROWS)}; {UNGUIDED} is always there, as the others "
                       "are compared with it")
    sweep: str = option("", "also a row for each of these scales, of each term alone, like 0,10,20,40,80; unset: none")
    reference: str = option("scenes32", "real scenes to compare with: an .npz of 32x32 images, or scenes32, the "
                            "shipped held-out ones")
    bootstrap: int = option(1000, "resamplings for 95 % intervals", minimum=2)
    out: str = option("runs/dag_table", "folder for a folder of samples for each row, the table and the figures")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.wanted, self.scales        # which raise for what is not allowed

    @property
    def wanted(self) -> list[str]:
        """The rows in the order of ROWS."""
        words = self.rows.replace(" ", "").lower().split(",")
        for word in words:
            if word not in ROWS:
                raise UserError(f"--rows {self.rows}: {word!r} is none of {', '.join(ROWS)}{nearest(word, ROWS)}")
        return [row for row in ROWS if row in words or row == UNGUIDED]

    @property
    def scales(self) -> list[float]:
        """The scales of the sweep that are not 0, from small to large."""
        try:
            scales = [float(word) for word in self.sweep.split(",")] if self.sweep else []
        except ValueError:
            scales = [math.nan]
        if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
            raise UserError(f"--sweep {self.sweep}: must be scales from 0 up, comma-separated, like 0,10,20,40,80")
        if self.sweep and not any(scales):
            raise UserError(f"--sweep {self.sweep}: needs a scale above 0, as 0 is the row {UNGUIDED}")
        return sorted(set(scales) - {0.0})


@dataclass(frozen=True)
class TableSampleOptions(SampleOptions):
    """The sampling run of every row."""

    num_samples: int = option(2000, "number of images of every row", minimum=2)


@dataclass(frozen=True)
class Row:
    """A setting. name: of its folder."""

    name: str
    dcg_scale: float
    dpg_scale: float

    @property
    def title(self) -> str:
        terms = [f"{term} {scale:g}" for term, scale in (("DCG", self.dcg_scale), ("DPG", self.dpg_scale)) if scale]
        return " + ".join(terms) or "no depth-aware guidance"

    def run(self, run: SamplingRun, out: str | Path) -> SamplingRun:
        """`run` with the scales of this row, into its folder in `out`."""
        return run.changed(out=str(Path(out) / self.name), dcg_scale=self.dcg_scale, dpg_scale=self.dpg_scale)


def depth_options(run: SamplingRun) -> DagOptions:
    """The options of depth-aware guidance of a run."""
    return next(method for method in run.guidance if isinstance(method, DagOptions))


def table_rows(options: TableOptions, dag: DagOptions) -> list[Row]:
    """The rows of the table, then those of the sweep that are not among them; UserError where a scale is missing."""
    rows = []
    for name in options.wanted:
        scales = {term: getattr(dag, f"{term}_scale") if name in (term, "both") else 0.0 for term in TERMS}
        for term, scale in scales.items():
            if name in (term, "both") and not scale:
                raise UserError(f"--{term}_scale 0: must not be 0 for the row {name}; leave it out of --rows")
        rows.append(Row(name, scales["dcg"], scales["dpg"]))
    return rows + [row for row in _swept(options) if not _same(row, rows)]


def sweep_rows(options: TableOptions, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By term, the rows from scale 0 up; none without a sweep."""
    return {term: [rows[0], *(_same(row, rows) for row in _swept(options) if getattr(row, f"{term}_scale"))]
            for term in TERMS if options.scales}


def _swept(options: TableOptions) -> list[Row]:
    return [Row(f"{term}_{scale:g}", *(scale if term == this else 0.0 for this in TERMS))
            for term in TERMS for scale in options.scales]


def _same(row: Row, rows: Sequence[Row]) -> Row | None:
    """The one of `rows` with the scales of `row`."""
    scales = row.dcg_scale, row.dpg_scale
    return next((other for other in rows if (other.dcg_scale, other.dpg_scale) == scales), None)


def make_table(options: TableOptions, run: SamplingRun) -> str:
    """Samples what is missing, evaluates, writes table.md, table.json, table.png and, of a sweep, sweep.png.

    run: the sampling run that the rows vary. Called on all ranks; returns the table on rank 0, else "". Raises
    UserError for whatever is wrong with options and files, before the first image is sampled.
    """
    dist_util.setup_dist()
    with dist_util.together():
        rows = table_rows(options, depth_options(run))
        check(rows, run)
        evaluator = DepthExtractor()
        target = read_reference(options.reference, evaluator) if dist_util.is_main() else None
    paths = sample_rows(rows, run, options.out)
    with dist_util.together():
        return report(options, run, rows, paths, evaluator, target) if target is not None else ""


def check(rows: Sequence[Row], run: SamplingRun) -> None:
    """Raises UserError for what only the last row would meet, or the evaluation: before hours of sampling."""
    if run.model.image_size != IMAGE_SIZE:
        raise UserError(f"--image_size {run.model.image_size}: the judge of scenes reads {IMAGE_SIZE}x{IMAGE_SIZE}; "
                        "for other models sample with scripts/dag_sample.py and see scripts/depth_fid.py")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the figures need matplotlib: install the extra `eval`") from None
    guided = [depth_options(row.run(run, "")) for row in rows if row.dcg_scale or row.dpg_scale]
    if not guided or not run.sample.model_path:
        return
    with torch.device("meta"):
        model = build_model(run.model)
    for needs in {tuple(dag.files()): dag for dag in guided}.values():
        needs.check_files()
        needs.build(Networks(model, dist_util.dev(), run.sample.seed))
    guided[0].check({"model_path": sha256_of(locate(run.sample.model_path))})


def sample_rows(rows: Sequence[Row], run: SamplingRun, out: str | Path) -> dict[str, Path]:
    """The file of samples of each row, by its name; on ranks other than the first, none."""
    paths = {}
    for number, row in enumerate(rows, 1):
        if dist_util.is_main():
            _log.info("row %d of %d, %s: %s", number, len(rows), row.name, row.title)
        path = row.run(run, out).run()
        if path is not None:
            paths[row.name] = path
    return paths


def report(options: TableOptions, run: SamplingRun, rows: Sequence[Row], paths: Mapping[str, Path],
           evaluator: DepthExtractor, target: DepthReference) -> str:
    """Evaluates the files and writes all that the table consists of; returns its text."""
    out = Path(options.out)
    files = {name: BatchFile(path) for name, path in paths.items()}
    rows_features = {name: FeatureSet(evaluator.features(file)._asdict()) for name, file in files.items()}
    results = compare(target, rows_features, options.bootstrap)
    real = real_sharpness(target, options.bootstrap)
    described = {row.name: {**asdict(row), "samples": str(paths[row.name].relative_to(out)),
                            "sha256": files[row.name].sha256, "images": len(files[row.name]),
                            "metrics": results[row.name]} for row in rows}
    shared = {flag: value for flag, value in run.configuration().items() if flag not in SCALES}
    write_json(out / "table.json", {
        "reference": {"file": target.file, "images": target.features.count, "sharpness": real},
        **evaluator.description(),
        "bootstrap": options.bootstrap, "rows": described, "version": __version__,
        "configuration": shared})
    text = _text(rows, run, options, header(evaluator, target), markdown(results, real))
    write(out / "table.md", lambda file: file.write_text(text))
    draw_rows(out / "table.png", results, real)
    if options.scales:
        draw_sweep(out / "sweep.png", sweep_rows(options, rows), results, real)
    return text


def _text(rows: Sequence[Row], run: SamplingRun, options: TableOptions, networks: str, tables: str) -> str:
    settings = "".join(f"- {row.name}: {row.title}\n" for row in rows)
    model = run.sample.model or Path(run.configuration()["model_path"]).name
    steps = run.diffusion.timestep_respacing or run.diffusion.diffusion_steps
    return (f"{model}, {run.sample.num_samples} images a row, "
            f"seed {run.sample.seed}, {steps} steps of {'DDIM' if run.sample.use_ddim else 'DDPM'}. In brackets 95 % "
            f"intervals by {options.bootstrap} resamplings; where that of a difference holds 0, there is {EQUAL}.\n\n"
            f"{settings}\n```\n{networks}\n```\n\n{tables}\n")


# Figures


def draw_rows(path: Path, results: Mapping[str, dict[str, Any]], real: dict[str, Any]) -> None:
    """Every row's numbers with their intervals."""
    figure = _figure(12, 1.6 + 0.35 * len(results))
    places, names = range(len(results)), list(results)
    for axes, (word, title) in zip(figure.subplots(1, len(DRAWN), sharey=True), DRAWN.items(), strict=True):
        values, errors = _with_errors([results[name][word] for name in names])
        axes.errorbar(values, places, xerr=errors, fmt="o", capsize=3)
        axes.axvline(values[0], color="0.6", linestyle="--", linewidth=1)
        if word == "sharpness":
            axes.axvline(real["value"], color="tab:green", label="real scenes")
            axes.legend(fontsize=8)
        axes.set(yticks=list(places), yticklabels=names, xlabel=title)
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    write(path, lambda file: figure.savefig(file, dpi=120))


def draw_sweep(path: Path, sweep: Mapping[str, Sequence[Row]], results: Mapping[str, dict[str, Any]],
               real: dict[str, Any]) -> None:
    """The numbers against the scale, with their intervals."""
    figure = _figure(12, 3.8)
    for axes, (word, title) in zip(figure.subplots(1, len(DRAWN)), DRAWN.items(), strict=True):
        for term, rows in sweep.items():
            values, errors = _with_errors([results[row.name][word] for row in rows])
            axes.errorbar([getattr(row, f"{term}_scale") for row in rows], values, yerr=errors, marker="o", capsize=3,
                          label=term.upper())
        if word == "sharpness":
            axes.axhline(real["value"], color="tab:green", label="real scenes")
        axes.set(xlabel="scale", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=120))


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _with_errors(numbers: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    values = [number["value"] for number in numbers]
    bounds = [number["interval95"] for number in numbers]
    return values, [[max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
                    [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]]
