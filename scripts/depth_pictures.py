r"""Draw the geometry of samples: images, the depth seen in them, surface normals, and point clouds.

Each folder holds a finished run of 32x32 images. Column i of every block is image number i, so that runs with the same
seed show what guidance changes. With a depth network of your own, normals and point clouds are left out.

Examples:
    python scripts/depth_pictures.py samples/dag/unguided samples/dag/both --out geometry.png --cloud cloud.png
    python scripts/depth_pictures.py samples/doom --frames data/doom32/train.npz \
        --backend models/freedoom32_judge.safetensors --far 16 --titles "frames of Freedoom,samples" --out rooms.png
"""

from collections.abc import Sequence

from evaluations.depth.pictures import DepthPicturesOptions, draw_geometry
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    folders, (options, show) = parse_words(argv, Words("FOLDER", "the --out of sampling runs", needed=True),
                                           DepthPicturesOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    tell(draw_geometry(folders, options), show)


if __name__ == "__main__":
    run_script(main)
