"""What the commands that sample share; they differ in the guidance that is on unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from .. import dist_util
from ..cli import ShowOptions, log_to_stderr, tell, with_logdir
from ..guidance import GuidanceOptions
from ..options import options_parser
from .effects import without_effect
from .sample import SamplingRun

LOG = logging.getLogger(__name__)

Run = TypeVar("Run", bound=SamplingRun)


def sample_command(argv: Sequence[str] | None, description: str, on: type[GuidanceOptions] | None = None,
                   kind: type[SamplingRun] = SamplingRun) -> None:
    """Samples as a command line says; the first rank tells where the files are.

    argv: None for the arguments of this process. on: a guidance method that is on, with its paper's scales, unless the
    command line says otherwise. kind: of the run. Raises UserError for what is wrong with the options, before the first
    image is sampled.
    """
    log_to_stderr(dist_util.is_main())
    parser = options_parser(argv, *kind.classes(), ShowOptions, description=description,
                            defaults=None if on is None else on.switched_on)
    _, (*options, show) = parser.read(argv, with_logdir(kind.preset_values))
    run = kind.of(options)
    say_without_effect(run, [name for name in parser.given if name != "open"])
    path = run.run()
    dist_util.shutdown()
    if path is not None:
        tell(files_of(path), show)


def read_run(argv: Sequence[str] | None, kind: type[Run], description: str = "") -> tuple[Run, list[str]]:
    """A run from a command line, and the options that it gave."""
    parser = options_parser(argv, *kind.classes(), description=description)
    _, options = parser.read(argv, kind.preset_values)
    return kind.of(options), parser.given


def say_without_effect(run: SamplingRun, given: Sequence[str]) -> None:
    """Logs which of the options that were given have no effect, on the first rank."""
    say_note(without_effect(run, given))


def say_note(note: str) -> None:
    """Logs a line as a warning, unless it is empty, on the first rank."""
    if note and dist_util.is_main():
        LOG.warning(note)


def files_of(path: Path) -> str:
    """The lines that a command prints of a finished run; path: its file of samples."""
    return f"samples: {path}\npicture: {path.parent / 'grid.png'}\nrecord:  {path.parent / 'run.json'}"
