"""Training of depth predictors: it learns, a kill does not harm it, and what does not fit together is refused."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from commands import call, flags
from networks import with_random_weights

from evaluations.depth.accuracy import MEAN_DEPTH, depth_errors, draw, verdict
from guided_diffusion import checkpoint
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.checkpoint import read_metadata, save_state
from guided_diffusion.depth import train as depth_train
from guided_diffusion.depth.features import decoder_features
from guided_diffusion.depth.pairs import read_pairs
from guided_diffusion.depth.predictor import check_fits, load_predictors
from guided_diffusion.depth.train import DepthTrainOptions, load_network, train_predictors
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.script_util import create_model

MODEL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": "",
         "num_heads": 1}
CHAIN = {"diffusion_steps": 100, "timestep_respacing": "5"}
TRAIN = {"strong_blocks": "1,3", "weak_blocks": "0", "num_labels": 12, "steps": 12, "batch_size": 4, "draws": 4,
         "save_interval": 5, "depth_range": "0,1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network of random weights, and pairs in which depth is the brightness of the image."""
    folder = tmp_path_factory.mktemp("depth")
    for name, extra in (("model", {}), ("conditional", {"class_cond": True, "num_classes": 2})):
        save_state(folder / f"{name}.safetensors", with_random_weights(create_model(**MODEL | extra)).state_dict())
    rng = np.random.default_rng(0)
    depth = np.kron(rng.uniform(0, 1, (40, 4, 4)), np.ones((2, 2)))
    images = np.repeat(np.rint(depth * 255).astype(np.uint8)[..., None], 3, axis=3)
    np.savez(folder / "pairs.npz", arr_0=images[:20], depth=depth[:20])
    np.savez(folder / "held.npz", arr_0=images[20:], depth=depth[20:], arr_1=np.arange(20) % 2)
    return folder


def values(world, out, **changes):
    return {**MODEL, **CHAIN, **TRAIN, "model_path": str(world / "model.safetensors"),
            "data": str(world / "pairs.npz"), "out": str(out), **changes}


def parts(given):
    return [cls(**{name: value for name, value in given.items() if name in cls.__dataclass_fields__})
            for cls in (DepthTrainOptions, ModelOptions, DiffusionOptions)]


def train(world, out, **changes):
    return train_predictors(*parts(values(world, out, **changes)))


def weights(path):
    return checkpoint.load_state_dict(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_what_is_in_the_features(world, tmp_path):
    given = {"steps": 300, "batch_size": 8, "lr": 1e-2, "strong_blocks": "1,2,3"}
    predictors = train(world, tmp_path / "p.safetensors", **given)
    held = read_pairs(str(world / "held.npz"), size=8, depth_range="0,1")
    model = load_network(*parts(values(world, tmp_path / "p.safetensors"))).model
    t = torch.zeros(len(held.images), dtype=torch.int64)
    depth = predictors(decoder_features(model, predictors.blocks, held.images, t, graph=False), t)
    mean = (held.depth - held.depth.mean()).abs().mean()
    assert (depth["strong"] - held.depth).abs().mean() < 0.5 * mean
    assert (depth["weak"] - held.depth).abs().mean() < mean


def test_the_file(world, tmp_path):
    out = tmp_path / "p.safetensors"
    assert call("depth_train", *flags(values(world, out))) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    predictors = load_predictors(out)
    assert {name: branch.blocks for name, branch in predictors.branches.items()} == {
        "strong": ("output.1", "output.3"), "weak": ("output.0",)}
    assert (predictors.size, predictors.depth_range) == (8, "0,1")
    check_fits(predictors, create_model(**MODEL), sha256_of(world / "model.safetensors"))
    recipe = json.loads(read_metadata(out)["training"])
    assert recipe["steps"] == 12 and recipe["num_labels"] == 12 and recipe["diffusion_steps"] == 100
    assert all(branch.std.std() > 0 for branch in predictors.branches.values())          # set from the features


@pytest.mark.parametrize("changes", [{}, {"cache_gb": 0}, {"draws": 0}])
def test_a_killed_training_ends_like_one_that_was_not(world, tmp_path, monkeypatch, changes):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    train(world, whole, **changes)
    step = depth_train.PredictorTraining.run_step

    def dies(self):
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(depth_train.PredictorTraining, "run_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(world, killed, **changes)
    assert not killed.exists() and read_metadata(tmp_path / "killed.state.safetensors")["step"] == "5"
    monkeypatch.undo()
    train(world, killed, **changes, save_interval=100)
    assert equal(weights(whole), weights(killed)) and not (tmp_path / "killed.state.safetensors").exists()

    before = killed.stat().st_mtime_ns
    train(world, killed, **changes)          # finished: stays as it is
    assert killed.stat().st_mtime_ns == before


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
    network = load_network(*parts(values(world, tmp_path / "p.safetensors")))
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
                             ({"num_labels": 11}, "num_labels 12, not 11"),
                             ({"depth_range": "0,2"}, "depth_range 0,1, not 0,2"),
                             ({"data": str(world / "held.npz")}, "with data_sha256"),
                             ({"diffusion_steps": 50}, "diffusion_steps 100, not 50")):
        with pytest.raises(UserError, match=message):
            train(world, out, **changes)
    (tmp_path / "q.state.safetensors").write_bytes(out.read_bytes())
    with pytest.raises(UserError, match="steps 12, not 13"):
        train(world, tmp_path / "q.safetensors", steps=13)
    with pytest.raises(UserError, match=r"model\.safetensors is something else, name another --out"):
        train(world, world / "model.safetensors")


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
        assert call("depth_train", *flags(values(world, out) | changes)) == 2
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


# Accuracy


ACCURACY = {"num_held_out": 10, "num_timesteps": 3, "label_counts": "3,20", "cache_gb": 1}


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_accuracy_study(world, tmp_path, capsys):
    out = tmp_path / "study"
    given = flags(values(world, out, held_out=world / "held.npz", **ACCURACY, depth_range="0,2"))
    assert call("depth_accuracy", *given) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "accuracy.svg", "blocks.csv", "config.json", "labels.csv", "labels_12.safetensors",
        "labels_20.safetensors", "labels_3.safetensors", "timesteps.csv", "verdict.txt"]
    blocks, steps, labels = (rows(out / f"{name}.csv") for name in ("blocks", "timesteps", "labels"))
    assert [row["branch"] for row in blocks] == [*(f"output.{i}" for i in range(4)), "strong", "weak", MEAN_DEPTH]
    assert [(row["labels"], row["branch"]) for row in labels] == [
        (count, name) for count in ("3", "12", "20") for name in ("strong", "weak", MEAN_DEPTH)]
    assert sorted({int(row["t"]) for row in steps}) == [16, 50, 83]
    for row in blocks:
        at_steps = [float(other["l1"]) for other in steps if other["branch"] == row["branch"]]
        assert float(row["l1"]) == pytest.approx(np.mean(at_steps), rel=1e-4) and len(at_steps) == 3
        assert row["abs_rel"] == row["delta"] == ""          # no units that begin above 0
    assert "Middle blocks are best: " in (out / "verdict.txt").read_text()

    pairs, held = (read_pairs(str(world / name), size=8, depth_range="0,2").depth for name in ("pairs.npz",
                                                                                                 "held.npz"))
    constant = (pairs[:12].mean(dim=0) - held[:10]).abs().mean().item()
    assert float(blocks[-1]["l1"]) == pytest.approx(constant, rel=1e-4)

    before = (out / "labels.csv").stat().st_mtime_ns
    for path in out.glob("labels_*.safetensors"):
        path.unlink()
    assert call("depth_accuracy", *given) == 0          # the tables are finished: nothing is trained
    assert (out / "labels.csv").stat().st_mtime_ns == before and not list(out.glob("labels_*.safetensors"))
    capsys.readouterr()
    assert call("depth_accuracy", *given, "--steps", 13) == 2
    assert "holds a study with steps 12, not 13" in capsys.readouterr().err


def test_accuracy_study_goes_on_with_what_is_trained(world, tmp_path):
    out = tmp_path / "study"
    given = flags(values(world, out, held_out=world / "held.npz", **ACCURACY))
    assert call("depth_accuracy", *given) == 0
    tables = {path.name: path.read_text() for path in out.glob("*.csv")}
    kept = (out / "labels_3.safetensors").stat().st_mtime_ns
    (out / "blocks.csv").unlink()
    (out / "labels_20.safetensors").unlink()
    assert call("depth_accuracy", *given) == 0
    assert (out / "labels_3.safetensors").stat().st_mtime_ns == kept
    assert tables == {path.name: path.read_text() for path in out.glob("*.csv")}


def test_accuracy_study_refuses(world, tmp_path, capsys):
    for changes, message in (({"held_out": ""}, "--held_out is not given"),
                             ({"label_counts": "10,x"}, "--label_counts 10,x: must be numbers of at least 1"),
                             ({"label_counts": "10,30"}, "--label_counts 30: must be at most 20"),
                             ({"held_out": "scenes"}, "--depth_range 0,1: is always 1,9 for scenes"),
                             ({"num_held_out": 50}, "--num_held_out 50: must be at most 20")):
        given = values(world, tmp_path / "study", **{"held_out": world / "held.npz"} | ACCURACY | changes)
        assert call("depth_accuracy", *flags(given)) == 2
        assert message in capsys.readouterr().err


def test_errors_of_depth():
    metres = torch.tensor([2.0, 4.0, 8.0])
    predicted = torch.tensor([3.0, 4.0, 7.0])
    unit = [((x - 1) / 8 * 2 - 1).reshape(1, 1, 1, 3) for x in (predicted, metres)]
    l1, abs_rel, delta = depth_errors(*unit, (1.0, 9.0))[0]
    assert l1 == pytest.approx(0.5 / 3) and abs_rel == pytest.approx((0.5 + 0 + 0.125) / 3)
    assert delta == pytest.approx(2 / 3)
    assert np.isnan(depth_errors(*unit, None)[0, 1:]).all() and np.isnan(depth_errors(*unit, (0.0, 9.0))[0, 1:]).all()
    assert depth_errors(unit[0] + 100, torch.ones(2, 1, 1, 3), None)[:, 0].tolist() == [0, 0]          # clamped


def row(branch, l1, **more):
    return {**more, "branch": branch, "l1": l1, "l1_error": 0.001, "abs_rel": math.nan, "delta": math.nan}


def tables(by_block, by_count):
    blocks = [*(row(f"output.{i}", l1) for i, l1 in enumerate(by_block)), row("strong", 0.1), row("weak", 0.2),
              row(MEAN_DEPTH, 0.4)]
    labels = [row(name, l1, labels=count) for name in ("strong", "weak") for count, l1 in by_count.items()]
    return blocks, [row("strong", 0.1, t=5)], labels


@pytest.mark.parametrize("by_block, confirmed", [
    ([0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3], True),
    ([0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], False),
    ([0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.1], False),
    ([0.3, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2, 0.101], False)])
def test_verdict_on_blocks(by_block, confirmed):
    text = verdict(*tables(by_block, {100: 0.1, 1000: 0.1}), 100)
    assert f"Middle blocks are best: {'confirmed' if confirmed else 'not confirmed'}." in text


@pytest.mark.parametrize("by_count, words", [
    ({10: 0.3, 100: 0.21, 1000: 0.2}, "100 labels are close to 1000, weak branch: confirmed."),
    ({10: 0.3, 100: 0.25, 1000: 0.2}, "100 labels are close to 1000, weak branch: not confirmed."),
    ({10: 0.3, 100: 0.25}, "Whether 100 labels are enough: not tested")])
def test_verdict_on_labels(by_count, words):
    assert words in verdict(*tables([0.1] * 4, by_count), 100)


def test_figure(tmp_path):
    given = tables([0.3, 0.1, 0.2], {10: 0.3, 100: 0.2})
    draw(tmp_path, *given)
    svg = (tmp_path / "accuracy.svg").read_bytes()
    draw(tmp_path, *given)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(svg) == len((tmp_path / "accuracy.svg").read_bytes()) and b"<svg" in svg
