"""Projected guidance (Sadat et al., 2410.02416, algorithm 1: APG), of whatever contrasts there are.

With d = x0(F + delta) - x0(F), the summed change in x0 space:
    d <- d + momentum d_previous;    d <- d min(1, norm_threshold / |d|);    d <- d_orthogonal + eta d_parallel

d_parallel: the part of d along x0(F). Norms and products are of each image. x0 is what eps says, before any clipping.
Needs: contrasts in the list. Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from ..errors import UserError
from ..late import Tensor, torch
from ..options import option
from ..process import Prediction
from ..terms import Guidance, Passes, SigmaRange, StepContext, TransformGuidance, check_number
from .base import GuidanceOptions, Networks, each, sigma_max_option, sigma_min_option, start_option


class ProjectedGuidance(TransformGuidance):
    """Less of the change along the predicted image, a bound on its size, and momentum.

    eta: the share of the parallel part that is kept; 1 keeps all. norm_threshold: the largest norm of the change of an
    image in x0, scales of the contrasts included, so that the paper's r, which bounds it before the scale s, is r s
    here; None: any. momentum: of the previous step's change; the paper takes it below 0. It is kept for each image from
    step to step. The others: see `Guidance`.
    """

    def __init__(self, eta: float = 0.0, norm_threshold: float | None = None, momentum: float = 0.0,
                 start: int | None = None, stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(1.0, start, stop, **sigma)
        check_number("ProjectedGuidance eta", eta)
        check_number("ProjectedGuidance momentum", momentum)
        if norm_threshold is not None and not norm_threshold > 0:
            raise UserError(f"ProjectedGuidance norm_threshold {norm_threshold!r}: must be greater than 0, or None")
        if not -1 < momentum < 1:
            raise UserError(f"ProjectedGuidance momentum {momentum!r}: must be greater than -1 and less than 1")
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self.remembers = bool(momentum)

    def transform(self, ctx: StepContext, pred: Prediction, delta: Tensor) -> Tensor:
        """The change of eps, (N, C, H, W)."""
        process = ctx.denoise.diffusion
        change = process.predict_xstart_from_eps(torch.zeros_like(delta), ctx.t, delta)
        if self.momentum:
            before = ctx.memory.get(self)
            change = change if before is None else change + self.momentum * before
            ctx.memory[self] = change
        if self.norm_threshold is not None:
            change = change * (self.norm_threshold / _norm(change)).clamp(max=1)
        direction = pred.xstart / _norm(pred.xstart)
        parallel = (change * direction).flatten(1).sum(dim=1).reshape(-1, 1, 1, 1) * direction
        change = change - (1 - self.eta) * parallel
        return process.predict_eps_from_xstart(torch.zeros_like(change), ctx.t, change)


def _norm(x: Tensor) -> Tensor:
    """The norm of each image, (N, 1, 1, 1); never 0."""
    return x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class ApgOptions(GuidanceOptions):
    """Projected guidance, of the sum of all contrasts."""

    short = "APG"
    symbols: ClassVar = {"apg_eta": ("eta", 0.0)}
    switched_on: ClassVar = {"apg": True}
    search: ClassVar = each("apg_momentum", 0.0, -0.5, apg=True)
    kind = TransformGuidance
    sigma_flags = "apg"
    for_pipelines = True

    apg: bool = option(False, "project the change that all contrasts make together")
    apg_eta: float = option(0.0, "share of that change along the predicted image that is kept; 1: all of it")
    apg_norm_threshold: float | None = option(None, "largest norm of an image's change in x0; unset: any", above=0,
                                              later=True)
    apg_momentum: float = option(0.0, "share of the previous step's change; the paper takes it below 0", above=-1,
                                 maximum=0.99)
    apg_start: int | None = start_option("projected")
    apg_sigma_min: float | None = sigma_min_option()
    apg_sigma_max: float | None = sigma_max_option()

    @property
    def active(self) -> bool:
        """Whether it is switched on."""
        return self.apg

    def headline(self) -> str:
        """Like "APG eta = 0"."""
        return f"APG eta = {self.apg_eta:g}"

    def details(self) -> dict[str, str]:
        """Norm and momentum."""
        return {"norm": "any norm" if self.apg_norm_threshold is None else f"norm <= {self.apg_norm_threshold:g}",
                "momentum": f"momentum {self.apg_momentum:g}"}

    def useless(self) -> dict[str, str]:
        """Everything, where the change stays as it is, but for rounding."""
        if self.apg_eta != 1 or self.apg_norm_threshold is not None or self.apg_momentum:
            return {}
        return self.all_useless("with eta 1, any norm and no momentum the change stays as it is")

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        return [ProjectedGuidance(self.apg_eta, self.apg_norm_threshold, self.apg_momentum, **self.window)]

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """Nothing but arithmetic."""
        return [(Guidance(1.0, **self.window), ProjectedGuidance.passes)]
