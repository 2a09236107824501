"""The pictures of a report: grids of images and attention overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..pages.pictures import ShownPicture, data_uri

OVERLAY_WIDTH = 720                 # px


@dataclass(frozen=True)
class Pictures:
    """What is shown beside the numbers of a table.

    grids: titles of sections with row title -> (n, H, W, 3) uint8, the images number 0 to n - 1 of each row.
    overlays: captions with RGB pictures (H, W, 3) uint8.
    """

    grids: Sequence[tuple[str, Mapping[str, np.ndarray]]] = field(default_factory=list)
    overlays: Sequence[tuple[str, np.ndarray]] = field(default_factory=list)


def shown_overlay(caption: str, picture: np.ndarray) -> ShownPicture:
    """Returns a picture (H, W, 3) enlarged by a whole number."""
    return ShownPicture(caption, data_uri(picture), picture.shape[1] * max(1, OVERLAY_WIDTH // picture.shape[1]))
