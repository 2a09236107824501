"""Rescaled guidance (Lin et al., 2305.08891, section 3.4), of whatever contrasts there are.

    out_guided <- phi out_guided std(out) / std(out_guided) + (1 - phi) out_guided

out: what the network predicts, which is eps, x0 or the velocity (of the paper's network it is the velocity). std: of
all values of an image. Needs: contrasts in the list. Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from ..errors import UserError
from ..late import Tensor, torch
from ..options import option
from ..process import Prediction
from ..terms import Guidance, Passes, SigmaRange, StepContext, TransformGuidance
from .base import GuidanceOptions, Networks, each, sigma_max_option, sigma_min_option, start_option


class Rescale(TransformGuidance):
    """A guided prediction with the standard deviation of the unguided one.

    phi: the share of the rescaled prediction in the mixture, from 0 (off) to 1. The others: see `Guidance`.
    """

    def __init__(self, phi: float, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(phi, start, stop, **sigma)
        if not 0 <= phi <= 1:
            raise UserError(f"Rescale phi {phi!r}: must be at least 0 and at most 1")
        self.phi = phi

    def transform(self, ctx: StepContext, pred: Prediction, delta: Tensor) -> Tensor:
        """The change of eps, (N, C, H, W)."""
        process = ctx.denoise.diffusion
        plain, rate = process.output_of(pred, ctx.t), process.eps_per_output(ctx.t, delta)
        guided = plain + delta / rate
        rescaled = guided * (1 + self.phi * (_std(plain) / _std(guided) - 1))
        return (rescaled - plain) * rate


def _std(x: Tensor) -> Tensor:
    """The standard deviation of each image, (N, 1, 1, 1); never 0."""
    return x.flatten(1).std(dim=1).clamp(min=torch.finfo(x.dtype).tiny).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class RescaleOptions(GuidanceOptions):
    """Rescaled guidance, of the sum of all contrasts."""

    short = "rescale"
    symbols: ClassVar = {"rescale_phi": ("phi", 0.0)}
    switched_on: ClassVar = {"rescale_phi": 0.7}
    search: ClassVar = each("rescale_phi", 0.3, 0.7)
    kind = TransformGuidance
    sigma_flags = "rescale"
    for_pipelines = True

    rescale_phi: float = option(0.0, "share of the guided prediction that is rescaled to the deviation of the unguided "
                                "one; 0: off", minimum=0, maximum=1)
    rescale_start: int | None = start_option("rescaled")
    rescale_sigma_min: float | None = sigma_min_option()
    rescale_sigma_max: float | None = sigma_max_option()

    @property
    def active(self) -> bool:
        """Whether phi is not 0."""
        return self.rescale_phi != 0

    def headline(self) -> str:
        """Like "rescale phi = 0.7"."""
        return f"rescale phi = {self.rescale_phi:g}"

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        return [Rescale(self.rescale_phi, **self.window)]

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """Nothing but arithmetic."""
        return [(Guidance(self.rescale_phi, **self.window), Rescale.passes)]
