"""From options to objects: the typed options of networks, process and guidance, and what is built from them.

The flag names are those of guided-diffusion and the official SAG code, and so are the functions at the end, which
take flags as keywords.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import dist_util
from .capture import HEADS
from .errors import UserError
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from .guidance.degrade import MASKS
from .guidance.perturbed_attention import PerturbedAttentionGuidance
from .guidance.self_attention import SelfAttentionGuidance
from .options import Options, nearest, option, option_fields, parse_bool
from .respace import SpacedDiffusion, space_timesteps
from .sampling import NonFiniteError
from .schedules import SCHEDULES, get_named_beta_schedule
from .unet import (
    CHANNEL_MULT,
    POOLS,
    UPSAMPLER_CHANNEL_MULT,
    EncoderUNetModel,
    SuperResModel,
    UNetModel,
)

NUM_CLASSES = 1000


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The diffusion network, without its size of image."""

    in_channels: int = option(3, "image channels of the network (files hold RGB all the same)", choices=(1, 3))
    num_channels: int = option(128, "base channels, a multiple of 32", minimum=1)
    num_res_blocks: int = option(2, "residual blocks per resolution", minimum=1)
    num_heads: int = option(4, "attention heads; used where num_head_channels is -1", minimum=1)
    num_heads_upsample: int = option(-1, "attention heads of the output blocks; -1: num_heads", minimum=-1)
    num_head_channels: int = option(-1, "channels per attention head; -1: channels / num_heads", minimum=-1)
    attention_resolutions: str = option("16,8", "feature map sizes in pixels that have attention, comma-separated")
    channel_mult: str = option("", "multiples of num_channels per resolution, comma-separated; unset: by image size")
    dropout: float = option(0.0, "dropout probability in training", minimum=0, maximum=1)
    class_cond: bool = option(False, "the network is given class labels")
    num_classes: int = option(NUM_CLASSES, "number of classes", minimum=1)
    use_checkpoint: bool = option(False, "save memory in backward passes by computing activations again")
    use_scale_shift_norm: bool = option(True, "the timestep embedding scales and shifts the norms")
    resblock_updown: bool = option(False, "residual blocks change the resolution, instead of convolutions")
    use_fp16: bool = option(False, "compute the torso of the network in float16")
    use_bf16: bool = option(False, "compute the torso of the network in bfloat16")
    use_new_attention_order: bool = option(False, "queries, keys and values lie in the new order in the file")
    learn_sigma: bool = option(False, "the network also predicts the variance")


@dataclass(frozen=True)
class ModelOptions(NetworkOptions):
    """The diffusion network."""

    image_size: int = option(64, "image height and width in pixels", minimum=1)


@dataclass(frozen=True)
class UpsamplerOptions(NetworkOptions):
    """The upsampling diffusion network."""

    large_size: int = option(256, "height and width of its images in pixels", minimum=1)
    small_size: int = option(64, "height and width of the images it upsamples, in pixels", minimum=1)


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """The diffusion process."""

    learn_sigma: bool = option(False, "the network also predicts the variance")
    sigma_small: bool = option(False, "where the variance is not learned: the smaller of the two fixed ones")
    diffusion_steps: int = option(1000, "steps of the chain that the network is trained on", minimum=1)
    noise_schedule: str = option("linear", "schedule of betas: linear or cosine", choices=SCHEDULES)
    timestep_respacing: str = option("", "steps used: 250, 10,20,30 (per section) or ddim25; unset: all")
    use_kl: bool = option(False, "train on the variational bound")
    predict_xstart: bool = option(False, "the network predicts the image, not the noise")
    predict_v: bool = option(False, "the network predicts the velocity, sqrt(abar) noise - sqrt(1 - abar) image")
    rescale_timesteps: bool = option(False, "the network sees steps scaled to 0..1000")
    rescale_learned_sigmas: bool = option(False, "weigh the bound of the learned variance by steps / 1000")


@dataclass(frozen=True)
class ClassifierOptions(Options):
    """The noise-aware classifier."""

    image_size: int = option(64, "image height and width in pixels", minimum=1)
    in_channels: int = option(3, "image channels of the network (files hold RGB all the same)", choices=(1, 3))
    num_classes: int = option(NUM_CLASSES, "number of classes", minimum=1)
    classifier_use_fp16: bool = option(False, "compute the torso of the classifier in float16")
    classifier_width: int = option(128, "base channels of the classifier, a multiple of 32", minimum=1)
    classifier_depth: int = option(2, "residual blocks per resolution of the classifier", minimum=1)
    classifier_attention_resolutions: str = option("32,16,8", "feature map sizes of the classifier with attention")
    classifier_num_head_channels: int = option(64, "channels per attention head of the classifier", minimum=1)
    classifier_channel_mult: str = option("", "multiples of classifier_width per resolution; unset: by image size")
    classifier_use_scale_shift_norm: bool = option(True, "the timestep embedding scales and shifts the norms")
    classifier_resblock_updown: bool = option(True, "residual blocks change the resolution")
    classifier_pool: str = option("attention", f"how features are pooled: {', '.join(POOLS)}", choices=POOLS)


def build_model(options: ModelOptions | UpsamplerOptions) -> UNetModel:
    """The network that the options describe, with random weights."""
    upsampler = isinstance(options, UpsamplerOptions)
    size = options.large_size if upsampler else options.image_size
    if options.use_fp16 and options.use_bf16:
        raise UserError("--use_fp16 True --use_bf16 True: at most one of them can be True")
    defaults = UPSAMPLER_CHANNEL_MULT if upsampler else CHANNEL_MULT
    multipliers = _channel_mult(options.channel_mult, size, "channel_mult", defaults)
    _check_widths(options.num_channels, multipliers, "num_channels")
    model = (SuperResModel if upsampler else UNetModel)(
        image_size=size, in_channels=options.in_channels, model_channels=options.num_channels,
        out_channels=options.in_channels * (2 if options.learn_sigma else 1), num_res_blocks=options.num_res_blocks,
        attention_resolutions=_downsampling(options.attention_resolutions, size, "attention_resolutions"),
        dropout=options.dropout, channel_mult=multipliers,
        num_classes=options.num_classes if options.class_cond else None, use_checkpoint=options.use_checkpoint,
        num_heads=options.num_heads, num_head_channels=options.num_head_channels,
        num_heads_upsample=options.num_heads_upsample, use_scale_shift_norm=options.use_scale_shift_norm,
        resblock_updown=options.resblock_updown, use_new_attention_order=options.use_new_attention_order)
    if options.use_fp16 or options.use_bf16:
        model.convert_to(torch.float16 if options.use_fp16 else torch.bfloat16)
    return model


def build_diffusion(options: DiffusionOptions) -> SpacedDiffusion:
    """The (respaced) process that the options describe."""
    if options.predict_xstart and options.predict_v:
        raise UserError("--predict_xstart True --predict_v True: at most one of them can be True")
    predicted = (ModelMeanType.START_X if options.predict_xstart
                 else ModelMeanType.VELOCITY if options.predict_v else ModelMeanType.EPSILON)
    betas = get_named_beta_schedule(options.noise_schedule, options.diffusion_steps)
    loss = LossType.RESCALED_MSE if options.rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if options.sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(options.diffusion_steps, options.timestep_respacing or [options.diffusion_steps]),
        betas=betas,
        model_mean_type=predicted,
        model_var_type=ModelVarType.LEARNED_RANGE if options.learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if options.use_kl else loss,
        rescale_timesteps=options.rescale_timesteps)


def build_classifier(options: ClassifierOptions) -> EncoderUNetModel:
    """The classifier that the options describe, with random weights."""
    size = options.image_size
    multipliers = _channel_mult(options.classifier_channel_mult, size, "classifier_channel_mult", CHANNEL_MULT)
    _check_widths(options.classifier_width, multipliers, "classifier_width")
    factors = _downsampling(options.classifier_attention_resolutions, size, "classifier_attention_resolutions")
    _check_heads(options, multipliers, factors)
    return EncoderUNetModel(
        image_size=size, in_channels=options.in_channels, model_channels=options.classifier_width,
        out_channels=options.num_classes, num_res_blocks=options.classifier_depth,
        attention_resolutions=factors, channel_mult=multipliers, use_fp16=options.classifier_use_fp16,
        num_head_channels=options.classifier_num_head_channels,
        use_scale_shift_norm=options.classifier_use_scale_shift_norm,
        resblock_updown=options.classifier_resblock_updown, pool=options.classifier_pool)


def _channel_mult(text: str, size: int, flag: str, defaults: Mapping[int, str]) -> tuple[float, ...]:
    if not text and size not in defaults:
        raise UserError(f"--{flag} must be given for image size {size}, like 1,2,2: there is a default only for "
                        f"sizes {', '.join(map(str, sorted(defaults)))}")
    text = text or defaults[size]
    try:
        multipliers = tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError:
        multipliers = ()
    if not multipliers or min(multipliers) <= 0:
        raise UserError(f"--{flag} {text}: must be positive numbers, comma-separated")
    factor = 2 ** (len(multipliers) - 1)
    if size % factor:
        raise UserError(f"image size {size}: must be a multiple of {factor}, since --{flag} {text} has "
                        f"{len(multipliers)} levels")
    return multipliers


def _check_widths(channels: int, multipliers: Iterable[float], flag: str) -> None:
    for multiplier in multipliers:
        if int(channels * multiplier) % 32 or channels * multiplier < 32:
            raise UserError(f"--{flag} {channels}: times {multiplier} it must be a multiple of 32, for group norms")


def _check_heads(options: ClassifierOptions, multipliers: Sequence[float], factors: Sequence[int]) -> None:
    width = options.classifier_num_head_channels
    for level, multiplier in enumerate(multipliers):
        channels = int(options.classifier_width * multiplier)
        if (2**level in factors or level == len(multipliers) - 1) and channels % width:
            raise UserError(f"--classifier_num_head_channels {width}: must divide the {channels} channels of every "
                            "attention block")


def _downsampling(text: str, size: int, flag: str) -> tuple[int, ...]:
    """Downsampling factors of the feature maps that have attention; maps larger than the image have none."""
    try:
        resolutions = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        resolutions = [0]
    if any(r < 1 or (r <= size and size % r) for r in resolutions):
        raise UserError(f"--{flag} {text}: must be sizes in pixels that divide {size}, comma-separated")
    return tuple(size // r for r in resolutions if r <= size)


@dataclass(frozen=True)
class SagOptions(Options):
    """Self-attention guidance."""

    guide_scale: float = option(1.0, "1 + s, s the scale of self-attention guidance; 1: off")
    guide_start: int | None = option(None, "guided only at respaced steps below this one; unset: at all", minimum=0)
    sel_attn_block: str = option("output", "part of the network whose attention makes the mask",
                                 choices=("input", "middle", "output"))
    sel_attn_depth: int = option(8, "index of the block in that part", minimum=0)
    blur_sigma: float = option(3.0, "standard deviation of the blur in pixels", above=0)
    mask: str = option("self-attention", f"what is blurred: {', '.join(MASKS)}", choices=MASKS)
    threshold: float = option(1.0, "a token is masked if it receives more than this, where 1 is average")
    attention_heads: str = option("exact", "exact, or official: split heads as the official SAG code does",
                                  choices=HEADS)

    def build(self, model: UNetModel) -> SelfAttentionGuidance:
        """The guidance term for `model`."""
        block = "middle" if self.sel_attn_block == "middle" else f"{self.sel_attn_block}.{self.sel_attn_depth}"
        return SelfAttentionGuidance(
            model, block=block, scale=self.guide_scale - 1, blur_sigma=self.blur_sigma, threshold=self.threshold,
            mask=self.mask, heads=self.attention_heads, start=self.guide_start)


@dataclass(frozen=True)
class PagOptions(Options):
    """Perturbed-attention guidance."""

    pag_scale: float = option(0.0, "scale of perturbed-attention guidance; 0: off")
    pag_blocks: str = option("middle", "attention blocks that become the identity, comma-separated, like "
                             "input.8,middle")
    pag_start: int | None = option(None, "guided only at respaced steps below this one; unset: at all", minimum=0)

    def build(self, model: UNetModel) -> PerturbedAttentionGuidance:
        """The guidance term for `model`."""
        blocks = [block.strip() for block in self.pag_blocks.split(",") if block.strip()]
        return PerturbedAttentionGuidance(model, blocks, self.pag_scale, start=self.pag_start)


# The names that users of guided-diffusion know


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of `create_model_and_diffusion` and their defaults."""
    return {**asdict(ModelOptions()), **asdict(DiffusionOptions())}


def classifier_defaults() -> dict[str, Any]:
    """Flags of `create_classifier` and their defaults."""
    return asdict(ClassifierOptions())


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    return {**classifier_defaults(), **asdict(DiffusionOptions())}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    return {**asdict(UpsamplerOptions()), **asdict(DiffusionOptions())}


def sag_defaults() -> dict[str, Any]:
    """Flags of self-attention guidance and their defaults."""
    return asdict(SagOptions())


def options_from(flags: Mapping[str, Any], *classes: type) -> list[Any]:
    """An instance of each options class from flags; raises UserError for a flag that none of them has."""
    names = {field.name for cls in classes for field in option_fields(cls)}
    for name in flags:
        if name not in names:
            raise UserError(f"{name}: no such flag{nearest(name, names)}")
    return [cls(**{f.name: flags[f.name] for f in option_fields(cls) if f.name in flags}) for cls in classes]


def create_model(**flags: Any) -> UNetModel:
    """A UNet from flags; those not given have the defaults of `model_and_diffusion_defaults`."""
    return build_model(*options_from(flags, ModelOptions))


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """A UNet and its process from flags."""
    model, diffusion = options_from(flags, ModelOptions, DiffusionOptions)
    return build_model(model), build_diffusion(diffusion)


def sr_create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """An upsampling UNet and its process from flags."""
    model, diffusion = options_from(flags, UpsamplerOptions, DiffusionOptions)
    return build_model(model), build_diffusion(diffusion)


def create_classifier(**flags: Any) -> EncoderUNetModel:
    """A noise-aware classifier from flags."""
    return build_classifier(*options_from(flags, ClassifierOptions))


def create_classifier_and_diffusion(**flags: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A noise-aware classifier and the process it is trained on, from flags."""
    classifier, diffusion = options_from(flags, ClassifierOptions, DiffusionOptions)
    return build_classifier(classifier), build_diffusion(diffusion)


def create_gaussian_diffusion(*, steps: int = 1000, **flags: Any) -> SpacedDiffusion:
    """A process from flags."""
    return build_diffusion(*options_from({"diffusion_steps": steps, **flags}, DiffusionOptions))


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """One flag for each entry, with its type and default."""
    for name, value in default_dict.items():
        kind = parse_bool if isinstance(value, bool) else str if value is None else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    return {key: getattr(args, key) for key in keys}


def run_script(main: Callable[[], None]) -> None:
    """`main()`; a user's mistake ends the process with one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, NonFiniteError, dist_util.PeerError) as error:
        if not isinstance(error, dist_util.PeerError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist_util.shutdown()        # else its threads may abort the process on its way out
        sys.exit(2)
    except dist_util.LostRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)                 # the usual way out waits for the rank that is gone
