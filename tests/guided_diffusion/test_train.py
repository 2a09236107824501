"""Training: it learns, a kill does not harm it, and batches, microbatches and ranks are only ways of doing the same."""

import csv
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PATIENCE
from torch import nn

from guided_diffusion import checkpoint, train_util
from guided_diffusion.build import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.errors import UserError
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.train_util import (
    ClassifierTrainOptions,
    TrainOptions,
    classification_losses,
    train_classifier,
    train_diffusion,
    update_ema,
)

REPOSITORY = Path(__file__).parents[2]
MODEL = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
         "attention_resolutions": "8", "num_heads": 1, "class_cond": True, "num_classes": 2, "learn_sigma": True}
CLASSIFIER = {"image_size": 8, "in_channels": 1, "num_classes": 2, "classifier_width": 32, "classifier_depth": 1,
              "classifier_num_head_channels": 32,
              "classifier_attention_resolutions": "", "classifier_pool": "adaptive", "classifier_channel_mult": "1"}
DIFFUSION = {"diffusion_steps": 10, "noise_schedule": "cosine"}
TRAIN = {"batch_size": 4, "lr": 1e-3, "lr_anneal_steps": 3, "ema_rate": "0.9,0.99", "log_interval": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """IDX files of 32 images, 8x8: class 0 has rows, class 1 columns of light."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.uint8) % 2
    images = rng.integers(0, 60, (32, 8, 8), dtype=np.uint8)
    images[labels == 0, ::2] += 190
    images[labels == 1, :, ::2] += 190
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
                                                             + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 32) + labels.tobytes())
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(data_dir, out, **changes):
    """Trains a tiny diffusion model; `changes` are flags of any of the options classes."""
    values = {**MODEL, **DIFFUSION, **TRAIN, "data_dir": str(data_dir), "out": str(out), **changes}
    train_diffusion(*(of(cls, values) for cls in (ModelOptions, DiffusionOptions, TrainOptions)))
    return out


def train_tiny_classifier(data_dir, out, **changes):
    values = {**CLASSIFIER, **DIFFUSION, "batch_size": 8, "iterations": 3, "log_interval": 1, "data_dir": str(data_dir),
              "val_data_dir": str(data_dir), "eval_interval": 2, "out": str(out), **changes}
    train_classifier(*(of(cls, values) for cls in (ClassifierOptions, DiffusionOptions, ClassifierTrainOptions)))
    return out


def of(cls, values):
    return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def log_of(out, name):
    with (out / "progress.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def weights(out, name="model"):
    return checkpoint.load_state_dict(out / f"{name}.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


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
        "config.json", "ema_0.9.safetensors", "ema_0.99.safetensors", "model.safetensors", "progress.csv",
        "state.safetensors"]
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
def test_a_killed_run_ends_like_one_that_was_not(data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = [sys.executable, REPOSITORY / "scripts" / "image_train.py"]
    process = subprocess.Popen(
        [*script, *flags(**{**MODEL, **TRAIN, **RUN}, data_dir=data_dir, out=killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL)
    train(data_dir, whole, **RUN)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "state.safetensors").exists() and len(log_of(killed, "loss")) > 12:
            process.kill()
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    step = int(checkpoint.read_metadata(killed / "state.safetensors")["step"])
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
def test_two_ranks_do_what_one_does(data_dir, tmp_path):
    values = {**MODEL, **TRAIN, **DIFFUSION, "schedule_sampler": "loss-second-moment", "data_dir": data_dir}
    command = ["torchrun", "--standalone", "--nproc-per-node=2", REPOSITORY / "scripts" / "image_train.py"]
    subprocess.run([*command, *flags(**{**values, "batch_size": 2}, out=tmp_path / "two")], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, stderr=subprocess.DEVNULL)
    train(data_dir, tmp_path / "one", schedule_sampler="loss-second-moment")
    assert log_of(tmp_path / "two", "loss") == pytest.approx(log_of(tmp_path / "one", "loss"), rel=1e-4)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4


def test_starts_from_given_weights(data_dir, tmp_path):
    given = train(data_dir, tmp_path / "given", seed=5)
    train(data_dir, tmp_path / "next", lr=1e-9, lr_anneal_steps=1, resume_checkpoint=given / "model.safetensors")
    assert largest_difference(weights(given), weights(tmp_path / "next")) < 1e-7


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


def test_clean_classifier_sees_no_noise(data_dir, tmp_path):
    train_tiny_classifier(data_dir, tmp_path, noised=False, iterations=25, lr=1e-2)
    assert log_of(tmp_path, "val_acc@1")[-1] == 1


def test_classification_losses():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6], [0.0, 0, 0, 9, 0, 0]])
    result = classification_losses(logits, torch.tensor([0, 0, 3]))
    assert result["acc@1"].tolist() == [1, 0, 1] and result["acc@5"].tolist() == [1, 0, 1]
    assert result["loss"][2].item() == pytest.approx(math.log(1 + 5 * math.exp(-9)), abs=1e-6)


@pytest.mark.parametrize("changes, message", [
    ({"schedule_sampler": "importance"}, "--schedule_sampler importance: must be one of uniform, loss-second-moment"),
    ({"lr": -1.0}, "--lr -1.0: must be greater than 0"),
    ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
    ({"microbatch": 0}, "--microbatch 0: must be at least 1, or -1"),
    ({"ema_rate": "0.9,fast"}, "--ema_rate 0.9,fast: must be"),
    ({"ema_rate": "1.0"}, "--ema_rate 1.0: must be"),
    ({"ema_rate": "0.9,0.9"}, "--ema_rate 0.9,0.9: must be different"),
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


def test_a_network_that_cannot_be_compiled(data_dir, tmp_path, monkeypatch):
    def fails(model):
        def network(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nmore of it")
        return network

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"--compile True: .* leave it off \(no C\+\+ compiler\)"):
        train(data_dir, tmp_path, compile=True)


def test_other_options_than_those_of_the_run(data_dir, tmp_path):
    train(data_dir, tmp_path)
    for changes in ({"num_channels": 64}, {"diffusion_steps": 20}, {"ema_rate": "0.9"}):
        name, value = next(iter(changes.items()))
        with pytest.raises(UserError, match=f"--{name} {value}: the run in .* has"):
            train(data_dir, tmp_path, **changes)


def test_weights_of_another_network(data_dir, tmp_path):
    train(data_dir, tmp_path / "small")
    with pytest.raises(UserError, match=r"--resume_checkpoint .*: does not fit the network"):
        train(data_dir, tmp_path / "large", num_channels=64, resume_checkpoint=tmp_path / "small" / "model.safetensors")
