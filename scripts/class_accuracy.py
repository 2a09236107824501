"""Measure class accuracy: the share of samples that a classifier names as the class asked for.

The classifier has seen clean images alone, of Fashion-MNIST or (--classifier icons) of icons, and takes no part in
sampling.
A sample file holds arr_0, (N, 32, 32, 3) uint8, and arr_1, (N,) the classes asked for.

Examples:
    python scripts/class_accuracy.py samples/*/samples_*.npz --json accuracy.json
    python scripts/class_accuracy.py samples/smileys/samples_*.npz --classifier icons
"""

from collections.abc import Sequence

from evaluations.class_accuracy import ClassAccuracyOptions, class_accuracy
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    samples, (options,) = parse_words(argv, Words("SAMPLES.npz", "sample files with labels", needed=True),
                                      ClassAccuracyOptions, description=__doc__)
    dist_util.one_process()
    print(class_accuracy(samples, options))


if __name__ == "__main__":
    run_script(main)
