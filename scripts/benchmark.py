"""Measure a model: milliseconds, peak memory and network passes of an evaluation, of unguided and of guided steps.

Every guidance method is measured; one that needs files, only where the model has them, or they are given.

With --against, this code is compared with a clone of the official one instead: networks of three shapes, the same
weights, in turn; with --training it is steps of training that are timed.

Examples:
    python scripts/benchmark.py --model fmnist32 --batch_size 64
    python scripts/benchmark.py --against guided-diffusion --rounds 5
    python scripts/benchmark.py --against guided-diffusion --training True --shapes 1 --rounds 5
"""

from collections.abc import Sequence

from evaluations.benchmarks.against import AgainstOptions, benchmark_against
from evaluations.benchmarks.speed import BenchmarkOptions, benchmark
from evaluations.benchmarks.training import benchmark_training
from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, against, model, diffusion, *methods = parse_options(
        argv, BenchmarkOptions, AgainstOptions, ModelOptions, DiffusionOptions, *GUIDANCE, description=__doc__,
        preset=lambda given: preset_values({"model": "fmnist32", **given}))
    dist_util.one_process()
    if against.against:
        print((benchmark_training if against.training else benchmark_against)(against, options.rounds))
        return
    print(benchmark(options, model, diffusion, methods))


if __name__ == "__main__":
    run_script(main)
