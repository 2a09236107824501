"""Pictures within pages: pixels as data URIs, and strips of the same images under several settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

SMALLEST, LARGEST = 64, 128         # px of an image in a grid; larger ones are reduced


@dataclass(frozen=True)
class ShownPicture:
    """A picture in the page. uri: its data. width: CSS pixels. count: images side by side in it."""

    title: str
    uri: str
    width: int
    count: int = 1


@dataclass(frozen=True)
class Grid:
    """Strips of the same images under each other. cell: width of a column in CSS pixels. count: columns."""

    strips: list[ShownPicture]
    cell: int
    count: int


def shown_grid(rows: Mapping[str, np.ndarray]) -> Grid | None:
    """The grid of images (n, H, W, 3) by the titles of their rows; None where there are no images."""
    small = {name: reduced(images) for name, images in rows.items() if len(images)}
    if not small:
        return None
    strips = [ShownPicture(name, data_uri(_strip(images)), len(images) * _cell(images), len(images))
              for name, images in small.items()]
    return Grid(strips, max(map(_cell, small.values())), max(map(len, small.values())))


def data_uri(picture: np.ndarray, quality: int | None = None) -> str:
    """(H, W) or (H, W, 3) uint8 in a data URI, as PNG, or with loss as WebP of that quality from 0 to 100."""
    file, image = io.BytesIO(), Image.fromarray(picture)
    if quality is None:
        image.save(file, format="PNG", optimize=True)
    else:
        image.save(file, format="WEBP", quality=quality, method=2)
    kind = "png" if quality is None else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def reduced(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3), no side of an image longer than LARGEST."""
    height, width = images.shape[1:3]
    factor = LARGEST / max(height, width)
    if factor >= 1:
        return images
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


def shown_width(width: int) -> int:
    """The CSS pixels that a picture of so many is shown with: small ones are enlarged by a whole number."""
    return width * max(1, SMALLEST // width)


def _cell(images: np.ndarray) -> int:
    """The width of a column: a whole number for each pixel of an image and of the gap to the next."""
    width = images.shape[2]
    return (width + 1) * max(1, SMALLEST // width)


def _strip(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) side by side, a pixel of white to the right of each and below: (H + 1, n (W + 1), 3)."""
    return np.concatenate(list(np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)), axis=1)
