"""Training: it learns, a kill does not harm it, and batches, microbatches and ranks are only ways of doing the same."""

import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import PATIENCE, REPOSITORY, call, samples_in
from PIL import Image
from tiny_training import (
    DIFFUSION,
    MODEL,
    TRAIN,
    flags,
    largest_difference,
    log_of,
    rows_of,
    train,
    train_tiny_classifier,
    weights,
)
from torch import nn

from guided_diffusion import checkpoint, execution, train_util
from guided_diffusion.errors import LostRankError, PeerError, UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.stated import statement_of
from guided_diffusion.train_util import classification_losses
from guided_diffusion.training.averages import update_ema
from guided_diffusion.training.options import ClassifierTrainOptions, TrainOptions
from guided_diffusion.training.state import TrainingState

TRAINING = REPOSITORY / "scripts" / "image_train.py"


def test_learns(data_dir, tmp_path):
    train(data_dir, tmp_path, lr_anneal_steps=40, batch_size=8, lr=2e-3, diffusion_steps=100)
    losses = log_of(tmp_path, "mse")
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    average, last = weights(tmp_path, "ema_0.99"), weights(tmp_path)
    assert 0 < largest_difference(average, last) < 0.1


def test_files_of_a_run(data_dir, tmp_path):
    train(data_dir, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "ema_0.9.safetensors", "ema_0.99.safetensors", "loss.png", "model.safetensors", "progress.csv",
        "state.safetensors", "status.json"]
    metadata = checkpoint.read_metadata(tmp_path / "ema_0.9.safetensors")
    config = json.loads(metadata["config"])
    assert metadata["step"] == "3" and config["num_channels"] == 32 and config["diffusion_steps"] == 10
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert config.items() <= recorded["model"].items() and recorded["training"]["lr"] == 1e-3
    assert "use_bf16" in recorded["model"] and "use_bf16" not in config     # how it ran is no fact about the network
    assert {"loss", "mse", "vb", "grad_norm", "lr", "samples", "loss_q0", "loss_q3"} <= set(
        (tmp_path / "progress.csv").read_text().splitlines()[0].split(","))


RUN = {"lr_anneal_steps": 40, "save_interval": 5, "schedule_sampler": "loss-second-moment", "dropout": 0.1,
       **DIFFUSION, "diffusion_steps": 4, "lr_warmup_steps": 4}


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(python, data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [python, TRAINING, *flags(**{**MODEL, **TRAIN, **RUN}, data_dir=data_dir, out=killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "state.safetensors").exists() and len(log_of(killed, "loss")) > 12:
            process.kill()
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = int(checkpoint.read_metadata(killed / "state.safetensors")["step"])
    train(data_dir, whole, **RUN)
    assert 0 < step < 40

    train(data_dir, killed, **RUN)
    for name in ("state", "model", "ema_0.9", "ema_0.99"):
        assert largest_difference(weights(whole, name), weights(killed, name)) == 0, name
    assert log_of(whole, "loss") == log_of(killed, "loss")
    assert "sampler/history" in weights(killed, "state")


def test_a_finished_run_stays_as_it_is(data_dir, tmp_path):
    train(data_dir, tmp_path)
    before = weights(tmp_path, "state")
    train(data_dir, tmp_path)
    assert largest_difference(before, weights(tmp_path, "state")) == 0 and len(log_of(tmp_path, "loss")) == 3
    train(data_dir, tmp_path, lr_anneal_steps=5)
    assert log_of(tmp_path, "step") == [1, 2, 3, 4, 5]


def test_a_warm_up_that_lasts_to_the_end_is_said(data_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "short", lr_anneal_steps=3, lr_warmup_steps=2)
    assert "--lr_warmup_steps" not in caplog.text
    train(data_dir, tmp_path / "long", lr_anneal_steps=3, lr_warmup_steps=3)
    assert ("--lr_warmup_steps 3: the rate rises until the end and does not stay at --lr, as --lr_anneal_steps is 3"
            in caplog.text)


def test_weights_without_a_state_are_named_before_they_are_replaced(data_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    train(data_dir, tmp_path)
    assert "starts anew" not in caplog.text
    (tmp_path / "state.safetensors").unlink()
    (tmp_path / "ema_0.99.safetensors").unlink()
    train(data_dir, tmp_path)
    assert (f"{tmp_path} has model.safetensors, ema_0.9.safetensors and no state.safetensors to go on from: starts "
            "anew, and writes over them") in caplog.text


def test_the_seed_decides(data_dir, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(data_dir, tmp_path / name, seed=seed, lr_anneal_steps=1)
    first, same, other = (weights(tmp_path / name) for name in "abc")
    assert largest_difference(first, same) == 0 and largest_difference(first, other) > 0.01


def test_microbatches_do_what_the_batch_does(data_dir, tmp_path):
    train(data_dir, tmp_path / "whole", microbatch=-1)
    train(data_dir, tmp_path / "parts", microbatch=3)
    assert log_of(tmp_path / "parts", "loss") == pytest.approx(log_of(tmp_path / "whole", "loss"), rel=1e-4)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-4


@pytest.mark.slow
def test_two_ranks_do_what_one_does(python, data_dir, tmp_path):
    values = {"schedule_sampler": "loss-second-moment", "grad_clip": 0.5, "ema_power": "0.1", "grid_interval": 3,
              "grid_images": 3, "preview_steps": 2}
    processes, logs = two_ranks(python, tmp_path, TRAINING, out="two", data_dir=data_dir, **values)
    assert [process.wait() for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert call("image_train", *flags(**{**MODEL, **DIFFUSION, **TRAIN, **values}, data_dir=data_dir,
                                      out=tmp_path / "one")) == 0
    for name in ("loss", "grad_norm", "clipped"):
        assert log_of(tmp_path / "two", name) == pytest.approx(log_of(tmp_path / "one", name), rel=1e-4)
    for name in ("model", "ema_power_0.1"):
        assert largest_difference(weights(tmp_path / "one", name), weights(tmp_path / "two", name)) < 1e-4
    one, two = (np.asarray(Image.open(tmp_path / name / "grids" / "0000003.png"), int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 2             # of 255: the weights differ by rounding


def test_starts_from_given_weights(data_dir, tmp_path):
    given = train(data_dir, tmp_path / "given", seed=5)
    train(data_dir, tmp_path / "next", lr=1e-9, lr_anneal_steps=1, resume_checkpoint=given / "model.safetensors")
    assert largest_difference(weights(given), weights(tmp_path / "next")) < 1e-7


def hashes(folder):
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}


def test_the_same_training_gives_the_same_bytes(data_dir, tmp_path):
    for name in "ab":
        train(data_dir, tmp_path / name, schedule_sampler="loss-second-moment")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") and len(hashes(tmp_path / "a")) == 4


def test_the_end_names_the_files_and_a_command_that_samples(data_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(data_dir, tmp_path / "run")
    end = [line for line in caplog.messages if line.startswith(("weights: ", "to sample: "))]
    assert [Path(word).name for word in end[0].removeprefix("weights: ").split(", ")] == [
        "model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors"]
    script, *arguments = shlex.split(end[1].removeprefix("to sample: python scripts/"))
    assert call(Path(script).stem, *arguments, "--num_samples", 2, "--batch_size", 2, "--out", tmp_path / "out") == 0
    assert samples_in(tmp_path / "out")[0].shape == (2, 8, 8, 3)


def test_a_finished_run_has_nothing_to_do(data_dir, tmp_path, caplog):
    train(data_dir, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    caplog.set_level(logging.INFO)
    train(data_dir, tmp_path)
    assert "nothing to do" in caplog.text and "to sample: " in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_learning_rate():
    options = TrainOptions(lr=1.0, lr_anneal_steps=10, lr_warmup_steps=4)
    assert [options.learning_rate(step) for step in (0, 1, 4, 5, 9)] == pytest.approx([0.25, 0.45, 0.6, 0.5, 0.1])
    assert TrainOptions(lr=1.0, lr_warmup_steps=2).learning_rate(10**6) == 1
    assert ClassifierTrainOptions(lr=1.0, iterations=4).learning_rate(3) == 1
    assert ClassifierTrainOptions(lr=1.0, iterations=4, anneal_lr=True).learning_rate(3) == 0.25


def test_moving_average():
    average = [torch.tensor([1.0, 2.0]), torch.tensor(0.0)]
    update_ema(average, [nn.Parameter(torch.tensor([3.0, 2.0])), nn.Parameter(torch.tensor(10.0))], rate=0.75)
    assert torch.equal(average[0], torch.tensor([1.5, 2.0])) and average[1] == 2.5


def test_moving_average_soon_forgets_the_start(data_dir, tmp_path):
    train(data_dir, tmp_path / "start", lr=1e-12, lr_anneal_steps=1)
    train(data_dir, tmp_path / "run", lr_anneal_steps=1, ema_rate="0.9999")
    start, last = weights(tmp_path / "start"), weights(tmp_path / "run")
    expected = {name: 0.1 * start[name] + 0.9 * last[name] for name in start}    # rate 1 / 10 at step 0
    assert largest_difference(weights(tmp_path / "run", "ema_0.9999"), expected) < 1e-6


class Half(nn.Module):
    """Two weights, of which the first is float16."""

    def __init__(self):
        super().__init__()
        self.torso = nn.Parameter(torch.tensor([1.0], dtype=torch.float16))
        self.head = nn.Parameter(torch.tensor([1.0]))


def test_master_weights_keep_what_float16_would_lose():
    model = Half()
    precision = MixedPrecisionTrainer(model, fp16_scale_growth=0.5)
    precision.lg_loss_scale = 8.0
    optimizer = torch.optim.SGD(precision.master_params, lr=1e-4)
    for _ in range(10):
        precision.backward((model.torso.float() + 3 * model.head).sum())
        precision.collect_gradients()
        assert precision.step(optimizer) == pytest.approx(math.sqrt(10), rel=1e-3)
    assert precision.master_params[0].item() == pytest.approx(1 - 1e-3, abs=1e-6)     # 1e-4 alone rounds to 0 at 1
    assert model.torso.dtype == torch.float16 and model.torso.item() == pytest.approx(1 - 1e-3, abs=5e-4)
    assert model.head.item() == pytest.approx(1 - 3e-3, abs=1e-6)
    assert precision.lg_loss_scale == 13


def test_overflow_leaves_the_step_out_and_halves_the_scale():
    model = Half()
    precision = MixedPrecisionTrainer(model)
    optimizer = torch.optim.SGD(precision.master_params, lr=1.0)
    precision.backward(model.torso.float().sum() * 1000 + model.head.sum())      # 1000 * 2**20 is inf in float16
    precision.collect_gradients()
    assert not math.isfinite(precision.step(optimizer))
    assert precision.lg_loss_scale == 19
    assert [param.item() for param in precision.master_params] == [1, 1] and model.torso.item() == 1


def test_long_gradients_are_shortened_and_their_norm_is_logged(data_dir, tmp_path):
    # AdamW shows it in its first moment, which is a tenth of the first gradient.
    train(data_dir, tmp_path / "free", lr_anneal_steps=1)
    for name, microbatch in (("clipped", -1), ("parts", 1)):
        train(data_dir, tmp_path / name, lr_anneal_steps=1, grad_clip=0.5, microbatch=microbatch)

    def length(name):
        moments = [value.double().norm() for key, value in weights(tmp_path / name, "state").items()
                   if key.startswith("optimizer/exp_avg/")]
        return 10 * torch.stack(moments).norm().item()

    norm = log_of(tmp_path / "free", "grad_norm")[0]
    assert norm > 1 and length("free") == pytest.approx(norm, rel=1e-4)
    assert length("clipped") == pytest.approx(0.5, rel=1e-4) == length("parts")
    assert log_of(tmp_path / "clipped", "grad_norm")[0] == pytest.approx(norm, rel=1e-4)
    assert log_of(tmp_path / "clipped", "clipped") == [1] and "clipped" not in log_header(tmp_path / "free")


@pytest.mark.parametrize("max_norm, part", [(math.sqrt(10) / 4, 0.25), (4.0, 1.0)])
def test_gradients_are_shortened_without_the_loss_scale(max_norm, part):
    model = Half()
    precision = MixedPrecisionTrainer(model)
    precision.lg_loss_scale = 8.0
    for _ in range(2):                              # two microbatches add up
        precision.backward((model.torso.float() + 3 * model.head).sum() / 2)
    precision.collect_gradients()
    assert precision.step(torch.optim.SGD(precision.master_params, lr=1.0), max_norm) == pytest.approx(math.sqrt(10))
    assert [param.item() for param in precision.master_params] == pytest.approx([1 - part, 1 - 3 * part], abs=1e-6)


def log_header(out):
    return (out / "progress.csv").read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("flag", ["use_fp16", "use_bf16"])
def test_trains_in_half_precision(data_dir, tmp_path, flag):
    train(data_dir, tmp_path / "half", **{flag: True}, save_interval=1)
    train(data_dir, tmp_path / "full")
    assert log_of(tmp_path / "half", "loss") == pytest.approx(log_of(tmp_path / "full", "loss"), rel=0.05)
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.float32}
    if flag == "use_fp16":
        assert 10 < log_of(tmp_path / "half", "lg_loss_scale")[-1] <= 20.003


def test_classifier_learns_and_is_validated(data_dir, tmp_path):
    train_tiny_classifier(data_dir, tmp_path, iterations=70, lr=1e-2, batch_size=16, diffusion_steps=100)
    assert np.mean(log_of(tmp_path, "loss")[-15:]) < 0.65 * math.log(2)
    assert np.mean(log_of(tmp_path, "val_acc@1")[-8:]) > 0.75
    assert len(log_of(tmp_path, "val_loss")) == 35 and log_of(tmp_path, "acc@5") == [1.0] * 70
    assert log_of(tmp_path, "val_acc@1_q0") and log_of(tmp_path, "acc@1_q3")


@pytest.mark.parametrize("trainer, changes, logged", [
    (train, {"lr_anneal_steps": 7, "use_bf16": True}, "loss"),
    (train, {"lr_anneal_steps": 7, "use_fp16": True}, "lg_loss_scale"),
    (train_tiny_classifier, {"iterations": 7, "anneal_lr": True}, "val_loss"),
])
def test_a_stopped_run_goes_on_as_if_it_had_not(data_dir, tmp_path, monkeypatch, trainer, changes, logged):
    step = train_util.TrainLoop.run_step

    def stop_at_5(loop, logger):
        if loop.step == 5:
            raise KeyboardInterrupt
        step(loop, logger)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer(data_dir, whole, **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_util.TrainLoop, "run_step", stop_at_5)
        trainer(data_dir, stopped, save_interval=3, **changes)
    trainer(data_dir, stopped, save_interval=3, **changes)
    assert largest_difference(weights(whole, "state"), weights(stopped, "state")) == 0
    assert log_of(whole, logged) == log_of(stopped, logged) != []


def fail_at(monkeypatch, step, method="_descend", error=UserError, owner=train_util.TrainLoop):
    """Makes a method of the loop, or of its state, raise an error in a step."""
    original = getattr(owner, method)

    def failing(self, *args):
        if self.step == step:
            raise error("a mistake")
        return original(self, *args)

    monkeypatch.setattr(owner, method, failing)


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt, PeerError, LostRankError])
def test_an_error_saves_what_was_trained(data_dir, tmp_path, monkeypatch, caplog, error):
    caplog.set_level(logging.INFO)
    whole, stopped = train(data_dir, tmp_path / "whole", lr_anneal_steps=4), tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(error, match="a mistake"):
        fail_at(patch, 2, error=error)
        train(data_dir, stopped, lr_anneal_steps=4)
    assert checkpoint.read_metadata(stopped / "state.safetensors")["step"] == "2"
    assert "until step 2 is saved" in caplog.text and not (stopped / ".lock").exists()
    train(data_dir, stopped, lr_anneal_steps=4)
    assert hashes(whole) == hashes(stopped) and log_of(whole, "loss") == log_of(stopped, "loss")


def kept(out):
    """What a training leaves, but times and what its record says of its folder."""
    rows = [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows_of(out)]
    pictures = [(out / "loss.png").read_bytes()] if (out / "loss.png").exists() else []
    return hashes(out), rows, pictures, json.loads((out / "status.json").read_text())["state"]


def interrupt_write_of(monkeypatch, name):
    """Makes the first write of a file of weights end as Ctrl-C ends it."""
    save, left = checkpoint.save_state, [name]

    def interrupted(path, *args):
        if path.name in left:
            left.remove(path.name)
            raise KeyboardInterrupt
        save(path, *args)

    monkeypatch.setattr(checkpoint, "save_state", interrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_a_training_that_ends_in_its_last_save_is_finished(data_dir, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_write_of(patch, name)
        train(data_dir, tmp_path / "out", lr_anneal_steps=2, save_interval=2)
    whole = train(data_dir, tmp_path / "whole", lr_anneal_steps=2, save_interval=2)
    assert kept(tmp_path / "out") == kept(whole) and kept(whole)[-1] == "finished"


@pytest.mark.parametrize("rescued", [True, False])
@pytest.mark.parametrize("name", ["snapshot_16_ema_0.9.safetensors", "snapshot_24_ema_0.99.safetensors",
                                  "model.safetensors"])
def test_a_snapshot_is_not_lost_where_a_training_ends_beside_it(data_dir, tmp_path, monkeypatch, name, rescued):
    values = {"lr_anneal_steps": 6, "save_interval": 2, "log_interval": 3, "snapshot_images": 8}
    whole, stopped = train(data_dir, tmp_path / "whole", **values), tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_write_of(patch, name)
        if not rescued:
            patch.setattr(train_util.TrainLoop, "_rescue", lambda *args: None)
        train(data_dir, stopped, **values)
    train(data_dir, stopped, **values)
    assert kept(whole) == kept(stopped) and len(kept(whole)[0]) == 4 + 3 * 2


class Interrupting:
    """Watches a training, and interrupts it in a step as Ctrl-C would."""

    interval, settings = 2, {}

    def __init__(self, at=None):
        self.at, self.seen = at, []

    def prepare(self, training):
        pass

    def look(self, step):
        if step == self.at:
            raise KeyboardInterrupt
        self.seen.append(step)
        return {"seen": float(step)}


@pytest.mark.parametrize("at", [2, 4, 5])
def test_what_belongs_to_the_step_of_an_error_is_done_by_the_next_start(data_dir, tmp_path, at):
    values = {"lr_anneal_steps": 5, "save_interval": 3, "log_interval": 5, "snapshot_images": 10}
    whole, stopped, first, second = tmp_path / "whole", tmp_path / "stopped", Interrupting(at), Interrupting()
    train(data_dir, whole, watchers=[Interrupting()], **values)
    with pytest.raises(KeyboardInterrupt):
        train(data_dir, stopped, watchers=[first], **values)
    assert checkpoint.read_metadata(stopped / "state.safetensors")["step"] == str(at)
    assert not rows_of(stopped) and json.loads((stopped / "status.json").read_text())["state"] == "interrupted"
    train(data_dir, stopped, watchers=[second], **values)
    assert first.seen + second.seen == [2, 4, 5]
    assert kept(whole) == kept(stopped)
    before = sha256_of(stopped / "state.safetensors")
    train(data_dir, stopped, watchers=[Interrupting(5)], **values)          # there is nothing to do
    assert sha256_of(stopped / "state.safetensors") == before


def test_a_validation_that_was_cut_off_is_done_again(data_dir, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_tiny_classifier(data_dir, whole, iterations=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 5, "validate", KeyboardInterrupt)
        train_tiny_classifier(data_dir, stopped, iterations=5)
    train_tiny_classifier(data_dir, stopped, iterations=5)
    assert len(log_of(whole, "val_loss")) == 3 and kept(whole) == kept(stopped)


def test_half_a_step_is_not_saved(data_dir, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, "_update_averages", OSError, TrainingState)
    with pytest.raises(OSError):
        train(data_dir, tmp_path, save_interval=1)
    assert checkpoint.read_metadata(tmp_path / "state.safetensors")["step"] == "2"
    assert {checkpoint.read_metadata(path)["step"] for path in tmp_path.glob("*.safetensors")} == {"2"}


def test_weights_that_diverge_replace_no_save(data_dir, tmp_path):
    with pytest.raises(UserError, match="not finite at step 1, start again with a smaller one; nothing is saved yet"):
        train(data_dir, tmp_path, lr=1e30)
    train(data_dir, tmp_path, lr_anneal_steps=2)
    with pytest.raises(UserError, match="smaller one and --change lr"):
        train(data_dir, tmp_path, lr=1e30, lr_anneal_steps=9, change="lr")
    assert checkpoint.read_metadata(tmp_path / "state.safetensors")["step"] == "2"


@pytest.mark.parametrize(("snapshots", "parts"), [("0", 3 + 5 + 5), ("8", 3 + 5 + 5 + 2)])     # the state is 5 twice
def test_space_for_a_save_is_looked_for_before_the_first_step(data_dir, tmp_path, monkeypatch, snapshots, parts):
    whole = train(data_dir, tmp_path / "whole", snapshot_images=snapshots)
    one = sum(value.numel() * 4 for value in weights(whole).values())
    files = sum((whole / f"{name}.safetensors").stat().st_size for name in ("model", "ema_0.9", "ema_0.99", "state"))
    assert 8 * one < files < 1.2 * 8 * one
    disk = SimpleNamespace(free=parts * one - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(UserError, match=rf"--out .*new: cannot hold .*No space left on device: {parts * one:,} bytes"):
        train(data_dir, tmp_path / "new", snapshot_images=snapshots)
    assert not rows_of(tmp_path / "new")
    disk.free += 1
    train(data_dir, tmp_path / "new", snapshot_images=snapshots)
    disk.free = parts * one - files                                     # of what is there already
    train(data_dir, whole, snapshot_images=snapshots, lr_anneal_steps=6)
    disk.free = 0
    train(data_dir, whole, snapshot_images=snapshots, lr_anneal_steps=6)            # there is nothing to do


def test_a_full_disk_after_an_error_hides_nothing(data_dir, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise UserError("no space")

    monkeypatch.setattr(checkpoint, "save_state", full)
    fail_at(monkeypatch, 2)
    with pytest.raises(UserError, match="a mistake"):
        train(data_dir, tmp_path)
    assert "cannot be saved (no space)" in caplog.text


FAILING = """
import sys
from guided_diffusion import dist_util, train_util
from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from scripts.image_train import main

descend = train_util.TrainLoop._descend

def failing(loop):
    if loop.step == 3 and dist_util.rank() == 1:
        raise UserError("a damaged picture")
    return descend(loop)

train_util.TrainLoop._descend = failing
run_script(main)
"""


def two_ranks(python, tmp_path, *command, out="out", **values):
    """Starts two ranks of a training, without a launcher; returns their processes and logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = flags(**{**MODEL, **DIFFUSION, **TRAIN, "batch_size": 2, "out": tmp_path / out, **values})
    logs, processes = [tmp_path / f"log{rank}" for rank in range(2)], []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            processes.append(subprocess.Popen(
                [python, *command, *words], stdout=stream, stderr=subprocess.STDOUT, env={
                    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "RANK": str(rank),
                    "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}))
    return processes, logs


def errors_in(log):
    assert "Traceback" not in log.read_text(), log.read_text()
    return [line for line in log.read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_what_one_rank_finds_ends_all_and_is_saved_before(python, data_dir, tmp_path):
    processes, logs = two_ranks(python, tmp_path, "-c", FAILING, data_dir=data_dir, lr_anneal_steps=5)
    assert [process.wait() for process in processes] == [2, 2]
    assert [errors_in(log) for log in logs] == [[], ["error: a damaged picture"]]
    assert "what was trained until step 3 is saved" in logs[0].read_text()
    with pytest.raises(UserError, match=r"--batch_size 2 on 1 rank\(s\): the run in .* has 2 on 2"):
        train(data_dir, tmp_path / "out", lr_anneal_steps=5, batch_size=2)
    train(data_dir, tmp_path / "out", lr_anneal_steps=5, batch_size=4)          # as many images a step, on one rank
    train(data_dir, tmp_path / "one", lr_anneal_steps=5, batch_size=4)
    assert log_of(tmp_path / "out", "loss") == pytest.approx(log_of(tmp_path / "one", "loss"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_is_missed_in_one_sentence(python, data_dir, tmp_path, killed):
    processes, logs = two_ranks(python, tmp_path, TRAINING, data_dir=data_dir, lr_anneal_steps=10**6,
                                save_interval=10)
    while not (tmp_path / "out/state.safetensors").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    processes[killed].kill()
    left = logs[1 - killed]
    assert processes[1 - killed].wait() == 2
    error, = errors_in(left)
    assert "a rank is gone" in error and "start the same command again" in error
    assert "frame #" not in left.read_text() and "[W" not in left.read_text()
    step = checkpoint.read_metadata(tmp_path / "out/state.safetensors")["step"]
    assert f"until step {step} is saved" in left.read_text() or step.endswith("0")


WATCHED = """
from guided_diffusion import dist_util, image_datasets
from guided_diffusion.cli import run_script
from scripts.image_train import main

looking = image_datasets.damaged_pictures

def look(*arguments):
    print("rank", dist_util.rank(), "looks at the pictures", flush=True)
    return looking(*arguments)

image_datasets.damaged_pictures = look
run_script(main)
"""


@pytest.mark.slow
def test_one_rank_looks_for_damaged_pictures_and_tells_the_others(python, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(4):
        Image.new("L", (8, 8), 50 * number).save(tmp_path / f"data/{number % 2}_{number}.png")
    (tmp_path / "data/0_0.png").write_bytes(b"no picture")
    processes, logs = two_ranks(python, tmp_path, "-c", WATCHED, data_dir=tmp_path / "data", lr_anneal_steps=1,
                                skip_damaged=True)
    assert [process.wait() for process in processes] == [0, 0], [log.read_text() for log in logs]
    said = [log.read_text() for log in logs]
    assert [text.count("looks at the pictures") for text in said] == [1, 0]
    assert [text.count("left out 1 damaged image(s)") for text in said] == [1, 0]


def test_clean_classifier_sees_no_noise(data_dir, tmp_path):
    train_tiny_classifier(data_dir, tmp_path, noised=False, iterations=25, lr=1e-2)
    assert log_of(tmp_path, "val_acc@1")[-1] == 1
    assert not [name for name in rows_of(tmp_path)[0] if "_q" in name]


@pytest.mark.parametrize("noised", [True, False])
def test_the_files_of_a_classifier_state_whether_it_saw_noise(data_dir, tmp_path, noised):
    train_tiny_classifier(data_dir, tmp_path, noised=noised, iterations=1)
    for name in ("model", "state"):
        assert statement_of(tmp_path / f"{name}.safetensors", "classifier").noised is noised


@pytest.mark.parametrize("noised", [True, False])
def test_the_end_names_a_command_that_guides_by_the_classifier(data_dir, tmp_path, caplog, noised):
    caplog.set_level(logging.INFO)
    train_tiny_classifier(data_dir, tmp_path / "classifier", noised=noised, iterations=1)
    line = next(line for line in caplog.messages if line.startswith("to sample: python scripts/"))
    run = str(train(data_dir, tmp_path / "run", lr_anneal_steps=1))
    script, *arguments = shlex.split(line.removeprefix("to sample: python scripts/").replace("DIFFUSION_RUN", run))
    assert call(Path(script).stem, *arguments, "--timestep_respacing", 2, "--num_samples", 2, "--batch_size", 2,
                "--out", tmp_path / "out") == 0
    title = json.loads((tmp_path / "out" / "run.json").read_text())["title"]
    assert ("clean CG" in title) is not noised and "CG" in title


def test_classification_losses():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6], [0.0, 0, 0, 9, 0, 0]])
    result = classification_losses(logits, torch.tensor([0, 0, 3]))
    assert result["acc@1"].tolist() == [1, 0, 1] and result["acc@5"].tolist() == [1, 0, 1]
    assert result["loss"][2].item() == pytest.approx(math.log(1 + 5 * math.exp(-9)), abs=1e-6)


@pytest.mark.parametrize("changes, message", [
    ({"schedule_sampler": "importance"}, "--schedule_sampler importance: must be one of uniform, loss-second-moment"),
    ({"lr": -1.0}, "--lr -1.0: must be greater than 0"),
    ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
    ({"batch_size": 10**9}, "--batch_size 1000000000: must be at most 1000000"),
    ({"microbatch": 0}, "--microbatch 0: must be at least 1, or -1"),
    ({"ema_rate": "0.9,fast"}, "--ema_rate 0.9,fast: must be"),
    ({"ema_rate": "1.0"}, "--ema_rate 1.0: must be"),
    ({"ema_rate": "0.9,0.9"}, "--ema_rate 0.9,0.9: must be different"),
    ({"ema_rate": "0.9999991,0.9999992"}, "must be different .* in their first six digits"),
    ({"data_dir": "/nowhere"}, "--data_dir /nowhere: no such folder"),
    ({"data_dir": ""}, "--data_dir: is missing"),
    ({"num_classes": 1}, "--num_classes 1: .* has more classes"),
    ({"resume_checkpoint": "/nowhere.pt"}, "/nowhere.pt: there is no such file"),
    ({"out": "/proc/run"}, "--out /proc/run: cannot be written"),
    ({"lr": 1e30, "lr_anneal_steps": 9}, r"--lr 1e\+30: the loss or its gradient is not finite at step"),
])
def test_bad_input_is_one_sentence(data_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(**{"data_dir": data_dir, "out": tmp_path / "run", **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trainer", [train, train_tiny_classifier])
def test_a_training_takes_all_steps(data_dir, tmp_path, trainer):
    with pytest.raises(UserError, match=r"--timestep_respacing 4: is of sampling, .* all --diffusion_steps; leave it"):
        trainer(data_dir, tmp_path / "run", timestep_respacing="4")
    assert not (tmp_path / "run").exists()


def test_options_of_data_without_effect_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    np.savez(tmp_path / "x.npz", arr_0=np.full((4, 8, 8, 3), 99, np.uint8), arr_1=np.arange(4) % 2)
    given = {"lr_anneal_steps": 1, "classes": "folders", "random_crop": True, "skip_damaged": True}

    def said(data, **changes):
        caplog.clear()
        train(data, tmp_path / f"out {len(list(tmp_path.iterdir()))}", **{**given, **changes})
        return [record.message for record in caplog.records if "no effect" in record.message]

    path = tmp_path / "x.npz"
    assert said(path) == [
        f"--classes folders: has no effect on {path}, which holds the classes as numbers",
        f"--random_crop True: has no effect on {path}, whose images are never cut",
        f"--skip_damaged True: has no effect on {path}, whose images are not in files of their own"]
    assert said(path, classes="", random_crop=False, skip_damaged=False) == []
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "folder" / "one.png")
    assert said(tmp_path / "folder", class_cond=False) == [
        "--classes folders: has no effect, as the network has no classes (--class_cond False)"]


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_ends_is_one_sentence(data_dir, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    fail_at(monkeypatch, 1, "_descend", MemoryError)
    with pytest.raises(UserError, match=r"--batch_size [0-9]+: cpu is out of memory; a smaller --microbatch"):
        train(data_dir, tmp_path, compile=compiled)


def test_a_batch_that_no_memory_holds_is_refused_before_the_first_step(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "_memory_of", lambda device: 10**6)
    with pytest.raises(UserError, match="--batch_size 1000: a first map of features alone takes"):
        train(data_dir, tmp_path, batch_size=1000)


def test_a_network_that_cannot_be_compiled(data_dir, tmp_path, monkeypatch):
    def fails(model):
        def network(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nmore of it")
        return network

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"--compile True: .* leave it off \(no C\+\+ compiler\)"):
        train(data_dir, tmp_path, compile=True)


def test_weights_of_another_network(data_dir, tmp_path):
    train(data_dir, tmp_path / "small")
    with pytest.raises(UserError, match=r"--resume_checkpoint .*: does not fit the network"):
        train(data_dir, tmp_path / "large", num_channels=64, resume_checkpoint=tmp_path / "small" / "model.safetensors")
