"""Measure how much faster, and in how much memory, the evaluator works than in the official evaluator's ways.

It prints a table for this machine; both ways are timed in turns, so that the ratios hold where the machine is busy,
too. TensorFlow takes part where it is installed, Inception where --inception names its graph. Run it with
OMP_NUM_THREADS=2 and the like to limit the threads.

Example:
    python scripts/benchmark_evaluator.py --inception classify_image_graph_def.pb
"""

from collections.abc import Sequence

from evaluations.benchmarks.evaluator import EvaluatorBenchmarkOptions, benchmark_evaluator
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, EvaluatorBenchmarkOptions, description=__doc__)
    dist_util.one_process()
    for line in benchmark_evaluator(options):
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
