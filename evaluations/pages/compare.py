"""Runs beside each other as a page: before and after of two of them, their difference, and the images of all.

What the runs have in common is found by `guided_diffusion.runs.comparison`, which also draws them as one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.runs.comparison import Comparison, ComparisonOptions, read_comparison

from .page import LIMIT, lossy, pages_of, write_page
from .pictures import LARGEST, data_uri, shown_width

ENLARGED = 512                  # CSS pixels of the pair, at most


def compare(folders: Sequence[str], options: ComparisonOptions, command: str) -> str:
    """Writes the picture and the pages that the options name, and returns a line for each of where it is.

    command: the command line, which the page shows. Raises UserError as `read_comparison`, for a page of one run, for
    one that would be too large, and where a file cannot be written.
    """
    comparison = read_comparison(folders, options)
    if options.pages and len(comparison.names) < 2:
        raise UserError(f"{options.pages[0]}: a page compares at least two runs, and one is named")
    lines = []
    for path in options.pictures:
        comparison.draw(path, options)
        lines.append(f"comparison: {path}")
    for path in options.pages:
        size = write_comparison(path, comparison, command, options.zoom)
        lines.append(f"page: {path} ({size:,} bytes)")
    return "\n".join(lines)


def write_comparison(path: Path, comparison: Comparison, command: str, zoom: int | None = None,
                     limit: int = LIMIT) -> int:
    """Writes the page, see `compare`; returns its size, at most `limit` bytes. zoom: of the images of all runs."""
    return write_page(
        path, lambda quality: comparison_page(comparison, command, quality, zoom), lambda size, limit: UserError(
            f"--num_images: the page would take {size:,} bytes, and the limit is {limit:,}; compare fewer images or "
            "runs"), limit)


def comparison_page(comparison: Comparison, command: str, quality: int | None = None, zoom: int | None = None) -> str:
    """The page as text. quality: of its pictures, see `page`. zoom: times that a pixel is enlarged below each other."""
    count, images = comparison.images.shape[:2]
    height, width = comparison.images.shape[2:4]
    shown = width * zoom if zoom else min(LARGEST, shown_width(width))
    data: dict[str, Any] = {
        "names": comparison.names, "images": comparison.image_ids, "labels": comparison.labels,
        "changes": [[[round(float(value), 1) for value in row] for row in comparison.changes(first)]
                    for first in range(count)]}
    return pages_of(__package__, ("compare.css",), ("compare.js",)).render(
        "compare.html.jinja", f"{count} runs, {images} image{'s' * (images > 1)} of each", data=data, command=command,
        names=comparison.names, image_ids=comparison.image_ids, labels=comparison.labels, notes=comparison.notes,
        uris=[[data_uri(image, quality) for image in run] for run in comparison.images], width=width, height=height,
        shown=shown, shown_height=round(shown * height / width), quality=lossy(quality),
        enlarged=max(1, ENLARGED // width) * width)
