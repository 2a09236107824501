"""The study of depth accuracy: its files, how it goes on, its verdict and figure."""

import csv
import math

import numpy as np
import pytest
from commands import call, flags
from depth_world import world_flags, write_world

from evaluations.depth.accuracy_report import MEAN_DEPTH, accuracy_verdict, draw_accuracy
from guided_diffusion.depth.pairs import read_pairs

ACCURACY = {"num_held_out": 10, "num_timesteps": 3, "label_counts": "3,20", "cache_gb": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network of random weights, and pairs in which depth is the brightness of the image."""
    return write_world(tmp_path_factory.mktemp("depth"))


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_accuracy_study(world, tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level("INFO")
    out = tmp_path / "study"
    given = flags(world_flags(world, out, held_out=world / "held.npz", **ACCURACY, depth_range="0,2"))
    assert call("depth_accuracy", *given) == 0
    assert "--depth_range 0,2: abs_rel and delta are not measured, which need NEAR,FAR, both above 0" in caplog.messages
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "accuracy.svg", "blocks.csv", "config.json", "labels.csv", "labels_12.safetensors",
        "labels_20.safetensors", "labels_3.safetensors", "status.json", "timesteps.csv", "verdict.txt"]
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

    monkeypatch.setattr("evaluations.depth.accuracy.draw_accuracy", lambda *_: None)
    before = (out / "labels.csv").stat().st_mtime_ns
    for path in out.glob("labels_*.safetensors"):
        path.unlink()
    assert call("depth_accuracy", *given) == 0          # the tables are finished: nothing is trained
    assert (out / "labels.csv").stat().st_mtime_ns == before and not list(out.glob("labels_*.safetensors"))
    capsys.readouterr()
    assert call("depth_accuracy", *given, "--steps", 13) == 2
    assert "holds a study with steps 12, not 13" in capsys.readouterr().err


def test_accuracy_study_goes_on_with_what_is_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluations.depth.accuracy.draw_accuracy", lambda *_: None)
    out = tmp_path / "study"
    given = flags(world_flags(world, out, held_out=world / "held.npz", **ACCURACY))
    assert call("depth_accuracy", *given) == 0
    written = {path.name: path.read_text() for path in out.glob("*.csv")}
    kept = (out / "labels_3.safetensors").stat().st_mtime_ns
    (out / "blocks.csv").unlink()
    (out / "labels_20.safetensors").unlink()
    assert call("depth_accuracy", *given) == 0
    assert (out / "labels_3.safetensors").stat().st_mtime_ns == kept
    assert written == {path.name: path.read_text() for path in out.glob("*.csv")}


def test_accuracy_study_refuses(world, tmp_path, capsys):
    for changes, message in (({"held_out": ""}, "--held_out is not given"),
                             ({"label_counts": "10,x"}, "--label_counts 10,x: must be numbers of at least 1"),
                             ({"label_counts": "10,30"}, "--label_counts 30: must be at most 20"),
                             ({"num_timesteps": 10**10}, "--num_timesteps 10000000000: must be at most"),
                             ({"held_out": world / "pairs.npz"}, "10 of its 10 images, the first is number 0"),
                             ({"held_out": "scenes"}, "is read with 0,1; give --depth_range 1,9 where its depth is in"),
                             ({"held_out": "scenes", "depth_range": ""},
                              f"--held_out scenes: their depth has --depth_range 1,9, and --data {world / 'pairs.npz'} "
                              "is read with image; give --depth_range 1,9 where"),
                             ({"num_held_out": 50}, "--num_held_out 50: must be at most 20")):
        given = world_flags(world, tmp_path / "study", **{"held_out": world / "held.npz"} | ACCURACY | changes)
        assert call("depth_accuracy", *flags(given)) == 2
        assert message in capsys.readouterr().err


def row(branch, l1, **more):
    return {**more, "branch": branch, "l1": l1, "l1_error": 0.001, "abs_rel": math.nan, "delta": math.nan}


def tables(by_block, by_count):
    blocks = [*(row(f"output.{i}", l1) for i, l1 in enumerate(by_block)), row("strong", 0.1), row("weak", 0.2),
              row(MEAN_DEPTH, 0.4)]
    labels = [row(name, l1, labels=count) for name in ("strong", "weak") for count, l1 in by_count.items()]
    return blocks, [row("strong", 0.1, t=5)], labels


def verdict_of(by_block, by_count):
    blocks, _, labels = tables(by_block, by_count)
    return accuracy_verdict(blocks, labels, 100)


@pytest.mark.parametrize("by_block, confirmed", [
    ([0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3], True),
    ([0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], False),
    ([0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.1], False),
    ([0.3, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2, 0.101], False)])
def test_verdict_on_blocks(by_block, confirmed):
    text = verdict_of(by_block, {100: 0.1, 1000: 0.1})
    assert f"Middle blocks are best: {'confirmed' if confirmed else 'not confirmed'}." in text


def test_verdict_on_what_reads_no_depth():
    """Blocks and branches that are no better than a depth that knows no image are no evidence of which is best."""
    text = verdict_of([0.6, 0.5, 0.42, 0.42, 0.5, 0.6], {100: 0.46, 1000: 0.45})
    same = "better than depth that is the same for every image, by more than two standard errors."
    assert f"Middle blocks are best: not tested, as no block alone is {same}" in text
    assert f"100 labels are close to 1000, weak branch: not tested, as 1000 give nothing {same}" in text
    assert " confirmed." not in text
    text = verdict_of([0.6, 0.5, 0.399, 0.39, 0.5, 0.6], {100: 0.4, 1000: 0.399})
    assert "Middle blocks are best: confirmed." in text and "close to 1000, strong branch: not tested" in text


def test_verdict_on_the_branches():
    blocks, _, labels = tables([0.1] * 4, {100: 0.1})
    assert "the strong branch is 50 % better than the weak one." in accuracy_verdict(blocks, labels, 100)
    branches = {row["branch"]: row for row in blocks}
    branches["strong"]["l1"] = 0.22
    assert "the strong branch is 10 % worse than the weak one." in accuracy_verdict(blocks, labels, 100)


@pytest.mark.parametrize("by_count, words", [
    ({10: 0.3, 100: 0.21, 1000: 0.2}, "100 labels are close to 1000, weak branch: confirmed."),
    ({10: 0.3, 100: 0.25, 1000: 0.2}, "100 labels are close to 1000, weak branch: not confirmed."),
    ({10: 0.3, 100: 0.25}, "Whether 100 labels are enough: not tested")])
def test_verdict_on_labels(by_count, words):
    assert words in verdict_of([0.1] * 4, by_count)


def test_figure(tmp_path):
    given = tables([0.3, 0.1, 0.2], {10: 0.3, 100: 0.2})
    draw_accuracy(tmp_path, *given)
    svg = (tmp_path / "accuracy.svg").read_bytes()
    draw_accuracy(tmp_path, *given)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(svg) == len((tmp_path / "accuracy.svg").read_bytes()) and b"<svg" in svg
