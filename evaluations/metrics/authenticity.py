"""Authenticity: which samples are farther from the training images than these are from each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import checked_pair, slices
from .bootstrap import Replicates, Statistic, bootstrap_replicates, unknown_replicates
from .distances import Points, centred_points, comparison_margin, precise_squared_distances, squared_distances

CANDIDATES = 4          # nearest ones in single precision, where that tells them, among which differences decide
FEWEST = 10             # samples on either side, below which a share moves by too few of them to tell how far


def authentic_samples(training: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Returns which samples are no copies of a training image, (M,) bool; the mean is the authenticity.

    training: (N, D), sample: (M, D), at least two images of each. With a the training image that is nearest to a
    sample, the sample counts where it is farther from a than the nearest other training image is from a. Exact copies
    never count. Distances are compared in float64. Raises UserError for shapes that do not fit, too few images, NaN or
    infinity. Source: Alaa et al. 2102.08921, section 3.
    """
    real, generated = centred_points(*checked_pair(training, sample, 1))
    nearest, squared = _nearest(generated, real)
    originals, which = np.unique(nearest, return_inverse=True)
    _, own = _nearest(real.take(originals), real, originals)
    return squared > own[which]


def _nearest(points: Points, others: Points, without: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of the others is nearest to each point, (n,) indices, and its squared distance, (n,) float64.

    without: (n,) index of one of the others that does not count. Of equally near ones the first is taken.
    """
    indices, squared = np.empty(len(points.given), np.intp), np.empty(len(points.given))
    kept = min(CANDIDATES, len(others.given) - (without is not None))
    for rows, block in squared_distances(points, others):
        for part in slices(len(block), 256):
            chosen = np.arange(rows.start + part.start, rows.start + part.stop)
            left_out = None if without is None else without[chosen]
            candidates, farthest, spread = _smallest(block[part], kept, left_out)
            near = points.take(chosen)
            unsure = np.flatnonzero(spread <= comparison_margin(near, farthest))
            if len(unsure) and kept < len(others.given):
                precise = precise_squared_distances(near.take(unsure), others)
                candidates[unsure] = _smallest(precise, kept, None if left_out is None else left_out[unsure])[0]
            own = near.given.astype(np.float64)
            exact = np.stack([np.square(others.given[column] - own).sum(axis=1) for column in candidates.T], axis=1)
            best = exact.argmin(axis=1)[:, None]
            indices[chosen] = np.take_along_axis(candidates, best, axis=1)[:, 0]
            squared[chosen] = np.take_along_axis(exact, best, axis=1)[:, 0]
    return indices, squared


def _smallest(block: np.ndarray, kept: int, without: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns which are the smallest of each row, (n, kept), their largest, and how far that is from the least, (n,).

    without: (n,) column that does not count; it is overwritten.
    """
    if without is not None:
        block[np.arange(len(block)), without] = np.inf
    columns = np.sort(np.argpartition(block, kept - 1, axis=1)[:, :kept], axis=1)
    values = np.take_along_axis(block, columns, axis=1)
    farthest = np.maximum(values.max(axis=1), 0)
    return columns, farthest, farthest - values.min(axis=1)


def share_replicates(statistic: Statistic, sizes: int | Sequence[int], estimate: float, replicates: int,
                     seed: int) -> Replicates:
    """Returns a share in percent of resampled images, as `bootstrap_replicates` does.

    The values are unknown, so that there is no interval, where fewer than ten images lie on either side: resamplings of
    so few would promise too much. Raises UserError for replicates below 2.
    """
    found = bootstrap_replicates(statistic, sizes, estimate, replicates, seed)
    count = int(np.sum(sizes))
    if FEWEST <= round(estimate / 100 * count) <= count - FEWEST:
        return found
    return unknown_replicates(estimate, replicates, "nearly all images are alike in it, so that too few of them say "
                                                    "how far it moves")
