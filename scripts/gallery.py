"""Make a gallery of finished runs: a page in Markdown with the first images of each, and the command that made them.

Example:
    python scripts/gallery.py runs/gallery/smileys runs/gallery/rooms_pag --out docs/gallery
"""

import sys
from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.fetch import without_secrets
from guided_diffusion.options import Words, parse_words
from guided_diffusion.runs.gallery import GalleryOptions, make_gallery


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    folders, (options, show) = parse_words(argv, Words("FOLDER", "output folders of sampling runs", needed=True),
                                           GalleryOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    words = sys.argv[1:] if argv is None else argv
    command = ["python", "scripts/gallery.py", *(without_secrets(str(word)) for word in words)]
    tell(make_gallery(folders, options, command), show)


if __name__ == "__main__":
    run_script(main)
