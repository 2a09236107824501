r"""Measure how well depth is read from a diffusion network's features: by block, by step and by number of labels.

Examples (each goes on where it was stopped when started again):
    python scripts/depth_accuracy.py --model scenes32 --data scenes --out runs/scenes32_depth_accuracy
    python scripts/depth_accuracy.py --model lsun_bedroom --model_path models/lsun_bedroom.pt --data bedrooms \
        --held_out more_bedrooms --num_held_out 100 --label_counts 10,30,100 --strong_blocks 2,4,5,6,7
"""

from collections.abc import Sequence

from evaluations.depth.accuracy import DepthAccuracyOptions, measure_accuracy
from evaluations.reports import with_page
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import ShowOptions, log_to_stdout, run_script, tell
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    show, *options = parse_options(argv, ShowOptions, DepthAccuracyOptions, ModelOptions, DiffusionOptions,
                                   description=__doc__, preset=preset_values)
    text = measure_accuracy(*options)
    tell(with_page(text, options[0].out, show), show)


if __name__ == "__main__":
    run_script(main)
