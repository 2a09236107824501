"""Write a model as a folder in the layout of model hubs: weights, config.json and a model card.

Examples:
    python scripts/export_model.py --model fmnist32 --out exports/fmnist32
    python scripts/export_model.py --model runs/photos --licence CC0-1.0 --out exports/photos
    python scripts/image_sample.py --model exports/fmnist32 --num_samples 16
    python scripts/export_model.py --model icons32 --layout diffusers --out exports/icons32_diffusers
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.exports import ExportOptions, export_model
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, ExportOptions, description=__doc__)
    dist_util.one_process()
    tell(f"model: {export_model(options)}")


if __name__ == "__main__":
    run_script(main)
