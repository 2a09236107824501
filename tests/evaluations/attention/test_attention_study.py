"""The study of attention: masks, spectra and overlap of cases that are known, and the command on small networks."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from commands import call, flags
from PIL import Image

from evaluations.attention.measures import (
    Observation,
    PatchStatistics,
    iou,
    overlap_rows,
    overlaps,
    patch_spectra,
    radial_profile,
)
from evaluations.attention.pictures import CELL, OUTLINE, draw_overlaps, outline, overlay
from evaluations.attention.study import (
    AttentionOptions,
    ObservedNetwork,
    attention_method,
    evenly_spaced,
    overlay_strip,
    read_objects,
)
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.capture import Received
from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.options import options_from
from guided_diffusion.pixels import to_uint8
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.sample import SamplingRun

TINY_BLOCKS = ("input.3", "middle", "output.0", "output.1")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quadrant(n=1, size=16):
    """(n, size, size) bool: objects that fill the upper left quarter."""
    objects = torch.zeros(n, size, size, dtype=torch.bool)
    objects[:, :size // 2, :size // 2] = True
    return objects


def attending(tokens, grid=(4, 4), n=1):
    """Attention 2 on these tokens, and as much less on the others that the mean is 1."""
    total = grid[0] * grid[1]
    received = torch.full((n, total), (total - 2 * len(tokens)) / max(1, total - len(tokens)))
    received[:, tokens] = 2.0
    return Received(received, grid)


# Overlap with objects


def test_iou_counts_pixels():
    objects = quadrant()
    assert iou(objects, objects).tolist() == [1.0]
    assert iou(~objects, objects).tolist() == [0.0]
    half = objects.clone()
    half[:, :4] = False
    assert iou(half, objects).tolist() == [0.5]
    assert iou(torch.zeros_like(objects), torch.zeros_like(objects)).tolist() == [0.0]


def test_known_attention_has_known_overlap():
    upper_left = [0, 1, 4, 5]
    scores = overlaps(attending(upper_left, n=3), quadrant(3), ~quadrant(3), [1.0, 3.0], [0, 1, 2], 5)
    assert scores.shape == (3, 2, 3)
    assert (scores[:, 0, 2] == 0).all()                     # and has nothing of the other object
    assert (scores[:, 0, 0] == 1).all()                     # the mask is the object
    assert (scores[:, 1] == 0).all()                        # nothing receives more than 3
    assert (scores[:, 0, 1] < 1).all()
    # Two tokens of the object, two beside it: 2 of 6 cells.
    assert overlaps(attending([0, 1, 2, 3]), quadrant(), quadrant(), [1.0], [0], 5)[0, 0, 0] == pytest.approx(2 / 6)


def test_random_masks_have_as_many_tokens():
    everything = torch.ones(50, 16, 16, dtype=torch.bool)   # IoU with everything is the share of the mask
    seen = Received(torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) * 2, (8, 8))
    scores = overlaps(seen, everything, everything, [0.5, 1.0, 1.5], range(50), 3)
    np.testing.assert_array_equal(scores[..., 0], scores[..., 1])
    np.testing.assert_array_equal(scores[..., 0], scores[..., 2])
    assert 0.2 < scores[:, 2, 0].mean() < scores[:, 0, 0].mean() < 0.8


def test_intervals_are_of_the_paired_difference():
    rng = np.random.default_rng(0)
    random = rng.random(100)
    scores = {("middle", t): np.stack([random + 0.1, random, 0 * random], axis=1)[:, None] for t in (9, 0)}
    rows = overlap_rows(scores, [1.0], 100)
    assert [row["t"] for row in rows] == [9, 0, "all"]
    for row in rows:
        assert row["iou"] - row["random"] == pytest.approx(0.1) == row["difference"]
        assert row["low"] == pytest.approx(0.1) == row["high"]          # though each of the two varies
        assert row["images"] == 100


# Frequencies


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_the_spectrum_of_a_wave_peaks_at_its_frequency(cycles):
    wave = torch.cos(2 * torch.pi * cycles * torch.arange(16) / 8)      # patches of 8 pixels
    for x0 in (wave.expand(1, 3, 16, 16), wave[:, None].expand(1, 3, 16, 16)):
        spectra = patch_spectra(x0, (2, 2)).numpy()
        assert spectra.shape == (1, 4, 8, 8)
        frequencies, profile = radial_profile(spectra[0, 0])
        np.testing.assert_allclose(frequencies, np.arange(5) / 8)
        assert profile.argmax() == cycles


def test_patches_are_those_of_the_tokens():
    x0 = torch.arange(4.0).reshape(2, 2).kron(torch.ones(3, 3)).expand(1, 1, 6, 6)
    np.testing.assert_allclose(patch_spectra(x0, (2, 2))[0, :, 0, 0], 9 * np.arange(4.0))


def test_masked_patches_against_all():
    fine = torch.tensor([1.0, -1.0]).repeat(8).expand(8, 16)            # the upper half has the highest frequency
    x0 = torch.cat([fine, torch.ones(8, 16)]).expand(2, 1, 16, 16)
    upper, lower = attending(range(8), n=2), attending(range(8, 16), n=2)
    statistics = PatchStatistics(1.0)
    one_pixel = Received(torch.full((2, 256), 1.0), (16, 16))
    for t in (7, 0):
        statistics.add(Observation(t, x0, {"upper": upper, "lower": lower, "pixels": one_pixel}))
    rows = statistics.rows()
    assert {row["block"] for row in rows} == {"upper", "lower"}          # a pixel has no spectrum
    np.testing.assert_allclose(statistics.high_ratio("upper", 20), 2)    # and so in any resampling
    np.testing.assert_allclose(statistics.high_ratio("lower", 20), 0, atol=1e-12)
    assert np.isnan(statistics.high_ratio("pixels", 20)).all()
    assert statistics.share("upper") == 0.5 and statistics.share("pixels") == 0
    assert [row["patches"] for row in rows if row["block"] == "upper" and row["frequency"] == 0] == [32, 32, 64]


def test_the_interval_of_the_ratio_is_of_other_images():
    statistics = PatchStatistics(1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):             # in pieces
        noise = torch.randn(10, 1, 16, 16, generator=generator)
        noise[:, :, :4, :4] *= torch.linspace(1, 3, 10).reshape(-1, 1, 1, 1)
        statistics.add(Observation(0, noise, {"middle": attending([0], n=10)}))
    value, low, high = statistics.high_ratio("middle", 200)
    assert 1.5 < low < value < high < 2.2 and 0.05 < high - low < 0.4


def test_without_a_masked_patch_there_is_no_ratio():
    statistics = PatchStatistics(5.0)
    statistics.add(Observation(0, torch.ones(1, 1, 8, 8), {"middle": attending([0])}))
    assert all(np.isnan(row["ratio"]) and row["masked_patches"] == 0 for row in statistics.rows())
    assert np.isnan(statistics.high_ratio("middle", 20)).all()


# Pictures


def test_overlays_show_heat_and_outline():
    grey = np.full((1, 16, 16, 3), 128, np.uint8)
    received = np.full((1, 16), 0.5, np.float32)
    received[0, 5] = 8.0
    picture = overlay(grey, received, (4, 4), 1.0)
    assert picture.shape == (1, CELL, CELL, 3) and picture.dtype == np.uint8
    cell = CELL // 4
    corner, attended = picture[0, 2, 2].astype(int), picture[0, cell + cell // 2, cell + cell // 2].astype(int)
    assert corner[2] > corner[0] and attended[0] > attended[2]          # less: blue; more: red
    assert (picture[0, cell, cell:2 * cell] == OUTLINE).all() and (picture[0, cell - 1] != OUTLINE).any(axis=1).all()
    average = overlay(grey, np.ones((1, 16), np.float32), (4, 4), 1.0)
    assert np.ptp(average.astype(int), axis=3).max() < 3                 # neither, and no mask
    assert overlay(np.zeros((2, 256, 256, 3), np.uint8), np.ones((2, 64)), (8, 8), 1.0).shape == (2, 256, 256, 3)


def test_image_borders_are_no_outline():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, :3, :3] = True
    expected = np.zeros_like(mask)
    expected[0, 2, :3] = expected[0, :3, 2] = True
    np.testing.assert_array_equal(outline(mask), expected)
    assert not outline(np.ones((1, 6, 6), bool)).any()


def test_figures_are_the_same_bytes_each_time(tmp_path):
    rng = np.random.default_rng(0)
    scores = {(block, 0): rng.random((20, 2, 3)) for block in ("input.1", "middle")}
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        draw_overlaps(tmp_path / name, overlap_rows(scores, [0.5, 1.0], 20))
    for name in ("semantic.png", "semantic.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_evenly_spaced_steps_go_from_noise_to_image():
    assert evenly_spaced(25) == [24, 19, 14, 10, 5, 0]
    assert evenly_spaced(3) == [2, 1, 0] and evenly_spaced(1) == [0]


# The chain


@pytest.fixture
def tiny_run(tiny_flags, tiny_checkpoints):
    given = {**tiny_flags, "timestep_respacing": "6", "sel_attn_depth": 1, "blur_sigma": 1.0, "num_samples": 4,
             "model_path": str(tiny_checkpoints / "model.safetensors"), "batch_size": 3}
    values = options_from(given, SampleOptions, *option_classes())
    return SamplingRun.of(values)


@pytest.mark.parametrize(("scale", "shared_start"), [(1.0, False), (1.0, True), (1.5, False)])
def test_what_is_seen_is_the_first_evaluation_of_each_step_of_the_run(tiny_run, scale, shared_start, tmp_path):
    run = tiny_run.changed(guide_scale=scale, shared_start=shared_start, num_samples=3, out=str(tmp_path))
    seen = list(ObservedNetwork(run, "exact").observe_chain([0, 1, 2], [4, 0], ["output.1"]))
    assert [one.t for one in seen] == [4, 0]
    if scale == 1:                  # the last x0 is the sample: DDPM adds no noise there
        with np.load(run.run()) as file:
            np.testing.assert_allclose(to_uint8(seen[1].x0).astype(int), file["arr_0"], atol=1)
    assert torch.allclose(seen[1].received["output.1"].received.mean(dim=1), torch.ones(3))
    unguided = ObservedNetwork(run.changed(guide_scale=1.0), "exact")
    first = next(unguided.observe_chain([0, 1, 2], [4], ["output.1"]))
    assert torch.equal(first.x0, seen[0].x0) == (scale == 1)            # guidance of the step before


def test_a_strip_of_a_run(tiny_run):
    guided = tiny_run.changed(guide_scale=1.5)
    strip = overlay_strip(guided, [2, 0], steps=3)
    assert strip.shape == (2 * (CELL + 2) + 2, 6 * (CELL + 2) + 2, 3) and strip.dtype == np.uint8
    with pytest.raises(UserError, match=r"'output.5' is no attention block"):
        overlay_strip(guided.changed(sel_attn_depth=5), [0])
    with pytest.raises(UserError, match="no guidance: no guidance method of this run reads the attention"):
        overlay_strip(tiny_run, [0])
    with pytest.raises(UserError, match=r"mask global, .*: no guidance method of this run reads the attention"):
        overlay_strip(guided.changed(mask="global"), [0])


@pytest.mark.parametrize(("mask", "reads"), [
    ("self-attention", True), ("high-frequency", True), ("random", True), ("square", True), ("global", False)])
def test_a_run_reads_attention_where_its_mask_depends_on_it(tiny_run, mask, reads):
    run = tiny_run.changed(guide_scale=1.5, mask=mask)
    method = attention_method(run)
    assert (method is not None) == reads
    term, = run.build().guidance
    assert term.reads_attention == reads


# The command


@pytest.fixture
def tiny(tiny_flags, tiny_checkpoints):
    return {**tiny_flags, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 8,
            "num_images": 6, "images": "1,7", "steps": "6,0", "thresholds": "0.9,1.1", "bootstrap": 20}


@pytest.fixture
def object_file(tmp_path):
    """Eight 16x16 images with a square each."""
    mask = np.zeros((8, 16, 16), np.uint8)
    mask[:, 4:12, 4:12] = 2
    images = np.random.default_rng(0).integers(0, 100, (8, 16, 16, 3), np.uint8) + 100 * (mask > 0)[..., None]
    path = tmp_path / "objects.npz"
    np.savez(path, arr_0=images.astype(np.uint8), mask=mask, arr_1=np.arange(8) % 2)
    return path


@pytest.fixture
def no_figures(monkeypatch):
    """A function after which figures are not drawn: that takes most of the time of a small study."""
    return lambda: monkeypatch.setattr("evaluations.attention.pictures._save", lambda *_, **__: None)


def test_the_command_writes_all_files(tiny, object_file, tmp_path, capsys, no_figures):
    out = tmp_path / "out"
    assert call("attention", *flags({**tiny, "objects": object_file, "batch_size": 4, "out": out})) == 0
    figures = [f"{name}.{suffix}" for name in ("frequency", "semantic", "overlay_1", "overlay_7")
               for suffix in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*figures, "frequency.csv", "semantic.csv",
                                                                  "status.json", "summary.md"])
    text = (out / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {block} | 8x8 |" in text for block in TINY_BLOCKS)
    with Image.open(out / "overlay_1.png") as picture:
        assert picture.height > 5 * CELL and picture.width > 2 * CELL
    frequency, semantic = rows_of(out / "frequency.csv"), rows_of(out / "semantic.csv")
    assert {row["t"] for row in frequency} == {"6", "0", "all"} == {row["t"] for row in semantic}
    assert {float(row["frequency"]) for row in frequency} == {0.0, 0.5}             # of 2x2 pixels
    assert all(float(row["masked"]) / float(row["all"]) == pytest.approx(float(row["ratio"]), rel=1e-4)
               for row in frequency)
    assert {int(row["patches"]) for row in frequency} == {6 * 64, 2 * 6 * 64}
    assert {float(row["psi"]) for row in semantic} == {0.9, 1.0, 1.1}
    assert all(0 <= float(row["iou"]) <= 1 and float(row["low"]) <= float(row["high"]) for row in semantic)

    # The same again, with other batches and no figures of other images: the same numbers.
    no_figures()
    again = tmp_path / "again"
    assert call("attention", *flags({**tiny, "objects": object_file, "batch_size": 2, "out": again,
                                     "images": "1"})) == 0
    for name, rows in (("frequency.csv", frequency), ("semantic.csv", semantic)):
        for one, other in zip(rows_of(again / name), rows, strict=True):
            assert [one[key] for key in ("block", "t")] == [other[key] for key in ("block", "t")]
            for key in one.keys() - {"block", "t"}:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=2e-3)


def test_without_objects_the_semantic_analysis_is_skipped(tiny, tmp_path, capsys, no_figures):
    no_figures()
    options = {**tiny, "out": tmp_path, "blocks": "middle", "use_ddim": True, "images": "0"}
    assert call("attention", *flags(options)) == 0
    assert "Semantic analysis: skipped, as --objects names no images" in capsys.readouterr().out
    assert not (tmp_path / "semantic.csv").exists()
    assert {row["block"] for row in rows_of(tmp_path / "frequency.csv")} == {"middle"}


def test_nothing_of_an_earlier_study_stays_in_its_folder(tiny, tmp_path, no_figures):
    left = ["semantic.csv", "semantic.png", "overlay_12.svg"]
    for name in (*left, "overlay_mine.png", "notes.md"):
        (tmp_path / name).write_text("before")
    no_figures()
    assert call("attention", *flags({**tiny, "out": tmp_path, "blocks": "middle", "images": "0"})) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frequency.csv", "notes.md", "overlay_mine.png", "status.json", "summary.md"]


@pytest.mark.parametrize("where", ["evaluations.attention.study.overlap_rows", "evaluations.attention.pictures._save"])
def test_an_earlier_study_stays_whole_until_another_can_take_its_place(where, tiny, object_file, tmp_path, monkeypatch):
    left = {name: name for name in ("summary.md", "semantic.csv", "frequency.csv", "overlay_1.png", "overlay_12.svg")}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    assert call("attention", *flags({**tiny, "objects": object_file, "out": tmp_path, "blocks": "middle",
                                     "images": "1"})) == 130
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "status.json"])
    assert {name: (tmp_path / name).read_text() for name in left} == left


def test_the_bundled_scenes_have_their_objects(tmp_path, no_figures):
    no_figures()
    assert call("attention", "--model", "scenes32", "--timestep_respacing", "2", "--num_images", "4", "--images", "0",
                "--steps", "0", "--object_steps", "1,0", "--bootstrap", "20", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "semantic.csv")
    assert len({row["block"] for row in rows}) == 10
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("iou", "random"))
    assert {row["t"] for row in rows} == {"1", "0", "all"}


def test_classes_of_real_images_are_meant_by_name(object_file, tmp_path):
    """Class 1 of the file, bee, is class 0 of the network."""
    with np.load(object_file) as file:
        np.savez(tmp_path / "named.npz", **file, class_names=np.array(["cow", "bee"]))
    save_state(tmp_path / "network.safetensors", {"a": torch.zeros(1)}, {"class_names": json.dumps(["bee", "cow"])})
    options = AttentionOptions(model_path=str(tmp_path / "network.safetensors"), objects=str(tmp_path / "named.npz"),
                               num_images=4)
    found = read_objects(options, ModelOptions(image_size=16, class_cond=True, num_classes=2))
    assert found.labels.tolist() == [1, 0, 1, 0]


def test_labels_of_real_images_reach_the_network(tiny, object_file, tmp_path, no_figures):
    no_figures()
    outs = [tmp_path / name for name in ("file", "zero")]
    with np.load(object_file) as file:
        np.savez(tmp_path / "unlabelled.npz", arr_0=file["arr_0"], mask=file["mask"])
    for out, objects in zip(outs, (object_file, tmp_path / "unlabelled.npz"), strict=True):
        assert call("attention", *flags({**tiny, "objects": objects, "labels": 0, "thresholds": "1", "out": out,
                                         "images": "0", "num_images": 4})) == 0
    assert rows_of(outs[0] / "semantic.csv") != rows_of(outs[1] / "semantic.csv")
    told = "Their classes are not known (arr_1): the network was told those of --labels 0."
    assert [told in (out / "summary.md").read_text() for out in outs] == [False, True]


@pytest.mark.parametrize(("changed", "message"), [
    ({"images": "0,-1"}, "--images 0,-1: must be image numbers from 0 up"),
    ({"images": "99999999999"}, "--images 99999999999: must be image numbers from 0 up"),
    ({"images": "0,x"}, "--images 0,x: must be image numbers from 0 up"),
    ({"steps": "8"}, "--steps 8: must be steps from 0 to 7 of this chain"),
    ({"steps": "2.5"}, "--steps 2.5: must be steps from 0 to 7 of this chain"),
    ({"object_steps": "0,-2"}, "--object_steps 0,-2: must be steps from 0 to 7 of this chain"),
    ({"blocks": "middel"}, "'middel' is no attention block of this network (did you mean middle?)"),
    ({"thresholds": "1,high"}, "--thresholds 1,high: must be numbers from 0 up"),
    ({"thresholds": "1,nan"}, "--thresholds 1,nan: must be numbers from 0 up"),
    ({"threshold": "-1"}, "--threshold -1.0: must be at least 0"),
    ({"num_images": 1}, "--num_images 1: must be at least 2"),
    ({"num_images": 9}, "holds 8 images"),
    ({"labels": "7"}, "--labels 7: must be a class from 0 to 1"),
    ({"model_path": ""}, "--model_path is not given"),
    ({"model_path": "none.pt"}, "none.pt"),
    ({"objects": "none.npz"}, "--objects none.npz: cannot be read"),
    ({"attention_resolutions": "", "blocks": "middle"}, "model.safetensors"),
])
def test_what_the_command_refuses(tiny, object_file, tmp_path, capsys, changed, message):
    out = tmp_path / "out"
    assert call("attention", *flags({**tiny, "objects": object_file, "out": out, **changed})) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("*"))


@pytest.mark.parametrize(("arrays", "message"), [
    ({"mask": None}, "has no mask (objects)"),
    ({"arr_0": None}, "has no arr_0 (images)"),
    ({"arr_0": np.zeros((8, 32, 32, 3), np.uint8), "mask": np.zeros((8, 32, 32), np.uint8)},
     "holds images of 32x32, those of the model are 16x16"),
    ({"arr_0": np.zeros((8, 16, 16), np.uint8)}, "must be (N, H, W, 3) uint8"),
    ({"mask": np.zeros((7, 16, 16), np.uint8)}, "mask is (7, 16, 16) uint8, must be (8, 16, 16)"),
    ({"mask": np.zeros((8, 16, 16), np.uint8)}, "mask is 0 everywhere"),
    ({"arr_1": np.full(8, 2)}, "arr_1 must be 8 classes from 0 to 1"),
])
def test_object_files_that_do_not_fit(tiny, object_file, tmp_path, capsys, arrays, message):
    with np.load(object_file) as file:
        arrays = {name: array for name, array in {**file, **arrays}.items() if array is not None}
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    assert call("attention", *flags({**tiny, "objects": path, "out": tmp_path / "out"})) == 2
    error = capsys.readouterr().err
    assert f"--objects {path}" in error and message in error


def test_a_folder_that_cannot_be_written_and_no_matplotlib(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert call("attention", *flags({**tiny, "out": tmp_path / "file"})) == 2
    assert f"--out {tmp_path / 'file'}: cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("attention", *flags({**tiny, "out": tmp_path / "out"})) == 2
    assert "need matplotlib: pip install 'guided-pixels[eval]'" in capsys.readouterr().err


def test_the_network_is_an_entry_of_its_file():
    options = AttentionOptions(model_path="both.pt", checkpoint_entry="ema")
    assert options.run(ModelOptions(), DiffusionOptions()).sample.checkpoint_entry == "ema"


def test_thresholds_hold_that_of_the_masks():
    assert AttentionOptions(thresholds="2,0.5", threshold=1.25).psis == [0.5, 1.25, 2.0]
