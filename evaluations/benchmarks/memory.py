"""Peak memory of an evaluation of synthetic images by a network of Inception's sizes that computes almost nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.npz import write_batch
from guided_diffusion.options import Options, option

from ..evaluation import Evaluation
from ..evaluator_options import EvaluatorOptions
from ..extractor_options import ExtractorOptions
from ..extractors import EXTRACTORS
from ..features import Features, feature_folder
from ..memory import MIB, process_peak

PIECE = 100


@dataclass(frozen=True)
class MemoryOptions(Options):
    """The measurement."""

    num_images: int = option(50_000, "images in the sample file", minimum=4)
    reference_images: int = option(10_000, "images in the reference", minimum=4)
    image_size: int = option(256, "pixels a side, a multiple of 8", minimum=8)
    metrics: str = option("is,fid,sfid,precision,recall", "as of the evaluator")
    tmp_dir: str = option("", "folder for the temporary files; unset: the system's")


class RandomProjections:
    """An extractor that computes next to nothing: 8 x 8 pixels, projected to as many features as Inception has."""

    name, fingerprint, caveat = "random projections", "0" * 64, ""

    def __init__(self) -> None:
        rng, sizes = np.random.default_rng(0), EXTRACTORS["torch"]
        self.weights = [rng.normal(size=(192, width)).astype(np.float32)
                        for width in (sizes.pooled, sizes.spatial, sizes.probabilities)]

    def features(self, images: np.ndarray) -> Features:
        """Features of images (N, H, W, 3), uint8, with H and W multiples of 8."""
        step = images.shape[1] // 8
        x = images[:, ::step, ::step].reshape(len(images), -1).astype(np.float32) / 255
        pooled, spatial, logits = (x @ weights for weights in self.weights)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Features(pooled, spatial, exponentials / exponentials.sum(axis=1, keepdims=True))


def synthetic_images(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Makes images of 8 x 8 random squares, in pieces (n, size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, PIECE):
        squares = rng.integers(0, 256, (min(PIECE, count - start), 8, 8, 3), np.uint8)
        yield squares.repeat(size // 8, axis=1).repeat(size // 8, axis=2)


def benchmark_memory(options: MemoryOptions) -> str:
    """One line: what was evaluated, in how many seconds, and the peak of resident memory."""
    if options.image_size % 8:
        raise UserError(f"--image_size {options.image_size}: must be a multiple of 8")
    size = options.image_size
    with tempfile.TemporaryDirectory(dir=options.tmp_dir or None) as folder:
        paths = []
        for seed, count in enumerate((options.reference_images, options.num_images)):
            paths.append(Path(folder) / f"{('reference', 'sample')[seed]}.npz")
            write_batch(paths[-1], {}, synthetic_images(count, size, seed), (count, size, size, 3))
        began = time.monotonic()
        evaluation = Evaluation(str(paths[0]), [str(paths[1])], ExtractorOptions(),
                                EvaluatorOptions(metrics=options.metrics), extractor=RandomProjections())
        with feature_folder(folder) as cache:
            evaluation.run(cache)
    peak = process_peak() / MIB
    return (f"{options.num_images} images of {size}x{size} against {options.reference_images}, {options.metrics}: "
            f"{time.monotonic() - began:.0f} s, peak {peak:.0f} MiB")
