"""Convert an LSUN lmdb database into a folder of images, as the official command of this name does.

Example:
    python scripts/lsun_bedroom.py lsun/bedroom_train_lmdb data/bedrooms --image-size 256 --prefix bedroom

`prepare_images.py` does the same for other data, with classes and a manifest.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.options import Options, Words, option, parse_words
from guided_diffusion.prepare import PrepareOptions, prepare


@dataclass(frozen=True)
class LsunOptions(Options):
    """The images."""

    image_size: int = option(256, "height and width in pixels, also --image-size", minimum=1, maximum=2**14)
    prefix: str = option("bedroom", "name of the class, with which the names of the files begin")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    given = sys.argv[1:] if argv is None else argv
    arguments = [word.replace("--image-size", "--image_size", 1) if word.startswith("--") else word for word in given]
    paths = Words("PATH", "the lmdb database, then the folder to write", needed=True)
    words, (options,) = parse_words(arguments, paths, LsunOptions, description=__doc__)
    dist_util.one_process()
    if len(words) != 2:
        raise UserError(f"{len(words)} names given: the lmdb database and the folder to write are needed")
    prepare(words[0], PrepareOptions(out=words[1], image_size=options.image_size, crop="box", labels="none",
                                     name=options.prefix), print)
    tell(f"images: {words[1]}")


if __name__ == "__main__":
    run_script(main)
