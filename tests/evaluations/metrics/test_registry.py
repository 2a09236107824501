"""The list of metrics: what its records say, and that a new metric is one entry."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commands import execute

from evaluations.evaluation import EvaluatorOptions
from evaluations.metrics import (
    EQUAL,
    METRICS,
    Comparison,
    ComparisonSettings,
    Feature,
    FeatureSet,
    FromReference,
    Replicates,
)
from guided_diffusion.errors import UserError
from guided_diffusion.npz import write_batch

# A user's file: a metric of one entry, then the evaluator as its path starts it.
WITH_BRIGHTNESS = """
import runpy, sys
from evaluations.metrics import HIGHER, METRICS, Feature, Metric, Resampled, resampled_mean

METRICS["brightness"] = Metric(
    "brightness", "Brightness", HIGHER, Feature.POOLED,
    lambda comparison: float(comparison.sample[Feature.POOLED].mean()),
    lambda comparison: Resampled(resampled_mean(comparison.sample[Feature.POOLED].mean(axis=1)),
                                 comparison.sample.count))
sys.argv[0] = "evaluations/evaluator.py"
for arguments in (["--help"], sys.argv[1:]):
    sys.argv[1:] = arguments
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_a_new_metric_is_one_entry(python, tmp_path):
    random = np.random.default_rng(0)
    for name in ("reference", "sample"):
        images = random.integers(0, 256, (12, 32, 32, 3), np.uint8)
        write_batch(tmp_path / f"{name}.npz", {}, iter([images]), images.shape)
    ended = execute(python, "-c", WITH_BRIGHTNESS, tmp_path / "reference.npz", tmp_path / "sample.npz",
                    "--metrics", "fid,brightness", "--backend", "fashion_mnist", "--bootstrap", 5,
                    "--json", tmp_path / "result.json")
    assert ended.returncode == 0, ended.stderr
    assert ("coverage,dfid,sharpness,gap,mind,fid_infinity,authenticity,class_accuracy,saturation,contrast,brightness;"
            in "".join(ended.stdout.split()))
    (result,) = json.loads((tmp_path / "result.json").read_text())
    value, (low, high) = result["metrics"]["brightness"], result["intervals95"]["brightness"]
    assert low < value < high
    assert ended.stdout.splitlines()[-1].startswith(f"Brightness: {value}   (95 %: ")


@pytest.fixture(scope="module")
def comparison():
    random = np.random.default_rng(0)

    def features():
        return FeatureSet({
            Feature.POOLED: random.normal(size=(80, 4)), Feature.SPATIAL: random.normal(size=(80, 6)),
            Feature.PROBABILITIES: random.dirichlet(np.ones(3), 80), Feature.DEPTH: random.normal(size=(80, 5)),
            Feature.SHARPNESS: random.random(80), Feature.SATURATION: random.random(80),
            Feature.CONTRAST: random.random(80), Feature.CORRECTNESS: random.integers(0, 2, 80).astype(float)})

    reference, sample = features(), features()
    sample.features[Feature.POOLED] += 1            # so that some reference images are far from all samples
    return Comparison(reference, sample)


@pytest.mark.parametrize("word", METRICS)
def test_every_record_is_whole(word, comparison):
    metric = METRICS[word]
    assert metric.word == word
    replicates = metric.replicates(comparison, 20)
    assert replicates.estimate == metric.value(comparison) and replicates.values.shape == (20,)
    low, high = metric.interval(comparison, 20)
    assert low <= high
    assert metric.direction.verdict(-1, 1) == EQUAL
    assert metric.direction.verdict(1, 2) == metric.direction.above != metric.direction.below
    assert metric.neighbours == 0 or metric.needs is FromReference.FEATURES
    other = Comparison(comparison.reference, comparison.sample, ComparisonSettings(seed=1))
    assert metric.by_seed or metric.value(other) == metric.value(comparison)


@pytest.mark.parametrize(("value", "found"), [
    (np.float32(0.5), 0.5), (np.int64(2), 2.0), (1, 1.0), (np.inf, np.nan), (np.float32(np.nan), np.nan)])
def test_a_value_is_a_plain_number(comparison, value, found):
    """Whatever kind of number an own metric gives, so that JSON has it."""
    metric = replace(METRICS["saturation"], value=lambda comparison: value)
    measured = metric.measured(comparison)
    assert type(measured) is float and measured == pytest.approx(found, nan_ok=True)
    number = metric.replicates(comparison, 20)
    assert type(number.estimate) is float and (metric.bounds(number) is None) == np.isnan(found)
    assert np.isfinite(found) or metric.no_interval(number) == "it is not a number"


@pytest.mark.parametrize("value", [None, np.ones((3, 3)), np.ones(1), "0.5", 1j])
def test_a_value_that_is_no_number_is_a_sentence(comparison, value):
    metric = replace(METRICS["saturation"], word="own", value=lambda comparison: value)
    for compute in (metric.measured, lambda comparison: metric.replicates(comparison, 20)):
        with pytest.raises(UserError, match=r"^own: its value is .*, it must be a number"):
            compute(comparison)


def test_metrics_that_results_would_not_tell_apart_are_refused(monkeypatch):
    monkeypatch.setitem(METRICS, "mine", METRICS["saturation"])
    with pytest.raises(UserError, match=r"--metrics fid,mine: METRICS\['mine'\] has the word 'saturation', it must be"):
        EvaluatorOptions(metrics="fid,mine")
    for changes in ({"title": "FID"}, {"title": "Mine", "by_network": METRICS["fid"].by_network}):
        monkeypatch.setitem(METRICS, "mine", replace(METRICS["saturation"], word="mine", **changes))
        with pytest.raises(UserError, match="--metrics kid,mine,fid: mine and fid are both called"):
            EvaluatorOptions(metrics="kid,mine,fid")
        assert len(EvaluatorOptions(metrics="kid,mine").wanted) == len(EvaluatorOptions(metrics="fid,fid,kid").wanted)


def test_names_and_numbers_of_images():
    assert EvaluatorOptions().metrics == "is,fid,sfid,precision,recall"
    assert [metric.title for metric in EvaluatorOptions(metrics="recall, KID,is").wanted] == [
        "Inception Score", "Recall", "KID"]
    assert [METRICS[word].label for word in ("is", "fid", "precision", "sharpness")] == [
        "Inception Score", "FID", "precision", "edge sharpness"]
    assert [METRICS[word].smallest_count for word in ("fid", "recall", "coverage", "fid_infinity")] == [2, 4, 6, 20]
    assert METRICS["authenticity"].label == "authenticity in %" and METRICS["fid_infinity"].label == "FID at infinity"
    assert [word for word, metric in METRICS.items() if metric.needs_depth] == ["dfid", "sharpness", "gap"]


def test_intervals_stay_within_the_possible_values():
    def bounds(word, estimate, low, high):
        return METRICS[word].bounds(Replicates(estimate, np.linspace(low, high, 39)))

    assert bounds("precision", 0.98, 0.95, 1.01) == pytest.approx((0.95, 1)) == bounds("recall", 0.98, 0.95, 1.01)
    assert bounds("density", 0.98, 0.95, 1.01) == pytest.approx((0.95, 1.01))
    assert bounds("authenticity", 98, 95, 101) == pytest.approx((95, 100))
    assert bounds("fid", 1, -1, 3) == pytest.approx((0, 3)) and bounds("is", 2, 0, 4) == pytest.approx((1, 4))
    assert bounds("kid", 1, -1, 3) == pytest.approx((-1, 3))
    assert bounds("gap", 1, -2, 4) == pytest.approx((0, 4)) and bounds("gap", 1, -3, 5).low == 0
    assert METRICS["recall"].bounds(Replicates(0.98, np.full(3, np.nan))) is None


@pytest.mark.parametrize("gap", [0, 0.1, 0.3])
def test_the_interval_of_the_sharpness_gap_keeps_its_promise_near_0(gap, drawn_once):
    """Of 1,000 sets, 94.7 to 97.0 % held the gap. Of resampled magnitudes, 82 % of the intervals held a gap of 0."""
    random = np.random.default_rng(0)
    reference = FeatureSet({Feature.SHARPNESS: np.ones(2)})
    found = [METRICS["gap"].interval(Comparison(reference, FeatureSet({
        Feature.SHARPNESS: 1 + gap + random.standard_normal(100)})), 100) for _ in range(250)]
    held = np.mean([low <= gap <= high for low, high in found])
    assert abs(held - 0.95) < 3 * np.sqrt(0.05 * 0.95 / 250) and min(found)[0] >= 0
