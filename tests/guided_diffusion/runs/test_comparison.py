"""Finished runs beside each other: which images, what they have in common, and what is refused."""

import json

import numpy as np
import pytest
import torch
from finished import write_run
from PIL import Image

from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.runs.comparison import ComparisonOptions, read_comparison

IMAGES = np.random.default_rng(0).integers(0, 200, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def runs(tmp_path):
    """Two runs: in the second, which has an image less, image i is brighter by 4 i."""
    plain = write_run(tmp_path / "plain", IMAGES, [0, 1, 2, 0, 1, 2])
    brighter = IMAGES + 4 * np.arange(6, dtype=np.uint8)[:, None, None, None]
    return plain, write_run(tmp_path / "sag", brighter[:5], [0, 1, 2, 0, 1], guide_scale=1.5)


def read(*folders, **options):
    return read_comparison(list(map(str, folders)), ComparisonOptions(out="x.png", **options))


def test_the_same_images_of_all_runs(runs, caplog):
    caplog.set_level("INFO")
    found = read(*runs)
    assert found.names == ("plain: no guidance", "sag: SAG s = 0.5") and found.image_ids == (0, 1, 2, 3, 4)
    note = "beside the guidance the runs differ in --num_samples (6, 5)"
    assert caplog.messages == [f"images 0 to 4 are compared, as {runs[1]} has no more", note]
    assert found.labels[:3] == ("class 0", "class 1", "class 2") and found.notes == (note,)
    assert np.array_equal(found.images[0], IMAGES[:5]) and found.images.shape == (2, 5, 8, 8, 3)
    assert np.allclose(found.changes(0), [[0] * 5, [0, 4, 8, 12, 16]])
    assert np.allclose(found.changes(1)[0], found.changes(0)[1])
    chosen = read(*runs, images="1,3:5", sort="change")
    assert chosen.image_ids == (4, 3, 1) and chosen.labels == ("class 1", "class 0", "class 1")
    assert np.array_equal(chosen.images[0], IMAGES[[4, 3, 1]])


def test_a_table_stands_for_its_rows(runs, tmp_path):
    rows = {"a": {"state": "measured", "samples": "plain/samples.npz"}, "b": {"state": "not run here", "samples": None},
            "c": {"state": "measured", "samples": "sag/samples.npz"}}
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    assert read(tmp_path).names == read(*runs).names
    bench = tmp_path / "bench" / "report"
    bench.mkdir(parents=True)
    (bench / "table.json").write_text(json.dumps({"rows": {"b": rows["b"]}}))
    with pytest.raises(UserError, match="no row of this table was run here"):
        read(tmp_path / "bench")


def test_two_folders_of_one_name_and_one_folder_twice(runs, tmp_path):
    other = write_run(tmp_path / "more" / "plain", IMAGES)
    names = read(runs[0], other, runs[0]).names
    assert len(set(names)) == 3 and names[1] == f"{other}: no guidance"


@pytest.mark.parametrize("change, said", [
    ({"seed": 1}, "has seed 1 and .* seed 0"), ({"labels": [0, 1, 1, 0, 1, 2]}, "image 2 is of class 1 in .* class 2")])
def test_images_of_other_noise_or_classes_are_compared_if_told(change, said, runs, tmp_path, caplog):
    other = write_run(tmp_path / "other", IMAGES, **change)
    with pytest.raises(UserError, match=f"{said}.*--allow_different True"):
        read(runs[0], other)
    found = read(runs[0], other, allow_different=True)
    assert len(found.notes) == 1 and caplog.messages == list(found.notes)


def test_other_numbers_of_steps_are_said(runs, tmp_path):
    steps = [write_run(tmp_path / count, IMAGES, diffusion_steps=1000, timestep_respacing=count)
             for count in ("5", "10")]
    note, = read(*steps).notes
    assert "different numbers of steps" in note and f"{steps[1]} 10" in note
    pipelines = [write_run(tmp_path / f"latent{count}", IMAGES, pipeline="pipe", steps=count, title="no guidance, ddim")
                 for count in (3, 5)]
    assert read(*pipelines).notes == (f"the runs have different numbers of steps ({pipelines[0]} 3, {pipelines[1]} 5), "
                                      "so that images of the same number begin with different noise",)
    shared = [write_run(tmp_path / f"shared{count}", IMAGES, diffusion_steps=1000, timestep_respacing=count,
                        shared_start=True) for count in ("5", "10")]
    assert read(*shared).notes == ("beside the guidance the runs differ in --timestep_respacing (5, 10)",)
    note, = read(steps[1], shared[1]).notes
    assert f"--shared_start is True of {shared[1]} alone" in note


def test_what_differs_beside_the_guidance_is_one_sentence(runs, tmp_path):
    ours = write_run(tmp_path / "ours", IMAGES, sampler="ddim", batch_size=4, eta=0.0, guide_scale=1.5)
    other = write_run(tmp_path / "unipc", IMAGES, sampler="unipc", noise_schedule="cosine", pag_scale=1.0)
    assert read(ours, other).notes == ("beside the guidance the runs differ in --sampler (ddim, unipc)",)
    assert read(runs[0], write_run(tmp_path / "more", IMAGES, batch_size=3, seg_scale=1.0)).notes == ()


def test_guidance_that_no_title_says_is_one_sentence(tmp_path):
    def write(name, digest="", **configuration):
        run = write_run(tmp_path / name, IMAGES, **configuration)
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "sha256": {"weak_model": digest * 64} if digest else {}}))
        return run

    half, early = (write(name, digest, autoguidance_scale=1.0, weak_model_path=f"/a/{name}.pt")
                   for name, digest in (("half", "a"), ("early", "b")))
    assert read(half, early).notes == (
        "guidance of the same title differs in --weak_model_path (half.pt aaaaaaaa, early.pt bbbbbbbb)",)
    assert read(half, half).notes == ()
    blocks = [write(block, pipeline="pipe", sag_scale=1.0, sag_block=block, title="SAG s = 1") for block in ("a", "b")]
    assert read(*blocks).notes == ("guidance of the same title differs in --sag_block (a, b)",)
    upsampled = [write(f"up of {base.name}", base_samples=str(base)) for base in (half, early)]
    assert read(*upsampled).notes[-1].endswith("(half.pt aaaaaaaa, early.pt bbbbbbbb) of the base images")
    windows = [write("all", pag_scale=1.0), write("late", pag_scale=1.0, pag_start=5)]
    assert read(*windows).notes == () and read(*windows).names[1].endswith(", steps below 5")


def test_runs_of_other_base_images_are_told(runs, tmp_path):
    bases = {"same": {}, "guided": {"guide_scale": 1.5}, "sampled": {"sampler": "unipc"}, "seed": {"seed": 1}}
    upsampled = {}
    for name, changes in bases.items():
        base = write_run(tmp_path / name / "base", IMAGES, **{"sampler": "ddpm", **changes})
        upsampled[name] = write_run(tmp_path / name / "up", IMAGES, base_samples=str(base))
    assert read(upsampled["same"], upsampled["guided"]).notes == ()
    assert read(upsampled["same"], upsampled["sampled"]).notes == (
        "beside the guidance the runs differ in --sampler (ddpm, unipc) of the base images",)
    with pytest.raises(UserError, match=r"seed/up began as image 0 of seed 1 and that of .*same/up as image 0 of seed 0"
                                        ".*; pass --allow_different True"):
        read(upsampled["same"], upsampled["seed"])
    few = write_run(tmp_path / "few" / "base", IMAGES[:4], sampler="ddpm")
    short = write_run(tmp_path / "few" / "up", IMAGES, base_samples=str(few / "samples_4x8x8x3.npz"))
    assert "--num_samples (6, 4) of the base images" in read(upsampled["same"], short, num_images=4).notes[0]
    with pytest.raises(UserError, match=r"image 4 of .*few/up began as image 0 of seed 0 and .* as image 4 of seed 0"):
        read(upsampled["same"], short)
    gone = write_run(tmp_path / "gone" / "up", IMAGES, base_samples="nowhere")
    assert read(upsampled["same"], gone).notes == ()


def test_small_images_are_enlarged_by_whole_numbers_alone(runs, tmp_path):
    large = write_run(tmp_path / "large", IMAGES.repeat(2, axis=1).repeat(2, axis=2))
    found = read(runs[0], large)
    assert np.array_equal(found.images[0], found.images[1]) and "enlarged 2 times to 16x16" in found.notes[0]
    with pytest.raises(UserError, match="12x12, which cannot be enlarged by a whole number to the 16x16"):
        read(large, write_run(tmp_path / "odd", np.zeros((6, 12, 12, 3), np.uint8) + 9))


def test_classes_are_the_same_by_name(tmp_path):
    """Class 1 of the first network, bee, is class 0 of the second."""
    folders = []
    for names, labels in ((["ant", "bee", "cow"], [1] * 6), (["bee", "cow"], [0] * 6), (["bee", "cow"], [1] * 6)):
        network = tmp_path / f"{len(names)}.safetensors"
        save_state(network, {"a": torch.zeros(1)}, {"class_names": json.dumps(names)})
        folders.append(write_run(tmp_path / f"run{len(folders)}", IMAGES, labels, model_path=str(network)))
    assert read(*folders[:2]).labels == ("bee",) * 6
    null = write_run(tmp_path / "null", IMAGES, [2] * 6, model_path=str(network))       # as --labels none gives
    assert read(null, null).labels == ("no class",) * 6
    with pytest.raises(UserError, match=r"image 0 is of class cow in .*run2 and of class bee in .*run0"):
        read(folders[0], folders[2])


def test_images_that_a_run_does_not_have(runs):
    with pytest.raises(UserError, match="has the images 0 to 4 alone, so that number 5 is no common one"):
        read(*runs, images="2:6")
    for text in ("3:1", f"0:{10**30}", 5000 * "9"):
        with pytest.raises(UserError, match=f"--images {text[:30]}.*: must be a range"):
            read(*runs, images=text)


def test_the_picture_has_captions_and_a_zoom(runs, tmp_path):
    options = ComparisonOptions(out="x.png", zoom=10, columns=3, labels=True)
    read(*runs).draw(tmp_path / "x.png", options)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    left, top = np.argwhere((pixels == IMAGES[0, 0, 0]).all(axis=-1)).min(axis=0)[::-1]
    assert np.array_equal(pixels[top:top + 80:10, left:left + 80:10], IMAGES[0])
    caption = pixels[top + 81:top + 95, left:left + 80]         # within the room below the image
    assert (caption < 100).any()
