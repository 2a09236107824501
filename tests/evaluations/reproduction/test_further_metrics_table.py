"""The metrics beyond the official ones as columns of a table: measured, compared with the first row, and in words."""

from dataclasses import replace

import numpy as np
import pytest

from evaluations.evaluation import Evaluation, EvaluatorOptions, ExtractorOptions
from evaluations.metrics import METRICS, saturation
from evaluations.reproduction.markdown import markdown
from evaluations.reproduction.measurements import EvaluationSettings, measure_rows
from evaluations.reproduction.pictures import Pictures
from evaluations.reproduction.report import page
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
    """Measures two rows, of which the second is more colourful; returns what the results say.

    reference: of both. other: of the second one in its place. sections: the rows of each. published: of the second one.
    """
    def measured(reference, other=None, sections=(("unguided", "guided"),), metrics=WORDS, published=()):
        shared = {"model": "fmnist32", "timestep_respacing": "2", "num_samples": 60, "batch_size": 60,
                  "evaluation": {"reference": str(reference), "backend": "fashion_mnist", "metrics": metrics}}
        second = {"guide_scale": 2.0, "evaluation": {**shared["evaluation"], "reference": str(other or reference),
                                                     "published": dict(published)}}
        rows = {name: read_row(name, {**shared, **values, "out": str(tmp_path / name)}, tmp_path / "table.yaml")
                for name, values in {"unguided": {}, "guided": second}.items()}
        for row, images in zip(rows.values(), (coloured(60, 1), coloured(60, 1, 80)), strict=True):
            row.run.out.mkdir(exist_ok=True)
            write_batch(row.run.samples, {}, iter([images]), images.shape)
            (row.run.out / "run.json").write_text('{"timing": {"chunks": []}, "sha256": {"samples": "abc"}}')
        table = Table("mini", "Colours", "", "", rows, tuple(Section(" and ".join(names), names) for names in sections))
        settings = EvaluationSettings(tmp_path, ExtractorOptions(device="cpu"), 40, {})
        said = results(table, measure_rows(table, list(rows), settings, tmp_path / "features", {}), {}, settings)
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


def test_warnings_of_the_evaluator_stand_in_the_report(measured, two, monkeypatch):
    monkeypatch.setitem(METRICS, "is", replace(METRICS["is"], value=lambda comparison: float("nan")))
    said = measured(*two, sections=(("unguided",), ("guided",)), metrics="is,authenticity,coverage,fid_infinity")
    few = "it is nearly 0 or 1, or there are too few images, so that nothing says how far it moves"
    copies = "authenticity in % tells copies of the images of {}, which must be those that the network was trained on"
    assert said["warnings"] == [
        "FID at infinity lies beside the truth with fewer than 20 images for each feature",
        "95 % intervals of FID at infinity are wider than they need to be, with fewer than 4 images for each feature",
        copies.format(two[0]), "different numbers of images (50, 60), on which coverage and others depend",
        f"Inception Score of unguided: {METRICS['is'].if_nan}",
        f"no 95 % interval of coverage of unguided: {few}",
        copies.format(two[1]), f"Inception Score of guided: {METRICS['is'].if_nan}",
        f"no 95 % interval of coverage of guided: {few}"]
    text, html = markdown(said), page(said, Pictures())
    for warning in said["warnings"]:
        assert text.count(f"- warning: {warning}\n") == 1 and html.count(f"<dt>warning</dt><dd>{warning}</dd>") == 1


def test_a_reference_without_images_has_no_saturation_of_its_own(measured):
    said = measured("fmnist32")
    assert "metrics" not in said["reference"]
    assert "| real images |" not in markdown(said)
    assert said["sections"][0]["rows"][1]["metrics"]["saturation"]["versus"]["verdict"] == "more saturated"


@pytest.fixture
def two(tmp_path):
    """Two references: 50 images, and 60 that are more colourful."""
    files = [tmp_path / "grey.npz", tmp_path / "bright.npz"]
    for file, count, spread in zip(files, (50, 60), (40, 80), strict=True):
        images = coloured(count, 0, spread)
        write_batch(file, {}, iter([images]), images.shape)
    return files


def test_each_section_says_its_own_reference(measured, two):
    said = measured(*two, sections=(("unguided",), ("guided",)))
    own = [row["reference"] for row in said["rows"].values()]
    assert [(one["file"], one["images"]) for one in own] == [("grey.npz", 50), ("bright.npz", 60)]
    values = [saturation(coloured(50, 0)).mean(), saturation(coloured(60, 0, 80)).mean()]
    assert [one["metrics"]["saturation"]["value"] for one in own] == pytest.approx(values)
    assert said["reference"] == own[0] and said["network"] == said["rows"]["guided"]["network"]
    text, html = markdown(said), page(said, Pictures())
    facts, first, second, _ = text.split("\n## ")
    for file, count, one in zip(("grey", "bright"), (50, 60), own, strict=True):
        assert f"{file}.npz, {count} images, sha256 {one['sha256'][:16]}" in facts
    assert "60 images of each row, against grey.npz." in first and "against bright.npz." in second
    for section, value in zip((first, second), values, strict=True):
        line, = [line for line in section.splitlines() if line.startswith("| real images |")]
        assert float(line.split("|")[5].split()[0]) == pytest.approx(value, abs=1e-3)
    assert html.count('<th scope="row">real images</th>') == 2 and "against bright.npz." in html


def test_rows_of_different_references_are_not_compared(measured, two):
    said = measured(*two)
    first, second = said["sections"][0]["rows"]
    assert not any(number["versus"] for row in (first, second) for number in row["metrics"].values())
    assert second["reasons"] == ["no difference from row unguided, which has another reference or backend"]
    text = markdown(said)
    assert "against grey.npz (no guidance) and bright.npz (SAG s = 1)." in text and second["reasons"][0] in text
    assert "| real images of grey.npz |" in text and "| real images of bright.npz |" in text
    assert "(MIND: of at most the 50 images of the reference)" in text


@pytest.mark.parametrize(("counted", "said_of_it", "of_fid", "of_both"), [
    (None, "50 images, statistics of a set whose size it does not say", "", "(50, 60), on which MIND depends"),
    (90, "50 images, statistics of 90", "(90, 60), on which FID depends",
     "(90, 50, 60), on which FID and others depend"),
    (60, "50 images, statistics of 60", "", "(50, 60), on which MIND depends"),
    (50, "50 images, sha", "(50, 60), on which FID depends", "(50, 60), on which FID and others depend"),
])
def test_statistics_of_more_images_than_the_reference_holds(measured, tmp_path, counted, said_of_it, of_fid, of_both):
    real, network = coloured(50, 0), np.array("embedded Fashion-MNIST classifier")
    count = {} if counted is None else {"count": np.array(counted)}
    write_batch(tmp_path / "real.npz", {"mu": np.zeros(64), "sigma": np.eye(64), "backend": network, **count},
                iter([real]), real.shape)
    for metrics, counts in (("fid,saturation", of_fid), ("fid,mind", of_both)):
        said = measured(tmp_path / "real.npz", metrics=metrics)
        assert [text for text in said["warnings"] if "different" in text] == [
            f"different numbers of images {counts}"] * bool(counts)
        assert f"- reference: real.npz, {said_of_it}" in markdown(said)


def test_precision_and_recall_are_as_the_published_ones(measured, two, tmp_path):
    values = {}
    for word, published in (("exact", {"fid": 3.0}), ("official", {"recall": 0.6})):
        said = measured(two[1], metrics="fid,precision,recall", published=published)
        values[word] = [[row["metrics"][name]["value"] for name in ("precision", "recall")]
                        for row in said["sections"][0]["rows"]]
        assert said["precision_recall"] == word
        assert ("- precision and recall: in the half precision" in markdown(said)) is (word == "official")
        files = [str(tmp_path / name / "samples_60x32x32x3.npz") for name in ("unguided", "guided")]
        evaluation = Evaluation(str(two[1]), files, ExtractorOptions(backend="fashion_mnist"),
                                EvaluatorOptions(metrics="precision,recall", precision_recall=word))
        assert [[*result["metrics"].values()] for result in evaluation.run(tmp_path / "features")] == values[word]
    assert values["exact"] != values["official"]
