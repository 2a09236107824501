r"""Make a reference batch: images and the statistics of their features, in the official layout.

IMAGES is an .npz with arr_0, a folder of pictures (PNG or JPEG, at any depth), or a folder of IDX files
("fashion-mnist": where Debian installs them; its test images).

Examples, which made the bundled references fmnist32, scenes32 (which also holds what scripts/depth_metrics.py compares
with) and icons32 (images with labels, for any --backend of the evaluator):
    python scripts/make_reference.py fashion-mnist evaluations/models/fmnist32_reference.npz --backend fashion_mnist \
        --keep features
    python scripts/scenes_render.py --seed 1 --num_images 10000 --out scenes.npz
    python scripts/make_reference.py scenes.npz evaluations/models/scenes32_reference.npz --backend scenes \
        --keep features --half True
    python scripts/icons_render.py --image_size 32 --out data/icons32
    python scripts/make_reference.py data/icons32/test evaluations/models/icons32_reference.npz --statistics False \
        --classes folders
"""

from collections.abc import Sequence

from evaluations.make_reference import ReferenceOptions, make_reference
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, options_parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr(dist_util.is_main())
    parser = options_parser(argv, ReferenceOptions, description=__doc__,
                            words=Words("FILE", "the images, then the file to write"))
    words, (options,) = parser.read(argv)
    if len(words) != 2:
        raise UserError(f"{len(words)} words given: the images and the file to write are needed")
    images, out = words
    made = make_reference(images, out, options, parser.given)
    if made:
        print(made)


if __name__ == "__main__":
    run_script(main)
