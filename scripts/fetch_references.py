"""Fetch the official reference batches of guided-diffusion, which samples are evaluated against.

Each holds images, for precision and recall, and the statistics of a larger set, for FID and sFID.

Examples:
    python scripts/fetch_references.py --list
    python scripts/fetch_references.py VIRTUAL_imagenet128_labeled
"""

from collections.abc import Sequence

from evaluations.references import ReferencesOptions, fetch_references
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    names, (options,) = parse_words(argv, Words("NAME", "reference batches, as --list names them"), ReferencesOptions,
                                    description=__doc__)
    if not options.list:
        dist_util.one_process()
    for line in fetch_references(names, options):
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
