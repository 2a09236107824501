"""Mean and covariance of features, and the Frechet distance: FID and sFID."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import blas, lapack

from guided_diffusion.errors import UserError

from .arrays import checked_features, finite_numbers, slices
from .bootstrap import Statistic

# Asymmetry and negative eigenvalues up to this, relative to the largest, are what float32 does to a covariance.
_COVARIANCE_ROUND_OFF = 1e-5


class RunningStatistics:
    """Mean and covariance of features that arrive in pieces, in float64 and in the memory of one (D, D) matrix.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979), so that nothing cancels under a large common
    mean. The results agree with np.mean and np.cov up to round-off of float64, whatever the pieces are.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))        # sum of (x - mean)(x - mean)^T, its lower triangle, Fortran order

    def update(self, features: np.ndarray) -> None:
        """Adds features (n, ...), flattened to (n, D); n may be 0.

        Raises UserError for another D than before and for NaN or infinity.
        """
        features = np.asarray(features)
        if features.ndim < 2:
            raise UserError(f"features of shape {features.shape}: must be (images, channels)")
        if len(features) == 0:
            return
        rows = finite_numbers(features.reshape(len(features), -1), "features").astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        if self.count == 0:
            self._mean = np.zeros(len(mean))
            self._scatter = np.zeros((len(mean), len(mean)), order="F")
        if len(mean) != len(self._mean):
            raise UserError(f"features of {len(mean)} channels: those before had {len(self._mean)}")
        share = len(rows) / (self.count + len(rows))
        shift = mean - self._mean
        between = np.sqrt(self.count * share) * shift       # one more row: the scatter between the two means
        with_shift = np.concatenate([rows, between[None]])
        self._scatter = blas.dsyrk(1.0, with_shift.T, beta=1.0, c=self._scatter, lower=1, overwrite_c=1)
        self._mean = self._mean + share * shift
        self.count += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """The mean (D,), float64; raises UserError before the first image."""
        self._need_images()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """The covariance (D, D), float64, symmetric, divided by count - 1; NaN for a single image, as in np.cov.

        Raises UserError before the first image.
        """
        self._need_images()
        if self.count == 1:
            return np.full(self._scatter.shape, np.nan)
        covariance = np.tril(self._scatter)
        covariance += np.tril(covariance, -1).T
        covariance /= self.count - 1
        return covariance

    def _need_images(self) -> None:
        if self.count == 0:
            raise UserError("no images: at least one is needed")


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance of two Gaussians, in [0, inf): FID or sFID of features.

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)      (Heusel et al. 1706.08500, eq. 6)

    mu1, mu2: (D,); sigma1, sigma2: (D, D), symmetric up to round-off, of any rank (plain numbers where D = 1).
    With sigma = F F^T, the last trace is the sum of the singular values of F1^T F2. So there is no square root of a
    matrix and no imaginary part, and the round-off in the null space of rank-deficient matrices stays out.
    Raises UserError for shapes that do not belong together, for NaN and infinity, and for what is not a covariance.
    """
    mu1, mu2 = _mean(mu1, "mu1"), _mean(mu2, "mu2")
    if len(mu1) != len(mu2):
        raise UserError(f"statistics of {len(mu1)} and of {len(mu2)} channels: must be of the same network")
    sigma1, sigma2 = _covariance(sigma1, "sigma1", len(mu1)), _covariance(sigma2, "sigma2", len(mu2))
    factor1, factor2 = _factor(sigma1, "sigma1"), _factor(sigma2, "sigma2")
    if factor1.shape[1] < factor2.shape[1]:
        factor1, factor2 = factor2, factor1
    product = factor1.T @ factor2
    difference = mu1 - mu2
    return max(0.0, float(difference @ difference + np.trace(sigma1) + np.trace(sigma2)
                          - 2 * _sum_of_roots(product.T @ product)))


def _sum_of_roots(gram: np.ndarray) -> float:
    """Sums the square roots of the eigenvalues of a matrix M^T M.

    Where the columns of M go from large to small, the reduction that LAPACK applies to the lower triangle keeps
    the digits of small eigenvalues too, which would be worth 1e-8 of the largest otherwise.
    """
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum()) if gram.size else 0.0


def _mean(mu: np.ndarray, name: str) -> np.ndarray:
    mu = finite_numbers(np.atleast_1d(mu), name).astype(np.float64)
    if mu.ndim != 1:
        raise UserError(f"{name} of shape {mu.shape}: must be (channels,)")
    return mu


def _covariance(sigma: np.ndarray, name: str, channels: int) -> np.ndarray:
    sigma = np.atleast_2d(sigma)
    if sigma.shape != (channels, channels):
        raise UserError(f"{name} of shape {sigma.shape}: must be {(channels, channels)}, as its mean is ({channels},)")
    sigma = finite_numbers(sigma, name).astype(np.float64)
    if not np.array_equal(sigma, sigma.T):
        if abs(sigma - sigma.T).max() > _COVARIANCE_ROUND_OFF * abs(sigma).max():
            raise UserError(f"{name} is not a covariance: the matrix is not symmetric")
        sigma = (sigma + sigma.T) / 2
    return sigma


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """Returns F (D, rank) with F F^T = sigma up to round-off, its columns from large to small.

    It comes from a Cholesky decomposition with pivoting, which stops at the numerical rank; of the correlations, as
    the round-off of a covariance is proportional to the two variances. The rest that it leaves must be round-off: where
    it is more than float64 makes (statistics that were float32 once, or no covariance), the slower eigenvalues decide.
    Raises UserError for what is not a covariance.
    """
    if not sigma.any():
        return np.zeros((len(sigma), 0))
    variances = sigma.diagonal()
    scale = np.sqrt(np.maximum(variances, 1e-14 * abs(sigma).max()))
    correlation = sigma / scale / scale[:, None]
    lower, order, rank, _ = lapack.dpstrf(correlation, lower=1)
    order, lower = order - 1, np.tril(lower)[:, :rank]
    rest = order[rank:]
    left_over = correlation[np.ix_(rest, rest)] - lower[rank:] @ lower[rank:].T
    if abs(left_over).max(initial=0) < 1e-11:
        factor = np.empty_like(lower)
        factor[order] = lower
        return factor * scale[:, None]
    eigenvalues, vectors = np.linalg.eigh(sigma)
    if eigenvalues[0] < -_COVARIANCE_ROUND_OFF * abs(eigenvalues).max():
        raise UserError(f"{name} is not a covariance: the matrix has the negative eigenvalue {eigenvalues[0]:.3g} "
                        f"(the largest is {eigenvalues[-1]:.3g})")
    kept = np.flatnonzero(eigenvalues > len(sigma) * np.finfo(np.float64).eps * eigenvalues[-1])[::-1]
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def check_covariance(sigma: np.ndarray, name: str) -> None:
    """Raises UserError, which begins with `name`, for a matrix (D, D) of which `frechet_distance` is not defined."""
    _factor(_covariance(sigma, name, len(sigma)), name)


class FrechetSums(NamedTuple):
    """Sums over resampled images, from which ProjectedFeatures has their distance; those of two parts add up."""

    images: int = 0
    shift: np.ndarray | float = 0.0             # (D,), of the features from their centre
    square: float = 0.0                         # of their squared norms
    projected_shift: np.ndarray | float = 0.0   # (R,), of the projections on the reference's factor
    gram: np.ndarray | float = 0.0              # (R, R), of the products of the projections

    def plus(self, other: FrechetSums) -> FrechetSums:
        """Returns the sums over the images of both."""
        return FrechetSums(self.images + other.images, self.shift + other.shift, self.square + other.square,
                           self.projected_shift + other.projected_shift, self.gram + other.gram)


class ProjectedFeatures:
    """Features with all that the Frechet distance from fixed reference statistics needs of any resampling of them.

    mu (D,), sigma (D, D): the statistics. features: (N, D), at least two images. Raises UserError as
    `frechet_distance`.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> None:
        self._mu = mu = _mean(mu, "mu")
        self._features = features = checked_features(features, "features", 2)
        if features.shape[1] != len(mu):
            raise UserError(f"statistics of {len(mu)} and of {features.shape[1]} channels: must be of the same network")
        sigma = _covariance(sigma, "sigma", len(mu))
        factor = _factor(sigma, "sigma")
        self._trace = np.trace(sigma)
        self._centre = centre = features.mean(axis=0, dtype=np.float64)
        self._squares, self._projected = np.empty(len(features)), np.empty((len(features), factor.shape[1]), np.float32)
        for rows in slices(len(features), 1024):
            centred = features[rows] - centre
            self._squares[rows] = np.einsum("ij,ij->i", centred, centred)
            self._projected[rows] = centred @ factor

    def sums(self, counts: np.ndarray) -> FrechetSums:
        """Returns the sums over images that occur so often each, (N,) whole numbers."""
        shift, projected_shift = np.zeros(len(self._mu)), np.zeros(self._projected.shape[1])
        gram = np.zeros((self._projected.shape[1],) * 2)
        for rows in slices(len(counts), 4096):
            drawn = rows.start + np.flatnonzero(counts[rows])
            weights = counts[drawn].astype(np.float64)
            shift += weights @ (self._features[drawn] - self._centre)
            weighted = self._projected[drawn] * np.sqrt(weights)[:, None]
            projected_shift += np.sqrt(weights) @ weighted
            gram += weighted.T @ weighted
        return FrechetSums(int(counts.sum()), shift, float(counts @ self._squares), projected_shift, gram)

    def distance(self, sums: FrechetSums) -> float:
        """Returns the distance of the images that were summed, at least two."""
        count, shift = sums.images, sums.shift / sums.images
        projected_shift = sums.projected_shift / count
        gram = (sums.gram - count * np.outer(projected_shift, projected_shift)) / (count - 1)
        trace = (sums.square - count * np.dot(shift, shift)) / (count - 1)
        difference = self._mu - self._centre - shift
        return max(0.0, difference @ difference + self._trace + trace - 2 * _sum_of_roots(gram))


def resampled_frechet_distance(mu: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> Statistic:
    """Returns the statistic of `frechet_distance` of fixed reference statistics (D,), (D, D) to features (N, D).

    It costs one product N x D x D and the eigenvalues of one matrix for each replicate.
    """
    projected = ProjectedFeatures(mu, sigma, features)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.array([projected.distance(projected.sums(row.astype(np.int64))) for row in counts])

    return statistic
