"""Several finished runs in one picture: the same images under several settings, one block below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..options import Options, option, required
from ..pictures import save_comparison
from .record import run_samples, title


@dataclass(frozen=True)
class ComparisonOptions(Options):
    """The picture."""

    out: str = required("PNG file to write")
    num_images: int = option(40, "images of each run", minimum=1)


def compare_runs(folders: Sequence[str], options: ComparisonOptions) -> str:
    """Draws the runs in these folders, each with its guidance as title; returns where the picture is.

    Raises UserError for a folder without a finished run, and where the picture cannot be written.
    """
    rows = {}
    for folder in map(Path, folders):
        images, configuration = run_samples(folder, options.num_images)
        name = f"{folder.resolve().name}: {title(configuration)}"
        rows[f"{folder}: {title(configuration)}" if name in rows else name] = images
    save_comparison(rows, Path(options.out))
    return f"comparison: {options.out}"
