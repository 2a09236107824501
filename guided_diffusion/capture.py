"""Reading and overriding what happens inside a network, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError
from .late import Tensor, nn, torch
from .options import nearest

if TYPE_CHECKING:
    from .attention import Attention, AttentionBlock, GridAttention
    from .unet import Encoder, Prefix, UNetModel

HEADS = ("exact", "official")

Block = TypeVar("Block", bound="nn.Module")


@dataclass(frozen=True)
class Received:
    """Attention that each token of a block received: (N, T) float32, mean 1 over T = grid[0] * grid[1]."""

    received: Tensor
    grid: tuple[int, int]


def find_blocks(available: Mapping[str, Block], names: Iterable[str], kind: str) -> dict[str, Block]:
    """The named blocks among those that are available.

    kind: what a block is called in the UserError that is raised for an unknown name, which lists the known ones.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str) or name not in available:
            raise UserError(f"{name!r} is no {kind} of this network{nearest(str(name), available)}; "
                            f"there are: {', '.join(available) or 'none'}")
    return {name: available[name] for name in names}


@contextmanager
def capture_attention(model: Encoder, names: Iterable[str], *, heads: str = "exact", graph: bool = False,
                      ) -> Iterator[dict[str, Received]]:
    """Captures the attention that tokens receive in the named blocks of `model.attention_blocks`.

    Every evaluation in the `with` block overwrites what the one before it gave.

        with capture_attention(unet, ["output.8"]) as captured:
            eps = unet(x_t, t)
        captured["output.8"].received          # (N, T)

    heads: "exact", or "official" to split the projection as the official SAG code does (see `official_heads`).
    graph: keep the autograd graph instead of detaching. Raises UserError for an unknown block, and where the official
    heads do not divide the channels.
    """
    from .attention import received_attention, split_heads

    if heads not in HEADS:
        raise UserError(f"heads {heads!r}: must be one of {', '.join(HEADS)}")
    blocks = find_blocks(model.attention_blocks, names, "attention block")
    split = {name: (block.num_heads, block.new_order) if heads == "exact" else (official_heads(model, name), False)
             for name, block in blocks.items()}
    captured: dict[str, Received] = {}

    def observer(name: str) -> Callable[[AttentionBlock, Tensor, tuple[int, int]], None]:
        def observe(block: AttentionBlock, qkv: Tensor, grid: tuple[int, int]) -> None:
            with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
                q, k, _ = split_heads(qkv, *split[name])
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


def official_heads(model: Encoder, name: str) -> int:
    """The number of heads into which the official SAG code splits the projection of the named attention block.

    That code believes in the argument num_heads (num_heads_upsample in output blocks) and in the legacy order, also
    where num_head_channels gives the block other heads, and where it has the new order. Raises UserError where that
    number does not divide the channels of the block.
    """
    from .unet import UNetModel

    heads = model.num_heads
    if isinstance(model, UNetModel) and name.startswith("output."):
        heads = model.num_heads_upsample
    channels = model.attention_blocks[name].norm.num_channels
    if channels % heads:
        raise UserError(f"--num_heads {heads}: must divide the {channels} channels of {name!r}, to split its map as "
                        "the official code does")
    return heads


def override_attention(model: Encoder, names: Iterable[str], attention: Attention) -> AbstractContextManager[None]:
    """Lets the named attention blocks compute `attention(q, k, v)` instead of softmax attention.

    q, k, v and the result: (N, heads, T, C / heads). `lambda q, k, v: v` is the identity attention of
    perturbed-attention guidance.
    """
    return override_grid_attention(model, names, lambda q, k, v, grid: attention(q, k, v))


@contextmanager
def override_grid_attention(model: Encoder, names: Iterable[str], attention: GridAttention) -> Iterator[None]:
    """As `override_attention`, with `attention(q, k, v, grid)`; grid: height and width of the tokens' map, T in all."""
    blocks = find_blocks(model.attention_blocks, names, "attention block")
    before = {name: block.override for name, block in blocks.items()}
    for block in blocks.values():
        block.override = attention
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.override = before[name]


def sees_embedding(block: nn.Module) -> bool:
    """Whether the embedding of the step reaches a block of features, one of this project's networks or of diffusers."""
    own = getattr(block, "sees_embedding", None)
    return getattr(block, "time_emb_proj", block) is not None if own is None else bool(own)


@contextmanager
def perturb_embedding(model: Encoder, names: Iterable[str], change: Callable[[Tensor], Tensor]) -> Iterator[list[str]]:
    """Lets the named blocks of `model.feature_blocks` see `change(emb)` in place of the embedding of step and label.

    emb and the result: (N, E); of an evaluation it is changed once. The list that is given fills with the names of the
    blocks that were reached. Raises UserError for an unknown block.
    """
    blocks = find_blocks(model.feature_blocks, names, "block")
    reached: list[str] = []
    last: tuple[Tensor, Tensor] | None = None               # the embedding of an evaluation, and the changed one

    def hook(name: str) -> Callable[..., tuple[Any, ...]]:
        def replace(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
            nonlocal last
            emb = inputs[1] if len(inputs) > 1 else named["temb"]       # some networks of diffusers pass it by name
            if last is None or last[0] is not emb:
                last = emb, change(emb)
            reached.append(name)
            if len(inputs) > 1:
                return (inputs[0], last[1], *inputs[2:]), named
            return inputs, {**named, "temb": last[1]}
        return replace

    handles = [block.register_forward_pre_hook(hook(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_features(model: Encoder, names: Iterable[str], *, graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """Captures the outputs of the named blocks (`input.0` ..., `middle`, `output.0` ...), (N, C, H, W) each.

    Every evaluation in the `with` block overwrites what the one before it gave. graph: keep the autograd graph instead
    of detaching. Raises UserError for an unknown block.
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


@contextmanager
def capture_prefix(model: UNetModel, block: str) -> Iterator[list[Prefix]]:
    """Captures every evaluation in the `with` block up to the attention of `block`, so that others can begin there.

    An evaluation that differs only from that attention on, as one whose attention is overridden, needs no more:

        with capture_prefix(unet, "middle") as prefixes:
            eps = unet(x_t, t)
        with override_attention(unet, ["middle"], lambda q, k, v: v):
            perturbed = unet.resume(prefixes[0])          # bit for bit unet(x_t, t)

    A prefix holds the skip tensors that are still to be read, and one map (`Prefix.memory` bytes), without their
    graph. Raises UserError for an unknown block.
    """
    from .unet import PrefixRecorder

    attention = find_blocks(model.attention_blocks, [block], "attention block")[block]
    recorder = PrefixRecorder(block)
    handle = attention.register_forward_pre_hook(recorder.record)
    model.recorders.append(recorder)
    try:
        yield recorder.prefixes
    finally:
        handle.remove()
        model.recorders.remove(recorder)


@contextmanager
def resume_from(model: UNetModel, prefixes: Iterable[Prefix]) -> Iterator[None]:
    """Lets the network begin at one of the prefixes where it is called with the inputs of that one.

    What lies around the network, such as a function that adds its labels, needs no knowledge of prefixes. Other inputs
    are evaluated from their beginning.
    """
    before, model.prefixes = model.prefixes, list(prefixes)
    try:
        yield
    finally:
        model.prefixes = before


def first_block(model: Encoder, names: Iterable[str]) -> str:
    """The one of the named attention blocks that an evaluation reaches first."""
    named = find_blocks(model.attention_blocks, names, "attention block")
    return next(name for name in model.attention_blocks if name in named)


@contextmanager
def end_graph(model: Encoder, names: Iterable[str]) -> Iterator[None]:
    """Keeps no autograd graph above the last of the named blocks, in the `with` block.

    Nested blocks keep it up to the last block that any of them names. Raises UserError for an unknown block.
    """
    named = list(find_blocks(model.feature_blocks, names, "block"))
    before, model.graph_ends = model.graph_ends, [*model.graph_ends, *named]
    try:
        yield
    finally:
        model.graph_ends = before
