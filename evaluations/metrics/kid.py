"""The kernel distance KID."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from guided_diffusion.errors import UserError

from . import arrays
from .arrays import checked_pair, slices
from .bootstrap import Statistic


def kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> float:
    """Returns the kernel distance KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    reference: (N, D), sample: (M, D), at least two images of each. KID lies around 0 for equal distributions, where it
    can be slightly negative. All pairs of images are used: the expectation is that of the usual mean over subsets of
    1,000, with less spread. From a larger set, max_images are drawn by `seed`. Raises UserError for shapes that do not
    fit, too few images, NaN or infinity. Source: Binkowski et al. 1801.01401, eq. 3 and 4.
    """
    size = min(len(sample), max_images)
    return float(resampled_kid(reference, sample, max_images, seed)(np.ones((1, size)))[0])


def resampled_kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> Statistic:
    """Returns the statistic of `kid` with a fixed reference and min(M, max_images) resampled sample images.

    Pairs of one image with itself are left out, also where the image was drawn several times.
    """
    if max_images < 2:
        raise UserError(f"max_images {max_images}: must be at least 2")
    pair = checked_pair(reference, sample, 1)
    reference, sample = (_thinned(features, max_images, seed) for features in pair)

    def statistic(counts: np.ndarray) -> np.ndarray:
        counts = counts.astype(np.float64)
        totals = counts.sum(axis=1)
        within_reference, within_sample, across = 0.0, np.zeros(len(counts)), np.zeros(len(counts))
        for rows, kernel in _kernel_rows(reference, reference):
            within_reference += kernel.sum() - kernel[:, rows].trace()
        for rows, kernel in _kernel_rows(sample, reference):
            across += counts[:, rows] @ kernel.sum(axis=1)
        for rows, kernel in _kernel_rows(sample, sample):
            np.fill_diagonal(kernel[:, rows], 0)
            within_sample += np.einsum("bi,bi->b", counts[:, rows], counts @ kernel.T)
        pairs = len(reference) * (len(reference) - 1)
        return (within_reference / pairs + within_sample / (totals**2 - (counts**2).sum(axis=1))
                - 2 * across / (totals * len(reference)))

    return statistic


def _thinned(features: np.ndarray, max_images: int, seed: int) -> np.ndarray:
    if len(features) <= max_images:
        return features
    return features[np.sort(np.random.default_rng(seed).choice(len(features), max_images, replace=False))]


def _kernel_rows(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The kernel of some `rows` (n, D) with all `columns` (M, D): (which rows, (n, M) float64), piece by piece."""
    height = max(1, arrays.BLOCK_ENTRIES // (4 * len(columns)))
    for part in slices(len(rows), height):
        kernel = (rows[part] @ columns.T).astype(np.float64)
        kernel /= rows.shape[1]
        kernel += 1
        yield part, kernel * kernel * kernel
