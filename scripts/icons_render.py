"""Render colour icons of five emoji sets, as an image folder with classes or as .npz files.

Examples:
    python scripts/icons_render.py --image_size 32 --out data/icons32
    python scripts/icons_render.py --image_size 64 --format npz --label style --packages node_modules --out data/icons64
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.icons.files import SHEET, IconOptions, write_icons
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, show = parse_options(argv, IconOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    write_icons(options, print)
    tell(f"icons: {options.out}\nsheet: {options.out}/{SHEET}", show)


if __name__ == "__main__":
    run_script(main)
