"""What the page of a folder shows, whichever command made the folder; and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from ..pages.page import lossy, pages_of
from ..pages.pictures import LARGEST, data_uri, reduced, shown_width


@dataclass(frozen=True)
class ShownTable:
    """A table of texts.

    head: titles of its columns with notes. rows: a text for each, of which the first is a name.

    words: whether the texts are words and names, not numbers.
    """

    title: str
    head: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: bool = False


@dataclass(frozen=True)
class ShownText:
    """A text of a file. parts: its paragraphs, and its tables."""

    title: str
    parts: Sequence[str | ShownTable]


@dataclass(frozen=True)
class ShownChart:
    """A chart as an SVG element, with its caption."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class Drawing:
    """A picture of the folder, (H, W, 3) uint8, with its caption."""

    caption: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Content:
    """What the page of a folder shows.

    title: of the page. facts: terms and texts. command: that made the folder, "" where it is not known. images: samples
    (n, H, W, 3) uint8, with a caption each, the first of `total`. data: tables that are folded away at first. options:
    all of them, by name. files: of the folder, with their sizes in words.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    command: str = ""
    images: np.ndarray | None = None
    captions: Sequence[str] = ()
    total: int = 0
    tables: Sequence[ShownTable] = ()
    data: Sequence[ShownTable] = ()
    charts: Sequence[ShownChart] = ()
    drawings: Sequence[Drawing] = ()
    texts: Sequence[ShownText] = ()
    options: Sequence[tuple[str, str]] = ()
    files: Sequence[tuple[str, str]] = field(default_factory=list)


def content_page(content: Content, quality: int | None = None) -> str:
    """The page as text. quality: of its pictures, see `pages.page`."""
    # The charts have styles of their own.
    return pages_of(__package__, ("report.css", "folder.css"), (), inline_styles=True).render(
        "folder.html.jinja", content.title, content=content, images=_images(content, quality),
        drawings=[{"caption": one.caption, "uri": data_uri(one.pixels, quality), "height": one.pixels.shape[0],
                   "width": one.pixels.shape[1]} for one in content.drawings],
        quality=lossy(quality) if content.images is not None or content.drawings else "")


def _images(content: Content, quality: int | None) -> list[dict[str, Any]]:
    if content.images is None or not len(content.images):
        return []
    small = reduced(content.images)
    height, width = small.shape[1:3]
    shown = min(LARGEST, shown_width(width))
    return [{"uri": data_uri(image, quality), "caption": caption, "width": shown,
             "height": round(shown * height / width)} for image, caption in zip(small, content.captions, strict=True)]
