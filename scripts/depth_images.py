"""Write depth maps as grey images, to train a depth prior on with scripts/image_train.py.

Examples:
    python scripts/depth_images.py --data scenes --num_images 20000 --image_size 32 --out data/scenes32_depth.npz
    python scripts/depth_images.py --data bedrooms --image_size 128 --out data/bedrooms_depth.npz
    python scripts/image_train.py --data_dir data/bedrooms_depth.npz --in_channels 1 --image_size 128 --out runs/prior
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.depth.images import DepthImageOptions, write_depth_images
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, DepthImageOptions, description=__doc__)
    dist_util.one_process()
    write_depth_images(options)
    tell(f"depth images: {options.out}")


if __name__ == "__main__":
    run_script(main)
