"""The attention block of ADM networks, and the attention its tokens receive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError
from .nn import checkpoint, normalization, zero_module

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GridAttention = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]     # the grid of the tokens, too
Observer = Callable[["AttentionBlock", Tensor, tuple[int, int]], None]


def split_heads(qkv: Tensor, num_heads: int, new_order: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a projection (N, T, 3C) into queries, keys and values, (N, heads, T, C / heads) each.

    Its channels hold q, k and v head by head (legacy order), or all q, then all k, then all v (new order).
    """
    n, tokens, width = qkv.shape
    channels = width // (3 * num_heads)
    if new_order:
        q, k, v = qkv.view(n, tokens, 3, num_heads, channels).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = qkv.view(n, tokens, num_heads, 3, channels).permute(3, 0, 2, 1, 4).unbind(0)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Undoes the split: (N, heads, T, C / heads) -> (N, T, C)."""
    return x.transpose(1, 2).flatten(2)


def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each token receives: summed over the queries, averaged over the heads (SAG, section 4).

    q, k: (N, heads, T, C / heads). Returns (N, T), float32, mean 1 over T. Only a few rows of the (T, T) map exist
    at a time, also when a graph is kept (each group of rows is then computed again in the backward pass).
    """
    rows_at_once = max(1, 2**15 // q.shape[2])
    images_at_once = len(q)
    if q.device.type == "cpu":          # whose cache holds the rows of a few images
        images_at_once = max(1, 2**18 // (q.shape[1] * rows_at_once * q.shape[2]))
    parts = zip(q.split(images_at_once), k.split(images_at_once), strict=True)
    return torch.cat([_received(queries, keys, rows_at_once) for queries, keys in parts])


def _received(q: Tensor, k: Tensor, rows_at_once: int) -> Tensor:
    keys = k.contiguous().float().transpose(2, 3)       # contiguous: else every product below copies all of them
    scale = q.shape[-1] ** -0.5

    def received_from(rows: Tensor, keys: Tensor) -> Tensor:
        return (rows.float() * scale @ keys).softmax(dim=-1).sum(dim=(1, 2))

    total = torch.zeros(q.shape[0], q.shape[2], device=q.device)
    for rows in q.split(rows_at_once, dim=2):
        total = total + checkpoint(received_from, rows, keys, enabled=q.shape[2] > rows_at_once)
    return total / q.shape[1]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al., 1706.03762, equation 1), for (N, heads, T, d) each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 1024:
        # The fused CPU kernel is two to four times slower than plain products in bfloat16.
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection (ADM).

    num_heads, num_head_channels: the number of heads, or, where that is not -1, the width of each. new_order: see
    `split_heads`. grid: (height, width) of the map at the model's own image size. `num_heads` of the block is the
    number of heads that it has. Observers and an override are set for the length of a `with` block by
    `guided_diffusion.capture`. Raises UserError where the heads do not divide the channels.
    """

    def __init__(self, channels: int, *, num_heads: int = 1, num_head_channels: int = -1, new_order: bool = False,
                 use_checkpoint: bool = False, grid: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        by_number = num_head_channels == -1
        flag, divisor = ("num_heads", num_heads) if by_number else ("num_head_channels", num_head_channels)
        if divisor < 1 or channels % divisor:
            raise UserError(f"--{flag} {divisor}: must divide the {channels} channels of every attention block")
        self.num_heads = divisor if by_number else channels // divisor
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.grid = grid
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))
        self.observers: list[Observer] = []
        self.override: GridAttention | None = None
        self.compiled: Callable[[Tensor], Tensor] | None = None         # `plain`, where it is compiled

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape."""
        if self.observers or self.override is not None:
            # What is observed must be computed once, and its graph kept: no checkpoint then.
            return self._forward(x, self.override, self.observers)
        return checkpoint(self.compiled or self.plain, x, enabled=self.use_checkpoint)

    def plain(self, x: Tensor) -> Tensor:
        """The block itself, neither compiled nor checkpointed, and not watched: what `forward` says."""
        return self._forward(x)

    def _forward(self, x: Tensor, override: GridAttention | None = None, observers: Sequence[Observer] = ()) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # (N, T, C): no copy in channels_last
        qkv = F.linear(tokens, self.qkv.weight.squeeze(-1), self.qkv.bias)
        for observe in observers:
            observe(self, qkv, (height, width))
        q, k, v = split_heads(qkv, self.num_heads, self.new_order)
        attended = merge_heads(attention(q, k, v) if override is None else override(q, k, v, (height, width)))
        out = F.linear(attended, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + out.transpose(1, 2).unflatten(2, (height, width))
