"""Bootstrap intervals of metrics, and of their differences on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from guided_diffusion.errors import UserError

ALIKE = 1e-9                        # values that differ by less than this share of a number differ by rounding alone
MOST_RESAMPLINGS = 10**5            # of 50,000 images they take 10 GB

# A metric of resampled images: from counts (B, N) of how often each image occurs to its B values.
Statistic = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """Bounds of a confidence interval."""

    low: float
    high: float


def bootstrap(statistic: Statistic, sizes: int | Sequence[int], replicates: int, seed: int = 0,
              level: float = 0.95) -> Interval:
    """Returns the bootstrap interval of a metric: how far the metric moves when other images had been drawn.

    statistic: the result of a `resampled_...` function of this package. sizes: the number of its images; several
    numbers that add up to it are resampled each on its own (the splits of the Inception Score). replicates: number of
    resamplings, at least 2. Raises UserError for replicates below 2 and for a level outside (0, 1).

    The interval is that of the percentiles, moved so that the mean of the replicates lies on the metric itself. FID
    and others are biased by the number of distinct images, of which a resampling has only 63 %, so that the plain
    percentiles would often lie beside the metric.
    """
    counts = resamplings(sizes, replicates, seed)
    estimate = float(statistic(np.ones((1, counts.shape[1]), np.uint16))[0])
    return bootstrap_interval(statistic(counts), estimate, level)


def check_replicates(replicates: int) -> None:
    """Raises UserError for too few replicates to tell how far a number moves."""
    if replicates < 2:
        raise UserError(f"{replicates} bootstrap replicates: must be at least 2")


def resamplings(sizes: int | Sequence[int], replicates: int, seed: int = 0) -> np.ndarray:
    """Returns counts (replicates, N) of how often each image is drawn; `sizes` as for `bootstrap`, N their sum.

    Statistics of several files of the same image indices are paired where they get the same counts, so that
    `bootstrap_interval` holds for their differences too. Raises UserError for replicates below 2.
    """
    check_replicates(replicates)
    sizes = [int(sizes)] if isinstance(sizes, int | np.integer) else list(sizes)
    counts = np.empty((replicates, sum(sizes)), np.uint16)
    rng = np.random.default_rng(seed)
    for row in counts:
        row[:] = np.concatenate([np.bincount(rng.integers(size, size=size), minlength=size) for size in sizes])
    return counts


def bootstrap_interval(values: np.ndarray, estimate: float, level: float = 0.95) -> Interval:
    """Returns the interval that `bootstrap` describes, from replicates (B,) of a number that is `estimate`.

    Quantiles are those that a further replicate would lie below: interpolated ones are too narrow for few replicates.
    Where there are too few for any such quantile, below 39 at 95 %, those of Student's t stand in, for a further
    replicate of a normal distribution. Raises UserError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise UserError(f"level {level}: must be between 0 and 1")
    count = len(values)
    if round((count + 1) * (1 - level) / 2, 9) < 1:
        from scipy.stats import t  # takes long to import, and is seldom needed

        half = t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / count)
        return Interval(float(estimate - half), float(estimate + half))
    low, high = np.quantile(values - values.mean(), [(1 - level) / 2, (1 + level) / 2], method="weibull") + estimate
    return Interval(float(low), float(high))


class Replicates(NamedTuple):
    """A number with its value for each resampling, (B,).

    unknown: why the resamplings do not say how far it moves, in words; the values are NaN then.
    """

    estimate: float
    values: np.ndarray
    unknown: str = ""

    def minus(self, other: Replicates) -> Replicates:
        """Returns the difference of two numbers whose resamplings are the same."""
        return Replicates(self.estimate - other.estimate, self.values - other.values)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval; None where there is none that keeps its promise, which values of NaN say."""
        if not np.isfinite(self.values).all() or not np.isfinite(self.estimate):
            return None
        return bootstrap_interval(self.values, self.estimate)


def bootstrap_replicates(statistic: Statistic, sizes: int | Sequence[int], estimate: float, replicates: int,
                         seed: int) -> Replicates:
    """Returns a number with the values of `statistic` for resampled images; arguments and errors as of `bootstrap`.

    Where the values are all alike they are unknown: see `known_replicates`.
    """
    return known_replicates(estimate, statistic(resamplings(sizes, replicates, seed)))


def known_replicates(estimate: float, values: np.ndarray) -> Replicates:
    """Returns a number with its values for resamplings, (B,); they are unknown where they are all alike.

    Images that are all the same would otherwise promise an interval of no width. Where some values are no numbers, all
    are unknown.
    """
    if not np.isfinite(values).all():
        return unknown_replicates(estimate, len(values), "some of its resamplings give no number")
    if np.ptp(values) <= ALIKE * abs(estimate):
        return unknown_replicates(estimate, len(values), "all its resamplings give the same number, so that nothing "
                                                         "says how far it moves")
    return Replicates(estimate, values)


def unknown_replicates(estimate: float, replicates: int, why: str) -> Replicates:
    """Returns a number of which resamplings do not say how far it moves, `why` in words, so that it has no interval."""
    return Replicates(estimate, np.full(replicates, np.nan), why)


def resampled_mean(values: np.ndarray) -> Statistic:
    """Returns the statistic of the mean of (N,) values, one for each image.

    It serves precision and density, by the fields of `Neighbourhoods` or the results of `manifold_membership`: their
    balls are those of the reference and stay. It does not serve recall and coverage, which are means over the
    reference images and move with the samples: see `subset_replicates`.
    """
    values = np.asarray(values, np.float64)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.array([row @ values for row in counts]) / len(values)

    return statistic
