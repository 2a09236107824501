"""Measure the peak memory of an evaluation, on synthetic images and with a network that computes next to nothing.

It writes two files of that many images (50,000 of 256x256 take 9.8 GB) into a temporary folder, evaluates one against
the other, and prints the time and the largest resident memory of the process.

Example:
    python scripts/benchmark_memory.py --num_images 50000 --image_size 256 --metrics is,fid,sfid
"""

from collections.abc import Sequence

from evaluations.benchmarks.memory import MemoryOptions, benchmark_memory
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, MemoryOptions, description=__doc__)
    dist_util.one_process()
    print(benchmark_memory(options))


if __name__ == "__main__":
    run_script(main)
