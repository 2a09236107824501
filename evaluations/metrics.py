"""From features to numbers: FID, sFID, Inception Score, precision and recall, KID, density and coverage.

Numpy and scipy only. Features are arrays (images, channels); the order of the images matters to the Inception
Score alone. What a user can put right (shapes, NaN, too few images, a matrix that is not a covariance) raises
UserError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import blas, lapack
from scipy.special import xlogy

from guided_diffusion.errors import UserError

# Asymmetry and negative eigenvalues up to this, relative to the largest, are what float32 does to a covariance.
_COVARIANCE_ROUND_OFF = 1e-5
_BLOCK_ENTRIES = 2**24          # of a block of distances: 64 MiB in float32; large blocks suit threads best
_OFFICIAL_BLOCK = 10_000        # images: the official evaluator chooses half or single precision by such blocks


# Mean and covariance, Frechet distance


class RunningStatistics:
    """Mean and covariance of features that arrive in pieces; float64, one (D, D) matrix of memory.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979), so nothing cancels under a large common mean.
    Agrees with np.mean and np.cov up to round-off of float64, whatever the pieces. Can be pickled: ranks send
    theirs to one that merges them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None     # sum of (x - mean)(x - mean)^T, its lower triangle, Fortran order

    def update(self, features: np.ndarray) -> None:
        """Takes in features (n, ...), flattened to (n, D); n may be 0.

        Raises UserError for another D than before and for NaN or infinity.
        """
        features = np.asarray(features)
        if features.ndim < 2:
            raise UserError(f"features of shape {features.shape}: must be (images, channels)")
        if len(features) == 0:
            return
        rows = _numbers(features.reshape(len(features), -1), "features").astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        self._add(len(rows), mean, rows)

    def merge(self, other: RunningStatistics) -> None:
        """Takes in all that `other` has seen. Raises UserError for another D."""
        if other.count == 0:
            return
        self._add(other.count, other._mean, np.empty((0, len(other._mean))))
        self._scatter += other._scatter

    def _add(self, count: int, mean: np.ndarray, centred: np.ndarray) -> None:
        if self._mean is None:
            self._mean = np.zeros(len(mean))
            self._scatter = np.zeros((len(mean), len(mean)), order="F")
        if len(mean) != len(self._mean):
            raise UserError(f"features of {len(mean)} channels: those before had {len(self._mean)}")
        share = count / (self.count + count)
        shift = mean - self._mean
        between = np.sqrt(self.count * share) * shift       # one more row: the scatter between the two means
        rows = np.concatenate([centred, between[None]])
        self._scatter = blas.dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, lower=1, overwrite_c=1)
        self._mean = self._mean + share * shift
        self.count += count

    @property
    def mean(self) -> np.ndarray:
        """(D,), float64. Raises UserError before the first image."""
        self._need_images()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), float64, symmetric, divided by count - 1; NaN for a single image, as np.cov has it.

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
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, of features FID or sFID; in [0, inf).

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)      (Heusel et al. 1706.08500, eq. 6)

    mu1, mu2: (D,); sigma1, sigma2: (D, D), symmetric up to round-off, of any rank (plain numbers where D = 1).
    With sigma = F F^T, the last trace is the sum of the singular values of F1^T F2: there is no square root of a
    matrix, no imaginary part, and the round-off in the null space of rank-deficient matrices stays out.
    Raises UserError for shapes that do not belong together, NaN, infinity, and what is not a covariance.
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
    """Sum of the square roots of the eigenvalues of a matrix M^T M.

    Where the columns of M go from large to small, the reduction that LAPACK applies to the lower triangle keeps
    the digits of small eigenvalues too, which would be worth 1e-8 of the largest otherwise.
    """
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum()) if gram.size else 0.0


def _mean(mu: np.ndarray, name: str) -> np.ndarray:
    mu = _numbers(np.atleast_1d(mu), name).astype(np.float64)
    if mu.ndim != 1:
        raise UserError(f"{name} of shape {mu.shape}: must be (channels,)")
    return mu


def _covariance(sigma: np.ndarray, name: str, channels: int) -> np.ndarray:
    sigma = np.atleast_2d(sigma)
    if sigma.shape != (channels, channels):
        raise UserError(f"{name} of shape {sigma.shape}: must be {(channels, channels)}, as its mean is ({channels},)")
    sigma = _numbers(sigma, name).astype(np.float64)
    if not np.array_equal(sigma, sigma.T):
        if abs(sigma - sigma.T).max() > _COVARIANCE_ROUND_OFF * abs(sigma).max():
            raise UserError(f"{name} is not a covariance: the matrix is not symmetric")
        sigma = (sigma + sigma.T) / 2
    return sigma


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """F (D, rank) with F F^T = sigma up to round-off, its columns from large to small. Raises UserError without one.

    By Cholesky with pivoting, which stops at the numerical rank; of the correlations, as the round-off of a
    covariance goes with the two variances. What it leaves over must be round-off. If it is more than float64 makes
    (statistics that were float32 once, or no covariance), the slower eigenvalues decide.
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


# Inception Score


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al. 1606.03498): exp of the mean of KL(p(y|x) || p(y)), in [1, classes].

    probabilities: (N, classes), rows with sum 1. As the official evaluator has it: one score for every split_size
    images in the order given, the last split may be short and counts as much as the others, and the result is
    their mean. As there, the result is NaN where any probability is exactly zero. Raises UserError for rows that
    are no probabilities, and for split_size below 1.
    """
    statistic = resampled_inception_score(probabilities, split_size)
    return statistic(np.ones((1, len(probabilities))))[0] if np.all(probabilities) else float("nan")


# Precision and recall, density and coverage, realism


class Neighbourhoods(NamedTuple):
    """How N reference and M sample images lie to each other. A ball reaches from an image to its k-th neighbour."""

    sample_inside: np.ndarray           # (M,) bool, within a reference ball of k; the mean is the precision
    reference_inside: np.ndarray        # (N,) bool, within a sample ball of k; the mean is the recall
    density: np.ndarray                 # (M,), reference balls of density_k around it / density_k; mean: density
    covered: np.ndarray                 # (N,) bool, its ball of density_k holds a sample; the mean is the coverage
    realism: np.ndarray                 # (M,) in [0, inf], Kynkaanniemi et al. 1904.06991, eq. 3
    sample_distance: np.ndarray         # (M,), from each sample to the nearest reference image
    reference_distance: np.ndarray      # (N,), from each reference image to the nearest other one


def precision_recall(reference: np.ndarray, sample: np.ndarray, k: int = 3,
                     distances: str = "exact") -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 1904.06991, eq. 2); both in [0, 1].

    reference: (N, D), sample: (M, D), N and M at least k + 1. Precision is the share of the samples within the
    distance of some reference image to its k-th neighbour (`<=`), recall the same with the roles exchanged.

    distances: "exact" decides as float64 does. "official" reproduces the official evaluator on a CPU: distances in
    half precision, or in single precision for 10,000 x 10,000 images among which half precision overflows; it moves
    ordinary results by up to 0.008, and results of features with a large common mean by a lot.
    Raises UserError for shapes that do not fit, too few images, NaN or infinity, k below 1, other `distances`.
    """
    sample_inside, reference_inside = inside(reference, sample, k, distances)
    return float(sample_inside.mean()), float(reference_inside.mean())


def inside(reference: np.ndarray, sample: np.ndarray, k: int = 3,
           distances: str = "exact") -> tuple[np.ndarray, np.ndarray]:
    """Which samples count for precision, (M,) bool, and which reference images for recall, (N,) bool.

    As `precision_recall`; the fields of the same names in `Neighbourhoods`.
    """
    reference, sample = _pair(reference, sample, k)
    if distances == "official":
        return _official_inside(reference, sample, k)
    if distances != "exact":
        raise UserError(f"distances {distances!r}: must be exact or official")
    reference, sample = _centred(reference, sample)
    found = _Membership(reference, _Balls(reference, k), sample, _Balls(sample, k))
    for rows, squared in _squared_distances(reference, sample):
        found.look(rows, squared)
    return found.decide()


def density_coverage(reference: np.ndarray, sample: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density, in [0, inf), and coverage, in [0, 1] (Naeem et al. 2002.09797, eq. 4 and 5).

    reference: (N, D), sample: (M, D), N and M at least k + 1. Balls reach from each reference image to its k-th
    neighbour, boundary excluded as in the authors' code: identical sets have density 1 and coverage 1.
    Raises UserError as `precision_recall`.
    """
    reference, sample = _centred(*_pair(reference, sample, k))
    balls = _Balls(reference, k)
    density, covered = np.zeros(len(sample.centred)), np.zeros(len(reference.centred), bool)
    for rows, squared in _squared_distances(reference, sample):
        within = squared < balls.below[rows, None]
        density += np.count_nonzero(within, axis=0)
        covered[rows] = within.any(axis=1)
    return float(density.mean() / k), float(covered.mean())


def neighbourhoods(reference: np.ndarray, sample: np.ndarray, k: int = 3, density_k: int = 5) -> Neighbourhoods:
    """All that distances say, in one go: precision, recall, density, coverage, and what a picture of them needs.

    reference: (N, D), sample: (M, D), both of more than max(k, density_k) images. The realism of a sample is the
    largest ratio of a reference ball's radius to the sample's distance from its centre, over the half of the balls
    with the smaller radii: >= 1 within such a ball, inf on a centre. Raises UserError as `precision_recall`.
    """
    _check_k(k, "k")
    _check_k(density_k, "density_k")
    reference, sample = _centred(*_pair(reference, sample, max(k, density_k)))
    neighbours = _nearest(reference, max(k, density_k))
    balls, wide = _Balls(reference, k, neighbours), _Balls(reference, density_k, neighbours)
    found = _Membership(reference, balls, sample, _Balls(sample, k))
    count = len(sample.centred)
    density, covered = np.zeros(count), np.zeros(len(reference.centred), bool)
    nearest, ratio = np.full(count, np.inf, np.float32), np.full(count, np.inf, np.float32)
    trusted = balls.squared_radii <= np.median(balls.squared_radii)
    for rows, squared in _squared_distances(reference, sample):
        found.look(rows, squared)
        within = squared < wide.below[rows, None]
        density += np.count_nonzero(within, axis=0)
        covered[rows] = within.any(axis=1)
        np.minimum(nearest, squared.min(axis=0), out=nearest)
        chosen = np.flatnonzero(trusted[rows])
        radii = np.maximum(balls.squared_radii[rows][chosen, None], np.finfo(np.float32).tiny)
        np.minimum(ratio, (squared[chosen] / radii).min(axis=0, initial=np.inf), out=ratio)
    sample_inside, reference_inside = found.decide()
    with np.errstate(divide="ignore"):
        realism = 1 / np.sqrt(np.maximum(ratio, 0, dtype=np.float64))
    return Neighbourhoods(sample_inside, reference_inside, density / density_k, covered, realism,
                          _length(nearest, sample), _length(neighbours[:, 1], reference))


class _Points(NamedTuple):
    given: np.ndarray       # (n, D), any floating-point type
    centred: np.ndarray     # (n, D) float32: (given - centre) / unit
    squares: np.ndarray     # (n,) float32, squared norms of `centred`
    centre: np.ndarray      # (D,) float32
    unit: np.float32

    def take(self, indices: np.ndarray) -> _Points:
        return self._replace(given=self.given[indices], centred=self.centred[indices], squares=self.squares[indices])

    def precise(self, rows: slice | np.ndarray) -> np.ndarray:
        """Those rows in the coordinates of `centred`, in float64."""
        return (self.given[rows].astype(np.float64) - self.centre) / self.unit


def _centred(*sets: np.ndarray) -> list[_Points]:
    """The sets of features in common coordinates, in which float32 suffers neither from a common mean nor from scale.

    Any centre close to the means does, so that it is rounded to float32: then nothing but the result of the
    subtraction is rounded.
    """
    centre = np.float32(sum(features.mean(axis=0, dtype=np.float64) for features in sets) / len(sets))
    centred = [np.subtract(features, centre, out=np.empty(features.shape, np.float32), casting="same_kind")
               for features in sets]
    unit = max(max(points.max(), -points.min()) for points in centred) or np.float32(1)
    for points in centred:
        points /= unit
    return [_Points(features, points, np.einsum("ij,ij->i", points, points), centre, unit)
            for features, points in zip(sets, centred, strict=True)]


def _squared_distances(rows_of: _Points, columns_of: _Points,
                       triangle: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances in float32, a block of rows at a time: (rows, block), `block` overwritten by the next one.

    With `triangle`, a block ends with the column of its last row: enough where both are the same points.
    """
    height = max(64, min(2048, _BLOCK_ENTRIES // len(columns_of.centred)))
    buffer = np.empty(height * len(columns_of.centred), np.float32)
    for rows in _slices(len(rows_of.centred), height):
        left = rows_of.centred[rows]
        width = rows.stop if triangle else len(columns_of.centred)
        block = buffer[:len(left) * width].reshape(len(left), width)
        whole = rows.start if triangle else width
        np.matmul(left, columns_of.centred[:whole].T, out=block[:, :whole])
        if triangle:
            block[:, whole:] = left @ left.T        # numpy computes one half of it
        block *= -2
        block += columns_of.squares[:width]
        block += rows_of.squares[rows, None]
        yield rows, block


def _nearest(points: _Points, k: int) -> np.ndarray:
    """Squared distances (n, k + 1) of each point to itself and to its k nearest neighbours, ascending; float32."""
    nearest = np.full((len(points.centred), k + 1), np.inf, np.float32)
    for rows, squared in _squared_distances(points, points, triangle=True):
        nearest[rows] = _smallest(squared, k)
        before = squared[:, :rows.start]
        closer = np.flatnonzero((before < nearest[:rows.start, -1]).any(axis=0))
        candidates = np.concatenate([nearest[closer], before.T[closer]], axis=1)
        nearest[closer] = _smallest(candidates, k)
    return np.maximum(np.sort(nearest, axis=1), 0)


def _smallest(rows: np.ndarray, k: int) -> np.ndarray:
    """The k + 1 smallest of each row, the largest of them last; padded with infinity where there are fewer."""
    if rows.shape[1] <= k:
        rows = np.pad(rows, ((0, 0), (0, k + 1 - rows.shape[1])), constant_values=np.inf)
    return np.partition(rows, k, axis=1)[:, :k + 1]


class _Balls:
    """Around each point, as far as its k-th neighbour; `nearest` is what `_nearest` says, if that is known.

    surely, possibly: (n,) float32. A squared distance of at most `surely` in float32 is inside, one of more than
    `possibly` is outside, whatever the round-off was. below: slightly less than the squared radii, so that ties
    stay out in all likelihood.
    """

    def __init__(self, points: _Points, k: int, nearest: np.ndarray | None = None) -> None:
        self.k = k
        self.squared_radii = (_nearest(points, k) if nearest is None else nearest)[:, k]
        margin = _margin(points.squares, self.squared_radii, points.centred.shape[1], np.float32)
        self.surely, self.possibly = self.squared_radii - margin, self.squared_radii + margin
        self.below = self.squared_radii - margin / 16


def _margin(squares: np.ndarray, squared_radii: np.ndarray, channels: int, dtype: type) -> np.ndarray:
    """How far off the comparison of a squared distance with a ball's radius can be, with room to spare.

    Squared distances are off by a share of the two squared norms, which grows like the root of the number of terms;
    the points concerned have norms of up to the centre's norm plus the radius.
    """
    share = np.finfo(dtype).eps * (4 + np.sqrt(channels) / 2)
    return (2 * share * (squares + (np.sqrt(squares) + np.sqrt(squared_radii)) ** 2)).astype(dtype)


class _Membership:
    """Finds who is within a ball of the others: by float32, and by float64 for those too close to call."""

    def __init__(self, reference: _Points, reference_balls: _Balls, sample: _Points, sample_balls: _Balls) -> None:
        self.reference, self.reference_balls = reference, reference_balls
        self.sample, self.sample_balls = sample, sample_balls
        self.sample_surely, self.sample_possibly = np.zeros((2, len(sample.centred)), bool)
        self.reference_surely, self.reference_possibly = np.zeros((2, len(reference.centred)), bool)

    def look(self, rows: slice, squared: np.ndarray) -> None:
        """Takes in squared distances of those reference images from all samples."""
        self.sample_surely |= (squared <= self.reference_balls.surely[rows, None]).any(axis=0)
        self.sample_possibly |= (squared <= self.reference_balls.possibly[rows, None]).any(axis=0)
        self.reference_surely[rows] = (squared <= self.sample_balls.surely).any(axis=1)
        self.reference_possibly[rows] = (squared <= self.sample_balls.possibly).any(axis=1)

    def decide(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) and (N,) bool: the samples within reference balls, the reference images within sample balls."""
        for points, surely, possibly, centres, balls in (
                (self.sample, self.sample_surely, self.sample_possibly, self.reference, self.reference_balls),
                (self.reference, self.reference_surely, self.reference_possibly, self.sample, self.sample_balls)):
            open_cases = np.flatnonzero(possibly & ~surely)
            if len(open_cases):
                surely[open_cases] = _within_precisely(points.take(open_cases), centres, balls)
        return self.sample_surely, self.reference_surely


def _within_precisely(points: _Points, centres: _Points, balls: _Balls) -> np.ndarray:
    """Which points lie within a ball, (n,) bool, from distances in float64; ties up to its round-off lie within."""
    asked = np.zeros(len(centres.centred), bool)
    for _, squared in _squared_distances(points, centres):
        asked |= (squared <= balls.possibly).any(axis=0)
    asked = np.random.default_rng(0).permutation(np.flatnonzero(asked))     # soon done where many are duplicates
    inside = np.zeros(len(points.centred), bool)
    for chosen in (asked[part] for part in _slices(len(asked), 256)):
        near = np.zeros(len(centres.centred), bool)
        for rows, squared in _squared_distances(centres.take(chosen), centres):
            near |= (squared <= balls.possibly[chosen[rows], None]).any(axis=0)
        near = np.flatnonzero(near)
        middle = centres.precise(chosen)
        nearest = np.full((len(chosen), balls.k + 1), np.inf)
        for part in _slices(len(near), 2048):
            squared = _squared_distances_float64(middle, centres.precise(near[part]))
            nearest = _smallest(np.concatenate([nearest, squared], axis=1), balls.k)
        squared_radii = np.maximum(nearest.max(axis=1), 0)
        squared_radii += _margin(np.einsum("ij,ij->i", middle, middle), squared_radii, middle.shape[1], np.float64)
        outside = np.flatnonzero(~inside)
        for part in _slices(len(outside), 2048):
            squared = _squared_distances_float64(points.precise(outside[part]), middle)
            inside[outside[part]] = (squared <= squared_radii).any(axis=1)
        if inside.all():
            break
    return inside


def _squared_distances_float64(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    squared = (-2 * rows) @ columns.T
    squared += np.einsum("ij,ij->i", columns, columns)
    squared += np.einsum("ij,ij->i", rows, rows)[:, None]
    return squared


def _length(squared: np.ndarray, points: _Points) -> np.ndarray:
    """Distances in the features' own unit, float64, of squared ones in that of `points.centred`."""
    return np.sqrt(np.maximum(squared, 0, dtype=np.float64)) * float(points.unit)


# Precision and recall in the arithmetic of the official evaluator


def _official_inside(reference: np.ndarray, sample: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    reference, sample = reference.astype(np.float32, copy=False), sample.astype(np.float32, copy=False)
    reference_radii, sample_radii = _official_radii(reference, k), _official_radii(sample, k)
    sample_inside, reference_inside = np.zeros(len(sample), bool), np.zeros(len(reference), bool)
    for rows, columns, squared in _official_distances(reference, sample):
        sample_inside[columns] |= (squared <= reference_radii[rows, None]).any(axis=0)
        reference_inside[rows] |= (squared <= sample_radii[columns]).any(axis=1)
    return sample_inside, reference_inside


def _official_radii(features: np.ndarray, k: int) -> np.ndarray:
    nearest = np.full((len(features), k + 1), np.inf, np.float32)
    for rows, _, squared in _official_distances(features, features):
        nearest[rows] = _smallest(np.concatenate([nearest[rows], squared], axis=1), k)
    return nearest.max(axis=1)


def _official_distances(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Squared distances, float32 (rows, columns, block), as the official evaluator's TensorFlow has them on a CPU.

    Half precision, each operation rounded, as long as all 10,000 x 10,000 distances are finite. Products sum up in
    single precision there, squared norms do not.
    """
    height = max(1, _BLOCK_ENTRIES // min(len(right), _OFFICIAL_BLOCK))
    with np.errstate(over="ignore", invalid="ignore"):
        for above in _slices(len(left), _OFFICIAL_BLOCK):
            for columns in _slices(len(right), _OFFICIAL_BLOCK):
                chunks = [slice(above.start + rows.start, above.start + rows.stop)
                          for rows in _slices(above.stop - above.start, height)]
                half = np.empty((above.stop - above.start, columns.stop - columns.start), np.float16)
                finite = True
                for rows in chunks:
                    block = half[rows.start - above.start:rows.stop - above.start]
                    block[:] = _half_precision_distances(left[rows], right[columns])
                    finite = finite and bool(np.isfinite(block).all())
                    if not finite:
                        break
                for rows in chunks:
                    if finite:
                        block = half[rows.start - above.start:rows.stop - above.start].astype(np.float32)
                    else:
                        block = _single_precision_distances(left[rows], right[columns])
                    yield rows, columns, block


def _half_precision_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float16), right.astype(np.float16)
    products = (left.astype(np.float32) @ right.astype(np.float32).T).astype(np.float16)
    squared = _half_precision_sums(left * left)[:, None] - np.float16(2) * products
    squared += _half_precision_sums(right * right)
    return np.maximum(squared, np.float16(0))


def _single_precision_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squared = np.square(left).sum(axis=1)[:, None] - 2 * (left @ right.T)
    squared += np.square(right).sum(axis=1)
    return np.maximum(squared, np.float32(0))


def _half_precision_sums(values: np.ndarray) -> np.ndarray:
    """Sums (n,) of float16 rows (n, D) in the order in which TensorFlow's CPU kernel (Eigen) rounds them.

    Up to 1,024 terms: four accumulators of eight lanes each run over the row and are added up, packets of eight
    follow, then the lanes are added in single precision, then what remains. Longer rows are split in halves.
    """
    channels = values.shape[1]
    if channels > 1024:
        middle = -(-channels // 16) * 8
        return _half_precision_sums(values[:, :middle]) + _half_precision_sums(values[:, middle:])
    whole, packed = channels // 32 * 32, channels // 8 * 8
    sums = np.zeros((len(values), 32), np.float16)
    for start in range(0, whole, 32):
        sums += values[:, start:start + 32]
    lanes = sums[:, :8] + sums[:, 8:16] + sums[:, 16:24] + sums[:, 24:]
    for start in range(whole, packed, 8):
        lanes += values[:, start:start + 8]
    remainder = np.zeros(len(values), np.float16)
    for column in range(packed, channels):
        remainder += values[:, column]
    return remainder + lanes.astype(np.float32).sum(axis=1).astype(np.float16)


# Kernel distance


def kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> float:
    """Kernel distance KID (Binkowski et al. 1801.01401): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    reference: (N, D), sample: (M, D), two images of each at least. Around 0 for equal distributions, where it can be
    slightly negative. Uses all pairs of images; its expectation is that of the usual mean over subsets of 1,000,
    with less spread. From a larger set, max_images are drawn by `seed`. Raises UserError for shapes that do not
    fit, too few images, NaN or infinity.
    """
    size = min(len(sample), max_images)
    return float(resampled_kid(reference, sample, max_images, seed)(np.ones((1, size)))[0])


def _kernel_rows(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    height = max(1, _BLOCK_ENTRIES // (4 * len(columns)))
    for part in _slices(len(rows), height):
        kernel = (rows[part] @ columns.T).astype(np.float64)
        kernel /= rows.shape[1]
        kernel += 1
        yield part, kernel * kernel * kernel


# Bootstrap intervals


class Interval(NamedTuple):
    """Bounds of a confidence interval."""

    low: float
    high: float


Statistic = Callable[[np.ndarray], np.ndarray]      # counts (B, N) of how often each image occurs -> (B,) values


def bootstrap(statistic: Statistic, sizes: int | Sequence[int], replicates: int, seed: int = 0,
              level: float = 0.95) -> Interval:
    """Bootstrap interval of a metric: how far it moves when other images had been drawn.

    statistic: a `resampled_...` function of this module. sizes: the number of its images; several numbers that add
    up to it are resampled each on its own (the splits of the Inception Score). replicates: resamplings, at least 2.

    The interval is the percentile interval moved so that the mean of the replicates lies on the metric itself: FID
    and the like are biased by the number of distinct images, of which a resampling has only 63 %, and the plain
    percentiles would often lie beside the metric. Raises UserError for replicates below 2 and level outside (0, 1).
    """
    counts = resamplings(sizes, replicates, seed)
    estimate = statistic(np.ones((1, counts.shape[1]), np.uint16))[0]
    return interval(statistic(counts), estimate, level)


def resamplings(sizes: int | Sequence[int], replicates: int, seed: int = 0) -> np.ndarray:
    """Counts (replicates, N) of how often each image is drawn; `sizes` as for `bootstrap`, N their sum.

    Statistics of several files of the same image numbers, given the same counts, are paired: their differences too
    can be handed to `interval`. Raises UserError for replicates below 2.
    """
    if replicates < 2:
        raise UserError(f"{replicates} bootstrap replicates: must be at least 2")
    sizes = [sizes] if isinstance(sizes, int | np.integer) else list(sizes)
    counts = np.empty((replicates, sum(sizes)), np.uint16)
    rng = np.random.default_rng(seed)
    for row in counts:
        row[:] = np.concatenate([np.bincount(rng.integers(size, size=size), minlength=size) for size in sizes])
    return counts


def interval(values: np.ndarray, estimate: float, level: float = 0.95) -> Interval:
    """The interval of `bootstrap` of replicates (B,) of a number whose value is `estimate`.

    Raises UserError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise UserError(f"level {level}: must be between 0 and 1")
    low, high = np.quantile(values - values.mean(), [(1 - level) / 2, (1 + level) / 2]) + estimate
    return Interval(float(low), float(high))


class Replicates(NamedTuple):
    """A number, and what it is for each resampling (B,)."""

    estimate: float
    values: np.ndarray

    def minus(self, other: Replicates) -> Replicates:
        """Of paired resamplings: the difference."""
        return Replicates(self.estimate - other.estimate, self.values - other.values)

    @property
    def interval(self) -> Interval:
        """95 %."""
        return interval(self.values, self.estimate)


def resampled_mean(values: np.ndarray) -> Statistic:
    """For `bootstrap`: the mean of (N,) values, one for each image.

    Precision, recall, density, coverage: the fields of `Neighbourhoods` or the results of `inside`. The balls stay
    as they are; only the images that are asked whether they lie within (or hold one) are resampled.
    """
    values = np.asarray(values, np.float64)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.array([row @ values for row in counts]) / len(values)

    return statistic


def resampled_frechet_distance(mu: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> Statistic:
    """For `bootstrap`: `frechet_distance` of fixed reference statistics (D,), (D, D) to resampled features (N, D).

    Costs one product N x D x D and the eigenvalues of one matrix for each replicate.
    """
    mu = _mean(mu, "mu")
    features = _features(features, "features", 2)
    if features.shape[1] != len(mu):
        raise UserError(f"statistics of {len(mu)} and of {features.shape[1]} channels: must be of the same network")
    sigma = _covariance(sigma, "sigma", len(mu))
    factor = _factor(sigma, "sigma")
    centre = features.mean(axis=0, dtype=np.float64)
    squares, projected = np.empty(len(features)), np.empty((len(features), factor.shape[1]), np.float32)
    for rows in _slices(len(features), 1024):
        centred = features[rows] - centre
        squares[rows] = np.einsum("ij,ij->i", centred, centred)
        projected[rows] = centred @ factor

    def one(counts: np.ndarray) -> float:
        count = counts.sum()
        shift, projected_shift = np.zeros(len(mu)), np.zeros(projected.shape[1])
        gram = np.zeros((projected.shape[1],) * 2)
        for rows in _slices(len(features), 4096):
            drawn = rows.start + np.flatnonzero(counts[rows])
            weights = counts[drawn].astype(np.float64)
            shift += weights @ (features[drawn] - centre) / count
            weighted = projected[drawn] * np.sqrt(weights)[:, None]
            projected_shift += np.sqrt(weights) @ weighted / count
            gram += weighted.T @ weighted
        gram = (gram - count * np.outer(projected_shift, projected_shift)) / (count - 1)
        trace = (counts @ squares - count * (shift @ shift)) / (count - 1)
        difference = mu - centre - shift
        return max(0.0, difference @ difference + np.trace(sigma) + trace - 2 * _sum_of_roots(gram))

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.array([one(row.astype(np.int64)) for row in counts])

    return statistic


def resampled_inception_score(probabilities: np.ndarray, split_size: int = 5000) -> Statistic:
    """For `bootstrap`: `inception_score` of (N, classes); resample each of its splits on its own."""
    if split_size < 1:
        raise UserError(f"split_size {split_size}: must be at least 1")
    probabilities = _features(probabilities, "probabilities")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((abs(sums - 1) > 1e-3) | (probabilities < 0).any(axis=1))
    if len(wrong):
        raise UserError(f"probabilities of image {wrong[0]}: must not be negative and must have the sum 1")

    def statistic(counts: np.ndarray) -> np.ndarray:
        scores = []
        for split in _slices(len(probabilities), split_size):
            rows = probabilities[split].astype(np.float64)
            weights = counts[:, split] / counts[:, split].sum(axis=1, keepdims=True)
            mean = weights @ rows
            scores.append(np.exp(weights @ xlogy(rows, rows).sum(axis=1) - xlogy(mean, mean).sum(axis=1)))
        return np.mean(scores, axis=0)

    return statistic


def resampled_kid(reference: np.ndarray, sample: np.ndarray, max_images: int = 10_000, seed: int = 0) -> Statistic:
    """For `bootstrap`: `kid` with a fixed reference and min(M, max_images) resampled sample images.

    Pairs of one image with itself stay out, resampled or not.
    """
    if max_images < 2:
        raise UserError(f"max_images {max_images}: must be at least 2")
    reference, sample = (_thinned(features, max_images, seed) for features in _pair(reference, sample, 1))

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


# Input


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name} of type {array.dtype}: must be real numbers")
    if not all(np.isfinite(part).all() for part in (array[rows] for rows in _slices(len(array), 1024))):
        raise UserError(f"{name}: must be finite, but hold NaN or infinity")
    return array


def _features(features: np.ndarray, name: str, at_least: int = 1) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(f"{name} of shape {features.shape}: must be (images, channels)")
    if len(features) < at_least:
        raise UserError(f"{name} of {len(features)} images: at least {at_least} are needed")
    return _numbers(features, name)


def _check_k(k: int, name: str) -> None:
    if k < 1:
        raise UserError(f"{name} {k}: must be at least 1")


def _pair(reference: np.ndarray, sample: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The two checked: more than k images in each, of the same number of channels, finite."""
    _check_k(k, "k")
    reference = _features(reference, "reference features", k + 1)
    sample = _features(sample, "sample features", k + 1)
    if reference.shape[1] != sample.shape[1]:
        raise UserError(f"reference features of {reference.shape[1]} channels and sample features of "
                        f"{sample.shape[1]}: must be of the same network")
    return tuple(features.astype(np.result_type(features, np.float32), copy=False) for features in (reference, sample))
