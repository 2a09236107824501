"""Depth-aware guidance from the command line: what its options do, and what is refused before any work starts."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
import yaml
from commands import REPOSITORY, call, flags, samples_in
from networks import TINY, with_random_weights

from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.features import feature_channels
from guided_diffusion.depth.predictor import DepthPredictors, save_predictors
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import DagOptions
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.script_util import create_model

PRIOR = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
         "attention_resolutions": "4", "num_heads": 1}
BRANCHES = {"strong": ("output.0", "output.2"), "weak": ("output.2",)}


def save_tiny_predictors(path, model, sha256, size=16, branches=BRANCHES, **extra):
    channels = {name: {**feature_channels(model, blocks), **extra} for name, blocks in branches.items()}
    save_predictors(path, with_random_weights(DepthPredictors(channels, size, "image", sha256)))
    return path


@pytest.fixture(scope="module")
def files(tiny_checkpoints, tmp_path_factory):
    """Flags of the tiny network, of its depth predictors and of a prior."""
    folder = tmp_path_factory.mktemp("depth")
    model_path = tiny_checkpoints / "model.safetensors"
    predictors = save_tiny_predictors(folder / "depth.safetensors", create_model(**TINY), sha256_of(model_path))
    save_state(folder / "prior.safetensors", with_random_weights(create_model(**PRIOR), seed=2).state_dict(),
               {"config": json.dumps(PRIOR)})
    return {"model_path": model_path, "depth_predictor": predictors, "depth_prior": folder / "prior.safetensors"}


@pytest.fixture
def sample(files, tmp_path):
    """Runs a script with the tiny network and changed flags, in a folder of its own; returns its images."""
    count = itertools.count()

    def run(script="dag_sample", **changes):
        out = tmp_path / f"out{next(count)}"
        line = {**TINY, **files, "timestep_respacing": "3", "num_samples": 4, "batch_size": 2, **changes, "out": out}
        assert call(script, *flags(line)) == 0
        return samples_in(out)[0]
    return run


def test_every_option_has_an_effect(sample):
    strong = {"dcg_scale": 300, "dpg_scale": 300, "dag_reduction": "sum"}
    settings = [{"dcg_scale": 0, "dpg_scale": 0}, {**strong, "dpg_scale": 0}, {**strong, "dcg_scale": 0}, strong,
                {**strong, "dag_reduction": "mean", "dcg_scale": 5000}, {**strong, "dcg_scale": 200},
                {**strong, "dpg_scale": 200}, {**strong, "depth_tau": 0.5}, {**strong, "dag_start": 2},
                {**strong, "dag_stop": 1}, {**strong, "use_ddim": True},
                {**strong, "guide_scale": 1.5, "mask": "global"}]
    images = [sample(**setting, num_samples=2) for setting in settings]
    same = [(settings[i], settings[j]) for i in range(len(images)) for j in range(i) if (images[i] == images[j]).all()]
    assert not same


def test_off_is_image_sample_and_needs_no_files(sample):
    plain = sample("image_sample")
    off = {"dcg_scale": 0, "dpg_scale": 0, "depth_predictor": "", "depth_prior": ""}
    assert (sample(**off) == plain).all()
    assert (sample("image_sample", dcg_scale=500, dag_reduction="sum", dag_start=0) == plain).all()


def test_images_depend_on_their_number_alone(sample):
    guided = {"dcg_scale": 300, "dpg_scale": 300, "dag_reduction": "sum"}
    images, more, single = sample(**guided), sample(**guided, num_samples=5), sample(**guided, batch_size=1)
    assert (more[:4] == images).all()
    assert np.abs(single.astype(int) - images).max() <= 1
    assert (images != sample(**guided, seed=1)).any()


def test_the_record_names_the_files_by_content(sample, files, tmp_path):
    sample(dcg_scale=1, dpg_scale=1)
    record = json.loads((tmp_path / "out0" / "run.json").read_text())
    assert record["sha256"].keys() == {"samples", "model", "depth_predictor", "depth_prior"}
    assert record["sha256"]["depth_prior"] == sha256_of(files["depth_prior"])
    assert record["configuration"]["dcg_scale"] == 1


def test_another_prior_in_a_folder_of_samples_is_refused(files, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_state(other, with_random_weights(create_model(**PRIOR), seed=3).state_dict(), {"config": json.dumps(PRIOR)})
    line = {**TINY, **files, "timestep_respacing": "1", "num_samples": 1, "out": tmp_path / "out"}
    assert call("dag_sample", *flags(line)) == 0
    assert call("dag_sample", *flags({**line, "depth_prior": other})) == 2
    assert "depth_prior" in capsys.readouterr().err


def test_a_prior_of_another_depth_range_is_refused(files, tmp_path, capsys, caplog):
    """By what depth_images, image_train and convert_checkpoint write; the predictors learnt each map's own range."""
    caplog.set_level("INFO")
    line = {**TINY, **files, "timestep_respacing": "1", "num_samples": 1}
    for depth_range, code in (("1,9", 2), ("image", 0)):
        data, out, prior = (tmp_path / f"{depth_range}{end}" for end in (".npz", "", ".safetensors"))
        depth = np.random.default_rng(0).uniform(1, 9, (4, 8, 8))
        np.savez(tmp_path / "pairs.npz", arr_0=np.full((4, 8, 8, 3), 9, np.uint8), depth=depth)
        assert call("depth_images", "--data", tmp_path / "pairs.npz", "--depth_range", depth_range, "--image_size", 8,
                    "--out", data) == 0
        trained = {**PRIOR, "data_dir": data, "batch_size": 2, "lr_anneal_steps": 1, "ema_rate": "0.9", "out": out}
        assert call("image_train", *flags(trained)) == 0
        assert call("convert_checkpoint", out / "ema_0.9.safetensors", "--out", prior) == 0
        caplog.clear()
        sampled = {**line, "depth_prior": prior, "out": tmp_path / f"{depth_range}_out"}
        assert call("dag_sample", *flags(sampled)) == code
        assert "must be image, that of --depth_predictor" not in caplog.text
    assert (f"--depth_prior {tmp_path / '1,9.safetensors'}: was trained on depth images of --depth_range 1,9, and the "
            "predictors of --depth_predictor on image; the two must be the same") in capsys.readouterr().err
    assert call("dag_sample", *flags({**line, "out": tmp_path / "unknown"})) == 0
    assert [message for message in caplog.messages if "must be" in message] == [
        f"--depth_prior {files['depth_prior']}: does not say of which --depth_range its depth images were; it must be "
        "image, that of --depth_predictor"]


def refusals(files, folder):
    model, sha256 = create_model(**TINY), sha256_of(files["model_path"])
    three_channels = {**PRIOR, "in_channels": 3}
    save_state(folder / "colour.safetensors", create_model(**three_channels).state_dict(),
               {"config": json.dumps(three_channels)})
    strange = save_tiny_predictors(folder / "strange.safetensors", model, sha256, **{"output.9": 32})
    wide = save_tiny_predictors(folder / "wide.safetensors", model, sha256, **{"output.2": 77})
    large = save_tiny_predictors(folder / "large.safetensors", model, sha256, size=32)
    foreign = save_tiny_predictors(folder / "foreign.safetensors", model, "0" * 64)
    single = save_tiny_predictors(folder / "single.safetensors", model, sha256, branches={"weak": ("output.2",)})
    return [
        ({"depth_predictor": ""}, "--depth_predictor is not given"),
        ({"depth_prior": ""}, "--depth_prior is not given"),
        ({"depth_predictor": folder / "none.safetensors"}, "none.safetensors: there is no such file"),
        ({"depth_predictor": files["model_path"]}, "is no file of depth predictors"),
        ({"depth_predictor": strange}, "'output.9' is no block of this network"),
        ({"depth_predictor": wide}, "read 77 channels from block 'output.2'"),
        ({"depth_predictor": large}, "for images of 32 pixels"),
        ({"depth_predictor": foreign}, "was trained on another network"),
        ({"depth_predictor": single}, "no branch 'strong'"),
        ({"depth_prior": folder / "colour.safetensors"}, "--in_channels 1"),
        ({"depth_prior": files["model_path"]}, "has no config"),
        ({"dcg_scale": "much"}, "--dcg_scale 'much': must be a number"),
        ({"depth_tau": 1.5}, "--depth_tau 1.5: must be at most 1"),
        ({"dag_reduction": "max"}, "--dag_reduction max: must be one of mean, sum"),
        ({"dag_start": -1}, "--dag_start -1: must be at least 0"),
        ({"dag_start": 5, "dag_stop": 5}, "--dag_start 5 --dag_stop 5: the first must be greater than the second"),
    ]


def test_what_is_refused_before_anything_is_sampled(files, tmp_path, capsys):
    for changes, message in refusals(files, tmp_path):
        line = {**TINY, **files, "timestep_respacing": "3", "num_samples": 2, **changes, "out": tmp_path / "out"}
        assert call("dag_sample", *flags(line)) == 2, changes
        assert message in capsys.readouterr().err, changes
        assert not list((tmp_path / "out").glob("*")), changes


ROWS = sorted((REPOSITORY / "configs" / "dag_dfid").glob("[bc]*.yaml"))
GUIDED = [*sorted((REPOSITORY / "configs").glob("*_dag*.yaml")), *(row for row in ROWS if "_dcg_dpg" in row.stem)]


def configured(path):
    """The options of scripts/dag_sample.py with this configuration, by their class."""
    options = parse_options(["--config", str(path)], SampleOptions, *option_classes(), preset=preset_values,
                            defaults=DagOptions.switched_on)
    return {type(one): one for one in options}


@pytest.mark.parametrize("path", GUIDED, ids=lambda path: path.stem)
def test_configurations_load_and_build_their_network(path):
    options = configured(path)
    sample, model, dag = (options[kind] for kind in (SampleOptions, ModelOptions, DagOptions))
    assert {"dcg_scale", "dpg_scale"} <= yaml.safe_load(path.read_text()).keys()
    assert dag.dcg_scale == dag.dpg_scale == 40
    assert sample.model_path and dag.depth_predictor and dag.depth_prior
    with torch.device("meta"):
        network = build_model(model)
    assert len(network.output_blocks) >= 8          # so that S = {2, 4, 5, 6, 7} and W = {6} exist


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_rows_of_the_published_table_turn_off_what_they_do_not_name(path):
    dag = configured(path)[DagOptions]
    assert (dag.dcg_scale, dag.dpg_scale) == (40 * ("_dcg" in path.stem), 40 * ("_dpg" in path.stem))


@pytest.mark.parametrize("name", ["scenes32_dag", "scenes32_dag_paper_blocks"])
def test_the_bundled_model_is_guided_by_the_bundled_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    line = flags({"config": f"configs/{name}.yaml", "timestep_respacing": 2, "num_samples": 2, "batch_size": 2})
    assert call("dag_sample", *line, "--out", tmp_path / "on") == 0
    assert call("dag_sample", *line, "--dcg_scale", 0, "--dpg_scale", 0, "--out", tmp_path / "off") == 0
    guided, unguided = (samples_in(tmp_path / name)[0].astype(int) for name in ("on", "off"))
    assert 0 < np.abs(guided - unguided).mean() < 64


def test_the_scripts_differ_in_the_scales_alone(capsys):
    helps = {}
    for script in ("image_sample", "dag_sample"):
        assert call(script, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        helps[script] = dict(re.findall(r"--(\w+) (?:\[?[A-Z]+\]? )?[^-]*?\(default: ([^)]*)\)", text))
    off, on = helps.values()
    assert len(off) > 40 and off.keys() == on.keys()
    assert {name for name in off if off[name] != on[name]} == {"dcg_scale", "dpg_scale"}
