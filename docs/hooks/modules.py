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


def expanded(markdown: str) -> str:
    """`markdown` with every `::: package.*` written out; what a package only hands on is shown where it is defined."""
    def written_out(found: re.Match[str]) -> str:
        return "\n\n".join(f"::: {name}" + ("\n    options: {members: false}" if (ROOT / name.replace(".", "/")).is_dir()
                                            else "") for name in modules(found[1]))
    return PATTERN.sub(written_out, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return expanded(markdown)
