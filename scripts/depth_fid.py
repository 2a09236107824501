"""Compute dFID of depth maps that were estimated with any network: FID between two sets of them, seen as images.

A file holds depth, (N, H, W) numbers; estimate those of real and of generated images with one and the same network
(arXiv 2212.08861 has a DPT). A file without depth holds grey images of it, arr_0, such as the samples of a depth prior.
Each map becomes an 8-bit image, round((d + 1) * 127.5), with d from -1 to 1: over its own range, or that of
--depth_range. Then they are images as any others for evaluations/evaluator.py, whose options of the network are here
too: Inception of 2015 unless told otherwise. Under mpiexec or torchrun the ranks share the maps.

Example:
    python scripts/depth_fid.py real_depth.npz unguided_depth.npz dcg_depth.npz --bootstrap 200
"""

from collections.abc import Sequence

from evaluations.depth.fid import DepthFidOptions, depth_fid, in_words
from evaluations.evaluator import warn
from evaluations.extractor_options import ExtractorOptions
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, options_parser
from guided_diffusion.runs import effects
from guided_diffusion.runs.command import say_note


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = options_parser(argv, ExtractorOptions, DepthFidOptions, description=__doc__,
                            words=Words("FILE", "the reference, then the sample files, of depth maps"))
    words, (extractor, options) = parser.read(argv)
    if len(words) < 2:
        raise UserError(f"{len(words)} files given: the reference and one or more sample files are needed")
    log_to_stderr(dist_util.is_main())
    say_note(effects.in_words(extractor.useless() | options.useless(), parser.given))
    results = depth_fid(words[0], words[1:], extractor, options, warn)
    if results:
        print(in_words(results))
    dist_util.shutdown()


if __name__ == "__main__":
    run_script(main)
