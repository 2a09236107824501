"""The command lines of improved-diffusion's README, run with small networks: only their width is cut."""

import json
import re
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import REPOSITORY, call, flags, samples_in
from golden import GOLDEN
from networks import with_random_weights

from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.checkpoint import save_state
from guided_diffusion.options import parse_options
from guided_diffusion.process import LossType
from guided_diffusion.runs.command import read_run
from guided_diffusion.runs.previews import preview_values
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.upsample import UpsamplingRun
from guided_diffusion.stated import NETWORKS
from guided_diffusion.training.options import TrainOptions

ALL_FLAGS = {name: entry["all_flags"]
             for name, entry in json.loads((GOLDEN / "checkpoints_improved.json").read_text()).items()}
IMAGENET64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True"
CIFAR10 = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3"
COSINE = "--diffusion_steps 4000 --noise_schedule cosine"
UNSCALED = "--rescale_learned_sigmas False --rescale_timesteps False"
LSUN = ("--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
        f"{UNSCALED}")
README = {  # MODEL_FLAGS and DIFFUSION_FLAGS
    "imagenet64_uncond_100M_1500K": f"{IMAGENET64} {COSINE}",
    "cifar10_uncond_50M_500K": f"{CIFAR10} {COSINE}",
    "imagenet64_cond_270M_250K": (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        f"{COSINE} {UNSCALED}"),
    "upsample_cond_500K": ("--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True "
                           f"--diffusion_steps 4000 --noise_schedule linear {UNSCALED}"),
    "lsun_uncond_100M_1200K_bs128": LSUN,
    "lsun_uncond_100M_2400K_bs64": f"{LSUN} --use_scale_shift_norm False",
    "imagenet64_uncond_vlb_100M_1500K": f"{IMAGENET64} {COSINE} --use_kl True",
    "cifar10_uncond_vlb_50M_500K": f"{CIFAR10} {COSINE} --use_kl True"}
TRAIN_CONFIG = REPOSITORY / "configs" / "improved_diffusion_train.yaml"


def kind_of_run(name):
    return UpsamplingRun if name.startswith("upsample") else SamplingRun


def narrow(line):
    """A command line's words with the smallest width; of a flag that stands twice, the last value counts."""
    words = line.split()
    return {**dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True)), "num_channels": 32}


def stand_in(name, folder, **changes):
    """The flags of a small network in place of a released one, whose file has the released name in `folder`."""
    given = {**narrow(README[name]), "model_path": str(folder / f"{name}.pt"), **changes}
    run, _ = read_run(flags(given), kind_of_run(name))
    save_state(given["model_path"], with_random_weights(build_model(run.model)).state_dict())
    return given


@pytest.mark.parametrize("name", README)
def test_a_line_means_what_it_means_there(name, caplog):
    """Also what it leaves out: the name of the released file stands for that code's defaults."""
    words = f"{README[name]} --model_path models/{name}.pt".split()
    run, _ = read_run(words, kind_of_run(name))
    assert {flag: run.configuration()[flag] for flag in ALL_FLAGS[name]} == ALL_FLAGS[name]
    assert build_diffusion(run.diffusion).rescale_timesteps is ALL_FLAGS[name]["rescale_timesteps"]
    by_name, _ = read_run(["--model", name, "--model_path", "model.pt"], kind_of_run(name))
    assert (by_name.model, by_name.diffusion) == (run.model, run.diffusion)


def test_what_the_name_of_a_file_stands_for_is_said_and_may_be_overruled(caplog):
    caplog.set_level("INFO")
    words = [*README["cifar10_uncond_50M_500K"].split(), "--model_path", "models/cifar10_uncond_50M_500K.pt"]
    read_run(words, SamplingRun)
    assert caplog.messages == [
        "--model_path models/cifar10_uncond_50M_500K.pt: is taken for the released cifar10_uncond_50M_500K, with "
        "--rescale_timesteps True --rescale_learned_sigmas True"]
    run, _ = read_run([*words, "--rescale_timesteps", "False"], SamplingRun)
    assert run.diffusion.rescale_timesteps is False
    other, _ = read_run([*words, "--model_path", "models/mine.pt"], SamplingRun)
    assert other.diffusion.rescale_timesteps is False
    read_run([*words, "--model_path", "https://example.org/cifar10_uncond_50M_500K.pt?token=hunter2"], SamplingRun)
    assert "https://example.org/cifar10_uncond_50M_500K.pt: is taken for" in caplog.messages[-1]
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("name", README)
@pytest.mark.parametrize(("flag", "place"), [
    ("init_from", "models/{}.pt"), ("resume_checkpoint", "https://example.org/{}.pt?token=hunter2")])
def test_a_training_that_starts_from_a_released_file_has_its_process(name, flag, place, caplog):
    """Which is asked of the file's name before the file is read, so that none need be there."""
    caplog.set_level("INFO")
    kind = "upsampler" if name.startswith("upsample") else "diffusion"
    words = f"{README[name]} --{flag} {place.format(name)}".split()
    model, diffusion, _ = parse_options(words, NETWORKS[kind], DiffusionOptions, TrainOptions,
                                        preset=partial(preview_values, kind=kind))
    values = {**asdict(model), **asdict(diffusion)}
    assert {option: values[option] for option in ALL_FLAGS[name]} == ALL_FLAGS[name]
    if UNSCALED not in README[name]:            # where the line names all, there is nothing to say
        shown = place.format(name).partition("?")[0]
        assert caplog.messages == [f"--{flag} {shown}: is taken for the released {name}, with "
                                   "--rescale_timesteps True --rescale_learned_sigmas True"]


def test_a_flag_goes_before_the_name_of_the_file_that_a_training_starts_from():
    start = {"init_from": "models/cifar10_uncond_50M_500K.pt"}
    words = [*flags(start), "--rescale_timesteps", "False"]
    _, diffusion, _ = parse_options(words, ModelOptions, DiffusionOptions, TrainOptions, preset=preview_values)
    assert diffusion.rescale_timesteps is False and diffusion.rescale_learned_sigmas is True
    assert preview_values(start, "upsampler") == preview_values({"init_from": "models/mine.pt"}) == {}


@pytest.mark.parametrize(("name", "guidance"), [
    ("cifar10_uncond_50M_500K", {"guide_scale": 1.1, "blur_sigma": 1}),
    ("imagenet64_cond_270M_250K", {"guide_scale": 1.1, "sel_attn_block": "middle", "use_ddim": True}),
    ("lsun_uncond_100M_1200K_bs128", {"guide_scale": 1.1, "sel_attn_depth": 5})])
def test_sampling_with_and_without_self_attention_guidance(name, guidance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = stand_in(name, tmp_path, timestep_respacing=1, num_samples=1, batch_size=1)
    for given in (line, {**line, **guidance}):             # no folder is named, and each has its own
        assert call("image_sample", *flags(given)) == 0
    plain, guided = (samples_in(folder)[0] for folder in sorted(Path("samples").iterdir()))
    assert plain.shape == (1, *2 * (int(line["image_size"]),), 3) and (plain != guided).any()


def test_upsampling(tmp_path):
    line = stand_in("upsample_cond_500K", tmp_path, timestep_respacing=1, out=tmp_path / "out", batch_size=1)
    np.savez(tmp_path / "base.npz", np.full((1, 64, 64, 3), 200, np.uint8), np.array([7]))
    assert call("super_res_sample", *flags({**line, "base_samples": tmp_path / "base.npz"})) == 0
    images, labels = samples_in(tmp_path / "out")
    assert images.shape == (1, 256, 256, 3) and labels.tolist() == [7]


def test_likelihood(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = stand_in("cifar10_uncond_vlb_50M_500K", tmp_path, timestep_respacing=2)
    assert call("image_nll", *flags({**line, "data_dir": photos, "num_samples": 2})) == 0
    folder, = (tmp_path / "likelihoods").iterdir()
    assert folder.name.startswith("cifar10_uncond_vlb_50M_500K-") and (folder / "bpd.npz").exists()
    assert "bits per dimension" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "more"), [
    ("cifar10_uncond_50M_500K", "--lr 1e-4 --batch_size 1"),
    ("cifar10_uncond_vlb_50M_500K", "--lr 1e-4 --batch_size 1 --schedule_sampler loss-second-moment")])
def test_training(name, more, tmp_path, photos):
    given = {**narrow(f"{README[name]} {more}"), "data_dir": photos, "out": tmp_path / "out", "lr_anneal_steps": 1}
    assert call("image_train", "--config", TRAIN_CONFIG, *flags(given)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {**ALL_FLAGS[name], "num_channels": 32}
    assert {flag: config["model"][flag] for flag in expected} == expected
    assert config["training"]["random_flip"] is False

    run, _ = read_run(["--model", str(tmp_path / "out")], SamplingRun)
    assert run.diffusion.rescale_timesteps is True and run.model.num_channels == 32


def test_training_of_an_upsampler(tmp_path, photos):
    line = {**narrow(README["upsample_cond_500K"]), "num_classes": 2, "data_dir": photos, "out": tmp_path / "out",
            "batch_size": 1, "lr_anneal_steps": 1}
    assert call("super_res_train", *flags({**line, "large_size": 64, "small_size": 16})) == 0


def test_the_loss_is_the_one_that_the_flags_mean():
    for name, loss in (("imagenet64_uncond_100M_1500K", LossType.RESCALED_MSE),
                       ("imagenet64_uncond_vlb_100M_1500K", LossType.RESCALED_KL),
                       ("lsun_uncond_100M_2400K_bs64", LossType.MSE)):
        run, _ = read_run(["--model", name, "--model_path", "model.pt"], SamplingRun)
        assert build_diffusion(run.diffusion).loss_type is loss


def test_two_runs_without_a_folder_do_not_meet(tmp_path, monkeypatch, capsys, tiny_checkpoints):
    monkeypatch.chdir(tmp_path)
    line = ["--model_path", tiny_checkpoints / "model.safetensors", *flags(
        {"image_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
         "num_heads": 2, "attention_resolutions": 8, "class_cond": True, "num_classes": 2, "learn_sigma": True,
         "resblock_updown": True, "timestep_respacing": 1, "num_samples": 1, "batch_size": 1})]
    assert call("image_sample", *line) == call("image_sample", *line, "--seed", 1) == 0
    assert call("image_sample", *line, "--num_samples", 2) == 0                     # extends the first
    first, second, extended = (Path(line.split()[1]).parent for line in capsys.readouterr().out.splitlines()
                               if line.startswith("samples:"))
    assert first == extended != second and {*(Path("samples")).iterdir()} == {first, second}
    assert all(folder.name.startswith("model-") for folder in (first, second))
    assert samples_in(second)[0].shape == (1, 16, 16, 3)
    assert sorted(path.name for path in first.glob("*.npz")) == ["samples_1x16x16x3.npz", "samples_2x16x16x3.npz"]


def test_the_blocks_with_attention_are_those_that_the_page_names():
    page = (REPOSITORY / "docs" / "improved_diffusion.md").read_text()
    for models, first, last in re.findall(r"\| `([\w*]+)`.*`--sel_attn_depth` (\d+) to (\d+)", page):
        names = [name for name in README if fnmatch(name, models)]
        assert names
        for name in names:
            run, _ = read_run(["--model", name, "--model_path", "model.pt"], kind_of_run(name))
            with torch.device("meta"):
                blocks = build_model(run.model).attention_blocks
            expected = ["middle", *(f"output.{depth}" for depth in range(int(first), int(last) + 1))]
            assert [block for block in blocks if not block.startswith("input")] == expected
