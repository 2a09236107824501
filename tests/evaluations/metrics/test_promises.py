"""What 95 % promises: simulations of every metric's intervals and of its words, and the subsets behind recall's."""

import itertools

import numpy as np
import pytest

from evaluations.metrics import (
    METRICS,
    Comparison,
    ComparisonSettings,
    Feature,
    FeatureSet,
    Replicates,
    density_coverage,
    precision_recall,
    resampled_mean,
    subset_coverage,
    subset_recall,
)
from evaluations.metrics.bootstrap import bootstrap_interval, bootstrap_replicates, known_replicates
from guided_diffusion.errors import UserError

# 144 sets of images. halves: of metrics whose spread itself is estimated.
REPLICATES, HALVES, GROUPS = 40, 60, 36
ELSEWHERE = {"mind", "fid_infinity", "authenticity", "saturation", "contrast",      # in test_further_promises
             "class_accuracy"}          # is resampled as authenticity is
WORDS = [word for word in METRICS if word not in ELSEWHERE]


class Distribution:
    """Sets of images of one distribution, as features of every kind."""

    def __init__(self, scale: float, shift: float, sharpness: float) -> None:
        self.scale, self.shift, self.sharpness = scale, shift, sharpness
        self.classes = np.random.default_rng(0).standard_normal((6, 5))

    def drawn(self, noise: np.ndarray, sharp: np.ndarray) -> FeatureSet:
        """Returns the images of standard normal noise (n, 6) and of sharpnesses (n,) of mean 1."""
        pooled = noise * self.scale + self.shift
        logits = np.exp(pooled @ self.classes / 2)
        return FeatureSet({
            Feature.POOLED: pooled, Feature.SPATIAL: pooled[:, :3], Feature.DEPTH: pooled[:, 3:],
            Feature.PROBABILITIES: logits / logits.sum(axis=1, keepdims=True),
            Feature.SHARPNESS: sharp * self.sharpness})


def kept(metric):
    """The replicates of a metric as the evaluator computes them."""
    return lambda comparison: metric.replicates(comparison, HALVES if metric.by_halves else REPLICATES)


def of_other_references(values):
    """The replicates of a share of the reference images as other reference images beside the same samples move it."""
    def replicates(comparison):
        shares = values(comparison)
        return bootstrap_replicates(resampled_mean(shares), len(shares), float(shares.mean()), REPLICATES, 0)

    return replicates


KEPT = {word: kept(METRICS[word]) for word in WORDS}
BROKEN = {"recall of other references": of_other_references(lambda comparison: comparison.membership[1]),
          "coverage of other references": of_other_references(lambda comparison: comparison.neighbourhoods.covered)}


def simulated(random, reference, distribution, images, common):
    """The replicates of every metric, of sets of images in groups of 4 that have that part of their noise in common."""
    found = {word: [] for word in KEPT | BROKEN}
    for _ in range(GROUPS):
        shared_noise, shared_sharpness = random.standard_normal((images, 6)), random.gamma(9, 1 / 9, images)
        for _ in range(4):
            noise = common * shared_noise + np.sqrt(1 - common**2) * random.standard_normal((images, 6))
            sharpness = np.where(random.random(images) < common, shared_sharpness, random.gamma(9, 1 / 9, images))
            comparison = Comparison(reference, distribution.drawn(noise, sharpness),
                                    ComparisonSettings(full_neighbourhoods=True))
            for word, replicates in (KEPT | BROKEN).items():
                found[word].append(replicates(comparison))
    return found


def excludes(interval, value):
    return not interval.low <= value <= interval.high


@pytest.mark.slow
@pytest.mark.parametrize("reference_images, images, shift, common", [(500, 150, 0.4, 0.0), (250, 300, 0.7, 0.8)],
                         ids=["few samples", "many samples, with noise in common"])
def test_intervals_and_words_keep_their_promise(reference_images, images, shift, common, drawn_once):
    """Samples are of another distribution than the reference, as those of every network are.

    Where they are of the same one, intervals of FID and KID are up to half as wide again as they should be. Intervals
    that break the promise show that the simulation would see it.
    """
    random = np.random.default_rng(3)
    reference = Distribution(1, 0, 1).drawn(random.standard_normal((reference_images, 6)),
                                            random.gamma(9, 1 / 9, reference_images))
    found = simulated(random, reference, Distribution(0.85, shift, 1.2), images, common)
    seen = {word: (round(share_that_holds_the_mean(numbers), 3), round(share_of_false_words(numbers), 3))
            for word, numbers in found.items()}
    broken = {word for word, (held, false_words) in seen.items() if not 0.90 <= held <= 0.98 or false_words > 0.08}
    assert broken == BROKEN.keys(), seen


def share_that_holds_the_mean(numbers):
    """The share of the 95 % intervals that hold the mean of all: 0.95 is promised."""
    mean = np.mean([number.estimate for number in numbers])
    return 1 - np.mean([excludes(number.interval, mean) for number in numbers])


def share_of_false_words(numbers):
    """The share of pairs of sets of one distribution that are called different: 0.05 is promised."""
    return np.mean([excludes(one.minus(other).interval, 0) for first in range(0, len(numbers), 4)
                    for one, other in itertools.combinations(numbers[first:first + 4], 2)])


# Subsets


@pytest.mark.parametrize("replicates", [2, 5, 20, 38, 40])
def test_few_resamplings_promise_no_more_than_they_hold(replicates):
    random, sets = np.random.default_rng(0), 4000
    means = random.standard_normal(sets)
    drawn = random.normal(means[:, None], 1, (sets, replicates))
    bounds = [bootstrap_interval(values, mean) for values, mean in zip(drawn, means, strict=True)]
    assert 0.94 < np.mean([low <= 0 <= high for low, high in bounds]) < 0.975


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_shares_of_subsets_are_recall_and_coverage_of_them(random, monkeypatch):
    reference, sample = random.standard_normal((150, 4)), 1.2 * random.standard_normal((120, 4))
    chosen = np.stack([random.permutation(120) < count for count in (30, 60, 120)])
    expected = ([precision_recall(reference, sample[rows])[1] for rows in chosen],
                [density_coverage(reference, sample[rows])[1] for rows in chosen])
    for _ in range(2):
        assert subset_recall(reference, sample)(chosen).tolist() == expected[0]
        assert subset_coverage(reference, sample)(chosen).tolist() == expected[1]
        monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", 2**10)      # in several blocks


def comparison(sample, reference):
    return Comparison(FeatureSet({Feature.POOLED: reference}), FeatureSet({Feature.POOLED: sample}))


def test_the_interval_of_recall_shrinks_with_the_samples_not_with_the_reference(random):
    def width(images, references):
        found = METRICS["recall"].interval(comparison(random.standard_normal((images, 4)) + 1,
                                                      random.standard_normal((references, 4))), 100)
        return found.high - found.low

    assert width(800, 400) < 0.75 * width(200, 400)
    assert width(200, 1600) > 0.6 * width(200, 400)


@pytest.mark.parametrize("word", ["recall", "coverage"])
def test_there_is_no_interval_where_too_few_images_decide(word, random):
    reference = random.standard_normal((100, 3))
    for sample in (reference + 1e-6 * random.standard_normal(reference.shape), reference + 1000, reference[:20] + 1):
        number = METRICS[word].replicates(comparison(sample, reference), 20)
        assert number.values.shape == (20,) and number.interval is None
        assert number.minus(Replicates(0.5, np.linspace(0.4, 0.6, 20))).interval is None
    with pytest.raises(UserError, match="1 bootstrap replicates"):
        METRICS[word].replicates(comparison(reference + 1, reference), 1)


@pytest.mark.parametrize("word", ["fid", "kid", "mind", "fid_infinity"])
def test_there_is_no_interval_where_all_samples_are_alike(word, random):
    """They say nothing of how far a number moves."""
    metric = METRICS[word]
    reference = random.uniform(0.1, 1, (100, 3))
    number = metric.replicates(comparison(np.repeat(random.uniform(0.1, 1, (1, 3)), 40, axis=0), reference), 20)
    assert number.interval is None and metric.no_interval(number).startswith("all its resamplings give the same number")
    assert metric.replicates(comparison(random.uniform(0.1, 1, (40, 3)), reference), 20).interval is not None


def test_a_number_whose_resamplings_are_no_numbers_says_so():
    number = known_replicates(0.5, np.array([0.4, np.inf, 0.6]))
    assert number.interval is None and METRICS["kid"].no_interval(number) == "some of its resamplings give no number"
    assert METRICS["is"].no_interval(known_replicates(np.nan, np.full(3, np.nan))) == METRICS["is"].if_nan


@pytest.mark.parametrize("word", ["precision", "density"])
def test_there_is_no_interval_where_all_samples_are_outside_or_inside_alike(word, random):
    reference = random.standard_normal((100, 3))
    metric = METRICS[word]
    number = metric.replicates(comparison(reference + 1000, reference), 20)
    assert number.interval is None and metric.no_interval(number).startswith("all its resamplings give the same number")
    assert metric.replicates(comparison(reference + 1, reference), 20).interval is not None
    with pytest.raises(UserError, match="1 bootstrap replicates"):
        metric.replicates(comparison(reference + 1000, reference), 1)


def test_the_same_subsets_are_taken_of_files_of_equally_many_images(random):
    reference, sample = random.standard_normal((300, 4)), random.standard_normal((200, 4)) + 1
    first = METRICS["recall"].replicates(comparison(sample, reference), 50)
    again = METRICS["recall"].replicates(comparison(sample.copy(), reference), 50)
    assert first.minus(again).interval == (0, 0)
