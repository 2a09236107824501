"""Depth images: what scripts/image_train.py trains a depth prior on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..options import Options, option
from .pairs import checked_depth_range, open_pairs, parse_depth_range, read_depth
from .scene_files import checked_npz, save_npz


@dataclass(frozen=True)
class DepthImageOptions(Options):
    """The depth images."""

    data: str = option("", "pairs: an .npz file (arr_0, depth), a folder with images/ and depth/, or scenes")
    depth_range: str = option("", "depths that become black and white: image (each map's own), or NEAR,FAR in the "
                              "units of the files; unset: image, and of scenes the range of all of them")
    image_size: int = option(32, "height and width of the depth images in pixels", minimum=1)
    num_images: int | None = option(None, "number of images; unset: all that there are", minimum=1)
    seed: int = option(0, "seed of the scenes", minimum=0)
    out: str = option("depth.npz", "file for the images: arr_0 (N, S, S, 3) uint8, the grey in every channel")


def grey_images(options: DepthImageOptions) -> np.ndarray:
    """Depth maps as (N, S, S, 3) uint8, near is black: round((d + 1) * 127.5). Raises UserError as `read_pairs`."""
    limits = parse_depth_range(checked_depth_range(options.data, options.depth_range))
    size = options.image_size
    source = open_pairs(options.data, size=size, count=options.num_images, flag="num_images", seed=options.seed)
    count = options.num_images or len(source)
    images = np.empty((count, size, size, 3), np.uint8)
    for index in tqdm(range(count), desc="depth images", unit="img", dynamic_ncols=True,
                      mininterval=0.5 if sys.stderr.isatty() else 10):
        depth = read_depth(source, index, size, limits)
        images[index] = np.rint((depth + 1) * 127.5).astype(np.uint8)[..., None]
    return images


def write_depth_images(options: DepthImageOptions) -> None:
    """Writes the file, whole or not at all. Raises UserError for data that is wrong, and where it can't be written."""
    out = checked_npz(options.out)
    save_npz(out, arr_0=grey_images(options))
