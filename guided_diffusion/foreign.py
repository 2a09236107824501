"""Files that others made: whatever is wrong with one ends in a sentence that names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LostRankError, PeerError, UserError
from .files import reason

MAX_DETAIL = 150                # characters of a library's own words that a sentence repeats
MAX_JSON = 2**28                # bytes; no JSON file that the commands read is larger


@contextmanager
def reading(path: str | Path, otherwise: str, *, flag: str = "") -> Iterator[None]:
    """Turns whatever the block raises into a UserError "FLAG PATH: OTHERWISE (REASON)".

    A damaged or hostile file makes the libraries that read it raise nearly anything, from KeyError over RecursionError
    to MemoryError, so that no list of exceptions would be complete; code that came with it may also end the program.
    UserErrors and errors of other ranks pass as they are. The block must do nothing but read this file.

    flag: the option that named the file, with its dashes.
    """
    try:
        yield
    except (UserError, PeerError, LostRankError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{f'{flag} ' if flag else ''}{path}: {otherwise} ({short_reason(error)})") from None


def short_reason(error: BaseException) -> str:
    """What went wrong, on one line that is no longer than a sentence can bear."""
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = f"it ends the program by exit({error.code})" if isinstance(error, SystemExit) else reason(error)
    if "TorchScript" in said:           # which tells where it was before it tells why
        said = said.rpartition("RuntimeError: ")[2]
    return "".join(char if char.isprintable() else "?" for char in said[:MAX_DETAIL])


def read_text(path: str | Path) -> str:
    """The text of a file, with a mark in place of bytes that are no UTF-8; raises UserError where it cannot be read."""
    with reading(path, "cannot be read"):
        return Path(path).read_text(encoding="utf-8", errors="replace")


def read_json(path: str | Path, kind: Callable[[Any], bool] = lambda content: isinstance(content, dict),
              otherwise: str = "is no JSON file that can be used", *, flag: str = "") -> Any:
    """The content of a JSON file.

    kind: says whether the content is what it should be, names with values unless told otherwise; it may raise anything.
    Raises UserError, as `reading` words it, where the file is missing, too large, damaged, nested too deeply or of
    another kind.
    """
    with reading(path, otherwise, flag=flag):
        size = Path(path).stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"it has {size} bytes, more than {MAX_JSON}")
        content = json.loads(Path(path).read_bytes())
        if not kind(content):
            raise ValueError("its content is of another kind")
        return content
