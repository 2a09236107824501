r"""Draw the same images under several settings, one block below the other.

A folder is the --out of a sampling run, or of a table or a bench, which stands for the runs of all its rows. Image i of
every run has the same seed, so that what differs is what the settings change. A page has a slider from before to after.

Examples:
    python scripts/compare.py samples/unguided samples/sag --out samples/comparison.png
    python scripts/compare.py samples/unguided samples/sag samples/cg --out samples/comparison.html --sort change --open
    python scripts/compare.py runs/reproduction/fmnist32 --images 0:8 --labels True --zoom 4 --out rows.png \
        --page rows.html
"""

from collections.abc import Sequence

from evaluations.pages.compare import compare
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.jobs import command_line
from guided_diffusion.options import Words, parse_words
from guided_diffusion.runs.comparison import ComparisonOptions


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    folders, (options, show) = parse_words(
        argv, Words("FOLDER", "output folders of sampling runs, or of tables", needed=True), ComparisonOptions,
        ShowOptions, description=__doc__)
    dist_util.one_process()
    tell(compare(folders, options, command_line("scripts/compare.py", argv)), show)


if __name__ == "__main__":
    run_script(main)
