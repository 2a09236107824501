"""The list of metrics: what its records say, and that a new metric is one entry."""

import json

import numpy as np
import pytest
from commands import execute

from evaluations.evaluation import EvaluatorOptions
from evaluations.metrics import EQUAL, METRICS, Comparison, Feature, FeatureSet, FromReference
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
            Feature.CONTRAST: random.random(80), Feature.RECOGNISED: random.integers(0, 2, 80).astype(float)})

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


def test_names_and_numbers_of_images():
    assert EvaluatorOptions().metrics == "is,fid,sfid,precision,recall"
    assert [metric.title for metric in EvaluatorOptions(metrics="recall, KID,is").wanted] == [
        "Inception Score", "Recall", "KID"]
    assert [METRICS[word].label for word in ("is", "fid", "precision", "sharpness")] == [
        "Inception Score", "FID", "precision", "edge sharpness"]
    assert [METRICS[word].smallest_count for word in ("fid", "recall", "coverage", "fid_infinity")] == [2, 4, 6, 20]
    assert METRICS["authenticity"].label == "authenticity in %" and METRICS["fid_infinity"].label == "FID at infinity"
    assert [word for word, metric in METRICS.items() if metric.needs_depth] == ["dfid", "sharpness", "gap"]
