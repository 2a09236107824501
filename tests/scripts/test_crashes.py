"""Commands that are killed at any moment, and started again: their files are those of a command that was left alone."""

import json

import numpy as np
import pytest
from commands import call, flags
from crashes import content_of, restore, says_finished, states_of, timeless
from networks import TINY, with_random_weights
from tiny_training import CLASSIFIER, DIFFUSION, MODEL, TRAIN

from guided_diffusion.checkpoint import save_state
from guided_diffusion.script_util import create_model, sr_create_model_and_diffusion

UPSAMPLER = {**TINY, "large_size": 16, "small_size": 8}
del UPSAMPLER["image_size"]


@pytest.fixture
def world(tmp_path, photos, monkeypatch):
    """A folder of pictures, files of samples and two networks, in tmp_path, where the commands run."""
    networks = {"model": (create_model(**TINY), TINY),
                "upsampler": (sr_create_model_and_diffusion(**UPSAMPLER)[0], UPSAMPLER)}
    for name, (network, options) in networks.items():
        save_state(tmp_path / f"{name}.safetensors", with_random_weights(network).state_dict(),
                   {"config": json.dumps(options)})
    images, labels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    np.savez(tmp_path / "small.npz", arr_0=images[:3, :8, :8], arr_1=labels[:3])
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)


SAMPLE = flags({"model_path": "model.safetensors", "timestep_respacing": 1, "batch_size": 2, "num_samples": 3,
                "out": "out"})
SHORT = {**DIFFUSION, **TRAIN, "data_dir": "photos", "out": "out", "batch_size": 2, "save_interval": 1}
COMMANDS = {
    "training": ["image_train", *flags({**MODEL, **SHORT, "in_channels": 3, "lr_anneal_steps": 2, "dropout": 0.1,
                                        "ema_rate": 0.9, "snapshot_images": "2", "grid_interval": 1, "grid_images": 1,
                                        "preview_sampler": "ddim", "preview_steps": 1})],
    "training of a classifier": ["classifier_train", *flags(
        {**CLASSIFIER, **DIFFUSION, "in_channels": 3, "iterations": 2, "batch_size": 2, "log_interval": 1,
         "save_interval": 1, "data_dir": "photos", "val_data_dir": "photos", "out": "out"})],
    "sampling": ["image_sample", *SAMPLE],
    "sampling with shards": ["image_sample", *SAMPLE, "--keep_shards", "True"],
    "upsampling": ["super_res_sample", *flags({"model_path": "upsampler.safetensors", "base_samples": "small.npz",
                                               "timestep_respacing": 1, "batch_size": 2, "out": "out"})],
    "likelihood": ["image_nll", *SAMPLE, "--data_dir", "photos"],
    "evaluation": ["evaluate", "samples.npz", "samples.npz", "--backend", "fashion_mnist", "--cache", "out/cache",
                   "--metrics", "fid", "--json", "out/results.json"],
    "reference": ["make_reference", "samples.npz", "out/reference.npz", "--backend", "fashion_mnist"],
    "reference with a cache": ["make_reference", "photos", "out/reference.npz", "--backend", "fashion_mnist", "--cache",
                               "out/cache"],
    "preparation": ["prepare_images", "photos", "--labels", "prefix", "--image_size", "8", "--out", "out"],
    "preparation of one file": ["prepare_images", "photos", "--image_size", "8", "--out", "out/images.npz"],
    "conversion": ["convert_checkpoint", "model.safetensors", "--dtype", "float16", "--out", "out/half.safetensors"],
    "export": ["export_model", "--model", "fmnist32", "--out", "out/hub"],
    "export for diffusers": ["export_model", "--model", "icons32", "--layout", "diffusers", "--out", "out/pipeline"],
    "scenes": ["scenes_render", *flags({"num_images": 2, "image_size": 8, "out": "out/scenes.npz",
                                        "sheet": "out/sheet.png"})],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_killed_command_goes_on_to_the_same_files(command, world, tmp_path, capsys):
    out = tmp_path / "out"
    with states_of(out) as states:
        assert call(*command) == 0
    whole = timeless(content_of(out))
    for state in states:
        assert not says_finished(state) or whole.items() <= timeless(state).items(), f"no end yet: {sorted(state)}"
        restore(out, state)
        assert call(*command) == 0, f"refused after {sorted(state)}: {capsys.readouterr().err}"
        assert timeless(content_of(out)) == whole, f"otherwise after {sorted(state)}"


@pytest.mark.parametrize("finished", [False, True], ids=["new", "finished"])
def test_a_killed_command_keeps_what_a_longer_run_has_made(finished, world, tmp_path):
    out, command = tmp_path / "out", ["image_sample", *SAMPLE, "--num_samples"]
    if finished:
        assert call(*command, 2) == 0
    assert call(*command, 6, "--keep_shards", "True") == 0
    for name in ("samples_6x16x16x3.npz", "run.json", "grid.png", "status.json", "shards/000002.npz"):
        (out / name).unlink()                   # as where a kill ended it
    begun = content_of(out / "shards")
    with states_of(out) as states:
        assert call(*command, 2) == 0
    whole = content_of(out)
    assert content_of(out / "shards") == begun
    for state in states:
        assert not says_finished(state) or timeless(whole).items() <= timeless(state).items()
        restore(out, state)
        assert call(*command, 2) == 0
        assert timeless(content_of(out)) == timeless(whole), f"otherwise after {sorted(state)}"
    assert call(*command, 6) == 0 and not (out / "shards").exists()
    assert call(*command, 6, "--out", "alone") == 0
    assert (out / "samples_6x16x16x3.npz").read_bytes() == (tmp_path / "alone/samples_6x16x16x3.npz").read_bytes()


SLOW = {
    "probe": ["probe", *flags({"model_path": "model.safetensors", "data_dir": "one.npz", "methods": "PAG", "levels": 1,
                               "num_images": 2, "batch_size": 2, "timestep_respacing": 1, "out": "out"})],
    "explorer": ["explore", *flags({"model_path": "model.safetensors", "timestep_respacing": 1, "images": "0:1",
                                    "pag_scale": 1, "against": "none", "out": "out"})],
    "study of attention": ["attention", *flags({
        "model_path": "model.safetensors", "timestep_respacing": 1, "num_images": 2, "images": "0", "batch_size": 2,
        "blocks": "middle", "bootstrap": 2, "out": "out"})],
}


@pytest.mark.parametrize("command", SLOW.values(), ids=SLOW)
def test_a_command_says_that_it_is_finished_when_all_files_are_there(command, world, tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=np.full((2, 16, 16, 3), 9, np.uint8), arr_1=np.arange(2))
    with states_of(tmp_path / "out") as states:
        assert call(*command) == 0
    whole = content_of(tmp_path / "out")
    assert says_finished(whole)
    assert not any(map(says_finished, states)), f"no end yet: {sorted(next(filter(says_finished, states)))}"
