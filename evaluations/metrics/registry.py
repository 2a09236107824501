"""The metrics of the evaluator, in the order in which it prints them. Everything else loops over `METRICS`.

To add a metric, write its functions in a file of this package and its record here. A comparison has the features of
the reference and of the samples, by kind:

    def _brightness(comparison: Comparison) -> float:
        return float(comparison.sample[Feature.POOLED].mean())

    Metric("brightness", "Brightness", HIGHER, Feature.POOLED, _brightness,
           lambda comparison: Resampled(resampled_mean(comparison.sample[Feature.POOLED].mean(axis=1)),
                                        comparison.sample.count))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import combinations
from numbers import Real
from typing import NamedTuple

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.options import nearest, shortened

from .authenticity import share_replicates
from .bootstrap import (
    Interval,
    Replicates,
    Statistic,
    bootstrap_replicates,
    resampled_mean,
    unknown_replicates,
)
from .comparison import DENSITY_K, MANIFOLD_K, OF_DEPTH, OF_PIXELS, Comparison, Feature
from .extrapolation import (
    FEWEST,
    TRUSTED,
    frechet_distance_at_infinity,
    order_replicates,
    resampled_frechet_distance_at_infinity,
)
from .frechet import frechet_distance, resampled_frechet_distance
from .inception_score import inception_score, resampled_inception_score
from .kid import kid, resampled_kid
from .mind import mind, resampled_mind
from .subsets import subset_coverage, subset_recall, subset_replicates
from .verdicts import HIGHER, LOWER, Direction

SPLIT_SIZE = 5000               # images of a split of the Inception Score, as in the official evaluator
KID_IMAGES = 10_000             # images of each file that KID uses at most


class FromReference(Enum):
    """What a metric needs of the reference."""

    NOTHING = 0
    STATISTICS = 1              # mean and covariance of features of the metric's kind
    FEATURES = 2                # the features themselves


class Resampled(NamedTuple):
    """A metric of resampled images.

    sizes: how many images there are, as `bootstrap` takes it. replicates: draws them, from the statistic, the sizes,
    the value of the metric, the number of drawings and the seed.
    """

    statistic: Statistic
    sizes: int | Sequence[int]
    replicates: Callable[[Statistic, int | Sequence[int], float, int, int], Replicates] = bootstrap_replicates


@dataclass(frozen=True)
class Metric:
    """A metric of a sample file beside a reference.

    word: its name in options and results. title: its name as the evaluator prints it. feature: the kind of features
    that it reads. value, resampled: compute it, and the same of resampled images. needs: what it needs of the
    reference. neighbours: k of its nearest neighbours, 0 for none. fewest: images that it needs of each file.
    per_feature: samples for each feature, below which it lies beside the truth. official: whether the evaluator
    computes it unless told otherwise. if_nan: what it means that the value is not a number.
    falls_with_count: whether it is lower the more samples there are of one distribution, so that an interval is of the
    metric of so many images. of_fewer: whether it takes no more images of either file than the other one has.
    by_network: its name with features of a network that is not the Inception of 2015, with {} for that; "" where its
    name says nothing of the Inception. by_halves: whether its resamplings are random halves of the samples. least,
    most: its smallest and its largest possible value. is_magnitude: whether it is the magnitude of a number that may
    have either sign. Its resamplings are those of that number, with the sign that makes the number itself positive.
    by_seed: whether its value depends on the seed, of images or directions that it draws.
    """

    word: str
    title: str
    direction: Direction
    feature: Feature
    value: Callable[[Comparison], float]
    resampled: Callable[[Comparison], Resampled]
    needs: FromReference = FromReference.NOTHING
    neighbours: int = 0
    fewest: int = 2
    per_feature: int = 0
    official: bool = False
    if_nan: str = "it is not a number"
    falls_with_count: bool = False
    of_fewer: bool = False
    by_network: str = ""
    by_halves: bool = False
    least: float = 0.0
    most: float = math.inf
    is_magnitude: bool = False
    by_seed: bool = False

    @property
    def label(self) -> str:
        """The name within a sentence or a table: the title, in small letters where it is not an abbreviation."""
        return self.title.lower() if self.title[1:].islower() else self.title

    def is_called(self, other: Metric) -> bool:
        """Whether another metric has the same title, by the Inception or by another network."""
        return any(self.by(network).title == other.by(network).title for network in ("", "another network"))

    def by(self, network: str) -> Metric:
        """Returns the metric with the name that it has by features of that network; "" leaves its name."""
        return replace(self, title=self.by_network.format(network)) if network and self.by_network else self

    @property
    def range(self) -> tuple[float, float]:
        """Its smallest and its largest possible value."""
        return self.least, self.most

    @property
    def smallest_count(self) -> int:
        """The smallest number of images of each file."""
        return max(self.fewest, 1 + self.neighbours)

    @property
    def needs_depth(self) -> bool:
        """Whether the extractor must estimate depth."""
        return self.feature in OF_DEPTH

    @property
    def needs_network(self) -> bool:
        """Whether the extractor must compute its features of images."""
        return self.feature not in OF_DEPTH | OF_PIXELS

    def measured(self, comparison: Comparison) -> float:
        """Returns the value, NaN in place of infinity too. Raises UserError where it is no number."""
        value = self.value(comparison)
        if not isinstance(value, Real):
            raise UserError(f"{self.word}: its value is {' '.join(shortened(value).split())}, it must be a number")
        return float(value) if math.isfinite(value) else math.nan

    def interval(self, comparison: Comparison, replicates: int) -> Interval | None:
        """Returns the 95 % interval by so many resamplings, None where there is none that keeps its promise.

        Raises UserError for fewer than 2.
        """
        return self.bounds(self.replicates(comparison, replicates))

    def bounds(self, number: Replicates) -> Interval | None:
        """Returns the 95 % interval of one of its numbers, within the values that it can have; None as `interval`.

        That of a magnitude is the interval of the signed number, folded at 0. Differences of numbers have no bounds.
        """
        interval = number.interval
        if interval is None:
            return None
        low, high = interval
        if self.is_magnitude:
            high = max(high, -low)
        return Interval(min(max(low, self.least), self.most), min(max(high, self.least), self.most))

    def no_interval(self, number: Replicates) -> str:
        """Why one of its numbers has no interval, in words."""
        return self.if_nan if math.isnan(number.estimate) else number.unknown

    def replicates(self, comparison: Comparison, count: int) -> Replicates:
        """Returns the value with those of `count` resamplings, which are the same for files of equally many images.

        Raises UserError for fewer than 2.
        """
        statistic, sizes, replicates = self.resampled(comparison)
        return replicates(statistic, sizes, self.measured(comparison), count, comparison.settings.seed)


def _frechet(word: str, title: str, feature: Feature, official: bool, by_network: str = "") -> Metric:
    """The record of a Frechet distance between features of a kind."""
    def value(comparison: Comparison) -> float:
        return frechet_distance(*comparison.reference.statistics(feature), *comparison.sample.statistics(feature))

    def resampled(comparison: Comparison) -> Resampled:
        statistic = resampled_frechet_distance(*comparison.reference.statistics(feature), comparison.sample[feature])
        if why := comparison.sample.unresampled(feature):
            return Resampled(statistic, comparison.sample.count, partial(_unknown, why=why))
        return Resampled(statistic, comparison.sample.count)

    return Metric(word, title, LOWER, feature, value, resampled, FromReference.STATISTICS, official=official,
                  falls_with_count=True, by_network=by_network)


def _unknown(statistic: Statistic, sizes: int | Sequence[int], estimate: float, replicates: int, seed: int,
             why: str) -> Replicates:
    return unknown_replicates(estimate, replicates, why)


def _of_samples(word: str, title: str, values: Callable[[Comparison], np.ndarray], neighbours: int,
                official: bool = False, most: float = 1) -> Metric:
    """The record of the mean of `values`, one for each sample, that come from nearest neighbours in the reference."""
    def value(comparison: Comparison) -> float:
        return float(values(comparison).mean())

    def resampled(comparison: Comparison) -> Resampled:
        found = values(comparison)
        return Resampled(resampled_mean(found), len(found))

    return Metric(word, title, HIGHER, Feature.POOLED, value, resampled, FromReference.FEATURES, neighbours,
                  official=official, most=most)


def _of_reference(word: str, title: str, values: Callable[[Comparison], np.ndarray],
                  of_subsets: Callable[[np.ndarray, np.ndarray, int], Statistic], neighbours: int,
                  official: bool = False) -> Metric:
    """The record of the mean of `values`, one for each reference image: of those that lie near to samples."""
    def value(comparison: Comparison) -> float:
        return float(values(comparison).mean())

    def resampled(comparison: Comparison) -> Resampled:
        reference, sample = comparison.reference[Feature.POOLED], comparison.sample[Feature.POOLED]
        return Resampled(of_subsets(reference, sample, neighbours), len(sample),
                         partial(subset_replicates, reference_images=len(reference)))

    return Metric(word, title, HIGHER, Feature.POOLED, value, resampled, FromReference.FEATURES, neighbours,
                  official=official, by_halves=True, most=1)


def _inception_score(comparison: Comparison) -> float:
    return inception_score(comparison.sample[Feature.PROBABILITIES], SPLIT_SIZE)


def _resampled_inception_score(comparison: Comparison) -> Resampled:
    count = comparison.sample.count
    splits = [min(SPLIT_SIZE, count - start) for start in range(0, count, SPLIT_SIZE)]
    return Resampled(resampled_inception_score(comparison.sample[Feature.PROBABILITIES], SPLIT_SIZE), splits)


def _kid(comparison: Comparison) -> float:
    return kid(comparison.reference[Feature.POOLED], comparison.sample[Feature.POOLED], KID_IMAGES,
               comparison.settings.seed)


def _resampled_kid(comparison: Comparison) -> Resampled:
    statistic = resampled_kid(comparison.reference[Feature.POOLED], comparison.sample[Feature.POOLED], KID_IMAGES,
                              comparison.settings.seed)
    return Resampled(statistic, min(comparison.sample.count, KID_IMAGES))


def _mind(comparison: Comparison) -> float:
    return mind(comparison.reference[Feature.POOLED], comparison.sample[Feature.POOLED],
                seed=comparison.settings.seed)


def _resampled_mind(comparison: Comparison) -> Resampled:
    reference, sample = comparison.reference[Feature.POOLED], comparison.sample[Feature.POOLED]
    return Resampled(resampled_mind(reference, sample, seed=comparison.settings.seed), min(len(reference), len(sample)))


def _fid_at_infinity(comparison: Comparison) -> float:
    return frechet_distance_at_infinity(*comparison.reference.statistics(Feature.POOLED),
                                        comparison.sample[Feature.POOLED], comparison.settings.seed)


def _resampled_fid_at_infinity(comparison: Comparison) -> Resampled:
    statistic = resampled_frechet_distance_at_infinity(*comparison.reference.statistics(Feature.POOLED),
                                                       comparison.sample[Feature.POOLED])
    return Resampled(statistic, comparison.sample.count, order_replicates)


def _percentage(word: str, title: str, feature: Feature, values: Callable[[Comparison], np.ndarray],
                needs: FromReference = FromReference.NOTHING) -> Metric:
    """The record of the share of samples, in percent, of which `values`, 0 or 1, are 1."""
    def value(comparison: Comparison) -> float:
        return 100 * float(values(comparison).mean())

    def resampled(comparison: Comparison) -> Resampled:
        found = values(comparison)
        return Resampled(resampled_mean(100 * found), len(found), share_replicates)

    return Metric(word, title, HIGHER, feature, value, resampled, needs, most=100)


def _of_images(word: str, title: str, direction: Direction, feature: Feature, most: float = math.inf) -> Metric:
    """The record of the mean of features that are one number an image, at most `most`."""
    def value(comparison: Comparison) -> float:
        return float(np.mean(comparison.sample[feature]))

    def resampled(comparison: Comparison) -> Resampled:
        return Resampled(resampled_mean(comparison.sample[feature]), comparison.sample.count)

    return Metric(word, title, direction, feature, value, resampled, most=most)


_SHARPNESS = _of_images("sharpness", "Edge sharpness", Direction("sharper", "softer"), Feature.SHARPNESS)


def _real_sharpness(comparison: Comparison) -> float:
    return float(np.mean(comparison.reference[Feature.SHARPNESS]))


def _sharpness_gap(comparison: Comparison) -> float:
    return abs(_SHARPNESS.value(comparison) - _real_sharpness(comparison))


def _resampled_sharpness_gap(comparison: Comparison) -> Resampled:
    resampled, real = _SHARPNESS.resampled(comparison), _real_sharpness(comparison)
    sign = 1 if _SHARPNESS.value(comparison) >= real else -1
    return Resampled(lambda counts: sign * (resampled.statistic(counts) - real), resampled.sizes)


METRICS: dict[str, Metric] = {metric.word: metric for metric in (
    Metric("is", "Inception Score", HIGHER, Feature.PROBABILITIES, _inception_score, _resampled_inception_score,
           official=True, if_nan="a class has probability 0 for some image, so that the Inception Score is not a "
                                 "number, as in the official evaluator", by_network="Score of classes by {}", least=1),
    _frechet("fid", "FID", Feature.POOLED, official=True, by_network="Frechet distance by {} features"),
    _frechet("sfid", "sFID", Feature.SPATIAL, official=True, by_network="Frechet distance by early {} features"),
    _of_samples("precision", "Precision", lambda comparison: comparison.membership[0], MANIFOLD_K, official=True),
    _of_reference("recall", "Recall", lambda comparison: comparison.membership[1], subset_recall, MANIFOLD_K,
                  official=True),
    Metric("kid", "KID", LOWER, Feature.POOLED, _kid, _resampled_kid, FromReference.FEATURES,
           least=-math.inf, by_network="Kernel distance by {} features", by_seed=True),
    _of_samples("density", "Density", lambda comparison: comparison.neighbourhoods.density, DENSITY_K,
                most=math.inf),
    _of_reference("coverage", "Coverage", lambda comparison: comparison.neighbourhoods.covered, subset_coverage,
                  DENSITY_K),
    # Of depth maps that the extractor estimates (Kim et al., 2212.08861): FID of the maps, sharpness of their edges.
    _frechet("dfid", "dFID", Feature.DEPTH, official=False),
    _SHARPNESS,
    Metric("gap", "Sharpness gap", LOWER, Feature.SHARPNESS, _sharpness_gap, _resampled_sharpness_gap,
           FromReference.FEATURES, is_magnitude=True),
    Metric("mind", "MIND", LOWER, Feature.POOLED, _mind, _resampled_mind, FromReference.FEATURES,
           falls_with_count=True, of_fewer=True, by_seed=True),
    Metric("fid_infinity", "FID at infinity", LOWER, Feature.POOLED, _fid_at_infinity, _resampled_fid_at_infinity,
           FromReference.STATISTICS, fewest=FEWEST, per_feature=TRUSTED, least=-math.inf,
           by_network="Frechet distance at infinity by {} features", by_seed=True),
    _percentage("authenticity", "Authenticity in %", Feature.POOLED, lambda comparison: comparison.authentic,
                FromReference.FEATURES),
    _percentage("class_accuracy", "Class accuracy in %", Feature.CORRECTNESS,
                lambda comparison: comparison.sample[Feature.CORRECTNESS]),
    # Of the pixels themselves.
    _of_images("saturation", "Saturation", Direction("more saturated", "less saturated"), Feature.SATURATION, most=1),
    _of_images("contrast", "Contrast", Direction("more contrast", "less contrast"), Feature.CONTRAST, most=0.5),
)}


def metric_words(text: str) -> list[str]:
    """Returns the words that --metrics names, with commas.

    Raises UserError for one that is no metric's, and for a metric that results could not tell from another one.
    """
    words = text.replace(" ", "").lower().split(",")
    for word in words:
        if word not in METRICS:
            raise UserError(f"--metrics {text}: {word!r} is none of {', '.join(METRICS)}{nearest(word, METRICS)}")
        if (own := METRICS[word].word) != word:
            raise UserError(f"--metrics {text}: METRICS[{word!r}] has the word {own!r}, it must be the same")
    for one, other in combinations(map(METRICS.__getitem__, dict.fromkeys(words)), 2):
        if one.is_called(other):
            raise UserError(f"--metrics {text}: {one.word} and {other.word} are both called {one.title!r}, so that "
                            "results would not tell them apart")
    return words
