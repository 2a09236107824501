"""Render rooms with exact depth, to train diffusion models and depth predictors on.

Examples:
    python scripts/scenes_render.py --num_images 50000 --out data/scenes32.npz
    python scripts/scenes_render.py --num_images 48 --image_size 64 --seed 1 --out few.npz --sheet few.png
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.depth.scenes.files import SceneOptions, write_scenes
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, show = parse_options(argv, SceneOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    write_scenes(options)
    tell(f"scenes: {options.out}" + (f"\nsheet: {options.sheet}" if options.sheet else ""), show)


if __name__ == "__main__":
    run_script(main)
