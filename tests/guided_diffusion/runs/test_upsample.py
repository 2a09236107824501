"""Upsampling runs: the official numbers, image i from image i, and going on after a kill."""

import itertools
import json

import numpy as np
import pytest
import torch
from commands import call, flags, samples_in
from golden import cases, fill, noise, relative_error
from networks import TINY_CLASSIFIER, with_random_weights

from guided_diffusion import checkpoint
from guided_diffusion.build import build_diffusion, build_model
from guided_diffusion.checkpoint import save_state
from guided_diffusion.classes import ClassNames
from guided_diffusion.errors import UserError
from guided_diffusion.options import options_from
from guided_diffusion.pixels import from_uint8
from guided_diffusion.runs import sampler
from guided_diffusion.runs.base_images import BaseImages
from guided_diffusion.runs.command import read_run
from guided_diffusion.runs.sampler import BuiltRun, ImageSampler
from guided_diffusion.runs.upsample import UpsamplingRun
from guided_diffusion.script_util import create_classifier, sr_create_model_and_diffusion
from guided_diffusion.unet import SuperResModel

UPSAMPLER = {"large_size": 16, "small_size": 8, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1,
             "channel_mult": "1,1", "num_heads": 2, "attention_resolutions": "8", "class_cond": True, "num_classes": 2,
             "learn_sigma": True, "resblock_updown": True}


@pytest.mark.parametrize("path", cases("upsample_*.npz"), ids=lambda path: path.stem)
def test_steps_of_a_run_are_those_of_the_official_code(path, monkeypatch):
    case = np.load(path)
    seed, shape = int(case["seed"]), (2, *case["x"].shape[2:])
    run = UpsamplingRun.of(options_from(json.loads(str(case["config"])), *UpsamplingRun.classes()))
    model, process = build_model(run.model), build_diffusion(run.diffusion)
    low_res = noise((2, 3, run.model.small_size, run.model.small_size), seed + 1).clamp(-1, 1)
    first = process.num_timesteps

    def recorded(run_seed, image_ids, step, image_shape, stream, stage):
        assert image_shape == shape[1:]
        return noise(shape, seed if step == first else seed * 100 + first - step)

    monkeypatch.setattr(sampler, "image_noise", recorded)
    built = BuiltRun(fill(model), model, process, [])
    labels = torch.from_numpy(case["y"]) if run.model.class_cond else None
    upsampler = ImageSampler(run.sample, run.sampler, built, lambda image_ids: low_res[list(image_ids)])
    chain = upsampler.chain([0, 1], labels)
    for out, expected in zip(itertools.islice(chain, len(case["x"]) - 1), case["x"][1:], strict=True):
        assert abs(out["sample"].numpy()[:len(expected)] - expected).max() < 2e-4
    if "out" not in case:
        return
    with torch.no_grad():
        out = model(noise(shape, seed), torch.from_numpy(case["t"]), low_res=low_res,
                    **({} if labels is None else {"y": labels}))
    assert relative_error(out.numpy(), case["out"]) < 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an upsampler that states its options, up.safetensors, and six images of 8x8 pixels, base.npz."""
    folder = tmp_path_factory.mktemp("upsampler")
    model, _ = sr_create_model_and_diffusion(**UPSAMPLER)
    save_state(folder / "up.safetensors", with_random_weights(model).state_dict(), {"config": json.dumps(UPSAMPLER)})
    write_base(folder / "base.npz", range(6))
    return folder


def write_base(path, ids):
    """Images that differ by their number; the class of number i is i modulo 2."""
    pixels = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8) for i in ids]
    np.savez(path, np.stack(pixels), np.array(list(ids)) % 2)


@pytest.fixture
def line(files, tmp_path):
    """The command line of a short run into tmp_path/out; `changes` are flags."""
    def make(**changes):
        return flags({"model_path": files / "up.safetensors", "base_samples": files / "base.npz", "batch_size": 2,
                      "timestep_respacing": 2, "out": tmp_path / "out", **changes})
    return make


@pytest.fixture
def upsampled(line, tmp_path):
    """Runs the command in a folder of its own; returns its images and labels."""
    count = iter(range(100))

    def run(**changes):
        out = tmp_path / f"run{next(count)}"
        assert call("super_res_sample", *line(**{"out": out, **changes})) == 0
        return samples_in(out)
    return run


def test_image_i_is_made_of_image_i_with_its_class(upsampled, files, tmp_path):
    images, labels = upsampled()
    assert images.shape == (6, 16, 16, 3) and labels.tolist() == [0, 1, 0, 1, 0, 1]
    write_base(tmp_path / "other.npz", [0, 1, 9, 3, 4, 5, 6, 7])
    other, _ = upsampled(base_samples=tmp_path / "other.npz", num_samples=6, labels=files_labels(tmp_path))
    assert (images != other).any(axis=(1, 2, 3)).tolist() == [False, False, True, False, False, False]
    again, classes = upsampled(num_samples=8, batch_size=3)        # they begin again after the last one
    assert abs(again[:6].astype(int) - images).max() <= 1 and classes.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert (again[6] != again[0]).any()


def test_noise_follows_from_how_often_the_images_were_upsampled_before(upsampled, line, files, tmp_path, capsys):
    arrays = dict(np.load(files / "base.npz"))

    def after(name, digests):
        np.savez(tmp_path / f"{name}.npz", **arrays, base=digests)
        images, _ = upsampled(base_samples=tmp_path / f"{name}.npz")
        return images, np.load(*tmp_path.glob(f"run{next(runs)}/samples_*.npz"))["base"]

    runs = iter(range(1, 10))
    once, _ = upsampled()
    digests = np.load(*tmp_path.glob("run0/samples_*.npz"))["base"]
    twice, of_twice = after("twice", digests)
    thrice, _ = after("thrice", of_twice)
    assert (after("else", np.arange(3))[0] == once).all(), "an array of something else by that name"
    for one, other in itertools.combinations((once, twice, thrice), 2):
        assert (one != other).any(axis=(1, 2, 3)).all()
    capsys.readouterr()
    longer = line(out=tmp_path / "run0", base_samples=tmp_path / "twice.npz", num_samples=8)
    assert call("super_res_sample", *longer) == 2
    assert "other noise, as by versions that gave upsamplers in a row the same: it follows" in capsys.readouterr().err


def test_autoguidance_by_a_weaker_upsampler(upsampled, line, files, tmp_path, capsys):
    weak = with_random_weights(sr_create_model_and_diffusion(**UPSAMPLER)[0], seed=5).state_dict()
    save_state(tmp_path / "stated.safetensors", weak, {"config": json.dumps(UPSAMPLER)})
    torch.save(weak, tmp_path / "plain.pt")
    first, second = (upsampled(autoguidance_scale=1, weak_model_path=tmp_path / name)[0]
                     for name in ("stated.safetensors", "plain.pt"))
    assert (first == second).all() and (first != upsampled()[0]).any()
    smaller = UPSAMPLER | {"small_size": 4}
    save_state(tmp_path / "smaller.safetensors", weak, {"config": json.dumps(smaller)})
    capsys.readouterr()
    assert call("super_res_sample", *line(autoguidance_scale=1, weak_model_path=tmp_path / "smaller.safetensors")) == 2
    assert "has small_size 4, and the network that is sampled 8" in capsys.readouterr().err


def files_labels(folder):
    np.save(folder / "labels.npy", np.arange(6) % 2)
    return folder / "labels.npy"


@pytest.mark.parametrize("there", ["in the file", "beside it"])
def test_the_classes_of_the_base_are_meant_by_name(there, tmp_path):
    """Class 1 of the network that made the images, bee, is class 0 of the one that upsamples them."""
    names, out = ["ant", "bee", "cow"], tmp_path / "base.npz"
    arrays = {"arr_0": np.full((3, 8, 8, 3), 9, np.uint8), "arr_1": np.array([1, 2, 1])}
    np.savez(out, **arrays, **({"class_names": np.array(names)} if there == "in the file" else {}))
    if there == "beside it":
        network = tmp_path / "network.safetensors"
        save_state(network, {"a": torch.zeros(1)}, {"class_names": json.dumps(names)})
        (tmp_path / "run.json").write_text(json.dumps({"configuration": {"model_path": str(network)}}))
    base = BaseImages(str(out), 8, 3)
    assert base.labels(2, ClassNames(("bee", "cow")))([0, 1, 2, 3]).tolist() == [0, 1, 0, 0]
    with pytest.raises(UserError, match="has images of the class cow, which is none of the 2 classes: 0 ant, 1 bee"):
        base.labels(2, ClassNames(("ant", "bee")))


def test_a_grey_upsampler_sees_grey_images(tmp_path, upsampled):
    grey = {**UPSAMPLER, "in_channels": 1, "class_cond": False}
    model, _ = sr_create_model_and_diffusion(**grey)
    save_state(tmp_path / "grey.pt", with_random_weights(model).state_dict())
    images, labels = upsampled(**grey, model_path=tmp_path / "grey.pt")
    assert labels is None and (images[..., 0] == images[..., 2]).all()


@pytest.mark.parametrize("guidance", [
    {"guide_scale": 1.5, "sel_attn_depth": 1}, {"pag_scale": 2},
    {"guide_scale": 1.5, "mask": "global", "use_ddim": True},
    {**TINY_CLASSIFIER, "image_size": 16, "in_channels": 3, "classifier_guidance": True, "classifier_scale": 50}],
    ids=["SAG", "PAG", "blur, DDIM", "CG"])
def test_guidance_changes_the_images(guidance, upsampled, tmp_path):
    if "classifier_guidance" in guidance:
        classifier = create_classifier(**{**TINY_CLASSIFIER, "in_channels": 3})
        save_state(tmp_path / "classifier.pt", with_random_weights(classifier).state_dict())
        guidance = {**guidance, "classifier_path": tmp_path / "classifier.pt"}
    plain, _ = upsampled(use_ddim=guidance.get("use_ddim", False))
    assert (upsampled(**guidance)[0] != plain).any(axis=(1, 2, 3)).all()


def test_a_killed_run_goes_on_and_a_finished_one_grows_with_its_base(line, files, tmp_path, monkeypatch, capsys):
    whole, parts, made = tmp_path / "whole", tmp_path / "parts", []
    assert call("super_res_sample", *line(out=whole)) == 0
    images = ImageSampler.images

    def stop_after_the_second_chunk(self, image_ids, *rest):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(image_ids)
        return images(self, image_ids, *rest)

    monkeypatch.setattr(ImageSampler, "images", stop_after_the_second_chunk)
    assert call("super_res_sample", *line(out=parts)) == 130
    assert call("run_status", parts) == 0
    write_base(tmp_path / "changed.npz", [0, 1, 2, 7, 4, 5])
    assert call("super_res_sample", *line(out=parts, base_samples=tmp_path / "changed.npz")) == 2
    assert "was upsampled from other images" in capsys.readouterr().err
    write_base(tmp_path / "moved.npz", range(8))
    made.clear()
    assert call("super_res_sample", *line(out=parts, base_samples=tmp_path / "moved.npz", num_samples=6)) == 0
    assert made == [4, 5]
    name = "samples_6x16x16x3.npz"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    made.clear()
    assert call("super_res_sample", *line(out=parts, base_samples=tmp_path / "moved.npz")) == 0
    assert made == [6, 7]
    assert call("super_res_sample", *line(out=whole, base_samples=tmp_path / "changed.npz")) == 2
    assert "was upsampled from other images" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_a_sentence(line, files, tmp_path, capsys):
    np.savez(tmp_path / "large.npz", np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "unlabelled.npz", np.full((2, 8, 8, 3), 9, np.uint8))
    np.savez(tmp_path / "third.npz", np.full((2, 8, 8, 3), 9, np.uint8), np.array([0, 2]))
    np.savez(tmp_path / "wraps.npz", np.full((2, 8, 8, 3), 9, np.uint8), np.array([0, 2**63], np.uint64))
    np.savez(tmp_path / "ones.npz", np.ones((2, 8, 8, 3), np.uint8))
    for changes, words in (
            ({"base_samples": ""}, "--base_samples is not given"),
            ({"base_samples": tmp_path / "none.npz"}, "none.npz: there is no such file"),
            ({"base_samples": tmp_path}, f"--base_samples {tmp_path}: holds no finished sampling run"),
            ({"base_samples": tmp_path / "large.npz"}, "its images are 16x16, and the network upsamples images of "
                                                       "--small_size 8"),
            ({"base_samples": tmp_path / "unlabelled.npz"}, "holds no classes (arr_1); pass others"),
            ({"base_samples": tmp_path / "third.npz"}, "class 2 of image 1 must be from 0 to 1"),
            ({"base_samples": tmp_path / "wraps.npz"}, f"wraps.npz: arr_1 has the class {2**63}, classes are from"),
            ({"base_samples": tmp_path / "ones.npz", "labels": "random"}, "ones.npz: its 2 images hold nothing"),
            ({"image_size": 64}, "--image_size 64: an upsampler makes images of --large_size, which is 16"),
            ({"small_size": 4}, "states small_size 8 of itself"),
            ({"large_size": 4, "model_path": "x"}, "--small_size 64: must be at most --large_size, which is 4"),
            ({"model": "fmnist32"}, "is a model of kind diffusion, not an upsampler")):
        assert call("super_res_sample", *line(**changes)) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_images_that_begin_again_are_said_once_the_run_is_checked(line, tmp_path, caplog):
    caplog.set_level("INFO")
    said = "--num_samples 8: --base_samples holds 6 images, which begin again after the last"
    assert call("super_res_sample", *line(num_samples=8, labels=files_labels(tmp_path))) == 2
    assert said not in caplog.messages
    assert call("super_res_sample", *line(num_samples=8)) == 0
    assert said in caplog.messages


def test_released_upsamplers_are_known_by_name():
    for name, sizes in (("64_256_upsampler", (64, 256)), ("128_512_upsampler", (128, 512))):
        run, _ = read_run(["--model", name, "--model_path", "x.pt"], UpsamplingRun)
        assert (run.model.small_size, run.model.large_size, run.model.num_channels) == (*sizes, 192)
        assert run.configuration()["image_size"] == sizes[1]


def test_a_trained_upsampler_saw_means_of_areas_and_samples_by_its_folder(tmp_path, files, monkeypatch, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "large.npz", pixels, np.arange(8) % 2)
    seen, forward = [], SuperResModel.forward

    def spied(self, x, t, low_res=None, y=None):
        seen.append(low_res.detach())
        return forward(self, x, t, low_res, y)

    monkeypatch.setattr(SuperResModel, "forward", spied)
    line = flags({**UPSAMPLER, "data_dir": tmp_path / "large.npz", "out": tmp_path / "run", "diffusion_steps": 50,
                  "batch_size": 8, "lr_anneal_steps": 2, "ema_rate": 0.9, "random_flip": False})
    assert call("super_res_train", *line, "--lr_anneal_steps", 1) == 0
    assert call("super_res_train", *line) == 0                 # it goes on
    assert len(seen) == 2
    areas = from_uint8(pixels).reshape(8, 8, 2, 8, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    for low_res in seen:
        expected = {tuple(image.ravel().round(3)) for image in areas}
        assert {tuple(image.numpy().ravel().round(3)) for image in low_res} == expected
    metadata = checkpoint.read_metadata(tmp_path / "run" / "ema_0.9.safetensors")
    assert (json.loads(metadata["config"])["small_size"], metadata["step"]) == (8, "2")
    short = flags({"base_samples": files / "base.npz", "batch_size": 6, "timestep_respacing": 2})
    assert call("super_res_sample", "--model", tmp_path / "run", *short, "--out", tmp_path / "out") == 0
    assert samples_in(tmp_path / "out")[0].shape == (6, 16, 16, 3)
