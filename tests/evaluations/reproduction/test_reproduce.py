"""Reproducing a table, as users do: a small one of the bundled model, from its plan to its report."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from commands import REPOSITORY, call, samples_in

from evaluations.reproduction import costs, tables
from evaluations.reproduction import reproduce as reproduction
from guided_diffusion import checkpoint
from guided_diffusion.errors import UserError
from guided_diffusion.presets import find_preset
from guided_diffusion.runs.sampler import ImageSampler
from guided_diffusion.runs.shards import locked

SHARED = {"model": "fmnist32", "timestep_respacing": "2", "batch_size": 4, "labels": "balanced", "num_samples": 6,
          "sel_attn_depth": 2, "blur_sigma": 1.0, "evaluation": {"reference": "fmnist32", "backend": "embedded"}}
ROWS = {"unguided": {"evaluation": {"images": 6, "source": "a test", "published": {"fid": 1e6, "precision": 0.0}}},
        "sag": {"guide_scale": 1.5, "evaluation": {"images": 50_000, "published": {"fid": 20.5}}}}


@pytest.fixture
def mini(tmp_path, monkeypatch, few_neighbours):
    """A function that writes configs/mini/table.yaml (`shared` and `rows` change it) into a folder of its own."""
    monkeypatch.setattr(tables, "CONFIGS", tmp_path / "configs")

    def write(shared=(), rows=(), **more):
        folder = tmp_path / "configs" / "mini"
        folder.mkdir(parents=True, exist_ok=True)
        rows = {**ROWS, **dict(rows)}
        content = {"title": "A small table", "shared": {**SHARED, **dict(shared)}, "rows": rows,
                   "sections": [{"title": "SAG", "rows": list(rows)}], **more}
        (folder / "table.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    write()
    return write


@pytest.fixture
def line(tmp_path):
    """The command line of reproduce.py; `changes` are flags."""
    def words(table="mini", **changes):
        options = {"out": tmp_path / "out", "bootstrap": 10, **changes}
        return [table, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    return words


@pytest.fixture
def refused(capsys):
    """Runs the command, which must end in one line of error and touch nothing, and returns the line."""
    def run(words):
        capsys.readouterr()
        assert call("reproduce", *words) == 2, words
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        return message
    return run


def with_statistics(path):
    """A reference batch of images and of statistics that do not say which network they are of."""
    np.savez(path, arr_0=np.full((8, 32, 32, 3), 9, np.uint8), mu=np.zeros(64), sigma=np.eye(64))
    return path


@pytest.mark.slow
def test_a_table_from_nothing_to_its_report_and_once_more(mini, line, tmp_path, capsys):
    assert call("reproduce", *line()) == 0
    text = capsys.readouterr().out
    folder = tmp_path / "out" / "mini"
    assert (folder / "table.md").read_text().strip() in text
    said = json.loads((folder / "table.json").read_text())
    assert {name: row["state"] for name, row in said["rows"].items()} == {"unguided": "measured", "sag": "measured"}
    assert said["rows"]["sag"]["evaluations"] == 4 and said["rows"]["unguided"]["evaluations"] == 2
    unguided, sag = said["sections"][0]["rows"]
    network = "backend embedded is not the Inception of the official evaluator"
    assert unguided["verdict"] == sag["verdict"] == "not comparable" and unguided["reasons"] == [network]
    assert sag["reasons"] == ["6 images, published with 50,000", network]
    assert set(unguided["metrics"]) == {"fid", "sfid", "is", "precision", "recall"}
    assert unguided["metrics"]["fid"]["difference"] == pytest.approx(unguided["metrics"]["fid"]["value"] - 1e6)
    for word in ("published", "not comparable", network):
        assert word in text
    report = (folder / "report.html").read_text()
    assert "A small table" in report and "data:image/png;base64," in report and "not comparable" in report

    files = {path: path.stat().st_mtime_ns for path in folder.glob("*/samples_*.npz")}
    features = {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.npy")}
    assert len(files) == 2 and features
    assert call("reproduce", *line()) == 0          # all is there: neither sampled nor seen again
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.npy")} == features
    again = json.loads((folder / "table.json").read_text())
    assert again["sections"] == said["sections"]

    before, _ = samples_in(folder / "sag")
    assert call("reproduce", *line(), "--num_samples", 8) == 0          # more images go on from those there are
    with np.load(folder / "sag" / "samples_8x32x32x3.npz", allow_pickle=False) as file:
        assert (file["arr_0"][:6] == before).all() and len(file["arr_0"]) == 8


@pytest.mark.slow
def test_two_ranks_give_the_same_numbers(line, python, short_references, tmp_path, monkeypatch):
    """A real table, cut short, under a launcher that --ranks starts."""
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHON_EXEC", str(python))              # what torchrun starts
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        words = line("fmnist32", rows="unguided", num_samples=5, batch_size=3, ranks=ranks, out=out,
                     reference=short_references / "fmnist32_reference.npz")
        assert call("reproduce", *words) == 0
    one, two = (json.loads((tmp_path / name / "fmnist32" / "table.json").read_text()) for name in "12")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert_alike(one["sections"], two["sections"])


def assert_alike(one, two):
    """The same, numbers up to the rounding of linear algebra on another number of threads."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), list(two.values())
    if isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_alike(a, b)
    else:
        assert one == (pytest.approx(two, rel=1e-6) if isinstance(two, float) else two)


def test_a_killed_table_goes_on(mini, line, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def measure_rows(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "measure_rows", measure_rows)
        with pytest.raises(Killed):
            call("reproduce", *line())
    half = tmp_path / "out/mini/features/.half-made"
    half.mkdir()
    assert call("reproduce", *line()) == 0
    assert not half.exists()
    assert (tmp_path / "out" / "mini" / "report.html").is_file()


def test_a_global_mask_reads_no_block_and_no_heads(mini, line, tmp_path):
    unread = {"guide_scale": 1.5, "mask": "global", "sel_attn_depth": 8, "attention_heads": "official"}
    mini(rows={"unguided": {}, "blurred": unread, "sag": {"guide_scale": 1.5}})         # it has no block output.8
    assert call("reproduce", *line()) == 0
    said = json.loads((tmp_path / "out/mini/table.json").read_text())
    assert {name: row["heads"] for name, row in said["rows"].items()} == {
        "unguided": "exact", "blurred": "", "sag": "exact"}
    report = (tmp_path / "out/mini/report.html").read_text()
    assert "sag: the predicted image, and where" in report and "blurred: the predicted" not in report


def test_a_picture_that_fails_loses_no_numbers(mini, line, refused, tmp_path, monkeypatch):
    def overlay_strip(*arguments):
        raise UserError("no picture today")

    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "overlay_strip", overlay_strip)
        assert "no picture today" in refused(line(rows="sag"))
    folder = tmp_path / "out" / "mini"
    said = json.loads((folder / "table.json").read_text())
    assert said["sections"][0]["rows"][0]["metrics"]["fid"]["value"] > 0
    assert "| SAG s = 0.5 |" in (folder / "table.md").read_text() and not (folder / "report.html").exists()
    assert call("reproduce", *line(rows="sag")) == 0
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_depth_is_compared_once_the_user_has_estimated_it(mini, line, refused, tmp_path):
    mini(rows={"unguided": {"evaluation": {"images": 6, "published": {"dfid": 0.5}}}})
    words = line(rows="unguided", references=tmp_path / "references")

    def said():
        assert call("reproduce", *words) == 0
        table = json.loads((tmp_path / "out/mini/table.json").read_text())
        row, = table["sections"][0]["rows"]
        return row["metrics"]["dfid"], " ".join(row["reasons"]), table["warnings"]

    dfid, reasons, _ = said()
    assert dfid["value"] is None and dfid["verdict"] == "not run here"
    files = [tmp_path / "references/fmnist32_depth.npz", tmp_path / "out/mini/unguided/depth.npz"]
    assert all(str(file) in reasons for file in files)

    files[0].parent.mkdir()
    rng = np.random.default_rng(0)
    for file, count in zip(files, (12, 5), strict=True):
        np.savez(file, depth=rng.random((count, 32, 32)).astype(np.float32))
    assert "holds 5 depth maps, the row has 6 images" in refused(words)
    np.savez(files[1], depth=rng.random((6, 32, 32)).astype(np.float32))
    dfid, reasons, warnings = said()
    assert "dFID of unguided: different numbers of images (12, 6), on which dFID depends" in warnings
    assert dfid["value"] > 0 and dfid["difference"] == pytest.approx(dfid["value"] - 0.5)
    assert dfid["verdict"] == "not comparable"
    assert reasons == "backend embedded is not the Inception of the official evaluator"

    np.savez(files[1], depth=np.repeat(rng.random((1, 32, 32)), 6, axis=0).astype(np.float32))
    dfid, _, warnings = said()
    assert dfid["value"] > 0 and dfid["interval95"] is None
    assert any(f"dFID of unguided: {files[1]}: no 95 % interval of dFID: all its resamplings" in text
               for text in warnings)


def test_plan_samples_nothing(mini, line, tmp_path, capsys):
    assert call("reproduce", *line(plan=True, evaluation_seconds=0.5, ranks=4)) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "| sag | 6 | 2 | 4 |" in text and "nothing is missing" in text and "4 ranks" in text


@pytest.mark.slow
def test_published_tables_say_what_is_missing_and_how_to_get_it(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for count, flops in (("_network_flops", (1, 1)), ("_other_flops", 1)):         # which other tests count
        monkeypatch.setattr(costs, count, lambda *_, flops=flops: flops)
    for name, row in (("sag_cg_imagenet128", "cg"), ("sag_pretrained_256", "lsun_horse"), ("dag_dfid", "bedroom_dcg")):
        assert call("reproduce", *line(name, rows=row, plan=True, evaluation_seconds=0.01)) == 0
        text = capsys.readouterr().out
        assert "python scripts/fetch_models.py" in text and "python scripts/fetch_references.py" in text


def test_a_table_without_its_checkpoints_is_written_as_not_run(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("reproduce", *line("sag_cg_imagenet128", allow_missing=True)) == 0
    text = capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "sag_cg_imagenet128" / "table.json").read_text())
    assert {row["state"] for row in said["rows"].values()} == {"not run here"}
    assert "not run here" in text and "2.58" in text
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_an_inception_that_no_row_reads_is_said(mini, line, caplog, monkeypatch):
    def stop(*words):
        raise UserError("this is as far as it goes")

    monkeypatch.setattr(reproduction, "check_extractors", stop)
    assert call("reproduce", *line(inception="/nowhere.pb")) == 2
    assert "without effect: --inception (no row has a backend that is an Inception)" in caplog.messages


def test_unknown_tables_and_rows_are_refused_with_the_nearest(mini, line, refused):
    assert "did you mean mini?" in refused(line("mimi"))
    assert "did you mean unguided?" in refused(line(rows="sag,unguidet"))
    assert "0 tables given" in refused(line()[1:])
    assert "2 tables given" in refused(["mini", *line()])
    assert "did you mean --num_samples?" in refused([*line(), "--num_sample", "3"])


def test_what_cannot_work_is_refused_before_anything_is_sampled(mini, line, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--num_samples 3" in refused(line(num_samples=3)) and not (tmp_path / "out").exists()
    assert "--heads both" in refused(line(heads="both"))
    mini(shared={"model_path": "none.pt"})
    message = refused(line())
    assert "2 of 2 rows cannot be run" in message and "none.pt" in message and "--allow_missing" in message
    mini()
    assert "nothing.npz" in refused(line(reference="nothing.npz"))

    np.savez(tmp_path / "small.npz", arr_0=np.full((8, 16, 16, 3), 9, np.uint8))
    assert "16x16, those of row unguided 32x32" in refused(line(reference=tmp_path / "small.npz"))
    np.savez(tmp_path / "few.npz", arr_0=np.full((3, 32, 32, 3), 9, np.uint8))
    assert "has 3 images, at least 4" in refused(line(reference=tmp_path / "few.npz"))

    np.savez(tmp_path / "numbers.npz", mu=np.zeros(64), sigma=np.eye(64), mu_s=np.zeros(512), sigma_s=np.eye(512))
    assert "has no images (arr_0), which precision, recall" in refused(line(reference=tmp_path / "numbers.npz"))
    np.savez(tmp_path / "nan.npz", arr_0=np.full((8, 32, 32, 3), 9, np.uint8), pooled=np.full((8, 64), np.nan, "f4"))
    assert "pooled must be finite numbers" in refused(line(reference=tmp_path / "nan.npz"))
    assert "of --backend fashion_mnist" in refused(line(reference=with_statistics(tmp_path / "inception.npz")))
    whole = {"arr_0": np.full((8, 32, 32, 3), 9, np.uint8), "backend": np.array("embedded Fashion-MNIST classifier")}
    np.savez(tmp_path / "of.npz", **whole, pooled=np.ones((8, 64), "f4"), backend_sha256=np.array("0" * 64))
    assert "of.npz: its statistics are of the network" in refused(line(reference=tmp_path / "of.npz"))
    np.savez(tmp_path / "narrow.npz", **whole, pooled=np.ones((8, 7), "f4"))
    assert "narrow.npz: its pooled features have 7 numbers an image" in refused(line(reference=tmp_path / "narrow.npz"))
    lopsided = np.eye(64) + np.eye(64, k=1)
    np.savez(tmp_path / "lopsided.npz", **whole, mu=np.zeros(64), sigma=lopsided)
    assert "lopsided.npz: sigma is not a covariance" in refused(line(reference=tmp_path / "lopsided.npz"))
    assert not list(tmp_path.glob("out/*/*"))

    mini(rows={"other": {"guide_scale": 1.2, "attention_heads": "official"}})
    assert "mixes attention heads" in refused(line()) and not list(tmp_path.glob("out/*/*"))
    mini(shared={"guide_skale": 1})
    assert re.search(r"row unguided in .*table.yaml: guide_skale: .*did you mean guide_scale", refused(line()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"guide_scale": 1.1, "sel_attn_depth": 9}, "--sel_attn_block output --sel_attn_depth 9: 'output.9' is no"),
    ({"pag_scale": 1.0, "pag_blocks": "output.99"}, "--pag_blocks output.99: 'output.99' is no attention block"),
    ({"classifier_guidance": True, "pag_scale": 1.0, "pag_blocks": "output.99"}, "--pag_blocks output.99: "),
    ({"cfg_scale": 1.0}, "--cfg_scale 1: needs a network with labels and a null class"),
    ({"timestep_respacing": "5000"}, "--timestep_respacing 5000: a section of 1000 steps cannot give 5000"),
    ({"sampler": "unipc", "solver_order": 3, "sampling_steps": 2}, "--timestep_respacing 2: must be unset with"),
    ({"labels": "12"}, "--labels 12: must be a class from 0 to 9"),
    ({"labels": "none"}, "--labels none: the network was not trained to do without"),
    ({"labels": "none.npy"}, "--labels none.npy: cannot be read"),
], ids=["block", "blocks", "with a classifier", "null class", "respacing", "steps", "class", "no class", "file"])
def test_what_is_wrong_with_the_last_row_is_said_before_the_first(mini, line, refused, tmp_path, changes, message):
    mini(rows={"cg": {"classifier_guidance": True}, "last": changes})
    said = refused(line())
    assert "row last in " in said and f"table.yaml: {message}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("keep", "message"), [(0, "is truncated or damaged"), (1, "of its weights")])
def test_weights_of_the_last_row_are_read_before_the_first(mini, line, refused, tmp_path, keep, message):
    path = tmp_path / "last.safetensors"
    bundled = find_preset("fmnist32").path
    if keep:
        weights = checkpoint.load_state_dict(bundled)
        weights["out.2.bias"] = weights["out.2.bias"][:1].clone()
        checkpoint.save_state(path, weights, checkpoint.read_metadata(bundled))
    else:
        path.write_bytes(bundled.read_bytes()[:-9])
    mini(rows={"last": {"model_path": str(path)}})
    said = refused(line())
    assert "row last in " in said and message in said
    assert not (tmp_path / "out").exists()


def test_folders_of_another_configuration_are_refused_before_the_first_row(mini, line, refused, tmp_path):
    assert call("reproduce", *line(rows="sag")) == 0
    mini(rows={"sag": {**ROWS["sag"], "guide_scale": 1.7}})
    message = refused(line())
    assert "sag" in message and "--guide_scale differs" in message
    assert not (tmp_path / "out" / "mini" / "unguided").exists()
    assert message.endswith("; pass another --out, or remove that to have it sampled again")     # no --overwrite here
    assert call("reproduce", *line(out=tmp_path / "other", rows="sag")) == 0
    shutil.rmtree(tmp_path / "out" / "mini" / "sag")
    assert call("reproduce", *line(rows="sag")) == 0


def test_metrics_that_a_reference_is_too_little_for_are_told_where_they_stand(mini, line, refused, tmp_path):
    bare = tmp_path / "bare.npz"
    np.savez(bare, mu=np.zeros(64), sigma=np.eye(64), backend=np.array("embedded Fashion-MNIST classifier"))
    mini({"evaluation": {"reference": str(bare), "backend": "fashion_mnist", "metrics": "fid,recall"}})
    message = refused(line())
    assert "recall would need: leave them out of metrics of row unguided in " in message and "--" not in message


def test_memory_that_ends_in_a_row_is_told_with_options_that_tables_have(mini, line, refused, monkeypatch):
    def ends(self, *_):
        raise torch.OutOfMemoryError("out of memory")

    images = ImageSampler._images
    monkeypatch.setattr(ImageSampler, "_images", ends)
    message = refused(line(rows="sag"))
    assert "--auto_batch" not in message and "pass a smaller --batch_size, and another --out where" in message
    monkeypatch.setattr(ImageSampler, "_images", images)
    assert call("reproduce", *line(rows="sag", batch_size=2)) == 0


def test_one_job_at_a_time_works_on_a_table(mini, line, refused, tmp_path):
    (tmp_path / "out" / "mini").mkdir(parents=True)
    with locked(tmp_path / "out" / "mini"):
        assert "another job is working there" in refused(line())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(line(out=tmp_path / "file"))


def test_another_reference_or_other_heads_are_not_comparable(mini, line, tmp_path):
    options = reproduction.ReproduceOptions(reference="mine.npz", heads="official", out=str(tmp_path))
    table, in_files = reproduction.choose(["mini"], options)
    for name, row in table.rows.items():
        assert reproduction.unlike_file(row, in_files.rows[name]) == ["reference mine.npz, published with fmnist32"]
        elsewhere = replace(row.evaluation, reference="references/fmnist32")
        assert reproduction.unlike_file(replace(row, evaluation=elsewhere), in_files.rows[name]) == []
    assert {row.run.configuration()["attention_heads"] for row in table.rows.values()} == {"official"}
    assert {row.evaluation.reference for row in table.rows.values()} == {"mine.npz"}


def test_checkpoints_may_lie_elsewhere(tmp_path):
    options = reproduction.ReproduceOptions(models="/weights", out=str(tmp_path))
    table, _ = reproduction.choose(["sag_cg_imagenet128"], options)
    assert table.rows["sag_cg"].run.sample.model_path == "/weights/128x128_diffusion.pt"
    assert table.rows["sag_cg"].run.checkpoints()["classifier_path"] == "/weights/128x128_classifier.pt"


def test_ranks_must_agree_with_the_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(reproduction.dist_util, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--ranks 3: the launcher has started 2"):
        reproduction.launch(reproduction.ReproduceOptions(ranks=3))
    assert reproduction.launch(reproduction.ReproduceOptions(ranks=2)) is None
    assert reproduction.launch(reproduction.ReproduceOptions()) is None


def test_ranks_share_the_cores_that_the_job_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(subprocess, "call", lambda command, env: int(env["OMP_NUM_THREADS"]))
    assert [reproduction.launch(reproduction.ReproduceOptions(ranks=ranks)) for ranks in (2, 3, 8)] == [2, 1, 1]


def test_the_embedded_tables_have_the_rows_of_the_papers(tmp_path):
    for name in ("fmnist32", "scenes32"):
        table = tables.load_table(name)
        assert all(table.rows[row].images >= 5000 for row in ("unguided", "sag", "cg", "sag_cg"))
        runs = [row.run for row in table.rows.values()]
        assert len({run.sample.seed for run in runs}) == 1
        masks = {run.configuration()["mask"] for run in runs}
        assert masks == {"self-attention", "global", "high-frequency", "random", "square"}
        assert {run.configuration()["blur_sigma"] for run in runs} == {1.0, 3.0, 9.0}
        samplers = {(run.sample.use_ddim, run.diffusion.timestep_respacing) for run in runs}
        assert {(False, "250"), (True, "ddim25"), (True, "ddim50"), (True, "ddim100")} <= samplers
    assert (REPOSITORY / "configs" / "fmnist32" / "table.yaml").is_file()


@pytest.mark.parametrize("name", ["fmnist32", "scenes32"])
def test_the_committed_tables_are_those_of_the_configurations(name):
    said = json.loads((REPOSITORY / "docs" / "reproduction" / name / "table.json").read_text())
    table = tables.load_table(name)
    assert [(section["title"], [row["row"] for row in section["rows"]]) for section in said["sections"]] == [
        (section.title, list(section.rows)) for section in table.sections]
    assert {row: (one["images"], one["state"]) for row, one in said["rows"].items()} == {
        row: (one.images, "measured") for row, one in table.rows.items()}
