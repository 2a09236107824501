"""Make a gallery of finished runs: a page in Markdown with the first images of each, and the command that made them.

Example:
    python scripts/gallery.py runs/gallery/smileys runs/gallery/rooms_pag --out docs/gallery
"""

import shlex
import sys
from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.options import Words, parse_words
from guided_diffusion.runs.gallery import GalleryOptions, make_gallery


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    folders, (options,) = parse_words(argv, Words("FOLDER", "output folders of sampling runs", needed=True),
                                      GalleryOptions, description=__doc__)
    words = sys.argv[1:] if argv is None else argv
    print(make_gallery(folders, options, shlex.join(["python", "scripts/gallery.py", *map(str, words)])))


if __name__ == "__main__":
    run_script(main)
