"""Sampling runs of pipelines of diffusers: resumed, as one run, and refused where they are of another."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from commands import call
from tiny_diffusers import diffusers, pixel_unet, prompted_pipeline, prompted_unet, scheduler, text_parts

from guided_diffusion.adapters import run
from guided_diffusion.adapters.diffusers import process_of
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    prompted_pipeline(**text_parts()).save_pretrained(path)
    return path


@pytest.fixture
def command(folder, tmp_path):
    def sample(**options):
        values = {"pipeline": folder, "prompt": "a cat", "num_samples": 3, "batch_size": 2, "steps": 2,
                  "sag_scale": 0.75, "pag_scale": 1, "out": tmp_path / "out", "log_every": 1, **options}
        return call("latent_sample", *(word for name, value in values.items() for word in (f"--{name}", str(value))))
    return sample


def samples(out):
    """The images of a finished run, and its record."""
    record = json.loads((out / "run.json").read_text())
    with np.load(out / record["samples"]) as file:
        return file["arr_0"], record


def test_a_longer_run_goes_on_and_gives_the_same_images(command, tmp_path, monkeypatch):
    assert command() == 0
    made, images = [], run.LatentRun._images
    monkeypatch.setattr(run.LatentRun, "_images", lambda self, prepared, image_ids, on_step: (
        made.extend(image_ids), images(self, prepared, image_ids, on_step))[1])
    first, record = samples(tmp_path / "out")
    assert first.shape == (3, 16, 16, 3) and (tmp_path / "out" / "grid.png").exists()
    kept = (tmp_path / "out" / "latent" / "000000.npz").stat().st_mtime_ns

    assert command(num_samples=4) == 0
    longer, again = samples(tmp_path / "out")
    assert np.array_equal(longer[:3], first) and again["fingerprint"] == record["fingerprint"]
    assert (tmp_path / "out" / "latent" / "000000.npz").stat().st_mtime_ns == kept
    assert not np.array_equal(longer[0], longer[1])

    assert set(made) == {3}
    made.clear()
    assert command(num_samples=1) == 0              # which takes the first image of a chunk, and leaves it as it is
    assert np.array_equal(samples(tmp_path / "out")[0], first[:1]) and not made
    assert (tmp_path / "out" / "latent" / "000000.npz").stat().st_mtime_ns == kept


def test_each_image_has_its_prompt(command, tmp_path):
    """Also where a prompt holds what Unicode calls the end of a line, and editors do not."""
    (tmp_path / "prompts.txt").write_text("a cat\nb\u2028c\x0cd\x85e\nb\n", encoding="utf-8-sig")
    assert command(prompt="", prompts=tmp_path / "prompts.txt", batch_size=3) == 0
    assert command(out=tmp_path / "one", batch_size=3) == 0
    assert command(prompt="b", out=tmp_path / "other", batch_size=3) == 0
    (own, _), (one, _), (other, _) = (samples(tmp_path / name) for name in ("out", "one", "other"))
    assert np.array_equal(own[0], one[0]) and not np.array_equal(own[1], one[1])
    assert np.abs(own[2].astype(int) - other[2]).max() <= 1


def test_flags_without_effect_are_said(command, tmp_path, caplog):
    assert command(num_samples=1, sag_scale=0, sag_block="middle", pag_scale=0, pag_blocks="middle", prompt_scale=1,
                   negative_prompt="b") == 0
    assert ("without effect: --sag_block (--sag_scale is 0); --pag_blocks (PAG is off); --negative_prompt "
            "(--prompt_scale is 1)") in caplog.messages
    caplog.clear()
    assert command(num_samples=1, pag_start=2, seg_scale=1, seg_sigma_min=1e9, out=tmp_path / "windows") == 0
    assert ("without effect: --pag_start (every step of the window of PAG is within); --seg_scale, --seg_sigma_min "
            "(no step lies in the window of SEG)") in caplog.messages
    caplog.clear()
    assert command(num_samples=1, pag_start=1, out=tmp_path / "all") == 0
    assert "without effect" not in caplog.text


def test_a_chain_that_begins_in_little_noise_is_said_where_images_are_made(command, caplog):
    sentence = "the first of 2 steps is at the noise level 1.6, and images begin in noise as at 14.6"
    assert command(num_samples=1) == 0
    assert len([line for line in caplog.messages if line.startswith(sentence)]) == 1
    caplog.clear()
    assert command(num_samples=1) == 0 and sentence not in caplog.text
    assert command(num_samples=2, steps=20, overwrite=True) == 0 and "begin in noise" not in caplog.text


def test_steps_that_coincide_are_said_once_and_not_counted(command, tmp_path, caplog):
    steps = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    prompted_pipeline(steps=steps, **text_parts()).save_pretrained(tmp_path / "p")
    assert command(pipeline=tmp_path / "p", batch_size=1, num_samples=2, steps=50, sag_scale=0, pag_scale=0,
                   prompt_scale=1, sampler="unipc") == 0
    said = [line for line in caplog.messages if "spacing" in line]
    made = len(process_of(steps, 50).timestep_map)
    assert made < 50
    assert said == [f"DPMSolverMultistepScheduler: makes {made} of 50 steps; its Karras spacing is not followed"]
    assert samples(tmp_path / "out")[1]["title"] == f"no guidance, unipc, {made} steps"


def test_prompts_are_drawn_from_the_run_or_from_a_file(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\nb\n")
    own = {"prompt": "", "prompts": tmp_path / "prompts.txt", "icg_scale": 1, "num_samples": 2, "prompt_scale": 1}
    assert command(**own) == 0
    assert command(**own, batch_contrasts=True, out=tmp_path / "batch") == 0
    (tmp_path / "drawn.txt").write_text("b\na cat\nb\n")
    assert command(**{**own, "prompt": "a cat", "prompts": ""}, icg_prompts=tmp_path / "drawn.txt",
                   out=tmp_path / "file") == 0
    (images, record), (batch, other), (drawn, third) = (samples(tmp_path / name) for name in ("out", "batch", "file"))
    assert np.abs(images.astype(int) - batch).max() <= 1            # a rounding at most, in the last bit of a pixel
    assert np.array_equal(images[0], drawn[0]) and not np.array_equal(images[1], drawn[1])
    assert len({run["fingerprint"] for run in (record, other, third)}) == 3
    assert "icg_prompts" in record["sha256"]


def test_a_pipeline_with_classes_is_refused_in_a_sentence(command, tmp_path, capsys):
    diffusers.DDPMPipeline(unet=pixel_unet(num_class_embeds=3), scheduler=scheduler()).save_pretrained(tmp_path / "p")
    assert command(pipeline=tmp_path / "p", prompt="") == 2
    assert "its network takes classes" in capsys.readouterr().err


def test_a_decoder_that_gives_nan_leaves_no_images(command, tmp_path, capsys):
    pipe = prompted_pipeline(**text_parts())
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, float("nan"))
    pipe.save_pretrained(tmp_path / "p")
    assert command(pipeline=tmp_path / "p", num_samples=1) == 2
    assert "the decoder returned NaN or infinity for image 0; try float32" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.npz"))


def edit(path, **values):
    """Changes values of a file in JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_run_goes_on_with_the_same_pipeline_alone(command, folder, tmp_path, capsys):
    """Weights are not all that computes; where a pipeline lies, and what saved it, does not matter."""
    other = tmp_path / "pipeline"
    shutil.copytree(folder, other)
    assert command(num_samples=1) == 0
    edit(other / "model_index.json", _diffusers_version="0.40.0")
    edit(other / "unet" / "config.json", _name_or_path="elsewhere", _diffusers_version="0.40.0")
    edit(other / "text_encoder" / "config.json", transformers_version="4.0")
    assert command(num_samples=1, pipeline=other) == 0
    words = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"a</w>": words["model"]["vocab"]["b</w>"], "b</w>": words["model"]["vocab"]["a</w>"]}
    for name, values in {"vae/config.json": {"scaling_factor": 0.5}, "unet/config.json": {"attention_head_dim": 4},
                         "text_encoder/config.json": {"hidden_act": "gelu"}, "tokenizer/tokenizer.json": words,
                         "model_index.json": {"requires_safety_checker": True}}.items():
        shutil.copytree(folder, other, dirs_exist_ok=True)
        edit(other / name, **values)
        capsys.readouterr()
        assert command(num_samples=1, pipeline=other) == 2, name
        assert "of another configuration" in capsys.readouterr().err


OWN = """
from dataclasses import dataclass
from typing import ClassVar

from guided_diffusion.guidance import ContrastGuidance, Inputs, ScaledOptions
from guided_diffusion.options import option


class Fainter(ContrastGuidance):
    def weaker(self, ctx, pred):
        return Inputs(ctx.x_t * 0.5, ctx.t)


@dataclass(frozen=True)
class FainterOptions(ScaledOptions):
    short, sigma_flags, term, for_pipelines = "fainter", "fainter", Fainter, True
    switched_on: ClassVar = {"fainter_scale": 1.0}
    fainter_scale: float = option(0.0, "scale; 0: off")

    def build(self, nets):
        return [Fainter(self.fainter_scale)]
"""


@pytest.mark.parametrize("scale, refused", [(0, False), (1, True)])
def test_images_depend_on_the_code_of_methods_from_outside(command, tmp_path, monkeypatch, capsys, scale, refused):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"my_fainter_{scale}"
    (tmp_path / f"{name}.py").write_text(OWN)
    method = importlib.import_module(name).FainterOptions
    GUIDANCE.append(method)
    try:
        assert command(num_samples=1, fainter_scale=scale) == 0
        assert command(num_samples=2, fainter_scale=scale) == 0
        (tmp_path / f"{name}.py").write_text(OWN.replace("0.5", "0.25"))
        assert command(num_samples=3, fainter_scale=scale) == (2 if refused else 0)
    finally:
        GUIDANCE.remove(method)
    assert (f"(the code of {name}:FainterOptions differs)" in capsys.readouterr().err) == refused


@pytest.mark.parametrize("file, content", [("text_encoder/model.safetensors", b"\xff" * 64), ("tokenizer", None),
                                           ("tokenizer/tokenizer.json", None),
                                           ("model_index.json", b"[]"), ("text_encoder/config.json", None)])
def test_a_damaged_pipeline_is_a_sentence(folder, tmp_path, file, content):
    path = tmp_path / "pipeline"
    shutil.copytree(folder, path)
    if content is not None:
        (path / file).write_bytes(content)
    elif (path / file).is_dir():
        shutil.rmtree(path / file)
    else:
        (path / file).unlink()
    words = {"tokenizer": "names tokenizer, of which there is no folder", "tokenizer/tokenizer.json":
             "its tokenizer knows no words"}.get(file, "diffusers cannot load it")
    with pytest.raises(UserError, match=f"^--pipeline {path}: .*{words}"):
        run.load_pipeline(str(path))


def test_a_pipeline_that_cannot_be_sampled_is_named_by_its_option(command, capsys, monkeypatch):
    control = diffusers.ControlNetModel.from_unet(prompted_unet(), conditioning_embedding_out_channels=(4, 8))
    for pipe, words in [(prompted_pipeline(), "has no text_encoder, which --prompt needs"),
                        (prompted_pipeline("StableDiffusionControlNetPipeline", controlnet=control, **text_parts()),
                         "StableDiffusionControlNetPipeline: its controlnet would have no effect")]:
        monkeypatch.setattr(run, "load_pipeline", lambda name, pipe=pipe: pipe)
        assert command(pipeline="p") == 2
        assert f"--pipeline p: {words}" in capsys.readouterr().err


def test_wrong_steps_are_refused_before_weights_are_read(command, tmp_path, capsys, monkeypatch):
    steps = diffusers.UnCLIPScheduler()
    diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=steps).save_pretrained(tmp_path / "p")
    monkeypatch.setattr(run, "_digest", lambda pipe: pytest.fail("weights are hashed"))
    assert command(pipeline=tmp_path / "p", prompt="", sag_scale=0, pag_scale=0, steps=1) == 2
    assert "--steps 1: UnCLIPScheduler cannot take so many" in capsys.readouterr().err


def test_what_cannot_work_is_a_sentence(command, capsys, tmp_path):
    assert command(num_samples=1) == 0
    for options, words in [({"prompt": "a dog"}, "of another configuration"), ({"pag_scale": 2}, "--pag_scale differs"),
                           ({"pipeline": tmp_path / "none"}, "diffusers cannot load it"),
                           ({"prompt": ""}, "is missing"),
                           ({"pipeline": ""}, "--pipeline: is missing"), ({"prompts": "x"}, "give one of the two"),
                           ({"prompt": "", "prompts": tmp_path / "none"}, "cannot be read"),
                           ({"icg_scale": 1}, "needs other prompts to draw from"),
                           ({"icg_scale": 1, "icg_prompts": tmp_path / "none"}, "none: cannot be read"),
                           ({"icg_prompts": tmp_path / "none"}, "acts with --icg_scale only"),
                           ({"sag_block": "middel", "out": tmp_path / "b"}, "--sag_block middel: 'middel' is no"),
                           ({"steps": 2000, "out": tmp_path / "b"}, "--steps 2000: must be"),
                           ({"steps": 1, "sampler": "unipc", "out": tmp_path / "b"},
                            "--steps 1: the scheduler makes 1 of them, and unipc needs 2 or more"),
                           ({"height": 17, "out": tmp_path / "b"}, "--height 17: must be a multiple"),
                           ({"prompt_scale": 0, "out": tmp_path / "b"}, "--prompt_scale 0.0: must be at least 1")]:
        assert command(**options) == 2
        assert words in capsys.readouterr().err
