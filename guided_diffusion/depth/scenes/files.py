"""Files of rendered scenes: images, classes, depth maps and object masks in one .npz."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...cores import on_all_cores
from ...errors import UserError
from ...files import check_ending, check_writable
from ...npz import write_batch
from ...options import Options, option, seed_option
from ...pictures import grid, save
from ..ranges import to_fraction
from .renderer import FAR, NEAR, Scenes, render

CHUNK = 128
MOST_SCENES, LARGEST = 10**6, 1024       # all are in memory
SHEET_COLUMNS, SHEET_ROWS = 16, 3
_MASK_COLOURS = np.array([[40, 40, 40], [240, 200, 60], [90, 160, 230], [120, 200, 120], [220, 120, 160]], np.uint8)


@dataclass(frozen=True)
class SceneOptions(Options):
    """Options that say which scenes to render, and where to."""

    num_images: int = option(10000, "number of scenes", minimum=1, maximum=MOST_SCENES)
    start: int = option(0, "number of the first scene", minimum=0)
    seed: int = seed_option("seed: scene i of a seed is always the same")
    image_size: int = option(32, "height and width in pixels", minimum=8, maximum=LARGEST)
    out: str = option("scenes.npz", "file for the scenes: arr_0 RGB, arr_1 classes, depth in metres, mask")
    sheet: str = option("", "also draw a contact sheet of the first scenes to this file (PNG)")


def render_scenes(seed: int, scene_ids: range, size: int) -> Scenes:
    """Renders scenes as `render` does, on all cores, and shows the progress."""
    pieces = [scene_ids[start:start + CHUNK] for start in range(0, len(scene_ids), CHUNK)]
    parts = on_all_cores(partial(render, seed, size=size), pieces, "rendering", "scene")
    return Scenes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def write_scenes(options: SceneOptions) -> None:
    """Renders the scenes and writes their file and, if wanted, the contact sheet.

    Raises UserError, before anything is rendered, where the file cannot be written.
    """
    out = checked_npz(options.out)
    if options.sheet:
        check_ending("--sheet", options.sheet, ".png")
        check_writable("--sheet", options.sheet, parents=True)
    scenes = render_scenes(options.seed, range(options.start, options.start + options.num_images), options.image_size)
    write_batch(out, {"arr_0": scenes.rgb, "arr_1": scenes.label, "depth": scenes.depth, "mask": scenes.mask})
    if options.sheet:
        save(contact_sheet(scenes), Path(options.sheet))


def checked_npz(out: str, data: str = "") -> Path:
    """Returns the path of an .npz file to write, and makes its folder; data: the file that it is made from, if any.

    Raises UserError for another suffix, where the file cannot be written, and for the data itself.
    """
    path = Path(out)
    if path.suffix != ".npz":
        raise UserError(f"--out {out}: the name must end in .npz")
    if data and path.resolve() == Path(data).resolve():
        raise UserError(f"--out {out}: is --data itself, which would be lost; name another file")
    check_writable("--out", path, parents=True)
    return path


def contact_sheet(scenes: Scenes) -> Image.Image:
    """The first scenes, in each row of the sheet their images, depth maps (near is bright) and masks."""
    blocks = []
    for row in range(min(SHEET_ROWS, -(-len(scenes.rgb) // SHEET_COLUMNS))):
        part = slice(row * SHEET_COLUMNS, (row + 1) * SHEET_COLUMNS)
        near = 1 - to_fraction(scenes.depth[part], NEAR, FAR)
        depth = np.repeat((near * 255).astype(np.uint8)[..., None], 3, axis=3)
        masks = _MASK_COLOURS[scenes.mask[part]]
        blocks += [grid(pictures, SHEET_COLUMNS) for pictures in (scenes.rgb[part], depth, masks)]
    sheet = Image.fromarray(np.concatenate(blocks))
    factor = max(1, 64 // scenes.rgb.shape[1])
    return sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
