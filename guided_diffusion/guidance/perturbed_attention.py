"""Perturbed-attention guidance (Ahn et al., 2403.17377, eq. 15).

    delta = s (eps(x_t) - eps_perturbed(x_t)),    attention maps of chosen blocks replaced by the identity

Needs: override of those blocks. Cost: one more network evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..capture import find_blocks, override_attention
from ..errors import UserError
from ..late import Tensor
from ..options import option
from ..process import Prediction
from ..terms import ContrastGuidance, Guidance, Passes, StepContext
from .base import GuidanceOptions, Networks

if TYPE_CHECKING:
    from ..unet import Encoder


class PerturbedAttentionGuidance(ContrastGuidance):
    """Guidance away from the network with identity attention in `blocks` (names in `model.attention_blocks`).

    scale, start, stop: see `Guidance`.
    """

    def __init__(self, model: Encoder, blocks: Sequence[str], scale: float, start: int | None = None,
                 stop: int | None = None) -> None:
        super().__init__(scale, start, stop)
        if isinstance(blocks, str) or not blocks:
            raise UserError(f"blocks {blocks!r}: must be a list of attention blocks, like ['middle']")
        find_blocks(model.attention_blocks, blocks, "attention block")
        self.model = model
        self.blocks = tuple(blocks)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The contrast `s (eps(x_t) - eps_perturbed(x_t))`, (N, C, H, W)."""
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


@dataclass(frozen=True)
class PagOptions(GuidanceOptions):
    """Perturbed-attention guidance."""

    short = "PAG"
    switched_on: ClassVar = {"pag_scale": 1.0}

    pag_scale: float = option(0.0, "scale of perturbed-attention guidance; 0: off")
    pag_blocks: str = option("middle", "attention blocks that become the identity, comma-separated, like "
                             "input.8,middle")
    pag_start: int | None = option(None, "guided only at respaced steps below this one; unset: at all", minimum=0)

    @property
    def active(self) -> bool:
        """Whether the scale is not 0."""
        return self.pag_scale != 0

    def headline(self) -> str:
        """Like "PAG s = 1"."""
        return f"PAG s = {self.pag_scale:g}"

    def details(self) -> dict[str, str]:
        """The blocks."""
        return {"blocks": f"block {self.pag_blocks}"}

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        blocks = [block.strip() for block in self.pag_blocks.split(",") if block.strip()]
        return [PerturbedAttentionGuidance(nets.model, blocks, self.pag_scale, start=self.pag_start)]

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """One more evaluation from `pag_start` down."""
        return [(Guidance(self.pag_scale, self.pag_start), PerturbedAttentionGuidance.passes)]
