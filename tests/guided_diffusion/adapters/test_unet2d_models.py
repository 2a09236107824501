"""Exported networks are loaded by diffusers and give what ours give; its own networks become ours."""

import json

import numpy as np
import pytest
import torch
from golden import noise, relative_error
from networks import with_random_weights
from tiny_diffusers import diffusers, pixel_unet

from guided_diffusion.adapters.diffusers import DiffusersUNet, LatentDiffusion, process_of
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.guidance import SelfAttentionGuidance, TimestepGuidance
from guided_diffusion.options import options_from
from guided_diffusion.rng import image_noise
from guided_diffusion.sampling import DdimOptions, ddim_step, ddpm_step, last, sample_chain
from guided_diffusion.terms import StepContext
from guided_diffusion.unet2d.files import read_network, write_pipeline

SMALL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
X, T = noise((2, 3, 8, 8), 0), torch.tensor([3, 977])
SAME = 1e-4             # of the largest value: the sines of large steps are rounded otherwise


def built(flags):
    """A network and its process."""
    model, process = ({name: value for name, value in flags.items() if name in kind.__dataclass_fields__}
                      for kind in (ModelOptions, DiffusionOptions))
    options, = options_from(model, ModelOptions)
    return with_random_weights(build_model(options)), build_diffusion(DiffusionOptions(**process))


@pytest.mark.parametrize("flags", [
    {"class_cond": True, "num_classes": 3, "null_class": True, "learn_sigma": True, "resblock_updown": True,
     "num_head_channels": 16, "num_res_blocks": 2, "noise_schedule": "cosine"},
    {"num_heads": 1, "use_scale_shift_norm": False, "use_new_attention_order": True, "attention_resolutions": "8,4"},
    {"num_heads": 2, "channel_mult": "1,1", "attention_resolutions": "8", "resblock_updown": True, "predict_v": True,
     "diffusion_steps": 500}])
def test_diffusers_gives_what_our_network_gives(flags, tmp_path):
    model, process = built({**SMALL, **flags})
    write_pipeline(tmp_path, model.state_dict(), {**SMALL, **flags}, {})
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    t, labels = T % process.num_timesteps, torch.tensor([0, 3]) if model.num_classes else None
    with torch.no_grad():
        expected = model(X, t, **({} if labels is None else {"y": labels}))
        found = pipe.unet(X, t, class_labels=labels).sample
    assert relative_error(found, expected) < SAME
    theirs = process_of(pipe.scheduler)
    np.testing.assert_allclose(theirs.alphas_cumprod, process.alphas_cumprod, rtol=1e-4)
    assert (theirs.model_mean_type, theirs.model_var_type) == (process.model_mean_type, process.model_var_type)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_time_step_guidance_reaches_the_same_blocks(resblock_updown, tmp_path):
    flags = {**SMALL, "resblock_updown": resblock_updown}
    model, process = built(flags)
    write_pipeline(tmp_path, model.state_dict(), flags, {})
    theirs = DiffusersUNet(diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"))
    deltas = []
    with torch.no_grad():
        for network in (model, theirs):
            denoiser = process.denoiser(network)
            ctx = StepContext(denoiser, X, T, torch.arange(2))
            deltas.append(TimestepGuidance(network, 1.0, 1.0).delta(ctx, denoiser(X, T)))
    assert relative_error(deltas[1], deltas[0]) < 10 * SAME


@pytest.mark.parametrize("changes", [
    {}, {"flip_sin_to_cos": False, "attention_head_dim": None, "act_fn": "swish"},
    {"num_class_embeds": 3, "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32,
     "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet",
     "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet"}])
def test_our_network_gives_what_diffusers_gives(changes, tmp_path):
    theirs = pixel_unet(**{"block_out_channels": (32, 64), "norm_num_groups": 32, **changes})
    theirs.save_pretrained(tmp_path)
    weights, flags = read_network(tmp_path)
    model, _ = built(flags)
    model.load_state_dict(weights)
    labels = torch.tensor([0, 2]) if model.num_classes else None
    with torch.no_grad():
        expected = theirs(X, T, class_labels=labels).sample
        found = model(X, T, **({} if labels is None else {"y": labels}))
    assert relative_error(found, expected) < SAME


def test_an_exported_pipeline_is_sampled_as_the_model_is(tmp_path):
    flags = {**SMALL, "num_head_channels": 32, "learn_sigma": True, "timestep_respacing": "ddim4"}
    model, process = built(flags)
    write_pipeline(tmp_path, model.state_dict(), flags, {})
    latent = LatentDiffusion.from_pipeline(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    for sampler, step in ((DdimOptions(), ddim_step), ("ddpm", ddpm_step)):
        guidance = {"blur_sigma": 3.0, "blur_taps": 31}
        found = latent.sample(numbers=[4, 6], seed=2, steps=4, sampler=sampler, output_type="latent",
                              guidance=[latent.self_attention_guidance(0.5, **guidance)])
        own = SelfAttentionGuidance(model, "middle", 0.5, **guidance)
        chain = sample_chain(step, process.denoiser(model), image_noise(2, [4, 6], 4, (3, 8, 8)),
                             lambda index: image_noise(2, [4, 6], index, (3, 8, 8)), [own], torch.tensor([4, 6]))
        assert relative_error(found, last(chain)["sample"]) < 1e-3


def test_a_pipeline_of_diffusers_states_its_process(tmp_path):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1,
                                        variance_type="fixed_large")
    unet = pixel_unet(block_out_channels=(32, 64), norm_num_groups=32)
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    _, flags = read_network(tmp_path)
    _, process = built(flags)
    np.testing.assert_allclose(process.betas, scheduler.betas.double().numpy(), rtol=1e-5)
    assert not flags["sigma_small"] and not flags["predict_v"] and json.dumps(flags)
