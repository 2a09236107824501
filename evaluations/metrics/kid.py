"""The kernel distance KID."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from guided_diffusion.errors import UserError

from . import arrays
from .arrays import checked_pair, slices, thinned
from .bootstrap import Statistic


def kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> float:
    """Returns the kernel distance KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    reference: (N, D), sample: (M, D), at least two images of each. KID lies around 0 for equal distributions, where it
    can be slightly negative. All pairs of images are used: the expectation is that of the usual mean over subsets of
    1,000, with less spread. From a larger set, max_images are drawn by `seed`. Raises UserError for shapes that do not
    fit, too few images, NaN or infinity. Source: Binkowski et al. 1801.01401, eq. 3 and 4.
    """
    size = min(len(sample), max_images)
    found = float(resampled_kid(reference, sample, max_images, seed)(np.ones((1, size)))[0])
    if not np.isfinite(found):
        raise UserError("KID: is no number, as the features are too large for it")
    return found


def resampled_kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> Statistic:
    """Returns the statistic of `kid` with a fixed reference and min(M, max_images) resampled sample images.

    Pairs of one image with itself are left out, also where the image was drawn several times.

    Features are taken from their common centre c, and what kernels of all pairs have in common is left out before it
    is rounded: with x = c + u and y = c + v, the kernel is (a + p + q + w)^3, where a = c.c / D + 1, p = c.u / D,
    q = c.v / D and w = u.v / D. Its terms of p alone, of q alone and of neither cancel in KID itself, and are by far
    the largest where the mean is. In a resampling those of p and q alone do not cancel, as pairs of one image are left
    out; what would be left of them, of the order of 1 / M, is not counted.
    """
    if max_images < 2:
        raise UserError(f"max_images {max_images}: must be at least 2")
    pair = checked_pair(reference, sample, 1)
    reference, sample = (thinned(features, max_images, seed) for features in pair)
    centre = (reference.mean(axis=0, dtype=np.float64) + sample.mean(axis=0, dtype=np.float64)) / 2
    real, generated = _Centred.of(reference, centre), _Centred.of(sample, centre)

    def statistic(counts: np.ndarray) -> np.ndarray:
        counts = counts.astype(np.float64)
        totals = counts.sum(axis=1)
        within_reference, within_sample, across = 0.0, np.zeros(len(counts)), np.zeros(len(counts))
        for rows, kernel in _kernel_rows(real, real):
            within_reference += kernel.sum() - kernel[:, rows].trace()
        for rows, kernel in _kernel_rows(generated, real):
            across += counts[:, rows] @ kernel.sum(axis=1)
        for rows, kernel in _kernel_rows(generated, generated):
            np.fill_diagonal(kernel[:, rows], 0)
            within_sample += np.einsum("bi,bi->b", counts[:, rows], counts @ kernel.T)
        pairs = len(reference) * (len(reference) - 1)
        return (within_reference / pairs + within_sample / (totals**2 - (counts**2).sum(axis=1))
                - 2 * across / (totals * len(reference)))

    return statistic


class _Centred(NamedTuple):
    """Features from a common centre."""

    features: np.ndarray        # (n, D), of the type of the features
    along: np.ndarray           # (n,) float64, their products with the centre, over D
    level: float                # the centre's product with itself, over D, plus 1

    @classmethod
    def of(cls, features: np.ndarray, centre: np.ndarray) -> _Centred:
        """Takes (n, D) features and the centre (D,), float64."""
        centred, along = np.empty_like(features), np.empty(len(features))
        for rows in slices(len(features), 1024):
            precise = features[rows] - centre
            along[rows] = precise @ centre / len(centre)
            centred[rows] = precise
        return cls(centred, along, float(centre @ centre) / len(centre) + 1)


def _kernel_rows(rows: _Centred, columns: _Centred) -> Iterator[tuple[slice, np.ndarray]]:
    """The kernel of some `rows` (n, D) with all `columns` (M, D): (which rows, (n, M) float64), piece by piece.

    Without the terms that cancel in KID: 3 a^2 w + 3 a (t^2 - p^2 - q^2) + t^3 - p^3 - q^3, where t = p + q + w.
    """
    height = max(1, arrays.BLOCK_ENTRIES // (4 * len(columns.features)))
    level, of_columns = rows.level, columns.along
    for part in slices(len(rows.features), height):
        product = (rows.features[part] @ columns.features.T).astype(np.float64)
        product /= rows.features.shape[1]
        of_rows = rows.along[part, None]
        total = product + of_rows
        total += of_columns
        kernel = product
        kernel *= 3 * level**2
        kernel += total * total * (total + 3 * level)
        kernel -= of_rows**2 * (of_rows + 3 * level)
        kernel -= of_columns**2 * (of_columns + 3 * level)
        yield part, kernel
