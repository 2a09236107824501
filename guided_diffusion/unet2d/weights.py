"""The parameters of an ADM network by the names of `UNet2DModel`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from ..errors import UserError
from ..late import Tensor, torch

if TYPE_CHECKING:
    from ..attention import AttentionBlock
    from ..unet import UNetModel

ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
RESIDUAL = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
            "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
RESAMPLING = {"op": "conv", "conv": "conv"}
# Attention as diffusers named it before version 0.15
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def places(model: UNetModel) -> Iterator[tuple[str, str]]:
    """The layers of the blocks of a network: the name of each, and the name of its like in a `UNet2DModel`."""
    per_level = model.num_res_blocks + 1                # of the input blocks the last one of a level resamples
    for i in range(len(model.input_blocks) - 1):
        level, j = divmod(i, per_level)
        resamples = j == model.num_res_blocks
        for k in range(len(model.input_blocks[i + 1])):         # type: ignore[arg-type]  # a list of layers
            kind = "downsamplers.0" if resamples else f"{('resnets', 'attentions')[k]}.{j}"
            yield f"input_blocks.{i + 1}.{k}", f"down_blocks.{level}.{kind}"
    yield from zip((f"middle_block.{k}" for k in range(3)),
                   ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"), strict=True)
    for i, block in enumerate(model.output_blocks):
        level, j = divmod(i, per_level)
        resamples = j == model.num_res_blocks and level < model.num_levels - 1
        for k in range(len(block)):                             # type: ignore[arg-type]
            last = resamples and k == len(block) - 1            # type: ignore[arg-type]
            kind = "upsamplers.0" if last else f"{('resnets', 'attentions')[k]}.{j}"
            yield f"output_blocks.{i}.{k}", f"up_blocks.{level}.{kind}"


def names(model: UNetModel) -> dict[str, str]:
    """Every parameter but those of the projections of attention (see `attentions`), and its name in `UNet2DModel`."""
    parts = chain(ENDS.items(), ((f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in places(model)
                                 for a, b in chain(RESIDUAL.items(), ATTENTION.items(), RESAMPLING.items())))
    own = model.state_dict()
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in parts for end in ("weight", "bias")
            if f"{ours}.{end}" in own}


def attentions(model: UNetModel) -> Iterator[tuple[str, str, AttentionBlock]]:
    """The attention blocks: the name of each, its name in `UNet2DModel`, and the block."""
    modules = dict(model.named_modules())
    blocks = {id(block) for block in model.attention_blocks.values()}
    for ours, theirs in places(model):
        if id(modules[ours]) in blocks:
            yield ours, theirs, modules[ours]


def to_unet2d(model: UNetModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network by the names, and in the shapes and orders, of `UNet2DModel`.

    model: the network, whose own weights are not read.
    """
    result = {theirs: weights[ours] for ours, theirs in names(model).items()}
    for ours, theirs, block in attentions(model):
        for end in ("weight", "bias"):
            projection = weights[f"{ours}.qkv.{end}"].flatten(1) if end == "weight" else weights[f"{ours}.qkv.{end}"]
            parts = _parts(projection, block.num_heads, block.new_order)
            result |= {f"{theirs}.to_{name}.{end}": part for name, part in zip("qkv", parts, strict=True)}
        result[f"{theirs}.to_out.0.weight"] = result[f"{theirs}.to_out.0.weight"].flatten(1)
    return result


def from_unet2d(model: UNetModel, weights: Mapping[str, Tensor], what: str, sines_first: bool = False,
                ) -> dict[str, Tensor]:
    """Undoes `to_unet2d`, with attention in the legacy order.

    sines_first: the embedding of the step begins with its sines (`flip_sin_to_cos` False), as that of ADM networks does
    with its cosines. Raises UserError, beginning with `what`, for weights of another network.
    """
    weights = {_newly_named(name): value for name, value in weights.items()}
    shapes, result = {name: value.shape for name, value in model.state_dict().items()}, {}
    try:
        for ours, theirs in names(model).items():
            result[ours] = weights.pop(theirs).reshape(shapes[ours])
        for ours, theirs, block in attentions(model):
            for end in ("weight", "bias"):
                parts = [weights.pop(f"{theirs}.to_{name}.{end}") for name in "qkv"]
                by_head = torch.stack([part.unflatten(0, (block.num_heads, -1)) for part in parts], dim=1)
                result[f"{ours}.qkv.{end}"] = by_head.reshape(shapes[f"{ours}.qkv.{end}"])
    except KeyError as error:
        raise UserError(f"{what}: has no {error.args[0]}, which its config.json makes expect") from None
    except RuntimeError:
        raise UserError(f"{what}: the weights and the config.json do not fit together") from None
    if weights:
        raise UserError(f"{what}: has {next(iter(weights))}, which no ADM network has")
    if sines_first:
        first, second = result["time_embed.0.weight"].chunk(2, dim=1)
        result["time_embed.0.weight"] = torch.cat([second, first], dim=1)
    return result


def _parts(projection: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values of a projection (3C, ...), (C, ...) each, their rows head by head."""
    if new_order:
        return projection.chunk(3)
    return tuple(part.flatten(0, 1) for part in projection.unflatten(0, (heads, 3, -1)).unbind(1))


def _newly_named(name: str) -> str:
    """The name of a parameter, where an old file says `query` for `to_q`."""
    *place, layer, end = name.split(".") if name.count(".") > 1 else ("", name)
    return ".".join([*place, OLD_NAMES.get(layer, layer), end]) if "attentions" in place else name
