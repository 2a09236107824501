"""Time step guidance (Sadat et al., 2407.02687, section 4).

    delta = s (eps(x_t; emb) - eps(x_t; emb + noise_scale t^power n))

emb: the network's embedding of the step (with that of the label), n: standard normal noise of its size, t: the step as
a fraction of the chain. The paper perturbs the embedding that some layers see; `blocks` are those, all by default.
Needs: nothing, neither labels nor attention. Cost: one more network evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Unpack

import numpy as np

from ..capture import find_blocks, perturb_embedding, sees_embedding
from ..errors import UserError
from ..late import Tensor, torch
from ..options import option
from ..process import Prediction
from ..rng import image_generator
from ..terms import ContrastGuidance, Guidance, SigmaRange, StepContext, check_number
from .base import Networks, ScaledOptions, block_names, each, naming, sigma_max_option, sigma_min_option, start_option

if TYPE_CHECKING:
    from ..unet import Encoder


class TimestepGuidance(ContrastGuidance):
    """Guidance away from the network that is told a perturbed step.

    model: the network that is sampled. scale: s, 0 is off. noise_scale, power: of the noise in the embedding,
    noise_scale t^power, t from 0 to 1. seed: the noise of an image at a step depends on seed, image and step alone.
    blocks: names in `model.feature_blocks` that see the noise; None: all. The others: see `Guidance`.
    """

    def __init__(self, model: Encoder, scale: float, noise_scale: float, power: float = 1.0, seed: int = 0,
                 blocks: Sequence[str] | None = None, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        for name, value in (("noise_scale", noise_scale), ("power", power)):
            check_number(f"TimestepGuidance {name}", value)
            if value < 0:
                raise UserError(f"TimestepGuidance {name} {value!r}: must be at least 0")
        self.model = model
        self.noise_scale = noise_scale
        self.power = power
        self.seed = seed
        if isinstance(blocks, str) or (blocks is not None and not blocks):
            raise UserError(f"blocks {blocks!r}: must be a list of blocks, like ['middle'], or None")
        named = find_blocks(model.feature_blocks, model.feature_blocks if blocks is None else blocks, "block")
        seeing = [name for name, block in model.feature_blocks.items() if sees_embedding(block)]
        self.blocks = tuple(name for name in named if name in seeing)       # others are convolutions alone
        if not self.blocks:
            raise UserError(f"the embedding of the step does not reach {', '.join(named) or 'any block'}; it reaches: "
                            f"{', '.join(seeing) or 'no block'}")

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The contrast, (N, C, H, W)."""
        with perturb_embedding(self.model, self.blocks, lambda emb: emb + self.perturbation(ctx, emb)) as seen:
            perturbed = ctx.denoise(ctx.x_t, ctx.t)
        if not seen:
            raise UserError("time step guidance changed no evaluation: it must be given the network that is sampled")
        return self.scale * ctx.denoise.diffusion.eps_between(pred, perturbed, ctx.t)

    def perturbation(self, ctx: StepContext, emb: Tensor) -> Tensor:
        """The noise in the embedding, (N, E) as emb."""
        noise = np.stack([
            image_generator(self.seed, image_id, step, "embedding").standard_normal(emb.shape[1], dtype=np.float32)
            for image_id, step in zip(ctx.image_ids.tolist(), ctx.t.tolist(), strict=True)])
        size = self.noise_scale * ctx.fraction.to(emb) ** self.power
        return size[:, None] * torch.from_numpy(noise).to(emb)


@dataclass(frozen=True)
class TsgOptions(ScaledOptions):
    """Time step guidance."""

    short = "TSG"
    term = TimestepGuidance
    switched_on: ClassVar = {"tsg_scale": 1.0}
    search: ClassVar = each("tsg_scale", 0.5, 1.0, 2.0, 3.0)
    sigma_flags = "tsg"
    for_pipelines = True

    tsg_scale: float = option(0.0, "scale s of time step guidance; 0: off")
    tsg_noise_scale: float = option(1.0, "size of the noise in the embedding of the step, at the first step",
                                    minimum=0)
    tsg_power: float = option(1.0, "that noise falls with this power of the step", minimum=0)
    tsg_blocks: str = option("", "blocks that see the noise, comma-separated, like middle,output.0; unset: all")
    tsg_start: int | None = start_option()
    tsg_sigma_min: float | None = sigma_min_option()
    tsg_sigma_max: float | None = sigma_max_option()

    def details(self) -> dict[str, str]:
        """Noise, its power, and the blocks."""
        return {"noise": f"noise {self.tsg_noise_scale:g}", "power": f"power {self.tsg_power:g}",
                "blocks": f"block {self.tsg_blocks}" if self.tsg_blocks else "all blocks"}

    def useless(self) -> dict[str, str]:
        """Everything, where there is no noise."""
        return {} if self.tsg_noise_scale else self.all_useless("without noise the step is not perturbed")

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        with naming("tsg_blocks", self.tsg_blocks):
            blocks = block_names(self.tsg_blocks) if self.tsg_blocks else None
            return [TimestepGuidance(nets.model, self.tsg_scale, self.tsg_noise_scale, self.tsg_power, nets.seed,
                                     blocks, **self.window)]
