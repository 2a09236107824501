"""Functions that users bring, named MODULE:FUNCTION. The module is looked for in the current folder first."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError
from .foreign import short_reason

OURS = ("guided_diffusion", "evaluations")
INSTALLED = frozenset({"site-packages", "dist-packages"})         # where others' packages lie
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
    except (Exception, SystemExit) as error:            # whatever the user's module raises
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
    except (Exception, SystemExit):     # whoever imports it says what is wrong
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def is_ours(module_name: str) -> bool:
    """Whether a module is one of this library."""
    return module_name.split(".")[0] in OURS


def sources_of(module_name: str) -> dict[str, Path]:
    """The files of an imported module and of those that it uses and that were written with it, by module name.

    Written with it are those of its own package, and those that lie in its folder or below, unless that is where
    packages are installed.
    """
    found: dict[str, Path] = {}
    waiting = [sys.modules[module_name]] if module_name in sys.modules else []
    while waiting:
        one = waiting.pop()
        file = _file_of(one)
        if one.__name__ in found or file is None:
            continue
        found[one.__name__] = file
        for value in list(vars(one).values()):
            used = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
            if used is not None and _written_with(used, one):
                waiting.append(used)
    return found


def _written_with(used: ModuleType, module: ModuleType) -> bool:
    file, beside = _file_of(used), _file_of(module)
    if file is None or beside is None or is_ours(used.__name__):
        return False
    if used.__name__.split(".")[0] == module.__name__.split(".")[0]:
        return True
    return file.is_relative_to(beside.parent) and not INSTALLED.intersection(file.parts)


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


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
