"""The one step body of all samplers, and the loop over it. Knows no file, no rank and no network class.

    pred = denoise(x_t, t)
    eps  = pred.eps + sum of the contrasts
    grad = sum of the gradients
    x_t  = ddpm_step or ddim_step (pred guided by eps, grad, noise)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guidance.base import Contrast, Gradient, Guidance, StepContext
from .schedules import gather

if TYPE_CHECKING:
    from .gaussian_diffusion import Denoiser, Prediction

Noise = Callable[[], Tensor]
Step = Callable[[StepContext, "Prediction", "Tensor | None", Noise], tuple[Tensor, Tensor]]


class NonFiniteError(ValueError):
    """A step gave NaN or infinity; the message names the step and the images."""


def ddpm_step(ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
    """Ancestral sampling: x_{t-1} and x0, (N, C, H, W) each. No noise is added at t = 0."""
    mean = pred.mean if grad is None else pred.mean + pred.variance * grad
    noisy = (ctx.t != 0).float().reshape(-1, 1, 1, 1)
    return mean + noisy * torch.exp(0.5 * pred.log_variance) * noise(), pred.pred_xstart


def ddim_step(ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise, *, eta: float = 0.0,
              ) -> tuple[Tensor, Tensor]:
    """DDIM (Song et al., 2010.02502, eq. 12): x_{t-1} and x0, (N, C, H, W) each.

    eta: 0 is deterministic, 1 has the variance of ancestral sampling. A gradient changes eps by
    -sqrt(1 - abar) * grad (ADM, algorithm 2).
    """
    diffusion, x_t, t = ctx.denoise.diffusion, ctx.x_t, ctx.t
    pred_xstart = pred.pred_xstart
    eps = diffusion.predict_eps_from_xstart(x_t, t, pred_xstart)
    if grad is not None:
        eps = eps - gather(diffusion.sqrt_one_minus_alphas_cumprod, t, x_t) * grad
        pred_xstart = diffusion.predict_xstart_from_eps(x_t, t, eps)
    abar = gather(diffusion.alphas_cumprod, t, x_t)
    abar_prev = gather(diffusion.alphas_cumprod_prev, t, x_t)
    sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
    sample = pred_xstart * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
    if eta:
        sample = sample + (t != 0).float().reshape(-1, 1, 1, 1) * sigma * noise()
    return sample, pred_xstart


def sample_step(step: Step, denoise: Denoiser, x_t: Tensor, t: Tensor, noise: Noise,
                guidance: Sequence[Guidance] = (), numbers: Tensor | None = None) -> dict[str, Tensor]:
    """One guided step: {"sample", "pred_xstart", "pred_xstart_unguided", "eps"}, (N, C, H, W) each.

    t: (N,) int64, respaced. numbers: the images' numbers, 0 to N - 1 by default. eps is that of the guided
    prediction.
    """
    ctx = StepContext(denoise, x_t, t, torch.arange(len(x_t)) if numbers is None else numbers)
    active = [(term, window) for term in guidance if (window := term.window(t)).any()]
    with ExitStack() as stack:
        for term, _ in active:
            ctx.observed[term] = stack.enter_context(term.observe())
        pred = unguided = denoise(x_t, t)
    deltas = [_within(window, g.delta(ctx, unguided)) for g, window in active if isinstance(g, Contrast)]
    if deltas:
        pred = denoise.with_eps(unguided, x_t, t, unguided.eps + sum(deltas))
    gradients = [_within(window, g.gradient(ctx, unguided)) for g, window in active if isinstance(g, Gradient)]
    sample, pred_xstart = step(ctx, pred, sum(gradients) if gradients else None, noise)
    return {"sample": sample, "pred_xstart": pred_xstart, "pred_xstart_unguided": unguided.pred_xstart,
            "eps": pred.eps}


def _within(window: Tensor, value: Tensor) -> Tensor:
    """`value` (N, ...) where the window (N,) holds the image, 0 elsewhere."""
    return torch.where(window.reshape(-1, 1, 1, 1), value, 0)


@torch.no_grad()
def sample_chain(step: Step, denoise: Denoiser, x_T: Tensor, noise_at: Callable[[int], Tensor],
                 guidance: Sequence[Guidance] = (), numbers: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    """All steps from x_T (N, C, H, W) to the image, each as `sample_step` gives it.

    noise_at: respaced step index -> (N, C, H, W); called once a step, and not at all by DDIM with eta 0. Raises
    NonFiniteError where the network returns NaN or infinity.
    """
    numbers = torch.arange(len(x_T)) if numbers is None else numbers
    x_t = x_T
    for index in reversed(range(denoise.diffusion.num_timesteps)):
        t = torch.full((len(x_t),), index, device=x_t.device)
        out = sample_step(step, denoise, x_t, t, lambda index=index: noise_at(index), guidance, numbers)
        x_t = out["sample"]
        # Clipping hides an infinite eps from the sample.
        finite = (x_t.isfinite() & out["eps"].isfinite()).flatten(1).all(dim=1).cpu()
        if not finite.all():
            bad = ", ".join(str(n) for n in list(dict.fromkeys(numbers.cpu()[~finite].tolist()))[:8])
            raise NonFiniteError(f"step {index}: the network returned NaN or infinity for image {bad}")
        yield out


def last(chain: Iterator[dict[str, Tensor]], on_step: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """The last step of a chain; on_step is called after each."""
    out: dict[str, Tensor] = {}
    for step in chain:
        out = step
        on_step()
    return out
