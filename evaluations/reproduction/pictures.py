"""The pictures of a report: grids of images and attention overlays, as data within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

SMALLEST, LARGEST = 64, 128         # px of an image in a grid; larger ones are reduced
OVERLAY_WIDTH = 720                 # px


@dataclass(frozen=True)
class Pictures:
    """What is shown beside the numbers of a table.

    grids: titles of sections with row title -> (n, H, W, 3) uint8, the images number 0 to n - 1 of each row.
    overlays: captions with RGB pictures (H, W, 3) uint8.
    """

    grids: Sequence[tuple[str, Mapping[str, np.ndarray]]] = field(default_factory=list)
    overlays: Sequence[tuple[str, np.ndarray]] = field(default_factory=list)


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
    """Returns the grid of images (n, H, W, 3) by the titles of their rows; None where there are no images."""
    reduced = {name: _reduced(images) for name, images in rows.items() if len(images)}
    if not reduced:
        return None
    strips = [ShownPicture(name, data_uri(_strip(images)), len(images) * _cell(images), len(images))
              for name, images in reduced.items()]
    return Grid(strips, max(map(_cell, reduced.values())), max(map(len, reduced.values())))


def shown_overlay(caption: str, picture: np.ndarray) -> ShownPicture:
    """Returns a picture (H, W, 3) enlarged by a whole number."""
    return ShownPicture(caption, data_uri(picture), picture.shape[1] * max(1, OVERLAY_WIDTH // picture.shape[1]))


def data_uri(picture: np.ndarray) -> str:
    """Returns (H, W, 3) uint8 as PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _reduced(images: np.ndarray) -> np.ndarray:
    """Returns (n, H, W, 3), no side of an image longer than LARGEST."""
    height, width = images.shape[1:3]
    factor = LARGEST / max(height, width)
    if factor >= 1:
        return images
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


def _cell(images: np.ndarray) -> int:
    """Returns the width of a column: a whole number for each pixel of an image and of the gap to the next."""
    width = images.shape[2]
    return (width + 1) * max(1, SMALLEST // width)


def _strip(images: np.ndarray) -> np.ndarray:
    """Returns (n, H, W, 3) side by side, a pixel of white to the right of each and below: (H + 1, n (W + 1), 3)."""
    return np.concatenate(list(np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)), axis=1)
