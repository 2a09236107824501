"""Kill jobs at random moments, start them again, and compare their files with those of an undisturbed job.

Examples:
    python scripts/reliability.py --kills 20 --ranks 2
    python scripts/reliability.py --what training --kills 10
    python scripts/reliability.py --what evaluation --kills 10 --num_samples 400
    python scripts/reliability.py --pack_images 50000
"""

from collections.abc import Sequence

from evaluations.benchmarks.reliability import ReliabilityOptions, kills_table, npz_writing_trial, reliability
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, ReliabilityOptions, description=__doc__)
    dist_util.one_process()
    if options.pack_images:
        print(npz_writing_trial(options))
        return
    for line in kills_table(reliability(options), options.what):
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
