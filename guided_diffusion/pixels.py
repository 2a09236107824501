"""Pixels of files (uint8, 0 to 255) and of networks (float32 in [-1, 1]), and the ways from one to the other."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from .late import Tensor, torch

Pixels = TypeVar("Pixels", np.ndarray, Tensor)


def from_uint8(pixels: Pixels) -> Pixels:
    """Pixels from 0 to 255, of any shape and type, as float32 in [-1, 1]: x / 127.5 - 1."""
    if isinstance(pixels, Tensor):
        return pixels.float() / 127.5 - 1
    return pixels.astype(np.float32) / 127.5 - 1


def file_channels(channels: int) -> int:
    """How many channels images of a network have in files: as many, but 3 for grey ones."""
    return 3 if channels == 1 else channels


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as (N, H, W, C) uint8: truncated, as the official samples are. Grey becomes RGB.

    Values beyond [-1, 1] are clamped. The official code, scripts/image_sample.py of guided-diffusion, truncates by its
    conversion to uint8, and comparable FIDs need the same.
    """
    pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.expand(*pixels.shape[:3], file_channels(pixels.shape[3])).contiguous().numpy()


def to_rounded_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1], of any shape, as the nearest uint8: round((x + 1) * 127.5), halves to even.

    It undoes `from_uint8` exactly. Depth maps become pictures so, and so do the images of a reference batch that were
    in [-1, 1] between; samples are truncated (`to_uint8`).
    """
    return np.rint((pixels + 1) * 127.5).astype(np.uint8)


def unit_to_uint8(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], of any shape, as the nearest uint8, halves to even: what diffusers does with images."""
    return np.rint(values * 255).astype(np.uint8)
