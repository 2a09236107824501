"""The table of depth-aware guidance: its rows, a tiny one from sampling to figures, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, call, execute, flags, samples_in
from networks import TINY, with_random_weights
from PIL import Image

from evaluations.depth.table import Row, TableOptions, sweep_rows, table_rows
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.features import feature_channels
from guided_diffusion.depth.predictor import DepthPredictors, save_predictors
from guided_diffusion.depth.scenes import render
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import DagOptions
from guided_diffusion.npz import write_batch
from guided_diffusion.script_util import create_model

BIN = Path(sys.executable).parent
MODEL = {**TINY, "image_size": 32, "in_channels": 3, "class_cond": False, "channel_mult": "1,1",
         "attention_resolutions": "16"}
PRIOR = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
         "attention_resolutions": "4", "num_heads": 1}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Flags of a table of 6 images a row from a tiny network, its depth predictors and a prior."""
    folder = tmp_path_factory.mktemp("table")
    model = with_random_weights(create_model(**MODEL))
    save_state(folder / "model.safetensors", model.state_dict())
    channels = {"strong": feature_channels(model, ("output.0", "output.2")),
                "weak": feature_channels(model, ("output.2",))}
    save_predictors(folder / "depth.safetensors", with_random_weights(
        DepthPredictors(channels, 32, "image", sha256_of(folder / "model.safetensors"))))
    save_state(folder / "prior.safetensors", with_random_weights(create_model(**PRIOR), seed=2).state_dict(),
               {"config": json.dumps(PRIOR)})
    return {**MODEL, "model_path": folder / "model.safetensors", "depth_predictor": folder / "depth.safetensors",
            "depth_prior": folder / "prior.safetensors", "timestep_respacing": "2", "num_samples": 6, "batch_size": 3,
            "dag_reduction": "sum", "dcg_scale": 300, "dpg_scale": 200, "bootstrap": 20}


# Rows


def rows_of(dag=None, **options):
    return table_rows(TableOptions(**options), dag or DagOptions(**DagOptions.switched_on))


def test_rows_have_their_own_scales():
    assert rows_of() == [Row("unguided", 0, 0), Row("dcg", 40, 0), Row("dpg", 0, 40), Row("both", 40, 40)]
    assert rows_of(DagOptions(**DagOptions.switched_on | {"dcg_scale": 20}), rows="both, dcg") == [
        Row("unguided", 0, 0), Row("dcg", 20, 0), Row("both", 20, 40)]
    assert [row.title for row in rows_of(rows="both")] == ["no depth-aware guidance", "DCG 40 + DPG 40"]


def test_sweep_adds_the_scales_that_are_not_there():
    options = TableOptions(rows="dcg", sweep="80,0,40, 2.5")
    rows = table_rows(options, DagOptions(**DagOptions.switched_on))
    assert [(row.name, row.dcg_scale, row.dpg_scale) for row in rows] == [
        ("unguided", 0, 0), ("dcg", 40, 0), ("dcg_2.5", 2.5, 0), ("dcg_80", 80, 0), ("dpg_2.5", 0, 2.5),
        ("dpg_40", 0, 40), ("dpg_80", 0, 80)]
    sweep = sweep_rows(options, rows)
    assert [row.name for row in sweep["dcg"]] == ["unguided", "dcg_2.5", "dcg", "dcg_80"]
    assert [row.dpg_scale for row in sweep["dpg"]] == [0, 2.5, 40, 80]
    assert sweep_rows(TableOptions(), rows) == {}


def test_rows_that_are_refused():
    for options, message in (({"rows": "dcg,boht"}, r"'boht' is none of unguided, dcg, dpg, both \(did you mean both"),
                             ({"rows": ""}, "--rows : '' is none of"), ({"sweep": "10,x"}, "--sweep 10,x: must be"),
                             ({"sweep": "-1"}, "--sweep -1: must be"), ({"sweep": "inf"}, "--sweep inf: must be"),
                             ({"sweep": "0"}, "--sweep 0: needs a scale above 0"), ({"bootstrap": 1}, "--bootstrap 1")):
        with pytest.raises(UserError, match=message):
            TableOptions(**options)
    with pytest.raises(UserError, match="--dpg_scale 0: must not be 0 for the row both"):
        rows_of(DagOptions(**DagOptions.switched_on | {"dpg_scale": 0}), rows="both")


# From sampling to figures


def test_table_end_to_end_goes_on_where_it_was(line, tmp_path, capsys, monkeypatch):
    out, scenes = tmp_path / "table", render(1, range(40)).rgb
    write_batch(tmp_path / "real.npz", {}, iter([scenes]), scenes.shape)
    line = {**line, "out": out, "reference": tmp_path / "real.npz"}
    assert call("dag_table", *flags({**line, "rows": "dcg"})) == 0
    first = {name: samples_in(out / name)[0] for name in ("unguided", "dcg")}
    assert not (out / "sweep.png").exists()

    from guided_diffusion.runs.sampler import ImageSampler

    sampled, images = [], ImageSampler.images
    monkeypatch.setattr(ImageSampler, "images", lambda self, *words: sampled.append(Path(self.options.out).name) or
                        images(self, *words))
    capsys.readouterr()
    assert call("dag_table", *flags({**line, "sweep": "0,300,500"})) == 0
    printed = capsys.readouterr().out
    names = ["unguided", "dcg", "dpg", "both", "dcg_500", "dpg_300", "dpg_500"]
    assert set(sampled) == set(names[2:])               # the others were there
    for name, before in first.items():
        assert (samples_in(out / name)[0] == before).all()

    table = json.loads((out / "table.json").read_text())
    assert list(table["rows"]) == names and table["reference"]["images"] == 40 and table["bootstrap"] == 20
    assert {(row["images"], row["sha256"]) for row in table["rows"].values()} == {
        (6, sha256_of(out / row["samples"])) for row in table["rows"].values()}
    assert len({row["sha256"] for row in table["rows"].values()}) == 7
    assert [table["rows"]["both"][f"{term}_scale"] for term in ("dcg", "dpg")] == [300, 200]
    assert table["configuration"]["seed"] == 0 and "dcg_scale" not in table["configuration"]
    assert table["judge"]["accuracy"] and table["extractor"]["sha256"]
    assert "verdict" not in table["rows"]["unguided"]["metrics"]["dfid"]
    words = {row["metrics"]["dfid"]["verdict"] for name, row in table["rows"].items() if name != "unguided"}
    assert words <= {"better", "worse", "no difference"}

    text = (out / "table.md").read_text()
    assert text in printed and "model.safetensors, 6 images a row, seed 0, 2 steps of DDPM" in text
    assert "- both: DCG 300 + DPG 200" in text and "| difference to unguided |" in text
    for name in names:
        assert f"| {name} | {table['rows'][name]['metrics']['dfid']['value']:.4g} (" in text
    for name in ("table.png", "sweep.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 1000


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / "torchrun").exists(), reason="torchrun is not installed")
def test_ranks_make_the_table_together(line, tmp_path):
    command = (BIN / "torchrun", "--nproc_per_node", 2, "scripts/dag_table.py")
    ended = execute(*command, *flags({**line, "rows": "dcg", "out": tmp_path / "shared"}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("| difference to unguided |") == 1
    assert call("dag_table", *flags({**line, "rows": "dcg", "out": tmp_path / "alone"})) == 0
    shared, alone = (json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("shared", "alone"))
    assert {name: row["sha256"] for name, row in shared.items()} == {name: row["sha256"] for name, row in alone.items()}
    ended = execute(*command, *flags({**line, "rows": "dcg", "dcg_scale": 0, "out": tmp_path / "none"}))
    assert ended.returncode != 0 and ended.stderr.count("error: --dcg_scale 0: must not be 0") == 1


def test_what_is_refused_before_anything_is_sampled(line, tmp_path, capsys):
    large = {"image_size": 64, "channel_mult": "1,1"}
    for changes, message in (
            ({"rows": "unguidet"}, "did you mean unguided?"), ({"sweep": "ten"}, "--sweep ten"),
            ({"reference": "scenes33"}, "scenes33: there is no such file"), (large, "--image_size 64"),
            ({"depth_prior": ""}, "--depth_prior is not given"), ({"depth_predictor": ""}, "--depth_predictor is not"),
            ({"depth_predictor": line["model_path"]}, "is no file of depth predictors"),
            ({"model_path": line["depth_prior"]}, "was trained on another network"),
            ({"model_path": ""}, "--model_path is not given"), ({"dcg_scale": 0}, "--dcg_scale 0"),
            ({"num_samples": 1}, "--num_samples 1"), ({"colour": 1}, "--colour: no such option")):
        assert call("dag_table", *flags({**line, **changes, "out": tmp_path / "out"})) == 2, changes
        assert message in capsys.readouterr().err, changes
        assert not list((tmp_path / "out").rglob("*.npz")), changes


def test_help_lists_the_options_of_the_table_and_of_sampling(capsys):
    assert call("dag_table", "--help") == 0
    out = capsys.readouterr().out
    assert all(f"--{flag} " in out for flag in ("rows", "sweep", "reference", "bootstrap", "out", "num_samples", "seed",
                                                "dcg_scale", "depth_tau", "timestep_respacing"))
    assert "(default: 2000)" in out and "(default: runs/dag_table)" in out
    assert len((REPOSITORY / "scripts" / "dag_table.py").read_text().splitlines()) <= 40
