"""Saturation and contrast of images: what guidance that is too strong raises, seen without any network."""

from __future__ import annotations

import numpy as np

from guided_diffusion.npz import BatchFile

BLOCK = 2**22                           # pixels at a time
LUMA = (0.299, 0.587, 0.114)            # of red, green and blue, ITU-R BT.601


def saturation(images: np.ndarray) -> np.ndarray:
    """Returns the mean saturation of each image, (N,) float64 in [0, 1]: S of HSV, averaged over the pixels.

    images: (N, H, W, 3) uint8. S is (max - min) / max of the three channels, and 0 for a black pixel.
    """
    highest, lowest = images.max(axis=3), images.min(axis=3)
    shares = (highest - lowest) / np.maximum(highest, 1, dtype=np.float32)
    return shares.mean(axis=(1, 2), dtype=np.float64)


def contrast(images: np.ndarray) -> np.ndarray:
    """Returns the contrast of each image, (N,) float64 in [0, 0.5]: the standard deviation of luma over the pixels.

    images: (N, H, W, 3) uint8. Luma is 0.299 R + 0.587 G + 0.114 B with channels from 0 to 1.
    """
    luma = images @ (np.array(LUMA, np.float32) / 255)
    return luma.std(axis=(1, 2), dtype=np.float64)


MEASURES = {"saturation": saturation, "contrast": contrast}


def pixel_measure(kind: str, file: BatchFile, count: int) -> np.ndarray:
    """Returns one of MEASURES for the first `count` images of a file, (count,). A few images are in memory."""
    at_a_time = max(1, BLOCK // (file.shape[1] * file.shape[2]))
    return np.concatenate([MEASURES[kind](images) for _, images in file.batches(at_a_time, num_images=count)])
