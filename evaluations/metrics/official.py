"""Precision and recall in the arithmetic of the official evaluator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import arrays
from .arrays import slices
from .distances import smallest

BLOCK_IMAGES = 10_000           # the official evaluator chooses half or single precision by blocks of so many images


def official_membership(reference: np.ndarray, sample: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples within reference balls, (M,) bool, and the reference images within sample balls, (N,) bool.

    reference: (N, D), sample: (M, D), both of more than k images.
    """
    reference, sample = reference.astype(np.float32, copy=False), sample.astype(np.float32, copy=False)
    reference_radii, sample_radii = _official_radii(reference, k), _official_radii(sample, k)
    sample_inside, reference_inside = np.zeros(len(sample), bool), np.zeros(len(reference), bool)
    for rows, columns, squared in _official_distances(reference, sample):
        sample_inside[columns] |= (squared <= reference_radii[rows, None]).any(axis=0)
        reference_inside[rows] |= (squared <= sample_radii[columns]).any(axis=1)
    return sample_inside, reference_inside


def _official_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distances (n,) of each image to its k-th neighbour."""
    nearest = np.full((len(features), k + 1), np.inf, np.float32)
    for rows, _, squared in _official_distances(features, features):
        nearest[rows] = smallest(np.concatenate([nearest[rows], squared], axis=1), k)
    return nearest.max(axis=1)


def _official_distances(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Squared distances, float32 (rows, columns, block), as the official evaluator's TensorFlow computes them on a CPU.

    They are in half precision, each operation rounded, as long as all 10,000 x 10,000 distances are finite. Products
    are summed in single precision there, squared norms in half precision.
    """
    height = max(1, arrays.BLOCK_ENTRIES // min(len(right), BLOCK_IMAGES))
    with np.errstate(over="ignore", invalid="ignore"):
        for above in slices(len(left), BLOCK_IMAGES):
            for columns in slices(len(right), BLOCK_IMAGES):
                chunks = [slice(above.start + rows.start, above.start + rows.stop)
                          for rows in slices(above.stop - above.start, height)]
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
