"""The table of depth-aware guidance at small scale: its rows, a short one from sampling to its report, the old name."""

import json

import pytest
from commands import REPOSITORY, call

from evaluations.reproduction import tables
from evaluations.reproduction.tables import load_table
from evaluations.reproduction.titles import titles
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of


def scales(row):
    flags = row.run.configuration()
    return flags["dcg_scale"], flags["dpg_scale"]


def test_rows_are_those_of_the_committed_table():
    table = load_table("scenes32_dag")
    said = json.loads((REPOSITORY / "docs" / "dag" / "table.json").read_text())
    flags = table.rows["unguided"].run.configuration()
    recorded = {name: value for name, value in said["configuration"].items()
                if name in ("timestep_respacing", "batch_size", "seed", "num_samples", "depth_tau")}
    assert recorded == {name: flags[name] for name in recorded} and len(recorded) == 5
    assert {name: (row["dcg_scale"], row["dpg_scale"]) for name, row in said["rows"].items()}.items() <= {
        name: scales(row) for name, row in table.rows.items()}.items()
    blocks = json.loads((REPOSITORY / "docs" / "dag" / "table_paper_blocks.json").read_text())
    for name in ("dcg", "both"):
        row = table.rows[f"{name}_paper_blocks"]
        assert scales(row) == (blocks["rows"][name]["dcg_scale"], blocks["rows"][name]["dpg_scale"])
        assert row.run.configuration()["depth_predictor"] == blocks["configuration"]["depth_predictor"]


def test_the_sweep_is_drawn_against_the_scale_of_its_term():
    table = load_table("scenes32_dag")
    for section, place in (("dcg_scale", 0), ("dpg_scale", 1)):
        rows, = [one.rows for one in table.sections if one.against == section]
        assert [scales(table.rows[name])[place] for name in rows] == [0, 10, 20, 40, 80]
        assert {scales(table.rows[name])[1 - place] for name in rows} == {0}


def test_rows_with_one_title_are_told_apart_by_name():
    named = titles(load_table("scenes32_dag"))
    assert named["dcg"] == "DCG 40" and named["dcg_paper_blocks"] == "DCG 40 (dcg_paper_blocks)"
    assert len(set(named.values())) == len(named)


@pytest.mark.slow
def test_a_short_table_and_its_old_name(tmp_path, capsys, monkeypatch):
    configs = tmp_path / "configs"
    (configs / "scenes32_dag").mkdir(parents=True)
    table = (tables.CONFIGS / "scenes32_dag" / "table.yaml").read_text()
    fewer_steps = table.replace('timestep_respacing: "25"', 'timestep_respacing: "5"')
    (configs / "scenes32_dag" / "table.yaml").write_text(fewer_steps)
    monkeypatch.setattr(tables, "CONFIGS", configs)
    words = ["--rows", "unguided,dcg", "--num_samples", 4, "--batch_size", 4, "--bootstrap", 20, "--out", tmp_path]
    assert call("reproduce", "scenes32_dag", *words) == 0
    folder = tmp_path / "scenes32_dag"
    said = json.loads((folder / "table.json").read_text())
    first, second = said["sections"][0]["rows"]
    assert list(first["metrics"]) == ["dfid", "fid", "sharpness"] and first["metrics"]["dfid"]["versus"] is None
    assert second["metrics"]["dfid"]["versus"]["verdict"] in ("better", "worse", "no difference")
    assert second["metrics"]["sharpness"]["versus"]["verdict"] in ("sharper", "softer", "no difference")
    assert said["reference"]["metrics"]["sharpness"]["value"] == pytest.approx(0.8359, abs=1e-4)
    assert said["rows"]["dcg"]["sha256"] == sha256_of(folder / "dcg" / "samples_4x32x32x3.npz")
    text = (folder / "table.md").read_text()
    assert "| row | dFID | FID | edge sharpness |" in text and "| real images | - | - | 0.8" in text
    assert "real images" in (folder / "report.html").read_text()

    capsys.readouterr()
    assert call("dag_table", *words) == 0           # everything is there already
    ended = capsys.readouterr()
    assert "is now `python scripts/reproduce.py scenes32_dag`" in ended.err
    assert text[text.index("## Depth"):].strip() in ended.out


def test_what_is_refused_before_anything_is_sampled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "CONFIGS", tmp_path / "configs")
    folder = tmp_path / "configs" / "own"
    folder.mkdir(parents=True)
    (tmp_path / "configs" / "base.yaml").write_text(
        (REPOSITORY / "configs" / "scenes32_dag" / "table.yaml").read_text())
    bundled = REPOSITORY / "guided_diffusion" / "models"
    for changed, message in (
            (f"depth_predictor: {bundled}/scenes32.safetensors", "is no file of depth predictors"),
            ("evaluation: {backend: fashion_mnist}", "does not estimate depth, which dfid, sharpness would need"),
            ("evaluation: {metrics: sharpnes}", "did you mean sharpness?"),
            ("num_samples: 1", "--num_samples 1: row unguided needs at least 2 images"),
            ("dcg_skale: 1", "did you mean dcg_scale?")):
        (folder / "table.yaml").write_text(f"extends: ../base.yaml\nshared: {{{changed}}}\nsections: []\n")
        assert call("reproduce", "own", "--out", tmp_path / "out", "--rows", "unguided,dcg") == 2, changed
        assert message in capsys.readouterr().err, changed
        assert not list((tmp_path / "out").rglob("*.npz")), changed


def test_metrics_are_words_that_there_are():
    assert tables.EvaluationSpec(metrics="FID, kid,fid").words == ["fid", "kid"]
    assert tables.EvaluationSpec().words == ["fid", "sfid", "is", "precision", "recall"]
    with pytest.raises(UserError, match=r"--metrics fdi: 'fdi' is none of .*did you mean fid"):
        tables.EvaluationSpec(metrics="fdi")
