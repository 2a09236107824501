"""A hook of mkdocs: in pages of the reference, `::: package.*` stands for every module of that package.

So a new file is in the reference without a line of its own.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATTERN = re.compile(r"^::: ([\w.]+)\.\*$", re.MULTILINE)


def modules(package: str) -> list[str]:
    """The public modules of a package and of the packages in it, by dotted name, each package before its modules."""
    folder = ROOT / package.replace(".", "/")
    names = [package]
    if not folder.is_dir():
        return names
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith("_"):
            continue
        if path.suffix == ".py":
            names.append(f"{package}.{path.stem}")
        elif (path / "__init__.py").is_file():
            names += modules(f"{package}.{path.name}")
    return names


def entry(name: str) -> str:
    """The line that shows a module; of a package only its docstring, as its names are shown where they are defined."""
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    return f"::: {name}" + ("\n    options: {members: false}" if is_package else "")


def expanded(markdown: str) -> str:
    """`markdown` with every `::: package.*` written out."""
    return PATTERN.sub(lambda found: "\n\n".join(map(entry, modules(found[1]))), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return expanded(markdown)
