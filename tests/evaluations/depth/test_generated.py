"""The study of depth networks that learn from generated images: its table, how it goes on, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import yaml
from commands import REPOSITORY, call, flags

from evaluations.depth.generated import (
    REAL_SEED,
    TEST_SEED,
    GeneratedOptions,
    GeneratedTraining,
    read_study,
    study_names,
    train_depth_network,
)
from evaluations.depth.generated_report import results_of, table_of
from guided_diffusion.depth.predictor import load_predictors, save_predictors
from guided_diffusion.depth.scenes import render
from guided_diffusion.errors import UserError

TINY = {"num_samples": 2, "num_test": 3, "steps": 2, "batch_size": 2, "num_seeds": 2, "label_draws": 1, "bootstrap": 20}


@pytest.fixture
def study(tmp_path):
    """A study whose rows are sampled in one step."""
    content = yaml.safe_load((REPOSITORY / "configs" / "dag_depth_training" / "scenes32.yaml").read_text())
    content["shared"] |= {"sampling_steps": 3, "batch_size": 4}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_study_writes_its_table_and_goes_on(study, tmp_path, capsys):
    out = tmp_path / "out"
    given = (study, *flags(TINY), "--out", out)
    assert call("dag_depth_training", *given) == 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["exact", "real", "unguided", "dcg"]
    assert "verdict" not in rows["unguided"]["delta"] and len(rows["dcg"]["abs_rel"]["seeds"]) == 2
    assert all(f"| {row} | {rows[row]['delta']['value']:.2f} (" in table for row in rows)

    (out / "errors" / "dcg_1.npz").unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[el]*/*.npz")}
    assert call("dag_depth_training", *given) == 0
    assert (out / "table.md").read_text() == table and (out / "errors" / "dcg_1.npz").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    capsys.readouterr()
    assert call("dag_depth_training", *given, "--steps", 3) == 2
    assert "holds a study with steps 2, not 3; name another folder" in capsys.readouterr().err


def test_other_real_images_of_the_same_name_are_another_study(study, tmp_path):
    def begin(seed, flag):
        scenes = render(seed, range(3), 32)
        np.savez(tmp_path / "pairs.npz", arr_0=scenes.rgb, depth=scenes.depth)
        options = {**TINY, "out": str(tmp_path / f"out_{flag}"), flag: str(tmp_path / "pairs.npz")}
        GeneratedTraining(read_study(str(study)), GeneratedOptions(**options))
        return json.loads((tmp_path / f"out_{flag}" / "study.json").read_text())

    begin(5, "test")
    with pytest.raises(UserError, match=r"holds a study with test_sha256 .*; name another folder"):
        begin(6, "test")
    assert "real_sha256" in begin(5, "real")
    for seed, flag, shared in ((TEST_SEED, "real", "--test scenes: 2 of its 3"),
                               (REAL_SEED, "test", "pairs.npz: 2 of its 3")):
        with pytest.raises(UserError, match=f"{shared} images, the first is number 0, are also learnt from"):
            begin(seed, flag)


@pytest.mark.parametrize(("words", "said"), [
    (["scenes"], "STUDY scenes: there is no such study, there are bedroom, scenes32"),
    (["scenes32", "--label_step", "1000"], "--label_step 1000: must be below 1000"),
    (["scenes32", "--depth_predictor", "none.safetensors"], "none.safetensors"),
    (["bedroom"], "models/lsun_bedroom")])
def test_what_is_wrong_shows_before_anything_is_sampled(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("dag_depth_training", *words, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not list(tmp_path.glob("out/*/*"))


def test_scenes_beside_predictors_of_another_range(tmp_path, capsys):
    predictors = load_predictors(REPOSITORY / "guided_diffusion" / "models" / "depth" / "scenes32.safetensors")
    predictors.depth_range = "2,5"
    save_predictors(tmp_path / "other.safetensors", predictors)
    assert call("dag_depth_training", "scenes32", "--depth_predictor", tmp_path / "other.safetensors", "--out",
                tmp_path / "out") == 2
    assert ("--test scenes: their depth has --depth_range 1,9, and that of the predictors in "
            f"{tmp_path / 'other.safetensors'} is 2,5; name other pairs") in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [
    ({"rows": {}}, "rows in"), ({"rows": {"real": {}}}, "no row may be called exact or real"),
    ({"rows": {"a": 3}}, "a of rows in"), ({"rows": {"a": {}}, "study": {"steps": "x"}}, "--steps 'x'"),
    ({"rows": {"a": {}}, "row": 1}, "row in"),
    ({"rows": {"a": {}}, "published": {"a": {"delta": "0.9 (0.1)"}}}, "published delta: 0.9 (0.1) of row a in")])
def test_a_file_that_is_no_study(content, said, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert call("dag_depth_training", tmp_path / "study.yaml", "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_the_published_table_is_a_study():
    golden = yaml.safe_load((REPOSITORY / "tests" / "golden" / "published.yaml").read_text())["dag_depth_training"]
    published = read_study("bedroom").published
    assert [(row["delta1"], row["absrel"]) for row in golden["rows"]] == [
        (published[row]["delta"], published[row]["abs_rel"]) for row in ("real", "unguided", "dag")]
    assert study_names() == ["bedroom", "scenes32"]


def test_a_depth_network_learns_and_depends_on_its_seed_alone():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    depth = images.mean(dim=1, keepdim=True)
    options = GeneratedOptions(steps=15, batch_size=4)
    one, same = (train_depth_network(images, depth, options, 1)(images)[0] for _ in range(2))
    other = train_depth_network(images, depth, GeneratedOptions(steps=1, batch_size=4), 2)(images)[0]
    assert torch.equal(one, same)
    assert (one - depth).abs().mean() < 0.8 * (other - depth).abs().mean()


def test_intervals_and_verdicts():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.4, (3, 50, 3))
    results = results_of({"unguided": base, "better": base + np.array([0, -0.1, 0.1]), "same": base}, "unguided", 200)
    better = results["better"]
    assert better["delta"]["difference"] == pytest.approx(10) and better["delta"]["verdict"] == "better"
    assert better["abs_rel"]["difference"] == pytest.approx(-0.1) and better["abs_rel"]["verdict"] == "better"
    assert results["same"]["delta"]["verdict"] == "no difference"
    low, high = results["unguided"]["delta"]["interval"]
    assert low < 100 * base[..., 2].mean() < high
    words = {"title": "T", "source": "", "note": ""}
    text = table_of(results, words, {"better": {"delta": 79.06}}, 4, 50, 3)
    assert "| better |" in text and "| 79.06 |" in text and "better |" in text
