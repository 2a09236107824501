"""Perturbed-attention guidance (Ahn et al., 2403.17377, eq. 15).

    delta = s (eps(x_t) - eps_perturbed(x_t)),    attention maps of chosen blocks replaced by the identity

Needs: override of those blocks. Cost: the part of one more network evaluation that lies behind the first of those
blocks' attention; what lies before it, the two evaluations share.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from ..capture import capture_prefix, first_block, override_grid_attention, resume_from
from ..errors import UserError
from ..late import Tensor
from ..options import comma_separated, option
from ..process import Prediction
from ..terms import ContrastGuidance, Guidance, Passes, SigmaRange, StepContext
from .base import Networks, ScaledOptions, block_names, each, naming, sigma_max_option, sigma_min_option, start_option

if TYPE_CHECKING:
    from ..unet import Encoder, UNetModel


class AttentionContrast(ContrastGuidance):
    """Base of guidance away from the network whose attention in some blocks is another one.

    model: the network that is sampled. blocks: names in `model.attention_blocks`. scale and the others: see
    `Guidance`. One that extends it gives `attend`.
    """

    name = "attention guidance"

    def __init__(self, model: UNetModel, blocks: Sequence[str], scale: float, start: int | None = None,
                 stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        if isinstance(blocks, str) or not blocks:
            raise UserError(f"blocks {blocks!r}: must be a list of attention blocks, like ['middle']")
        self.model = model
        self.blocks = tuple(blocks)
        self.first = first_block(model, blocks)
        self.passes = replace(type(self).passes, begins_at=self.blocks)

    def observe(self) -> AbstractContextManager[Any]:
        """Captures what both evaluations share."""
        return capture_prefix(self.model, self.first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The attention in those blocks; all (N, heads, T, C / heads), grid the height and width of the T tokens."""
        raise NotImplementedError

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The contrast `s (eps(x_t) - eps_perturbed(x_t))`, (N, C, H, W)."""
        reached = False

        def attend(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
            nonlocal reached
            reached = True
            return self.attend(q, k, v, grid)

        with (override_grid_attention(self.model, self.blocks, attend),
              resume_from(self.model, ctx.observed.get(self, ()))):
            perturbed = ctx.denoise(ctx.x_t, ctx.t)
        if not reached:
            raise UserError(f"{self.name} changed no evaluation of {', '.join(self.blocks)}: it must "
                            "be given the network that is sampled")
        return self.scale * ctx.denoise.diffusion.eps_between(pred, perturbed, ctx.t)


class PerturbedAttentionGuidance(AttentionContrast):
    """Guidance away from the network with identity attention in `blocks`.

    The arguments: see `AttentionContrast`.
    """

    name = "perturbed-attention guidance"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The identity, (N, heads, T, C / heads)."""
        return v


@dataclass(frozen=True)
class AttentionOptions(ScaledOptions):
    """Base of the options of a method of one `AttentionContrast`, in the blocks that the flag `NAME_blocks` names.

    So plans and benches count the part of an evaluation that the term makes. A method whose blocks are fixed gives
    `blocks` instead of that flag.
    """

    term: ClassVar[type[Guidance]] = AttentionContrast

    @property
    def _flag(self) -> str:
        return f"{self.sigma_flags}_blocks"

    @property
    def blocks(self) -> list[str]:
        """The blocks by name."""
        return comma_separated(getattr(self, self._flag))

    def at_blocks(self, model: Encoder) -> dict[str, Self]:
        """The method at each attention block of a network alone."""
        if not hasattr(self, self._flag):
            return super().at_blocks(model)
        return {name: replace(self, **{self._flag: name}) for name in model.attention_blocks}

    def details(self) -> dict[str, str]:
        """The blocks."""
        return {"blocks": f"block {getattr(self, self._flag, ','.join(self.blocks))}"}

    @property
    def passes(self) -> Passes:
        """A part of one more evaluation."""
        return replace(self.term.passes, begins_at=tuple(self.blocks))


@dataclass(frozen=True)
class PagOptions(AttentionOptions):
    """Perturbed-attention guidance."""

    short = "PAG"
    term = PerturbedAttentionGuidance
    switched_on: ClassVar = {"pag_scale": 1.0}
    search: ClassVar = each("pag_scale", 0.5, 1.0, 2.0, 3.0)
    sigma_flags = "pag"
    for_pipelines = True

    pag_scale: float = option(0.0, "scale of perturbed-attention guidance; 0: off")
    pag_blocks: str = option("middle", "attention blocks that become the identity, comma-separated, like "
                             "input.8,middle")
    pag_start: int | None = start_option()
    pag_sigma_min: float | None = sigma_min_option()
    pag_sigma_max: float | None = sigma_max_option()

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        with naming("pag_blocks", self.pag_blocks):
            return [PerturbedAttentionGuidance(nets.model, block_names(self.pag_blocks), self.pag_scale,
                                               **self.window)]
