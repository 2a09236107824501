"""Pixels of files (uint8) and of networks (floating point in [-1, 1]), and the ways from one to the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], C 1 or 3, as (N, H, W, 3) uint8: truncated, as the official samples are."""
    pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.expand(*pixels.shape[:3], 3).contiguous().numpy()
