"""Latents of diffusers' own SAG pipeline, recorded from tiny seeded networks: our samplers make the same."""

import json

import numpy as np
import pytest
import torch
from golden import cases, fill, noise, relative_error

pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

from types import SimpleNamespace

from diffusers import DDIMScheduler, UNet2DConditionModel

from guided_diffusion.adapters.diffusers import LatentDiffusion


@pytest.fixture(scope="module")
def recorded():
    path, = cases("latent_sag.npz")
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def latent(recorded):
    unet = fill(UNet2DConditionModel(**json.loads(str(recorded["unet"]))), "sd.")
    scheduler = DDIMScheduler(**json.loads(str(recorded["scheduler"])))
    return LatentDiffusion.from_pipeline(SimpleNamespace(unet=unet, scheduler=scheduler))


@pytest.mark.parametrize("number", range(4))
def test_latents_are_those_of_the_sag_pipeline(recorded, latent, number):
    case, seed = json.loads(str(recorded["cases"]))[number], int(recorded["seed"])
    guided = {"negative_prompt_embeds": noise((2, 7, 32), seed + 1)} if case["cfg"] > 1 else {}
    latents = latent.sample(
        prompt_embeds=noise((2, 7, 32), seed), latents=noise((2, 4, *case["latent"]), seed + 2), steps=case["steps"],
        cfg_scale=case["cfg"], guidance=[latent.self_attention_guidance(case["sag"])], output_type="latent", **guided)

    expected = torch.from_numpy(recorded[f"latents_{number}"])
    assert relative_error(latents, expected) < 1e-3
