"""What the commands that sample share; they differ in the guidance that is on unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .. import dist_util
from ..cli import log_to_stderr
from ..guidance import GuidanceOptions
from ..options import options_parser
from .effects import without_effect
from .options import SampleOptions, option_classes, preset_values
from .sample import SamplingRun

LOG = logging.getLogger(__name__)


def sample_command(argv: Sequence[str] | None, description: str, on: type[GuidanceOptions] | None = None) -> str:
    """Samples as a command line says; returns where the files are, "" on ranks other than the first.

    argv: None for the arguments of this process. on: a guidance method that is on, with its paper's scales, unless the
    command line says otherwise. Raises UserError for what is wrong with the options, before the first image is sampled.
    """
    log_to_stderr(dist_util.is_main())
    parser = options_parser(argv, SampleOptions, *option_classes(), description=description,
                            defaults=None if on is None else on.switched_on)
    _, options = parser.read(argv, preset_values)
    run = SamplingRun.of(options)
    note = without_effect(run, parser.given)
    if note and dist_util.is_main():
        LOG.warning(note)
    path = run.run()
    dist_util.shutdown()
    if path is None:
        return ""
    return f"samples: {path}\npicture: {path.parent / 'grid.png'}\nrecord:  {path.parent / 'run.json'}"
