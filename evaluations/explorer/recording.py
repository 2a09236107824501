"""What every step of a sampling run does to chosen images, as arrays.

The chain is sampled as a run samples it; what guidance computes on the way is kept, and nothing is computed twice but
the masks. Where several losses guide, the sampler differentiates their sum; that of all but one is then differentiated
once more, at some of the steps (`apart_interval`). No method is known by name: of every term its change is kept, and of
a contrast also its degraded input where it gives one (`weaker`) and its mask where it has one (`pixel_mask`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.capture import capture_attention, find_blocks
from guided_diffusion.errors import UserError
from guided_diffusion.guidance.base import naming
from guided_diffusion.late import Tensor, torch
from guided_diffusion.npz import write_batch
from guided_diffusion.process import Prediction
from guided_diffusion.runs.comparison import class_words
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.sampler import BuiltRun, ImageSampler
from guided_diffusion.sampling import scaled_gradient
from guided_diffusion.schedules import gather
from guided_diffusion.terms import (
    ContrastGuidance,
    GradientGuidance,
    Guidance,
    LossGuidance,
    StepContext,
    TransformGuidance,
)

from ..attention.study import attention_method

# The kinds of terms, and the method that gives what a term does at a step.
KINDS: dict[type[Guidance], tuple[str, str]] = {
    ContrastGuidance: ("contrast", "delta"), TransformGuidance: ("transform", "transform"),
    GradientGuidance: ("gradient", "gradient"), LossGuidance: ("loss", "loss")}

APART_INTERVAL = 5          # steps


@dataclass(frozen=True)
class Term:
    """A term of guidance. kind: a word of KINDS. active: whether it guides, for each step in the recorded order."""

    title: str
    kind: str
    scale: float
    active: tuple[bool, ...]


@dataclass(frozen=True)
class Recording:
    """The steps of N images under one setting, from noise to image, S steps.

    title: guidance and sampler in words. image_ids, labels: N numbers; labels is empty where there are none, and so are
    classes, the labels in words. steps: respaced indices. sigma: the noise level before each step. blocks: the grid
    (h, w) of each block whose attention was recorded. block, psi: of the method that reads attention, "" and 1 without
    one.

    arrays: (N, S, ...) each but for `sample`. x_t (C, H, W), the image before the step; x0_unguided, x0: as predicted
    without and with all contrasts; eps_change: of all contrasts together, after transforms; state_change: what all
    losses together add to x_(t-1), where there are several; sample (N, C, H, W): the finished images. For term number
    k, where there is such a thing: termk_change (C, H, W), its change of eps; termk_degraded (C, H, W), what it
    evaluates the network on; termk_mask (1, H, W) from 0 to 1; termk_loss (), its loss, and termk_state_change
    (C, H, W), what that adds to x_(t-1), minus its gradient. termk_rms, eps_change_rms, state_change_rms (): root
    mean square of the change. attention_BLOCK (h, w): what each token receives in the step's own evaluation, 1 on
    average. The change of eps of a gradient g is that of DDIM, -sqrt(1 - abar) g; that of a transform is what it adds
    to the sum. All is 0 where a term does not guide, and the change of one of several losses is NaN at the steps where
    they were not told apart.
    """

    title: str
    image_ids: tuple[int, ...]
    labels: tuple[int, ...]
    steps: tuple[int, ...]
    sigma: tuple[float, ...]
    terms: tuple[Term, ...]
    blocks: dict[str, tuple[int, int]]
    block: str
    psi: float
    arrays: dict[str, np.ndarray] = field(repr=False)
    classes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The memory that the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, path: str | Path) -> None:
        """Writes an .npz: all arrays, image_ids, labels, steps, sigma, terms, scales, kinds and active (K, S)."""
        write_batch(path, {
            "image_ids": np.array(self.image_ids), "labels": np.array(self.labels, np.int64),
            "steps": np.array(self.steps), "sigma": np.array(self.sigma),
            "terms": np.array([term.title for term in self.terms], np.str_),
            "scales": np.array([term.scale for term in self.terms], np.float64),
            "kinds": np.array([term.kind for term in self.terms], np.str_),
            "active": np.array([term.active for term in self.terms], bool).reshape(-1, len(self.steps)),
            **self.arrays})


class Recorder:
    """Samples chosen images of a run and keeps every step of them.

    blocks: attention blocks to record; all where none are given. apart_interval: of the steps at which several losses
    guide, the first and every so many-th tell what each of them changes, which costs a backward pass for each but one.
    Raises UserError for an unknown block, and for whatever is wrong with the run, before the first image is sampled.
    """

    def __init__(self, run: SamplingRun, image_ids: list[int], blocks: Sequence[str],
                 apart_interval: int = APART_INTERVAL) -> None:
        self.run, self.image_ids = run, image_ids
        labels = run.labels()
        self.labels = None if labels is None else labels(image_ids)
        built = run.build()
        if built.model.image_channels not in (1, 3):
            raise UserError(f"{run.title()}: the network has {built.model.image_channels} channels, and pictures are "
                            "drawn of 1 or 3")
        self.model, self.network, self.diffusion, self.guidance = built
        available = self.model.attention_blocks
        with naming("blocks", ",".join(blocks)):
            self.blocks = list(find_blocks(available, blocks or available, "attention block"))
        self.sampler = ImageSampler(run.sample, run.sampler, BuiltRun(
            self.model, self._first_evaluation, self.diffusion, self.guidance))
        t = torch.arange(self.diffusion.num_timesteps).flip(0)
        self.active = [term.window(t, self.diffusion).tolist() for term in self.guidance]
        losses = [number for number, term in enumerate(self.guidance) if isinstance(term, LossGuidance)]
        # Of each step, the losses that guide, and the steps at which there are several.
        self.losses = [[number for number in losses if self.active[number][place]] for place in range(len(t))]
        shared = [place for place, guiding in enumerate(self.losses) if len(guiding) > 1]
        self.shared = set(shared)
        self.apart = set(range(len(t))) - self.shared | set(shared[::apart_interval])
        self.method = attention_method(run)
        self.grids: dict[str, tuple[int, int]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.rows, self.place, self.begun = slice(0), 0, False          # where what is seen belongs
        self.unguided_eps: Tensor | None = None
        self.gradients: dict[int, Tensor | None] = {}       # of the losses that guide at this step

    @property
    def block_grids(self) -> list[tuple[int, int]]:
        """The grid (h, w) of each block that is recorded."""
        return [self.model.attention_blocks[name].grid for name in self.blocks]

    def record(self, on_step: Callable[[int], object] = lambda count: None) -> Recording:
        """Samples all images, in batches as large as those of the run.

        on_step: called after each step with the number of images that made it.
        """
        size = self.sampler.size
        with ExitStack() as stack:
            for number, term in enumerate(self.guidance):
                stack.enter_context(_watched(term, self._seen(number)))
            for start in range(0, len(self.image_ids), size):
                self._sample(slice(start, min(start + size, len(self.image_ids))), on_step)
        return self._recording()

    def _sample(self, rows: slice, on_step: Callable[[int], object]) -> None:
        self.rows = rows
        chain = self.sampler.chain(self.image_ids[rows], None if self.labels is None else self.labels[rows])
        self._begin_step(0)
        for out in chain:
            self._keep("x0", out["pred_xstart"])
            self._keep("x0_unguided", out["pred_xstart_unguided"])
            if self.unguided_eps is not None:
                self._keep_change("eps", "change", out["eps"] - self.unguided_eps)
            if self.shared and "loss_gradient" in out:
                self._keep_change("state", "change", -out["loss_gradient"])
            for number, gradient in self.gradients.items():
                rest = out["loss_gradient"] - sum(one for one in self.gradients.values() if one is not None)
                self._keep_change(f"term{number}", "state_change", -(rest if gradient is None else gradient))
            if self.place == self.diffusion.num_timesteps - 1:
                sample = out["sample"].float().cpu().numpy()
                self.arrays.setdefault("sample", np.zeros((len(self.image_ids), *sample.shape[1:]), np.float32))
                self.arrays["sample"][rows] = sample
            on_step(len(out["sample"]))
            self._begin_step(self.place + 1)

    def _begin_step(self, place: int) -> None:
        self.place, self.begun, self.unguided_eps, self.gradients = place, False, None, {}

    def _first_evaluation(self, x: Tensor, *inputs: Any, **conditions: Any) -> Tensor:
        """The network; of the first evaluation of each step, x_t and the received attention are kept.

        Those of the images come first in a batch that `--batch_contrasts` makes of several evaluations.
        """
        if self.begun:
            return self.network(x, *inputs, **conditions)
        self.begun = True
        own = slice(self.rows.stop - self.rows.start)
        self._keep("x_t", x[own])
        read = self.method.attention_block if self.method else None
        heads = {name: (self.method.heads or "exact") if self.method and name == read else "exact"
                 for name in self.blocks}
        with ExitStack() as stack:
            captured = [stack.enter_context(capture_attention(self.model, names, heads=kind))
                        for kind in sorted(set(heads.values()))
                        if (names := [name for name in self.blocks if heads[name] == kind])]
            output = self.network(x, *inputs, **conditions)
        for one in captured:
            for name, seen in one.items():
                self.grids[name] = seen.grid
                self._keep(f"attention_{name}", seen.received[own].unflatten(1, seen.grid), np.float32)
        return output

    def _seen(self, number: int) -> Callable[[StepContext, Prediction, Tensor, Tensor | None], None]:
        """What keeps the value of a term at a step: with the sum before it, of a transform."""
        term = self.guidance[number]

        def seen(ctx: StepContext, pred: Prediction, value: Tensor, before: Tensor | None) -> None:
            window = term.window(ctx.t, ctx.denoise.diffusion)
            if isinstance(term, LossGuidance):
                self._keep(f"term{number}_loss", value, np.float32)
                if self.place in self.apart:
                    # The sampler differentiates the sum of all, from which that of the last one follows.
                    self.gradients[number] = None if number == self.losses[self.place][-1] else scaled_gradient(
                        torch.where(window, value, 0).sum(), ctx.x_t, window)
                return
            if isinstance(term, GradientGuidance):
                value = -gather(ctx.denoise.diffusion.sqrt_one_minus_alphas_cumprod, ctx.t, value) * value
            if before is not None:
                value = value - before
            if isinstance(term, ContrastGuidance):
                self.unguided_eps = pred.eps
                self._keep_inputs(number, term, ctx, pred)
            self._keep_change(f"term{number}", "change", torch.where(window.reshape(-1, 1, 1, 1), value, 0))

        return seen

    def _keep_inputs(self, number: int, term: ContrastGuidance, ctx: StepContext, pred: Prediction) -> None:
        inputs, mask = term.inputs(ctx, pred), getattr(term, "pixel_mask", None)
        if inputs is not None and inputs.x is not ctx.x_t:
            self._keep(f"term{number}_degraded", inputs.x)
        if mask is not None:
            self._keep(f"term{number}_mask", mask(ctx, pred))

    def _keep_change(self, owner: str, kind: str, value: Tensor) -> None:
        """Keeps a change and its root mean square. owner: a term, eps or state. kind: a word of the arrays' names."""
        self._keep(f"{owner}_{kind}", value)
        self._keep(f"{owner}_rms" if owner.startswith("term") else f"{owner}_{kind}_rms",
                   value.float().square().mean(dim=(1, 2, 3)).sqrt(), np.float32)

    def _keep(self, name: str, value: Tensor, dtype: type = np.float16) -> None:
        """Keeps a value (n, ...) of the images and the step at hand; pictures in half precision."""
        if name not in self.arrays:
            shape = (len(self.image_ids), self.diffusion.num_timesteps, *value.shape[1:])
            self.arrays[name] = np.zeros(shape, dtype)
        limit = float(np.finfo(dtype).max)
        self.arrays[name][self.rows, self.place] = value.detach().float().clamp(-limit, limit).cpu().numpy()

    def _recording(self) -> Recording:
        """What was kept, with the facts of the run."""
        steps = tuple(reversed(range(self.diffusion.num_timesteps)))
        abar = self.diffusion.alphas_cumprod[list(steps)]
        terms = tuple(Term(title, kind_of(term), float(term.scale), tuple(active))
                      for title, term, active in zip(self._titles(), self.guidance, self.active, strict=True))
        for place in self.shared - self.apart:
            for number in self.losses[place]:
                for name in ("state_change", "rms"):
                    self.arrays[f"term{number}_{name}"][:, place] = np.nan
        labels = () if self.labels is None else tuple(self.labels.tolist())
        block = (self.method.attention_block if self.method else "") or ""
        return Recording(
            f"{self.run.title()}; {self.run.sampler.title}", tuple(self.image_ids), labels, steps,
            tuple(np.sqrt((1 - abar) / np.maximum(abar, 1e-12)).tolist()), terms,
            {name: self.grids[name] for name in self.blocks}, block,
            1.0 if self.method is None else float(self.method.attention_threshold), self.arrays,
            class_words({"model_path": self.run.sample.model_path}, labels))

    def _titles(self) -> list[str]:
        """The terms in words: those of the methods, where each built one term, else the names of their classes."""
        methods = self.run.active
        if len(methods) == len(self.guidance):
            return [method.headline() for method in methods]
        return [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(term).__name__) for term in self.guidance]


def kind_of(term: Guidance) -> str:
    """The word of KINDS that says what a term does. Raises UserError for a term of no kind."""
    return _kind(term)[0]


def _kind(term: Guidance) -> tuple[str, str]:
    for kind, words in KINDS.items():
        if isinstance(term, kind):
            return words
    raise UserError(f"{type(term).__name__}: extends none of {', '.join(kind.__name__ for kind in KINDS)}")


@contextmanager
def _watched(term: Guidance, seen: Callable[[StepContext, Prediction, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Lets `seen` see what a term returns, in the `with` block. The term stays itself, as contexts hold it as a key."""
    name = _kind(term)[1]
    original = getattr(term, name)

    def watched(ctx: StepContext, pred: Prediction, *before: Tensor) -> Tensor:
        value = original(ctx, pred, *before)
        seen(ctx, pred, value, before[0] if before else None)
        return value

    setattr(term, name, watched)
    try:
        yield
    finally:
        delattr(term, name)
