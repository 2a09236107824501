"""ADM networks in the layout of diffusers and back: the same weights, and sentences for what has no like."""

import json

import pytest
import torch
from commands import call
from networks import with_random_weights

from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.errors import UserError
from guided_diffusion.unet2d.configurations import DEFAULTS, config_of, flags_of
from guided_diffusion.unet2d.files import process_flags_of, read_network, scheduler_of

SMALL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
NETWORKS = {
    "released": {**SMALL, "class_cond": True, "num_classes": 3, "learn_sigma": True, "resblock_updown": True,
                 "use_scale_shift_norm": True, "num_head_channels": 16, "diffusion_steps": 1000},
    "one head": {**SMALL, "num_heads": 1, "use_scale_shift_norm": False, "use_new_attention_order": True,
                 "in_channels": 1, "attention_resolutions": "8,4", "noise_schedule": "cosine", "predict_v": True},
    "heads by number": {**SMALL, "num_heads": 2, "channel_mult": "1,1.5,1", "num_channels": 64, "attention_resolutions":
                        "8", "null_class": True, "class_cond": True, "num_classes": 2, "sigma_small": True,
                        "num_res_blocks": 2, "diffusion_steps": 40, "predict_xstart": True}}


def network(flags):
    """A network of these flags, no weight of which is zero."""
    names = ModelOptions.__dataclass_fields__
    return with_random_weights(build_model(ModelOptions(**{k: v for k, v in flags.items() if k in names})))


def written(flags, tmp_path):
    """The file of a network of these flags, and the folder that it becomes."""
    model = network(flags)
    save_state(tmp_path / "own.safetensors", model.state_dict(), {"config": json.dumps(flags)})
    out = tmp_path / "exported"
    (tmp_path / "folder").mkdir()
    (tmp_path / "own.safetensors").rename(tmp_path / "folder" / "model.safetensors")
    assert call("export_model", "--model", tmp_path / "folder", "--layout", "diffusers", "--out", out) == 0
    return model, out


@pytest.mark.parametrize("flags", NETWORKS.values(), ids=NETWORKS)
def test_there_and_back_a_network_is_itself(flags, tmp_path):
    model, out = written(flags, tmp_path)
    path = tmp_path / "back.safetensors"
    assert call("convert_checkpoint", out, "--dtype", "float32", "--out", path) == 0
    stated = json.loads(read_metadata(path)["config"])
    same = {"noise_schedule", "diffusion_steps", "predict_v", "predict_xstart", "sigma_small", "learn_sigma"}
    assert all(stated[name] == value for name, value in flags.items() if name in same)
    back = network(stated)
    back.load_state_dict(load_state_dict(path))
    x, t = torch.randn(2, model.in_channels, 8, 8), torch.tensor([0, 900])
    y = {} if model.num_classes is None else {"y": torch.tensor([0, 1])}
    with torch.no_grad():
        torch.testing.assert_close(back(x, t, **y), model(x, t, **y), rtol=1e-4, atol=1e-5)


def test_a_folder_says_what_it_is(tmp_path):
    _, out = written(NETWORKS["released"], tmp_path)
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card and "class_labels" in card and "unet/diffusion_pytorch_model" in card
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"


def test_sines_before_cosines_are_put_after_them(tmp_path):
    model, out = written(NETWORKS["one head"], tmp_path)
    path = out / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flip_sin_to_cos": False}))
    weights, _ = read_network(out)
    own = model.state_dict()["time_embed.0.weight"]
    assert torch.equal(weights["time_embed.0.weight"], torch.cat(own.chunk(2, dim=1)[::-1], dim=1))


def test_all_that_no_adm_network_has_is_said():
    other = {"sample_size": [8, 12], "in_channels": 4, "out_channels": 5, "center_input_sample": True,
             "time_embedding_type": "fourier", "time_embedding_dim": 8, "freq_shift": 1, "mid_block_scale_factor": 2,
             "downsample_padding": 0, "act_fn": "gelu", "norm_num_groups": 16, "attn_norm_num_groups": 8,
             "norm_eps": 1e-6, "resnet_time_scale_shift": "spatial", "add_attention": False, "class_embed_type":
             "timestep", "mid_block_type": None, "block_out_channels": [48, 64, 64, 64], "attention_head_dim": 24}
    with pytest.raises(UserError) as caught:
        flags_of(other)
    for name, value in other.items():
        assert f"{name} {value} (" in str(caught.value), name


@pytest.mark.parametrize(("changes", "said"), [
    ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"] * 2}, "have attention at other sizes"),
    ({"down_block_types": ["CrossAttnDownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]},
     "blocks CrossAttnDownBlock2D, SkipDownBlock2D"),
    ({"downsample_type": "resnet"}, "some blocks resample by convolutions"),
    ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups None"),
    ({"sample_size": None}, "sample_size None")])
def test_blocks_that_no_adm_network_has_are_said(changes, said):
    with pytest.raises(UserError, match=said):
        flags_of({"sample_size": 64, **changes})
    assert flags_of({"sample_size": 64})["channel_mult"] == "1,2,3,4" and DEFAULTS["layers_per_block"] == 2


@pytest.mark.parametrize(("flags", "said"), [
    ({"num_heads": 4, "attention_resolutions": "8,4"}, "num_heads 4 makes attention heads of 8 and 16 channels"),
    ({"channel_mult": "2,1"}, "channel_mult begins with 2")])
def test_all_that_no_unet2dmodel_has_is_said(flags, said):
    with pytest.raises(UserError, match=said):
        config_of(network({**SMALL, **flags}), 8)


def test_processes_that_differ_are_said():
    with pytest.raises(UserError, match="rescale_timesteps with diffusion_steps 4000"):
        scheduler_of({"rescale_timesteps": True, "diffusion_steps": 4000})
    assert scheduler_of({"rescale_timesteps": True, "diffusion_steps": 1000})["beta_end"] == 0.02
    for scheduler, said in [
            ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "betas scaled_linear"),
            ({"beta_end": 0.012}, "betas linear from 0.0001 to 0.012"), ({"trained_betas": [0.1]}, "trained_betas"),
            ({"prediction_type": "flow"}, "prediction_type flow"), ({"variance_type": "learned"}, "variance_type"),
            ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
            ({"variance_type": "none"}, "variance_type none"),
            ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "without a beta_schedule"),
            ({"timestep_type": "continuous", "beta_schedule": "linear"}, "timestep_type continuous"),
            ({"use_flow_sigmas": True, "beta_schedule": "linear"}, "use_flow_sigmas True")]:
        with pytest.raises(UserError, match=said):
            process_flags_of(scheduler, False)
    with pytest.raises(UserError, match="variance_type fixed_small"):
        process_flags_of({"variance_type": "fixed_small"}, True)


@pytest.mark.parametrize(("changes", "said"), [
    ({"thresholding": True}, "its thresholding is no part of the conversion"),
    ({"clip_sample": False}, "does not clip predictions; sampling does, unless --clip_denoised False"),
    ({"clip_sample_range": 2.0}, "clips predictions at 2.0; sampling clips them at 1"), ({}, "")])
def test_clipping_that_differs_is_said(changes, said, tmp_path, caplog):
    _, out = written(NETWORKS["released"], tmp_path)
    path = out / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    caplog.clear()
    read_network(out)
    warned = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert [said in one for one in warned] == [True] * bool(said)


def test_strange_numbers_of_other_files_are_sentences(tmp_path):
    _, out = written(NETWORKS["released"], tmp_path)
    scheduler = "scheduler/scheduler_config.json"
    for name, changes, said in ((scheduler, {"num_train_timesteps": 0}, "describes no scheduler"),
                                ("unet/config.json", {"attention_head_dim": -1}, "attention_head_dim -1 .it must be")):
        content = (out / name).read_text()
        (out / name).write_text(json.dumps(json.loads(content) | changes))
        with pytest.raises(UserError, match=said):
            read_network(out)
        (out / name).write_text(content)


def test_folders_and_networks_that_cannot_be_converted_are_sentences(tmp_path, capsys, caplog):
    def converted(content, name="config.json"):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
        assert call("convert_checkpoint", folder, "--out", tmp_path / "out.safetensors") == 2
        return capsys.readouterr().err

    assert converted({"model": SMALL}).endswith("folder: is no network of diffusers\n")
    (tmp_path / "folder" / "ema_0.9.safetensors").touch()
    assert converted({"model": SMALL}).endswith("folder: is no network of diffusers; it holds ema_0.9.safetensors\n")
    assert "is UNet2DConditionModel of diffusers" in converted({"_class_name": "UNet2DConditionModel"})
    assert "describes no UNet2DModel" in converted({"_class_name": "UNet2DModel", "block_out_channels": 3})
    assert "sample_size None (ADM" in converted({"_class_name": "UNet2DModel"})
    small = {**config_of(network(SMALL | {"num_head_channels": 32}), 8), "attention_head_dim": 32}
    assert "holds no diffusion_pytorch_model.safetensors" in converted(small)
    save_state(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": torch.zeros(1)})
    with caplog.at_level("INFO"):
        assert "do not fit together" in converted(small) or "has no" in converted(small)
    assert "has no scheduler" in caplog.text
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps({
        "_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vae": [None, None],
        "vqvae": ["diffusers", "VQModel"]}))
    assert "folder: its network makes latents, which its vqvae decodes" in converted(small)
    assert call("export_model", "--model", "icons64_upsampler", "--layout", "diffusers", "--out", tmp_path / "up") == 2
    assert "is an upsampler" in capsys.readouterr().err
    assert call("export_model", "--model", "scenes32", "--layout", "diffusers", "--out", tmp_path / "up") in (0, 2)
