"""Guidance that acts on the unconditional evaluation, where classifier-free guidance makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..process import Prediction
from ..terms import ContrastGuidance, Inputs, Shared, StepContext


class PromptGuidance(ContrastGuidance):
    """Classifier-free guidance (Ho & Salimans, 2207.12598, eq. 6) whose conditions are not labels.

    scale: s, 0 is off; the guidance scale of diffusers is 1 + s. null: the conditions that stand for none, (N, ...)
    each.
    """

    def __init__(self, scale: float, null: Mapping[str, Tensor]) -> None:
        super().__init__(scale)
        self.null = null

    def weaker(self, ctx: StepContext, pred: Prediction) -> Inputs:
        """The same image without its prompt."""
        return Inputs(ctx.x_t, ctx.t, self.null)


class UnconditionalBranch(ContrastGuidance):
    """Contrasts of the unconditional evaluation, in place of the step's own (Hong et al., 2210.00939, eq. 25).

    terms: contrasts that read the unconditional evaluation, and evaluate what they degrade without a prompt. null: the
    conditions that stand for none. The evaluation is the one that `PromptGuidance` compares with; to be observed, this
    term stands before that one in the list.
    """

    def __init__(self, terms: Sequence[ContrastGuidance], null: Mapping[str, Tensor]) -> None:
        super().__init__(1.0)
        self.terms = terms
        self.null = null

    def window(self, t: Tensor, process: Any = None) -> Tensor:
        """(N,) bool: the images that any of the terms guides."""
        return torch.stack([term.window(t, process) for term in self.terms]).any(dim=0)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The sum of the terms' changes of eps, (N, C, H, W)."""
        windows = {term: term.window(ctx.t, ctx.denoise.diffusion) for term in self.terms}
        observed: dict[Any, Any] = {}
        with ExitStack() as stack:
            for term, window in windows.items():
                if window.any():
                    observed[term] = stack.enter_context(term.observe())
            unconditional = ctx.evaluate(ctx.x_t, ctx.t, **self.null)
        denoise = replace(ctx.denoise, model_kwargs={**ctx.model_kwargs, **self.null})
        inner = replace(ctx, denoise=denoise, observed=observed, shared=Shared())
        total = torch.zeros_like(pred.eps)
        for term in observed:
            total = total + torch.where(windows[term].reshape(-1, 1, 1, 1), term.delta(inner, unconditional), 0)
        return total
