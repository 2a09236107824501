"""Smoothed energy guidance (Hong, 2408.00760, section 4).

    delta = s (eps(x_t) - eps_smoothed(x_t)),    the queries of chosen attention blocks blurred over the token grid

The blur is a Gaussian of `blur_sigma` tokens; with sigma = inf every query becomes the mean over the grid. Keys and
values stay.
Needs: override of those blocks. Cost: as that of perturbed-attention guidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Unpack

from ..errors import UserError
from ..late import Tensor
from ..options import option
from ..terms import Guidance, SigmaRange
from .base import Networks, block_names, each, naming, sigma_max_option, sigma_min_option, start_option
from .degrade import gaussian_blur
from .perturbed_attention import AttentionContrast, AttentionOptions

if TYPE_CHECKING:
    from ..unet import UNetModel

INFINITE = 9999.0               # from this sigma on it is the mean, as for infinity; in the reference code above it


class SmoothedEnergyGuidance(AttentionContrast):
    """Guidance away from the network whose attention in `blocks` has smoothed queries.

    model: the network that is sampled. blocks: names in `model.attention_blocks`. scale: s, 0 is off. blur_sigma:
    standard deviation of the blur in tokens of each block's grid; from 9999 on, infinite. The others: see `Guidance`.
    """

    name = "smoothed energy guidance"

    def __init__(self, model: UNetModel, blocks: Sequence[str], scale: float, blur_sigma: float = math.inf,
                 start: int | None = None, stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(model, blocks, scale, start, stop, **sigma)
        if not blur_sigma > 0:
            raise UserError(f"SmoothedEnergyGuidance blur_sigma {blur_sigma!r}: must be greater than 0")
        self.blur_sigma = blur_sigma

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention with smoothed queries, (N, heads, T, C / heads)."""
        from ..attention import attention

        return attention(smoothed(q, grid, self.blur_sigma), k, v)


def smoothed(q: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """Queries (N, heads, T, d), blurred over their grid (height, width).

    The kernel has 2 floor(ceil(6 sigma) / 2) + 1 taps, at most as many as the grid (one more where that is even), and
    reflects at the borders, as that of the reference code.
    """
    if sigma >= INFINITE:
        return q.mean(dim=2, keepdim=True).expand_as(q)
    n, heads, tokens, width = q.shape
    maps = q.transpose(2, 3).reshape(n, heads * width, *grid)
    taps = min(2 * (math.ceil(6 * sigma) // 2) + 1, min(grid) + (min(grid) % 2 == 0))
    return gaussian_blur(maps, sigma, taps).reshape(n, heads, width, tokens).transpose(2, 3)


@dataclass(frozen=True)
class SegOptions(AttentionOptions):
    """Smoothed energy guidance."""

    short = "SEG"
    symbols: ClassVar = {"seg_blur_sigma": ("sigma", 0.0)}
    term = SmoothedEnergyGuidance
    switched_on: ClassVar = {"seg_scale": 1.0}
    search: ClassVar = each("seg_scale", 0.5, 1.0, 2.0, 3.0)
    sigma_flags = "seg"
    for_pipelines = True

    seg_scale: float = option(0.0, "scale s of smoothed energy guidance; 0: off")
    seg_blocks: str = option("middle", "attention blocks whose queries are smoothed, comma-separated")
    seg_blur_sigma: float = option(INFINITE, "standard deviation of the blur in tokens; inf, as from 9999 on: every "
                                   "query becomes their mean", above=0, infinity=INFINITE)
    seg_start: int | None = start_option()
    seg_sigma_min: float | None = sigma_min_option()
    seg_sigma_max: float | None = sigma_max_option()

    def details(self) -> dict[str, str]:
        """Blocks and blur."""
        infinite = self.seg_blur_sigma >= INFINITE
        return {**super().details(), "blur": f"sigma = {'infinite' if infinite else format(self.seg_blur_sigma, 'g')}"}

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        with naming("seg_blocks", self.seg_blocks):
            return [SmoothedEnergyGuidance(nets.model, block_names(self.seg_blocks), self.seg_scale,
                                           self.seg_blur_sigma, **self.window)]
