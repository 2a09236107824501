"""Fetch released checkpoints of guided-diffusion, after saying under which licence and how large they are.

Examples:
    python scripts/fetch_models.py --list
    python scripts/fetch_models.py 128x128_diffusion 128x128_classifier
    python scripts/image_sample.py --model 128x128_diffusion --model_path models/128x128_diffusion.pt
"""

import argparse
from pathlib import Path

from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from guided_diffusion.presets import description, fetch_released, find_released


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="released checkpoints, as --list names them")
    parser.add_argument("--all", action="store_true", help="fetch every released checkpoint")
    parser.add_argument("--list", action="store_true", help="say what there is and fetch nothing")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for the files (default: models)")
    parser.add_argument("--sha256", metavar="HEX", help="SHA-256 that the file of the one NAME must have")
    arguments = parser.parse_args()
    presets = find_released(arguments.names, every=arguments.all or arguments.list)
    if arguments.sha256 and len(presets) > 1:
        raise UserError(f"--sha256 {arguments.sha256}: is that of one file, name one checkpoint")
    for preset in presets:
        print(description(preset, ask=not arguments.list), flush=True)
    for preset in presets if not arguments.list else []:
        print(fetch_released(preset, arguments.out, arguments.sha256), flush=True)


if __name__ == "__main__":
    run_script(main)
