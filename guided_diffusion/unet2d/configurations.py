"""What an ADM network and a `UNet2DModel` of diffusers have in common, and what differs.

Both are the UNet of Ho et al. (2006.11239). These agree, by another name or another order of numbers: residual blocks
that resample (`ResnetDownsampleBlock2D`), scale-shift norms (`resnet_time_scale_shift`), classes (`num_class_embeds`),
a learned variance (twice the channels), q, k and v head by head or one after the other, cosines before or after sines.
What has no like in the other architecture is named in one sentence for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..unet import UNetModel

# The defaults of UNet2DModel, which a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None}
# What ADM networks have in any case: the value, and why another one is another network.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "center_input_sample": ((False,), "ADM networks see images as they are"),
    "time_embedding_type": (("positional",), "ADM networks embed the step by sines and cosines"),
    "freq_shift": ((0,), "the sines of the step have other frequencies"),
    "mid_block_type": (("UNetMidBlock2D",), "ADM networks have a middle block with one attention"),
    "add_attention": ((True,), "ADM networks have attention in the middle block"),
    "mid_block_scale_factor": ((1,), "ADM networks do not scale the middle block"),
    "act_fn": (("silu", "swish"), "ADM networks have SiLU"),
    "norm_num_groups": ((32,), "ADM networks have group norms of 32 groups"),
    "norm_eps": ((1e-5,), "group norms of ADM networks add 1e-5 to the variance"),
    "resnet_time_scale_shift": (("default", "scale_shift"), "ADM networks add the embedding, or scale and shift by it"),
    "class_embed_type": ((None,), "ADM networks look classes up in a table")}
ATTENTION_DOWN, ATTENTION_UP = "AttnDownBlock2D", "AttnUpBlock2D"
# Blocks without attention by whether a residual block resamples, not a convolution.
PLAIN_DOWN = {False: "DownBlock2D", True: "ResnetDownsampleBlock2D"}
PLAIN_UP = {False: "UpBlock2D", True: "ResnetUpsampleBlock2D"}


def config_of(model: UNetModel, sample_size: int, dropout: float = 0.0) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` that is this network.

    sample_size: pixels of its images. Raises UserError that says all that `UNet2DModel` has no like of.
    """
    found = list(_differences_of(model))
    if found:
        raise UserError("UNet2DModel has no like of this network: " + "; ".join(found))
    attention = [2**level in model.attention_resolutions for level in range(model.num_levels)]
    updown = model.config.resblock_updown
    heads = _head_widths(model)
    one_head = all(block.num_heads == 1 for block in model.attention_blocks.values())
    return {
        "_class_name": "UNet2DModel", **DEFAULTS, "sample_size": sample_size, "in_channels": model.in_channels,
        "out_channels": model.out_channels, "dropout": dropout, "layers_per_block": model.num_res_blocks,
        "block_out_channels": [model.level_channels(level) for level in range(model.num_levels)],
        "down_block_types": [ATTENTION_DOWN if has else PLAIN_DOWN[updown] for has in attention],
        "up_block_types": [ATTENTION_UP if has else PLAIN_UP[updown] for has in reversed(attention)],
        "downsample_type": "resnet" if updown else "conv", "upsample_type": "resnet" if updown else "conv",
        "attention_head_dim": None if one_head else heads.pop(), "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if model.config.use_scale_shift_norm else "default",
        "num_class_embeds": None if model.num_classes is None else model.num_classes + (model.null_label is not None)}


def _differences_of(model: UNetModel) -> Iterator[str]:
    if model.channel_mult[0] != 1:
        yield (f"channel_mult begins with {model.channel_mult[0]:g} (it must be 1, as UNet2DModel embeds the step in "
               "as many numbers as its first block has channels)")
    widths = sorted(_head_widths(model))
    if len(widths) > 1 and any(block.num_heads != 1 for block in model.attention_blocks.values()):
        yield (f"num_heads {model.num_heads} makes attention heads of {' and '.join(map(str, widths))} channels (there "
               "is one attention_head_dim for all blocks)")


def _head_widths(model: UNetModel) -> set[int]:
    return {block.norm.num_channels // block.num_heads for block in model.attention_blocks.values()}


def flags_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the ADM network that a `UNet2DModel` with this config.json is.

    Raises UserError that says all that ADM networks have no like of.
    """
    config = DEFAULTS | dict(config)
    found = [*_fixed_differences(config), *_block_differences(config), *_size_differences(config)]
    if found:
        raise UserError("ADM networks have no like of it: " + "; ".join(found))
    widths, size = list(config["block_out_channels"]), _size(config["sample_size"])
    attention = [kind == ATTENTION_DOWN for kind in _kinds(config, "down")]
    head, classes = config["attention_head_dim"], config["num_class_embeds"]
    return {
        "image_size": size, "in_channels": config["in_channels"], "num_channels": widths[0],
        "channel_mult": ",".join(map(_multiple, widths, widths[:1] * len(widths))),
        "num_res_blocks": config["layers_per_block"], "dropout": config["dropout"],
        "attention_resolutions": ",".join(str(size // 2**i) for i, has in enumerate(attention) if has),
        "num_heads": 1 if head is None else 4, "num_head_channels": -1 if head is None else head,
        "class_cond": classes is not None, **({} if classes is None else {"num_classes": classes}),
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": any(_resampling(config)), "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
        "use_new_attention_order": False}


def _fixed_differences(config: Mapping[str, Any]) -> Iterator[str]:
    for name, (allowed, why) in FIXED.items():
        if config[name] not in allowed:
            yield f"{name} {config[name]} ({why})"
    groups = config["attn_norm_num_groups"]
    if groups is None and config["resnet_time_scale_shift"] == "scale_shift":
        yield "attn_norm_num_groups None (attention in the middle of ADM networks has a norm)"
    elif groups not in (None, 32):
        yield f"attn_norm_num_groups {groups} (ADM networks have group norms of 32 groups)"
    width, dim = config["block_out_channels"][0], config["time_embedding_dim"]
    if dim not in (None, 4 * width):
        yield f"time_embedding_dim {dim} (in ADM networks it is 4 times the first width, {4 * width})"


def _kinds(config: Mapping[str, Any], direction: str) -> list[str]:
    """The types of blocks from the images to the middle, without a prefix of old files."""
    kinds = [str(kind).removeprefix("UNetRes") for kind in config[f"{direction}_block_types"]]
    return kinds if direction == "down" else kinds[::-1]


def _resampling(config: Mapping[str, Any]) -> set[bool]:
    """Whether residual blocks resample, of all blocks that do."""
    found = set()
    for direction, plain, option in (("down", PLAIN_DOWN, "downsample_type"), ("up", PLAIN_UP, "upsample_type")):
        kinds = _kinds(config, direction)
        for kind in kinds[:-1] if direction == "down" else kinds[1:]:
            found.add(kind == plain[True] or ("Attn" in kind and config[option] == "resnet"))
    return found


def _block_differences(config: Mapping[str, Any]) -> Iterator[str]:
    down, up = _kinds(config, "down"), _kinds(config, "up")
    unknown = sorted({*down, *up} - {ATTENTION_DOWN, ATTENTION_UP, *PLAIN_DOWN.values(), *PLAIN_UP.values()})
    if unknown:
        yield f"blocks {', '.join(unknown)} (ADM networks have no such layers)"
        return
    if [kind == ATTENTION_DOWN for kind in down] != [kind == ATTENTION_UP for kind in up]:
        yield ("down_block_types and up_block_types have attention at other sizes (in ADM networks a size has it in "
               "both halves)")
    if len(_resampling(config)) > 1:
        yield "some blocks resample by convolutions and others by residual blocks (in ADM networks all do it alike)"
    if False in _resampling(config) and config["downsample_padding"] != 1:
        yield (f"downsample_padding {config['downsample_padding']} (convolutions of ADM networks that downsample pad "
               "by 1 on all sides)")


def _size_differences(config: Mapping[str, Any]) -> Iterator[str]:
    taken, given, size = config["in_channels"], config["out_channels"], config["sample_size"]
    widths, head = list(config["block_out_channels"]), config["attention_head_dim"]
    if taken not in (1, 3):
        yield f"in_channels {taken} (images here have 1 or 3)"
    if given not in (taken, 2 * taken):
        yield f"out_channels {given} (they are the images' {taken}, or twice as many with a learned variance)"
    if _size(size) is None:
        yield f"sample_size {size} (ADM networks are built for square images of a known size)"
    if any(width % 32 for width in widths):
        yield f"block_out_channels {widths} (they must be multiples of 32, for group norms)"
    if any(int(float(_multiple(width, widths[0])) * widths[0]) != width for width in widths):
        yield f"block_out_channels {widths} (they must be multiples of the first)"
    attended = [width for width, kind in zip(widths, _kinds(config, "down"), strict=True) if kind == ATTENTION_DOWN]
    if head is not None and (isinstance(head, bool) or not isinstance(head, int) or head < 1):
        yield f"attention_head_dim {head} (it must be a whole number above 0)"
    elif head is not None and any(width % head for width in [*attended, widths[-1]]):
        yield f"attention_head_dim {head} (it must divide the channels of every attention block)"


def _multiple(width: int, base: int) -> str:
    """A width as a multiple of the first one."""
    return str(width // base) if width % base == 0 else repr(width / base)


def _size(sample_size: Any) -> int | None:
    """Height and width of square images; None for others."""
    if isinstance(sample_size, int):
        return sample_size
    return sample_size[0] if sample_size and len(set(sample_size)) == 1 else None
