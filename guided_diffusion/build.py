"""From options to objects: the typed options of networks and process, and what is built from them.

The flag names are those of guided-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from .late import torch
from .options import Options, option
from .respace import SpacedDiffusion, space_timesteps
from .schedules import SCHEDULES, get_named_beta_schedule
from .shapes import CHANNEL_MULT, POOLS, UPSAMPLER_CHANNEL_MULT

if TYPE_CHECKING:
    from .unet import Encoder, EncoderUNetModel, UNetModel

AnyEncoder = TypeVar("AnyEncoder", bound="Encoder")

NUM_CLASSES = 1000

# Far above any network that was trained, and far below what takes all memory before anything can be compared.
MOST_CHANNELS, MOST_BLOCKS, MOST_CLASSES, MOST_PIXELS, MOST_STEPS = 2**13, 100, 10**6, 2**14, 10**5
MOST_WIDTH = 2**16              # channels of a level
MOST_IMAGE_CHANNELS = 8


def in_channels_option() -> Any:
    """The field `in_channels` of networks and of classifiers."""
    return option(3, "image channels of the network; grey (1) is read and written as RGB, other numbers as they are in "
                  ".npz files", minimum=1, maximum=MOST_IMAGE_CHANNELS)


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The diffusion network, without its size of image."""

    in_channels: int = in_channels_option()
    num_channels: int = option(128, "base channels, a multiple of 32", minimum=1, maximum=MOST_CHANNELS)
    num_res_blocks: int = option(2, "residual blocks per resolution", minimum=1, maximum=MOST_BLOCKS)
    num_heads: int = option(4, "attention heads; used where num_head_channels is -1", minimum=1)
    num_heads_upsample: int = option(-1, "attention heads of the output blocks; -1: num_heads", minimum=-1)
    num_head_channels: int = option(-1, "channels per attention head; -1: channels / num_heads", minimum=-1)
    attention_resolutions: str = option("16,8", "feature map sizes in pixels that have attention, comma-separated")
    channel_mult: str = option("", "multiples of num_channels per resolution, comma-separated; unset: by image size")
    dropout: float = option(0.0, "dropout probability in training", minimum=0, maximum=1)
    class_cond: bool = option(False, "the network is given class labels")
    num_classes: int = option(NUM_CLASSES, "number of classes", minimum=1, maximum=MOST_CLASSES)
    null_class: bool = option(False, "the labels have one more, for no class, as training with --label_dropout makes "
                              "it", later=True)
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

    image_size: int = option(64, "image height and width in pixels", minimum=1, maximum=MOST_PIXELS)


@dataclass(frozen=True)
class UpsamplerOptions(NetworkOptions):
    """The upsampling diffusion network."""

    large_size: int = option(256, "height and width of its images in pixels", minimum=1, maximum=MOST_PIXELS)
    small_size: int = option(64, "height and width of the images it upsamples, in pixels", minimum=1,
                             maximum=MOST_PIXELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.small_size > self.large_size:
            raise UserError(f"--small_size {self.small_size}: must be at most --large_size, which is {self.large_size}")

    @property
    def image_size(self) -> int:
        """Height and width of the images that it makes: those of a diffusion network by the same name."""
        return self.large_size


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """The diffusion process."""

    learn_sigma: bool = option(False, "the network also predicts the variance")
    sigma_small: bool = option(False, "where the variance is not learned: the smaller of the two fixed ones")
    diffusion_steps: int = option(1000, "steps of the chain that the network is trained on", minimum=1,
                                  maximum=MOST_STEPS)
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

    image_size: int = option(64, "image height and width in pixels", minimum=1, maximum=MOST_PIXELS)
    in_channels: int = in_channels_option()
    num_classes: int = option(NUM_CLASSES, "number of classes", minimum=1, maximum=MOST_CLASSES)
    classifier_use_fp16: bool = option(False, "compute the torso of the classifier in float16")
    classifier_width: int = option(128, "base channels of the classifier, a multiple of 32", minimum=1,
                                   maximum=MOST_CHANNELS)
    classifier_depth: int = option(2, "residual blocks per resolution of the classifier", minimum=1,
                                   maximum=MOST_BLOCKS)
    classifier_attention_resolutions: str = option("32,16,8", "feature map sizes of the classifier with attention")
    classifier_num_head_channels: int = option(64, "channels per attention head of the classifier", minimum=1)
    classifier_channel_mult: str = option("", "multiples of classifier_width per resolution; unset: by image size")
    classifier_use_scale_shift_norm: bool = option(True, "the timestep embedding scales and shifts the norms")
    classifier_resblock_updown: bool = option(True, "residual blocks change the resolution")
    classifier_pool: str = option("attention", f"how features are pooled: {', '.join(POOLS)}", choices=POOLS)


def kind_of(flags: Mapping[str, object]) -> str:
    """The kind of network that stored flags describe: "diffusion", "upsampler" or "classifier"."""
    if "large_size" in flags:
        return "upsampler"
    return "classifier" if "classifier_width" in flags else "diffusion"


def build_model(options: ModelOptions | UpsamplerOptions) -> UNetModel:
    """The network that the options describe, with random weights. Raises UserError where they do not fit together."""
    from .unet import SuperResModel, UNetModel

    upsamples = isinstance(options, UpsamplerOptions)
    return _build_unet(options, SuperResModel if upsamples else UNetModel, options.image_size,
                       UPSAMPLER_CHANNEL_MULT if upsamples else CHANNEL_MULT)


def _build_unet(options: NetworkOptions, kind: type[UNetModel], size: int, defaults: Mapping[int, str]) -> UNetModel:
    if options.use_fp16 and options.use_bf16:
        raise UserError("--use_fp16 True --use_bf16 True: at most one of them can be True")
    if options.null_class and not options.class_cond:
        raise UserError("--null_class True: needs a network with labels, --class_cond True")
    multipliers = _channel_mult(options.channel_mult, size, "channel_mult", defaults)
    _check_widths(options.num_channels, multipliers, "num_channels")
    factors = _downsampling(options.attention_resolutions, size, len(multipliers), "attention_resolutions")
    make = partial(
        kind,
        image_size=size, in_channels=options.in_channels, model_channels=options.num_channels,
        out_channels=options.in_channels * (2 if options.learn_sigma else 1), num_res_blocks=options.num_res_blocks,
        attention_resolutions=factors, dropout=options.dropout, channel_mult=multipliers,
        num_classes=options.num_classes if options.class_cond else None, null_class=options.null_class,
        use_checkpoint=options.use_checkpoint,
        num_heads=options.num_heads, num_head_channels=options.num_head_channels,
        num_heads_upsample=options.num_heads_upsample, use_scale_shift_norm=options.use_scale_shift_norm,
        resblock_updown=options.resblock_updown, use_new_attention_order=options.use_new_attention_order)
    model = _in_memory(make, f"--num_channels {options.num_channels}")
    if options.use_fp16 or options.use_bf16:
        model.convert_to(torch.float16 if options.use_fp16 else torch.bfloat16)
    return model


def build_diffusion(options: DiffusionOptions) -> SpacedDiffusion:
    """The (respaced) process that the options describe."""
    if options.predict_xstart and options.predict_v:
        raise UserError("--predict_xstart True --predict_v True: at most one of them can be True")
    betas = get_named_beta_schedule(options.noise_schedule, options.diffusion_steps)
    loss = LossType.RESCALED_MSE if options.rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if options.sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(options.diffusion_steps, options.timestep_respacing or [options.diffusion_steps]),
        betas=betas,
        model_mean_type=_predicted(options),
        model_var_type=ModelVarType.LEARNED_RANGE if options.learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if options.use_kl else loss,
        rescale_timesteps=options.rescale_timesteps)


def _predicted(options: DiffusionOptions) -> ModelMeanType:
    if options.predict_xstart:
        return ModelMeanType.START_X
    return ModelMeanType.VELOCITY if options.predict_v else ModelMeanType.EPSILON


def build_classifier(options: ClassifierOptions) -> EncoderUNetModel:
    """The classifier that the options describe, with random weights."""
    from .unet import EncoderUNetModel

    size = options.image_size
    multipliers = _channel_mult(options.classifier_channel_mult, size, "classifier_channel_mult", CHANNEL_MULT)
    _check_widths(options.classifier_width, multipliers, "classifier_width")
    factors = _downsampling(options.classifier_attention_resolutions, size, len(multipliers),
                            "classifier_attention_resolutions")
    _check_heads(options, multipliers, factors)
    make = partial(
        EncoderUNetModel, image_size=size, in_channels=options.in_channels, model_channels=options.classifier_width,
        out_channels=options.num_classes, num_res_blocks=options.classifier_depth,
        attention_resolutions=factors, channel_mult=multipliers,
        num_head_channels=options.classifier_num_head_channels,
        use_scale_shift_norm=options.classifier_use_scale_shift_norm,
        resblock_updown=options.classifier_resblock_updown, pool=options.classifier_pool)
    classifier = _in_memory(make, f"--classifier_width {options.classifier_width}")
    if options.classifier_use_fp16:
        classifier.convert_to(torch.float16)
    return classifier


def _in_memory(make: Callable[[], AnyEncoder], flag: str) -> AnyEncoder:
    """What `make` returns; raises UserError, naming the flag and its value, where memory does not hold it."""
    from .unfilled import Unfilled

    try:
        with Unfilled() if torch.empty(0).is_meta else nullcontext():
            return make()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(f"{flag}: the memory does not hold the weights of such a network, choose a smaller "
                        "one") from None


def parse_channel_mult(text: str) -> tuple[float, ...]:
    """The multipliers in a text like "1,2,2"; none where it is something else."""
    try:
        multipliers = tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError:
        return ()
    return multipliers if all(0 < multiplier < math.inf for multiplier in multipliers) else ()


def parse_resolutions(text: str) -> tuple[int, ...]:
    """The sizes in pixels in a text like "16,8"; (0,) where it is something else."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        return (0,)


def _channel_mult(text: str, size: int, flag: str, defaults: Mapping[int, str]) -> tuple[float, ...]:
    if not text and size not in defaults:
        raise UserError(f"--{flag} must be given for image size {size}, like 1,2,2: there is a default only for "
                        f"sizes {', '.join(map(str, sorted(defaults)))}")
    text = text or defaults[size]
    multipliers = parse_channel_mult(text)
    if not multipliers:
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
        if channels * multiplier > MOST_WIDTH:
            raise UserError(f"--{flag} {channels}: times {multiplier} it must be at most {MOST_WIDTH}")


def _check_heads(options: ClassifierOptions, multipliers: Sequence[float], factors: Sequence[int]) -> None:
    width = options.classifier_num_head_channels
    for level, multiplier in enumerate(multipliers):
        channels = int(options.classifier_width * multiplier)
        if (2**level in factors or level == len(multipliers) - 1) and channels % width:
            raise UserError(f"--classifier_num_head_channels {width}: must divide the {channels} channels of every "
                            "attention block")


def map_sizes(size: int, levels: int) -> list[int]:
    """The sizes in pixels of the feature maps of a network with so many levels, for images of `size` pixels."""
    return [size // 2**level for level in range(levels)]


def _downsampling(text: str, size: int, levels: int, flag: str) -> tuple[int, ...]:
    """Downsampling factors of the feature maps that have attention; of several sizes, those above the image have none.

    Raises UserError for a size that none of the maps of the network's levels has, and that would have no effect.
    """
    resolutions = parse_resolutions(text)
    sizes = map_sizes(size, levels)
    there = f"there are feature maps of {', '.join(map(str, sizes))}"
    if any(r < 1 or (r <= size and size % r) for r in resolutions):
        raise UserError(f"--{flag} {text}: must be sizes in pixels that divide {size}, comma-separated: {there}")
    found = [r for r in resolutions if r <= size]
    for resolution in found or resolutions:
        if resolution not in sizes:
            raise UserError(f"--{flag} {text}: no feature map has {resolution} pixels, {there}")
    return tuple(size // r for r in found)
