"""Averages by power functions: what they weigh, and those of other widths that snapshots give after training."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import call
from tiny_training import largest_difference, train, weights

from guided_diffusion import checkpoint, train_util
from guided_diffusion.errors import UserError
from guided_diffusion.model_folders import best_weights
from guided_diffusion.stated import statement_of
from guided_diffusion.training.averages import Kept, PowerProfile, combine, products, sampled, update_ema
from guided_diffusion.training.options import TrainOptions


def discrete(step, width, total):
    """The weights that an average has of steps 1 to `total`: p(s) is the integral of the profile over (s - 1, s)."""
    share = np.minimum(np.arange(total + 1) / step, 1)
    return np.diff(share ** (PowerProfile(width).exponent + 1))


@pytest.mark.parametrize("width", [0.001, 0.05, 0.1, 0.28])
def test_the_width_is_the_profile_s_deviation_from_its_mean(width):
    exponent = PowerProfile(width).exponent
    t = (np.arange(100_000) + 0.5) / 100_000
    p = (exponent + 1) * t**exponent / len(t)
    assert p.sum() == pytest.approx(1, rel=1e-4)
    assert np.sqrt((p * (t - (p * t).sum()) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def test_an_average_weighs_each_step_as_its_profile_says():
    rng, total = np.random.default_rng(0), 40
    path = rng.standard_normal((total, 7))
    average = [torch.full((7,), 9.0, dtype=torch.float64)]             # the start, which is forgotten
    for step in range(total):
        update_ema(average, [torch.from_numpy(path[step])], PowerProfile(0.1).decay(step, warms_up=True))
    assert average[0].numpy() == pytest.approx(discrete(total, 0.1, total) @ path, rel=1e-12)


def test_products_are_the_integrals():
    kept = [Kept(10, PowerProfile(0.1)), Kept(10, PowerProfile(0.2)), Kept(40, PowerProfile(0.05))]
    rows = np.stack([discrete(one.step * 1000, one.profile.width, 40_000) for one in kept]) * 1000
    assert products(kept, kept) == pytest.approx(rows @ rows.T / 1000, rel=1e-4)          # the steps are 1 / 1000


@pytest.mark.parametrize("width, error", [(0.07, 0.004), (0.15, 0.01), (0.03, 0.04)])
def test_another_width_is_reconstructed_from_snapshots(width, error):
    total, rng = 320, np.random.default_rng(1)
    kept = [Kept(step, PowerProfile(tracked)) for step in range(20, total + 1, 20) for tracked in (0.05, 0.1)]
    path = np.cumsum(rng.standard_normal((total, 5)), axis=0)
    snapshots = np.stack([discrete(one.step, one.profile.width, total) for one in kept]) @ path
    found = combine(kept, Kept(total, PowerProfile(width)))
    assert found.factors.sum() == pytest.approx(1, rel=1e-12) and found.error < error
    truth = discrete(total, width, total)
    rows = np.stack([discrete(one.step, one.profile.width, total) for one in kept])
    # A second computation: the profiles themselves, step by step, instead of integrals.
    best = np.linalg.lstsq(rows.T, truth, rcond=None)[0]
    distance = np.linalg.norm(found.factors @ rows - truth) / np.linalg.norm(truth)
    assert distance == pytest.approx(found.error, rel=0.02)
    assert distance == pytest.approx(np.linalg.norm(best @ rows - truth) / np.linalg.norm(truth), rel=0.05)
    assert np.abs(found.factors @ snapshots - truth @ path).max() < error * np.linalg.norm(truth) * np.linalg.norm(path)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A training of 12 steps that tracks three widths, with a snapshot after each step."""
    return train(data_dir, tmp_path_factory.mktemp("run"), lr_anneal_steps=12, lr=1e-2, ema_rate="",
                 ema_power="0.05,0.1,0.2", snapshot_images=4)


def test_the_command_makes_what_a_training_tracked(run, tmp_path, capsys):
    tracked = weights(run, "ema_power_0.2")
    for path in run.glob("*ema_power_0.2*"):
        path.rename(tmp_path / path.name)
    assert call("ema_reconstruct", run, "--sigma_rel", "0.2,0.1") == 0
    assert capsys.readouterr().out.split() == [str(run / f"reconstructed_{width}.safetensors") for width in (0.2, 0.1)]
    for path in tmp_path.glob("*.safetensors"):
        path.rename(run / path.name)
    made = weights(run, "reconstructed_0.2")
    assert largest_difference(made, tracked) < 0.05 * largest_difference(weights(run), tracked)
    assert largest_difference(weights(run, "reconstructed_0.1"), weights(run, "ema_power_0.1")) == 0
    metadata = checkpoint.read_metadata(run / "reconstructed_0.2.safetensors")
    assert metadata["step"] == "12" and metadata["sigma_rel"] == "0.2"
    assert json.loads(metadata["reconstruction"])["snapshots"] == 24
    assert statement_of(run / "reconstructed_0.2.safetensors", "diffusion").facts["num_channels"] == 32


@pytest.mark.parametrize("rates, widths", [("0.9,0.999,0.99", "0.1"), ("", "0.2,0.05,0.1"), ("", "")])
def test_a_folder_is_sampled_with_the_average_that_is_looked_at_in_training(tmp_path, rates, widths):
    profiles = TrainOptions(ema_rate=rates, ema_power=widths).profiles
    for name in ("model", "reconstructed_0.01", *(profile.name for profile in profiles)):
        (tmp_path / f"{name}.safetensors").touch()
    profile = sampled(profiles)
    assert best_weights(tmp_path).stem == (profile.name if profile else "model")


def test_an_earlier_step(run, tmp_path):
    assert call("ema_reconstruct", run, "--sigma_rel", 0.1, "--step", 5, "--out", tmp_path) == 0
    assert largest_difference(weights(tmp_path, "reconstructed_0.1"), weights(run, "snapshot_20_ema_power_0.1")) == 0


def test_a_step_without_a_snapshot_is_that_of_the_last_one_before(run, tmp_path, caplog):
    for path in [path for images in (12, 20, 32) for path in run.glob(f"snapshot_{images}_*")]:
        shutil.copy(path, tmp_path)
    made = tmp_path / "reconstructed_0.1.safetensors"
    caplog.set_level("INFO")
    for step in (6, 7, 5):
        caplog.clear()
        assert call("ema_reconstruct", tmp_path, "--sigma_rel", 0.1, "--step", step) == 0
        assert largest_difference(weights(tmp_path, made.stem), weights(run, "snapshot_20_ema_power_0.1")) == 0
        assert checkpoint.read_metadata(made)["step"] == "5"
        assert (f"--step {step}: there is no snapshot of it in {tmp_path}" in caplog.text) == (step > 5)
        assert f"{made}: after step 5, of 6 snapshots; the profile is met within 0 of its norm" in caplog.messages


def test_a_resumed_training_keeps_the_averages(run, data_dir, tmp_path, monkeypatch):
    values = {"lr_anneal_steps": 12, "lr": 1e-2, "ema_rate": "", "ema_power": "0.05,0.1,0.2", "snapshot_images": 4}
    descend = train_util.TrainLoop._descend

    def stop_at_5(loop):
        if loop.step == 5:
            raise KeyboardInterrupt
        return descend(loop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_util.TrainLoop, "_descend", stop_at_5)
        train(data_dir, tmp_path, **values)
    train(data_dir, tmp_path, **values)
    for name in ("ema_power_0.05", "snapshot_28_ema_power_0.2"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (run / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("text", ["0", "0.3", "wide", "0.1,0.1", "0.1,"])
def test_widths_that_are_none(text, tmp_path, capsys):
    with pytest.raises(UserError, match=f"--ema_power {text}: must be different widths from 0.001 to 0.28, with com"):
        TrainOptions(ema_power=text)


def test_folders_without_snapshots(run, tmp_path, capsys):
    for words, said in (([tmp_path], "holds no averages by power functions"), ([run, "--step", "0.5"], "whole number"),
                        ([run, "--step", "13"], f"--step 13: the last snapshot in {run} is of step 12"),
                        ([run, tmp_path], "2 folders given: name one"),
                        ([tmp_path / "none"], "none: there is no such folder")):
        assert call("ema_reconstruct", *words, "--sigma_rel", "0.1") == 2
        assert said in capsys.readouterr().err
