"""A picture of samples beside the reference images that are most like them: what memorised images look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from guided_diffusion.pictures import save_comparison

from .evaluation_plot import shown_names
from .metrics import FileFeatures
from .metrics.arrays import slices
from .metrics.comparison import Feature
from .metrics.distances import centred_points, precise_squared_distances

SHOWN, NEIGHBOURS = 10, 2
AT_ONCE = 256           # samples whose distances are in memory


class Neighbours(NamedTuple):
    """Samples, the nearest first, each with the reference images that are most like it."""

    samples: np.ndarray         # (n,) their places in the file
    reference: np.ndarray       # (n, NEIGHBOURS) places in the reference, the nearest first


def nearest_neighbours_of(reference: np.ndarray, sample: np.ndarray) -> Neighbours:
    """Finds the SHOWN samples whose features lie nearest to those of a reference image, with their NEIGHBOURS nearest.

    Distances are those of float64: single precision tells nothing apart beside an image that lies millions of times as
    far. reference: (N, D), sample: (M, D). Of fewer samples or reference images all are taken.
    """
    real, generated = centred_points(reference, sample)
    found, least = np.empty((len(sample), min(NEIGHBOURS, len(reference))), np.intp), np.empty(len(sample))
    for rows in slices(len(sample), AT_ONCE):
        squared = precise_squared_distances(generated.take(rows), real)
        order = np.argsort(squared, axis=1, kind="stable")
        found[rows], least[rows] = order[:, :found.shape[1]], squared.min(axis=1)
    chosen = np.argsort(least, kind="stable")[:SHOWN]
    return Neighbours(chosen, found[chosen])


def draw_nearest(path: str, reference: FileFeatures, samples: Sequence[FileFeatures]) -> None:
    """Draws for each file the samples that lie nearest to the reference, above the images that they are nearest to."""
    rows = {}
    for name, sample in zip(shown_names(samples), samples, strict=True):
        found = nearest_neighbours_of(reference[Feature.POOLED], sample[Feature.POOLED])
        rows[f"{name}: the images that lie nearest to {reference.file.path.name}"] = sample.file.pick(
            found.samples.tolist())
        for number, column in enumerate(found.reference.T, 1):
            rows[f"{name}: their neighbour {number} there"] = reference.file.pick(column.tolist())
    save_comparison(rows, path, SHOWN)
