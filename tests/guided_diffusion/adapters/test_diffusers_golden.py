"""Latents of diffusers' own SAG pipeline, recorded from tiny seeded networks: our samplers make the same."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import cases, fill, noise, relative_error
from tiny_diffusers import diffusers

from guided_diffusion.adapters.diffusers import LatentDiffusion


@pytest.fixture(scope="module")
def recorded():
    path, = cases("latent_sag.npz")
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def latent(recorded):
    unet = fill(diffusers.UNet2DConditionModel(**json.loads(str(recorded["unet"]))), "sd.")
    scheduler = diffusers.DDIMScheduler(**json.loads(str(recorded["scheduler"])))
    return LatentDiffusion.from_pipeline(SimpleNamespace(unet=unet, scheduler=scheduler))


@pytest.mark.parametrize("number", range(4))
def test_latents_are_those_of_the_sag_pipeline(recorded, latent, number):
    case, seed = json.loads(str(recorded["cases"]))[number], int(recorded["seed"])
    guided = {"negative_prompt_embeds": noise((2, 7, 32), seed + 1)} if case["cfg"] > 1 else {}

    latents = latent.sample(
        prompt_embeds=noise((2, 7, 32), seed), latents=noise((2, 4, *case["latent"]), seed + 2), steps=case["steps"],
        cfg_scale=case["cfg"], guidance=[latent.self_attention_guidance(case["sag"])], output_type="latent", **guided)

    error = relative_error(latents, torch.from_numpy(recorded[f"latents_{number}"]))
    assert error < 1e-3
