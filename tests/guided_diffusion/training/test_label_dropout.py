"""Training without labels now and then, what it leaves, and sampling with what it leaves."""

import json
import re

import pytest
import torch
from commands import call, samples_in
from tiny_training import MODEL, train, weights

from guided_diffusion import checkpoint
from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.errors import UserError
from guided_diffusion.facts import check_options
from guided_diffusion.train_util import label_dropout
from guided_diffusion.training.options import TrainOptions


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("dropout")
    return train(data_dir, out, label_dropout=0.5, lr_anneal_steps=6, snapshot_images=8)


def test_labels_are_dropped_at_the_rate_by_seed_and_step():
    drop = label_dropout(0.3, 7, seed=1)
    labels = torch.full((1000,), 2)
    dropped = drop(labels, 5, 0)
    share = (dropped == 7).float().mean()
    assert set(dropped.tolist()) == {2, 7} and abs(share - 0.3) < 5 * (0.21 / 1000) ** 0.5
    assert torch.equal(drop(labels, 5, 0), dropped) and not torch.equal(drop(labels, 6, 0), dropped)


def test_two_ranks_drop_what_one_does():
    drop, labels = label_dropout(0.5, 7, seed=1), torch.arange(6)
    halves = torch.cat([drop(labels[:3], 4, 0), drop(labels[3:], 4, 1)])
    assert torch.equal(halves, drop(labels, 4, 0))


def test_the_null_class_is_trained_and_stated(run):
    trained = weights(run)["label_emb.weight"]
    assert trained.shape[0] == 3
    config = json.loads(checkpoint.read_metadata(run / "model.safetensors")["config"])
    assert config["null_class"] is True and config["num_classes"] == 2
    model = build_model(ModelOptions(**{**MODEL, "null_class": True}))
    assert model.null_label == 2
    assert (trained[2] - model.label_emb.weight[2]).abs().max() > 0


def test_a_null_class_that_would_stay_random_is_refused(run, data_dir, tmp_path):
    with pytest.raises(UserError, match="--null_class True: is never trained without --label_dropout; give one"):
        train(data_dir, tmp_path / "new", null_class=True)
    plain = train(data_dir, tmp_path / "plain", lr_anneal_steps=1) / "model.safetensors"
    with pytest.raises(UserError, match="--null_class True: is never trained"):
        train(data_dir, tmp_path / "new", null_class=True, init_from=str(plain))
    tuned = train(data_dir, tmp_path / "tuned", null_class=True, init_from=str(run / "model.safetensors"))
    torch.save(weights(run), tmp_path / "silent.pt")
    also = train(data_dir, tmp_path / "silent", null_class=True, resume_checkpoint=str(tmp_path / "silent.pt"))
    for out in (tuned, also):
        assert torch.equal(weights(out)["label_emb.weight"][2], weights(run)["label_emb.weight"][2])


def test_the_null_class_of_a_file_that_does_not_state_its_classes_is_said(run, data_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "stated", null_class=True, init_from=run / "model.safetensors", lr_anneal_steps=1)
    assert "does not state" not in caplog.text
    path = tmp_path / "silent.pt"
    torch.save(weights(run), path)
    for flag in ("init_from", "resume_checkpoint"):
        train(data_dir, tmp_path / flag, null_class=True, lr_anneal_steps=1, **{flag: path})
        assert (f"--{flag} {path}: does not state its classes; its last of 3 labels is taken for the null class"
                ) in caplog.messages
        caplog.clear()
        train(data_dir, tmp_path / f"{flag} 3", num_classes=3, lr_anneal_steps=1, **{flag: path})
        assert "does not state" not in caplog.text


def test_classes_and_the_null_class_are_not_taken_for_each_other(run, data_dir, tmp_path, caplog):
    """Two classes and a null class have as many labels as three classes."""
    caplog.set_level("INFO")
    three = train(data_dir, tmp_path / "three", num_classes=3, lr_anneal_steps=1)
    for begun, changes, said in (
            (run, {"num_classes": 3}, "3 classes, 2 classes and a null class in the file"),
            (three, {"label_dropout": 0.1}, "2 classes and a null class, 3 classes in the file")):
        path, values = begun / "model.safetensors", {"seed": 5, "lr": 1e-12, "lr_anneal_steps": 1, **changes}
        out = train(data_dir, tmp_path / f"from {begun.name}", init_from=path, **values)
        assert f"these start anew: label_emb.weight ({said})" in caplog.text
        labels = (weights(one)["label_emb.weight"] for one in (out, begun))
        assert (next(labels) - next(labels)).abs().amax(dim=1).min() > 0.01
        with pytest.raises(UserError, match=re.escape(f"label_emb.weight is of other classes ({said}); --init_from")):
            train(data_dir, tmp_path / "new", resume_checkpoint=path, **values)
    for flag in ("init_from", "resume_checkpoint"):
        with pytest.raises(UserError, match="--null_class True: is never trained"):
            train(data_dir, tmp_path / "new", null_class=True, **{flag: three / "model.safetensors"})


def test_a_training_goes_on_without_dropped_labels(data_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    out = train(data_dir, tmp_path / "run", label_dropout=0.5)
    before = weights(out)["label_emb.weight"]
    train(data_dir, out, label_dropout=0.0, change="label_dropout", lr_anneal_steps=6)
    assert "--null_class True: as the run in" in caplog.text
    after = weights(out)["label_emb.weight"]
    assert after.shape == before.shape and not torch.equal(after[:2], before[:2])
    with pytest.raises(UserError, match=r"--label_dropout 0\.2: the run in"):
        train(data_dir, out, label_dropout=0.2, lr_anneal_steps=9)


def test_snapshots_are_the_averages_at_multiples_of_so_many_images(run, data_dir, tmp_path):
    names = sorted(path.name for path in run.glob("snapshot_*"))
    assert names == sorted(f"snapshot_{images}_ema_{rate}.safetensors" for images in (8, 16, 24)
                           for rate in (0.9, 0.99))
    last = weights(run, "snapshot_24_ema_0.9")
    assert all(torch.equal(value, last[name]) for name, value in weights(run, "ema_0.9").items())
    assert checkpoint.read_metadata(run / "snapshot_8_ema_0.9.safetensors")["step"] == "2"


@pytest.mark.parametrize(("images", "batch", "snapshots", "expected"), [
    (8, 4, "8", True), (12, 4, "8", False), (15, 5, "8", False), (20, 6, "8", True), (8, 4, "0", False),
    (30, 16, "8", True), (8, 4, "8,12", True), (16, 4, "8, 10", False), (12, 4, "8,10", True), (24, 4, "8,12", False)])
def test_a_snapshot_is_kept_at_multiples_or_after_each_of_several_numbers(images, batch, snapshots, expected):
    assert TrainOptions(snapshot_images=snapshots).keeps_snapshot(images, batch) is expected


@pytest.mark.parametrize("word", ["-1", "8,8", "0,8", "8;12", "", "01,1", "9" * 5000])
def test_other_snapshots_are_refused(word):
    with pytest.raises(UserError, match="--snapshot_images"):
        TrainOptions(snapshot_images=word)


def test_the_trained_network_samples_with_and_without_labels(run, tmp_path):
    common = ("--model_path", run / "ema_0.99.safetensors", "--num_samples", 4, "--batch_size", 4,
              "--timestep_respacing", 3)
    arrays = {}
    for name, words in {"none": ["--labels", "none"], "balanced": ["--labels", "balanced"],
                        "cfg": ["--labels", "balanced", "--cfg_scale", 2.0]}.items():
        assert call("image_sample", *common, *words, "--out", tmp_path / name) == 0
        arrays[name] = samples_in(tmp_path / name)
    assert arrays["none"][1].tolist() == [2] * 4
    assert (arrays["cfg"][0] != arrays["balanced"][0]).any()


def test_what_does_not_fit_is_a_sentence(data_dir, tmp_path, run, capsys):
    with pytest.raises(UserError, match=r"--label_dropout 0\.1: needs a network with labels"):
        train(data_dir, tmp_path / "a", class_cond=False, label_dropout=0.1)
    with pytest.raises(UserError, match="--null_class True: needs"):
        build_model(ModelOptions(**{**MODEL, "class_cond": False, "null_class": True}))
    plain = train(data_dir, tmp_path / "plain")
    words = ("--model_path", plain / "model.safetensors", "--out", tmp_path / "out", "--num_samples", 2)
    for options, message in ((["--labels", "none"], "--labels none: the network was not trained"),
                             (["--cfg_scale", 1.0], "--cfg_scale 1: needs a network with labels and a null class")):
        assert call("image_sample", *words, *options) == 2
        assert message in capsys.readouterr().err


def test_weights_with_a_null_class_are_told_from_others(run):
    state = weights(run)
    check_options(state, {**MODEL, "null_class": True}, "x")
    with pytest.raises(UserError, match="3 classes"):
        check_options(state, {**MODEL, "null_class": False}, "x")
