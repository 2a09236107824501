"""Measure how right the geometry of sampled scenes is, by the depth that a network trained on scenes sees in them.

The reference is a file of RGB scenes (arr_0, 32x32), or the bundled one by name, 10,000 held-out scenes.

    dFID            FID between depth maps of real and of generated images, both estimated by the extractor of
                    scenes (as in arXiv 2212.08861 both come from one network), as 8-bit images,
                    round((d + 1) * 127.5), on the 64 pooled features of the classifier of Fashion-MNIST
    FID             of the RGB images, on the 64 pooled features of the extractor of scenes
    edge sharpness  mean over the images of the mean magnitude of the depth gradient, in metres per pixel, over the
                    tenth of the pixels where it is largest; the gradient is that of forward differences
    sharpness gap   its distance from that of the real scenes

The extractor smooths: its depth maps of real scenes have three quarters of the true edge sharpness. These numbers
compare with no others: not with those of Inception, nor with those of another number of images. Intervals are 95 %
intervals by bootstrap. Differences are to the first sample file, by the same resampled image indices in both: with the
same seed, image i begins in the same noise in every file.

Example:
    python scripts/depth_metrics.py scenes32 runs/reproduction/scenes32_dag/*/samples_2000x32x32x3.npz --json depth.json
"""

from collections.abc import Sequence

from evaluations.depth.metrics import DepthMetricsOptions, measure_depth
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    words, (options,) = parse_words(argv, Words("FILE", "the reference, then the sample files"), DepthMetricsOptions,
                                    description=__doc__)
    dist_util.one_process()
    if len(words) < 2:
        raise UserError(f"{len(words)} files given: the reference and one or more sample files are needed")
    print(measure_depth(words[0], words[1:], options))


if __name__ == "__main__":
    run_script(main)
