"""The names that users of guided-diffusion know: functions that take flags as keywords, on top of `build`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .build import (
    NUM_CLASSES,
    ClassifierOptions,
    DiffusionOptions,
    ModelOptions,
    UpsamplerOptions,
    build_classifier,
    build_diffusion,
    build_model,
)
from .errors import UserError
from .guidance import ClassifierGuidanceOptions, SagOptions
from .options import option_fields, options_from, parse_bool
from .respace import SpacedDiffusion
from .unet import EncoderUNetModel, UNetModel

__all__ = [
    "NUM_CLASSES", "add_dict_to_argparser", "args_to_dict", "classifier_and_diffusion_defaults", "classifier_defaults",
    "create_classifier", "create_classifier_and_diffusion", "create_gaussian_diffusion", "create_model",
    "create_model_and_diffusion", "diffusion_defaults", "model_and_diffusion_defaults", "sag_defaults",
    "sr_create_model", "sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults", "str2bool",
]

str2bool = parse_bool


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of `create_model_and_diffusion` and their defaults."""
    return {**asdict(ModelOptions()), **asdict(DiffusionOptions())}


def diffusion_defaults() -> dict[str, Any]:
    """Flags of `create_gaussian_diffusion` and their defaults."""
    return asdict(DiffusionOptions())


def classifier_defaults() -> dict[str, Any]:
    """Flags of `create_classifier` and their defaults."""
    return asdict(ClassifierOptions())


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of `create_classifier_and_diffusion` and their defaults."""
    return {**classifier_defaults(), **asdict(DiffusionOptions())}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of `sr_create_model_and_diffusion` and their defaults."""
    return {**asdict(UpsamplerOptions()), **asdict(DiffusionOptions())}


def sag_defaults() -> dict[str, Any]:
    """Flags of self-attention guidance and their defaults, and the one that the official function has beside them."""
    return {**asdict(SagOptions()), **dict.fromkeys(ClassifierGuidanceOptions.switched_on, False)}


# What the official functions take by position, in their order.
_SHARED = ("attention_resolutions", "num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm",
           "dropout", "resblock_updown", "use_fp16")
ARGUMENTS = ("image_size", "num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "class_cond",
             "use_checkpoint", *_SHARED, "use_new_attention_order")
SR_ARGUMENTS = ("large_size", "small_size", "num_channels", "num_res_blocks", "learn_sigma", "class_cond",
                "use_checkpoint", *_SHARED)
CLASSIFIER_ARGUMENTS = ("image_size", "classifier_use_fp16", "classifier_width", "classifier_depth",
                        "classifier_attention_resolutions", "classifier_use_scale_shift_norm",
                        "classifier_resblock_updown", "classifier_pool")


def create_model(*arguments: Any, **flags: Any) -> UNetModel:
    """A UNet from flags, which may also be given by position as the official function takes them.

    Those not given have the defaults of `model_and_diffusion_defaults`, which are those of the commands: there are four
    heads, scale and shift in the norms and attention at 16 and 8, where the official function, called by itself, has
    one head, neither, and attention at 16.
    """
    return build_model(*options_from(_named(ARGUMENTS, arguments, flags), ModelOptions))


def sr_create_model(*arguments: Any, **flags: Any) -> UNetModel:
    """An upsampling UNet from flags, as `create_model`, with the defaults of `sr_model_and_diffusion_defaults`."""
    return build_model(*options_from(_named(SR_ARGUMENTS, arguments, flags), UpsamplerOptions))


def _named(names: Sequence[str], arguments: Sequence[Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by name; raises UserError for more arguments than names, and for one that is given twice."""
    if len(arguments) > len(names):
        raise UserError(f"{len(arguments)} arguments by position: there are {len(names)}, {', '.join(names)}")
    by_place = dict(zip(names, arguments, strict=False))
    if twice := by_place.keys() & flags.keys():
        raise UserError(f"{min(twice)}: is given by position and by name")
    return {**by_place, **flags}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """A UNet and its process from flags."""
    model, diffusion = options_from(flags, ModelOptions, DiffusionOptions)
    return build_model(model), build_diffusion(diffusion)


def sr_create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """An upsampling UNet and its process from flags."""
    model, diffusion = options_from(flags, UpsamplerOptions, DiffusionOptions)
    return build_model(model), build_diffusion(diffusion)


def create_classifier(*arguments: Any, **flags: Any) -> EncoderUNetModel:
    """A noise-aware classifier from flags, which may also be given by position as the official function takes them."""
    return build_classifier(*options_from(_named(CLASSIFIER_ARGUMENTS, arguments, flags), ClassifierOptions))


def create_classifier_and_diffusion(**flags: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A noise-aware classifier and the process it is trained on, from flags."""
    classifier, diffusion = options_from(flags, ClassifierOptions, DiffusionOptions)
    return build_classifier(classifier), build_diffusion(diffusion)


def create_gaussian_diffusion(*, steps: int = 1000, **flags: Any) -> SpacedDiffusion:
    """A process from flags."""
    return build_diffusion(*options_from({"diffusion_steps": steps, **flags}, DiffusionOptions))


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """One flag for each entry, with its type and default; None is of the type of the option of that name, else text."""
    unset = {field.name: field.type for field in option_fields(SagOptions) if field.optional}
    for name, value in default_dict.items():
        kind = parse_bool if isinstance(value, bool) else unset.get(name, str) if value is None else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The parsed values of the flags `keys`."""
    return {key: getattr(args, key) for key in keys}
