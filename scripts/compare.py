"""Draw the same images under several settings, one block below the other.

Example:
    python scripts/compare.py samples/unguided samples/sag --out samples/comparison.png
"""

import argparse
from pathlib import Path

from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from guided_diffusion.pictures import save_comparison
from guided_diffusion.runs.record import run_samples, title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of sampling runs")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--num_images", type=int, default=40, help="images of each run (default: 40)")
    arguments = parser.parse_args()
    if arguments.num_images < 1:
        raise UserError(f"--num_images {arguments.num_images}: must be at least 1")
    rows = {}
    for folder in arguments.folders:
        images, configuration = run_samples(folder, arguments.num_images)
        name = f"{folder.resolve().name}: {title(configuration)}"
        rows[f"{folder}: {title(configuration)}" if name in rows else name] = images
    save_comparison(rows, arguments.out)
    print(f"comparison: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
