"""What a sampler asks of guidance: a list of terms, each a function of one network evaluation.

A *contrast* evaluates the network again on something degraded and returns a change of eps. A *gradient* returns a
gradient at x_t; the sampler decides how it enters (`mean += variance * g` in DDPM, `eps -= sqrt(1 - abar) * g` in
DDIM). A *loss* is differentiated to x_t through the step's own evaluation, the losses of all terms at once; any sampler
takes that gradient from x_{t-1} (`mean -= g`). Terms know neither each other nor the sampler. A term whose scale is 0,
or whose window does not hold the step, is not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .errors import UserError
from .late import Tensor, torch
from .process import Denoiser, Prediction


@dataclass(frozen=True)
class StepContext:
    """One step of a batch: what every guidance term may see.

    denoise: (x, t) -> Prediction, the network with its labels, respaced. x_t: (N, C, H, W). t: (N,) int64, index
    into the respaced chain. image_ids: (N,) int64, the images' places in the run. observed: what each term's
    `observe` gave around the evaluation that `pred` came from.
    """

    denoise: Denoiser
    x_t: Tensor
    t: Tensor
    image_ids: Tensor
    observed: dict[Guidance, Any] = field(default_factory=dict)

    @property
    def model_t(self) -> Tensor:
        """The original step index, as networks see it."""
        return self.denoise.diffusion.model_timesteps(self.t)

    @property
    def model_kwargs(self) -> Mapping[str, Any]:
        """The network's conditions, such as labels under "y"."""
        return self.denoise.model_kwargs


@dataclass(frozen=True)
class Passes:
    """Passes through networks that a term adds to one guided step of one image.

    forward: further evaluations of the diffusion network. backward: 1 where the step's own evaluation is
    differentiated, which all such terms do at once. others: by name, evaluations of other networks, each with its
    gradient.
    """

    forward: int = 0
    backward: int = 0
    others: Mapping[str, int] = field(default_factory=dict)


class Guidance:
    """A term with a scale and a window of steps; terms of a method extend one of the three kinds below.

    scale: finite; 0 is off. start, stop: guided only where stop <= t < start, t the respaced step index that counts
    down to 0; None leaves that side open. `start` is `--guide_start`. passes: what a guided step costs beside the
    evaluation that every step makes. Raises UserError for anything else.
    """

    passes: Passes = Passes()

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

    def observe(self) -> AbstractContextManager[Any]:
        """Entered around the step's own network evaluation; what it gives is `ctx.observed[self]`."""
        return nullcontext()


class ContrastGuidance(Guidance):
    """A term that changes eps by comparing with another evaluation.

    To write one, give it `delta`:

        class HalfNoise(ContrastGuidance):
            passes = Passes(forward=1)

            def delta(self, ctx, pred):
                return self.scale * (pred.eps - ctx.denoise(ctx.x_t / 2, ctx.t).eps)
    """

    passes = Passes(forward=1)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The change of eps, (N, C, H, W)."""
        raise NotImplementedError


class GradientGuidance(Guidance):
    """A term that gives the gradient of a log-probability at x_t.

    To write one, give it `gradient`:

        class TowardsGrey(GradientGuidance):
            def gradient(self, ctx, pred):
                return -self.scale * ctx.x_t
    """

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The gradient at x_t, (N, C, H, W), scale included."""
        raise NotImplementedError


class LossGuidance(Guidance):
    """A term that lowers a loss of the step's own evaluation.

    To write one, give it `loss`:

        class Darker(LossGuidance):
            def loss(self, ctx, pred):
                return self.scale * pred.pred_xstart.mean(dim=(1, 2, 3))
    """

    passes = Passes(backward=1)

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The loss of each image, (N,), scale included: a function of ctx.x_t through the evaluation that gave `pred`.

        What `observe` gave, and `pred`, carry that evaluation's graph here, and nowhere else.
        """
        raise NotImplementedError


class FunctionGuidance(GradientGuidance):
    """The older interface: cond_fn(x_t, original step, **model_kwargs) -> gradient, (N, C, H, W)."""

    def __init__(self, cond_fn: Callable[..., Tensor]) -> None:
        super().__init__(1.0)
        self.cond_fn = cond_fn

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """What the function gives at x_t."""
        return self.cond_fn(ctx.x_t, ctx.model_t, **ctx.model_kwargs)
