"""Pictures of samples: a grid, and rows of the same images under several settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import write

MARGIN = 12


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture (H', W', 3) uint8 of images (N, H, W, 3) uint8: rows of `columns`, `gap` pixels apart, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[top:top + height, left:left + width] = image
    return canvas


def save_grid(images: np.ndarray, path: str | Path) -> None:
    """Writes images (N, H, W, 3) uint8 as a nearly square grid, small ones enlarged, to a PNG file."""
    columns = max(1, round(len(images) ** 0.5))
    save(_enlarged(grid(images, columns), images.shape[1]), Path(path))


def save_comparison(rows: Mapping[str, np.ndarray], path: str | Path, columns: int = 10) -> None:
    """Writes blocks of images under their titles, one below the other, to a PNG file.

    rows: title -> (N, H, W, 3) uint8, the same N for all; image i has the same place in every block.
    """
    font = ImageFont.load_default(size=18)
    blocks = [(title, _enlarged(grid(images, columns), images.shape[1])) for title, images in rows.items()]
    width = max(max(block.width, int(font.getlength(title)) + 4) for title, block in blocks) + 2 * MARGIN
    height = sum(block.height + 24 + MARGIN for _, block in blocks) + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for title, block in blocks:
        draw.text((MARGIN + 2, top), title, fill="black", font=font)
        canvas.paste(block, (MARGIN, top + 24))
        top += block.height + 24 + MARGIN
    save(canvas, Path(path))


def _enlarged(canvas: np.ndarray, image_size: int) -> Image.Image:
    factor = max(1, 64 // image_size)
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save(picture: Image.Image, path: Path) -> None:
    """Writes `picture` as PNG, whole or not at all, and makes its folder. Raises UserError where it cannot."""
    write(path, lambda file: picture.save(file, format="PNG"), parents=True)
