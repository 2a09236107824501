"""The command line as its users meet it: known command lines, configurations, outputs, and what is refused."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from commands import REPOSITORY, call, execute, flags, samples_in
from local_server import serving
from networks import TINY, TINY_CLASSIFIER, with_random_weights
from PIL import Image
from safetensors.torch import load_file

from evaluations.memory import ResidentMemoryPeak
from guided_diffusion import checkpoint, presets
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_classifier, build_model
from guided_diffusion.checkpoint import save_state
from guided_diffusion.guidance import ClassifierGuidanceOptions, Networks, SagOptions
from guided_diffusion.options import parse_options
from guided_diffusion.presets import find_preset, preset_names
from guided_diffusion.runs.command import read_run
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.runs.upsample import UpsamplingRun
from guided_diffusion.script_util import create_model

# Command lines of the READMEs of guided-diffusion and of the official SAG code: MODEL_FLAGS and SAMPLE_FLAGS filled in.
IMAGENET_64 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True "
    "--model_path models/64x64_diffusion.pt")
IMAGENET_128 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True --model_path models/128x128_diffusion.pt")
IMAGENET_256_UNCOND = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True --model_path models/256x256_diffusion_uncond.pt")
LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --model_path models/lsun_horse.pt")
FEW = "--batch_size 4 --num_samples 100 --timestep_respacing 250"
MANY = "--batch_size 64 --num_samples 10000 --timestep_respacing 250"
README = {
    "ADM 64, classifier": ("classifier_sample", (
        f"{IMAGENET_64} {FEW} --classifier_scale 1.0 --classifier_path models/64x64_classifier.pt "
        "--classifier_depth 4")),
    "ADM 128, classifier, DDIM": ("classifier_sample", (
        f"{IMAGENET_128} --batch_size 4 --num_samples 100 --timestep_respacing ddim25 --use_ddim True "
        "--classifier_scale 2.5 --classifier_path models/128x128_classifier.pt")),
    "ADM 256, classifier": ("classifier_sample", (
        f"{IMAGENET_256_UNCOND} {FEW} --classifier_scale 1.0 --classifier_path models/256x256_classifier.pt"
        .replace("--class_cond False", "--class_cond True").replace("_uncond.pt", ".pt"))),
    "ADM 512, classifier": ("classifier_sample", (
        f"{IMAGENET_256_UNCOND} {FEW} --classifier_scale 4.0 --classifier_path models/512x512_classifier.pt"
        .replace("--class_cond False", "--class_cond True").replace("--image_size 256", "--image_size 512")
        .replace("--use_fp16 True", "--use_fp16 False").replace("256x256_diffusion_uncond", "512x512_diffusion"))),
    "ADM 256 unconditional, classifier": ("classifier_sample", (
        f"{IMAGENET_256_UNCOND} {FEW} --classifier_scale 10.0 --classifier_path models/256x256_classifier.pt")),
    "ADM LSUN": ("image_sample", f"{LSUN} {FEW}"),
    "ADM LSUN without dropout": ("image_sample", (
        f"{LSUN} {FEW}".replace("--dropout 0.1", "--dropout 0.0").replace("lsun_horse", "lsun_horse_nodropout"))),
    "SAG 128 with classifier": ("classifier_sample", (
        f"{IMAGENET_128} {MANY} --classifier_path models/128x128_classifier.pt --classifier_scale 0.5 "
        "--classifier_guidance True --guide_scale 1.1 --guide_start 250 --sel_attn_block output --sel_attn_depth 8 "
        "--blur_sigma 3")),
    "SAG 128 without": ("classifier_sample", (
        f"{IMAGENET_128} {MANY} --classifier_guidance False --guide_scale 1.1 --guide_start 250 "
        "--sel_attn_block output --sel_attn_depth 8 --blur_sigma 3")),
    "SAG 256": ("image_sample", (
        f"{IMAGENET_256_UNCOND} {MANY} --classifier_guidance False --guide_scale 1.5 --guide_start 250 "
        "--sel_attn_block output --sel_attn_depth 2 --blur_sigma 9")),
    "SAG LSUN": ("image_sample", (
        f"{LSUN} {MANY} --guide_scale 1.01 --guide_start 250 --sel_attn_block output --sel_attn_depth 2 "
        "--blur_sigma 9")),
}
UPSAMPLER_256 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 --small_size 64 "
    "--learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --model_path models/64_256_upsampler.pt "
    f"{FEW} --base_samples 64_samples.npz")
UPSAMPLER_512 = (
    "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 --small_size 128 "
    "--learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --model_path models/128_512_upsampler.pt "
    f"{FEW} --base_samples 128_samples.npz")
SMALLER = {  # in place of the values that make those networks large
    "image_size": "16", "num_channels": "32", "num_res_blocks": "1", "attention_resolutions": "8",
    "classifier_depth": "1", "batch_size": "3", "num_samples": "3", "sel_attn_depth": "1"}

NETWORK_FLAGS = (
    "image_size num_channels num_res_blocks num_heads num_heads_upsample num_head_channels attention_resolutions "
    "channel_mult dropout class_cond use_checkpoint use_scale_shift_norm resblock_updown use_fp16 "
    "use_new_attention_order learn_sigma")
PROCESS_FLAGS = (
    "diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas")
CLASSIFIER_FLAGS = (
    "classifier_use_fp16 classifier_width classifier_depth classifier_attention_resolutions "
    "classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool")
SAG_FLAGS = "guide_scale guide_start sel_attn_block sel_attn_depth blur_sigma classifier_guidance"
RUN_FLAGS = "clip_denoised num_samples batch_size use_ddim model_path"
TRAIN_FLAGS = "data_dir lr weight_decay batch_size microbatch log_interval save_interval resume_checkpoint"
OFFICIAL = {
    "image_sample": f"{NETWORK_FLAGS} {PROCESS_FLAGS} {RUN_FLAGS} {SAG_FLAGS}",
    "classifier_sample": (f"{NETWORK_FLAGS} {PROCESS_FLAGS} {RUN_FLAGS} {SAG_FLAGS} {CLASSIFIER_FLAGS} "
                          "classifier_path classifier_scale"),
    "super_res_sample": f"large_size small_size {NETWORK_FLAGS} {PROCESS_FLAGS} {RUN_FLAGS} base_samples",
    "super_res_train": (f"large_size small_size {NETWORK_FLAGS.removeprefix('image_size')} {PROCESS_FLAGS} "
                        f"{TRAIN_FLAGS} schedule_sampler lr_anneal_steps ema_rate fp16_scale_growth"),
    "image_nll": f"{NETWORK_FLAGS} {PROCESS_FLAGS} data_dir clip_denoised num_samples batch_size model_path",
    "image_train": (f"{NETWORK_FLAGS} {PROCESS_FLAGS} {TRAIN_FLAGS} schedule_sampler lr_anneal_steps ema_rate "
                    "fp16_scale_growth"),
    "classifier_train": (f"image_size {CLASSIFIER_FLAGS} {PROCESS_FLAGS} {TRAIN_FLAGS} val_data_dir noised iterations "
                         "anneal_lr eval_interval"),
}
OURS = ("config model num_classes in_channels seed attention_heads mask threshold eta labels out overwrite use_bf16 "
        "keep_shards log_every auto_batch dtype compile "
        "classifier_num_head_channels classifier_channel_mult sigma_small "
        "pag_scale pag_blocks pag_start "
        "dcg_scale dpg_scale depth_predictor depth_prior dag_reduction depth_tau dag_start dag_stop")

SHORT = {"timestep_respacing": 3, "num_samples": 3, "batch_size": 3}


@pytest.fixture
def command(tiny_checkpoints, tmp_path):
    """The command line of a short run of the tiny model into tmp_path/out; `changes` are flags."""
    def line(**changes):
        return flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", **SHORT, "out": tmp_path / "out",
                      **changes})
    return line


@pytest.fixture
def classifier(tiny_checkpoints):
    """The flags of guidance by the tiny classifier."""
    return {**TINY_CLASSIFIER, "classifier_path": tiny_checkpoints / "classifier.safetensors",
            "classifier_guidance": True}


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a script that must refuse its command line: in one sentence, at once, with no file left. Returns it."""
    def run(script, arguments):
        capsys.readouterr()
        code = call(script, *arguments)
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert not list((tmp_path / "out").glob("*"))
        return err
    return run


@pytest.fixture
def bundled(tmp_path, monkeypatch, tiny_checkpoints):
    """A folder of bundled models: tiny16, and its classifier."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(presets.MODELS / "presets.yaml", folder)
    for file, name, options in (("model", "tiny16", TINY), ("classifier", "tiny16_classifier", TINY_CLASSIFIER)):
        state = load_file(tiny_checkpoints / f"{file}.safetensors")
        save_state(folder / f"{name}.safetensors", state, {"config": json.dumps(options)})
    monkeypatch.setattr(presets, "MODELS", folder)
    return folder


def options_of(script, arguments):
    """The options of a run, by their class."""
    on = ClassifierGuidanceOptions.switched_on if script == "classifier_sample" else {}
    options = parse_options(arguments, SampleOptions, *option_classes(), preset=preset_values, defaults=on)
    return {type(one): one for one in options}


# Known command lines


@pytest.mark.parametrize("name", README)
def test_readme_command_means_what_it_says(name):
    script, line = README[name]
    given = dict(zip(line.split()[::2], line.split()[1::2], strict=True))
    options = options_of(script, line.split())
    model, diffusion, sag = options[ModelOptions], options[DiffusionOptions], options[SagOptions]
    classifier = options[ClassifierGuidanceOptions]

    assert diffusion.timestep_respacing == given["--timestep_respacing"]
    assert diffusion.noise_schedule == given["--noise_schedule"]
    assert model.use_fp16 is (given["--use_fp16"] == "True")
    assert model.learn_sigma is True and diffusion.learn_sigma is True
    assert model.class_cond is (given["--class_cond"] == "True")
    assert sag.guide_scale == float(given.get("--guide_scale", 1))
    by_default = script == "classifier_sample"
    assert classifier.classifier_guidance is (given.get("--classifier_guidance", str(by_default)) == "True")

    with torch.device("meta"):
        network = build_model(dataclasses.replace(model, use_fp16=False))
        build_classifier(classifier)
    term, = sag.build(Networks(network, "cpu"))
    assert term.scale == pytest.approx(sag.guide_scale - 1)
    assert network.attention_blocks[term.block].grid == {2: (8, 8), 8: (32, 32)}[sag.sel_attn_depth] \
        or "--sel_attn_depth" not in given


@pytest.mark.parametrize("name", README)
def test_readme_command_runs(name, tmp_path):
    script, line = README[name]
    words = line.split()
    given = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    given |= {key: value for key, value in SMALLER.items() if key in given}
    given["timestep_respacing"] = "ddim2" if given["timestep_respacing"].startswith("ddim") else "2"
    given |= {"channel_mult": "1,2", "num_classes": "3", "classifier_channel_mult": "1,1", "classifier_width": "32",
              "classifier_num_head_channels": "32", "out": str(tmp_path / "out")}
    given["model_path"] = str(tmp_path / "model.pt")
    if "classifier_path" in given:
        given["classifier_path"] = str(tmp_path / "classifier.pt")
    options = options_of(script, flags(given))
    for build, cls, path in ((build_model, ModelOptions, "model.pt"),
                             (build_classifier, ClassifierGuidanceOptions, "classifier.pt")):
        save_state(tmp_path / path, with_random_weights(build(options[cls])).float().state_dict())

    assert call(script, *flags(given)) == 0
    images, labels = samples_in(tmp_path / "out")
    assert images.shape == (3, 16, 16, 3)
    assert (labels is None) == (given["class_cond"] == "False" and script == "image_sample")


@pytest.mark.parametrize("line", [UPSAMPLER_256, UPSAMPLER_512], ids=["64 to 256", "128 to 512"])
def test_readme_command_of_an_upsampler_means_what_it_says_and_runs(line, tmp_path):
    words = line.split()
    given = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    run, _ = read_run(words, UpsamplingRun)
    name = f"{given['small_size']}_{given['large_size']}_upsampler"
    with torch.device("meta"):
        network = build_model(dataclasses.replace(run.model, use_fp16=False))
    assert sum(value.numel() for value in network.state_dict().values()) == find_preset(name).parameters

    given |= {key: value for key, value in SMALLER.items() if key in given}
    given |= {"large_size": 16, "small_size": 8, "channel_mult": "1,1", "num_classes": "3", "timestep_respacing": 2,
              "num_head_channels": 32, "out": tmp_path / "out", "model_path": tmp_path / "model.pt",
              "base_samples": tmp_path / "base.npz"}
    run, _ = read_run(flags(given), UpsamplingRun)
    save_state(tmp_path / "model.pt", with_random_weights(build_model(run.model)).float().state_dict())
    np.savez(tmp_path / "base.npz", np.full((4, 8, 8, 3), 200, np.uint8), np.array([0, 2, 1, 1]))
    assert call("super_res_sample", *flags(given)) == 0
    images, labels = samples_in(tmp_path / "out")
    assert images.shape == (3, 16, 16, 3) and labels.tolist() == [0, 2, 1]


def test_help_lists_every_flag_with_its_meaning(capsys):
    for path in sorted((REPOSITORY / "scripts").glob("[a-z]*.py")):
        assert call(path.stem, "--help") == 0, path
        text = capsys.readouterr().out
        entries = dict(re.findall(r"^  (?:-h, )?--(\w+)((?:.*\n?)(?: {10,}.*\n?)*)", text, re.MULTILINE))
        assert len(entries) > 1, path
        for name, entry in entries.items():
            metavar, *words = entry.split()
            assert len([metavar, *words]) >= 3, f"{path.name}: --{name} has no help"
        ours = path.stem.endswith("_sample") and path.stem != "latent_sample"       # whose networks are of diffusers
        expected = {*OFFICIAL.get(path.stem, "").split(), *(OURS.split() if ours else ())}
        assert not expected - entries.keys(), path
        if path.stem in OFFICIAL:
            undocumented = [name for name, entry in entries.items()
                            if "(default: " not in " ".join(entry.split()) and name not in ("help", "config")]
            assert not undocumented, path


# Configurations and models by name


def test_config_file_gives_the_flags_and_the_command_line_goes_first(command, tmp_path, tiny_checkpoints):
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in TINY.items()) + (
        f"model_path: {tiny_checkpoints / 'model.safetensors'}\n"
        "timestep_respacing: 3\nnum_samples: 3\nbatch_size: 3\nguide_scale: 1.3\nsel_attn_depth: 0\nguide_start:\n"))
    assert call("image_sample", *command(guide_scale=1.3, sel_attn_depth=0)) == 0
    assert call("image_sample", "--config", config, "--out", tmp_path / "same") == 0
    assert call("image_sample", "--config", config, "--out", tmp_path / "other", "--guide_scale", "1") == 0
    flagged, same, other = (samples_in(tmp_path / name)[0] for name in ("out", "same", "other"))
    assert (same == flagged).all()
    assert (other != flagged).any()


def test_an_unconditional_model_takes_the_classes_of_its_classifier(bundled):
    options = json.loads(checkpoint.read_metadata(bundled / "tiny16.safetensors")["config"]) | {"class_cond": False}
    assert preset_values({"model": "tiny16"})["num_classes"] == TINY["num_classes"]
    save_state(bundled / "tiny16.safetensors", create_model(**{**TINY, "class_cond": False}).state_dict(),
               {"config": json.dumps({**options, "num_classes": 1000})})
    assert preset_values({"model": "tiny16"})["num_classes"] == TINY_CLASSIFIER["num_classes"]


def test_perturbed_attention_guidance_changes_images_and_composes(command, tmp_path):
    images = {}
    for name, changes in {"plain": {}, "off": {"pag_scale": 0, "pag_blocks": "middle,output.0"},
                          "pag": {"pag_scale": 2}, "blocks": {"pag_scale": 2, "pag_blocks": "middle,output.0"},
                          "never": {"pag_scale": 2, "pag_start": 0},
                          "both": {"pag_scale": 2, "guide_scale": 1.5, "sel_attn_depth": 0}}.items():
        assert call("image_sample", *command(**changes, out=tmp_path / name)) == 0
        images[name] = samples_in(tmp_path / name)[0]
    assert (images["plain"] == images["off"]).all() and (images["plain"] == images["never"]).all()
    for one, other in (("plain", "pag"), ("pag", "blocks"), ("pag", "both")):
        assert (images[one] != images[other]).any(), (one, other)


def test_bundled_model_runs_by_name_with_its_classifier(bundled, command, classifier, tmp_path):
    short = flags(SHORT)
    assert call("classifier_sample", "--model", "tiny16", *short, "--out", tmp_path / "named") == 0
    assert call("classifier_sample", *command(**classifier)) == 0
    named, flagged = samples_in(tmp_path / "named"), samples_in(tmp_path / "out")
    assert (named[0] == flagged[0]).all() and (named[1] == flagged[1]).all()

    assert call("image_sample", "--model", "tiny16", *short, "--out", tmp_path / "plain") == 0
    assert (samples_in(tmp_path / "plain")[0] != named[0]).any()


@pytest.mark.parametrize("name", [name for name in preset_names() if "diffusion" in name or name.startswith("lsun_")])
def test_released_model_by_name(name, refused, tmp_path):
    options = options_of(
        "classifier_sample", ["--model", name, "--model_path", "model.pt", "--classifier_path", "classifier.pt"])
    model, classifier = options[ModelOptions], options[ClassifierGuidanceOptions]
    assert (options[SampleOptions].model_path, classifier.classifier_path) == ("model.pt", "classifier.pt")
    assert model.image_size == classifier.image_size == (256 if "lsun" in name else int(name.split("x")[0]))
    assert classifier.classifier_depth == (4 if name == "64x64_diffusion" else 2)

    message = refused("image_sample", ["--model", name, "--out", tmp_path / "out"])
    assert "--model_path" in message and f"/{name}.pt" in message


# Outputs


def test_files_of_a_run(command, tmp_path, capsys):
    assert call("image_sample", *command(guide_scale=1.2, sel_attn_depth=1, seed=5)) == 0
    out = tmp_path / "out"
    results = {"samples_3x16x16x3.npz", "grid.png", "run.json"}
    assert {path.name for path in out.iterdir()} == results | {"status.json"}
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in results)

    images, labels = samples_in(out)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert labels.shape == (3,) and labels.dtype == np.int64 and set(labels.tolist()) <= {0, 1}
    assert images.std() > 5
    assert (images == images[..., :1]).all()                      # the network is grey, the file is RGB
    with Image.open(out / "grid.png") as picture:
        assert picture.mode == "RGB"

    record = json.loads((out / "run.json").read_text())
    assert {"guide_scale": 1.2, "seed": 5, "num_samples": 3, "class_cond": True, "mask": "self-attention",
            "attention_heads": "exact", "timestep_respacing": "3"}.items() <= record["configuration"].items()
    assert {"torch", "numpy", "python", "guided_diffusion"} <= record["versions"].keys()
    assert record["timing"]["seconds"] > 0
    assert record["samples"] == "samples_3x16x16x3.npz"


def test_checkpoint_at_an_address(command, tmp_path, tiny_checkpoints, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = (tiny_checkpoints / "model.safetensors").read_bytes()
    with serving() as server:
        url = server.add("/model.safetensors", content)
        assert call("image_sample", *command(model_path=f"{url}?token=secret")) == 0
        assert "secret" not in (tmp_path / "out" / "run.json").read_text()
        assert call("image_sample", *command(model_path=url, out=tmp_path / "other")) == 0
        assert call("image_sample", *command(model_path=url, out=tmp_path / "again")) == 0
        assert len([method for method, *_ in server.requests if method == "GET"]) == 2       # one for each address
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sha256"]["model"] == hashlib.sha256(content).hexdigest()


def test_seed_decides(command, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("image_sample", *command(seed=seed, guide_scale=1.3, sel_attn_depth=0, out=tmp_path / out)) == 0
    first, same, other = ((tmp_path / out / "samples_3x16x16x3.npz").read_bytes() for out in "abc")
    assert first == same
    assert first != other
    images = [samples_in(tmp_path / out)[0].astype(int) for out in "ac"]
    assert np.abs(images[0] - images[1]).mean() > 5


def test_every_option_has_an_effect(command, tmp_path):
    sag = {"guide_scale": 1.3, "sel_attn_depth": 1}
    settings = [
        {}, {"use_ddim": True}, {"use_ddim": True, "eta": 1}, {"clip_denoised": False}, {"labels": "balanced"},
        {"noise_schedule": "cosine"}, {"timestep_respacing": "1,1,1"}, {"use_bf16": True},
        sag, {**sag, "guide_scale": 1.4}, {**sag, "guide_start": 2}, {**sag, "blur_sigma": 1},
        {**sag, "threshold": 0.9}, {**sag, "sel_attn_depth": 0}, {**sag, "sel_attn_block": "middle"},
        {**sag, "sel_attn_block": "input", "sel_attn_depth": 3}, {**sag, "mask": "global"}, {**sag, "mask": "random"},
        {**sag, "mask": "square"}, {**sag, "mask": "high-frequency"}]
    images = []
    for i, changes in enumerate(settings):
        assert call("image_sample", *command(**{**changes, "out": tmp_path / str(i)})) == 0, changes
        images.append(samples_in(tmp_path / str(i))[0])
    same = [(settings[i], settings[j]) for i in range(len(images)) for j in range(i) if (images[i] == images[j]).all()]
    assert not same


@pytest.mark.parametrize("script, off", [
    ("classifier_sample", {"classifier_guidance": False}),
    ("classifier_sample", {"classifier_guidance": True, "classifier_scale": 0}),
    ("image_sample", {"guide_scale": 1, "sel_attn_depth": 99}),
    ("image_sample", {"guide_scale": 1.5, "sel_attn_depth": 1, "guide_start": 0}),
])
def test_what_is_off_changes_nothing_and_needs_nothing(script, off, command, tmp_path):
    assert call("image_sample", *command(out=tmp_path / "plain")) == 0
    assert call(script, *command(**off, classifier_path="/nowhere.pt")) == 0
    assert (samples_in(tmp_path / "plain")[0] == samples_in(tmp_path / "out")[0]).all()


def test_unconditional_network_guided_by_a_classifier(tmp_path, command, classifier):
    path = tmp_path / "unconditional.pt"
    unconditional = TINY | {"class_cond": False}
    save_state(path, with_random_weights(create_model(**unconditional)).state_dict())
    changes = {"class_cond": False, "model_path": path, "labels": "balanced"}
    assert call("image_sample", *command(**changes)) == 0
    assert call("classifier_sample", *command(**{
        **changes, **classifier, "classifier_scale": 20, "guide_scale": 1.2, "sel_attn_depth": 0,
        "out": tmp_path / "guided"})) == 0
    plain, guided = samples_in(tmp_path / "out"), samples_in(tmp_path / "guided")
    assert plain[1] is None
    assert guided[1].tolist() == [0, 1, 0]
    assert (plain[0] != guided[0]).any()


def test_samples_of_another_configuration_are_kept_unless_told(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("image_sample", *command()) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert call("image_sample", *command(seed=1)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "--seed" in message and "--overwrite True" in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before

    assert call("image_sample", *command()) == 0                   # the same configuration: the same file again
    name = "samples_3x16x16x3.npz"
    assert (out / name).read_bytes() == before[out / name]
    assert call("image_sample", *command(seed=1, overwrite=True)) == 0
    assert (out / name).read_bytes() != before[out / name]
    assert json.loads((out / "run.json").read_text())["configuration"]["seed"] == 1


# Bad input


@pytest.mark.parametrize("changes, words", [
    ({"num_samples": 0}, ["--num_samples 0", "at least 1"]),
    ({"num_samples": "many"}, ["--num_samples 'many'", "whole number"]),
    ({"batch_size": 0}, ["--batch_size 0"]),
    ({"seed": -1}, ["--seed -1"]),
    ({"guide_scale": "strong"}, ["--guide_scale 'strong'", "a number"]),
    ({"guide_scale": "nan"}, ["--guide_scale 'nan'"]),
    ({"guide_scale": "inf"}, ["--guide_scale 'inf'"]),
    ({"guide_start": -1, "guide_scale": 1.1}, ["--guide_start -1"]),
    ({"blur_sigma": 0}, ["--blur_sigma 0", "greater than 0"]),
    ({"sel_attn_depth": -1}, ["--sel_attn_depth -1"]),
    ({"sel_attn_block": "outside"}, ["--sel_attn_block outside", "input, middle, output"]),
    ({"mask": "dino"}, ["--mask dino", "self-attention", "global"]),
    ({"attention_heads": "wrong"}, ["--attention_heads wrong", "exact, official"]),
    ({"threshold": "high"}, ["--threshold 'high'"]),
    ({"eta": 2, "use_ddim": True}, ["--eta 2", "at most 1"]),
    ({"labels": "all"}, ["--labels all", "random, balanced"]),
    ({"use_ddim": "maybe"}, ["--use_ddim 'maybe'", "True or False"]),
    ({"class_cond": 2}, ["--class_cond '2'", "True or False"]),
    ({"classifier_scale": "big"}, ["--classifier_scale 'big'"]),
    ({"timestep_respacing": "all"}, ["--timestep_respacing all", "ddim25"]),
    ({"timestep_respacing": "2000"}, ["--timestep_respacing 2000", "1000"]),
    ({"image_size": 17}, ["image size 17", "multiple of 2", "--channel_mult 1,1"]),
    ({"config": "/nowhere.yaml"}, ["--config /nowhere.yaml", "No such file"]),
    ({"model": "fmnist23"}, ["--model fmnist23", "64x64_diffusion"]),
    ({"model": "64x64_classifier"}, ["--model 64x64_classifier", "classifier"]),
    ({"model": "64_256_upsampler"}, ["--model 64_256_upsampler", "upsampler"]),
    ({"num_sample": 3}, ["--num_sample", "did you mean --num_samples?"]),
    ({"guidescale": 3}, ["--guidescale", "did you mean --guide_scale?"]),
    ({"model_path": ""}, ["--model_path", "--model"]),
    ({"guide_scale": 1.1, "sel_attn_depth": 5}, ["output.5", "input.3, middle, output.0, output.1"]),
    ({"guide_scale": 1.1, "sel_attn_block": "input", "sel_attn_depth": 1}, ["input.1", "input.3, middle, output.0"]),
    ({"pag_scale": 1, "pag_blocks": "middle,output.7"}, ["output.7", "input.3, middle, output.0"]),
    ({"pag_scale": 1, "pag_blocks": ","}, ["blocks", "like"]),
], ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "")
def test_bad_option_is_refused(changes, words, command, refused):
    message = refused("image_sample", command(**changes))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("words, expected", [
    (["stray"], "stray"), (["--num_samples"], "--num_samples"), (["--guide_scale=x"], "--guide_scale 'x'"),
    (["--no-such=1"], "--no-such"),
])
def test_odd_words_on_the_command_line_are_refused(words, expected, command, refused):
    assert expected in refused("image_sample", [*command(), *words])


@pytest.mark.parametrize("text, words", [
    ("num_sampels: 3\n", ["num_sampels", "did you mean num_samples?"]),
    ("num_samples: 0\n", ["--num_samples 0"]),
    ("model_path: {a: b}\n", ["--model_path"]),
    ("a: [\n", ["is not YAML"]),
])
def test_bad_config_is_refused(text, words, refused, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    message = refused("image_sample", ["--config", config, "--out", tmp_path / "out"])
    assert all(word in message for word in words), message


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_checkpoint_is_refused(command, refused, tmp_path, tiny_checkpoints):
    good = (tiny_checkpoints / "model.safetensors").read_bytes()
    pt = tmp_path / "model.pt"
    save_state(pt, load_file(tiny_checkpoints / "model.safetensors"))
    files = {
        "cut.safetensors": (good[:len(good) // 2], "truncated"),
        "cut.pt": (pt.read_bytes()[:-1000], "truncated"),
        "text.pt": (b"<html>404 Not Found</html>", "no checkpoint"),
    }
    for name, (content, word) in files.items():
        (tmp_path / name).write_bytes(content)
        message = refused("image_sample", command(model_path=tmp_path / name))
        assert name in message and word in message, message

    torch.save({"weight": torch.zeros(1), "hook": Malicious(tmp_path / "owned")}, tmp_path / "foreign.pt")
    assert "foreign objects" in refused("image_sample", command(model_path=tmp_path / "foreign.pt"))
    assert not (tmp_path / "owned").exists()
    assert "no such file" in refused("image_sample", command(model_path=tmp_path / "missing.pt"))
    classifier = tiny_checkpoints / "classifier.safetensors"
    assert "--classifier_path" in refused("image_sample", command(model_path=classifier))


@pytest.mark.parametrize("changes, remedy", [
    ({"class_cond": False}, "--class_cond True"), ({"num_channels": 64}, "--num_channels 32")])
def test_flags_that_do_not_fit_the_file_are_refused_with_the_right_one(changes, remedy, command, refused):
    message = refused("image_sample", command(**changes))
    assert f"pass {remedy}" in message and len(message) < 300


@pytest.mark.parametrize("changes, words", [
    ({"classifier_path": ""}, ["--classifier_path", "not given"]),
    ({"classifier_path": "/nowhere/classifier.pt"}, ["/nowhere/classifier.pt", "no such file"]),
    ({"classifier_depth": 2}, ["pass --classifier_depth 1"]),
    ({"classifier_width": 40}, ["--classifier_width 40", "32"]),
])
def test_bad_classifier_is_refused(changes, words, command, classifier, refused):
    message = refused("classifier_sample", command(**{**classifier, **changes}))
    assert all(word in message for word in words), message


def test_folder_that_cannot_be_written_is_refused(command, refused, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/samples"):
        message = refused("image_sample", command(out=out))
        assert f"--out {out}" in message and "cannot be written" in message


def test_broken_record_counts_as_another_configuration(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for text in ("", "[]", '{"configuration": 3}', '{"configuration": {}}', "\0"):
        (tmp_path / "out" / "run.json").write_text(text)
        assert call("image_sample", *command()) == 2, text
        assert "--overwrite True" in capsys.readouterr().err


def test_nan_names_step_and_image_and_leaves_nothing(command, capsys, tmp_path, tiny_checkpoints):
    state = load_file(tiny_checkpoints / "model.safetensors")
    state["label_emb.weight"][1] = float("nan")
    path = tmp_path / "nan.pt"
    save_state(path, state)
    arguments = command(model_path=path, labels="balanced")
    assert call("image_sample", *arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: step 2: .*NaN.* image 1", message)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["status.json"]         # which says why


def test_failed_run_keeps_the_samples_it_was_to_replace(command, tmp_path, tiny_checkpoints):
    state = load_file(tiny_checkpoints / "model.safetensors")
    state["out.2.bias"][0] = float("nan")
    save_state(tmp_path / "nan.pt", state)
    assert call("image_sample", *command()) == 0

    def kept():
        return {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "status.json"}

    before = kept()
    assert call("image_sample", *command(model_path=tmp_path / "nan.pt", overwrite=True)) == 2
    assert kept() == before


def test_mistake_with_a_large_model_shows_at_once(refused, tmp_path):
    with ResidentMemoryPeak() as memory:
        message = refused("classifier_sample", ["--model", "256x256_diffusion", "--model_path", "/nowhere/model.pt",
                                                "--classifier_guidance", "False", "--out", tmp_path / "out"])
    assert "/nowhere/model.pt" in message
    assert not memory.peak > 2**29              # its weights would take 2.2 GB, and a while to be drawn


def test_exit_code_and_stderr_of_a_process(command):
    ended = execute(sys.executable, "scripts/image_sample.py", *command(num_samples=0))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --num_samples 0: must be at least 1\n"


# The comparison


def test_compare_draws_runs_below_each_other(command, classifier, tmp_path, capsys):
    for name, changes in (("plain", {}), ("a/sag", {"guide_scale": 1.3, "sel_attn_depth": 1}), ("b/sag", classifier)):
        assert call("image_sample", *command(**{**changes, "out": tmp_path / name})) == 0
    heights = []
    for names in (["plain"], ["plain", "a/sag"], ["plain", "a/sag", "b/sag"]):
        picture = tmp_path / "pictures" / "comparison.png"
        assert call("compare", *(tmp_path / name for name in names), "--out", picture) == 0
        assert str(picture) in capsys.readouterr().out
        with Image.open(picture) as image:
            heights.append(image.height)
    assert heights[0] < heights[1] < heights[2]
    assert heights[2] - heights[1] == heights[1] - heights[0]


def test_compare_shows_runs_that_share_name_and_settings(command, tmp_path):
    heights = []
    for name in ("a/run", "b/run"):
        assert call("image_sample", *command(out=tmp_path / name)) == 0
    for folders in (["a/run"], ["a/run", "b/run"]):
        assert call("compare", *(tmp_path / name for name in folders), "--out", tmp_path / "comparison.png") == 0
        with Image.open(tmp_path / "comparison.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0]


def test_compare_refuses_what_is_no_finished_run(command, tmp_path, capsys):
    assert call("image_sample", *command()) == 0
    good = tmp_path / "out"
    empty, gone, damaged = tmp_path / "empty", tmp_path / "gone", tmp_path / "damaged"
    empty.mkdir()
    for folder in (gone, damaged):
        shutil.copytree(good, folder)
    (gone / "samples_3x16x16x3.npz").unlink()
    (damaged / "samples_3x16x16x3.npz").write_bytes(b"PK")
    capsys.readouterr()
    for folder in (empty, gone, damaged, tmp_path / "missing"):
        assert call("compare", good, folder, "--out", tmp_path / "comparison.png") == 2
        message = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", message) and str(folder) in message
    assert call("compare", good, "--num_images", 0, "--out", tmp_path / "comparison.png") == 2
    assert call("compare", good, "--out", good / "run.json" / "comparison.png") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize("command", [["halve_checkpoint"], ["convert_checkpoint", "--dtype", "float16"]],
                         ids=lambda command: command[0])
def test_a_checkpoint_in_half_precision_is_half_as_large_and_loads(command, tmp_path, tiny_checkpoints, capsys):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    weights = load_file(tiny_checkpoints / "model.safetensors")
    save_state(whole, weights, {"config": json.dumps(TINY)})
    assert call(*command, whole, "--out", half) == 0
    assert str(half) in capsys.readouterr().out
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert checkpoint.read_metadata(half) == {"config": json.dumps(TINY)}
    model = create_model(**TINY)
    checkpoint.load_into(model, half, TINY)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)
    assert call(*command, tmp_path / "none.pt", "--out", half) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert call(*command, whole) == 2
    assert "required: --out" in capsys.readouterr().err
    assert call(*command, whole, "--out", whole) == 2
    assert "which would be lost" in capsys.readouterr().err
    save_state(whole, {"a": torch.tensor([1e5])})
    assert call(*command, whole, "--out", half) == 2
    assert "has no numbers as large as some of a, up to 1e+05" in capsys.readouterr().err
    state, none = tmp_path / "state.safetensors", tmp_path / "none.safetensors"
    save_state(state, {"model/a": torch.ones(1), "loop/step": torch.tensor(3)})
    assert call(*command, state, "--out", none) == 2 and not none.exists()
    assert f"{state}: is the state of a training; name half.safetensors or whole.sa" in capsys.readouterr().err
    save_state(state, {"predictors/a": torch.ones(1)})
    assert call(*command, state, "--out", none) == 2 and not none.exists()
    assert "is the state of a training of depth predictors" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "out", "said", "stated"), [
    ({}, "half.safetensors", ", which half.safetensors states", True),
    ({}, "half.pt", "; half.pt can state none of them, use it with --model cifar10_uncond_50M_500K", False),
    ({}, "halves/cifar10_uncond_50M_500K.safetensors", None, False),       # whose name stands for them as before
    ({"num_channels": 64}, "half.safetensors", ", whose weights it does not hold; half.safetensors states", False)])
def test_what_the_name_of_a_released_checkpoint_stands_for_is_stated_after_a_conversion(
        changes, out, said, stated, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves").mkdir()
    name = "cifar10_uncond_50M_500K"
    known = presets._presets()
    entry = known["presets"][name]
    small = {**entry, "options": {**entry["options"], "num_channels": 32, "num_res_blocks": 1}}
    monkeypatch.setattr(presets, "_presets", lambda: {**known, "presets": {**known["presets"], name: small}})
    model, _ = parse_options(flags({**small["options"], **changes}), ModelOptions, DiffusionOptions)
    save_state(f"{name}.pt", build_model(model).state_dict())
    assert call("convert_checkpoint", f"{name}.pt", "--out", out) == 0
    lines = [line for line in caplog.messages if line.startswith(f"{name}.pt: its name stands for the flags of")]
    assert len(lines) == (said is not None) and all(said in line for line in lines)
    values = preset_values({"model_path": out, "num_channels": 32})
    assert (values.get("rescale_timesteps") is True) is (stated or said is None)
    assert ("config" in checkpoint.read_metadata(out)) is stated
