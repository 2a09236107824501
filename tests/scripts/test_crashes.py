"""Commands that are killed at any moment, and started again: their files are those of a command that was left alone."""

import json

import numpy as np
import pytest
from commands import call, flags
from crashes import content_of, restore, states_of, timeless
from networks import TINY, with_random_weights
from tiny_training import CLASSIFIER, DIFFUSION, MODEL, TRAIN

from guided_diffusion.checkpoint import save_state
from guided_diffusion.script_util import create_model


@pytest.fixture
def world(tmp_path, photos, monkeypatch):
    """A folder of pictures, a file of samples and a network, in tmp_path, where the commands run."""
    save_state(tmp_path / "model.safetensors", with_random_weights(create_model(**TINY)).state_dict(),
               {"config": json.dumps(TINY)})
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(4) % 2)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)


SAMPLE = flags({"model_path": "model.safetensors", "timestep_respacing": 1, "batch_size": 2, "num_samples": 3,
                "out": "out"})
SHORT = {**DIFFUSION, **TRAIN, "data_dir": "photos", "out": "out", "batch_size": 2, "save_interval": 1}
COMMANDS = {
    "training": ["image_train", *flags({**MODEL, **SHORT, "in_channels": 3, "lr_anneal_steps": 2, "dropout": 0.1,
                                        "ema_rate": 0.9, "snapshot_images": "2"})],
    "training of a classifier": ["classifier_train", *flags(
        {**CLASSIFIER, **DIFFUSION, "in_channels": 3, "iterations": 2, "batch_size": 2, "log_interval": 1,
         "save_interval": 1, "data_dir": "photos", "val_data_dir": "photos", "out": "out"})],
    "sampling": ["image_sample", *SAMPLE],
    "sampling with shards": ["image_sample", *SAMPLE, "--keep_shards", "True"],
    "likelihood": ["image_nll", *SAMPLE, "--data_dir", "photos"],
    "evaluation": ["evaluate", "samples.npz", "samples.npz", "--backend", "fashion_mnist", "--cache", "out/cache",
                   "--metrics", "fid", "--json", "out/results.json"],
    "reference": ["make_reference", "samples.npz", "out/reference.npz", "--backend", "fashion_mnist"],
    "preparation": ["prepare_images", "photos", "--labels", "prefix", "--image_size", "8", "--out", "out"],
    "conversion": ["convert_checkpoint", "model.safetensors", "--dtype", "float16", "--out", "out/half.safetensors"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_killed_command_goes_on_to_the_same_files(command, world, tmp_path, capsys):
    out = tmp_path / "out"
    with states_of(out) as states:
        assert call(*command) == 0
    whole = timeless(content_of(out))
    for state in states:
        restore(out, state)
        assert call(*command) == 0, f"refused after {sorted(state)}: {capsys.readouterr().err}"
        assert timeless(content_of(out)) == whole, f"otherwise after {sorted(state)}"
