"""Compare guidance methods, alone and in pairs, at equal network evaluations per image, each at its best scale.

Examples (each goes on where it was stopped when started again):
    python scripts/bench.py scenes32 --plan True --hours 5 --ranks 2
    OMP_NUM_THREADS=1 mpiexec -n 2 python scripts/bench.py scenes32 --hours 5
    python scripts/bench.py fmnist32 --methods SAG,PAG --search_images 100 --images 500
    torchrun --nproc-per-node 4 scripts/bench.py scenes32 --batch_size 250
"""

import sys
from collections.abc import Sequence

from evaluations.bench.bench import BenchOptions, page_of, run_bench
from evaluations.bench.settings import BenchSpec, bench_names
from evaluations.reproduction.reproduce import launch
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stdout, run_script, tell
from guided_diffusion.options import Words, option_fields, options_parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    parser = options_parser(argv, BenchOptions, BenchSpec, ShowOptions, description=__doc__,
                            words=Words("BENCH", f"the bench: {', '.join(bench_names())}, or a file of this kind"))
    words, (options, spec, show) = parser.read(argv)
    code = launch(options)
    if code is not None:
        sys.exit(code)
    fields = {field.name for field in option_fields(BenchSpec)}
    changed = {name: getattr(spec, name) for name in parser.given if name in fields}
    page = page_of(words, options, changed)
    text = run_bench(words, options, changed)
    tell(text if options.plan or not text else f"{text}\npage: {page}", show)
    dist_util.shutdown()


if __name__ == "__main__":
    run_script(main)
