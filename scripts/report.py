"""Write the page of a run, a table, a bench, a training or a study, and tell where it is.

The page of a run has its command, options, guidance and images, the time it took, and what was measured of it, as far
as that lies in its folder or in the one around it.

Examples:
    python scripts/report.py samples/sag --open
    python scripts/report.py samples/unguided samples/sag
    python scripts/report.py fmnist32
"""

from collections.abc import Sequence

from evaluations.reports.report import ReportOptions, write_pages
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    folders, (options, show) = parse_words(
        argv, Words("RUN_OR_TABLE", "folders of runs, tables, trainings or studies, or names of tables and benches",
                    needed=True), ReportOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    tell(write_pages(folders, options), show)


if __name__ == "__main__":
    run_script(main)
