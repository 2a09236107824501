"""Intervals of recall and coverage: how far these move between sets of samples, from random subsets of one set.

Both are shares of reference images that lie in, or hold, at least one sample. Resampling the reference would say
nothing of other samples, and resampling the samples with replacement would put every sample's nearest neighbours at the
distance 0 as often as not. So random halves of the samples are taken without replacement, with new balls each
(subsampling: Politis and Romano 1994, Annals of Statistics 22, 2031). Two disjoint halves are independent sets of half
as many samples, and half the mean squared difference of their shares is the variance of the share of such a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from .arrays import checked_pair
from .bootstrap import Replicates, Statistic, check_replicates, known_replicates, unknown_replicates
from .distances import Balls, Points, centred_points, comparison_margin, squared_distances

NEIGHBOURS = 64         # of which a quarter of the samples has fewer than 3 in 3 of a million cases
FEWEST = 10             # reference images on either side, below which a share moves by too few of them to tell how far


class _Pairs(Protocol):
    """Finds which pairs of a reference image and a sample may count, from rows of squared distances."""

    def __call__(self, rows: slice, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the reference images in rising order from 0, the samples, and the reach that the sample needs."""


def subset_recall(reference: np.ndarray, sample: np.ndarray, k: int = 3) -> Statistic:
    """Returns the statistic of recall for subsets of the samples: from (B, M) bool, each of more than k, to (B,).

    reference: (N, D), sample: (M, D). Balls reach from each sample of a subset to its k-th neighbour in the subset.
    Distances are of single precision. Raises UserError as `precision_recall`.
    """
    real, generated = centred_points(*checked_pair(reference, sample, k))
    squared_radii, neighbours = _neighbour_lists(generated, min(NEIGHBOURS, len(sample) - 1))
    margin = comparison_margin(generated, squared_radii[:, k - 1])

    def statistic(chosen: np.ndarray) -> np.ndarray:
        reach = _reach(chosen.astype(bool), neighbours, k)
        longest = reach.max(axis=0)
        farthest = squared_radii[np.arange(len(longest)), np.maximum(longest, 1) - 1] + margin
        farthest[longest == 0] = -np.inf

        def pairs(rows: slice, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            images, samples = np.nonzero(squared <= farthest)
            nearer = squared_radii[samples] < (squared[images, samples] - margin[samples])[:, None]
            return images, samples, np.count_nonzero(nearer, axis=1) + 1

        return _shares(real, generated, pairs, reach)

    return statistic


def subset_coverage(reference: np.ndarray, sample: np.ndarray, k: int = 5) -> Statistic:
    """Returns the statistic of coverage for subsets of the samples: from (B, M) bool to (B,).

    reference: (N, D), sample: (M, D). Distances are of single precision. Raises UserError as `precision_recall`.
    """
    real, generated = centred_points(*checked_pair(reference, sample, k))
    balls = Balls(real, k)

    def statistic(chosen: np.ndarray) -> np.ndarray:
        def pairs(rows: slice, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            images, samples = np.nonzero(squared < balls.below[rows, None])
            return images, samples, np.ones(len(samples), np.uint8)

        return _shares(real, generated, pairs, chosen.astype(np.uint8))

    return statistic


def subset_replicates(statistic: Statistic, sizes: int | Sequence[int], estimate: float, replicates: int, seed: int,
                      reference_images: int) -> Replicates:
    """Returns a share of the reference images with values that spread around it as other sets of samples would.

    statistic: of subsets of the samples, `sizes` of them. The subsets depend on the seed and the number of samples
    alone, so that differences of files of equally many images are paired. The spread of halves is brought to that of
    the whole in two steps: in units of the binomial variance of its share, it is as large as that of halves, times the
    root of the ratio by which it falls from quarters to halves. (That root lies midway between no extrapolation and
    that of a power law; simulations chose it, which the tests hold it to.) The values are unknown, so that there is
    no interval, where fewer than ten reference images lie on either side, there are too few samples for quarters, or
    all are alike.
    Raises UserError for replicates below 2.
    """
    check_replicates(replicates)
    size = int(np.sum(sizes))
    if not FEWEST <= estimate * reference_images <= reference_images - FEWEST or size // 4 <= FEWEST:
        return unknown_replicates(estimate, replicates, "it is nearly 0 or 1, or there are too few images, so that "
                                                        "nothing says how far it moves")
    halves, quarters = (statistic(subsets.reshape(-1, size)).reshape(2, -1)
                        for subsets in _disjoint_pairs(size, replicates, seed))
    dispersion, of_quarters = _dispersion(halves), _dispersion(quarters)
    fall = min(1.0, dispersion / of_quarters) if of_quarters > 0 else 1.0
    variance = dispersion * fall**0.5 * estimate * (1 - estimate)
    differences = halves[0] - halves[1]
    spread = np.sqrt(np.mean(differences**2))
    return known_replicates(estimate, estimate + differences * (np.sqrt(variance) / spread if spread else 0.0))


def _dispersion(pairs: np.ndarray) -> float:
    """The variance of a share, from those of pairs of disjoint subsets (2, B), in units of share * (1 - share)."""
    share = float(pairs.mean())
    binomial = share * (1 - share)
    return float(np.mean((pairs[0] - pairs[1]) ** 2)) / 2 / binomial if binomial else 0.0


def _disjoint_pairs(size: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Yields pairs of disjoint halves, then of disjoint quarters, of `size` images: (2, replicates, size) bool."""
    random = np.random.default_rng(seed)
    orders = np.stack([random.permutation(size) for _ in range(replicates)])
    for part in (size // 2, size // 4):
        chosen = np.zeros((2, replicates, size), bool)
        for index in range(2):
            np.put_along_axis(chosen[index], orders[:, index * part:(index + 1) * part], True, axis=1)
        yield chosen


def _neighbour_lists(points: Points, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns squared distances (n, length), float32, to the nearest other points, the nearest first; and which."""
    count = len(points.centred)
    distances, neighbours = np.empty((count, length), np.float32), np.empty((count, length), np.int32)
    for rows, squared in squared_distances(points, points):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        nearest = np.argpartition(squared, length - 1, axis=1)[:, :length]
        values = np.take_along_axis(squared, nearest, axis=1)
        order = np.argsort(values, axis=1)
        distances[rows] = np.take_along_axis(values, order, axis=1)
        neighbours[rows] = np.take_along_axis(nearest, order, axis=1)
    return np.maximum(distances, 0), neighbours


def _reach(chosen: np.ndarray, neighbours: np.ndarray, k: int) -> np.ndarray:
    """Returns which neighbour of each point, counted from 1, is its k-th in each subset; 0 for points outside it.

    chosen: (B, n) bool. neighbours: (n, length) indices. Where a list is too short, its last one is taken.
    """
    reach, found = np.ones(chosen.shape, np.uint8), np.zeros(chosen.shape, np.uint8)
    for column in neighbours.T[:-1]:
        found += chosen[:, column]
        lacking = found < k
        if not lacking.any():
            break
        reach += lacking
    reach[~chosen] = 0
    return reach


def _shares(real: Points, generated: Points, pairs: _Pairs, reach: np.ndarray) -> np.ndarray:
    """Returns the share of reference images that some sample reaches, (B,), from how far each reaches, (B, M)."""
    reached = np.zeros(len(reach), np.int64)
    for rows, squared in squared_distances(real, generated):
        images, samples, needed = pairs(rows, squared)
        if len(images):
            starts = np.flatnonzero(np.diff(images, prepend=-1))
            reached += [np.count_nonzero(np.logical_or.reduceat(row[samples] >= needed, starts)) for row in reach]
    return reached / len(real.centred)
