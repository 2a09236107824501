"""Errors of estimated depth maps, as papers on depth estimation give them."""

from __future__ import annotations

import numpy as np

from guided_diffusion.depth.ranges import from_unit_range, has_ratios
from guided_diffusion.late import Tensor, torch

THRESHOLD = 1.25            # of the ratio of two depths, up to which delta counts them as equal


def depth_errors(predicted: Tensor, depth: Tensor, limits: tuple[float, float] | None) -> np.ndarray:
    """The errors of each depth map, (N, 3): l1, abs_rel and delta (Eigen et al. 2014, arXiv 1406.2283).

    l1: mean |d - d*| of depths in [-1, 1]. abs_rel: mean |d - d*| / d*, and delta: share of pixels with
    max(d / d*, d* / d) < 1.25, both in the units of `limits`. The two are NaN without limits, or where NEAR is not
    above 0.

    predicted, depth: (N, 1, h, w) in [-1, 1], where one predicted map may stand for all. limits: NEAR and FAR.
    """
    predicted = predicted.clamp(-1, 1).expand_as(depth)
    l1 = (predicted - depth).abs().mean(dim=(1, 2, 3))
    if not has_ratios(limits):
        return np.stack([l1.cpu().numpy(), *np.full((2, len(depth)), np.nan)], axis=1)
    in_units, true = (from_unit_range(maps.clamp(-1, 1), *limits) for maps in (predicted, depth))
    relative = ((in_units - true).abs() / true).mean(dim=(1, 2, 3))
    near = (torch.maximum(in_units / true, true / in_units) < THRESHOLD).float().mean(dim=(1, 2, 3))
    return torch.stack([l1, relative, near], dim=1).double().cpu().numpy()
