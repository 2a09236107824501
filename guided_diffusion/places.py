"""Where configurations and commands lie: beside the packages in a checkout, inside the packages once installed."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
LOGDIR = "OPENAI_LOGDIR"        # the variable by which official scripts are told where they write


def configurations() -> Path:
    """The folder of the configurations that come with this library."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_configuration(name: str | Path) -> Path:
    """The configuration of that name: a path, else one in `configurations()`, with or without the folder's name.

    Where there is none, the name as a path, so that whoever opens it can say what is missing.
    """
    given = Path(name)
    if not os.path.exists(given) and not given.is_absolute():
        inner = given.relative_to("configs") if given.parts[:1] == ("configs",) else given
        bundled = configurations() / inner
        return bundled if os.path.isfile(bundled) else given
    return given


def find_bundled(path: str | Path) -> str | Path:
    """A file of this package by its path in a checkout, like guided_diffusion/models/presets.yaml, wherever that is.

    Any other path, and one that is there as it is given, is returned as it is.
    """
    given = Path(path)
    bundled = PACKAGE.parent / given
    ours = given.parts[:1] == (PACKAGE.name,) and not os.path.exists(given) and os.path.isfile(bundled)
    return bundled if ours else path


def command_file(name: str) -> Path:
    """The file of the command of that name, like image_sample, which `python FILE` runs."""
    folder = PACKAGE.parent / "scripts"
    return (folder if folder.is_dir() else PACKAGE.parent / "guided_pixels") / f"{name}.py"
