"""A gallery of finished runs: a page in Markdown with the first images of each, and the command that made them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import UserError
from ..fetch import without_secrets
from ..files import check_folder, write_text
from ..foreign import read_json, read_text
from ..options import Options, option, required
from ..pictures import save_grid
from .record import finished_run, recorded_command, run_samples

WIDTH = 100                     # characters of a command's line
PAGE = "index.md"
INTRODUCTION = ("The first images of runs, none of them chosen, each with the command that made them. The page is made "
                "by")

MOST_SHOWN = 1000


@dataclass(frozen=True)
class GalleryOptions(Options):
    """The gallery."""

    out: str = required(f"folder for {PAGE} and a picture of each run")
    num_images: int = option(16, "images of each run", minimum=1, maximum=MOST_SHOWN)
    columns: int = option(8, "images in a row", minimum=1, maximum=MOST_SHOWN)
    heading: str = option("Gallery", "heading of the page")


def make_gallery(folders: Sequence[str], options: GalleryOptions, command: Sequence[str]) -> str:
    """Writes the page and the pictures; returns where the page is. command: the words of the command line, to show.

    A run is called after its folder. Raises UserError, before anything is written, for a folder without a finished
    run, for two of one name, and where nothing can be written or a file that no gallery made would be replaced.
    """
    names = [Path(folder).resolve().name for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{twice}: is the name of several folders, and a gallery calls a run after its folder")
    out = check_folder("--out", options.out)
    _check_replaced(out, names)
    lines = [f"# {options.heading}", "", INTRODUCTION, "", *_shell(command)]
    pictures = {}
    for name, folder in zip(names, map(Path, folders), strict=True):
        images, configuration = run_samples(folder, options.num_images)
        pictures[out / f"{name}.png"] = images
        words = finished_run(folder).title
        made = recorded_command(read_json(folder / "run.json"))
        lines += ["", f"## {_model(configuration)}: {words}", "",
                  f"![{len(images)} images: {words}]{_link(name)}", "", *_shell(made)]
    write_text(out / PAGE, "\n".join(lines) + "\n")            # first: by it the next gallery knows its pictures
    for path, images in pictures.items():
        save_grid(images, path, options.columns)
    return f"gallery: {out / PAGE}"


def _check_replaced(out: Path, names: Sequence[str]) -> None:
    """Raises UserError where the page, or a picture of these names, would replace a file that is of no gallery."""
    there = (out / PAGE).exists()
    page = read_text(out / PAGE) if there else ""
    others = [PAGE] if there and INTRODUCTION not in page else []
    others += [f"{name}.png" for name in names if (out / f"{name}.png").exists() and _link(name) not in page]
    if others:
        raise UserError(f"--out {out}: holds {', '.join(others)}, which no gallery made and this one would replace; "
                        "name another folder")


def _link(name: str) -> str:
    return f"({quote(name)}.png)"


def _model(configuration: Mapping[str, Any]) -> str:
    """The name of a run's model: that of --model, else of its pipeline, else of its file."""
    named = configuration.get("model") or Path(without_secrets(str(configuration.get("pipeline") or ""))).name
    return str(named or Path(str(configuration.get("model_path") or "model")).stem)


def _shell(words: Sequence[str]) -> list[str]:
    """A command as a code block, in several lines where it is long; an option and its value stay together."""
    lines: list[str] = []
    before = ""
    for word in words:
        quoted = shlex.quote(word)
        together = before.startswith("--") and not word.startswith("--")
        if lines and (together or len(lines[-1]) + len(quoted) < WIDTH):
            lines[-1] += f" {quoted}"
        else:
            lines.append(f"{'    ' if lines else ''}{quoted}")
        before = word
    if not lines:
        return []
    return ["<!-- not run: takes minutes -->", "```sh", *(f"{line} \\" for line in lines[:-1]), lines[-1], "```"]
