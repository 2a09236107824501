"""Randomness by image number: image i of a run is a function of (seed, i) alone, not of batch, rank or restarts.

Counter-based (Philox): the numbers of any image and step can be had without those before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STREAMS = {"noise": 0, "label": 1, "mask": 2, "depth": 3, "scene": 4}


def image_generator(seed: int, number: int, step: int = 0, stream: str = "noise") -> np.random.Generator:
    """The generator of one image (number >= 0) at one step, for one purpose."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number], counter=[0, 0, step, STREAMS[stream]]))


def image_noise(seed: int, numbers: Sequence[int], step: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, (len(numbers), *shape) float32 on the CPU."""
    return torch.from_numpy(np.stack([
        image_generator(seed, int(number), step).standard_normal(tuple(shape), dtype=np.float32)
        for number in numbers]))


def image_labels(seed: int, numbers: Sequence[int], num_classes: int) -> Tensor:
    """Uniform labels, (len(numbers),) int64 in [0, num_classes)."""
    return torch.tensor([int(image_generator(seed, int(number), stream="label").integers(num_classes))
                         for number in numbers], dtype=torch.int64)
