"""Cascades: base images, larger ones made of them and their evaluation in one command, stopped anywhere."""

import itertools
import json

import numpy as np
import pytest
from commands import call, flags, samples_in
from networks import TINY, with_random_weights

from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.npz import write_batch
from guided_diffusion.runs import sampler
from guided_diffusion.runs.record import read_record, title
from guided_diffusion.runs.sampler import ImageSampler
from guided_diffusion.script_util import sr_create_model_and_diffusion

UPSAMPLER = {"large_size": 32, "small_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1,
             "channel_mult": "1,1", "num_heads": 2, "attention_resolutions": "16", "class_cond": True, "num_classes": 2,
             "learn_sigma": True}
SHORT = {"timestep_respacing": 2, "batch_size": 4}
EVALUATION = ["evaluation", "fmnist32", "--backend", "fashion_mnist", "--metrics", "is"]


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory):
    path = tmp_path_factory.mktemp("upsampler") / "up.safetensors"
    model, _ = sr_create_model_and_diffusion(**UPSAMPLER)
    save_state(path, with_random_weights(model).state_dict(), {"config": json.dumps(UPSAMPLER)})
    return path


@pytest.fixture
def line(tiny_checkpoints, upsampler, tmp_path):
    """The command line of a cascade of 6 images into tmp_path/out; its arguments are words of the three parts."""
    def make(base=(), upsample=(), evaluation=(), **changes):
        own = flags({"num_samples": 6, "out": tmp_path / "out", **changes})
        return [*own, "base", *flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", **SHORT}), *base,
                "upsampler", *flags({"model_path": upsampler, **SHORT}), *upsample, *evaluation]
    return make


def test_a_cascade_is_its_commands_one_after_the_other(line, tmp_path, capsys):
    assert call("cascade", *line(["--guide_scale", 1.5, "--sel_attn_depth", 1], ["--pag_scale", 2], EVALUATION)) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert str(out / "upsampler" / "samples_6x32x32x3.npz") in said and "evaluation.json" in said
    base, labels = samples_in(out / "base")
    images, classes = samples_in(out / "upsampler")
    assert (base.shape, images.shape) == ((6, 16, 16, 3), (6, 32, 32, 3)) and (labels == classes).all()
    configuration = read_record(out / "upsampler" / "run.json")["configuration"]
    assert title(configuration) == "SAG s = 0.5, block output.1, upsampled by PAG s = 2"
    words = line(upsample=["--pag_scale", 2])
    alone = [*words[words.index("upsampler") + 1:], "--base_samples", out / "base", "--out", tmp_path / "alone"]
    assert call("super_res_sample", *alone) == 0
    assert (samples_in(tmp_path / "alone")[0] == images).all()
    assert call("evaluate", "fmnist32", out / "upsampler", *EVALUATION[2:], "--json", tmp_path / "alone.json") == 0
    values = [json.loads(path.read_text()) for path in (out / "evaluation.json", tmp_path / "alone.json")]
    assert values[0] == values[1]


def test_no_two_parts_of_a_cascade_draw_the_same_noise(line, tmp_path, monkeypatch):
    larger = {**UPSAMPLER, "large_size": 64, "small_size": 32, "attention_resolutions": "32"}
    model, _ = sr_create_model_and_diffusion(**larger)
    save_state(tmp_path / "larger.safetensors", with_random_weights(model).state_dict(), {"config": json.dumps(larger)})
    drawn, image_noise = {}, sampler.image_noise

    def recorded(seed, image_ids, step, shape, *use):
        noise = image_noise(seed, image_ids, step, shape, *use)
        drawn.setdefault(shape[-1], set()).update(map(tuple, noise.flatten(1)[:, :9].tolist()))
        return noise

    monkeypatch.setattr(sampler, "image_noise", recorded)
    more = ["upsampler", *flags({"model_path": tmp_path / "larger.safetensors", **SHORT})]
    assert call("cascade", *line(num_samples=2), *more) == 0
    assert samples_in(tmp_path / "out" / "upsampler2")[0].shape == (2, 64, 64, 3)
    assert list(drawn) == [16, 32, 64]
    for one, other in itertools.combinations(drawn.values(), 2):
        assert one and not one & other


@pytest.mark.parametrize("chunks", [1, 3], ids=["in the base", "in the upsampler"])
def test_a_cascade_that_was_stopped_goes_on_and_grows(chunks, line, tmp_path, monkeypatch):
    assert call("cascade", *line(out=tmp_path / "whole")) == 0
    made, images = [], ImageSampler.images

    def stop(self, image_ids, *rest):
        if len(made) == chunks:
            raise KeyboardInterrupt
        made.append(list(image_ids))
        return images(self, image_ids, *rest)

    monkeypatch.setattr(ImageSampler, "images", stop)
    assert call("cascade", *line()) == 130
    monkeypatch.setattr(ImageSampler, "images", lambda self, image_ids, *rest: (
        made.append(list(image_ids)), images(self, image_ids, *rest))[1])
    assert call("cascade", *line()) == 0
    assert made == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5]]
    for part in ("base", "upsampler"):
        file, = (tmp_path / "whole" / part).glob("samples_*.npz")
        assert (tmp_path / "out" / part / file.name).read_bytes() == file.read_bytes()
    made.clear()
    assert call("cascade", *line(num_samples=8)) == 0
    assert made == [[6, 6, 6, 7]] * 2                # fill stands in the places of images 4 and 5
    assert (np.load(tmp_path / "out" / "upsampler" / "samples_8x32x32x3.npz")["arr_0"][:6]
            == samples_in(tmp_path / "whole" / "upsampler")[0]).all()


def test_what_cannot_work_is_refused_before_the_first_image(line, upsampler, tmp_path, capsys):
    words = line()
    middle = words.index("upsampler")
    for arguments, message in (
            (words[:middle], "a cascade needs an upsampler"), (words[middle:], "a cascade needs base images"),
            ([*words, "base"], "base: stands 2 times"), ([*words, "evaluation"], "evaluation: the following arguments"),
            (line(["--out", "x"]), "base --out: is an option of the cascade"),
            (line(upsample=["--base_samples", "x"]), "upsampler --base_samples: cannot be given"),
            (line(["--guide_scael", 2]), "base: --guide_scael: no such option"),
            ([*words, *words[middle:]], "upsampler2 --small_size 16: the images of upsampler have 32 pixels"),
            (line(upsample=["--checkpoint_entry", "ema"]), "upsampler: --checkpoint_entry ema"),
            (line(upsample=["--labels", "7"]), "upsampler: --labels 7: must be a class from 0 to 1"),
            (line(["--labels", "bird"]), "base: --labels bird: must be"),
            (line(["--labels", "base"], ["--labels", "random"]), "base: --labels base: must be"),
            (line(evaluation=["evaluation", "nowhere.npz"]), "nowhere.npz"),
            (line(evaluation=["evaluation", "fmnist32"]), "fmnist32"),
            (line(evaluation=["evaluation", "scenes32", "--backend", "fashion_mnist"]), "--backend"),
            (["fmnist32"], "fmnist32: is none of the words base, upsampler, evaluation"),
            (["--open", "base", "upsampler", "evalution"], "(did you mean evaluation?)"),
            (line(nm_samples=3), "--nm_samples: no such option (did you mean --num_samples?)")):
        capsys.readouterr()
        assert call("cascade", *arguments) == 2, message
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*/samples*"))


def test_options_of_the_evaluation_without_effect_are_said(line, caplog):
    assert call("cascade", *line(evaluation=[*EVALUATION, "--dtype", "bfloat16", "--num_images", 7])) == 2
    assert "without effect: --dtype (--backend fashion_mnist computes in one type)" in caplog.messages


def test_what_a_later_part_cannot_use_is_refused_before_the_base_is_made(line, tmp_path, monkeypatch, capsys):
    assert call("cascade", *line()) == 0
    small = tmp_path / "small.npz"
    write_batch(small, {}, iter([np.full((3, 32, 32, 3), 9, np.uint8)]), (3, 32, 32, 3))
    narrow = tmp_path / "narrow.npz"
    write_batch(narrow, {"mu": np.zeros(7), "sigma": np.eye(7),
                         "backend": np.array("embedded Fashion-MNIST classifier")})
    monkeypatch.setattr(ImageSampler, "images", None)
    fid = ["--backend", "fashion_mnist", "--metrics", "fid"]
    for arguments, message in (
            (line(upsample=["--pag_scale", 2], num_samples=8), "upsampler: --out "),
            (line(["--guide_scale", 1.5, "--sel_attn_depth", 1]), "(--guide_scale differs)"),
            (line(out=tmp_path / "new", evaluation=[*EVALUATION, "--num_images", 7]), "--num_images 7: the cascade"),
            (line(out=tmp_path / "new", evaluation=[*EVALUATION, "--held_out", "nowhere.npz"]), "nowhere.npz"),
            (line(out=tmp_path / "new", evaluation=[*EVALUATION, "--json", "/nowhere/x.json"]), "--json /nowhere"),
            (line(out=tmp_path / "new", evaluation=["evaluation", small, *EVALUATION[2:-1], "recall"]), "has 3 images"),
            (line(out=tmp_path / "new", evaluation=["evaluation", narrow, *fid]), "statistics have 7 numbers")):
        capsys.readouterr()
        assert call("cascade", *arguments) == 2, message
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("new/*/samples*"))


def test_classes_that_the_upsampler_has_not_are_refused_before_the_base_is_made(
        line, tiny_checkpoints, upsampler, tmp_path, capsys):
    paths = []
    for name, path, classes in (("base", tiny_checkpoints / "model.safetensors", ["cat", "dog"]),
                                ("up", upsampler, ["dog", "hen"])):
        paths.append(tmp_path / f"{name}.safetensors")
        save_state(paths[-1], load_state_dict(path), {**read_metadata(path), "class_names": json.dumps(classes)})
    base, up = paths
    words = (["--model_path", base, "--labels", "balanced"], ["--model_path", up])
    assert call("cascade", *line(*words)) == 2
    assert "upsampler --labels base: base: has images of the class cat" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/samples*"))
    assert call("cascade", *line([*words[0][:2], "--labels", "dog"], words[1])) == 0
    assert [samples_in(tmp_path / "out" / part)[1].tolist() for part in ("base", "upsampler")] == [[1] * 6, [0] * 6]


@pytest.mark.parametrize(("part", "option"), [
    ("base", "--guide_scale"), ("upsampler", "--base_samples"), ("evaluation", "--backend")])
def test_help_of_a_part(part, option, capsys):
    assert call("cascade", part, "--help") == 0
    assert option in capsys.readouterr().out


def test_a_value_is_no_part(line, tmp_path):
    assert call("cascade", *line(out=tmp_path / "base", upsample=["--labels", "base"])) == 0
    assert samples_in(tmp_path / "base" / "upsampler")[0].shape == (6, 32, 32, 3)
