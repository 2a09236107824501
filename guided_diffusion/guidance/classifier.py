"""Classifier guidance (Dhariwal & Nichol, 2105.05233, algorithms 1 and 2).

    g = scale * grad_x log p(y | x_t)

Needs: a classifier of noisy images, labels y. Cost: one forward and backward pass of the classifier, no evaluation of
the diffusion network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Gradient, StepContext

if TYPE_CHECKING:
    from ..gaussian_diffusion import Prediction


class ClassifierGuidance(Gradient):
    """Guidance by the gradient of a classifier's log-probability of the label.

    classifier: (x_t, original step) -> logits (N, classes). scale, start, stop: see `Guidance`.
    """

    def __init__(self, classifier: nn.Module, scale: float, start: int | None = None, stop: int | None = None) -> None:
        super().__init__(scale, start, stop)
        self.classifier = classifier

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        y = ctx.model_kwargs.get("y")
        if y is None:
            raise UserError("classifier guidance needs labels: model_kwargs has no y")
        with torch.enable_grad():
            x = ctx.x_t.detach().requires_grad_()
            log_probabilities = self.classifier(x, ctx.model_t).log_softmax(dim=-1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            return self.scale * torch.autograd.grad(chosen, x)[0]


class FunctionGuidance(Gradient):
    """The older interface: cond_fn(x_t, original step, **model_kwargs) -> gradient, (N, C, H, W)."""

    def __init__(self, cond_fn: Callable[..., Tensor]) -> None:
        super().__init__(1.0)
        self.cond_fn = cond_fn

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        return self.cond_fn(ctx.x_t, ctx.model_t, **ctx.model_kwargs)
