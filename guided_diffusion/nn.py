"""Layer helpers shared by the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from .losses import mean_flat

__all__ = ["GroupNorm32", "SiLU", "checkpoint", "is_channels_last_on_cpu", "mean_flat", "normalization", "rows_of",
           "timestep_embedding", "zero_module"]

Module = TypeVar("Module", bound=nn.Module)
_HALVES = (torch.bfloat16, torch.float16)       # whose norms on a CPU compute in float32 by themselves


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of step indices (Vaswani et al., 1706.03762, section 3.5), as ADM uses it.

    timesteps: (N,), fractions allowed. Returns (N, dim) float32: cosines, then sines, zero-padded where dim is odd.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32))
    angles = timesteps[:, None].float() * frequencies.to(timesteps.device)
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in float32 whatever the type of its input, and returns the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape and type."""
        computes_by_itself = x.device.type == "cpu" and x.dtype in _HALVES and not torch.is_grad_enabled()
        values = x if computes_by_itself else x.float()
        if is_channels_last_on_cpu(x) and x.shape[2:].numel() < 1024:
            # The kernel for small channels_last maps walks through them by single groups: copying twice is faster.
            normed = super().forward(values.contiguous())
            return normed.to(x.dtype, memory_format=torch.channels_last)
        return super().forward(values).to(x.dtype)


class SiLU(nn.Module):
    """SiLU that overwrites its input where no gradient is recorded.

    It is for values that nothing else reads, such as the output of a norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The SiLU x * sigmoid(x), element by element."""
        return nn.functional.silu(x, inplace=not torch.is_grad_enabled())


def is_channels_last_on_cpu(x: Tensor) -> bool:
    """Says whether x is a map (N, C, H, W) that is stored in the order N, H, W, C, in the memory of the CPU."""
    return (x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous())


def rows_of(whole: Sequence[Tensor | None], part: Sequence[Tensor | None]) -> slice | None:
    """The rows in which the inputs of a batch are those of a part, bit for bit; None where they are nowhere.

    whole: (N, ...) each, None for an input that is not given. part: (n, ...) each. Only rows from a multiple of n on.
    """
    total, count = (next(len(one) for one in inputs if one is not None) for inputs in (whole, part))
    for rows in (slice(first, first + count) for first in range(0, total - count + 1, count)):
        if all(a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a[rows], b)
               for a, b in zip(whole, part, strict=True)):
            return rows
    return None


def normalization(channels: int) -> GroupNorm32:
    """The norm of every ADM layer: 32 groups."""
    return GroupNorm32(32, channels)


def zero_module(module: Module) -> Module:
    """Sets all parameters of `module` to zero, so that a residual branch starts as the identity; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor, enabled: bool) -> Tensor:
    """Calls `function(*inputs)`; if `enabled`, activations are computed again in the backward pass instead of kept.

    The gradient also reaches `inputs` where all weights are frozen.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*inputs)
    return _checkpoint(function, *inputs, use_reentrant=False)
