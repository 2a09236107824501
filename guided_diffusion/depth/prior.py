"""The depth prior: a diffusion model of depth maps, trained by scripts/image_train.py on depth images (2212.08861)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint
from ..build import DiffusionOptions, ModelOptions, build_diffusion, build_model, kind_of
from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from ..late import F, Tensor, torch
from ..options import options_from

if TYPE_CHECKING:
    from ..unet import UNetModel


class DepthPrior:
    """A diffusion model of depth maps (N, 1, h, w) in [-1, 1].

    model: one channel, no classes. diffusion: its whole chain.
    """

    def __init__(self, model: UNetModel, diffusion: GaussianDiffusion) -> None:
        self.model = model
        self.diffusion = diffusion

    @property
    def image_size(self) -> int:
        """Height and width of the maps in pixels."""
        return self.model.image_size

    def eps(self, d_tau: Tensor, tau: Tensor) -> Tensor:
        """The noise (N, 1, h, w) that the network sees in d_tau (N, 1, h, w) at index tau (N,) int64 of the chain."""
        output = self.model(d_tau, self.diffusion.model_timesteps(tau))
        return self.diffusion.interpret(output, d_tau, tau).eps


def as_prior_sees(depth: Tensor, size: int) -> Tensor:
    """Depth (N, 1, h, w) at a prior's size, (N, 1, size, size): bilinear, and antialiased where it shrinks."""
    if depth.shape[2:] == (size, size):
        return depth
    return F.interpolate(depth, (size, size), mode="bilinear", antialias=size < max(depth.shape[2:]))


def load_prior(path: str | Path, device: str | torch.device = "cpu") -> DepthPrior:
    """The prior in a .safetensors file of scripts/image_train.py, frozen, built from the options stored in it.

    Raises UserError for another file, and for a model with three channels or with classes.
    """
    model_options, diffusion_options, flags = prior_options(path)
    with torch.device("meta"):
        model = build_model(model_options)
    checkpoint.load_into(model, path, flags)
    checkpoint.ready(model, device)
    return DepthPrior(model, build_diffusion(diffusion_options))


def prior_options(path: str | Path) -> tuple[ModelOptions, DiffusionOptions, dict[str, Any]]:
    """The options that are stored in a prior's file: of its network, of its chain, and all as they stand there.

    Raises UserError as `load_prior`.
    """
    metadata = checkpoint.read_metadata(path)
    try:
        flags = json.loads(metadata["config"])
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path}: its metadata has no config, the options of a network as scripts/image_train.py "
                        "stores them") from None
    if not isinstance(flags, dict) or kind_of(flags) != "diffusion":
        raise UserError(f"{path}: is not a diffusion model, as a depth prior must be")
    try:
        model_options, diffusion_options = options_from(flags | {"timestep_respacing": ""}, ModelOptions,
                                                        DiffusionOptions)
    except UserError as error:
        raise UserError(f"{path}: its stored options are not those of a diffusion model ({error})") from None
    if model_options.in_channels != 1:
        raise UserError(f"{path}: has {model_options.in_channels} image channels, a depth prior must be trained with "
                        "--in_channels 1")
    if model_options.class_cond:
        raise UserError(f"{path}: is class-conditional, a depth prior must be trained with --class_cond False")
    return model_options, diffusion_options, flags
