"""A hook of mkdocs: in pages of the reference, one line stands for many modules.

`::: package.*` is every module of a package and of the packages in it; `::: package.others` is every module directly in
it that no page names. So a new file is in the reference without a line of its own.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
PATTERN = re.compile(r"^::: ([\w.]+)\.(\*|others)$", re.MULTILINE)
NAME = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
OLD_NAME = "import run_renamed"      # in a file that only leads from the old name of a command to the new one


def modules(package: str) -> list[str]:
    """The public modules of a package and of the packages in it, by dotted name, each package before its modules."""
    folder = ROOT / package.replace(".", "/")
    names = [package]
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith("_"):
            continue
        if path.suffix == ".py" and OLD_NAME not in path.read_text(encoding="utf-8"):
            names.append(f"{package}.{path.stem}")
        elif (path / "__init__.py").is_file():
            names += modules(f"{package}.{path.name}")
    return names


def others(package: str) -> list[str]:
    """The modules directly in a package that no page of the reference names."""
    named = {name for page in REFERENCE.glob("*.md") for name in NAME.findall(page.read_text(encoding="utf-8"))}
    return [name for name in modules(package)
            if name.rpartition(".")[0] == package and not is_package(name) and name not in named]


def is_package(name: str) -> bool:
    """Whether that is a folder, not a file."""
    return (ROOT / name.replace(".", "/")).is_dir()


def entry(name: str) -> str:
    """The lines that show a module; of a package only its docstring, as its names are shown where they are defined."""
    return f"::: {name}" + ("\n    options: {members: false}" if is_package(name) else "")


def expanded(markdown: str) -> str:
    """`markdown` with every such line written out."""
    def written_out(found: re.Match[str]) -> str:
        return "\n\n".join(map(entry, modules(found[1]) if found[2] == "*" else others(found[1])))
    return PATTERN.sub(written_out, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return expanded(markdown)
