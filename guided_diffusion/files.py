"""Files that commands write: checked before the work, and never half there. And arrays that they read."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError


def check_writable(flag: str, path: str) -> None:
    """Raises UserError, naming the flag, where the file `path` could not be written; no path is fine."""
    if not path:
        return
    folder = Path(path).parent
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def write(path: str | Path, save: Callable[[Path], object]) -> None:
    """`save(temporary)`, then the temporary file, of the same suffix, becomes `path`."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):          # where its folder is none, there is nothing to remove either
            temporary.unlink()


def write_json(path: str | Path, content: Any) -> None:
    write(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same names, at least one; numbers with six digits, NaN left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: ("" if math.isnan(value) else f"{value:.6g}") if isinstance(value, float) else value
                         for name, value in row.items()})
    write(path, lambda file: file.write_text(text.getvalue()))


def read_arrays(path: str | Path, names: Sequence[str], otherwise: str) -> list[np.ndarray | None]:
    """The arrays of these names in an .npz file, None for those it has not.

    Raises UserError, beginning with `otherwise`, where it is no such file, is damaged or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file.get(name) for name in names]
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{otherwise} ({error})") from None
