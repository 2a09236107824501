"""Reading and overriding what happens inside a network, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Attention, AttentionBlock, received_attention, split_heads
from .errors import UserError
from .options import nearest

HEADS = ("exact", "official")


@dataclass(frozen=True)
class Received:
    """Attention that each token of a block received: (N, T) float32, mean 1 over T = grid[0] * grid[1]."""

    received: Tensor
    grid: tuple[int, int]


def find_blocks(available: Mapping[str, nn.Module], names: Iterable[str], kind: str) -> dict[str, nn.Module]:
    """The named blocks; raises UserError listing what there is for a name that is not among them."""
    names = list(names)
    for name in names:
        if name not in available:
            raise UserError(f"{name!r} is no {kind} of this network{nearest(name, available)}; "
                            f"there are: {', '.join(available) or 'none'}")
    return {name: available[name] for name in names}


@contextmanager
def capture_attention(model: nn.Module, names: Iterable[str], *, heads: str = "exact", graph: bool = False,
                      ) -> Iterator[dict[str, Received]]:
    """The attention received in the named blocks of `model.attention_blocks`, by every evaluation in the block.

        with capture_attention(unet, ["output.8"]) as captured:
            eps = unet(x_t, t)
        captured["output.8"].received          # (N, T)

    heads: "exact", or "official" to split the map as the official SAG code does (`--num_heads` heads in legacy
    order, whatever the block has). graph: keep the autograd graph instead of detaching.
    """
    if heads not in HEADS:
        raise UserError(f"heads {heads!r}: must be one of {', '.join(HEADS)}")
    blocks = find_blocks(model.attention_blocks, names, "attention block")
    for name, block in blocks.items():
        channels = block.norm.num_channels
        if heads == "official" and channels % block.flag_heads:
            raise UserError(f"--num_heads {block.flag_heads}: must divide the {channels} channels of {name!r}, to "
                            "split its map as the official code does")
    captured: dict[str, Received] = {}

    def observer(name: str) -> Callable[[AttentionBlock, Tensor, tuple[int, int]], None]:
        def observe(block: AttentionBlock, qkv: Tensor, grid: tuple[int, int]) -> None:
            split = (block.num_heads, block.new_order) if heads == "exact" else (block.flag_heads, False)
            with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
                q, k, _ = split_heads(qkv, *split)
                captured[name] = Received(received_attention(q, k), grid)
        return observe

    observers = {name: observer(name) for name in blocks}
    for name, block in blocks.items():
        block.observers.append(observers[name])
    try:
        yield captured
    finally:
        for name, block in blocks.items():
            block.observers.remove(observers[name])


@contextmanager
def override_attention(model: nn.Module, names: Iterable[str], attention: Attention) -> Iterator[None]:
    """Within the block, the named attention blocks compute `attention(q, k, v)` instead of softmax attention.

    q, k, v and the result: (N, heads, T, C / heads). `lambda q, k, v: v` is the identity attention of
    perturbed-attention guidance.
    """
    blocks = find_blocks(model.attention_blocks, names, "attention block")
    before = {name: block.override for name, block in blocks.items()}
    for block in blocks.values():
        block.override = attention
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.override = before[name]


@contextmanager
def capture_features(model: nn.Module, names: Iterable[str], *, graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named blocks (`input.0` ..., `middle`, `output.0` ...), (N, C, H, W) each.

    graph: keep the autograd graph instead of detaching.
    """
    blocks = find_blocks(model.feature_blocks, names, "block")
    captured: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            captured[name] = output if graph else output.detach()
        return keep

    handles = [block.register_forward_hook(hook(name)) for name, block in blocks.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
