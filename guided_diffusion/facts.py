"""What the weights of a checkpoint show of their network, and whether that is what the flags say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import kind_of, parse_channel_mult, parse_resolutions
from .errors import UserError
from .shapes import CHANNEL_MULT, UPSAMPLER_CHANNEL_MULT

_KINDS = {"diffusion": "a diffusion model", "upsampler": "an upsampler", "classifier": "a classifier"}

# Facts by name, as "the file has ..."; those that are True or False read "has scale-shift norms", "has no ...".
_WORDS = {
    "image_size": "a pool for images of {} pixels",
    "in_channels": "{} image channels",
    "num_channels": "{} base channels",
    "num_res_blocks": "{} residual blocks per level",
    "resblock_updown": "residual blocks that resample",
    "use_scale_shift_norm": "scale-shift norms",
    "class_cond": "label_emb",
    "num_classes": "{} classes",
    "learn_sigma": "learned variance",
    "pool": "{} pooling",
}
_CLASSIFIER_FLAGS = {"num_channels": "classifier_width", "num_res_blocks": "classifier_depth", **{
    name: f"classifier_{name}"
    for name in ("channel_mult", "attention_resolutions", "resblock_updown", "use_scale_shift_norm", "pool")}}


def infer_options(state: Mapping[str, Any], in_channels: int | None = None) -> dict[str, Any]:
    """What the weights of an ADM network show of its options; `state` maps names to tensors or to shapes.

    in_channels: image channels of the diffusion network that is asked for. They decide where the weights may also be
    those of an upsampler of half as many channels, with learned variance.

    kind ("diffusion", "upsampler" or "classifier"), in_channels (of the images: an upsampler takes twice as many),
    num_channels, num_res_blocks, channel_mult (tuple), attention_factors (tuple: the downsampling factors, image size
    // resolution, that have attention), resblock_updown, use_scale_shift_norm; of UNets class_cond, num_classes where
    they have labels, learn_sigma; of classifiers num_classes, pool ("adaptive", "attention", "spatial" or
    "spatial_v2"), image_size where the pool fixes it.

    What the weights leave open has no entry: resblock_updown in a network of one level, and the levels of a
    classifier in which nothing sets them apart. Raises UserError for the weights of something else.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    try:
        found = _infer_ends(shapes, in_channels)
        found["num_channels"] = shapes["time_embed.0.weight"][1]
        found |= _infer_levels(shapes, found["num_channels"], is_unet=found["kind"] != "classifier")
        channels = shapes["middle_block.0.out_layers.0.weight"][0]
        found["use_scale_shift_norm"] = shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * channels
    except KeyError as error:
        raise UserError(f"the weights are not those of an ADM network: there is no {error.args[0]}") from None
    except (IndexError, ValueError):
        raise UserError("the weights are not those of an ADM network: their shapes do not fit together") from None
    pooled_size = found.pop("pooled_size", None)
    if pooled_size and "channel_mult" in found:
        found["image_size"] = pooled_size * 2 ** (len(found["channel_mult"]) - 1)
    return found


def _infer_ends(shapes: Mapping[str, tuple[int, ...]], asked: int | None) -> dict[str, Any]:
    """What the first and the last layer show."""
    taken = shapes["input_blocks.0.0.weight"][1]
    if not any(name.startswith("output_blocks.") for name in shapes):
        return {"kind": "classifier", "in_channels": taken, **_infer_pool(shapes)}
    predicted = shapes["out.2.weight"][0]
    # An upsampler takes two images: predicted / taken is 1/2 or 1, with learned variance, and 1 or 2 of other networks.
    upsampler = taken % 2 == 0 and (2 * predicted == taken or predicted == taken != asked)
    in_channels = taken // 2 if upsampler else taken
    if predicted not in (in_channels, 2 * in_channels):
        raise ValueError
    labels = shapes.get("label_emb.weight")
    return {"kind": "upsampler" if upsampler else "diffusion", "in_channels": in_channels,
            "class_cond": labels is not None, **({"num_classes": labels[0]} if labels else {}),
            "learn_sigma": predicted == 2 * in_channels}


def _infer_pool(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if "out.2.positional_embedding" in shapes:
        tokens = shapes["out.2.positional_embedding"][1] - 1          # one is the mean
        return {"pool": "attention", "num_classes": shapes["out.2.c_proj.weight"][0], "pooled_size": math.isqrt(tokens)}
    if "out.3.weight" not in shapes:
        return {"pool": "spatial", "num_classes": shapes["out.2.weight"][0]}
    last = shapes["out.3.weight"]
    return {"pool": "adaptive" if len(last) == 4 else "spatial_v2", "num_classes": last[0]}


@dataclass(frozen=True)
class _InputBlock:
    channels_in: int
    channels_out: int
    attention: bool
    strided: bool          # a convolution that downsamples; else a residual block, which may downsample too


def _infer_levels(shapes: Mapping[str, tuple[int, ...]], width: int, is_unet: bool) -> dict[str, Any]:
    """What the input blocks show.

    After the first convolution each level has `period - 1` residual blocks, and one more block that downsamples lies
    between two levels. Where that is a residual block too, every period that fits is a possible reading. In a UNet
    the number of upsampling layers decides; else what all readings agree on is known.
    """
    count = sum(bool(re.fullmatch(r"input_blocks\.\d+\.0\.(in_layers\.2|op)\.weight", name)) for name in shapes)
    blocks = [_input_block(shapes, i) for i in range(1, count + 1)]
    periods = [period for period in range(2, count + 2) if (count + 1) % period == 0 and _fits(blocks, period)]
    if is_unet:
        upsampling = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
        levels = 1 + sum(bool(upsampling.fullmatch(name)) for name in shapes)
        periods = [period for period in periods if period * levels == count + 1]
    if not periods:
        raise ValueError
    first, *others = [_reading(blocks, period, width) for period in periods]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _input_block(shapes: Mapping[str, tuple[int, ...]], index: int) -> _InputBlock:
    strided = f"input_blocks.{index}.0.op.weight" in shapes
    channels_out, channels_in, _, _ = shapes[f"input_blocks.{index}.0.{'op' if strided else 'in_layers.2'}.weight"]
    return _InputBlock(channels_in, channels_out, f"input_blocks.{index}.1.qkv.weight" in shapes, strided)


def _fits(blocks: list[_InputBlock], period: int) -> bool:
    levels = [blocks[start:start + period - 1] for start in range(0, len(blocks), period)]
    between = blocks[period - 1::period]
    return (not any(block.strided for level in levels for block in level)
            and all(len({(block.channels_out, block.attention) for block in level}) == 1 for level in levels)
            and all(block.channels_in == block.channels_out for level in levels for block in level[1:])
            and all(block.channels_in == block.channels_out and not block.attention for block in between)
            and len({block.strided for block in between}) <= 1)


def _reading(blocks: list[_InputBlock], period: int, width: int) -> dict[str, Any]:
    tops = blocks[::period]
    between = blocks[period - 1::period]
    return {
        "num_res_blocks": period - 1,
        "channel_mult": tuple(
            top.channels_out / width if top.channels_out % width else top.channels_out // width for top in tops),
        "attention_factors": tuple(2**level for level, top in enumerate(tops) if top.attention),
        **({"resblock_updown": not between[0].strided} if between else {}),
    }


def check_options(state: Mapping[str, Any], options: Mapping[str, Any], path: str | Path) -> None:
    """Compare the flags given for a network with the weights of the file `path`.

    options: those of `create_model`, `sr_create_model_and_diffusion` or `create_classifier`. Raises UserError, one
    sentence that for each mismatch names the flag to pass.
    """
    kind = kind_of(options)
    try:
        found = infer_options(state, None if kind == "upsampler" else options.get("in_channels"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    held = found.pop("kind")
    if held != kind:
        flag = f"{held if held == 'classifier' else 'model'}_path"
        hint = f": pass it as --{flag}" if "classifier" in (held, kind) else ""
        raise UserError(f"{path} is {_KINDS[held]}, not {_KINDS[kind]}{hint}")
    if options.get("null_class") and "num_classes" in found:
        found["num_classes"] -= 1           # the last label stands for none
    flags = _CLASSIFIER_FLAGS if kind == "classifier" else {}
    problems = [*_fact_problems(found, options, flags), *_level_problems(found, options, flags, kind == "upsampler")]
    if problems:
        raise UserError(f"{path} {'; '.join(problems)}")


def _fact_problems(found: Mapping[str, Any], options: Mapping[str, Any], flags: Mapping[str, str]) -> Iterator[str]:
    for name, words in _WORDS.items():
        flag = flags.get(name, name)
        if name not in found or options.get(flag, found[name]) == found[name]:
            continue
        value = found[name]
        if isinstance(value, bool):
            yield f"has {'' if value else 'no '}{words}: pass --{flag} {value}"
        else:
            yield f"has {words.format(value)}: pass --{flag} {value}, not {options[flag]}"


def _level_problems(found: Mapping[str, Any], options: Mapping[str, Any], flags: Mapping[str, str],
                    upsampler: bool) -> Iterator[str]:
    """Mismatches of the channel multipliers, which have defaults by image size, and of the attention in the levels."""
    size_flag, defaults = ("large_size", UPSAMPLER_CHANNEL_MULT) if upsampler else ("image_size", CHANNEL_MULT)
    size = found.get("image_size", options.get(size_flag))
    if "channel_mult" not in found or size is None:
        return
    multipliers, width = found["channel_mult"], found["num_channels"]
    flag = flags.get("channel_mult", "channel_mult")
    given = options.get(flag)
    text = given or defaults.get(size, "")
    if [int(m * width) for m in (parse_channel_mult(text) if text else ())] != [int(m * width) for m in multipliers]:
        shown = ",".join(map(str, multipliers))
        sizes = [s for s, default in defaults.items() if default == shown and not given and "image_size" not in found]
        remedy = f"--{size_flag} {' or '.join(map(str, sizes))}, not {size}" if sizes else f"--{flag} {shown}"
        yield f"has channel multipliers {shown}: pass {remedy}{f', not {given}' if given else ''}"
        size = size if not sizes else sizes[0] if len(sizes) == 1 else None

    flag = flags.get("attention_resolutions", "attention_resolutions")
    if size is None or flag not in options:
        return
    factors = {size // resolution for resolution in parse_resolutions(options[flag]) if 0 < resolution <= size}
    if sorted(factors & {2**level for level in range(len(multipliers))}) != list(found["attention_factors"]):
        shown = ",".join(str(size // factor) for factor in found["attention_factors"])
        where = f"attention at {shown}" if shown else "no attention outside its middle block"
        yield f"has {where}: pass --{flag} {shown or repr('')}, not {options[flag] or repr('')}"
