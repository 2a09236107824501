"""What tells the images of a data folder from others, wherever they lie: trainings and likelihoods record it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError
from .fetch import sha256_of
from .image_datasets import find_data, holds_idx
from .image_files import find_pictures
from .npz import is_npz

MEASURED = 1000         # files of a folder whose sizes tell its images from others of the same names
UNPACKED = frozenset((".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".tif", ".tiff"))


def data_digest(data_dir: str) -> str:
    """SHA-256 of what tells images from others: their names in order and some of their sizes; of an .npz the checksums.

    IDX files and, of those that tell by their sizes, pictures that may not be packed are read whole: others have the
    same names and sizes. The result does not depend on where the images lie. Raises UserError where there are none.
    """
    place = find_data(data_dir)
    lines: Iterable[str]
    if is_npz(place):
        try:
            with zipfile.ZipFile(place) as file:
                lines = [f"{part.filename} {part.CRC} {part.file_size}" for part in file.infolist()]
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            raise UserError(f"--data_dir {data_dir}: is not an .npz file of images, or is damaged") from None
    elif holds_idx(place):
        lines = [f"{path.name} {path.stat().st_size if path.suffix == '.gz' else sha256_of(path)}"
                 for path in sorted(place.glob("*-idx*-ubyte*"))]
    else:
        files = find_pictures(place).files
        every = -(-len(files) // MEASURED)
        lines = [f"{path.relative_to(place).as_posix()} {_measured(path) if i % every == 0 else ''}"
                 for i, path in enumerate(files)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _measured(path: Path) -> int | str:
    """What tells a picture from another one of the same name: its size, or where that may be the same its content."""
    return sha256_of(path) if path.suffix.lower() in UNPACKED else path.stat().st_size
