"""The picture of an evaluation.

It shows precision against recall, distances to the nearest neighbours, and the images of the highest and the lowest
realism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.files import check_ending
from guided_diffusion.pictures import distinct_names

from .metrics import METRICS, Comparison, FileFeatures
from .plots import SUFFIXES, add_legend, new_figure, require_matplotlib, save_figure

PRECISION, RECALL = METRICS["precision"], METRICS["recall"]         # the axes
SHOWN = 10                      # images of the highest, and as many of the lowest realism


def check_plot(path: str) -> None:
    """Raises UserError where the file format of `--plot` is unknown, or where matplotlib is missing."""
    check_ending("--plot", path, *SUFFIXES)
    require_matplotlib("--plot needs")


@dataclass(frozen=True)
class PlottedFile:
    """What the picture of an evaluation shows of one sample file.

    intervals: those of precision and recall, where both were resampled. distances: (N,), from each sample to its
    nearest reference feature. best, worst: images (n, H, W, 3) uint8 of the highest and the lowest realism.
    """

    name: str
    precision: float
    recall: float
    intervals: tuple[tuple[float, float], tuple[float, float]] | None
    distances: np.ndarray
    best: np.ndarray
    worst: np.ndarray


def shown_names(samples: Sequence[FileFeatures]) -> list[str]:
    """What pictures call sample files: folder and file, or the whole path where two of them are called the same."""
    return distinct_names(("/".join(sample.file.path.parts[-2:]), str(sample.file.path)) for sample in samples)


def plotted_file(name: str, sample: FileFeatures, comparison: Comparison, result: Mapping[str, Any]) -> PlottedFile:
    """Looks up what the picture shows of a sample file.

    name: what it is called there. result: its result, for the intervals that were resampled.
    """
    ranked = np.argsort(-comparison.neighbourhoods.realism, kind="stable").tolist()
    images = sample.file.pick(ranked[:SHOWN] + ranked[:-SHOWN - 1:-1])
    best, worst = np.split(images, 2)
    bounds = result.get("intervals95", {})
    both = {PRECISION.word, RECALL.word} <= bounds.keys()
    intervals = (bounds[PRECISION.word], bounds[RECALL.word]) if both else None
    return PlottedFile(name, PRECISION.value(comparison), RECALL.value(comparison), intervals,
                       comparison.neighbourhoods.sample_distance, best, worst)


def plot_evaluation(path: str | Path, files: Sequence[PlottedFile], reference_distances: np.ndarray, title: str,
                    ) -> None:
    """Writes the picture of an evaluation to `path`.

    reference_distances: (M,), from each reference feature to its nearest other one.
    """
    with new_figure(11, 4.4 + 1.7 * len(files)) as figure:
        figure.suptitle(title, fontsize=10)
        grid = figure.add_gridspec(1 + len(files), 2, height_ratios=[4.4] + [1.7] * len(files))
        _plot_precision_recall(figure.add_subplot(grid[0, 0]), files)
        _plot_distances(figure.add_subplot(grid[0, 1]), files, reference_distances)
        for row, file in enumerate(files, start=1):
            for column, (images, word) in enumerate(((file.best, "most"), (file.worst, "least"))):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(_side_by_side(images))
                axes.set_axis_off()
                axes.set_title(f"{file.name}: the {len(images)} {word} realistic", fontsize=9, loc="left")
        save_figure(figure, path)


def _plot_precision_recall(axes: Any, files: Sequence[PlottedFile]) -> None:
    drawn = []
    for file in files:
        bars = {}
        if file.intervals is not None:
            (low_p, high_p), (low_r, high_r) = file.intervals
            bars = {"xerr": [[max(0, file.recall - low_r)], [max(0, high_r - file.recall)]],
                    "yerr": [[max(0, file.precision - low_p)], [max(0, high_p - file.precision)]]}
        drawn.append(axes.errorbar([file.recall], [file.precision], fmt="o", capsize=3, **bars))
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel=RECALL.label, ylabel=PRECISION.label,
             title=f"{PRECISION.title} against {RECALL.label}")
    axes.grid(alpha=0.3)
    add_legend(axes, drawn, [file.name for file in files], fontsize=8, loc="lower left")


def _plot_distances(axes: Any, files: Sequence[PlottedFile], reference: np.ndarray) -> None:
    longest = max(np.quantile(one, 0.995) for one in (reference, *(file.distances for file in files)))
    bins = np.linspace(0, max(longest, 1e-12), 60)
    drawn = [axes.hist(reference, bins, density=True, color="0.8")[2][0]]
    drawn += [axes.hist(file.distances, bins, density=True, histtype="step")[2][0] for file in files]
    axes.set(xlabel="distance to the nearest reference feature", ylabel="density", title="Nearest neighbours")
    add_legend(axes, drawn, ["reference to reference", *(file.name for file in files)], fontsize=8)


def _side_by_side(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) side by side on white."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)
