"""Measure a model: milliseconds, peak memory and network passes of an evaluation, of unguided and of guided steps.

Steps of depth-aware guidance are there where the model has depth predictors (and a depth prior), or they are given.

Example:
    python scripts/benchmark.py --model fmnist32 --batch_size 64
"""

from evaluations.benchmarks.speed import OPTION_CLASSES, BenchmarkOptions, benchmark, preset_values
from guided_diffusion.options import parse_options
from guided_diffusion.script_util import run_script


def main() -> None:
    classes = (BenchmarkOptions, *OPTION_CLASSES)
    print(benchmark(*parse_options(None, *classes, description=__doc__,
                                   preset=lambda given: preset_values({"model": "fmnist32", **given}))))


if __name__ == "__main__":
    run_script(main)
