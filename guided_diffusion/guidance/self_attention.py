"""Self-attention guidance (Hong et al., 2210.00939, algorithm 1) and its ablations, blur guidance among them.

    x0_bar = M * blur(x0) + (1 - M) * x0,    x_bar = sqrt(abar) x0_bar + sqrt(1 - abar) eps
    delta  = s (eps(x_t) - eps(x_bar))

M: the tokens that receive more attention than `threshold` times the average in one block, at the first evaluation.
Needs: capture of that block's received attention. Cost: one more network evaluation. `--guide_scale` is 1 + s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from ..capture import HEADS, Received, capture_attention, find_blocks
from ..errors import UserError
from ..late import F, Tensor, torch
from ..options import option, option_fields
from ..process import Prediction
from ..terms import ContrastGuidance, Guidance, Inputs, Passes, SigmaRange, StepContext, check_number
from .base import GuidanceOptions, Networks, each, naming, sigma_max_option, sigma_min_option, start_option
from .degrade import BLUR_TAPS, MASKS, gaussian_blur, high_frequency_mask, random_mask, square_mask

if TYPE_CHECKING:
    from ..unet import Encoder

Mask = Callable[[StepContext, Prediction], Tensor]

OFFICIAL: Mapping[str, float] = {"sel_attn_depth": 2, "blur_sigma": 9.0}       # defaults of the official code


class SelfAttentionGuidance(ContrastGuidance):
    """Guidance away from a copy of the image that is blurred where the network attends.

    model: the network that is sampled. block: its attention block, like "output.8" (`model.attention_blocks`).
    scale: s, 0 is off; the official `--guide_scale` is 1 + s. blur_sigma: pixels. threshold: of the mask, where 1 is
    the average attention. mask: "self-attention"; "global" (blur guidance, which reads no attention); "high-frequency",
    "random" or "square", with as many tokens as the attention would mask; or a function (ctx, pred) -> (N, 1, h, w)
    of h x w cells, any resolution, values in [0, 1]. heads: "exact", or "official" to split the map as the
    official code does. start, stop and the noise levels: see `Guidance`. blur_taps: weights of the blur per axis, odd;
    the official code has 31, diffusers 9. of_output: the contrast is one of what the network predicts, as in diffusers'
    pipeline, which is another one where that is x0 or the velocity, as the two images differ; else it is one of eps.
    """

    unconditional = True

    def __init__(self, model: Encoder, block: str, scale: float, blur_sigma: float, threshold: float = 1.0,
                 mask: str | Mask = "self-attention", heads: str = "exact", start: int | None = None,
                 stop: int | None = None, blur_taps: int = BLUR_TAPS, of_output: bool = False,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        if not callable(mask) and mask not in MASKS:
            raise UserError(f"mask {mask!r}: must be a function or one of {', '.join(MASKS)}")
        if heads not in HEADS:
            raise UserError(f"heads {heads!r}: must be one of {', '.join(HEADS)}")
        for name, value in (("blur_sigma", blur_sigma), ("threshold", threshold)):
            check_number(name, value)
        if blur_sigma <= 0:
            raise UserError(f"blur_sigma {blur_sigma}: must be greater than 0")
        if isinstance(blur_taps, bool) or not isinstance(blur_taps, int) or blur_taps < 1 or blur_taps % 2 == 0:
            raise UserError(f"blur_taps {blur_taps!r}: must be an odd number, at least 1")
        self.reads_attention = not callable(mask) and mask != "global"
        if self.reads_attention:
            find_blocks(model.attention_blocks, [block], "attention block")
        self.model = model
        self.block = block
        self.blur_sigma = blur_sigma
        self.blur_taps = blur_taps
        self.threshold = threshold
        self.mask = mask
        self.heads = heads
        self.of_output = of_output

    def observe(self) -> AbstractContextManager[Any]:
        """Captures the block's received attention."""
        if not self.reads_attention:
            return nullcontext()
        return capture_attention(self.model, [self.block], heads=self.heads)

    def seen(self, observed: Any, rows: slice) -> Any:
        """The received attention of some rows of the batch."""
        return observed and {name: replace(block, received=block.received[rows]) for name, block in observed.items()}

    def weaker(self, ctx: StepContext, pred: Prediction) -> Inputs:
        """x_bar, for the contrast `s (eps(x_t) - eps(x_bar))`."""
        return Inputs(self.degraded(ctx, pred), ctx.t)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The change of eps, (N, C, H, W)."""
        inputs = self.inputs(ctx, pred)
        if inputs is None or not self.of_output:
            return super().delta(ctx, pred)
        return self.scale * ctx.denoise.diffusion.eps_between(pred, ctx.evaluate(inputs.x, ctx.t), ctx.t)

    def degraded(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """x_bar (N, C, H, W): x0, blurred under the mask, with the same noise as x_t."""
        blurred = gaussian_blur(pred.pred_xstart, self.blur_sigma, self.blur_taps)
        mask = self.pixel_mask(ctx, pred)
        return ctx.denoise.diffusion.q_sample(torch.lerp(pred.pred_xstart, blurred, mask), ctx.t, noise=pred.eps)

    def pixel_mask(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The mask over pixels, (N, 1, H, W) float: 1 where the image is blurred."""
        size = ctx.x_t.shape[2:]
        if callable(self.mask):
            return F.interpolate(self.mask(ctx, pred).to(ctx.x_t), size, mode="nearest")
        if self.mask == "global":
            return torch.ones(len(ctx.x_t), 1, *size, device=ctx.x_t.device)
        captured = self._captured(ctx)
        tokens = self.token_mask(ctx, pred, captured)
        return F.interpolate(tokens.unflatten(1, captured.grid)[:, None].to(ctx.x_t), size, mode="nearest")

    def token_mask(self, ctx: StepContext, pred: Prediction, captured: Received) -> Tensor:
        """The mask over the block's tokens, (N, T) bool."""
        attended = captured.received > self.threshold
        count = attended.sum(dim=1)
        if self.mask == "square":
            return square_mask(count, captured.grid)
        if self.mask == "random":
            return random_mask(count, captured.grid, ctx.image_ids, ctx.t)
        if self.mask == "high-frequency":
            return high_frequency_mask(count, captured.grid, pred.pred_xstart)
        return attended

    def _captured(self, ctx: StepContext) -> Received:
        captured = ctx.observed.get(self)
        if not captured:
            raise UserError(f"self-attention guidance saw no evaluation of {self.block!r}: it must be given the "
                            "network that is sampled")
        return captured[self.block]


@dataclass(frozen=True)
class SagOptions(GuidanceOptions):
    """Self-attention guidance."""

    short = "SAG"
    switched_on: ClassVar = {"guide_scale": 1.1}
    search: ClassVar = each("guide_scale", 1.1, 1.25, 1.5, 2.0)
    search_scale = ("guide_scale", 1.0)
    symbols: ClassVar = {"guide_scale": ("s", 1.0), "blur_sigma": ("sigma", 0.0), "threshold": ("psi", 0.0)}
    sigma_flags = "sag"
    can_batch = True

    guide_scale: float = option(1.0, "1 + s, s the scale of self-attention guidance; 1: off")
    guide_start: int | None = start_option()
    sag_sigma_min: float | None = sigma_min_option()
    sag_sigma_max: float | None = sigma_max_option()
    sel_attn_block: str = option("output", "part of the network whose attention makes the mask",
                                 choices=("input", "middle", "output"))
    sel_attn_depth: int = option(8, "index of the block in that part", minimum=0)
    blur_sigma: float = option(3.0, "standard deviation of the blur in pixels", above=0)
    mask: str = option("self-attention", f"what is blurred: {', '.join(MASKS)}", choices=MASKS)
    threshold: float = option(1.0, "a token is masked if it receives more than this, where 1 is average")
    attention_heads: str = option("exact", "exact, or official: split heads as the official SAG code does",
                                  choices=HEADS)

    @property
    def active(self) -> bool:
        """Whether s is not 0."""
        return self.guide_scale != 1

    @property
    def attention_block(self) -> str | None:
        """The block that makes the mask, or says how much of it to mask; None of a global mask."""
        return self._block if self._reads_attention else None

    @property
    def heads(self) -> str | None:
        """How its attention is split into heads; None of a global mask."""
        return self.attention_heads if self._reads_attention else None

    @property
    def _block(self) -> str:
        return "middle" if self.sel_attn_block == "middle" else f"{self.sel_attn_block}.{self.sel_attn_depth}"

    @property
    def _reads_attention(self) -> bool:
        return self.mask != "global"

    @property
    def attention_threshold(self) -> float:
        """The threshold psi of its mask."""
        return self.threshold

    @classmethod
    def assumed(cls, values: Mapping[str, Any]) -> str:
        """Which block and blur are taken, where they are not given: the official code has other defaults."""
        own = cls(**{field.name: values[field.name] for field in option_fields(cls) if field.name in values})
        flags = [name for name in OFFICIAL if name not in values]
        if own.attention_block in (None, "middle"):         # so that no depth counts
            flags = [name for name in flags if name != "sel_attn_depth"]
        if not (own.active and flags):
            return ""
        taken = " ".join(f"--{name} {getattr(own, name):g}" for name in flags)
        block = "" if "sel_attn_depth" not in flags else f", the block {own.attention_block}"
        return (f"--guide_scale {own.guide_scale:g}: takes {taken}{block}, as nothing says otherwise; the defaults of "
                f"the SAG code are {' '.join(f'--{name} {OFFICIAL[name]:g}' for name in flags)}")

    def with_heads(self, heads: str) -> Self:
        """With other heads, "exact" or "official"."""
        return replace(self, attention_heads=heads)

    def at_blocks(self, model: Encoder) -> dict[str, Self]:
        """The method at each attention block of a network alone; as it is where the mask is global."""
        return {name: self._at_block(name) for name in model.attention_blocks} if self._reads_attention else {"": self}

    def _at_block(self, name: str) -> Self:
        part, _, depth = name.partition(".")
        return replace(self, sel_attn_block=part, sel_attn_depth=int(depth or 0))

    def useless(self) -> dict[str, str]:
        """What is about the attention, where the mask is global."""
        reading = ("sel_attn_block", "sel_attn_depth", "threshold", "attention_heads")
        return {} if self._reads_attention else dict.fromkeys(reading, "--mask global reads no attention")

    def headline(self) -> str:
        """Like "SAG s = 0.1"."""
        return f"SAG s = {self.guide_scale - 1:.3g}"

    def details(self) -> dict[str, str]:
        """Block, mask, threshold psi, blur and heads; of a global mask the mask and the blur alone."""
        details = {"block": f"block {self._block}", "mask": f"mask {self.mask}",
                   "threshold": f"psi = {self.threshold:g}", "blur_sigma": f"sigma = {self.blur_sigma:g}",
                   "heads": f"{self.attention_heads} heads"}
        return details if self._reads_attention else {**details, "block": "", "threshold": "", "heads": ""}

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term."""
        with naming("sel_attn_block", f"{self.sel_attn_block} --sel_attn_depth {self.sel_attn_depth}"):
            return [SelfAttentionGuidance(
                nets.model, block=self._block, scale=self.guide_scale - 1, blur_sigma=self.blur_sigma,
                threshold=self.threshold, mask=self.mask, heads=self.attention_heads, start=self.guide_start,
                **self.sigma_range)]

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """One more evaluation at each step of the window."""
        return [(Guidance(self.guide_scale - 1, self.guide_start, **self.sigma_range), SelfAttentionGuidance.passes)]
