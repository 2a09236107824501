"""What guidance is: a list of terms, each a function of one network evaluation.

A *contrast* evaluates the network again on something degraded and returns a change of eps. A *gradient* returns a
gradient at x_t; the sampler decides how it enters (`mean += variance * g` in DDPM, `eps -= sqrt(1 - abar) * g` in
DDIM). A *descent* returns a loss, which is differentiated to x_t through that network evaluation itself, the losses of
all descents at once; any sampler takes the gradient from x_{t-1} (`mean -= g`). Terms know neither each other nor the
sampler. A term whose scale is 0, or whose window does not hold the step, is not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..gaussian_diffusion import Denoiser, Prediction


@dataclass(frozen=True)
class StepContext:
    """One step of a batch: what every guidance term may see.

    denoise: (x, t) -> Prediction, the network with its labels, respaced. x_t: (N, C, H, W). t: (N,) int64, index
    into the respaced chain. numbers: (N,) int64, the images' numbers in the run. observed: what each term's
    `observe` gave around the evaluation that `pred` came from.
    """

    denoise: Denoiser
    x_t: Tensor
    t: Tensor
    numbers: Tensor
    observed: dict[Guidance, Any] = field(default_factory=dict)

    @property
    def model_t(self) -> Tensor:
        """The original step index, as networks see it."""
        return self.denoise.diffusion.model_timesteps(self.t)

    @property
    def model_kwargs(self) -> Mapping[str, Any]:
        return self.denoise.model_kwargs


class Guidance:
    """A term with a scale and a window of steps.

    scale: finite; 0 is off. start, stop: guided only where stop <= t < start, t the respaced step index that counts
    down to 0; None leaves that side open. `start` is `--guide_start`.
    """

    def __init__(self, scale: float, start: int | None = None, stop: int | None = None) -> None:
        for name, value in (("scale", scale), ("start", start), ("stop", stop)):
            if value is None and name != "scale":
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise UserError(f"{type(self).__name__} {name} {value!r}: must be a finite number")
        self.scale = scale
        self.start = start
        self.stop = stop

    def window(self, t: Tensor) -> Tensor:
        """(N,) bool: the images of the batch that this term guides at steps t (N,)."""
        active = torch.full_like(t, self.scale != 0, dtype=torch.bool)
        if self.start is not None:
            active &= t < self.start
        if self.stop is not None:
            active &= t >= self.stop
        return active

    def observe(self) -> AbstractContextManager:
        """Entered around the step's own network evaluation; what it gives is `ctx.observed[self]`."""
        return nullcontext()


class Contrast(Guidance):
    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The change of eps, (N, C, H, W)."""
        raise NotImplementedError


class Gradient(Guidance):
    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The gradient at x_t, (N, C, H, W), scale included."""
        raise NotImplementedError


class Descent(Guidance):
    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The loss of each image, (N,), scale included: a function of ctx.x_t through the evaluation that gave `pred`.

        What `observe` gave, and `pred`, carry that evaluation's graph here, and nowhere else.
        """
        raise NotImplementedError
