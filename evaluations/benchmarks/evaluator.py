"""How much faster the evaluator's numbers come, and in how much memory, than in the official evaluator's ways.

Both ways are timed in turns, so that the ratios hold where the machine is busy, too. TensorFlow takes part where it is
installed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from guided_diffusion.options import Options, option, switch

from ..memory import ResidentMemoryPeak
from ..metrics import RunningStatistics, frechet_distance, precision_recall

Work = Callable[[], object]


class WorkCost(NamedTuple):
    """What a piece of work costs."""

    seconds: float
    megabytes: float    # peak above what the process held before; NaN where the system does not say


class WayComparison(NamedTuple):
    """The cost of some work as this package does it, and in another way."""

    what: str
    other_way: str
    here: WorkCost
    there: WorkCost

    @property
    def ratio(self) -> float:
        """How many times as fast this package is."""
        return self.there.seconds / self.here.seconds


class Sizes(NamedTuple):
    """The sizes of what is measured."""

    channels: int = 2048
    images: int = 10_000            # on each side of precision and recall
    covariance_images: int = 50_000
    inception_images: int = 64      # at 256 x 256


QUICK = Sizes(channels=256, images=1000, covariance_images=5000, inception_images=8)
NO_TENSORFLOW = "TensorFlow is not installed: precision and recall are compared with numpy alone."


def compare(what: str, here: Work, others: Mapping[str, Work], repeats: int) -> list[WayComparison]:
    """Runs each way `repeats` times, in turns; takes the fastest run and the highest peak of each.

    what: the work in words. here: the work as this package does it. others: other ways by name.
    """
    costs: dict[str, list[WorkCost]] = {name: [] for name in ("", *others)}
    for _ in range(repeats):
        for name, work in (("", here), *others.items()):
            costs[name].append(measure_work(work))
    best = {name: WorkCost(min(cost.seconds for cost in runs), max(cost.megabytes for cost in runs))
            for name, runs in costs.items()}
    return [WayComparison(what, name, best[""], best[name]) for name in others]


def measure_work(work: Work) -> WorkCost:
    """The time of one run and the peak of its resident memory."""
    with ResidentMemoryPeak() as memory:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return WorkCost(seconds, memory.peak / 1e6)


# What is compared


def comparisons(sizes: Sizes, repeats: int, inception: str | None = None) -> Iterator[WayComparison]:
    """All comparisons, each as soon as it is measured; inception: the graph's file, None leaves that one out."""
    rng = np.random.default_rng(0)
    yield from compare_frechet(sizes, repeats, rng)
    yield from compare_neighbours(sizes, repeats, rng)
    yield from compare_covariance(sizes, repeats, rng)
    if inception:
        yield from compare_inception(inception, sizes, repeats, rng)


def compare_frechet(sizes: Sizes, repeats: int, rng: np.random.Generator) -> list[WayComparison]:
    """The Fréchet distance, against the matrix square root alone that the official code takes."""
    channels = sizes.channels
    sigma1, sigma2 = (np.cov(_features(rng, 2 * channels, channels), rowvar=False) for _ in range(2))
    mu = np.zeros(channels)
    return compare(f"Fréchet distance, {channels} channels", lambda: frechet_distance(mu, sigma1, mu, sigma2),
                   {"scipy.linalg.sqrtm of the product": lambda: scipy.linalg.sqrtm(sigma1 @ sigma2)}, repeats)


def compare_neighbours(sizes: Sizes, repeats: int, rng: np.random.Generator) -> list[WayComparison]:
    """Precision and recall, against whole matrices of distances in numpy and, where it is installed, TensorFlow."""
    reference, sample = (_features(rng, sizes.images, sizes.channels) for _ in range(2))
    plain = functools.partial(whole_precision_recall, reference, sample, numpy_distances)
    ways = {"numpy in float32, whole matrices": plain}
    tensorflow = _tensorflow_distances()
    if tensorflow:
        tensorflow(reference[:8], sample[:8])           # traced before it is timed
        official = functools.partial(whole_precision_recall, reference, sample, tensorflow)
        ways = {"TensorFlow, as the official code": official, **ways}
    return compare(f"Precision and recall, {sizes.images:,} x {sizes.images:,} x {sizes.channels}",
                   lambda: precision_recall(reference, sample), ways, repeats)


def compare_covariance(sizes: Sizes, repeats: int, rng: np.random.Generator) -> list[WayComparison]:
    """The covariance of features that come in pieces, against numpy.cov of all."""
    features = _features(rng, sizes.covariance_images, sizes.channels)

    def streamed() -> np.ndarray:
        running = RunningStatistics()
        for start in range(0, len(features), 500):
            running.update(features[start:start + 500])
        return running.covariance

    return compare(f"Covariance, {sizes.covariance_images:,} x {sizes.channels}", streamed,
                   {"numpy.cov": lambda: np.cov(features, rowvar=False)}, repeats)


def compare_inception(path: str, sizes: Sizes, repeats: int, rng: np.random.Generator) -> list[WayComparison]:
    """Features of the Inception in the file `path`, against TensorFlow."""
    from ..extractors.inception import InceptionExtractor
    from ..extractors.tensorflow import TensorflowExtractor

    images = rng.integers(0, 256, (sizes.inception_images, 256, 256, 3), dtype=np.uint8)
    here, there = InceptionExtractor(path), TensorflowExtractor(path)
    for network in (here, there):
        network.features(images[:2])
    return compare(f"Inception, {len(images)} images of 256 x 256", lambda: here.features(images),
                   {"TensorFlow": lambda: there.features(images)}, repeats)


def _features(rng: np.random.Generator, images: int, channels: int) -> np.ndarray:
    """Random features (images, channels) like those of a network: not negative, correlated, float32."""
    latent = rng.standard_normal((images, 64), dtype=np.float32)
    features = latent @ rng.standard_normal((64, channels), dtype=np.float32) / 8
    features += rng.standard_normal((images, channels), dtype=np.float32)
    return np.maximum(features, 0, out=features)


# The official evaluator's ways


Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]


def numpy_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squared distances in float32 by the formula |u|^2 - 2 u.v + |v|^2."""
    squares = (np.square(features).sum(axis=1) for features in (left, right))
    return np.maximum(next(squares)[:, None] - 2 * (left @ right.T) + next(squares), 0)


def whole_precision_recall(reference: np.ndarray, sample: np.ndarray, distances: Distances,
                           k: int = 3) -> tuple[float, float]:
    """Precision and recall from whole matrices of distances, as the official evaluator has them for 10,000 images."""
    reference_radii, sample_radii = (np.partition(distances(features, features), np.arange(k + 1), axis=1)[:, k]
                                     for features in (reference, sample))
    squared = distances(reference, sample)
    return (float((squared <= reference_radii[:, None]).any(axis=0).mean()),
            float((squared <= sample_radii).any(axis=1).mean()))


def _tensorflow_distances() -> Distances | None:
    """Squared distances in half precision, or in single precision if they overflow; None without TensorFlow."""
    try:
        import tensorflow as tf
    except ImportError:
        return None

    def squared(left: Any, right: Any) -> Any:
        left_squares = tf.reduce_sum(tf.square(left), axis=1)[:, None]
        right_squares = tf.reduce_sum(tf.square(right), axis=1)[None]
        return tf.maximum(left_squares - 2 * tf.matmul(left, right, transpose_b=True) + right_squares, 0)

    @tf.function(reduce_retracing=True)
    def distances(left: Any, right: Any) -> Any:
        half = squared(tf.cast(left, tf.float16), tf.cast(right, tf.float16))
        return tf.cond(tf.reduce_all(tf.math.is_finite(half)), lambda: tf.cast(half, tf.float32),
                       lambda: squared(left, right))

    return lambda left, right: distances(left, right).numpy()


# The table


HEADER = "| What | Compared with | Times as fast | Seconds | Seconds there | Peak, MB | Peak there, MB |"


def row(comparison: WayComparison) -> str:
    """A row of the table, as Markdown."""
    here, there = comparison.here, comparison.there
    cells = (comparison.what, comparison.other_way, f"{comparison.ratio:.1f}", f"{here.seconds:.3g}",
             f"{there.seconds:.3g}", f"{here.megabytes:.0f}", f"{there.megabytes:.0f}")
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class EvaluatorBenchmarkOptions(Options):
    """The measurement."""

    quick: bool = switch("smaller sizes: seconds instead of minutes")
    repeats: int = option(2, "runs of each way, of which the fastest counts", minimum=1)
    inception: str = option("", "the graph of the 2015 Inception, to time that as well; unset: it is left out")


def benchmark_evaluator(options: EvaluatorBenchmarkOptions) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    yield HEADER
    yield "| --- | --- |" + " ---: |" * 5
    for comparison in comparisons(QUICK if options.quick else Sizes(), options.repeats, options.inception or None):
        yield row(comparison)
    yield "\nPeaks of the resident memory are above the features and images themselves."
    if _tensorflow_distances() is None:
        yield NO_TENSORFLOW
