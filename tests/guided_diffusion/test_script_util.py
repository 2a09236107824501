"""From flags to networks and processes: the names that users of guided-diffusion know, and wrong flags."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import cases

from guided_diffusion import logger
from guided_diffusion.build import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.cli import run_script
from guided_diffusion.errors import NonFiniteError, UserError
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import ClassifierGuidanceOptions, Networks
from guided_diffusion.guidance.self_attention import SagOptions
from guided_diffusion.options import options_from
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sag_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

# Flags as users of guided-diffusion pass them: every one it has.
FLAGS = {
    "image_size": 64, "num_channels": 32, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_fp16": False,
    "use_new_attention_order": False, "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear",
    "timestep_respacing": "", "use_kl": False, "predict_xstart": False, "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
CLASSIFIER_FLAGS = {
    "image_size": 64, "classifier_use_fp16": False, "classifier_width": 32, "classifier_depth": 1,
    "classifier_attention_resolutions": "16,8", "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True, "classifier_pool": "attention", "classifier_num_head_channels": 32,
}


@pytest.fixture(autouse=True)
def on_the_meta_device():
    """Networks here are built, and never evaluated: they need no memory."""
    with torch.device("meta"):
        yield


def parsed(defaults, *argv):
    """Flags of a script that takes its defaults from here."""
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return args_to_dict(parser.parse_args(argv), defaults.keys())


# The old names


def test_a_network_and_its_process_from_the_flags_of_guided_diffusion():
    model, diffusion = create_model_and_diffusion(**FLAGS)
    assert type(model) is UNetModel
    assert model.channel_mult == (1, 2, 3, 4) and model.num_res_blocks == 2 and model.attention_resolutions == (4, 8)
    assert (model.in_channels, model.out_channels, model.num_classes) == (3, 3, None)
    assert diffusion.num_timesteps == 1000
    assert diffusion.model_mean_type == ModelMeanType.EPSILON
    assert diffusion.model_var_type == ModelVarType.FIXED_LARGE
    assert diffusion.loss_type == LossType.MSE


@pytest.mark.parametrize("path", cases("unet_*.npz"), ids=lambda path: path.stem)
def test_the_flags_of_every_golden_case_build(path):
    flags = json.loads(str(np.load(path)["config"]))
    model, diffusion = create_model_and_diffusion(**flags)
    assert model.out_channels == (6 if flags["learn_sigma"] else 3)
    assert model.num_classes == (1000 if flags["class_cond"] else None)
    assert diffusion.num_timesteps == 250


def test_flags_change_the_process():
    diffusion = create_model_and_diffusion(**FLAGS | {
        "learn_sigma": True, "predict_xstart": True, "use_kl": True, "noise_schedule": "cosine",
        "timestep_respacing": "ddim25", "rescale_timesteps": True})[1]
    assert diffusion.num_timesteps == 25
    assert diffusion.model_mean_type == ModelMeanType.START_X
    assert diffusion.model_var_type == ModelVarType.LEARNED_RANGE
    assert diffusion.loss_type == LossType.RESCALED_KL
    assert diffusion.rescale_timesteps is True
    assert create_gaussian_diffusion(steps=100, sigma_small=True).model_var_type == ModelVarType.FIXED_SMALL
    assert create_gaussian_diffusion(steps=100).num_timesteps == 100
    assert create_gaussian_diffusion(rescale_learned_sigmas=True).loss_type == LossType.RESCALED_MSE


@pytest.mark.parametrize(("size", "multipliers"), [
    (512, (0.5, 1, 1, 2, 2, 4, 4)), (256, (1, 1, 2, 2, 4, 4)), (128, (1, 1, 2, 3, 4)), (64, (1, 2, 3, 4))])
def test_default_multipliers_go_by_image_size(size, multipliers):
    assert create_model(image_size=size, num_channels=64).channel_mult == multipliers
    assert create_classifier(image_size=size, classifier_width=64).channel_mult == multipliers


def test_an_upsampler():
    model, diffusion = sr_create_model_and_diffusion(large_size=256, small_size=64, num_channels=32, learn_sigma=True,
                                                     class_cond=True, timestep_respacing="250")
    assert type(model) is SuperResModel
    assert (model.in_channels, model.out_channels, model.num_classes) == (6, 6, 1000)
    assert model.channel_mult == (1, 1, 2, 2, 4, 4)
    assert diffusion.num_timesteps == 250


def test_a_classifier():
    model = create_classifier(**CLASSIFIER_FLAGS)
    assert type(model) is EncoderUNetModel
    assert model.pool == "attention" and model.num_res_blocks == 1
    model, diffusion = create_classifier_and_diffusion(**CLASSIFIER_FLAGS, timestep_respacing="10")
    assert type(model) is EncoderUNetModel and diffusion.num_timesteps == 10


def test_the_defaults_are_all_flags():
    assert FLAGS.keys() <= model_and_diffusion_defaults().keys()
    assert CLASSIFIER_FLAGS.keys() <= classifier_defaults().keys()
    assert classifier_defaults().items() <= classifier_and_diffusion_defaults().items()
    assert {"guide_scale", "guide_start", "sel_attn_block", "sel_attn_depth", "blur_sigma"} <= sag_defaults().keys()
    sr = sr_model_and_diffusion_defaults()
    assert {"large_size", "small_size", "noise_schedule"} <= sr.keys() and "image_size" not in sr
    # They are those of guided-diffusion.
    defaults = model_and_diffusion_defaults()
    expected = FLAGS | {"num_channels": 128}
    assert {name: defaults[name] for name in expected} == expected
    expected = CLASSIFIER_FLAGS | {"classifier_width": 128, "classifier_depth": 2, "classifier_num_head_channels": 64,
                                   "classifier_attention_resolutions": "32,16,8"}
    assert {name: classifier_defaults()[name] for name in expected} == expected


def test_defaults_go_through_argparse_and_back():
    for defaults, create in ((model_and_diffusion_defaults(), create_model_and_diffusion),
                             (sr_model_and_diffusion_defaults(), sr_create_model_and_diffusion),
                             (classifier_and_diffusion_defaults(), create_classifier_and_diffusion)):
        assert parsed(defaults) == defaults
        create(**parsed(defaults))
    assert parsed(sag_defaults()) == sag_defaults()
    assert options_from(sag_defaults(), SagOptions, ClassifierGuidanceOptions) == [
        SagOptions(), ClassifierGuidanceOptions()]


def test_arguments_go_through_argparse_into_a_network():
    flags = parsed(model_and_diffusion_defaults(), "--class_cond", "True", "--learn_sigma", "true", "--num_channels",
                   "32", "--use_scale_shift_norm", "False", "--timestep_respacing", "250", "--dropout", "0.1",
                   "--attention_resolutions", "32,16,8")
    assert flags["class_cond"] is True and flags["use_scale_shift_norm"] is False and flags["dropout"] == 0.1
    model, diffusion = create_model_and_diffusion(**flags)
    assert model.num_classes == 1000 and model.out_channels == 6 and diffusion.num_timesteps == 250
    sag = parsed(sag_defaults(), "--guide_start", "40", "--sag_sigma_max", "2", "--classifier_guidance", "True")
    assert sag["guide_start"] == 40 and sag["sag_sigma_max"] == 2.0 and sag["classifier_guidance"] is True
    assert parsed({"another": None}, "--another", "40") == {"another": "40"}


def test_text_as_from_a_command_line_is_understood():
    model, _ = create_model_and_diffusion(**FLAGS | {"image_size": "64", "class_cond": "True", "learn_sigma": "False"})
    assert model.image_size == 64 and model.num_classes == 1000 and model.out_channels == 3


def test_an_argparse_value_that_is_neither_true_nor_false_ends_the_command(capsys):
    with pytest.raises(SystemExit):
        parsed({"class_cond": False}, "--class_cond", "maybe")
    assert "--class_cond" in capsys.readouterr().err


def test_self_attention_guidance_from_its_options():
    model, _ = create_model_and_diffusion(**FLAGS)
    nets = Networks(model, "cpu")
    guidance, = SagOptions(guide_scale=1.1, sel_attn_depth=3, guide_start=50, attention_heads="official").build(nets)
    assert guidance.block == "output.3" and guidance.scale == pytest.approx(0.1) and guidance.start == 50
    assert guidance.heads == "official"
    assert SagOptions(sel_attn_block="middle", sel_attn_depth=3).build(nets)[0].block == "middle"
    with pytest.raises(UserError, match=r"'output.8' is no attention block .*there are: .*output\.5"):
        SagOptions().build(nets)


# Wrong flags


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_chanels": 32}, r"num_chanels: no such flag \(did you mean num_channels\?\)"),
    ({"classifier_depth": 32}, "classifier_depth: no such flag"),
    ({"image_size": 48}, "--channel_mult must be given for image size 48.* sizes 32, 64, 128, 256, 512"),
    ({"image_size": 50, "channel_mult": "1,2,2"}, "image size 50: must be a multiple of 4"),
    ({"image_size": 0}, "--image_size 0: must be at least 1"),
    ({"channel_mult": "1,1.0e999"}, "--channel_mult 1,1.0e999: must be positive numbers, comma-separated"),
    ({"channel_mult": "1,nan"}, "--channel_mult 1,nan: must be positive"),
    ({"channel_mult": "1,two"}, "--channel_mult 1,two: must be positive numbers, comma-separated"),
    ({"channel_mult": "1,,2"}, "--channel_mult 1,,2: must be positive"),
    ({"channel_mult": "1,0"}, "--channel_mult 1,0: must be positive"),
    ({"channel_mult": "1,-2"}, "--channel_mult 1,-2: must be positive"),
    ({"num_channels": 48}, "--num_channels 48: times 1 it must be a multiple of 32"),
    ({"num_channels": 32, "channel_mult": "0.5,1"}, "--num_channels 32: times 0.5 it must be a multiple of 32"),
    ({"num_channels": "many"}, "--num_channels 'many': must be a whole number"),
    ({"attention_resolutions": "a"}, "--attention_resolutions a: must be sizes in pixels that divide 64"),
    ({"attention_resolutions": "16,7"}, "--attention_resolutions 16,7: must be sizes"),
    ({"attention_resolutions": "16,"}, "--attention_resolutions 16,: must be sizes"),
    ({"attention_resolutions": "0"}, "--attention_resolutions 0: must be sizes"),
    ({"attention_resolutions": "-8"}, "--attention_resolutions -8: must be sizes"),
    ({"num_heads": 5}, "--num_heads 5: must divide the .* channels of every attention block"),
    ({"num_heads": 15}, "--num_heads 15: must divide the .* channels of every attention block"),
    ({"num_heads": 0}, "--num_heads 0: must be at least 1"),
    ({"num_heads_upsample": 0}, "0: must divide the .* channels of every attention block"),
    ({"num_head_channels": 48}, "--num_head_channels 48: must divide the"),
    ({"num_head_channels": 0}, "--num_head_channels 0: must divide the"),
    ({"in_channels": 9}, "--in_channels 9: must be at most 8"),
    ({"dropout": 1.5}, "--dropout 1.5: must be at most 1"),
    ({"num_res_blocks": 0}, "--num_res_blocks 0: must be at least 1"),
    ({"use_fp16": True, "use_bf16": True}, "--use_fp16 True --use_bf16 True: at most one"),
    ({"noise_schedule": "quadratic"}, "--noise_schedule quadratic: must be one of linear, cosine"),
    ({"diffusion_steps": 0}, "--diffusion_steps 0: must be at least 1"),
    ({"timestep_respacing": "many"}, "many"),
    ({"timestep_respacing": "2000"}, "2000"),
])
def test_wrong_flags_are_named_with_their_value(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model_and_diffusion(**FLAGS | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"classifier_widht": 32}, r"classifier_widht: no such flag \(did you mean classifier_width\?\)"),
    ({"image_size": 48}, "--classifier_channel_mult must be given for image size 48"),
    ({"classifier_width": 48}, "--classifier_width 48: times 1 it must be a multiple of 32"),
    ({"classifier_attention_resolutions": "b"}, "--classifier_attention_resolutions b: must be sizes"),
    ({"classifier_num_head_channels": 48}, "num_head_channels 48: must divide"),
    ({"classifier_pool": "max"}, "--classifier_pool max: must be one of adaptive, attention, spatial, spatial_v2"),
    ({"num_classes": 0}, "--num_classes 0: must be at least 1"),
])
def test_wrong_flags_of_a_classifier_are_named_with_their_value(changes, message):
    with pytest.raises(UserError, match=message):
        create_classifier(**CLASSIFIER_FLAGS | changes)


def test_an_upsampler_has_no_image_size():
    with pytest.raises(UserError, match=r"image_size: no such flag"):
        sr_create_model_and_diffusion(image_size=64)
    with pytest.raises(UserError, match="--channel_mult must be given for image size 100"):
        sr_create_model_and_diffusion(large_size=100)


def test_attention_at_sizes_larger_than_the_image_is_left_out():
    model = create_model(image_size=16, channel_mult="1,2", attention_resolutions="32,8")
    assert model.attention_resolutions == (2,)


def test_flags_go_to_every_class_that_has_them():
    model, diffusion, classifier = options_from(
        {"image_size": 128, "learn_sigma": True}, ModelOptions, DiffusionOptions, ClassifierOptions)
    assert model.image_size == classifier.image_size == 128
    assert model.learn_sigma and diffusion.learn_sigma


# Scripts and the import


def test_a_script_ends_with_one_line_and_code_2_on_a_users_mistake(capsys):
    for error in (UserError("--seed -1: must be at least 0"), NonFiniteError("NaN at step 3 in image 5")):
        def main(error=error):
            raise error
        with pytest.raises(SystemExit) as stopped:
            run_script(main)
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.err == f"error: {error}\n" and captured.out == ""


def test_a_script_shows_the_trace_of_any_other_error():
    def main():
        raise KeyError("a mistake of ours")
    with pytest.raises(KeyError):
        run_script(main)


SAMPLE_WITHOUT_OTHER_PACKAGES = """
import importlib.abc
import sys

BLOCKED = {"yaml", "safetensors", "PIL", "tqdm", "scipy", "matplotlib", "mpi4py", "tensorflow", "torchvision"}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import guided_diffusion
import guided_diffusion.guidance
from guided_diffusion.script_util import create_model_and_diffusion

model, diffusion = create_model_and_diffusion(
    image_size=8, channel_mult="1", num_channels=32, num_res_blocks=1, in_channels=1, timestep_respacing="2")
assert diffusion.p_sample_loop(model, (1, 1, 8, 8)).shape == (1, 1, 8, 8)
print(sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_library_needs_only_torch_and_numpy():
    done = subprocess.run([sys.executable, "-c", SAMPLE_WITHOUT_OTHER_PACKAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


# Attention where there are feature maps, and networks of a possible size


@pytest.mark.parametrize(("create", "flags", "said"), [
    (create_model, {"image_size": 96, "channel_mult": "1,1,1", "attention_resolutions": "16,8"},
     "--attention_resolutions 16,8: no feature map has 16 pixels, there are feature maps of 96, 48, 24"),
    (create_model, {"image_size": 64, "channel_mult": "1,1,1", "attention_resolutions": "16,8"},
     "--attention_resolutions 16,8: no feature map has 8 pixels, there are feature maps of 64, 32, 16"),
    (create_model, {"image_size": 16, "channel_mult": "1,1", "attention_resolutions": "64,32"},
     "--attention_resolutions 64,32: no feature map has 64 pixels, there are feature maps of 16, 8"),
    *((create_classifier, {"image_size": size, "classifier_channel_mult": "1,1,1,1"},
       f"there are feature maps of {size}, {size // 2}") for size in (48, 96, 192))])
def test_attention_at_the_size_of_no_feature_map_is_refused(create, flags, said):
    flags = flags if create is create_model else flags | {"classifier_attention_resolutions": "32,16,8"}
    with pytest.raises(UserError) as caught:
        create(**flags)
    assert said in str(caught.value)


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_sizes_of_official_commands_all_have_their_maps(size):
    with torch.device("meta"):
        model = create_model(image_size=size, num_channels=64, attention_resolutions="32,16,8")
        classifier = create_classifier(image_size=size, classifier_attention_resolutions="32,16,8")
    assert model.attention_resolutions == classifier.attention_resolutions == (size // 32, size // 16, size // 8)


@pytest.mark.parametrize(("create", "flags", "said"), [
    (create_model, {"num_channels": 10**6}, "--num_channels 1000000: must be at most"),
    (create_model, {"num_res_blocks": 10**9}, "--num_res_blocks 1000000000: must be at most"),
    (create_model, {"num_classes": 10**12}, "--num_classes 1000000000000: must be at most"),
    (create_model, {"image_size": 2**40}, "--image_size 1099511627776: must be at most"),
    (create_model, {"channel_mult": "1,1e6"}, "--channel_mult 1,1e6"),
    (create_model, {"channel_mult": "1,1000000"}, "--num_channels 128: times 1000000 it must be at most"),
    (create_classifier, {"classifier_width": 10**6}, "--classifier_width 1000000: must be at most"),
    (create_classifier, {"classifier_depth": 10**6}, "--classifier_depth 1000000: must be at most")])
def test_sizes_that_no_memory_holds_are_refused_at_once(create, flags, said):
    with pytest.raises(UserError, match=said):
        create(**flags)


def test_the_length_of_the_chain_has_a_bound():
    with pytest.raises(UserError, match="--diffusion_steps 1000000000000: must be at most"):
        DiffusionOptions(diffusion_steps=10**12)


def test_arguments_by_position_are_those_of_the_official_function():
    model = create_model(32, 32, 1, "1,2", True, True, False, "16", 2, num_classes=10)
    same = create_model(image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,2", learn_sigma=True,
                        class_cond=True, attention_resolutions="16", num_heads=2, num_classes=10)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in same.state_dict().items()}
    assert model.attention_blocks["middle"].num_heads == 2
    large = sr_create_model(64, 32, 32, 1, True, False, False, "16", 4, -1, -1, True, 0.0, False, False)
    assert isinstance(large, SuperResModel) and large.attention_blocks["middle"].num_heads == 4
    classifier = create_classifier(32, True, 64, 1, "16", False, False, "spatial", classifier_channel_mult="1,2")
    same = create_classifier(image_size=32, classifier_use_fp16=True, classifier_width=64, classifier_depth=1,
                             classifier_attention_resolutions="16", classifier_use_scale_shift_norm=False,
                             classifier_resblock_updown=False, classifier_pool="spatial", classifier_channel_mult="1,2")
    assert {name: value.shape for name, value in classifier.state_dict().items()} == {
        name: value.shape for name, value in same.state_dict().items()}
    assert (classifier.pool, classifier.dtype) == (same.pool, same.dtype) == ("spatial", torch.float16)
    with pytest.raises(UserError, match="num_channels: is given by position and by name"):
        create_model(32, 32, num_channels=64)
    with pytest.raises(UserError, match="17 arguments by position: there are 16, image_size, num_channels"):
        create_model(*range(17))


def test_the_beginning_of_an_official_script(tmp_path, caplog, monkeypatch):
    """Which calls these before anything else; the rest of it is in `test_golden_chains` and above."""
    caplog.set_level("INFO")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "said"))
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "said")
    monkeypatch.delenv("OPENAI_LOGDIR")
    logger.configure(dir=tmp_path / "log")
    logger.log("sampling...", 3)
    assert logger.get_dir() == str(tmp_path / "log") and "sampling... 3" in caplog.text
    logger.warn("few", 1)
    logger.info("images")
    assert (tmp_path / "log" / "log.txt").read_text() == "sampling... 3\nfew 1\nimages\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.clear()
    logger.configure()
    folder = Path(logger.get_dir())
    assert folder.parent == tmp_path and folder.name.startswith("openai-") and folder.is_dir()
    assert caplog.messages == [f"OPENAI_LOGDIR is not set: the folder is {folder}"]
    logger.configure()
    assert logger.get_dir() != str(folder)              # of another script
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="OPENAI_LOGDIR: is not set, and no folder for temporary files can be written"):
        logger.configure()
    assert str2bool("yes") is True


def test_the_folder_of_a_script_that_configures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "_folder", [])
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "said"))
    assert logger.get_dir() == str(tmp_path / "said")
