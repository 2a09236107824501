"""Evaluate sample files against a reference batch: FID, sFID, Inception Score, precision, recall, and more.

    python evaluations/evaluator.py VIRTUAL_imagenet128_labeled.npz samples_50000x128x128x3.npz
    python evaluations/evaluator.py fmnist32 samples_1000x32x32x3.npz --backend fashion_mnist
    python evaluations/evaluator.py scenes32 samples_2000x32x32x3.npz --backend scenes

The reference is a file in the official layout, or a bundled one by name (fmnist32, scenes32). Each file may also be an
.npy of images (N, H, W, 3) uint8, a folder or a .zip of pictures, or the output folder of a sampling run. Under mpiexec
or torchrun the ranks share the images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from evaluations.evaluation import Evaluation, evaluation_job
from evaluations.evaluation_results import summary
from evaluations.evaluator_options import EvaluatorOptions
from evaluations.extractor_options import ExtractorOptions
from evaluations.extractor_options import ExtractorOptions as NetworkOptions
from evaluations.features import feature_folder
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, options_parser
from guided_diffusion.progress import aside
from guided_diffusion.runs.command import say_note
from guided_diffusion.runs.effects import in_words

__all__ = ["Evaluation", "EvaluatorOptions", "NetworkOptions", "main", "warn"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = options_parser(argv, ExtractorOptions, EvaluatorOptions, ShowOptions, description=__doc__,
                            words=Words("FILE", "the reference batch, then the sample files"))
    words, (extractor, options, show) = parser.read(argv)
    if len(words) < 2:
        raise UserError(f"{len(words)} files given: the reference batch and one or more sample files are needed")
    log_to_stderr(dist_util.is_main())
    dist_util.connect()
    with dist_util.together():
        evaluation = Evaluation(words[0], words[1:], extractor, options, warn=warn)
    say_note(in_words(extractor.useless() | options.useless(), parser.given))
    with evaluation_job(options.json, evaluation.samples[bool(options.held_out)].path), \
            feature_folder(extractor.cache) as folder:
        results = evaluation.run(folder)
    dist_util.shutdown()
    if results:
        drawn = {"plot": options.plot, "nearest": options.nearest}
        tell("\n".join([summary(results), *(f"{name}: {path}" for name, path in drawn.items() if path)]), show)


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    with aside():
        print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
