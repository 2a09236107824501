"""FID extrapolated to infinitely many samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guided_diffusion.errors import UserError

from .arrays import checked_features, slices
from .bootstrap import Replicates, Statistic, check_replicates, known_replicates
from .frechet import FrechetSums, ProjectedFeatures, RunningStatistics, frechet_distance

SIZES = 15
FEWEST = 20             # images, below which the smallest sizes are of two or three images each
TRUSTED = 20            # images for each feature, below which the smallest size has fewer than two


def subset_sizes(count: int) -> np.ndarray:
    """Returns the 15 numbers of images whose FIDs are extrapolated: evenly from max(2, min(5000, N / 10)) to N.

    Raises UserError for fewer than 20 images.
    """
    if count < FEWEST:
        raise UserError(f"features of {count} images: at least {FEWEST} are needed")
    return np.linspace(max(2, min(5000, count // 10)), count, SIZES).astype(int)


def intercept(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the values at 0 of the least-squares lines of values (..., K) in 1 / sizes (K,)."""
    inverse = 1 / np.asarray(sizes, np.float64)
    centred = inverse - inverse.mean()
    weights = 1 / len(inverse) - inverse.mean() * centred / (centred @ centred)
    return np.asarray(values) @ weights


def frechet_distance_at_infinity(mu: np.ndarray, sigma: np.ndarray, features: np.ndarray, seed: int = 0) -> float:
    """Returns the FID that infinitely many samples would have: the value at 0 of a line in 1 / N through 15 FIDs.

    mu (D,), sigma (D, D): statistics of the reference. features: (N, D) of the samples, at least 20. The FIDs are of
    the first images of an order that `seed` draws, so that larger subsets hold the smaller ones. The result may be
    slightly below 0. With fewer than TRUSTED images for each feature it lies beside the truth, as the smallest subsets
    are far from such a line. Raises UserError as `frechet_distance`, and for too few images. Source: Chong and Forsyth
    1911.07023, section 3.1.
    """
    features = checked_features(features, "features", FEWEST)
    sizes, running, values = subset_sizes(len(features)), RunningStatistics(), []
    order = np.random.default_rng(seed).permutation(len(features))
    for start, stop in zip([0, *sizes[:-1]], sizes, strict=True):
        for rows in slices(stop - start, 4096):
            running.update(features[np.sort(order[start + rows.start:start + rows.stop])])
        values.append(frechet_distance(mu, sigma, running.mean, running.covariance))
    return float(intercept(sizes, np.array(values)))


def resampled_frechet_distance_at_infinity(mu: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> Statistic:
    """Returns the statistic of `frechet_distance_at_infinity`: from drawn images (B, N), indices, to (B,).

    The images count in the order in which they are drawn. It costs 15 times the eigenvalues of a matrix, but the
    products of one FID, for each replicate.
    """
    projected = ProjectedFeatures(mu, sigma, features)
    sizes = subset_sizes(len(features))

    def one(drawn: np.ndarray) -> list[float]:
        values, sums = [], FrechetSums()
        for start, stop in zip([0, *sizes[:-1]], sizes, strict=True):
            sums = sums.plus(projected.sums(np.bincount(drawn[start:stop], minlength=len(features))))
            values.append(projected.distance(sums))
        return values

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return intercept(sizes, np.array([one(row) for row in drawn]))

    return statistic


def order_replicates(statistic: Statistic, sizes: int | Sequence[int], estimate: float, replicates: int,
                     seed: int) -> Replicates:
    """Returns a number with the values of `statistic` for images drawn with replacement, in order.

    They depend on the seed and the number of images alone, so that differences of files of equally many images are
    paired. Where the values are all alike they are unknown. Raises UserError for replicates below 2.
    """
    check_replicates(replicates)
    size, random = int(np.sum(sizes)), np.random.default_rng(seed)
    values = [statistic(random.integers(size, size=(1, size))) for _ in range(replicates)]
    return known_replicates(estimate, np.concatenate(values))
