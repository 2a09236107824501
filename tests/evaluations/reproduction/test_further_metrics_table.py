"""The metrics beyond the official ones as columns of a table: measured, compared with the first row, and in words."""

import numpy as np
import pytest

from evaluations.evaluation import ExtractorOptions
from evaluations.metrics import saturation
from evaluations.reproduction.measurements import EvaluationSettings, measure_rows
from evaluations.reproduction.report import markdown
from evaluations.reproduction.results import results
from evaluations.reproduction.tables import Section, Table, read_row
from guided_diffusion.npz import write_batch

WORDS = "mind,fid_infinity,authenticity,saturation,contrast"


def coloured(count, seed, spread=40):
    """Images of blots around grey, (count, 32, 32, 3)."""
    random = np.random.default_rng(seed)
    blots = random.normal(128, spread, (count, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(blots, 0, 255).astype(np.uint8)


@pytest.fixture
def measured(tmp_path):
    """Measures two rows, of which the second is more colourful, against a reference; returns what the results say."""
    def measured(reference):
        shared = {"model": "fmnist32", "timestep_respacing": "2", "num_samples": 60, "batch_size": 60,
                  "evaluation": {"reference": str(reference), "backend": "fashion_mnist", "metrics": WORDS}}
        rows = {name: read_row(name, {**shared, **values, "out": str(tmp_path / name)}, tmp_path / "table.yaml")
                for name, values in {"unguided": {}, "guided": {"guide_scale": 2.0}}.items()}
        for row, images in zip(rows.values(), (coloured(60, 1), coloured(60, 1, 80)), strict=True):
            row.run.out.mkdir(exist_ok=True)
            write_batch(row.run.samples, {}, iter([images]), images.shape)
            (row.run.out / "run.json").write_text('{"timing": {"chunks": []}, "sha256": {"samples": "abc"}}')
        table = Table("mini", "Colours", "", "", rows, (Section("All", tuple(rows)),))
        settings = EvaluationSettings(tmp_path, ExtractorOptions(device="cpu"), 40, {})
        said = results(table, measure_rows(table, list(rows), settings, tmp_path / "features"), {}, settings)
        return said | {"command": "", "version": "", "device": "", "ranks": 1}
    return measured


def test_they_are_columns_with_words(measured, tmp_path):
    real = coloured(50, 0)
    write_batch(tmp_path / "real.npz", {}, iter([real]), real.shape)
    said = measured(tmp_path / "real.npz")
    first, second = said["sections"][0]["rows"]
    assert list(first["metrics"]) == WORDS.split(",")
    words = {word: number["versus"]["verdict"] for word, number in second["metrics"].items()}
    assert words["saturation"] == "more saturated" and words["contrast"] == "more contrast"
    assert words["mind"] == words["fid_infinity"] == "worse"
    assert said["reference"]["metrics"]["saturation"]["value"] == pytest.approx(saturation(real).mean())
    text = markdown(said)
    assert "| row | MIND | FID at infinity | authenticity in % | saturation | contrast |" in text
    assert "more images have a lower one (MIND: of at most the 50 images of the reference)" in text
    assert "| real images | - | - | - | " in text


def test_a_reference_without_images_has_no_saturation_of_its_own(measured):
    said = measured("fmnist32")
    assert "metrics" not in said["reference"]
    assert "| real images |" not in markdown(said)
    assert said["sections"][0]["rows"][1]["metrics"]["saturation"]["versus"]["verdict"] == "more saturated"
