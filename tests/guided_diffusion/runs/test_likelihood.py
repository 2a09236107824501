"""Likelihoods: the official terms of the bound, images by number, and going on after a kill."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from commands import call, flags
from golden import cases, fill, noise
from networks import TINY
from PIL import Image

from guided_diffusion import checkpoint
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.options import options_from
from guided_diffusion.pixels import from_uint8
from guided_diffusion.runs import likelihood
from guided_diffusion.runs.likelihood import LikelihoodMeter, mean_of
from guided_diffusion.runs.shards import Shards

RESULTS = {"bpd.npz", "vb_terms.npz", "mse_terms.npz", "xstart_mse_terms.npz", "terms.csv"}


@pytest.mark.parametrize("path", cases("bpd_*.npz"), ids=lambda path: path.stem)
def test_terms_are_those_of_the_official_code(path, monkeypatch):
    case = np.load(path)
    seed = int(case["seed"])
    model_options, diffusion_options = options_from(json.loads(str(case["config"])), ModelOptions, DiffusionOptions)
    process, shape = build_diffusion(diffusion_options), (2, 3, 64, 64)

    def recorded(run_seed, image_ids, step, image_shape, stream):
        return noise(shape, seed * 100 + process.num_timesteps - step)

    monkeypatch.setattr(likelihood, "image_noise", recorded)
    images = noise(shape, seed).mul(.4).clamp(-1, 1)
    cond = {"y": torch.from_numpy(case["y"])} if model_options.class_cond else {}
    terms = LikelihoodMeter(fill(build_model(model_options)), process, size=2).terms([0, 1], images, cond)
    assert set(terms) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name, values in terms.items():
        # The prior is a difference of numbers near 1 in float32, of a few times 1e-7.
        np.testing.assert_allclose(values, case[name], rtol=1e-4, atol=1e-9 if name == "prior_bpd" else 0)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 16, 16, 1), np.uint8).repeat(3, axis=3)
    np.savez(tmp_path / "data.npz", pixels, np.array([0, 1, 1, 0, 1]))
    return tmp_path / "data.npz"


@pytest.fixture
def line(tiny_checkpoints, data, tmp_path):
    """The command line of a short run into tmp_path/out; `changes` are flags."""
    def make(**changes):
        return flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", "data_dir": data, "batch_size": 2,
                      "timestep_respacing": 3, "out": tmp_path / "out", **changes})
    return make


def test_results_are_those_of_the_images_one_by_one(line, data, tmp_path, capsys):
    assert call("image_nll", *line()) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*RESULTS, "likelihoods", "run.json", "status.json"}

    options, process = options_from({**TINY, "timestep_respacing": "3"}, ModelOptions, DiffusionOptions)
    network = build_model(options)
    checkpoint.load_into(network, line()[line().index("--model_path") + 1], TINY)
    meter = LikelihoodMeter(network.eval(), build_diffusion(process))
    pixels, labels = (np.load(data)[name] for name in ("arr_0", "arr_1"))
    images = torch.from_numpy(from_uint8(pixels[..., :1])).movedim(3, 1)
    alone = [meter.terms([i], images[[i]], {"y": torch.from_numpy(labels[[i]])}) for i in range(5)]
    terms = {name: np.concatenate([one[name] for one in alone]) for name in alone[0]}

    found = np.load(out / "bpd.npz")
    assert (found["labels"] == labels).all()
    for name in ("total_bpd", "prior_bpd"):
        np.testing.assert_allclose(found[name], terms[name], rtol=1e-4)       # another size of batch
    rows = list(csv.DictReader((out / "terms.csv").open()))
    assert [(row["step"], row["network_step"]) for row in rows] == [("2", "999"), ("1", "500"), ("0", "0")]
    for name in ("vb", "mse", "xstart_mse"):
        np.testing.assert_allclose(np.load(out / f"{name}_terms.npz")["arr_0"], terms[name].mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose([float(row[name]) for row in rows], terms[name].mean(axis=0), rtol=1e-4)
    total = mean_of(found["total_bpd"])
    record = json.loads((out / "run.json").read_text())["bits_per_dimension"]["total_bpd"]
    assert record == pytest.approx(total._asdict(), rel=1e-5)
    assert f"likelihood: {total.mean:.4f} bits per dimension (5 images, 95 % interval {total.low:.4f} to" in said


def test_the_interval_is_that_of_the_mean():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    error = 1.96 * values.std(ddof=1) / 2
    assert mean_of(values) == pytest.approx((3.0, 3 - error, 3 + error), rel=1e-4)
    assert mean_of(values[:1]).known() == {"mean": 1.0}


def test_a_network_that_gives_no_numbers_is_no_likelihood(line, tiny_checkpoints, tmp_path, capsys):
    weights = checkpoint.load_state_dict(tiny_checkpoints / "model.safetensors")
    checkpoint.save_state(tmp_path / "nan.safetensors", {name: value * np.nan for name, value in weights.items()})
    assert call("image_nll", *line(model_path=tmp_path / "nan.safetensors")) == 2
    assert capsys.readouterr().err.endswith("error: the network returned NaN or infinity for image 0, 1\n")


def test_weights_that_are_replaced_while_they_are_read_are_not_recorded(line, tiny_checkpoints, tmp_path, monkeypatch,
                                                                        capsys):
    path, load = tmp_path / "model.safetensors", checkpoint.load_into
    shutil.copy(tiny_checkpoints / path.name, path)

    def training_saves_then(*arguments):
        load(*arguments)
        checkpoint.save_state(path, checkpoint.load_state_dict(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_into", training_saves_then)
        assert call("image_nll", *line(model_path=path)) == 2
    assert f"--model_path {path}: was replaced while it was read; start the command again" in capsys.readouterr().err
    assert not any((tmp_path / "out").rglob("*.npz")) and not any((tmp_path / "out").rglob("run.json"))
    assert call("image_nll", *line(model_path=path)) == 0


def test_a_killed_run_goes_on_and_a_finished_one_grows(line, tmp_path, monkeypatch):
    assert call("image_nll", *line(out=tmp_path / "whole")) == 0
    measured, terms = [], LikelihoodMeter.terms

    def stop_after_the_first_chunk(self, image_ids, *rest, **others):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.extend(image_ids)
        return terms(self, image_ids, *rest, **others)

    monkeypatch.setattr(LikelihoodMeter, "terms", stop_after_the_first_chunk)
    assert call("image_nll", *line(num_samples=3)) == 130
    measured.clear()
    monkeypatch.setattr(LikelihoodMeter, "terms", lambda self, image_ids, *rest, **others: (
        measured.extend(image_ids), terms(self, image_ids, *rest, **others))[1])
    assert call("image_nll", *line(num_samples=3)) == 0
    assert measured == [2]
    assert call("image_nll", *line()) == 0
    assert measured == [2, 3, 3, 4]                 # chunk 1 was cut short: fill stands in the place of image 2
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for count in (5, 3, 5, 1):
        assert call("image_nll", *line(num_samples=count)) == 0
        assert measured == [2, 3, 3, 4]             # none again, be it of a part of a chunk
        assert len(np.load(tmp_path / "out" / "bpd.npz")["total_bpd"]) == count
    measured.clear()
    assert call("image_nll", *line(num_samples=1, out=tmp_path / "one")) == 0
    assert measured == [0]
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_damaged_pictures_are_found_before_the_first_is_measured(line, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[i // 3]}_{i}.png")
    last = folder / "b_4.png"
    last.write_bytes(last.read_bytes()[:-30])               # its header is whole
    assert call("image_nll", *line(data_dir=folder, batch_size=1)) == 2
    said = capsys.readouterr().err
    assert f"error: {last}: cannot be read" in said and said.endswith("; mend or remove what is damaged\n")
    assert not any((tmp_path / "out").iterdir())
    assert call("image_nll", *line(data_dir=folder, num_samples=4)) == 0            # it is not among those


def test_fewer_images_than_were_asked_for_are_said(line, data, caplog):
    caplog.set_level("INFO")
    for changes, said in (({}, False), ({"num_samples": 4}, False), ({"num_samples": 5}, False),
                          ({"num_samples": 100}, True)):
        caplog.clear()
        assert call("image_nll", *line(**changes)) == 0
        assert (f"--num_samples 100: {data} holds 5 images, all are measured" in caplog.messages) is said


def test_only_what_is_unfinished_is_called_so(line, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(likelihood.LikelihoodRun, "_finish", interrupted)
        assert call("image_nll", *line(num_samples=2)) == 130
    for kind in ("unfinished likelihoods", "likelihoods"):
        capsys.readouterr()
        assert call("image_nll", *line(num_samples=2, seed=1)) == 2
        assert f"--out {tmp_path / 'out'}: holds {kind} of another configuration (--seed differs)" \
            in capsys.readouterr().err
        assert call("image_nll", *line(num_samples=2)) == 0


def test_another_run_and_what_does_not_fit_are_refused(line, data, tmp_path, capsys):
    assert call("image_nll", *line(num_samples=2)) == 0
    np.savez(tmp_path / "classes.npz", np.load(data)["arr_0"], np.full(5, 2))
    np.savez(tmp_path / "other.npz", np.load(data)["arr_0"][::-1], np.load(data)["arr_1"])
    for changes, words in (({"seed": 1}, "--seed differs"), ({"data_dir": ""}, "--data_dir: is missing"),
                           ({"data_dir": tmp_path / "other.npz"}, "--data_dir differs"),
                           ({"model_path": ""}, "--model_path is not given"),
                           ({"data_dir": tmp_path / "classes.npz"}, "more classes than the network, which knows 2"),
                           ({"split": "test"}, "has no test split")):
        capsys.readouterr()
        assert call("image_nll", *line(**changes)) == 2
        assert words in capsys.readouterr().err
    assert call("image_nll", *line(seed=1, overwrite=True)) == 0


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_the_folder_of_another_kind_of_run_is_kept(line, tiny_checkpoints, tmp_path, capsys, monkeypatch, finished):
    sampling = flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 2,
                      "num_samples": 1, "out": tmp_path / "out"})
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(Shards, "pack", interrupted)
        assert call("image_sample", *sampling) == (0 if finished else 130)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert call("image_nll", *line(num_samples=1)) == 2
    said = capsys.readouterr().err
    what = "its run.json is of another kind of run, or unreadable" if finished else "holds samples, finished or not"
    assert f"error: --out {tmp_path / 'out'}: {what}; name another folder, or pass --overwrite True" in said
    assert contents(tmp_path / "out") == before
    with monkeypatch.context() as patch:
        patch.setattr(likelihood.LikelihoodRun, "_finish", interrupted)
        assert call("image_nll", *line(num_samples=1, overwrite=True)) == 130
    assert call("image_nll", *line(num_samples=1)) == 0             # goes on, as its overwriting was allowed
    assert "bits_per_dimension" in json.loads((tmp_path / "out" / "run.json").read_text())


def test_samples_that_replaced_likelihoods_are_kept(line, tiny_checkpoints, tmp_path):
    assert call("image_nll", *line(num_samples=1)) == 0
    assert call("image_sample", *flags({
        **TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 2, "num_samples": 1,
        "out": tmp_path / "out", "overwrite": True})) == 0
    before = contents(tmp_path / "out")
    assert call("image_nll", *line(num_samples=1)) == 2
    assert contents(tmp_path / "out") == before


def interrupted(*arguments, **others):
    raise KeyboardInterrupt


def contents(folder):
    """The bytes of all files but locks, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_fewer_classes_than_the_network_has_are_refused_as_they_may_be_any_of_them(line, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "few" / "dog_0.png")
    assert call("image_nll", *line(data_dir=tmp_path / "few")) == 2
    assert "has 1 class: 0 dog, and the network knows 2; an .npz file" in capsys.readouterr().err
