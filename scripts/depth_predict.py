r"""Write the depth that predictors read from noised images as grey images, to train a depth prior on.

Example:
    python scripts/depth_predict.py --model scenes32 --data scenes --num_images 500 --map_size 16 --out data/read16.npz
    python scripts/image_train.py --data_dir data/read16.npz --in_channels 1 --image_size 16 --channel_mult 1,2,2 \
        --out runs/prior
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.depth.reading import DepthReadingOptions, write_read_depth
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options = parse_options(argv, DepthReadingOptions, ModelOptions, DiffusionOptions, description=__doc__,
                            preset=preset_values)
    dist_util.one_process()
    clamped = write_read_depth(*options)
    tell(f"depth images: {options[0].out} ({100 * clamped:.2g} % of the pixels were beyond the range and clamped)")


if __name__ == "__main__":
    run_script(main)
