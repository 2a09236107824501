"""Guidance between evaluations with and without a prompt, or with another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import UserError
from ..process import Prediction
from ..rng import image_generator
from ..terms import ContrastGuidance, Inputs, Shared, SigmaRange, StepContext, left_alone

SAME_PROMPT = 1e-2          # of the largest value of an embedding: what two encodings of one prompt differ at most


class PromptGuidance(ContrastGuidance):
    """Classifier-free guidance (Ho & Salimans, 2207.12598, eq. 6) whose conditions are not labels.

    scale: s, 0 is off; above 0 the guidance scale of diffusers is 1 + s. null: the conditions that stand for none,
    (N, ...) each.
    """

    def __init__(self, scale: float, null: Mapping[str, Tensor]) -> None:
        super().__init__(scale)
        self.null = null

    def beforehand(self, ctx: StepContext) -> Inputs:
        """The same image without its prompt."""
        return Inputs(ctx.x_t, ctx.t, self.null)


class IndependentPromptGuidance(ContrastGuidance):
    """Independent condition guidance (Sadat et al., 2407.02687, section 3) whose conditions are prompts.

    Guidance away from what the network predicts for another prompt, drawn anew at each step. scale: s, 0 is off. pool:
    the prompts that are drawn from, (L, ...) each; that of the image itself is left out. seed: what an image is given
    at a step depends on seed, image, step and the pool alone. The others: see `Guidance`.
    """

    def __init__(self, scale: float, pool: Mapping[str, Tensor], seed: int = 0, start: int | None = None,
                 stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        self.pool = pool
        self.seed = seed
        self._compared: tuple[Tensor, Tensor] | None = None         # the prompts of a batch, and what they are not

    def beforehand(self, ctx: StepContext) -> Inputs:
        """The same image with another prompt. Raises UserError where there is none for an image."""
        drawn = [self._draw(others.nonzero()[:, 0].tolist(), image_id, step) for others, image_id, step in
                 zip(self._others(ctx), ctx.image_ids.tolist(), ctx.t.tolist(), strict=True)]
        return Inputs(ctx.x_t, ctx.t, {name: values[drawn] for name, values in self.pool.items()})

    def _draw(self, others: Sequence[int], image_id: int, step: int) -> int:
        if not others:
            raise UserError("independent condition guidance: there is no prompt to draw but the image's own; give it "
                            "several")
        generator = image_generator(self.seed, image_id, step, "independent label")
        return others[int(generator.integers(len(others)))]

    def _others(self, ctx: StepContext) -> Tensor:
        """Which prompts of the pool are not the images' own, (N, L) bool; compared once for the same tensor."""
        own, pool = ctx.model_kwargs["encoder_hidden_states"], self.pool["encoder_hidden_states"]
        if own.shape[1:] != pool.shape[1:]:
            return torch.ones(len(own), len(pool), dtype=torch.bool)
        if self._compared is None or self._compared[0] is not own:
            self._compared = own, torch.stack([
                (pool - prompt).abs().amax(dim=(1, 2)) > SAME_PROMPT * prompt.abs().amax() for prompt in own])
        return self._compared[1]


class UnconditionalBranch(ContrastGuidance):
    """Contrasts of the unconditional evaluation, in place of the step's own (Hong et al., 2210.00939, eq. 25).

    terms: contrasts that read the unconditional evaluation, and evaluate what they degrade without a prompt. null: the
    conditions that stand for none. together: that evaluation is made in one batch with the step's own
    (`Denoiser.batch_contrasts`). The evaluation is the one that `PromptGuidance` compares with; to be observed, this
    term stands before that one in the list.
    """

    def __init__(self, terms: Sequence[ContrastGuidance], null: Mapping[str, Tensor], together: bool = False) -> None:
        super().__init__(1.0)
        self.terms = terms
        self.null = null
        self.together = together

    def window(self, t: Tensor, process: Any = None) -> Tensor:
        """(N,) bool: the images that any of the terms guides."""
        return torch.stack([term.window(t, process) for term in self.terms]).any(dim=0)

    def observe(self) -> AbstractContextManager[Any]:
        """What the terms observe, where the step's own evaluation has the unconditional one beside it."""
        return self._observed(self.terms) if self.together else nullcontext()

    @staticmethod
    @contextmanager
    def _observed(terms: Sequence[ContrastGuidance]) -> Any:
        with ExitStack() as stack:
            yield {term: stack.enter_context(term.observe()) for term in terms}

    def seen(self, observed: Any, rows: slice) -> Any:
        """What each term observed, of some rows of the batch."""
        return observed and {term: term.seen(value, rows) for term, value in observed.items()}

    def beforehand(self, ctx: StepContext) -> Inputs | None:
        """The same image without its prompt, where that is evaluated together with the step's own."""
        return Inputs(ctx.x_t, ctx.t, self.null) if self.together else None

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The sum of the terms' changes of eps, (N, C, H, W)."""
        windows = {term: window for term in self.terms
                   if (window := term.window(ctx.t, ctx.denoise.diffusion)).any()}
        with self._observed([] if self.together else list(windows)) as observed:
            unconditional = ctx.evaluate(ctx.x_t, ctx.t, **self.null)
        denoise = replace(ctx.denoise, model_kwargs={**ctx.model_kwargs, **self.null})
        inner = replace(ctx, denoise=denoise, observed=ctx.observed[self] if self.together else observed,
                        shared=Shared())
        if denoise.batch_contrasts:
            inner.evaluate_together([inputs for term in windows
                                     if (inputs := term.inputs(inner, unconditional)) is not None])
        total = torch.zeros_like(pred.eps)
        for term, window in windows.items():
            with left_alone(f"{type(term).__name__}.delta", inner, unconditional):
                delta = term.delta(inner, unconditional)
            total = total + torch.where(window.reshape(-1, 1, 1, 1), delta, 0)
        return total
