r"""Cut images to one size for training: a folder, a .zip or .tar file or an lmdb database to a folder or .npz file.

Examples:
    python scripts/prepare_images.py ILSVRC2012_img_train.tar --labels folders --image_size 64 --out data/imagenet64
    python scripts/prepare_images.py ILSVRC2012_img_val.tar --labels_file LOC_val_solution.csv --image_size 64 \
        --out data/imagenet64_val.npz
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, parse_words
from guided_diffusion.prepare import PrepareOptions, prepare


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    words, (options,) = parse_words(argv, Words("DATA", "folder, .zip or .tar file, or lmdb database", needed=True),
                                    PrepareOptions, description=__doc__)
    dist_util.one_process()
    if len(words) > 1:
        raise UserError(f"{words[1]}: one folder, file or database at a time")
    prepare(words[0], options, print)
    tell(f"images: {options.out}")


if __name__ == "__main__":
    run_script(main)
