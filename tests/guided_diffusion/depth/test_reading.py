"""Depth images by a predictor: what it reads of noised images, by seed and image alone, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from commands import call, flags
from depth_world import CHAIN, MODEL, world_flags, write_world

from guided_diffusion import checkpoint
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.depth import reading
from guided_diffusion.depth.features import decoder_features
from guided_diffusion.depth.predictor import load_predictors, save_predictors
from guided_diffusion.depth.train import DepthTrainOptions, load_network
from guided_diffusion.fetch import sha256_of
from guided_diffusion.npz import stored_range
from guided_diffusion.options import fill
from guided_diffusion.pixels import from_uint8
from guided_diffusion.rng import stream_generator


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network of random weights, pairs, and predictors trained for a few steps."""
    folder = write_world(tmp_path_factory.mktemp("depth"))
    assert call("depth_train", *flags(world_flags(folder, folder / "predictors.safetensors"))) == 0
    return folder


def given(world, out, **changes):
    return {**MODEL, **CHAIN, "model_path": str(world / "model.safetensors"), "data": str(world / "pairs.npz"),
            "depth_predictor": str(world / "predictors.safetensors"), "map_size": 4, "out": str(out), **changes}


def read(world, out, **changes):
    assert call("depth_predict", *flags(given(world, out, **changes))) == 0
    with np.load(out) as file:
        return file["arr_0"]


def test_what_the_strong_predictor_reads_at_a_random_step(world, tmp_path, capsys):
    images = read(world, tmp_path / "read.npz", num_images=6, seed=3)
    assert stored_range(str(tmp_path / "read.npz")) == "0,1"
    for other in (np.array([0.5, 10.0]), "whatever", 3):
        np.savez(tmp_path / "other.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8), depth_range=other)
        assert stored_range(str(tmp_path / "other.npz")) == ""
    assert images.shape == (6, 4, 4, 3) and images.dtype == np.uint8
    network = load_network(*fill(world_flags(world, tmp_path / "none.safetensors"),
                                 [DepthTrainOptions, ModelOptions, DiffusionOptions], None, source="here"))
    branch = load_predictors(world / "predictors.safetensors").branches["strong"]
    with np.load(world / "pairs.npz") as file:
        clean = torch.from_numpy(from_uint8(file["arr_0"][:6].transpose(0, 3, 1, 2)))
    beyond = 0
    for index, x in enumerate(clean):
        generator = stream_generator("depth reading", 3, index)
        t = torch.tensor([int(generator.integers(100))])
        noise = torch.from_numpy(generator.standard_normal((3, 8, 8), np.float32))
        x_t = network.diffusion.q_sample(x[None], t, noise[None])
        maps = decoder_features(network.model, branch.blocks, x_t, t, graph=False)
        with torch.no_grad():
            depth = torch.nn.functional.interpolate(branch(maps, t), (4, 4), mode="bilinear", antialias=True)[0, 0]
        beyond += int((depth.abs() > 1).sum())
        expected = np.rint((depth.clamp(-1, 1).numpy() + 1) * 127.5)
        assert all(abs(images[index, :, :, channel] - expected).max() <= 1 for channel in range(3))
    assert f"({100 * beyond / 96:.2g} % of the pixels were beyond the range and clamped)" in capsys.readouterr().out


def test_each_image_depends_on_the_seed_and_its_place_alone(world, tmp_path, monkeypatch):
    images = read(world, tmp_path / "all.npz")
    monkeypatch.setattr(reading, "AT_ONCE", 3)
    few = read(world, tmp_path / "few.npz", num_images=7).astype(int)
    assert len(images) == 20 and abs(few - images[:7]).max() <= 1
    assert abs(few - read(world, tmp_path / "other.npz", num_images=7, seed=1)).max() > 1
    assert abs(few - read(world, tmp_path / "weak.npz", num_images=7, branch="weak")).max() > 1


def test_noise_only_below_a_step(world, tmp_path, monkeypatch):
    seen = []
    features_at = reading.features_at
    monkeypatch.setattr(reading, "features_at", lambda *a: seen.append(a[4]) or features_at(*a))
    for below in (None, 30):
        read(world, tmp_path / f"{below}.npz", **({} if below is None else {"below_step": below}))
    anywhere, low = seen
    assert anywhere.max() >= 30 and low.max() < 30 and len(set(low.tolist())) > 5


@pytest.mark.parametrize(("changes", "said"), [
    ({"depth_predictor": ""}, "--depth_predictor is not given"),
    ({"below_step": 101}, "--below_step 101: must be at most 100"),
    ({"branch": "middle"}, "--branch middle: must be one of strong, weak"),
    ({"num_images": 21}, "--num_images 21: must be at most 20"),
    ({"out": "images.png"}, "images.png"),
    ({"model_path": "conditional", "class_cond": True, "num_classes": 2}, "has classes"),
])
def test_what_is_refused(world, tmp_path, capsys, changes, said):
    if changes.get("model_path"):
        changes = {**changes, "model_path": str(world / "conditional.safetensors")}
    assert call("depth_predict", *flags(given(world, tmp_path / "out.npz") | changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_predictors_of_another_network_are_refused(world, tmp_path, capsys):
    predictors = load_predictors(world / "predictors.safetensors")
    predictors.network_sha256 = "0" * 64
    save_predictors(tmp_path / "other.safetensors", predictors)
    other = given(world, tmp_path / "out.npz", depth_predictor=str(tmp_path / "other.safetensors"))
    assert call("depth_predict", *flags(other)) == 2
    assert "trained on another network" in capsys.readouterr().err


def test_predictors_of_another_network_in_the_same_file_are_refused(world, tmp_path, capsys):
    state = checkpoint.load_state_dict(world / "model.safetensors")
    torch.save({"model": state, "ema": {name: 2 * value for name, value in state.items()}}, tmp_path / "both.pt")
    learnt = tmp_path / "model_predictors.safetensors"
    both = {"model_path": str(tmp_path / "both.pt")}
    assert call("depth_train", *flags(world_flags(world, learnt, **both, checkpoint_entry="model"))) == 0
    both |= {"depth_predictor": str(learnt)}
    sampled = {**MODEL, **CHAIN, **both, "num_samples": 1, "batch_size": 1, "dcg_scale": 1, "dpg_scale": 0,
               "out": str(tmp_path / "out")}
    for command, line in (("depth_predict", given(world, tmp_path / "out.npz", num_images=2, **both)),
                          ("dag_sample", sampled)):
        assert call(command, *flags(line)) == 2
        assert f"{learnt}: was trained on another network: on the entry model of " in capsys.readouterr().err
        assert call(command, *flags({**line, "checkpoint_entry": "model"})) == 0


def test_a_network_that_gives_no_numbers_is_refused(world, tmp_path, capsys):
    state = checkpoint.load_state_dict(world / "model.safetensors")
    state["output_blocks.1.0.in_layers.2.weight"] *= 1e38
    checkpoint.save_state(tmp_path / "model.safetensors", state)
    predictors = load_predictors(world / "predictors.safetensors")
    predictors.network_sha256 = sha256_of(tmp_path / "model.safetensors")
    save_predictors(tmp_path / "p.safetensors", predictors)
    bad = given(world, tmp_path / "out.npz", model_path=str(tmp_path / "model.safetensors"),
                depth_predictor=str(tmp_path / "p.safetensors"))
    assert call("depth_predict", *flags(bad)) == 2
    assert "the network returned NaN or infinity in block 'output.1'" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_the_data_itself_is_not_overwritten(world, tmp_path, capsys):
    data = tmp_path / "pairs.npz"
    shutil.copy(world / "pairs.npz", data)
    for command, line in (("depth_predict", given(world, data, data=str(data))),
                          ("depth_images", {"data": data, "out": f"{tmp_path}/../{tmp_path.name}/pairs.npz"})):
        assert call(command, *flags(line)) == 2
        assert "is --data itself, which would be lost" in capsys.readouterr().err
    assert data.read_bytes() == (world / "pairs.npz").read_bytes()
