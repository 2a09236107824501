"""Training of depth predictors: it learns, a kill does not harm it, and what does not fit together is refused."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import REPOSITORY, call, flags
from crashes import content_of, restore, states_of, timeless
from depth_world import MODEL, parts, world_flags, write_world
from depth_world import train_world as train
from networks import with_random_weights

from guided_diffusion import checkpoint, files, logger
from guided_diffusion.checkpoint import read_metadata, save_state
from guided_diffusion.depth import predictor
from guided_diffusion.depth import train as depth_train
from guided_diffusion.depth.features import decoder_features
from guided_diffusion.depth.pairs import read_pairs
from guided_diffusion.depth.predictor import check_fits, load_predictors
from guided_diffusion.depth.train import load_network
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.logger import read_log
from guided_diffusion.script_util import create_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network of random weights, and pairs in which depth is the brightness of the image."""
    return write_world(tmp_path_factory.mktemp("depth"))


def weights(path):
    return checkpoint.load_state_dict(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_what_is_in_the_features(world, tmp_path):
    given = {"steps": 300, "batch_size": 8, "lr": 5e-3, "strong_blocks": "1,2,3"}
    predictors = train(world, tmp_path / "p.safetensors", **given)
    held = read_pairs(str(world / "held.npz"), size=8, depth_range="0,1")
    model = load_network(*parts(world_flags(world, tmp_path / "p.safetensors"))).model
    t = torch.zeros(len(held.images), dtype=torch.int64)
    depth = predictors(decoder_features(model, predictors.blocks, held.images, t, graph=False), t)
    mean = (held.depth - held.depth.mean()).abs().mean()
    # measured: 0.45 and 0.64 of it; by other kernels, 0.005 and 0.013 more or less
    assert (depth["strong"] - held.depth).abs().mean() < 0.5 * mean
    assert (depth["weak"] - held.depth).abs().mean() < 0.75 * mean


def test_the_file(world, tmp_path):
    out = tmp_path / "p.safetensors"
    assert call("depth_train", *flags(world_flags(world, out, log_interval=5, grad_clip=0.1))) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors", "p_log"]
    predictors = load_predictors(out)
    assert {name: branch.blocks for name, branch in predictors.branches.items()} == {
        "strong": ("output.1", "output.3"), "weak": ("output.0",)}
    assert (predictors.size, predictors.depth_range) == (8, "0,1")
    check_fits(predictors, create_model(**MODEL), sha256_of(world / "model.safetensors"))
    recipe = json.loads(read_metadata(out)["training"])
    assert recipe["steps"] == 12 and recipe["num_labels"] == 12 and recipe["diffusion_steps"] == 100
    assert all(branch.std.std() > 0 for branch in predictors.branches.values())          # set from the features

    _, rows = read_log(tmp_path / "p_log" / "progress.csv")
    assert [(row["step"], row["samples"]) for row in rows] == [("5", "20"), ("10", "40"), ("12", "48")]
    assert all(float(row["loss"]) == pytest.approx(float(row["loss_strong"]) + float(row["loss_weak"]), rel=1e-4)
               and float(row["grad_norm"]) > 0.1 and row["clipped"] == "1" for row in rows)
    assert (tmp_path / "p_log" / "loss.png").is_file()


def test_the_device_is_waited_for_once_however_many_blocks_are_checked(world, tmp_path, monkeypatch):
    network = load_network(*parts(world_flags(world, tmp_path / "p.safetensors")))
    held = read_pairs(str(world / "held.npz"), size=8, depth_range="0,1")
    waited, tell = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: waited.append(1) or tell(self))
    counts = []
    for blocks in (["output.1"], [f"output.{i}" for i in range(4)]):
        waited.clear()
        depth_train.features_at(network, held, blocks, np.arange(2), torch.tensor([3, 9]),
                                torch.zeros(2, *held.images.shape[1:]))
        counts.append(len(waited))
    assert counts[0] == counts[1]
    bad = torch.tensor([1.0, float("nan")])
    assert depth_train.first_not_finite({"one": torch.ones(2), "two": bad, "three": bad}) == "two"
    assert depth_train.first_not_finite({"one": torch.ones(2)}) == ""


def test_features_that_cannot_be_kept_are_told_with_the_first_of_them(world, tmp_path, monkeypatch):
    calls, features_at = [], depth_train.features_at

    def huge(*arguments):
        calls.append(len(arguments[3]))
        maps, t = features_at(*arguments)
        return {name: x * 1e6 for name, x in maps.items()}, t

    monkeypatch.setattr(depth_train, "features_at", huge)
    monkeypatch.setattr(depth_train, "EVALUATED_AT_ONCE", 4)
    with pytest.raises(UserError, match=r"--cache_gb 2: must be 0, as features of block 'output\.1' are too large"):
        train(world, tmp_path / "p.safetensors", cache_gb=2)
    assert calls == [1, 4]
    train(world, tmp_path / "p.safetensors", cache_gb=0)


@pytest.mark.parametrize("changes", [{}, {"cache_gb": 0}, {"draws": 0}])
@pytest.mark.parametrize("error, saved", [(None, 5), (KeyboardInterrupt, 8), (OSError, 8)])      # None: a kill
def test_a_killed_training_ends_like_one_that_was_not(world, tmp_path, monkeypatch, caplog, changes, error, saved):
    caplog.set_level("INFO")
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    train(world, whole, **changes)
    step = depth_train.PredictorTraining.run_step

    def dies(self, logger):
        if self.step == 8:
            raise error or KeyboardInterrupt
        return step(self, logger)

    monkeypatch.setattr(depth_train.PredictorTraining, "run_step", dies)
    if error is None:
        monkeypatch.setattr(depth_train.PredictorTraining, "_rescue", lambda self: None)
    with pytest.raises(error or KeyboardInterrupt):
        train(world, killed, **changes)
    assert not killed.exists() and read_metadata(tmp_path / "killed.state.safetensors")["step"] == f"{saved}"
    assert ("what was trained until step 8 is saved in" in caplog.text) == (error is not None)
    monkeypatch.undo()
    train(world, killed, **changes, save_interval=100, log_interval=4)
    assert [row["step"] for row in read_log(tmp_path / "killed_log" / "progress.csv")[1]] == ["8", "12"]
    assert equal(weights(whole), weights(killed)) and not (tmp_path / "killed.state.safetensors").exists()

    before = killed.stat().st_mtime_ns
    train(world, killed, **changes)          # finished: stays as it is
    assert killed.stat().st_mtime_ns == before


@pytest.mark.parametrize("at, step", [("write", 6), ("save_predictors", 12)])
def test_what_belongs_to_the_step_of_an_error_is_done_by_the_next_start(world, tmp_path, monkeypatch, at, step):
    def ends(*arguments, **values):
        raise KeyboardInterrupt

    def rows(name):
        return [{key: value for key, value in row.items() if key != "images_per_second"}
                for row in read_log(tmp_path / f"{name}_log" / "progress.csv")[1]]

    train(world, tmp_path / "whole.safetensors", log_interval=6, save_interval=100)
    owner = logger.MetricLogger if at == "write" else predictor
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, at, ends)
        train(world, tmp_path / "ended.safetensors", log_interval=6, save_interval=100)
    assert read_metadata(tmp_path / "ended.state.safetensors")["step"] == f"{step}"
    train(world, tmp_path / "ended.safetensors", log_interval=6, save_interval=100)
    assert equal(weights(tmp_path / "whole.safetensors"), weights(tmp_path / "ended.safetensors"))
    assert rows("whole") == rows("ended") and rows("whole")


def test_weights_that_diverge_are_not_saved(world, tmp_path):
    with pytest.raises(UserError, match="the loss is not finite at step"):
        train(world, tmp_path / "p.safetensors", lr=1e30, save_interval=100)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_kill_at_any_moment_leaves_what_the_same_command_ends(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with states_of(out) as states:
        train(world, out / "p.safetensors", steps=2, save_interval=1)
    whole = timeless(content_of(out))
    for state in states:
        restore(out, state)
        train(world, out / "p.safetensors", steps=2, save_interval=1)
        assert timeless(content_of(out)) == whole, f"otherwise after {sorted(state)}"


def test_space_for_the_state_is_looked_for_before_the_first_step(world, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    disk = SimpleNamespace(free=10 ** 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with states_of(tmp_path) as states:
        train(world, out, steps=2, save_interval=1)
    largest = max(len(state.get("p.state.safetensors", b"")) for state in states)
    assert largest
    disk.free = largest
    with pytest.raises(UserError, match=r"--out .*p2\.safetensors: cannot hold .*No space left on device"):
        train(world, tmp_path / "p2.safetensors", steps=2, save_interval=1)
    assert not list(tmp_path.glob("p2*.safetensors"))
    disk.free = 2 * largest
    train(world, tmp_path / "p2.safetensors", steps=2, save_interval=1)


def test_features_are_the_same_kept_or_not(world, tmp_path, caplog):
    caplog.set_level("INFO")
    train(world, tmp_path / "kept.safetensors")
    train(world, tmp_path / "computed.safetensors", cache_gb=0)
    assert "features of 48 noised images are kept in 0.00 GB" in caplog.text
    assert "features of 48 noised images are computed in each step, as they take 0.00 GB" in caplog.text
    kept, computed = weights(tmp_path / "kept.safetensors"), weights(tmp_path / "computed.safetensors")
    assert max((kept[name] - computed[name]).abs().max() for name in kept) < 0.01
    train(world, tmp_path / "seed.safetensors", seed=1)
    assert not equal(kept, weights(tmp_path / "seed.safetensors"))


def test_steps_are_uniform_over_the_whole_chain(world, tmp_path):
    network = load_network(*parts(world_flags(world, tmp_path / "p.safetensors")))
    pairs = read_pairs(str(world / "pairs.npz"), size=8, depth_range="0,1")
    features = depth_train.NoisedFeatures(network, pairs, ("output.0",), 0)
    numbers = np.arange(400)
    _, t = features(numbers % 20, numbers // 20)
    counts = np.histogram(t.numpy(), bins=5, range=(0, 100))[0]
    assert t.max() > 95 and counts.min() > 50 and counts.max() < 110


def test_another_training_in_the_same_file_is_refused(world, tmp_path):
    out = tmp_path / "p.safetensors"
    train(world, out)
    for changes, message in (({"steps": 13}, "of a training with steps 12, not 13"),
                             ({"weak_blocks": "2"}, "of a training with branches"),
                             ({"grad_clip": 0.1}, "with grad_clip 0.0, not 0.1"),
                             ({"num_labels": 11}, "num_labels 12, not 11"),
                             ({"depth_range": "0,2"}, "depth_range 0,1, not 0,2"),
                             ({"data": str(world / "held.npz")}, "with data_sha256"),
                             ({"diffusion_steps": 50}, "diffusion_steps 100, not 50")):
        with pytest.raises(UserError, match=message):
            train(world, out, **changes)
    save_state(tmp_path / "q.state.safetensors", weights(out), {**read_metadata(out), "kind": depth_train.STATE_KIND})
    with pytest.raises(UserError, match="steps 12, not 13"):
        train(world, tmp_path / "q.safetensors", steps=13)
    with pytest.raises(UserError, match=r"model\.safetensors is something else, name another --out"):
        train(world, world / "model.safetensors")


def test_a_state_in_place_of_the_file_is_refused_and_kept(world, tmp_path, monkeypatch):
    """As a converter writes it: all tensors, and all that its metadata say."""
    out, state = tmp_path / "p.safetensors", tmp_path / "p.state.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(depth_train.PredictorTraining, "_draw", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train(world, out)
    save_state(out, checkpoint.load_state_dict(state), read_metadata(state))
    before = state.read_bytes()
    with pytest.raises(UserError, match=r"p\.safetensors is something else, name another --out"):
        train(world, out)
    assert state.read_bytes() == before
    out.unlink()
    train(world, out)
    assert not state.exists()
    shutil.copy(out, state)                 # nor are finished predictors a state
    out.unlink()
    with pytest.raises(UserError, match=r"p\.state\.safetensors is something else, name another --out"):
        train(world, out)


def test_a_network_is_chosen_of_a_file_that_wraps_several(world, tmp_path):
    state = checkpoint.load_state_dict(world / "model.safetensors")
    torch.save({"model": state, "ema": {name: 2 * value for name, value in state.items()}}, tmp_path / "both.pt")
    chosen = {entry: load_network(*parts(world_flags(world, tmp_path / "p.safetensors", checkpoint_entry=entry,
                                                     model_path=tmp_path / "both.pt"))).model.state_dict()
              for entry in ("model", "ema", "")}
    assert all(torch.equal(chosen["model"][name], state[name]) for name in state)
    assert all(torch.equal(chosen["ema"][name], 2 * state[name]) for name in state)
    assert all(torch.equal(chosen[""][name], chosen["ema"][name]) for name in state)


def test_a_second_job_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSE", 0)
    out = tmp_path / "p.safetensors"
    with files.locked(tmp_path / ".p.safetensors.lock"), pytest.raises(UserError, match="another job is working there"):
        train(world, out, steps=2)
    train(world, out, steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "p_log"]


@pytest.mark.slow
def test_several_ranks_are_refused(launcher, world, tmp_path):
    given = flags(world_flags(world, tmp_path / "p.safetensors"))
    ended = subprocess.run([str(word) for word in (*launcher, REPOSITORY / "scripts" / "depth_train.py", *given)],
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert ended.returncode and "another job" not in ended.stderr
    assert 1 <= ended.stderr.count("error: 2 ranks were started") <= 2      # not all launchers end the other rank
    assert "error: 2 ranks were started, and this is the work of one process" in ended.stderr
    assert not list(tmp_path.glob("p*"))


def test_a_network_that_is_replaced_while_it_is_read_is_refused(world, tmp_path, monkeypatch):
    """Else the file of the predictors would name the digest of another one."""
    given, load = world_flags(world, tmp_path / "p.safetensors"), checkpoint.load_into
    path = tmp_path / "model.safetensors"
    shutil.copy(given["model_path"], path)

    def training_saves_then(*arguments):
        load(*arguments)
        shutil.copy(given["model_path"], tmp_path / "new")
        (tmp_path / "new").replace(path)

    monkeypatch.setattr(checkpoint, "load_into", training_saves_then)
    with pytest.raises(UserError, match=rf"--model_path {path}: was replaced while it was read"):
        load_network(*parts({**given, "model_path": str(path)}))


def test_what_is_wrong_shows_before_the_work(world, tmp_path, capsys):
    out = tmp_path / "p.safetensors"
    for changes, message in (
            ({"weak_blocks": "4"}, "--weak_blocks 4: the network has no decoder block 4, it has 0 to 3"),
            ({"num_labels": 21}, "--num_labels 21: must be at most 20"),
            ({"depth_range": "1"}, "--depth_range 1: must be image, or NEAR,FAR"),
            ({"data": ""}, "--data is not given"),
            ({"model_path": ""}, "--model_path is not given: name a checkpoint"),
            ({"num_channels": 64}, "has 32 base channels: pass --num_channels 32"),
            ({"out": tmp_path / "p.pt"}, "must end in .safetensors"),
            ({"class_cond": True, "num_classes": 2, "model_path": world / "conditional.safetensors"},
             "has no labels, which the class-conditional network needs"),
            ({"lr": 1e30}, "the loss is not finite at step")):
        assert call("depth_train", *flags(world_flags(world, out) | changes)) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_networks_with_classes_are_given_labels(world, tmp_path):
    changes = {"class_cond": True, "num_classes": 2, "model_path": str(world / "conditional.safetensors"),
               "data": str(world / "held.npz")}
    train(world, tmp_path / "p.safetensors", **changes)
    with pytest.raises(UserError, match="has classes from 0 to 1, the network knows 0 to 0"):
        save_state(tmp_path / "one.safetensors", with_random_weights(create_model(
            **MODEL, class_cond=True, num_classes=1)).state_dict())
        train(world, tmp_path / "q.safetensors", **changes | {
            "num_classes": 1, "model_path": str(tmp_path / "one.safetensors")})
