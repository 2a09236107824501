"""Precision and recall, density and coverage, and realism: which images lie among the nearest neighbours of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from guided_diffusion.errors import UserError

from . import arrays
from .arrays import check_k, checked_pair, slices
from .distances import (
    AT_ONCE,
    Balls,
    Membership,
    Points,
    centred_points,
    comparison_margin,
    lengths,
    nearest_neighbours,
    precise_squared_distances,
    smallest,
    squared_distances,
    strictly_within,
)
from .official import official_membership

TOLD = 1e-4         # the part of a squared distance that its round-off may be: no picture shows it


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
    """Returns improved precision and recall, both in [0, 1] (Kynkaanniemi et al. 1904.06991, eq. 2).

    reference: (N, D), sample: (M, D), N and M at least k + 1. Precision is the share of the samples that lie within
    the distance of some reference image to its k-th neighbour (`<=`), recall the same with the roles exchanged.

    distances: "exact" decides as float64 does. "official" reproduces the official evaluator on a CPU: distances in
    half precision, or in single precision for 10,000 x 10,000 images among which half precision overflows. It moves
    ordinary results by up to 0.008, and results of features with a large common mean by much more.
    Raises UserError for shapes that do not fit, too few images, NaN or infinity, k below 1, other `distances`.
    """
    sample_inside, reference_inside = manifold_membership(reference, sample, k, distances)
    return float(sample_inside.mean()), float(reference_inside.mean())


def manifold_membership(reference: np.ndarray, sample: np.ndarray, k: int = 3,
                        distances: str = "exact") -> tuple[np.ndarray, np.ndarray]:
    """Returns which samples count for precision, (M,) bool, and which reference images for recall, (N,) bool.

    Arguments and errors are those of `precision_recall`. The results are also the fields `sample_inside` and
    `reference_inside` of `Neighbourhoods`.
    """
    reference, sample = checked_pair(reference, sample, k)
    if distances == "official":
        return official_membership(reference, sample, k)
    if distances != "exact":
        raise UserError(f"distances {distances!r}: must be exact or official")
    real, generated = centred_points(reference, sample)
    membership = Membership(real, Balls(real, k), generated, Balls(generated, k))
    for rows, squared in squared_distances(real, generated):
        membership.update(rows, squared)
    return membership.decide()


def density_coverage(reference: np.ndarray, sample: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Returns density, in [0, inf), and coverage, in [0, 1] (Naeem et al. 2002.09797, eq. 4 and 5).

    reference: (N, D), sample: (M, D), N and M at least k + 1. Balls reach from each reference image to its k-th
    neighbour, boundary excluded as in the authors' code: identical sets have density 1 and coverage 1.
    Pairs that are too close for float32 are decided in float64. Raises UserError as `precision_recall`.
    """
    real, generated = centred_points(*checked_pair(reference, sample, k))
    counts = _BallCounts(real, Balls(real, k), generated)
    for rows, squared in squared_distances(real, generated):
        counts.update(rows, squared)
    return float(counts.density.mean() / k), float(counts.covered.mean())


class _BallCounts:
    """How many reference balls hold each sample, and which of them hold one, as float64 decides."""

    def __init__(self, centres: Points, balls: Balls, samples: Points) -> None:
        self.centres, self.balls, self.samples = centres, balls, samples
        self.density, self.covered = np.zeros(len(samples.centred)), np.zeros(len(centres.centred), bool)

    def update(self, rows: slice, squared: np.ndarray) -> None:
        """Takes in squared distances of those reference images from all samples."""
        within = squared < self.balls.surely[rows, None]
        close = squared <= self.balls.possibly[rows, None]
        close &= ~within
        open_rows = np.flatnonzero(close.any(axis=1))
        for part in slices(len(open_rows), AT_ONCE):
            chosen = open_rows[part]
            within[chosen] |= strictly_within(self.centres, self.balls, rows.start + chosen, self.samples,
                                              close[chosen])
        self.density += np.count_nonzero(within, axis=0)
        self.covered[rows] = within.any(axis=1)


def neighbourhoods(reference: np.ndarray, sample: np.ndarray, k: int = 3, density_k: int = 5) -> Neighbourhoods:
    """Returns all that distances say, computed in one go: precision, recall, density, coverage, realism, distances.

    reference: (N, D), sample: (M, D), both of more than max(k, density_k) images. The realism of a sample is the
    largest ratio of a reference ball's radius to the sample's distance from its centre, over the half of the balls
    with the smaller radii: it is >= 1 within such a ball and inf on a centre. Raises UserError as `precision_recall`.
    """
    check_k(k, "k")
    check_k(density_k, "density_k")
    real, generated = centred_points(*checked_pair(reference, sample, max(k, density_k)))
    neighbours = nearest_neighbours(real, max(k, density_k))
    balls = Balls(real, k, neighbours)
    membership = Membership(real, balls, generated, Balls(generated, k))
    count = len(generated.centred)
    counts = _BallCounts(real, Balls(real, density_k, neighbours), generated)
    spread = _told_neighbours(real, neighbours)
    radii, slack = spread[:, k], (balls.squared_radii - balls.surely).astype(np.float64)
    badly = _told_badly(real, neighbours[:, 1])
    slack[badly] = _round_off(real, badly)
    trusted = radii - slack <= np.median(radii + slack)         # also those that tie with it but for rounding
    divisors = np.maximum(radii, np.finfo(np.float32).tiny).astype(np.float32)[:, None]
    nearest, ratio = np.full(count, np.inf, np.float32), np.full(count, np.inf, np.float32)
    for rows, squared in squared_distances(real, generated):
        membership.update(rows, squared)
        counts.update(rows, squared)
        np.minimum(nearest, squared.min(axis=0), out=nearest)
        chosen = np.flatnonzero(trusted[rows])
        with np.errstate(over="ignore"):                # of balls without a radius
            np.minimum(ratio, (squared[chosen] / divisors[rows][chosen]).min(axis=0, initial=np.inf), out=ratio)
    sample_inside, reference_inside = membership.decide()
    to_nearest, to_radius = np.maximum(nearest, 0, dtype=np.float64), np.maximum(ratio, 0, dtype=np.float64)
    for told, precise in _precise_rows(generated, nearest, real):
        to_nearest[told] = precise.min(axis=1)
        to_radius[told] = (precise[:, trusted] / divisors[trusted, 0]).min(axis=1)
    with np.errstate(divide="ignore"):
        realism = 1 / np.sqrt(to_radius)
    return Neighbourhoods(sample_inside, reference_inside, counts.density / density_k, counts.covered, realism,
                          lengths(to_nearest, generated), lengths(spread[:, 1], real))


def _told_neighbours(points: Points, nearest: np.ndarray) -> np.ndarray:
    """Returns what `nearest_neighbours` does, float64, with those rows computed in it that float32 tells badly."""
    told = nearest.astype(np.float64)
    for rows, precise in _precise_rows(points, nearest[:, 1], points):
        precise[np.arange(len(rows)), rows] = 0
        told[rows] = np.sort(smallest(precise, nearest.shape[1] - 1), axis=1)
    return told


def _precise_rows(points: Points, nearest: np.ndarray, others: Points) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields squared distances (n, M) to the others in float64, of those points that float32 tells badly.

    nearest: (N,) squared distances to the nearest of them in float32. What float64 does not tell from 0 is 0, so that
    copies are alike.
    """
    badly = _told_badly(points, nearest)
    for part in slices(len(badly), max(64, arrays.BLOCK_ENTRIES // (4 * len(others.centred)))):
        rows: np.ndarray = badly[part]
        precise = precise_squared_distances(points.take(rows), others)
        precise[precise <= _round_off(points, rows)[:, None]] = 0
        yield rows, precise


def _told_badly(points: Points, nearest: np.ndarray) -> np.ndarray:
    """Returns the indices of points whose squared distance to the nearest is beside the truth in float32."""
    return np.flatnonzero(comparison_margin(points, np.maximum(nearest, 0)) > TOLD * nearest)


def _round_off(points: Points, rows: np.ndarray) -> np.ndarray:
    """Bounds what squared distances of those points to others that are near are off by in float64."""
    squares = points.squares[rows].astype(np.float64)
    return 4 * np.finfo(np.float64).eps * (4 + np.sqrt(points.centred.shape[1])) * squares
