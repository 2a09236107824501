"""The Inception Score."""

from __future__ import annotations

import numpy as np
from scipy.special import xlogy

from guided_diffusion.errors import UserError

from .arrays import checked_features, slices
from .bootstrap import Statistic


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Returns the Inception Score, in [1, classes]: exp of the mean of KL(p(y|x) || p(y)) (Salimans et al. 1606.03498).

    probabilities: (N, classes), rows with sum 1. It is computed as in the official evaluator: there is one score for
    every split_size images in the order given, the last split may be short and counts as much as the others, and the
    result is their mean. The result is NaN where any probability is exactly zero, as it is there. Raises UserError for
    rows that are not probabilities, and for split_size below 1.
    """
    statistic = resampled_inception_score(probabilities, split_size)
    return float(statistic(np.ones((1, len(probabilities))))[0]) if np.all(probabilities) else float("nan")


def checked_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Returns probabilities (N, classes) as an array; raises UserError for rows that are none."""
    probabilities = checked_features(probabilities, "probabilities")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((abs(sums - 1) > 1e-3) | (probabilities < 0).any(axis=1))
    if len(wrong):
        raise UserError(f"probabilities of image {wrong[0]}: must not be negative and must have the sum 1")
    return probabilities


def resampled_inception_score(probabilities: np.ndarray, split_size: int = 5000) -> Statistic:
    """Returns the statistic of `inception_score` of (N, classes); resample each of its splits on its own."""
    if split_size < 1:
        raise UserError(f"split_size {split_size}: must be at least 1")
    probabilities = checked_probabilities(probabilities)

    def statistic(counts: np.ndarray) -> np.ndarray:
        scores = []
        for split in slices(len(probabilities), split_size):
            rows = probabilities[split].astype(np.float64)
            weights = counts[:, split] / counts[:, split].sum(axis=1, keepdims=True)
            mean = weights @ rows
            scores.append(np.exp(weights @ xlogy(rows, rows).sum(axis=1) - xlogy(mean, mean).sum(axis=1)))
        return np.mean(scores, axis=0)

    return statistic
