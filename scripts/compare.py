"""Draw the same images under several settings, one block below the other.

Example:
    python scripts/compare.py samples/unguided samples/sag --out samples/comparison.png
"""

from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.options import Words, parse_words
from guided_diffusion.runs.comparison import ComparisonOptions, compare_runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    folders, (options,) = parse_words(argv, Words("FOLDER", "output folders of sampling runs", needed=True),
                                      ComparisonOptions, description=__doc__)
    print(compare_runs(folders, options))


if __name__ == "__main__":
    run_script(main)
