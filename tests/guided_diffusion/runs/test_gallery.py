"""The gallery of finished runs, and what it and other commands call a run."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from commands import call, flags
from finished import write_run
from networks import TINY
from own_method import GreyOptions
from PIL import Image

from evaluations.reports.folders import of_samples
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.options import fill
from guided_diffusion.runs.options import preset_values
from guided_diffusion.runs.record import finished_run, recorded_command
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.sampling import SAMPLERS, SamplerOptions


def test_a_page_shows_the_images_of_runs_and_their_commands(tmp_path, capsys):
    short = flags({"model": "fmnist32", "sampler": "unipc", "sampling_steps": 2, "num_samples": 2, "batch_size": 2})
    for name, more in (("plain", []), ("guided and not", flags({"pag_scale": 0.5}))):
        assert call("image_sample", *short, *more, "--out", tmp_path / "runs" / name) == 0
    runs, out = [str(tmp_path / "runs" / name) for name in ("plain", "guided and not")], str(tmp_path / "gallery")
    assert call("gallery", *runs, "--out", out, "--columns", 2) == 0
    text = (tmp_path / "gallery" / "index.md").read_text()
    assert text.startswith("# Gallery\n") and text.count("## fmnist32: ") == 2
    assert "![2 images: PAG s = 0.5" in text and "](guided%20and%20not.png)" in text
    assert "python scripts/gallery.py" in text and all(run in text for run in runs)
    with Image.open(tmp_path / "gallery" / "guided and not.png") as picture:
        assert picture.size == (2 * (2 * 34 + 2), 2 * (34 + 2))
    capsys.readouterr()
    assert call("gallery", runs[0], runs[0], "--out", out) == 2
    assert "plain: is the name of several folders" in capsys.readouterr().err
    assert call("gallery", tmp_path, "--out", out) == 2
    assert "holds no finished sampling run" in capsys.readouterr().err


def test_a_gallery_replaces_nothing_but_a_gallery(tmp_path, capsys):
    runs = [write_run(tmp_path / name, np.zeros((2, 8, 8, 3), np.uint8), model="m") for name in ("a b", "c")]
    out = tmp_path / "out"

    def contents():
        return {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(*folders):
        before = contents()
        assert call("gallery", *folders, "--out", out) == 2 and contents() == before
        return capsys.readouterr().err

    out.mkdir()
    assert "holds no finished sampling run" in refused(runs[0], tmp_path) and not contents()
    (out / "index.md").write_text("# My pages\n")
    (out / "a b.png").write_bytes(b"mine")
    assert f"--out {out}: holds index.md, a b.png, which no gallery made" in refused(*runs)
    (out / "index.md").unlink()
    assert "holds a b.png, which no gallery made" in refused(*runs)
    (out / "a b.png").unlink()
    for _ in range(2):
        assert call("gallery", runs[0], "--out", out) == 0
    (out / "c.png").write_bytes(b"mine")
    assert "holds c.png, which no gallery made" in refused(*runs)
    (out / "c.png").unlink()
    assert call("gallery", *runs, "--out", out) == 0 and set(contents()) == {"index.md", "a b.png", "c.png"}
    (out / "index.md").unlink()
    (out / "index.md").mkdir()
    capsys.readouterr()
    assert call("gallery", *runs, "--out", out) == 2
    assert "index.md: cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(("configuration", "model"), [
    ({"pipeline": "hub/stable-2.1"}, "stable-2.1"), ({"pipeline": "/a/pipe/", "steps": 3}, "pipe"),
    ({"model_path": "/a/dogs.pt"}, "dogs"), ({"model_path": "/a/dogs.pt", "model": "cats"}, "cats")])
def test_runs_are_called_as_their_records_say(configuration, model, tmp_path):
    """A prompt is no guidance of GUIDANCE, so that only the record of a latent run knows its title."""
    run = write_run(tmp_path / "run", np.zeros((2, 8, 8, 3), np.uint8), title="prompt scale 7.5, ddim, 3 steps",
                    **configuration)
    assert call("gallery", run, "--out", tmp_path / "gallery") == 0
    assert f"\n## {model}: prompt scale 7.5, ddim, 3 steps\n" in (tmp_path / "gallery" / "index.md").read_text()


@dataclass(frozen=True)
class MeanOptions(SamplerOptions):
    """A sampler of that kind."""

    title = "DDPM without noise"

    def step(self):
        return lambda ctx, pred, grad, noise: (pred.mean, pred.pred_xstart)


@pytest.mark.parametrize(("flag", "title", "unknown"), [
    ({"grey_scale": 0.5}, "grey s = 0.5", "code unknown here (GreyOptions, TowardsGrey)"),
    ({"sampler": "mean"}, "no guidance, DDPM without noise, 2 steps",
     "code unknown here (MeanOptions), mean (unknown here)")])
def test_runs_with_code_from_outside_are_called_what_they_are(flag, title, unknown, tmp_path, monkeypatch,
                                                              tiny_checkpoints):
    """Commands that know neither the method nor the sampler call the run as its record does, and older ones truly."""
    out, gallery = tmp_path / "out", tmp_path / "gallery"
    values = {**TINY, "model_path": str(tiny_checkpoints / "model.safetensors"), "num_samples": 2, "batch_size": 2,
              "timestep_respacing": "2", "out": str(out), **flag}

    def without_title():
        record = json.loads((out / "run.json").read_text())
        record.pop("title", None)
        (out / "run.json").write_text(json.dumps(record))
        return finished_run(out).title

    with monkeypatch.context() as known:
        known.setattr("sys.argv", ["/home/me/own.py", "--out", "out"])
        known.setitem(SAMPLERS, "mean", MeanOptions)
        GUIDANCE.append(GreyOptions)
        try:
            SamplingRun.of(fill(values, SamplingRun.classes(), preset_values, source="here")).run()
            record = (out / "run.json").read_text()
            assert finished_run(out).title == without_title() == title
        finally:
            GUIDANCE.remove(GreyOptions)
    assert without_title() == unknown
    (out / "run.json").write_text(record)
    assert call("gallery", out, "--out", gallery) == 0
    assert f"## model: {title}" in (page := (gallery / "index.md").read_text()) and "python /home/me/own.py" in page
    shown = of_samples(out)
    assert shown.title == f"out: {title}" and shown.command == "python /home/me/own.py --out out"


@pytest.mark.parametrize(("script", "shown"), [
    ("/home/me/scripts/image_sample.py", ["python", "scripts/image_sample.py"]), ("own.py", ["python", "own.py"]),
    ("/home/me/own.py", ["python", "/home/me/own.py"]), ("/usr/bin/guided_image_sample", ["guided_image_sample"])])
def test_a_command_is_shown_as_it_can_be_called(script, shown):
    assert recorded_command({"command": [script, "--seed", "1"]}) == [*shown, "--seed", "1"]
