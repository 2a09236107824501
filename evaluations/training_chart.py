"""A chart of trainings: values of their logs, such as the loss, against images seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.logger import read_log
from guided_diffusion.options import Options, comma_separated, option, required
from guided_diffusion.pictures import distinct_names

from .plots import SUFFIXES, add_legend, new_figure, plain_numbers, require_matplotlib, save_figure

LOG = logging.getLogger(__name__)

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


def read_curves(path: str, columns: Sequence[str], name: str) -> list[Curve]:
    """The curves of a log, progress.csv of a training or a copy, one for each of the columns in which it has values.

    name: what they are called, before the column where there are several. Raises UserError for a file that is no such
    log, or has no value in any of them.
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
    return [Curve(name if len(columns) == 1 else f"{name}: {column}", *map(list, zip(*points, strict=True)))
            for column, points in found.items()]


def log_name(path: str) -> str:
    """What the chart calls a log: by the folder of its training, or by the name of a copy."""
    place = Path(path).resolve()
    return (place.parent.name if place.stem == "progress" else place.stem.removesuffix("_train")) or path


def _shown(curve: Curve, log_y: bool) -> Curve:
    """The curve's points that the axes have a place for; how many others there are is said.

    Raises UserError where it has no other ones.
    """
    lowest = 0 if log_y else -math.inf
    points = [point for point in zip(curve.samples, curve.values, strict=True)
              if 0 < point[0] < math.inf and lowest < point[1] < math.inf]
    if left := len(curve.values) - len(points):
        text = (f"{curve.name}: {left} of {len(curve.values)} points cannot be drawn, as the images seen must be above "
                f"0 and the values {'above 0, for --log_y True' if log_y else 'finite numbers'}")
        if not points:
            raise UserError(text)
        LOG.warning(text)
    return Curve(curve.name, *map(list, zip(*points, strict=True)))


def draw_trainings(paths: Sequence[str], options: TrainingChartOptions) -> str:
    """Draws the logs; returns where the chart is.

    Raises UserError as `read_curves`, for a curve that the axes cannot show, and for a file that it cannot write.
    """
    check_writable("--out", options.out)
    check_ending("--out", options.out, *SUFFIXES)
    require_matplotlib("the chart needs")
    columns = list(comma_separated(options.values))
    names = distinct_names((log_name(path), path) for path in paths)
    curves = [_shown(curve, options.log_y) for path, name in zip(paths, names, strict=True)
              for curve in read_curves(path, columns, name)]
    with new_figure(8, 4.5) as figure:
        axes = figure.add_subplot()
        drawn = [axes.plot(curve.samples, curve.values, "-" if len(curve.values) > 1 else "o", linewidth=1.3)[0]
                 for curve in curves]
        axes.set(xlabel="images seen", ylabel=", ".join(columns), xscale="log")
        plain_numbers(axes.xaxis)
        if options.log_y:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3, which="both")
        add_legend(axes, drawn, [curve.name for curve in curves], fontsize=9)
        save_figure(figure, options.out)
    return f"chart: {options.out}"
