"""Tell what a running or stopped sampling run has done, what is missing, and what is damaged.

Example:
    python scripts/run_status.py samples/sag
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Options, Words, parse_words, switch


@dataclass(frozen=True)
class StatusOptions(Options):
    """The report."""

    json: bool = switch("for programs: the same as JSON")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    folders, (options,) = parse_words(argv, Words("FOLDER", "the --out of the run", needed=True), StatusOptions,
                                      description=__doc__)
    if len(folders) > 1:
        raise UserError(f"{len(folders)} folders given: name one")
    from guided_diffusion.runs.status import run_status  # here, as help needs none of it

    status = run_status(Path(folders[0]))
    print(json.dumps(status.as_dict()) if options.json else status)


if __name__ == "__main__":
    run_script(main)
