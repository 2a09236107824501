"""Pictures of samples: a grid, and rows of the same images under several settings."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import write

LOG = logging.getLogger(__name__)

MARGIN = 12
CAPTION = 16            # pixels that a line below an image takes
LETTERS = 10            # without a shape, that are named


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture (H', W', 3) uint8 of images (N, H, W, 3) uint8: rows of `columns`, `gap` pixels apart, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[top:top + height, left:left + width] = image
    return canvas


def save_grid(images: np.ndarray, path: str | Path, columns: int | None = None) -> None:
    """Writes images (N, H, W, C) uint8 as a grid, small ones enlarged, to a PNG file.

    Of more than three channels the first three are shown as RGB, of two the first as grey. columns: None for a nearly
    square grid.
    """
    images = images[..., :3] if images.shape[3] >= 3 else images[..., :1].repeat(3, axis=3)
    columns = columns or max(1, round(len(images) ** 0.5))
    save(_enlarged(grid(images, columns), images.shape[1]), Path(path))


def distinct_names(names: Iterable[tuple[str, str]]) -> list[str]:
    """What is shown under short names, each given with its long one, which has the path: all different.

    The long one stands where a short one is there twice, and a number after it where that is there twice as well.
    """
    short, long = zip(*names, strict=True)
    chosen = [name if short.count(name) == 1 else path for name, path in zip(short, long, strict=True)]
    before = [chosen[:place].count(name) for place, name in enumerate(chosen)]
    return [f"{name} (again {again + 1})" if again else name for name, again in zip(chosen, before, strict=True)]


def save_comparison(rows: Mapping[str, np.ndarray], path: str | Path, columns: int = 10, zoom: int | None = None,
                    captions: Sequence[str] | None = None) -> None:
    """Writes blocks of images under their titles, one below the other, to a PNG file.

    rows: title -> (N, H, W, 3) uint8, the same N for all; image i has the same place in every block. zoom: times that a
    pixel is enlarged; None: small images are. captions: N texts, which stand below the images as far as they fit. Logs
    where they do not, and where the font lacks letters.
    """
    _tell_unreadable(path, [*rows, *(captions or ())])
    longest, (height, width) = _longest(captions or ()), next(iter(rows.values())).shape[1:3]
    if longest > width * _factor(height, zoom):
        LOG.warning("%s: texts below the images are cut where they end in …; --zoom %d shows them whole", path,
                    math.ceil(longest / width))
    font = ImageFont.load_default(size=18)
    blocks = [(title, _block(images, columns, zoom, captions)) for title, images in rows.items()]
    width = max(max(block.width, math.ceil(font.getlength(title)) + 4) for title, block in blocks) + 2 * MARGIN
    height = sum(block.height + 24 + MARGIN for _, block in blocks) + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for title, block in blocks:
        draw.text((MARGIN + 2, top), title, fill="black", font=font)
        canvas.paste(block, (MARGIN, top + 24))
        top += block.height + 24 + MARGIN
    save(canvas, Path(path))


def _block(images: np.ndarray, columns: int, zoom: int | None, captions: Sequence[str] | None) -> Image.Image:
    """A grid of images, with room for the captions below each of its rows where there are any."""
    size, cell = images.shape[1], images.shape[2] + 2
    if captions is None:
        return _enlarged(grid(images, columns), size, zoom)
    rows = [_enlarged(grid(images[start:start + columns], columns), size, zoom)
            for start in range(0, len(images), columns)]
    height = rows[0].height + CAPTION
    block = Image.new("RGB", (rows[0].width, height * len(rows)), "white")
    draw, font, factor = ImageDraw.Draw(block), _caption_font(), _factor(size, zoom)
    for i, row in enumerate(rows):
        block.paste(row, (0, i * height))
        for column, caption in enumerate(captions[i * columns:(i + 1) * columns]):
            place = factor * (column * cell + 2), i * height + row.height - 2 * factor
            draw.text(place, _cut(caption, factor * images.shape[2]), fill="black", font=font)
    return block


def _cut(caption: str, width: int) -> str:
    """The caption as far as `width` pixels hold it, with a mark where it was cut."""
    if _longest([caption]) <= width:
        return caption
    while caption and _longest([f"{caption}…"]) > width:
        caption = caption[:-1]
    return f"{caption}…"


def _longest(captions: Sequence[str]) -> float:
    """How many pixels the longest caption takes."""
    return max(map(_caption_font().getlength, captions), default=0)


@functools.cache
def _caption_font() -> Any:
    return ImageFont.load_default(size=CAPTION - 4)


def _tell_unreadable(path: str | Path, texts: Iterable[str]) -> None:
    """Logs which letters of the texts the font has no shape for."""
    font = _caption_font()
    box = bytes(font.getmask("\uffff"))         # which is no letter of any font
    letters = [letter for letter in dict.fromkeys("".join(texts)) if bytes(font.getmask(letter)) == box]
    if letters:
        LOG.warning("%s: boxes stand for letters that the font of pictures lacks: %s", path,
                    " ".join(letters[:LETTERS]) + " …" * (len(letters) > LETTERS))


def _factor(image_size: int, zoom: int | None) -> int:
    """How many times a pixel is enlarged."""
    return zoom or max(1, 64 // image_size)


def _enlarged(canvas: np.ndarray, image_size: int, zoom: int | None = None) -> Image.Image:
    factor = _factor(image_size, zoom)
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save(picture: Image.Image, path: Path) -> None:
    """Writes `picture` as PNG, whole or not at all, and makes its folder. Raises UserError where it cannot."""
    write(path, lambda file: picture.save(file, format="PNG"), parents=True)
