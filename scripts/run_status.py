"""Tell from another shell what jobs are doing, or have done: sampling, training, evaluation, tables, the bench.

Of a sampling run it also tells which images are missing or damaged. The state of a job is status.json in its folder,
which the job writes every few seconds; of an evaluation, name the file of its --json, or else its samples.

Examples:
    python scripts/run_status.py samples/sag
    python scripts/run_status.py runs/*/ results.json
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Options, Words, parse_words, switch


@dataclass(frozen=True)
class StatusOptions(Options):
    """The report."""

    json: bool = switch("for programs: the same as JSON, of several folders by their names")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    places, (options,) = parse_words(argv, Words("FOLDER", "the --out of a job, the file that it writes, or the "
                                                 "samples that it evaluates", needed=True), StatusOptions,
                                     description=__doc__)
    from guided_diffusion.runs.status import Status, status_of  # here, as help needs none of it

    found: dict[str, Status] = {}
    wrong = []
    for place in places:
        try:
            found[place] = status_of(Path(place))
        except UserError as error:
            wrong.append(str(error))
    if options.json and found:
        dicts = {place: status.as_dict() for place, status in found.items()}
        print(json.dumps(dicts if len(places) > 1 else dicts[places[0]]))
    elif found:
        print("\n\n".join(f"{place}\n{status}" if len(places) > 1 else str(status) for place, status in found.items()))
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    run_script(main)
