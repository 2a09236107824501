"""A chart of trainings: values of their logs, such as the loss, against images seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.logger import read_log
from guided_diffusion.options import Options, comma_separated, option, required

from .plots import SUFFIXES, new_figure, plain_numbers, require_matplotlib, save_figure

SAMPLES = "samples"         # the column of images seen


@dataclass(frozen=True)
class TrainingChartOptions(Options):
    """The chart."""

    out: str = required(f"file to write, ending in {', '.join(SUFFIXES)}")
    values: str = option("loss", "columns of the logs, comma-separated; those that a log lacks are left out of it")
    log_y: bool = option(False, "a logarithmic axis of the values")


class Curve(NamedTuple):
    """A line of the chart: its name, images seen and values."""

    name: str
    samples: list[float]
    values: list[float]


def read_curves(path: str, columns: Sequence[str]) -> list[Curve]:
    """The curves of a log, progress.csv of a training or a copy, one for each of the columns in which it has values.

    Raises UserError for a file that is no such log, or has no value in any of them.
    """
    there, rows = read_log(Path(path))
    try:
        found = {column: points for column in columns if column in there
                 and (points := [(float(row[SAMPLES]), float(row[column])) for row in rows if row[column]])}
    except (ValueError, KeyError):
        raise UserError(f"{path}: is not the log of a training with the images seen, in a column {SAMPLES}") from None
    if not found:
        raise UserError(f"--values {','.join(columns)}: {path} has no value in such columns; it has "
                        f"{', '.join(there) if rows else 'no row'}")
    place = Path(path)
    name = place.parent.name if place.stem == "progress" else place.stem.removesuffix("_train")
    return [Curve(name if len(columns) == 1 else f"{name}: {column}", *map(list, zip(*points, strict=True)))
            for column, points in found.items()]


def draw_trainings(paths: Sequence[str], options: TrainingChartOptions) -> str:
    """Draws the logs; returns where the chart is.

    Raises UserError as `read_curves`, and for a file that it cannot write.
    """
    check_writable("--out", options.out)
    check_ending("--out", options.out, *SUFFIXES)
    require_matplotlib("the chart needs")
    columns = list(comma_separated(options.values))
    curves = [curve for path in paths for curve in read_curves(path, columns)]
    with new_figure(8, 4.5) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(curve.samples, curve.values, label=curve.name, linewidth=1.3)
        axes.set(xlabel="images seen", ylabel=", ".join(columns), xscale="log")
        plain_numbers(axes.xaxis)
        if options.log_y:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=9)
        save_figure(figure, options.out)
    return f"chart: {options.out}"
