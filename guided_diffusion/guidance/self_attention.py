"""Self-attention guidance (Hong et al., 2210.00939, algorithm 1) and its ablations, blur guidance among them.

    x0_bar = M * blur(x0) + (1 - M) * x0,    x_bar = sqrt(abar) x0_bar + sqrt(1 - abar) eps
    delta  = s (eps(x_t) - eps(x_bar))

M: the tokens that receive more attention than `threshold` times the average in one block, at the first evaluation.
Needs: capture of that block's received attention. Cost: one more network evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..capture import HEADS, Received, capture_attention, find_blocks
from ..errors import UserError
from .base import Contrast, StepContext
from .degrade import MASKS, gaussian_blur, high_frequency_mask, random_mask, square_mask

if TYPE_CHECKING:
    from ..gaussian_diffusion import Prediction

Mask = Callable[[StepContext, "Prediction"], Tensor]


class SelfAttentionGuidance(Contrast):
    """Guidance away from a copy of the image that is blurred where the network attends.

    model: the network that is sampled. block: its attention block, like "output.8" (`model.attention_blocks`).
    scale: s, 0 is off; the official `--guide_scale` is 1 + s. blur_sigma: pixels. threshold: of the mask, where 1 is
    the average attention. mask: "self-attention"; "global" (blur guidance, which reads no attention); "high-frequency",
    "random" or "square", with as many tokens as the attention would mask; or a function (ctx, pred) -> (N, 1, h, w)
    of h x w cells, any resolution, values in [0, 1]. heads: "exact", or "official" to split the map as the
    official code does. start, stop: see `Guidance`.
    """

    def __init__(self, model: nn.Module, block: str, scale: float, blur_sigma: float, threshold: float = 1.0,
                 mask: str | Mask = "self-attention", heads: str = "exact", start: int | None = None,
                 stop: int | None = None) -> None:
        super().__init__(scale, start, stop)
        if not callable(mask) and mask not in MASKS:
            raise UserError(f"mask {mask!r}: must be a function or one of {', '.join(MASKS)}")
        if heads not in HEADS:
            raise UserError(f"heads {heads!r}: must be one of {', '.join(HEADS)}")
        if not blur_sigma > 0 or not math.isfinite(blur_sigma):
            raise UserError(f"blur_sigma {blur_sigma}: must be greater than 0")
        if not math.isfinite(threshold):
            raise UserError(f"threshold {threshold}: must be a number")
        self.reads_attention = not callable(mask) and mask != "global"
        if self.reads_attention:
            find_blocks(model.attention_blocks, [block], "attention block")
        self.model = model
        self.block = block
        self.blur_sigma = blur_sigma
        self.threshold = threshold
        self.mask = mask
        self.heads = heads

    def observe(self) -> AbstractContextManager:
        if not self.reads_attention:
            return nullcontext()
        return capture_attention(self.model, [self.block], heads=self.heads)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        eps_degraded = ctx.denoise(self.degraded(ctx, pred), ctx.t).eps
        return self.scale * (pred.eps - eps_degraded)

    def degraded(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """x_bar (N, C, H, W): x0, blurred under the mask, with the same noise as x_t."""
        blurred = gaussian_blur(pred.pred_xstart, self.blur_sigma)
        mask = self.pixel_mask(ctx, pred)
        return ctx.denoise.diffusion.q_sample(torch.lerp(pred.pred_xstart, blurred, mask), ctx.t, noise=pred.eps)

    def pixel_mask(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The mask over pixels, (N, 1, H, W) float: 1 where the image is blurred."""
        size = ctx.x_t.shape[2:]
        if callable(self.mask):
            return F.interpolate(self.mask(ctx, pred).to(ctx.x_t), size, mode="nearest")
        if self.mask == "global":
            return torch.ones(len(ctx.x_t), 1, *size, device=ctx.x_t.device)
        captured = self._captured(ctx)
        tokens = self.token_mask(ctx, pred, captured)
        return F.interpolate(tokens.unflatten(1, captured.grid)[:, None].to(ctx.x_t), size, mode="nearest")

    def token_mask(self, ctx: StepContext, pred: Prediction, captured: Received) -> Tensor:
        """The mask over the block's tokens, (N, T) bool."""
        attended = captured.received > self.threshold
        count = attended.sum(dim=1)
        if self.mask == "square":
            return square_mask(count, captured.grid)
        if self.mask == "random":
            return random_mask(count, captured.grid, ctx.numbers, ctx.t)
        if self.mask == "high-frequency":
            return high_frequency_mask(count, captured.grid, pred.pred_xstart)
        return attended

    def _captured(self, ctx: StepContext) -> Received:
        captured = ctx.observed.get(self)
        if not captured:
            raise UserError(f"self-attention guidance saw no evaluation of {self.block!r}: it must be given the "
                            "network that is sampled")
        return captured[self.block]
