"""Reproduce a table of a paper: sample every row, evaluate all, compare with what was published, and report.

Examples (each goes on where it was stopped when started again):
    python scripts/reproduce.py sag_cg_imagenet128 --plan True --ranks 8 --evaluation_seconds 0.01
    mpiexec -n 8 python scripts/reproduce.py sag_cg_imagenet128
    python scripts/reproduce.py fmnist32 --rows unguided,sag --num_samples 200 --ranks 2
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from evaluations.reproduction.reproduce import PAGE, ReproduceOptions, launch, reproduce
from evaluations.reproduction.tables import table_names
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stdout, run_script, tell
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    words, (options, show) = parse_words(argv, Words("TABLE", f"the table: {', '.join(table_names())}"),
                                         ReproduceOptions, ShowOptions, description=__doc__)
    code = launch(options)
    if code is not None:
        sys.exit(code)
    text = reproduce(words, options)
    tell(text if options.plan or not text else f"{text}\npage: {Path(options.out) / words[0] / PAGE}", show)
    dist_util.shutdown()


if __name__ == "__main__":
    run_script(main)
