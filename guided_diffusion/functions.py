"""Functions that users bring, named MODULE:FUNCTION. The module is looked for in the current folder first."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .foreign import short_reason

_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function(word: str) -> bool:
    """Whether a word has the form MODULE:FUNCTION."""
    return _FUNCTION.fullmatch(word) is not None


def find_function(word: str, flag: str) -> tuple[Callable[..., Any], Path | None]:
    """The function of that name, and the file of its module, None where it has none.

    flag: the option that named it, with its dashes. Raises UserError where the module cannot be imported, or has no
    such function.
    """
    module_name, name = word.split(":")
    try:
        with _current_folder():
            module = importlib.import_module(module_name)
    except Exception as error:          # whatever the user's module raises
        raise UserError(f"{flag} {word}: {module_name} cannot be imported ({short_reason(error)})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag} {word}: {module_name} has no function {name}")
    file = getattr(module, "__file__", None)
    return function, Path(file) if file else None


def source_of(word: str) -> Path | None:
    """The file of the module of such a function, which is not imported; None where there is none."""
    try:
        with _current_folder():
            spec = importlib.util.find_spec(word.split(":")[0])
    except Exception:                   # whoever imports it says what is wrong
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


@contextmanager
def _current_folder() -> Iterator[None]:
    """Lets modules of the current folder be found, and before all others."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
