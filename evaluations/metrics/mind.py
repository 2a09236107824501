"""The Monge distance MIND: a sliced squared Wasserstein distance between features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.rng import stream_generator

from . import arrays
from .arrays import checked_pair, slices, thinned
from .bootstrap import Statistic

DIRECTIONS = 1000
FACTOR = 3                  # brings the mean over directions, times the channels, near to the size of FID


def mind(reference: np.ndarray, sample: np.ndarray, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """Returns MIND, in [0, inf): 3 D times the mean squared Wasserstein distance along random directions.

    reference: (N, D), sample: (M, D), at least two images of each. Along each of the unit vectors that `seed` draws,
    both sets are projected and sorted, and the mean squared difference is taken; it is 0 for the same set. From the
    larger set, as many images as the other one has are drawn by `seed`. It falls with the number of images, by far
    less than FID does. Raises UserError for shapes that do not fit, too few images, NaN or infinity, and for
    directions below 1. Source: Berthet et al. 2605.06797.
    """
    real, generated, scale = _prepared(reference, sample, directions, seed)
    total = 0.0
    for real_along, along in _projections(real, generated, directions, seed):
        difference = np.sort(along, axis=0)
        difference -= np.sort(real_along, axis=0)
        total += float(np.einsum("ij,ij->", difference, difference))
    return scale * total


def resampled_mind(reference: np.ndarray, sample: np.ndarray, directions: int = DIRECTIONS,
                   seed: int = 0) -> Statistic:
    """Returns the statistic of `mind` with a fixed reference and min(N, M) resampled sample images.

    Two files of equally many images get the same directions, so that their differences are paired along each.

    Of sorted x with counts c, which add up to C, the mean squared difference from sorted y needs the squares of x,
    those of y, and the sum of x_i times the y from C_(i-1) to C_i. By parts, that is a sum of the steps of x times the
    sum of the first C_i of y, so that no resampling is sorted.
    """
    real, generated, scale = _prepared(reference, sample, directions, seed)

    def statistic(counts: np.ndarray) -> np.ndarray:
        counts = counts.astype(np.intp)
        squares, constant, across = np.zeros(len(generated)), 0.0, np.zeros(len(counts))
        for real_along, along in _projections(real, generated, directions, seed):
            squares += np.einsum("ij,ij->i", along, along)
            constant += float(np.einsum("ij,ij->", real_along, real_along))
            orders, sums = np.argsort(along, axis=0), np.cumsum(np.sort(real_along, axis=0), axis=0)
            for column, order in enumerate(orders.T):
                across += _product_sums(counts, order, along[order, column], sums[:, column])
        return scale * np.maximum(counts @ squares + constant - 2 * across, 0)

    return statistic


def _product_sums(counts: np.ndarray, order: np.ndarray, rising: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Sums x y over sorted pairs for each resampling: (B,).

    counts: (B, n). order: of the sample images along the direction. rising: their x, sorted. sums: of the first 1, 2,
    ... n of the sorted y.
    """
    steps, before = np.diff(rising), np.concatenate([[0.0], sums])
    found = np.empty(len(counts))
    for part in slices(len(counts), max(1, arrays.BLOCK_ENTRIES // (16 * len(order)))):
        reached = np.cumsum(np.take(counts[part], order[:-1], axis=1), axis=1)
        found[part] = rising[-1] * sums[-1] - np.take(before, reached) @ steps
    return found


def _prepared(reference: np.ndarray, sample: np.ndarray, directions: int,
              seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns equally many features of both sets, and what the sum over directions and images is multiplied by."""
    if directions < 1:
        raise UserError(f"directions {directions}: must be at least 1")
    reference, sample = checked_pair(reference, sample, 1)
    count = min(len(reference), len(sample))
    channels = reference.shape[1]
    return thinned(reference, count, seed), thinned(sample, count, seed), FACTOR * channels / (count * directions)


def _projections(real: np.ndarray, generated: np.ndarray, directions: int,
                 seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields both sets along some of the directions at a time: (n, directions) float64 each.

    They are taken from the mean of the reference, so that products in single precision bear a large common mean. The
    directions have numbers of their own: features that someone drew by `default_rng(seed)` would be parallel to those
    that it gives.
    """
    random, channels = stream_generator("directions", seed), real.shape[1]
    centre = real.mean(axis=0, dtype=np.float64)
    for part in slices(directions, max(1, arrays.BLOCK_ENTRIES // (8 * len(real)))):
        drawn = random.standard_normal((part.stop - part.start, channels))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        yield _along(real, centre, drawn), _along(generated, centre, drawn)


def _along(features: np.ndarray, centre: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns features (n, D) from the centre along unit vectors (k, D): (n, k) float64."""
    columns, along = directions.T.astype(features.dtype), np.empty((len(features), len(directions)))
    for rows in slices(len(features), 1024):
        along[rows] = (features[rows] - centre).astype(features.dtype) @ columns
    return along
