"""The pages of folders: what stands in them, for each kind of folder, and what a reader sees."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from browser import assert_readable, opened
from commands import REPOSITORY, call
from finished import write_run
from PIL import Image

from evaluations.reports.folders import of_samples
from evaluations.reports.report import ReportOptions, write_pages
from guided_diffusion.adapters.run import LatentOptions
from guided_diffusion.errors import UserError
from guided_diffusion.files import write_csv
from guided_diffusion.guidance import PagOptions
from guided_diffusion.jobs import job

IMAGES = np.random.default_rng(0).integers(0, 200, (3, 8, 8, 3), dtype=np.uint8)
DIGEST = "ab" * 32


@pytest.fixture
def run(tmp_path):
    """A finished run with self-attention guidance, the results of the evaluator beside it."""
    folder = write_run(
        tmp_path / "runs" / "sag", IMAGES, [0, 1, 0], {"seconds": 90.0, "chunks": [{"images": 3, "seconds": 6.0}]},
        ["scripts/image_sample.py", "--out", "a <b> & c"], guide_scale=1.5, model="tiny", model_path="gone.pt",
        diffusion_steps=1000, timestep_respacing="20")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "sha256": {"samples": DIGEST, "model": "cd" * 32}}))
    result = {"sample": {"sha256": DIGEST}, "reference": {"file": "/a/real.npz"}, "backend": {"name": "a <network>"},
              "metrics": {"fid": 3.25, "recall": None}, "intervals95": {"fid": [3.1, 3.4]}}
    other = {**result, "sample": {"sha256": "0"}, "metrics": {"fid": 77.7}}
    (folder.parent / "results.json").write_text(json.dumps([other, result]))
    (folder.parent / "broken.json").write_text("{")
    return folder


def written(*words, out=""):
    return write_pages(list(map(str, words)), ReportOptions(out=str(out)))


def test_the_page_of_a_run(run):
    assert written(run) == f"page: {run / 'report.html'}"
    text = (run / "report.html").read_text()
    assert "<h1>sag: SAG s = 0.5</h1>" in text and "DDPM, 20 steps" in text and "tiny, sha256 cdcdcdcdcdcdcdcd" in text
    assert "python scripts/image_sample.py --out &#39;a &lt;b&gt; &amp; c&#39;" in text
    assert "0:01:30 from the last start to the end, 0.5 images/s of a rank" in text
    assert text.count('src="data:image/png') == 3 and 'alt="image 2: class 0"' in text
    assert "3.25" in text and "3.10 to 3.40" in text and "77.7" not in text and "a &lt;network&gt;" in text
    assert '<th scope="row">timestep_respacing</th><td class="words path">20</td>' in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_numbers_of_a_table_around_a_run(run):
    number = {"value": 4.5, "interval95": None}
    (run.parent / "table.json").write_text(json.dumps({
        "title": "A table", "rows": {"sag": {"sha256": DIGEST, "state": "measured", "samples": "sag/x.npz"}},
        "sections": [{"images": 3, "rows": [{"row": "sag", "metrics": {"sfid": number}}]}]}))
    written(run)
    text = (run / "report.html").read_text()
    assert "3 images, from table.json: A table." in text and "4.500" in text


def test_a_latent_run_differs_from_the_defaults_of_its_own_command(tmp_path):
    changed = {"pipeline": "pipe", "steps": 3, "sag_scale": 0.75, "pag_scale": 1.0, "num_samples": 3}
    run = write_run(tmp_path / "run", IMAGES, **{**asdict(LatentOptions()), **asdict(PagOptions()), **changed,
                                                 "out": "latent", "batch_size": 1})
    table, = of_samples(run).tables
    assert {row[0]: tuple(row[1:]) for row in table.rows} == {
        "pipeline": ("pipe", "unset"), "steps": ("3", "50"), "sag_scale": ("0.75", "0.0"),
        "pag_scale": ("1.0", "0.0"), "num_samples": ("3", "1")}


def test_the_page_of_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/image_train.py", "--out", "training"])
    folder = tmp_path / "training"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model": {"num_channels": 32}, "training": {"data_dir": "images"}, "ranks": 2, "class_names": ["a", "b"]}))
    write_csv(folder / "progress.csv", [{"step": step, "samples": 8 * step, "images_per_second": 2.5, "loss": 1 / step,
                                         "lr": 0.1, "fid_of_500_images": 30 / step} for step in (1, 10, 100)])
    (folder / "grids").mkdir()
    for step in range(1, 101, 9):
        Image.new("RGB", (8, 8)).save(folder / "grids" / f"{step}.png")
    with job("training", folder):
        pass
    written(folder)
    text = (folder / "report.html").read_text()
    assert "finished after 0:00:0" in text
    assert '<code id="command">python scripts/image_train.py --out training</code>' in text
    assert re.findall(r'alt="Samples at step (\d+)"', text) == ["1", "37", "64", "100"]
    assert "metric by step: fid_of_500_images" in text
    assert "100 steps, 800 images, at last 2.5 images/s" in text and "loss by step: loss" in text and "<svg" in text
    assert '<th scope="row">num_channels</th>' in text
    for columns, said in (({"step": 1, "samples": 4, "images_per_second": 9.21648},
                           "1 step, 4 images, at last 9.22 images/s"),
                          ({"step": 1e6, "samples": 1, "loss": 1}, "1,000,000 steps, 1 image, at last ? images/s")):
        write_csv(folder / "progress.csv", [columns])
        written(folder)
        assert said in (folder / "report.html").read_text()


def test_the_page_of_a_study_and_of_likelihoods(tmp_path):
    study, likelihood = tmp_path / "study", tmp_path / "likelihood"
    study.mkdir()
    (study / "summary.md").write_text("# A <title>\n\n| block | part |\n|---|---|\n| middle | -3 |\n")
    write_csv(study / "frequency.csv", [{"block": "middle", "ratio": 1.25}])
    Image.new("RGB", (30, 20), "red").save(study / "overlay.png")
    likelihood.mkdir()
    (likelihood / "run.json").write_text(json.dumps({
        "configuration": {"model": "tiny"},
        "bits_per_dimension": {"total_bpd": {"mean": 3.5, "low": 3.4, "high": 3.6}}}))
    write_csv(likelihood / "terms.csv", [{"step": step, "network_step": step, "vb": 0.1 * step} for step in (1, 2)])
    assert written(study, likelihood).splitlines() == [f"page: {study / 'report.html'}",
                                                       f"page: {likelihood / 'report.html'}"]
    text = (study / "report.html").read_text()
    assert "A &lt;title&gt;" in text and "<td>\N{MINUS SIGN}3</td>" in text and 'alt="overlay.png"' in text
    assert "<td>1.25</td>" in text
    text = (likelihood / "report.html").read_text()
    assert "3.5000" in text and "bits per dimension by step: vb" in text


def test_folders_with_pages_of_their_own_and_with_parts(run, tmp_path, monkeypatch):
    own = tmp_path / "explore"
    own.mkdir()
    (own / "explore.html").write_text("a page")
    assert written(own) == f"page: {own / 'explore.html'}" and [path.name for path in own.iterdir()] == ["explore.html"]
    run.rename(tmp_path / "runs" / "base")
    (tmp_path / "runs" / "results.json").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "runs" / "plot.png")
    assert written(tmp_path / "runs") == f"page: {tmp_path / 'runs' / 'base' / 'report.html'}"
    table = tmp_path / "runs" / "reproduction" / "fmnist32"
    table.mkdir(parents=True)
    (table / "table.json").write_text("{}")
    (table / "report.html").write_text("a page")
    monkeypatch.chdir(tmp_path)
    assert written("fmnist32") == "page: runs/reproduction/fmnist32/report.html"


def test_what_is_refused(run, tmp_path):
    damaged = write_run(tmp_path / "damaged", IMAGES, timing={"seconds": "long", "chunks": 3})
    with pytest.raises(UserError, match="damaged: what lies there cannot be read"):
        written(damaged)
    for word, said in ((tmp_path / "none", "neither a folder nor a table"), (tmp_path, "holds no finished run")):
        with pytest.raises(UserError, match=said):
            written(word)
    (damaged / "run.json").write_text('{"samples": ')
    with pytest.raises(UserError, match=r"run\.json: is no JSON file that can be used"):
        written(damaged)
    with pytest.raises(UserError, match="is one file, and there are 2 pages"):
        written(run, run, out=tmp_path / "x.html")
    (tmp_path / "table.json").write_text(json.dumps({"rows": {"a": {"samples": None}}, "sections": [
        {"title": "A", "rows": [{"row": "a"}]}]}))
    with pytest.raises(UserError, match="was written by another version"):
        written(tmp_path)
    for sections in ([1], [{"title": "A", "rows": [{"row": "b"}]}], [{"rows": []}]):
        (tmp_path / "table.json").write_text(json.dumps({"rows": {"a": {"title": "x"}}, "sections": sections}))
        with pytest.raises(UserError, match="was written by another version"):
            written(tmp_path)
    with pytest.raises(UserError, match=r"must end in \.html, \.htm"):
        written(run, out=run / "run.json")


def test_a_table_of_before_sections_named_the_row_that_they_compare_with(tmp_path):
    content = json.loads((REPOSITORY / "docs" / "reproduction" / "fmnist32" / "table.json").read_text())
    for section in content["sections"]:
        section.pop("against_row", None)
    (tmp_path / "table.json").write_text(json.dumps(content))
    (tmp_path / "page.html").write_text("the page of another table, which is written anew")
    written(tmp_path, out=tmp_path / "page.html")
    assert "compared with no guidance" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("size, scheme", [("desk", "dark"), ("phone", "light")])
def test_what_a_reader_sees(chromium, run, size, scheme, monkeypatch, capsys):
    assert call("report", run, "--out", run / "other.html") == 0
    assert capsys.readouterr().out == f"page: {run / 'other.html'}\n"
    opened(chromium, run / "other.html", size, scheme, ready=False)
    chromium.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert_readable(chromium, size, scheme, "sag: SAG s = 0.5")
    assert chromium.execute_script("return [...document.images].every(one => one.naturalWidth === 8)")
