"""What the commands that sample share; they differ in the guidance that is on unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import dist_util
from ..cli import log_to_stderr
from ..guidance import GuidanceOptions
from ..options import options_parser
from .effects import without_effect
from .sample import SamplingRun

LOG = logging.getLogger(__name__)

Run = TypeVar("Run", bound=SamplingRun)


def sample_command(argv: Sequence[str] | None, description: str, on: type[GuidanceOptions] | None = None,
                   kind: type[SamplingRun] = SamplingRun) -> str:
    """Samples as a command line says; returns where the files are, "" on ranks other than the first.

    argv: None for the arguments of this process. on: a guidance method that is on, with its paper's scales, unless the
    command line says otherwise. kind: of the run. Raises UserError for what is wrong with the options, before the first
    image is sampled.
    """
    log_to_stderr(dist_util.is_main())
    run, given = read_run(argv, kind, description, None if on is None else on.switched_on)
    say_without_effect(run, given)
    path = run.run()
    dist_util.shutdown()
    return "" if path is None else files_of(path)


def read_run(argv: Sequence[str] | None, kind: type[Run], description: str = "",
             defaults: Mapping[str, Any] | None = None) -> tuple[Run, list[str]]:
    """A run from a command line, and the options that it gave; defaults: those of the command."""
    parser = options_parser(argv, *kind.classes(), description=description, defaults=defaults)
    _, options = parser.read(argv, kind.preset_values)
    return kind.of(options), parser.given


def say_without_effect(run: SamplingRun, given: Sequence[str]) -> None:
    """Logs which of the options that were given have no effect, on the first rank."""
    note = without_effect(run, given)
    if note and dist_util.is_main():
        LOG.warning(note)


def files_of(path: Path) -> str:
    """The lines that a command prints of a finished run; path: its file of samples."""
    return f"samples: {path}\npicture: {path.parent / 'grid.png'}\nrecord:  {path.parent / 'run.json'}"
