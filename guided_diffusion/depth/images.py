"""Depth images: what scripts/image_train.py trains a depth prior on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..npz import RANGE_KEY, write_batch
from ..options import Options, option, seed_option
from ..pixels import to_rounded_uint8
from ..progress import progress_bar
from .pairs import DepthReader, checked_depth_range, open_pairs
from .ranges import parse_depth_range
from .scenes.files import checked_npz


@dataclass(frozen=True)
class DepthImageOptions(Options):
    """Options that say which depth images to make, and where to."""

    data: str = option("", "pairs: an .npz file (arr_0, depth), a folder with images/ and depth/, or scenes")
    depth_range: str = option("", "depths that become black and white: image (each map's own), or NEAR,FAR in the "
                              "units of the files; unset: image, and of scenes the range of all of them")
    image_size: int = option(32, "height and width of the depth images in pixels", minimum=1)
    num_images: int | None = option(None, "number of images; unset: all that there are", minimum=1)
    seed: int = seed_option("seed of the scenes")
    out: str = option("depth.npz", "file for the images: arr_0 (N, S, S, 3) uint8, the grey in every channel, and "
                      "depth_range")


def grey_images(options: DepthImageOptions) -> np.ndarray:
    """Depth maps as (N, S, S, 3) uint8, near is black: round((d + 1) * 127.5). Raises UserError as `read_pairs`."""
    limits = parse_depth_range(checked_depth_range(options.data, options.depth_range))
    size = options.image_size
    source = open_pairs(options.data, size=size, count=options.num_images, flag="num_images", seed=options.seed)
    count = options.num_images or len(source)
    images = np.empty((count, size, size, 3), np.uint8)
    maps = DepthReader(size, limits)
    with progress_bar(count, "depth images", "image") as progress:
        for index in range(count):
            images[index] = depth_images(maps.read(source, index))
            progress.update()
    maps.report(options.data)
    return images


def depth_images(depth: np.ndarray) -> np.ndarray:
    """(..., H, W, 3) uint8, the grey in every channel, of depth (..., H, W) in [-1, 1]; near is black."""
    return np.repeat(to_rounded_uint8(depth)[..., None], 3, axis=-1)


def write_depth_images(options: DepthImageOptions) -> None:
    """Writes the file, whole or not at all. Raises UserError for data that is wrong, and where it can't be written."""
    out = checked_npz(options.out, options.data)
    depth_range = checked_depth_range(options.data, options.depth_range)
    write_batch(out, {"arr_0": grey_images(options), RANGE_KEY: np.array(depth_range)})
