"""Checkpoints: safe loading and saving, what their weights show of the network, and the models known by name.

A checkpoint is a flat mapping of parameter names to tensors, in a safetensors file or one of `torch.save`, on this
machine or at an address, which is fetched once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import UserError
from .fetch import local
from .options import nearest
from .unet import CHANNEL_MULT, UPSAMPLER_CHANNEL_MULT

MODELS = Path(__file__).parent / "models"
_LARGEST_HEADER = 100_000_000          # bytes; the limit of the safetensors format


def locate(path: str | Path) -> str | Path:
    """Where a checkpoint is on this machine: a path as it is, an address (see `fetch.local`) in the cache.

    Raises UserError where it cannot be fetched, or what came is no checkpoint.
    """
    return local(path, check=damage)


def damage(path: Path) -> str | None:
    """Why a file is no whole checkpoint, as far as that shows without its tensors, in words that follow its name."""
    try:
        if _format(path) == "zip" and not zipfile.is_zipfile(path):
            return "is truncated or damaged"
        read_metadata(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def load_state_dict(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on `device`; the format is told by the content, not by the suffix.

    path: a file, or an address as `locate` takes it.

    Nothing but plain tensors is ever unpickled, and where the format allows it, the file is mapped, not read: on a
    CPU its tensors take memory when they are touched. Raises UserError, one sentence that names the file, where it
    can't be read, is truncated, is no checkpoint, or holds something else than tensors by name.
    """
    path = locate(path)
    format = _format(path)
    state = _load_safetensors(path) if format == "safetensors" else _load_pickled(path, mappable=format == "zip")
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: must hold tensors by name, not one {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: must hold tensors by name, but its entry {name!r} is a {type(value).__name__}")
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return {name: value.detach().to(device) for name, value in state.items()}


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint: safetensors where `path` ends in .safetensors, `torch.save` where it ends in .pt or .pth.

    The file appears whole or not at all. Only safetensors files keep `metadata`. Raises UserError for another
    suffix, for metadata in a .pt file, and where the file can't be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"{path}: the name of a checkpoint must end in .safetensors, .pt or .pth")
    if metadata and path.suffix != ".safetensors":
        raise UserError(f"{path}: metadata is kept in .safetensors files only")
    tensors = _separate(tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata=dict(metadata or {}))
        else:
            torch.save(tensors, temporary)
        temporary.chmod(mode)       # safetensors makes its files private
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; {} for a file of `torch.save`. Raises UserError."""
    path = locate(path)
    if _format(path) != "safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        raise UserError(f"{path}: is truncated or damaged") from None


def _format(path: str | Path) -> str:
    """One of "safetensors", "zip" (what `torch.save` writes) and "pickle" (what it wrote before PyTorch 1.6)."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a checkpoint file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise UserError(f"{path}: is no checkpoint, neither of safetensors nor of torch.save")


def _load_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError:
        raise UserError(f"{path}: is truncated or damaged") from None


def _load_pickled(path: str | Path, mappable: bool) -> Any:
    # torch.load maps only a file that it is given by name, and believes a name that ends in .safetensors.
    mapped = mappable and Path(path).suffix != ".safetensors"
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what torch warns of here ends in one of the sentences below
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:          # a damaged pickle makes the unpickler fail in any way there is
        foreign = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if foreign:
            raise UserError(f"{path}: holds foreign objects ({foreign[1] or foreign[2]}), and only plain tensors are "
                            "loaded") from None
        raise UserError(f"{path}: is truncated, damaged or no checkpoint of plain tensors") from None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory and view no larger tensor, which would be saved with them."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


# What the weights show

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


def infer_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights of an ADM network show of its options; `state` maps names to tensors or to shapes.

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
        found = _infer_ends(shapes)
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


def _infer_ends(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the first and the last layer show."""
    taken = shapes["input_blocks.0.0.weight"][1]
    if not any(name.startswith("output_blocks.") for name in shapes):
        return {"kind": "classifier", "in_channels": taken, **_infer_pool(shapes)}
    predicted = shapes["out.2.weight"][0]
    upsampler = taken % 2 == 0          # images have 1 or 3 channels, and an upsampler takes two of them
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

    options: those of `create_model`, `sr_create_model_and_diffusion` or `create_classifier`, told apart by large_size
    and num_channels. Raises UserError, one sentence that for each mismatch names the flag to pass.
    """
    expected = "upsampler" if "large_size" in options else "diffusion" if "num_channels" in options else "classifier"
    try:
        found = infer_options(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    kind = found.pop("kind")
    if kind != expected:
        flag = "classifier_path" if kind == "classifier" else "model_path"
        hint = f": pass it as --{flag}" if "classifier" in (kind, expected) else ""
        raise UserError(f"{path} is {_KINDS[kind]}, not {_KINDS[expected]}{hint}")
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
    if [int(float(part) * width) for part in text.split(",") if part] != [int(m * width) for m in multipliers]:
        shown = ",".join(map(str, multipliers))
        sizes = [s for s, default in defaults.items() if default == shown and not given and "image_size" not in found]
        remedy = f"--{size_flag} {' or '.join(map(str, sizes))}, not {size}" if sizes else f"--{flag} {shown}"
        yield f"has channel multipliers {shown}: pass {remedy}{f', not {given}' if given else ''}"
        size = size if not sizes else sizes[0] if len(sizes) == 1 else None

    flag = flags.get("attention_resolutions", "attention_resolutions")
    if size is None or flag not in options:
        return
    resolutions = [int(part) for part in options[flag].split(",") if part]
    factors = {size // resolution for resolution in resolutions if resolution <= size}
    if sorted(factors & {2**level for level in range(len(multipliers))}) != list(found["attention_factors"]):
        shown = ",".join(str(size // factor) for factor in found["attention_factors"])
        where = f"attention at {shown}" if shown else "no attention outside its middle block"
        yield f"has {where}: pass --{flag} {shown or repr('')}, not {options[flag] or repr('')}"


def load_into(model: nn.Module, path: str | Path, options: Mapping[str, Any]) -> None:
    """Load the checkpoint `path` into `model`, built from `options`, in the types and on the devices it has.

    path: a file, or an address as `locate` takes it.

    Raises UserError as `load_state_dict` and `check_options` do, and where any weight is still missing, left over or
    of another shape; the model is then as it was.
    """
    path = locate(path)
    state = load_state_dict(path)
    check_options(state, options, path)
    own = model.state_dict()
    misfits = [f"{name} is missing" for name in own.keys() - state.keys()]
    misfits += [f"{name} is not in the network" for name in state.keys() - own.keys()]
    misfits += [f"{name} is {_size(state[name])}, not {_size(own[name])}" for name in own.keys() & state.keys()
                if state[name].shape != own[name].shape]
    if misfits:
        named = ", ".join(sorted(misfits)[:3])
        raise UserError(f"{path} does not fit the network in {len(misfits)} of its weights: {named}"
                        + (", ..." if len(misfits) > 3 else ""))
    model.load_state_dict(state)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


# Models known by name

@dataclass(frozen=True)
class Preset:
    """A model known by name: one that is shipped, or a released checkpoint."""

    name: str
    kind: str                       # "diffusion", "upsampler" or "classifier"
    options: dict[str, Any]         # flags that differ from the defaults
    sag: dict[str, Any]             # flags of self-attention guidance that suit it, without the scale
    depth: dict[str, str]           # flags of depth-aware guidance: the files that are shipped for it
    path: Path | None               # its file; None for a released checkpoint, which the user has to name
    classifier: str | None          # name of the classifier that guides it
    url: str | None = None          # where a released checkpoint lies
    parameters: int | None = None   # numbers in a released checkpoint
    licence: str | None = None      # of a released checkpoint, and where to read it


def preset_names() -> list[str]:
    """Every name that `find_preset` knows: shipped models first."""
    return [path.stem for path in sorted(MODELS.glob("*.safetensors"))] + released_names()


def released_names() -> list[str]:
    return list(_presets()["presets"])


def find_preset(name: str) -> Preset:
    """The model of that name; raises UserError that lists the names there are.

    A shipped model is a file NAME.safetensors in the package folder models/, its options in the metadata as JSON
    under "config"; its classifier, where there is one, is the model NAME_classifier, its depth predictor the file
    NAME.safetensors in models/depth/, and its prior of depth maps the model NAME_depth.
    """
    names = preset_names()
    if name not in names:
        raise UserError(f"--model {name}: no such model{nearest(name, names)}, there are {', '.join(names)}")
    known = _presets()
    sag = known["sag"].get(name, {})
    path = MODELS / f"{name}.safetensors"
    if path.is_file():
        classifier = f"{name}_classifier"
        metadata = read_metadata(path)
        try:
            options = json.loads(metadata["config"])
        except (KeyError, ValueError):
            raise UserError(f"{path}: its metadata has no config, the options of the network in JSON") from None
        kind = "classifier" if name.endswith("_classifier") else "upsampler" if "large_size" in options else "diffusion"
        depth = {"depth_predictor": MODELS / "depth" / path.name, "depth_prior": MODELS / f"{name}_depth.safetensors"}
        depth = {flag: str(file) for flag, file in depth.items() if file.is_file()}
        return Preset(name, kind, options, sag, depth, path, classifier if classifier in names else None)
    return Preset(name=name, path=None, sag=sag, depth={}, url=f"{known['url']}{name}.pt",
                  licence=known["licence"], **{"classifier": None, **known["presets"][name]})


def _presets() -> dict[str, Any]:
    return yaml.safe_load((MODELS / "presets.yaml").read_text())
