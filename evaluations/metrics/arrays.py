"""Checks of the arrays that metrics receive, and how large ones are cut into pieces."""

from __future__ import annotations

import numpy as np

from guided_diffusion.errors import UserError

BLOCK_ENTRIES = 2**24           # of a block of distances: 64 MiB in float32; large blocks suit threads best

LARGEST = 1e37                  # magnitude of features, which float32 bears, their differences included


def slices(count: int, size: int) -> list[slice]:
    """Cuts range(count) into slices of `size`; the last one may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def finite_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Returns `array` as an array; raises UserError, naming it, where it holds anything but finite real numbers."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name} of type {array.dtype}: must be real numbers")
    if not all(np.isfinite(part).all() for part in (array[rows] for rows in slices(len(array), 1024))):
        raise UserError(f"{name}: must be finite, but hold NaN or infinity")
    return array


def checked_features(features: np.ndarray, name: str, at_least: int = 1) -> np.ndarray:
    """Returns features (N, D) as an array.

    Raises UserError, naming them, for another shape, for fewer than `at_least` images, for NaN and infinity.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(f"{name} of shape {features.shape}: must be (images, channels)")
    if len(features) < at_least:
        raise UserError(f"{name} of {len(features)} images: at least {at_least} are needed")
    return finite_numbers(features, name)


def check_k(k: int, name: str) -> None:
    """Raises UserError, naming it, for a number of neighbours below 1."""
    if k < 1:
        raise UserError(f"{name} {k}: must be at least 1")


def checked_pair(reference: np.ndarray, sample: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets of features, (N, D) and (M, D), in floating point of at least single precision.

    Raises UserError for k below 1, for k or fewer images in one of them, for different D, for NaN and infinity, and
    for magnitudes above 1e37, which single precision does not bear.
    """
    check_k(k, "k")
    reference = checked_features(reference, "reference features", k + 1)
    sample = checked_features(sample, "sample features", k + 1)
    if reference.shape[1] != sample.shape[1]:
        raise UserError(f"reference features of {reference.shape[1]} channels and sample features of "
                        f"{sample.shape[1]}: must be of the same network")
    for features, name in ((reference, "reference"), (sample, "sample")):
        largest = max(float(abs(features[rows]).max()) for rows in slices(len(features), 1024))
        if largest > LARGEST:
            raise UserError(f"{name} features of up to {largest:.3g}: must be at most {LARGEST:g} in magnitude")
    return _floating(reference), _floating(sample)


def thinned(features: np.ndarray, max_images: int, seed: int) -> np.ndarray:
    """Returns `max_images` of the features (N, ...), drawn by the seed, in their order; all where there are fewer."""
    if len(features) <= max_images:
        return features
    return features[np.sort(np.random.default_rng(seed).choice(len(features), max_images, replace=False))]


def _floating(features: np.ndarray) -> np.ndarray:
    return features.astype(np.result_type(features, np.float32), copy=False)
