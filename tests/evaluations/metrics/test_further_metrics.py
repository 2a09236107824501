"""MIND, FID at infinity, authenticity, saturation and contrast: against computations of a few lines, and bad input."""

import colorsys

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from evaluations.metrics import (
    METRICS,
    Comparison,
    Feature,
    FeatureSet,
    FileFeatures,
    authentic_samples,
    contrast,
    frechet_distance,
    frechet_distance_at_infinity,
    mind,
    resampled_frechet_distance_at_infinity,
    resampled_mind,
    resamplings,
    saturation,
)
from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile, write_batch
from guided_diffusion.rng import stream_generator


@pytest.fixture
def random():
    return np.random.default_rng(0)


# MIND


def plain_mind(reference, sample, directions, seed):
    """The paper's formula, of equally many images."""
    unit = stream_generator("directions", seed).standard_normal((directions, reference.shape[1]))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    squares = [((np.sort(sample @ u) - np.sort(reference @ u)) ** 2).sum() for u in unit]
    return 3 * reference.shape[1] / (len(sample) * directions) * sum(squares)


@pytest.mark.parametrize("blocks", [2**24, 2**9], ids=["at once", "in pieces"])
def test_mind_is_the_formula(random, monkeypatch, blocks):
    monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", blocks)
    reference, sample = random.standard_normal((60, 7)), 1.2 * random.standard_normal((60, 7)) + 5
    assert mind(reference, sample, 50, seed=3) == pytest.approx(plain_mind(reference, sample, 50, 3), rel=1e-12)
    counts = resamplings(60, 4, seed=1)
    expected = [plain_mind(reference, sample.repeat(row, axis=0), 50, 3) for row in counts]
    assert resampled_mind(reference, sample, 50, seed=3)(counts) == pytest.approx(expected, rel=1e-10)


def test_mind_is_zero_for_the_same_set_and_bears_single_precision(random):
    features = random.standard_normal((50, 4)).astype(np.float32) + 1000
    assert mind(features, features[random.permutation(50)]) == 0
    other = features + random.standard_normal((50, 4)).astype(np.float32)
    assert mind(features, other) == pytest.approx(mind(features.astype(float), other.astype(float)), rel=1e-5)


def test_mind_of_shifted_features_is_three_times_the_squared_shift(random):
    """The squared distance along a unit vector is (u . shift)^2, of mean |shift|^2 / D."""
    noise = random.standard_normal((30, 5))
    shift = np.array([1, -2, 0, 1, 0.5])
    assert mind(noise, noise + shift, 20_000) == pytest.approx(3 * shift @ shift, rel=0.03)


def test_features_that_were_drawn_by_the_same_seed_are_not_parallel_to_the_directions():
    """As simulations of users are: the first features would each lie along a direction, and stick out on it."""
    reference, sample = np.random.default_rng(0).standard_normal((2, 60, 64))
    other = [mind(reference, sample, seed=seed) for seed in range(1, 5)]
    assert mind(reference, sample, seed=0) == pytest.approx(np.mean(other), rel=0.15)   # 0.05; 0.7 if parallel


def test_the_larger_set_is_thinned_by_the_seed(random):
    reference, sample = random.standard_normal((90, 3)), random.standard_normal((40, 3)) + 1
    few, again, other = (mind(reference, sample, 20, seed) for seed in (0, 0, 1))
    assert few == again != other
    chosen = np.sort(np.random.default_rng(0).choice(90, 40, replace=False))
    assert few == mind(reference[chosen], sample, 20) and few == pytest.approx(mind(sample, reference, 20))
    assert resampled_mind(reference, sample, 20)(np.ones((1, 40)))[0] == pytest.approx(few)


def test_differences_of_mind_are_paired(random):
    """Two files of the same images but for a little noise differ by far less than either is uncertain."""
    reference, sample = random.standard_normal((300, 4)), random.standard_normal((200, 4)) + 1
    numbers = [METRICS["mind"].replicates(comparison(reference, sample + change), 50)
               for change in (0, 0.01 * random.standard_normal(sample.shape))]
    alone, difference = numbers[0].interval, numbers[0].minus(numbers[1]).interval
    assert difference.high - difference.low < 0.1 * (alone.high - alone.low)
    assert numbers[0].minus(numbers[0]).interval == (0, 0)


# FID at infinity


def test_fid_at_infinity_is_where_a_line_through_fifteen_fids_ends(random):
    reference, sample = random.standard_normal((400, 4)), 1.3 * random.standard_normal((330, 4)) + 0.5
    mu, sigma = reference.mean(axis=0), np.cov(reference.T)
    order, sizes = np.random.default_rng(5).permutation(330), np.linspace(33, 330, 15).astype(int)
    parts = [sample[order[:size]] for size in sizes]
    values = [frechet_distance(mu, sigma, part.mean(axis=0), np.cov(part.T)) for part in parts]
    expected = np.polyfit(1 / sizes, values, 1)[1]
    assert frechet_distance_at_infinity(mu, sigma, sample, seed=5) == pytest.approx(expected, rel=1e-9)
    statistic = resampled_frechet_distance_at_infinity(mu, sigma, sample)
    assert statistic(order[None])[0] == pytest.approx(expected, rel=1e-5)
    with_twins = random.integers(330, size=(1, 330))
    drawn = sample[with_twins[0]]
    values = [frechet_distance(mu, sigma, drawn[:size].mean(axis=0), np.cov(drawn[:size].T)) for size in sizes]
    assert statistic(with_twins)[0] == pytest.approx(np.polyfit(1 / sizes, values, 1)[1], rel=1e-5)


def test_fid_at_infinity_takes_away_what_few_images_add(random):
    """Of the very distribution of the reference, FID of 300 images is D (D + 3) / 4 N or so, at infinity it is 0."""
    zero, one = np.zeros(6), np.eye(6)
    samples = [random.standard_normal((300, 6)) for _ in range(20)]
    fids = [frechet_distance(zero, one, sample.mean(axis=0), np.cov(sample.T)) for sample in samples]
    assert np.mean(fids) > 0.03
    assert abs(np.mean([frechet_distance_at_infinity(zero, one, sample) for sample in samples])) < 0.01


def test_fid_at_infinity_needs_twenty_images(random):
    with pytest.raises(UserError, match="features of 19 images: at least 20 are needed"):
        frechet_distance_at_infinity(np.zeros(2), np.eye(2), random.standard_normal((19, 2)))
    assert METRICS["fid_infinity"].smallest_count == 20
    with pytest.raises(UserError, match="1 bootstrap replicates: must be at least 2"):
        METRICS["fid_infinity"].replicates(comparison(*random.standard_normal((2, 30, 2))), 1)


# Authenticity


def plainly_authentic(training, sample):
    to_training, among = cdist(sample, training), cdist(training, training)
    np.fill_diagonal(among, np.inf)
    nearest = to_training.argmin(axis=1)
    return to_training.min(axis=1) > among.min(axis=1)[nearest]


@pytest.mark.parametrize("blocks", [2**24, 2**12], ids=["at once", "in pieces"])
def test_authentic_samples_are_those_of_the_definition(random, monkeypatch, blocks):
    monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", blocks)
    training = random.standard_normal((300, 5))
    sample = np.concatenate([random.standard_normal((150, 5)), training[:80] + 0.3 * random.standard_normal((80, 5))])
    found = authentic_samples(training, sample)
    assert found.tolist() == plainly_authentic(training, sample).tolist()
    assert 0 < found[150:].mean() < found[:150].mean() < 1


def test_a_far_image_makes_no_other_one_authentic(random):
    """Beside it all other distances are the same in single precision."""
    training, sample = random.standard_normal((100, 8)), random.standard_normal((60, 8))
    training[0] = 1e7
    assert authentic_samples(training, sample).tolist() == plainly_authentic(training, sample).tolist()


def test_copies_are_never_authentic_and_ties_are_not(random):
    training = random.standard_normal((40, 3)).astype(np.float32) + 100
    training[1] = training[0]
    assert not authentic_samples(training, training[::-1]).any()
    assert authentic_samples(training, training + 50).all()
    grid = np.arange(6.0)[:, None]                                  # each is 1 from its neighbours
    assert authentic_samples(grid, np.array([[6.0], [6.5], [-1.0], [2.4]])).tolist() == [False, True, False, False]
    assert authentic_samples(grid[:2], grid[:2] + 3).tolist() == [True, True]


def test_authenticity_is_in_percent_and_says_where_too_few_images_decide(random):
    training, metric = random.standard_normal((200, 3)), METRICS["authenticity"]
    near = comparison(training, np.concatenate([training[:60], random.standard_normal((60, 3))]))
    assert metric.value(near) == 100 * plainly_authentic(training, near.sample[Feature.POOLED]).mean()
    low, high = metric.interval(near, 50)
    assert low < metric.value(near) < high
    alike = metric.replicates(comparison(training, training[:50]), 50)
    assert alike.interval is None and "nearly all images are alike" in metric.no_interval(alike)


# Pixels


def test_saturation_and_contrast_are_those_of_every_pixel(random):
    images = random.integers(0, 256, (3, 5, 4, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    of_pixels = [[colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.reshape(-1, 3) / 255] for image in images]
    assert saturation(images) == pytest.approx(np.mean(of_pixels, axis=1), rel=1e-6)
    luma = images.astype(float).reshape(3, -1, 3) @ [0.299, 0.587, 0.114] / 255
    assert contrast(images) == pytest.approx(luma.std(axis=1), rel=1e-5)
    grey = np.full((1, 4, 4, 3), 90, np.uint8)
    assert saturation(grey) == [0] and contrast(grey) == pytest.approx(0, abs=1e-7)
    grey[:, :2], grey[:, 2:] = 0, 255
    assert contrast(grey) == pytest.approx(0.5, rel=1e-6)


def test_pixels_are_read_a_few_at_a_time(random, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluations.metrics.pixels.BLOCK", 3 * 8 * 8)
    images = random.integers(0, 256, (8, 8, 8, 3), np.uint8)
    write_batch(tmp_path / "images.npz", {}, iter([images]), images.shape)
    features = FileFeatures(BatchFile(tmp_path / "images.npz"), 7)
    assert features[Feature.SATURATION].tolist() == saturation(images[:7]).tolist()
    assert features.first(4)[Feature.CONTRAST].tolist() == contrast(images[:4]).tolist()
    assert features.knows(Feature.CONTRAST) and not features.knows(Feature.POOLED)


def comparison(reference, sample):
    return Comparison(FeatureSet({Feature.POOLED: reference}), FeatureSet({Feature.POOLED: sample}))


# Bad input


@pytest.mark.parametrize("word", ["mind", "authenticity", "fid_infinity"])
def test_features_that_do_not_fit_are_a_sentence(word, random):
    fine = random.standard_normal((30, 3))
    with pytest.raises(UserError, match="must be of the same network"):
        METRICS[word].value(comparison(fine, fine[:, :2]))
    with pytest.raises(UserError, match="must be finite"):
        METRICS[word].value(comparison(fine, np.where(fine > 1, np.nan, fine)))


@pytest.mark.parametrize("word", ["precision", "recall", "density", "coverage", "authenticity", "mind", "kid"])
def test_features_beyond_single_precision_are_refused(word, random):
    reference, sample = random.standard_normal((2, 60, 5))
    value = METRICS[word].value(comparison(reference, sample))
    if word not in ("mind", "kid"):                 # which are not the same on every scale
        assert METRICS[word].value(comparison(2.0**119 * reference, 2.0**119 * sample)) == value
    for pair, name in (((1e45 * reference, sample), "reference"), ((reference, -1e45 * sample), "sample")):
        with pytest.raises(UserError, match=rf"{name} features of up to .*e\+45: must be at most 1e\+37 in magnitude"):
            METRICS[word].value(comparison(*pair))


def test_a_number_of_directions_below_one_is_refused(random):
    with pytest.raises(UserError, match="directions 0: must be at least 1"):
        mind(*random.standard_normal((2, 5, 3)), 0)
