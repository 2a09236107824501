"""The numbers of the evaluator: the official evaluator's golden cases, brute force, properties, and bad input."""

import json
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from golden import GOLDEN
from scipy.spatial.distance import cdist

from evaluations.metrics import (
    RunningStatistics,
    bootstrap,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    manifold_membership,
    neighbourhoods,
    precision_recall,
    resampled_frechet_distance,
    resampled_inception_score,
    resampled_kid,
    resampled_mean,
)
from guided_diffusion.errors import UserError


def golden_cases(name):
    """The golden cases of that file, each a pytest parameter; the slow ones are marked."""
    cases = json.loads((GOLDEN / "eval" / f"{name}.json").read_text())["cases"]
    marks = {2048: pytest.mark.slow}
    return [pytest.param(case, id=case["name"], marks=marks.get(case.get("dim"), ())) for case in cases]


def golden_outputs(name):
    return np.load(GOLDEN / "eval" / f"{name}.npz", allow_pickle=False)


def inputs(case):
    names = {"np": np}
    exec(case["recipe"], names)
    return names


def statistics(features, piece=100):
    running = RunningStatistics()
    for start in range(0, len(features), piece):
        running.update(features[start:start + piece])
    return running.mean, running.covariance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Frechet distance


@pytest.mark.parametrize("case", golden_cases("public_fid"))
def test_frechet_distance_golden(case):
    given = inputs(case)
    if case["kind"] == "samples":
        arguments = *statistics(given["x1"]), *statistics(given["x2"])
    else:
        arguments = [given[name] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    official, accurate = case["ref"]["scipy_1.17.1"]["fid"], case["accurate"]
    if official is None and accurate is None:
        with pytest.raises(UserError, match=r"sigma1 is not a covariance: .* negative eigenvalue -0\.88"):
            frechet_distance(*arguments)
        return
    tolerance = 1e-7 * float(sum(np.trace(np.atleast_2d(sigma)) for sigma in arguments[1::2])) + 1e-6
    distance = frechet_distance(*arguments)
    assert isinstance(distance, float) and distance >= 0
    assert min(abs(distance - value) for value in (official, accurate) if value is not None) <= tolerance
    if case["dim"] < 2048:
        assert frechet_distance(*arguments[2:], *arguments[:2]) == pytest.approx(distance, abs=tolerance)


def rotated(variances, seed=0):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(variances),) * 2))[0]
    sigma = rotation * variances @ rotation.T
    return (sigma + sigma.T) / 2


@pytest.mark.parametrize("variances", [
    10.0 ** -np.linspace(0, 14, 200), 1 / np.arange(1, 201.0) ** 4, np.r_[1e12, np.ones(199)],
    np.r_[np.ones(100), np.zeros(100)], np.r_[np.ones(100), np.full(100, 1e-10)],
], ids=["decay", "power law", "one large", "half the rank", "step"])
def test_frechet_distance_keeps_its_digits_whatever_the_spectrum(variances):
    sigma1, sigma2 = rotated(variances), rotated(4 * variances)
    mu = np.zeros(200)
    expected = variances.sum()          # commuting matrices: the sum of (2 s - s)^2
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, abs=1e-8 * 5 * variances.sum())


def test_frechet_distance_of_statistics_kept_in_single_precision(rng):
    features = rng.standard_normal((60, 100)) @ rng.standard_normal((100, 100))      # rank 59 of 100
    mu, sigma = statistics(features)
    other = *statistics(features + rng.standard_normal((60, 100))),
    rounded = frechet_distance(mu.astype(np.float32), sigma.astype(np.float32), *other)
    assert rounded == pytest.approx(frechet_distance(mu, sigma, *other), rel=1e-3)


def test_frechet_distance_of_identical_sets_is_zero(rng):
    for features in (rng.standard_normal((300, 40)), rng.standard_normal((20, 40)), np.zeros((5, 40))):
        assert frechet_distance(*statistics(features), *statistics(features.copy())) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("change, message", [
    ({"mu1": np.zeros(4)}, "statistics of 4 and of 3 channels"),
    ({"mu1": np.zeros((3, 1))}, r"mu1 of shape \(3, 1\)"),
    ({"sigma2": np.eye(4)}, r"sigma2 of shape \(4, 4\): must be \(3, 3\)"),
    ({"sigma2": np.ones(3)}, r"sigma2 of shape \(1, 3\)"),
    ({"sigma1": np.full((3, 3), np.nan)}, "sigma1: must be finite"),
    ({"mu2": np.array([0, np.inf, 0])}, "mu2: must be finite"),
    ({"sigma1": np.eye(3) * 1j}, "sigma1 of type complex128"),
    ({"sigma1": np.eye(3) + np.eye(3, k=1)}, "sigma1 is not a covariance: the matrix is not symmetric"),
    ({"sigma1": np.diag([1, 1, -1e-3])}, "sigma1 is not a covariance: .* negative eigenvalue -0.001"),
    ({"sigma2": -np.eye(3)}, "sigma2 is not a covariance"),
    ({"sigma2": np.ones((3, 3)) - np.eye(3)}, "sigma2 is not a covariance"),
])
def test_frechet_distance_refuses_what_are_no_statistics(change, message):
    arguments = {"mu1": np.zeros(3), "sigma1": np.eye(3), "mu2": np.ones(3), "sigma2": np.eye(3), **change}
    with pytest.raises(UserError, match=message):
        frechet_distance(**arguments)


# Mean and covariance


@pytest.mark.parametrize("case", golden_cases("public_stats"))
def test_statistics_golden(case):
    features, outputs = inputs(case)["x"], golden_outputs("public_stats")
    mean, covariance = statistics(features, piece=97)
    np.testing.assert_allclose(mean, outputs[f"{case['name']}__mu"], rtol=1e-5, atol=1e-6)    # float32 there
    if case["dim"] == 2048:
        np.testing.assert_allclose(covariance.diagonal(), outputs[f"{case['name']}__sigma_diag"], rtol=1e-10)
        np.testing.assert_allclose(covariance[:16, :16], outputs[f"{case['name']}__sigma_corner16"], atol=1e-12)
    else:
        expected = outputs[f"{case['name']}__sigma"]        # of a large one, the first rows may be all that is kept
        np.testing.assert_allclose(covariance[:len(expected)], expected, rtol=1e-10, atol=1e-13)


def test_statistics_do_not_depend_on_pieces_or_a_common_mean(rng):
    features = rng.standard_normal((1000, 20)) @ rng.standard_normal((20, 20)) + 1e6
    mean, covariance = np.mean(features, axis=0), np.cov(features, rowvar=False)
    for piece in (1, 7, 1000):
        running = statistics(features, piece)
        np.testing.assert_allclose(running[0], mean, rtol=1e-14)
        np.testing.assert_allclose(running[1], covariance, rtol=1e-10, atol=1e-10 * covariance.max())
    running = RunningStatistics()
    for part in np.split(features, [0, 10, 400]):
        running.update(part)
    assert running.count == 1000 and np.array_equal(running.covariance, running.covariance.T)


def test_statistics_flatten_spatial_features(rng):
    maps = rng.standard_normal((30, 4, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(statistics(maps)[1], np.cov(maps.reshape(30, 24), rowvar=False), atol=1e-12)


def test_statistics_refuse(rng):
    running = RunningStatistics()
    for read in (lambda: running.mean, lambda: running.covariance):
        with pytest.raises(UserError, match="no images"):
            read()
    running.update(rng.standard_normal((3, 4)))
    for action, message in ((lambda: running.update(np.ones((2, 5))), "5 channels: those before had 4"),
                            (lambda: running.update(np.full((2, 4), np.nan)), "NaN"),
                            (lambda: running.update(np.ones(4)), r"shape \(4,\)"),
                            (lambda: running.update(np.array([["a"] * 4])), "real numbers")):
        with pytest.raises(UserError, match=message):
            action()
    assert running.count == 3


# Inception Score


@pytest.mark.parametrize("case", golden_cases("public_is"))
def test_inception_score_golden(case):
    score = inception_score(inputs(case)["preds"])
    if case["is_nan"]:
        assert np.isnan(score)
    else:
        assert score == pytest.approx(case["inception_score"], rel=1e-5)
        assert score == pytest.approx(case["own_float64"], rel=1e-9)


def test_inception_score_bounds_and_splits(rng):
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    sharp = np.eye(10)[np.arange(100) % 10] * (1 - 1e-9) + 1e-10
    assert inception_score(sharp) == pytest.approx(10, rel=1e-5)
    by_class = sharp[np.argsort(np.arange(100) % 10, kind="stable")]
    assert inception_score(by_class) == pytest.approx(10, rel=1e-5)
    assert inception_score(by_class, split_size=10) == pytest.approx(1)     # in the order given
    # the last split, short, counts as much as the first
    assert inception_score(by_class, split_size=90) == pytest.approx((9 + 1) / 2, rel=1e-5)


@pytest.mark.parametrize("arguments, message", [
    ((np.full((4, 3), 0.5),), "probabilities of image 0"),
    ((np.array([[0.5, 0.5], [1.5, -0.5]]),), "probabilities of image 1"),
    ((np.zeros((0, 3)),), "0 images"),
    ((np.ones(3),), r"shape \(3,\)"),
    ((np.full((2, 2), np.nan),), "NaN"),
    ((np.full((2, 2), 0.5), 0), "split_size 0"),
])
def test_inception_score_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        inception_score(*arguments)


# Precision and recall


@pytest.mark.parametrize("case", golden_cases("public_pr"))
def test_precision_recall_golden(case):
    given = inputs(case)
    reference, sample = given["x1"], given["x2"]
    assert precision_recall(reference, sample) == (case["own_f64"]["precision"], case["own_f64"]["recall"])
    outputs = golden_outputs("public_pr")
    of_sample, of_reference = manifold_membership(reference, sample, distances="official")
    official = of_sample.mean(), of_reference.mean()
    assert official == pytest.approx((case["ref"]["precision"], case["ref"]["recall"]), abs=0.002)
    for ours, name in ((of_sample, "sample_in_ref_manifold"), (of_reference, "ref_in_sample_manifold")):
        theirs = np.unpackbits(outputs[f"{case['name']}__ref__{name}"], count=len(ours)).astype(bool)
        assert (ours != theirs).sum() <= 2


def extra_runs():
    return json.loads((GOLDEN / "eval" / "public_pr.json").read_text())["extra_runs_on_first_case"]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_official_precision_recall_with_another_k_and_overflow(k):
    case = golden_cases("public_pr")[0].values[0]
    given, extra = inputs(case), extra_runs()
    expected = [extra["nhood_sizes=(1, 3, 5)"][name][k // 2] for name in ("precision", "recall")]
    assert precision_recall(given["x1"], given["x2"], k, "official") == pytest.approx(expected)
    given["x1"][-1] *= np.float32(100)      # overflows in half precision: all distances fall back to single precision
    expected = [extra["last_row_times_100"]["default_blocks"][name][0] for name in ("precision", "recall")]
    assert precision_recall(given["x1"], given["x2"], 3, "official") == pytest.approx(expected)


def brute_force(reference, sample, k):
    reference, sample = reference.astype(np.float64), sample.astype(np.float64)
    radii = [np.sort(cdist(points, points), axis=1)[:, k] for points in (reference, sample)]
    return radii, cdist(reference, sample)


@pytest.mark.parametrize("seed", range(12))
def test_exact_precision_recall_is_that_of_float64(seed):
    rng = np.random.default_rng(seed)
    channels, count, others = int(rng.choice([1, 2, 7, 60])), *rng.integers(300, 1500, 2)
    reference = rng.standard_normal((count, channels))
    sample = reference[rng.integers(0, count, others)] + rng.choice([0, 1e-3, 1]) * rng.standard_normal((1, channels))
    sample[::3] += rng.standard_normal((len(sample[::3]), channels))
    scale, offset = 10 ** rng.uniform(-12, 12), rng.choice([0, 1, 300])
    reference, sample = scale * (reference + offset), scale * (sample + offset)
    if seed % 2:
        reference, sample = reference.astype(np.float32), sample.astype(np.float32)
    k = int(rng.integers(1, 6))
    (reference_radii, sample_radii), distances = brute_force(reference, sample, k)
    expected = (distances <= reference_radii[:, None]).any(axis=0), (distances <= sample_radii).any(axis=1)
    for ours, theirs in zip(manifold_membership(reference, sample, k), expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_exact_precision_recall_of_far_clusters(rng):
    """The common mean does not help here: in single precision the distances within a cluster are round-off."""
    middles = 1e3 * rng.standard_normal((2, 300))
    reference, sample = (np.repeat(middles, 100, axis=0) + 0.1 * rng.standard_normal((200, 300)) for _ in range(2))
    (reference_radii, sample_radii), distances = brute_force(reference, sample, 3)
    assert precision_recall(reference, sample) == ((distances <= reference_radii[:, None]).any(axis=0).mean(),
                                                   (distances <= sample_radii).any(axis=1).mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels, far", [(1, 1e8), (16, 1e9), (64, 1e9), (64, 1e12)])
def test_exact_precision_recall_is_that_of_float64_beside_a_far_image(channels, far, dtype, rng):
    """Which the common mean follows so far that products of float64 tell no pair of the others apart."""
    reference, sample = rng.standard_normal((2, 200, channels)).astype(dtype)
    reference[0], sample[:5], sample[5:10] = far, reference[1:6], sample[10]
    (reference_radii, sample_radii), distances = brute_force(reference, sample, 3)
    expected = (distances <= reference_radii[:, None]).any(axis=0), (distances <= sample_radii).any(axis=1)
    found = neighbourhoods(reference, sample)
    for ours in (manifold_membership(reference, sample), (found.sample_inside, found.reference_inside)):
        for one, other in zip(ours, expected, strict=True):
            assert np.array_equal(one, other)


def test_several_blocks_agree_with_one(rng, monkeypatch):
    reference, sample = rng.standard_normal((2, 700, 6))
    before = precision_recall(reference, sample), density_coverage(reference, sample)
    official = precision_recall(reference, sample, distances="official")
    monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", 2**12)
    assert (precision_recall(reference, sample), density_coverage(reference, sample)) == before
    monkeypatch.setattr("evaluations.metrics.official.BLOCK_IMAGES", 150)
    assert precision_recall(reference, sample, distances="official") == official


def test_identical_sets_are_perfect(rng):
    for features in (rng.standard_normal((500, 30)), np.repeat(rng.standard_normal((4, 30)), 10, axis=0),
                     np.full((10, 3), 7.0)):
        for distances in ("exact", "official"):
            assert precision_recall(features, features.copy(), distances=distances) == (1, 1)


def test_collapsed_generator_and_noise_around_the_data(rng):
    reference = rng.standard_normal((1000, 16))
    collapsed = reference[0] * 0.3 + 0.01 * rng.standard_normal((1000, 16))
    precision, recall = precision_recall(reference, collapsed)
    assert precision > 0.99 and recall < 0.01
    precision, recall = precision_recall(reference, 1.7 * rng.standard_normal((1000, 16)))
    assert precision < 0.2 and recall > 0.95


def test_order_does_not_matter(rng):
    reference, sample = rng.standard_normal((2, 400, 12)).astype(np.float32)
    shuffled = rng.permutation(reference), rng.permutation(sample)
    assert precision_recall(*shuffled) == precision_recall(reference, sample)
    assert density_coverage(*shuffled) == density_coverage(reference, sample)
    assert kid(*shuffled) == pytest.approx(kid(reference, sample), abs=1e-9)
    assert frechet_distance(*statistics(shuffled[0]), *statistics(shuffled[1])) == pytest.approx(
        frechet_distance(*statistics(reference), *statistics(sample)), abs=1e-9)


def test_metrics_fall_as_noise_is_removed(rng):
    reference, clean = rng.standard_normal((2, 800, 10))
    noise = rng.standard_normal((800, 10))
    noisy = [clean + level * noise for level in (2, 1, 0.5, 0)]
    for series in ([frechet_distance(*statistics(reference), *statistics(sample)) for sample in noisy],
                   [kid(reference, sample) for sample in noisy],
                   [1 - precision_recall(reference, sample)[0] for sample in noisy],
                   [1 - density_coverage(reference, sample)[0] for sample in noisy]):
        assert series == sorted(series, reverse=True) and series[0] > series[-1] + 0.1


def test_memory_stays_far_below_whole_matrices(rng, monkeypatch):
    monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", 2**20)
    reference, sample = rng.standard_normal((2, 4000, 16), dtype=np.float32)        # whole: 64 MB in float32
    tracemalloc.start()
    try:
        for work in (lambda: precision_recall(reference, sample), lambda: neighbourhoods(reference, sample),
                     lambda: kid(reference, sample), lambda: statistics(reference)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            work()
            assert tracemalloc.get_traced_memory()[1] - before < 24e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "k 0: must be at least 1"), ({"k": 20}, "reference features of 20 images: at least 21 are needed"),
    ({"k": 10}, "sample features of 10 images: at least 11"),
    ({"sample": np.ones((10, 4))}, "3 channels and sample features of 4"),
    ({"sample": np.ones(10)}, r"sample features of shape \(10,\)"),
    ({"reference": np.full((20, 3), np.inf)}, "reference features: must be finite"),
    ({"distances": "half"}, "distances 'half': must be exact or official"),
])
def test_precision_recall_refuses(change, message):
    arguments = {"reference": np.ones((20, 3)), "sample": np.ones((10, 3)), **change}
    with pytest.raises(UserError, match=message):
        precision_recall(**arguments)


# Density, coverage, realism, nearest neighbours


def test_density_coverage_against_brute_force(rng):
    reference, sample = rng.standard_normal((600, 9)), 0.8 * rng.standard_normal((500, 9)) + 0.2
    (radii, _), distances = brute_force(reference, sample, 5)
    within = distances < radii[:, None]
    assert density_coverage(reference, sample) == pytest.approx((within.sum(axis=0).mean() / 5,
                                                                 within.any(axis=1).mean()))
    assert density_coverage(reference, reference) == pytest.approx((1, 1), abs=1e-3)


def test_neighbourhoods_say_the_same_as_the_single_numbers_and_more(rng):
    reference, sample = rng.standard_normal((600, 9)) + 5, 1.3 * rng.standard_normal((500, 9)) + 5
    sample[0] = reference[0]
    found = neighbourhoods(reference, sample, k=3, density_k=5)
    assert (found.sample_inside.mean(), found.reference_inside.mean()) == precision_recall(reference, sample)
    assert (found.density.mean(), found.covered.mean()) == pytest.approx(density_coverage(reference, sample))
    (radii, _), distances = brute_force(reference, sample, 3)
    np.testing.assert_allclose(found.sample_distance, distances.min(axis=0), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.reference_distance, np.sort(cdist(reference, reference), axis=1)[:, 1], rtol=1e-4)
    kept = radii <= np.median(radii)
    with np.errstate(divide="ignore"):
        realism = (radii[kept, None] / distances[kept]).max(axis=0)
    np.testing.assert_allclose(found.realism[1:], realism[1:], rtol=1e-4)
    assert (found.realism[1:] >= 1).sum() <= found.sample_inside.sum()


def test_realism_takes_all_balls_whose_radii_tie_with_the_median():
    """Of features on a lattice, whose float32 radii differ by rounding alone."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference, sample = rng.integers(0, 3, (30, 6)).astype(float), rng.integers(0, 3, (20, 6)) + 0.25
        found = neighbourhoods(reference, sample, k=2, density_k=2)
        distances = cdist(reference, sample)
        radii = np.sqrt(np.round(np.sort(cdist(reference, reference), axis=1)[:, 2]**2))
        kept = radii <= np.median(radii)
        np.testing.assert_allclose(found.realism, (radii[kept, None] / distances[kept]).max(axis=0), rtol=1e-4)


@pytest.mark.parametrize("far", [1.0, 1e4, 1e6])
def test_distances_and_realism_are_those_of_float64_beside_a_far_image_and_of_copies(far, rng):
    reference, sample = rng.standard_normal((301, 64)), rng.standard_normal((300, 64))
    reference[0] *= far
    sample[:20] = reference[1:21]
    reference[30:33] = reference[33]
    found = neighbourhoods(reference, sample, k=2, density_k=2)
    distances, own = cdist(reference, sample), np.sort(cdist(reference, reference), axis=1)
    np.testing.assert_allclose(found.sample_distance, distances.min(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.reference_distance, own[:, 1], rtol=1e-3)
    assert np.isinf(found.realism[:20]).sum() == (own[1:21, 2] <= np.median(own[:, 2])).sum()
    kept = own[:, 2] <= np.median(own[:, 2])
    realism = (own[kept, 2, None] / distances[kept][:, 20:]).max(axis=0)
    np.testing.assert_allclose(found.realism[20:], realism, rtol=1e-3)


@pytest.mark.parametrize("far", [1e3, 3e4, 1e6])
def test_density_and_coverage_are_those_of_float64_beside_a_far_image(far, rng):
    reference, sample = rng.standard_normal((301, 64)), rng.standard_normal((300, 64))
    reference[0] = far
    (radii, _), distances = brute_force(reference, sample, 5)
    within = distances < radii[:, None]
    expected = (pytest.approx(within.sum(axis=0).mean() / 5, rel=1e-12), within.any(axis=1).mean())
    found = neighbourhoods(reference, sample, k=3, density_k=5)
    assert density_coverage(reference, sample) == (found.density.mean(), found.covered.mean()) == expected


def test_ties_are_outside_the_balls_of_density(rng):
    reference, sample = rng.integers(0, 4, (300, 4)), rng.integers(0, 4, (300, 4))

    def squared(points):
        return ((reference[:, None] - points) ** 2).sum(axis=2)

    within = squared(sample) < np.sort(squared(reference), axis=1)[:, 5, None]
    assert density_coverage(reference + 300.0, sample + 300.0) == (
        pytest.approx(within.sum(axis=0).mean() / 5, rel=1e-12), within.any(axis=1).mean())


# KID


def brute_force_kid(reference, sample):
    def kernel(left, right):
        return (left @ right.T / left.shape[1] + 1) ** 3

    within = sum((kernel(features, features).sum() - kernel(features, features).trace())
                 / (len(features) * (len(features) - 1)) for features in (reference, sample))
    return within - 2 * kernel(reference, sample).mean()


def test_kid_is_the_unbiased_estimate(rng, monkeypatch):
    reference, sample = rng.standard_normal((300, 20)), 1.1 * rng.standard_normal((200, 20)) + 0.1
    monkeypatch.setattr("evaluations.metrics.arrays.BLOCK_ENTRIES", 2**14)
    assert kid(reference, sample) == pytest.approx(brute_force_kid(reference, sample), rel=1e-10)
    single = kid(reference.astype(np.float32), sample.astype(np.float32))
    assert single == pytest.approx(brute_force_kid(reference, sample), rel=1e-4)
    same = [kid(*rng.standard_normal((2, 100, 5))) for _ in range(50)]
    assert min(same) < 0 < max(same) and abs(np.mean(same)) < 3 * np.std(same) / 50**0.5


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e6])
def test_kid_keeps_its_digits_under_a_large_mean(mean, rng):
    def exact(points):
        return [[Fraction(float(value)) for value in point] for point in points]

    def kernels(left, right):
        return [[(sum(a * b for a, b in zip(one, other, strict=True)) / 4 + 1) ** 3 for other in right]
                for one in left]

    def within(points):
        found = kernels(points, points)
        return (sum(map(sum, found)) - sum(found[i][i] for i in range(len(points)))) / (len(points) * (len(points) - 1))

    reference, sample = (rng.integers(-1000, 1000, (12, 4)) / 1024 + mean + shift for shift in (0, 0.25))
    real, generated = exact(reference), exact(sample)
    expected = float(within(real) + within(generated) - 2 * sum(map(sum, kernels(real, generated))) / 144)
    assert kid(reference, sample) == pytest.approx(expected, rel=1e-10)
    if mean < 1e4:          # what float32 keeps exactly
        assert kid(reference.astype(np.float32), sample.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


def test_kid_draws_from_large_sets(rng):
    reference, sample = rng.standard_normal((2, 500, 4))
    drawn = kid(reference, sample, max_images=100, seed=1)
    assert drawn == kid(reference, sample, max_images=100, seed=1) != kid(reference, sample, max_images=100, seed=2)
    with pytest.raises(UserError, match="max_images 1"):
        kid(reference, sample, max_images=1)
    with pytest.raises(UserError, match="at least 2"):
        kid(reference, sample[:1])


# Bootstrap


def test_resampled_statistics_are_the_metrics_of_what_was_drawn(rng):
    reference, sample = rng.standard_normal((200, 6)), 1.2 * rng.standard_normal((150, 6)) + 0.5
    probabilities = rng.dirichlet(np.ones(5), 150)
    counts = np.stack([np.ones(150, np.uint16), np.bincount(rng.integers(150, size=150), minlength=150)])
    drawn = [np.repeat(np.arange(150), row) for row in counts]
    mu, sigma = statistics(reference)
    distances = resampled_frechet_distance(mu, sigma, sample.astype(np.float32))(counts)
    expected = [frechet_distance(mu, sigma, *statistics(sample[rows])) for rows in drawn]
    assert distances == pytest.approx(expected, rel=1e-5)
    score = resampled_inception_score(probabilities)(counts)
    assert score == pytest.approx([inception_score(probabilities[rows]) for rows in drawn])
    assert resampled_mean(sample[:, 0])(counts) == pytest.approx([sample[rows, 0].mean() for rows in drawn])
    assert resampled_kid(reference, sample)(counts)[0] == pytest.approx(kid(reference, sample))


def test_resampled_frechet_distance_of_fewer_images_than_channels(rng):
    mu, sigma = statistics(rng.standard_normal((30, 50)))
    sample = rng.standard_normal((20, 50)) + 1
    ones = np.ones((1, 20), np.uint16)
    assert resampled_frechet_distance(mu, sigma, sample)(ones)[0] == pytest.approx(
        frechet_distance(mu, sigma, *statistics(sample)), rel=1e-5)


def test_interval_of_a_mean_is_the_known_one(rng):
    values = rng.random(2000) < 0.3
    low, high = bootstrap(resampled_mean(values), 2000, replicates=2000, seed=1)
    assert low == pytest.approx(values.mean() - 1.96 * 0.01025, abs=0.0015)
    assert high == pytest.approx(values.mean() + 1.96 * 0.01025, abs=0.0015)
    assert bootstrap(resampled_mean(values), 2000, replicates=2000, seed=1) == (low, high)
    narrow = bootstrap(resampled_mean(values), 2000, replicates=2000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * 0.01025, rel=0.1)


def test_intervals_hold_the_metric_and_shrink_with_more_images(rng):
    reference, sample = rng.standard_normal((2000, 8)), rng.standard_normal((2000, 8)) + 0.2
    probabilities = rng.dirichlet(np.full(6, 0.3), 2000)
    mu, sigma = statistics(reference)
    widths = []
    for size in (200, 2000):
        part, rows = sample[:size], probabilities[:size]
        metrics = {
            "fid": (resampled_frechet_distance(mu, sigma, part), frechet_distance(mu, sigma, *statistics(part))),
            "kid": (resampled_kid(reference, part), kid(reference, part)),
            "is": (resampled_inception_score(rows, 150), inception_score(rows, 150)),
        }
        widths.append([])
        for name, (statistic, value) in metrics.items():
            sizes = [150] * (size // 150) + [size % 150] if name == "is" else size
            low, high = bootstrap(statistic, sizes, replicates=60)
            assert low < value < high
            widths[-1].append(high - low)
    assert (np.array(widths[1]) < 0.6 * np.array(widths[0])).all()


def test_bootstrap_refuses(rng):
    statistic = resampled_mean(np.ones(5))
    with pytest.raises(UserError, match="1 bootstrap replicates"):
        bootstrap(statistic, 5, replicates=1)
    with pytest.raises(UserError, match="level 95"):
        bootstrap(statistic, 5, replicates=5, level=95)
    with pytest.raises(UserError, match="3 and of 4 channels"):
        resampled_frechet_distance(np.zeros(3), np.eye(3), rng.standard_normal((10, 4)))
