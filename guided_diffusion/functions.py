"""Functions that users bring, named MODULE:FUNCTION. The module is looked for in the current folder first."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from itertools import accumulate
from pathlib import Path
from typing import Any

from .errors import UserError
from .fetch import sha256_of
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
    """The files of a module and of those that it imports and that were written with it, by module name, its own first.

    What is imported in a function counts as well, whether it was called or not; nothing is imported here. Written with
    it are modules of its own package, and those that lie in its folder or below, unless that is where packages are
    installed. A script has the name by which others import it. Empty for a module without a file.
    """
    name, file = _called(module_name), _file_of(module_name, Path.cwd())
    found: dict[str, Path] = {}
    if file is None:
        return found
    waiting, home = [(name, file)], file.parent
    while waiting:
        name, file = waiting.pop()
        if name in found or file in found.values():
            continue
        found[name] = file
        root = file.parents[min(name.count(".") + _is_package(file), len(file.parents) - 1)]
        for used in _imported(name, file) - found.keys():
            beside = None if is_ours(used) else _file_of(used, root)
            same_package = used.split(".")[0] == name.split(".")[0]
            if beside and (same_package or (beside.is_relative_to(home) and not is_installed(beside))):
                waiting.append((used, beside))
    return found


def function_sources(word: str) -> dict[str, Path]:
    """The same of the module of MODULE:FUNCTION; that module alone where it is installed, or of this library."""
    found = sources_of(module_name := word.split(":")[0])
    first = dict(list(found.items())[:1])
    return first if is_ours(module_name) or any(map(is_installed, first.values())) else found


def code_digest(sources: Mapping[str, Path]) -> str:
    """The SHA-256 of files of code by module name: of a single one that of its content; "" for none."""
    digests = {name: sha256_of(file) for name, file in sorted(sources.items())}
    if len(digests) < 2:
        return "".join(digests.values())
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def is_installed(file: Path) -> bool:
    """Whether a file lies where packages are installed."""
    return not INSTALLED.isdisjoint(file.parts)


def _imported(name: str, file: Path) -> set[str]:
    """The names that import statements of a module's file may be about, with those of the packages they are in."""
    try:
        tree = ast.parse(file.read_bytes() if file.suffix == ".py" else b"", str(file))
    except (OSError, SyntaxError, ValueError, RecursionError):      # whoever imports it says what is wrong
        return set()
    package = name if _is_package(file) else name.rpartition(".")[0]
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            words += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):             # a relative one that leads out of its package
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                words += [f"{base}.{alias.name}" for alias in node.names]
    return {part for word in words for part in accumulate(word.split("."), "{}.{}".format)}


def _is_package(file: Path) -> bool:
    return file.stem == "__init__"


def _called(module_name: str) -> str:
    """The name by which other modules import that one: of the script that was started, that of its file."""
    module = sys.modules.get(module_name)
    if module_name != "__main__" or module is None:
        return module_name
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    return str(spec.name) if spec is not None else Path(file or module_name).stem


def _file_of(module_name: str, root: Path) -> Path | None:
    """The file of a module, imported or not, which is looked for in a folder first."""
    module = sys.modules.get(module_name)
    if module is not None:
        origin = getattr(module, "__file__", None)
    else:
        origin, folders = None, [str(root), *sys.path]
        for name in accumulate(module_name.split("."), "{}.{}".format):
            spec = PathFinder.find_spec(name, folders)
            if spec is None:
                return None
            origin, folders = spec.origin if spec.has_location else None, list(spec.submodule_search_locations or ())
    return Path(origin) if origin and Path(origin).is_file() else None


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
