"""Whether a network that others made gives an image the same outputs alone, beside another image, and at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import UserError
from .late import Tensor, torch

PROBES = 2                      # images on which a network is tried
TOLERANCE = 0.03                # of the outputs' root mean square: some five times the rounding of bfloat16 networks

Outputs = Sequence[Tensor | np.ndarray]             # (N, ...) each


def noise_images(channels: int, height: int, width: int) -> Tensor:
    """PROBES images of noise, (PROBES, channels, height, width) float32 in [0, 1], each half as bright as the last.

    In a batch of images that are alike, a network that normalizes by the batch gives nearly what it gives alone.
    """
    noise = torch.rand((PROBES, channels, height, width), generator=torch.Generator().manual_seed(0))
    return noise * 0.5 ** torch.arange(PROBES).view(-1, 1, 1, 1)


def check_steady(run: Callable[[Any], Outputs], images: Any, where: str, what: str,
                 together: Outputs | None = None) -> None:
    """Raises UserError where a network gives an image other outputs beside another one, or at each call.

    run: images (N, ...) to outputs. images: some that differ, a tensor or an array. where: how the sentence begins.
    what: the outputs in a word. together: those of all images, where they are known. Rounding is no difference, and
    neither is what is not finite.
    """
    together = run(images) if together is None else together
    rows = [slice(i, i + 1) for i in range(len(images))]
    if any(_differ(one, whole, whole[row]) for row in rows
           for one, whole in zip(run(images[row]), together, strict=True)):
        raise UserError(f"{where}: gives an image other {what} alone than beside another image, or at each call; "
                        "export it after .eval()")


def _differ(one: Tensor | np.ndarray, whole: Tensor | np.ndarray, other: Tensor | np.ndarray) -> bool:
    """Whether two outputs differ by more than rounding, measured by the whole batch's."""
    if one.shape != other.shape:
        return True
    return _size(one - other) > TOLERANCE * _size(whole)


def _size(values: Tensor | np.ndarray) -> float:
    """The root mean square; NaN of nothing."""
    values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))       # a copy, to write to
    return float(values.float().square().mean().sqrt())
