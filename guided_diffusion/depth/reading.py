"""Depth images by a predictor: what a depth prior may be trained on in place of exact depth.

Depth prior guidance (Kim et al., 2212.08861) shows its prior the depth that the strong predictor reads at x_t, while
the prior was trained on depth maps. A prior that is trained on these images knows what the predictor can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import checkpoint, dist_util
from ..build import DiffusionOptions, ModelOptions
from ..errors import UserError
from ..late import Tensor, torch
from ..npz import RANGE_KEY, write_batch
from ..options import Options, entry_option, option, seed_option
from ..progress import progress_bar
from ..rng import stream_generator
from .images import depth_images
from .pairs import Pairs, Source, open_pairs, read_pixels
from .prior import as_prior_sees
from .scenes.files import checked_npz
from .train import Network, PredictorOptions, features_at, load_network

if TYPE_CHECKING:
    from .predictor import DepthPredictor

AT_ONCE = 250          # images


@dataclass(frozen=True)
class DepthReadingOptions(Options):
    """Options that say which depth is read, and where it is written to."""

    model: str = option("", "a diffusion model by name: a bundled one, or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors")
    checkpoint_entry: str = entry_option()
    depth_predictor: str = option("", "depth predictors of the network, as scripts/depth_train.py writes them; bundled "
                                  "models have theirs")
    branch: str = option("strong", "the predictor that reads")
    data: str = option("", "pairs, of which the images are read: an .npz file (arr_0, depth), a folder with images/ "
                       "and depth/, or scenes")
    num_images: int | None = option(None, "number of images; unset: all that there are", minimum=1)
    map_size: int = option(32, "height and width of the depth images in pixels: those of the prior", minimum=1)
    below_step: int | None = option(None, "noised only at steps of the whole chain below this one; unset: at any",
                                    minimum=1)
    seed: int = seed_option("seed of the steps and of the noise, and of the scenes")
    out: str = option("depth.npz", "file for the images: arr_0 (N, S, S, 3) uint8, the grey in every channel, and "
                      "depth_range")


def write_read_depth(options: DepthReadingOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
                     ) -> float:
    """Writes the file, whole or not at all; returns the share of its pixels that were beyond -1 or 1, and clamped.

    Image i is noised once, at a step that is uniform over the chain; step and noise depend on the seed and i alone. The
    depth that is read there is resized as for the prior. Raises UserError for what is wrong with options and files.
    """
    out = checked_npz(options.out, options.data)
    network, predictor = reading_networks(options, model_options, diffusion_options)
    source = open_pairs(options.data, size=network.model.image_size, count=options.num_images, flag="num_images",
                        seed=options.seed)
    count, size, beyond = options.num_images or len(source), options.map_size, 0
    images = np.empty((count, size, size, 3), np.uint8)
    with progress_bar(count, "depth images", "image") as progress:
        for start in range(0, count, AT_ONCE):
            stop = min(start + AT_ONCE, count)
            maps, t = _noised_features(network, predictor.blocks, source, range(start, stop), options)
            with torch.no_grad():
                depth = as_prior_sees(predictor(maps, t), size)[:, 0].cpu().numpy()
            beyond += int((abs(depth) > 1).sum())
            images[start:stop] = depth_images(depth.clip(-1, 1))
            progress.update(stop - start)
    depth_range = checkpoint.read_metadata(options.depth_predictor)[RANGE_KEY]
    write_batch(out, {"arr_0": images, RANGE_KEY: np.array(depth_range)})
    return beyond / (count * size * size)


def reading_networks(options: DepthReadingOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
                     ) -> tuple[Network, DepthPredictor]:
    """The network, and the predictor that reads its features; raises UserError where they do not fit."""
    from .predictor import check_entry, check_fits, load_predictors

    if not options.depth_predictor:
        raise UserError("--depth_predictor is not given: scripts/depth_train.py makes a file of depth predictors")
    network = load_network(PredictorOptions(model=options.model, model_path=options.model_path,
                                            checkpoint_entry=options.checkpoint_entry), model_options,
                           diffusion_options)
    if network.model.num_classes is not None:
        raise UserError(f"--model_path {options.model_path}: has classes; depth images are made with networks that "
                        "have none")
    steps = network.diffusion.num_timesteps
    if options.below_step is not None and options.below_step > steps:
        raise UserError(f"--below_step {options.below_step}: must be at most {steps}, the length of the chain")
    predictors = load_predictors(checkpoint.locate(options.depth_predictor), dist_util.dev())
    check_fits(predictors, network.model, network.sha256)
    check_entry(options.depth_predictor, options.model_path, options.checkpoint_entry,
                f"--depth_predictor {options.depth_predictor}: was")
    if options.branch not in predictors.branches:
        raise UserError(f"--branch {options.branch}: must be one of {', '.join(predictors.branches)}, the branches in "
                        f"{options.depth_predictor}")
    return network, predictors.branches[options.branch]


def _noised_features(network: Network, blocks: Sequence[str], source: Source, indices: range,
                     options: DepthReadingOptions) -> tuple[dict[str, Tensor], Tensor]:
    """Maps by block of images by their indices, each noised once, and their steps (N,) as the network sees them."""
    model = network.model
    images = np.stack([read_pixels(source, index, model.image_size, model.in_channels) for index in indices])
    generators = [stream_generator("depth reading", options.seed, index) for index in indices]
    end = options.below_step or network.diffusion.num_timesteps
    t = torch.tensor([int(generator.integers(end)) for generator in generators])
    noise = np.stack([generator.standard_normal(images.shape[1:], np.float32) for generator in generators])
    pairs = Pairs(torch.from_numpy(images), torch.empty(0), None)
    return features_at(network, pairs, blocks, np.arange(len(indices)), t, torch.from_numpy(noise))
