"""Perturbed-attention guidance (Ahn et al., 2403.17377, eq. 15).

    delta = s (eps(x_t) - eps_perturbed(x_t)),    attention maps of chosen blocks replaced by the identity

Needs: override of those blocks. Cost: one more network evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..capture import find_blocks, override_attention
from ..errors import UserError
from .base import Contrast, StepContext

if TYPE_CHECKING:
    from ..gaussian_diffusion import Prediction


class PerturbedAttentionGuidance(Contrast):
    """Guidance away from the network with identity attention in `blocks` (names in `model.attention_blocks`).

    scale, start, stop: see `Guidance`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], scale: float, start: int | None = None,
                 stop: int | None = None) -> None:
        super().__init__(scale, start, stop)
        if isinstance(blocks, str) or not blocks:
            raise UserError(f"blocks {blocks!r}: must be a list of attention blocks, like ['middle']")
        find_blocks(model.attention_blocks, blocks, "attention block")
        self.model = model
        self.blocks = tuple(blocks)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        reached = False

        def identity_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal reached
            reached = True
            return v

        with override_attention(self.model, self.blocks, identity_attention):
            eps_perturbed = ctx.denoise(ctx.x_t, ctx.t).eps
        if not reached:
            raise UserError(f"perturbed-attention guidance changed no evaluation of {', '.join(self.blocks)}: it must "
                            "be given the network that is sampled")
        return self.scale * (pred.eps - eps_perturbed)
