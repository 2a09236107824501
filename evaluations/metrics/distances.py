"""Distances between features, a block at a time: in float32, and in float64 where that is too close to call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import arrays
from .arrays import slices

AT_ONCE = 64            # balls that are compared in float64 together
ROWS = 2048             # points that are in memory in float64 together


class Points(NamedTuple):
    """Features of n images, as given and in the coordinates in which distances are computed."""

    given: np.ndarray       # (n, D), any floating-point type
    centred: np.ndarray     # (n, D) float32: (given - centre) / unit
    squares: np.ndarray     # (n,) float32, squared norms of `centred`
    centre: np.ndarray      # (D,) float32
    unit: np.float32

    def take(self, indices: slice | np.ndarray) -> Points:
        """Returns the points of these indices."""
        return self._replace(given=self.given[indices], centred=self.centred[indices], squares=self.squares[indices])

    def precise(self, rows: slice | np.ndarray) -> np.ndarray:
        """Returns those rows in the coordinates of `centred`, in float64."""
        return (self.given[rows].astype(np.float64) - self.centre) / self.unit


def centred_points(*sets: np.ndarray) -> list[Points]:
    """Puts the sets of features (n, D) into common coordinates, in which float32 bears a common mean and any scale.

    Any centre close to the means serves, so it is rounded to float32: then nothing but the result of the subtraction
    is rounded.
    """
    means = [features.mean(axis=0, dtype=np.float64) for features in sets]
    centre = np.asarray(np.sum(means, axis=0) / len(sets), np.float32)
    centred = [np.subtract(features, centre, out=np.empty(features.shape, np.float32), casting="same_kind")
               for features in sets]
    unit = max(max(points.max(), -points.min()) for points in centred) or np.float32(1)
    for points in centred:
        points /= unit
    return [Points(features, points, np.einsum("ij,ij->i", points, points), centre, unit)
            for features, points in zip(sets, centred, strict=True)]


def squared_distances(rows_of: Points, columns_of: Points,
                      triangle: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields squared distances in float32, a block of rows at a time: (rows, block); the next one overwrites `block`.

    With `triangle`, a block ends with the column of its last row, which is enough where both are the same points.
    """
    height = max(64, min(2048, arrays.BLOCK_ENTRIES // len(columns_of.centred)))
    buffer = np.empty(height * len(columns_of.centred), np.float32)
    for rows in slices(len(rows_of.centred), height):
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


def nearest_neighbours(points: Points, k: int) -> np.ndarray:
    """Returns squared distances (n, k + 1), float32, of each point to itself and its k nearest, in rising order."""
    nearest = np.full((len(points.centred), k + 1), np.inf, np.float32)
    for rows, squared in squared_distances(points, points, triangle=True):
        nearest[rows] = smallest(squared, k)
        before = squared[:, :rows.start]
        closer = np.flatnonzero((before < nearest[:rows.start, -1]).any(axis=0))
        candidates = np.concatenate([nearest[closer], before.T[closer]], axis=1)
        nearest[closer] = smallest(candidates, k)
    return np.maximum(np.sort(nearest, axis=1), 0)


def smallest(rows: np.ndarray, k: int) -> np.ndarray:
    """Returns the k + 1 smallest of each row, the largest of them last, padded with infinity where there are fewer."""
    if rows.shape[1] <= k:
        rows = np.pad(rows, ((0, 0), (0, k + 1 - rows.shape[1])), constant_values=np.inf)
    return np.partition(rows, k, axis=1)[:, :k + 1]


class Balls:
    """Balls around points, each as large as the distance to the k-th neighbour.

    nearest: the result of `nearest_neighbours`, if it is known. surely, possibly: (n,) float32; a squared distance of
    at most `surely` in float32 is inside, one of more than `possibly` is outside, whatever the round-off was. below:
    slightly less than the squared radii, so that ties stay out in all likelihood, where float32 is enough.
    """

    def __init__(self, points: Points, k: int, nearest: np.ndarray | None = None) -> None:
        self.k = k
        self.squared_radii = (nearest_neighbours(points, k) if nearest is None else nearest)[:, k]
        margin = comparison_margin(points, self.squared_radii)
        self.surely, self.possibly = self.squared_radii - margin, self.squared_radii + margin
        self.below = self.squared_radii - margin / 16


def comparison_margin(points: Points, squared_radii: np.ndarray) -> np.ndarray:
    """Bounds how wrong float32 can compare squared distances with these squared radii around the points, (n,)."""
    return _margin(points.squares, squared_radii, points.centred.shape[1], np.float32)


def _margin(squares: np.ndarray, squared_radii: np.ndarray, channels: int, dtype: type) -> np.ndarray:
    """Bounds generously how wrong the comparison of a squared distance with a ball's radius can be.

    Squared distances are off by a share of the two squared norms, which grows like the root of the number of terms;
    the points concerned have norms of up to the centre's norm plus the radius.
    """
    share = np.finfo(dtype).eps * (4 + np.sqrt(channels) / 2)
    return (2 * share * (squares + (np.sqrt(squares) + np.sqrt(squared_radii)) ** 2)).astype(dtype)


class Membership:
    """Finds which images lie within a ball of the others: by float32, and by float64 for those too close to call."""

    def __init__(self, reference: Points, reference_balls: Balls, sample: Points, sample_balls: Balls) -> None:
        self.reference, self.reference_balls = reference, reference_balls
        self.sample, self.sample_balls = sample, sample_balls
        self.sample_surely, self.sample_possibly = np.zeros((2, len(sample.centred)), bool)
        self.reference_surely, self.reference_possibly = np.zeros((2, len(reference.centred)), bool)

    def update(self, rows: slice, squared: np.ndarray) -> None:
        """Takes in squared distances of those reference images from all samples."""
        self.sample_surely |= (squared <= self.reference_balls.surely[rows, None]).any(axis=0)
        self.sample_possibly |= (squared <= self.reference_balls.possibly[rows, None]).any(axis=0)
        self.reference_surely[rows] = (squared <= self.sample_balls.surely).any(axis=1)
        self.reference_possibly[rows] = (squared <= self.sample_balls.possibly).any(axis=1)

    def decide(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (M,) and (N,) bool: the samples within reference balls, the reference images within sample balls."""
        for points, surely, possibly, centres, balls in (
                (self.sample, self.sample_surely, self.sample_possibly, self.reference, self.reference_balls),
                (self.reference, self.reference_surely, self.reference_possibly, self.sample, self.sample_balls)):
            open_cases = np.flatnonzero(possibly & ~surely)
            if len(open_cases):
                surely[open_cases] = _within_precisely(points.take(open_cases), centres, balls)
        return self.sample_surely, self.reference_surely


def _within_precisely(points: Points, centres: Points, balls: Balls) -> np.ndarray:
    """Finds in float64 which points lie within a ball, (n,) bool; ties lie within."""
    asked = np.zeros(len(centres.centred), bool)
    for _, squared in squared_distances(points, centres):
        asked |= (squared <= balls.possibly).any(axis=0)
    asked = np.random.default_rng(0).permutation(np.flatnonzero(asked))     # soon done where many are duplicates
    inside = np.zeros(len(points.centred), bool)
    for chosen in (asked[part] for part in slices(len(asked), AT_ONCE)):
        outside = np.flatnonzero(~inside)
        inside[outside] = _in_balls(centres, balls, chosen, points, outside, ties=True).any(axis=0)
        if inside.all():
            break
    return inside


def strictly_within(centres: Points, balls: Balls, chosen: np.ndarray, points: Points, close: np.ndarray) -> np.ndarray:
    """Finds in float64 which close pairs are nearer than the ball's radius, (n, M) bool; ties are not.

    chosen: (n,) indices of the balls, AT_ONCE at most. close: (n, M) bool, the pairs in question.
    """
    columns = np.flatnonzero(close.any(axis=0))
    within = np.zeros(close.shape, bool)
    within[:, columns] = close[:, columns] & _in_balls(centres, balls, chosen, points, columns, ties=False)
    return within


def _in_balls(centres: Points, balls: Balls, chosen: np.ndarray, points: Points, columns: np.ndarray,
              ties: bool) -> np.ndarray:
    """Finds in float64 which points lie within which balls, (n, m) bool; ties: whether those at the radius do.

    chosen: (n,) indices of the balls. columns: (m,) those of the points. Products decide first, with their round-off,
    from an origin amid the balls, which one very far point does not move as it moves a mean. What is left is decided by
    differences, which are the same for a pair of equal distance.
    """
    is_near = np.zeros(len(centres.centred), bool)
    for rows, squared in squared_distances(centres.take(chosen), centres):
        is_near |= (squared <= balls.possibly[chosen[rows], None]).any(axis=0)
    near = np.flatnonzero(is_near)
    origin = np.median(centres.given[chosen], axis=0).astype(np.float64)
    middle = centres.given[chosen] - origin
    to_centres = _distances_by_products(middle, centres, near, origin)
    squared_radii = np.maximum(np.partition(to_centres, balls.k, axis=1)[:, balls.k], 0)
    margin = _margin(np.einsum("ij,ij->i", middle, middle), squared_radii, middle.shape[1], np.float64)
    squared = _distances_by_products(middle, points, columns, origin)
    within = squared < (squared_radii - margin)[:, None]
    is_open = abs(squared - squared_radii[:, None]) <= margin[:, None]
    for row in np.flatnonzero(is_open.any(axis=1)):
        at_radius = near[abs(to_centres[row] - squared_radii[row]) <= 2 * margin[row]]
        nearer = np.count_nonzero(to_centres[row] < squared_radii[row] - 2 * margin[row])
        own = centres.given[chosen[row]].astype(np.float64)
        radius = np.sort(_distances_by_differences(own, centres, at_radius))[balls.k - nearer]
        found = _distances_by_differences(own, points, columns[is_open[row]])
        within[row, is_open[row]] = found <= radius if ties else found < radius
    return within


def _distances_by_products(middle: np.ndarray, points: Points, indices: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Returns squared distances (n, m) of (n, D) to those points as they are given, from `origin`, in float64."""
    return np.concatenate([squared_distances_float64(middle, points.given[indices[part]] - origin)
                           for part in slices(len(indices), ROWS)], axis=1)


def _distances_by_differences(own: np.ndarray, points: Points, indices: np.ndarray) -> np.ndarray:
    """Returns squared distances (m,) of (D,) to those points as they are given, in float64."""
    squared = np.empty(len(indices))
    for part in slices(len(indices), ROWS):
        differences = np.ascontiguousarray(points.given[indices[part]] - own)       # so that all sums have one order
        squared[part] = np.einsum("ij,ij->i", differences, differences)
    return squared


def squared_distances_float64(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns squared distances (n, M) of points (n, D) and (M, D), float64, by their products."""
    squared = (-2 * rows) @ columns.T
    squared += np.einsum("ij,ij->i", columns, columns)
    squared += np.einsum("ij,ij->i", rows, rows)[:, None]
    return squared


def precise_squared_distances(points: Points, others: Points) -> np.ndarray:
    """Returns squared distances (n, M) in float64, in the coordinates of `centred`."""
    middle = points.precise(slice(None))
    return np.concatenate([squared_distances_float64(middle, others.precise(part))
                           for part in slices(len(others.given), ROWS)], axis=1)


def lengths(squared: np.ndarray, points: Points) -> np.ndarray:
    """Turns squared distances in the unit of `points.centred` into distances in that of the features, float64."""
    return np.sqrt(np.maximum(squared, 0, dtype=np.float64)) * float(points.unit)
