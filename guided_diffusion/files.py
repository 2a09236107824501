"""Files that commands write: checked before the work, and never half there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    write(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))
