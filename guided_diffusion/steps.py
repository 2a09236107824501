"""What a sampler is: a step, from x_t and its guided prediction to x_{t-1}, and its options. DDPM and DDIM.

The loop over the steps is in `sampling`, the multistep solvers in `solvers`. Images are (N, C, H, W) in [-1, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .late import Tensor, torch
from .options import Options, check_stated, option
from .process import DiffusionProcess, Prediction
from .schedules import gather
from .terms import StepContext

Noise = Callable[[], Tensor]
Step = Callable[[StepContext, Prediction, Tensor | None, Noise], tuple[Tensor, Tensor]]


def ddpm_step(ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
    """Ancestral sampling: x_{t-1} and x0, (N, C, H, W) each. No noise is added at t = 0."""
    mean = pred.mean if grad is None else pred.mean + pred.variance * grad
    noisy = (ctx.t != 0).float().reshape(-1, 1, 1, 1)
    return mean + noisy * torch.exp(0.5 * pred.log_variance) * noise(), pred.pred_xstart


def ddim_step(ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise, *, eta: float = 0.0,
              clipped_eps: bool = True) -> tuple[Tensor, Tensor]:
    """DDIM (Song et al., 2010.02502, eq. 12): x_{t-1} and x0, (N, C, H, W) each.

    eta: 0 is deterministic, 1 has the variance of ancestral sampling. clipped_eps: where x0 is clipped, eps follows
    from it, as in ADM; else it stays that of the network. A gradient changes eps by -sqrt(1 - abar) * grad (ADM,
    algorithm 2).
    """
    diffusion, x_t, t = ctx.denoise.diffusion, ctx.x_t, ctx.t
    pred_xstart = pred.pred_xstart
    eps = diffusion.predict_eps_from_xstart(x_t, t, pred_xstart) if clipped_eps else pred.eps
    if grad is not None:
        eps = diffusion.eps_with_gradient(eps, t, grad)
        pred_xstart = diffusion.predict_xstart_from_eps(x_t, t, eps)
    abar, abar_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev               # float64
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)
    rest = (1 - abar_prev - sigma**2).clip(min=0)           # with eta 1 it may be less than 0 by a rounding
    sample = pred_xstart * gather(np.sqrt(abar_prev), t, x_t) + gather(np.sqrt(rest), t, x_t) * eps
    if eta:
        sample = sample + (t != 0).float().reshape(-1, 1, 1, 1) * gather(sigma, t, x_t) * noise()
    return sample, pred_xstart


@dataclass(frozen=True)
class SamplerOptions(Options):
    """A sampler: its options, its name in titles, and its step. A new one is such a class and a line in SAMPLERS.

    title: its name in words. refused_elsewhere: whether its options are refused, and not only without effect, where
    another sampler is used.
    """

    title: ClassVar[str]
    refused_elsewhere: ClassVar[bool] = False

    @classmethod
    def check_class(cls, beside: Sequence[type]) -> None:
        """See `Options.check_class`: also where title or step are missing."""
        super().check_class(beside)
        check_stated(cls, SamplerOptions, "title", "step")

    def step(self) -> Step:
        """The function that goes from x_t to x_{t-1}, made anew for each chain, as it may remember earlier steps."""
        raise NotImplementedError

    def headline(self, steps: int) -> str:
        """The sampler and its steps in words, like "DDPM, 250 steps"."""
        return f"{self.title}, {steps} steps"

    def respacing(self, timestep_respacing: str) -> str:
        """The respacing of the chain, from what `--timestep_respacing` says; UserError where they contradict."""
        return timestep_respacing

    def num_steps(self, chain: int) -> int:
        """The steps of a run, where the respaced chain has `chain`. Raises UserError for too few or contradictions."""
        return chain

    @property
    def fewest_steps(self) -> int:
        """The fewest steps that a run may have."""
        return 1

    def process(self, diffusion: DiffusionProcess) -> DiffusionProcess:
        """The process whose steps are walked through, from the respaced one."""
        return diffusion

    def in_steps(self, steps: int) -> dict[str, Any]:
        """The flags by value that make a run of so many steps."""
        return {"timestep_respacing": str(steps)}

    def settled(self, timestep_respacing: str) -> dict[str, Any]:
        """Options by flag as they are meant, where there are several ways to say the same."""
        return {}

    @property
    def threshold_quantile(self) -> float | None:
        """The quantile of dynamic thresholding (see `process.Denoiser`); None: x0 is clipped as the run says."""
        return None


@dataclass(frozen=True)
class DdpmOptions(SamplerOptions):
    """Ancestral sampling (DDPM)."""

    title = "DDPM"

    def step(self) -> Step:
        """See `ddpm_step`."""
        return ddpm_step


@dataclass(frozen=True)
class DdimOptions(SamplerOptions):
    """DDIM."""

    title = "DDIM"

    eta: float = option(0.0, "fresh noise in DDIM: 0 none, 1 as much as DDPM", minimum=0, maximum=1)

    def step(self) -> Step:
        """See `ddim_step`."""
        return functools.partial(ddim_step, eta=self.eta)
