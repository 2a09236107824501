"""Reproduce a table of a paper: sample every row, evaluate all, compare with what was published, and report.

Examples (each goes on where it was stopped when started again):
    python scripts/reproduce.py sag_cg_imagenet128 --plan True --ranks 8 --evaluation_seconds 0.01
    mpiexec -n 8 python scripts/reproduce.py sag_cg_imagenet128
    python scripts/reproduce.py fmnist32 --rows unguided,sag --num_samples 200 --ranks 2
"""

import logging
import sys

from evaluations.reproduction.reproduce import ReproduceOptions, launch, reproduce
from evaluations.reproduction.tables import table_names
from guided_diffusion import dist_util
from guided_diffusion.cli import run_script
from guided_diffusion.options import parse_options


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options, words = parse_options(None, ReproduceOptions, description=__doc__,
                                   words=f"the table: {', '.join(table_names())}")
    code = launch(options)
    if code is not None:
        sys.exit(code)
    text = reproduce(words, options)
    if text:
        print(text)
    dist_util.shutdown()


if __name__ == "__main__":
    run_script(main)
