"""Probe how far each contrast of guidance points at the truth: its best scale by noise level and block, in a minute.

Examples:
    python scripts/probe.py --model fmnist32 --data_dir fashion-mnist --out runs/probe/fmnist32
    python scripts/scenes_render.py --num_images 32 --seed 1 --out rooms.npz
    python scripts/probe.py --model scenes32 --data_dir rooms.npz --methods PAG,SEG --out runs/probe/scenes32
    python scripts/probe.py --model scenes32 --data_dir rooms.npz --table runs/bench/scenes32/search/table.json
"""

from collections.abc import Sequence

from evaluations.bench.probe import ProbeOptions, run_probe
from evaluations.bench.probe_report import check_table, write_probe
from evaluations.reports import with_page
from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.options import options_parser
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    parser = options_parser(argv, ShowOptions, ProbeOptions, ModelOptions, DiffusionOptions, *GUIDANCE,
                            description=__doc__)
    _, (show, options, model, diffusion, *methods) = parser.read(argv, preset_values)
    dist_util.one_process()
    if options.table:
        check_table(options.table, options.metric, options.model_path)
    text = run_probe(options, model, diffusion, methods, write_probe, parser.given)
    tell(with_page(text, options.out, show), show)


if __name__ == "__main__":
    run_script(main)
