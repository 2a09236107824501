"""What a network says of a batch of images, and what the evaluator asks of a network."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Features(NamedTuple):
    """What a network sees in N images; float32 arrays."""

    pooled: np.ndarray  # (N, D), averages over the last feature map: FID, precision, recall
    spatial: np.ndarray  # (N, ...), a few channels of an earlier map with their places: sFID
    probabilities: np.ndarray  # (N, classes), sum 1: Inception Score


class Network(Protocol):
    """A source of features. `name` and `fingerprint` (SHA-256 of its weights) stand in every result."""

    name: str
    fingerprint: str

    def features(self, images: np.ndarray) -> Features:
        """Features of images (N, H, W, 3), uint8."""
