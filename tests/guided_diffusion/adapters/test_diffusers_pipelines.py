"""Pipelines of diffusers, sampled by us: the same images where both can, and what only we can."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from code_blocks import in_language
from commands import REPOSITORY
from golden import noise, relative_error
from tiny_diffusers import (
    NO_PROMPTS,
    PROMPTS,
    diffusers,
    images,
    ours,
    pixel_unet,
    prompted_pipeline,
    prompted_unet,
    scheduler,
    sdxl_unet,
    text_parts,
    vae,
    vq_model,
)

from guided_diffusion.adapters.diffusers import LatentDiffusion
from guided_diffusion.errors import NonFiniteError, UserError
from guided_diffusion.guidance import AutoGuidance, IndependentConditionGuidance, PerturbedAttentionGuidance
from guided_diffusion.solvers import DpmSolverOptions, UnipcOptions
from guided_diffusion.steps import DdimOptions

SAME = 1e-4             # of the largest value, in float32 over six steps


@pytest.fixture(scope="module")
def pipe():
    return prompted_pipeline()


@pytest.fixture(scope="module")
def latent(pipe):
    return LatentDiffusion.from_pipeline(pipe)


@pytest.mark.parametrize("cfg_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_images_are_those_of_stable_diffusion(cfg_scale, prediction):
    pipe = prompted_pipeline(steps=scheduler(prediction_type=prediction))
    expected = images(pipe, guidance_scale=cfg_scale)
    assert relative_error(ours(LatentDiffusion.from_pipeline(pipe), cfg_scale=cfg_scale), expected) < SAME


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDIMParallelScheduler"])
@pytest.mark.parametrize("options, steps, lower", [
    ({"timestep_spacing": "leading"}, 7, None), ({"timestep_spacing": "leading", "steps_offset": 0}, 4, None),
    ({"timestep_spacing": "trailing"}, 4, None), ({"timestep_spacing": "trailing"}, 7, 142),
    ({"timestep_spacing": "linspace"}, 4, 250)])
def test_steps_that_the_scheduler_ends_elsewhere_are_said(kind, options, steps, lower, caplog):
    pipe = prompted_pipeline()
    pipe.scheduler = scheduler(kind, **{"clip_sample": False, "set_alpha_to_one": False, **options})
    expected = images(pipe, guidance_scale=1.0, num_inference_steps=steps)
    found = ours(LatentDiffusion.from_pipeline(pipe), cfg_scale=1.0, steps=steps, negative_prompt_embeds=None)
    error = relative_error(found, expected)
    assert error < SAME if lower is None else error > 50 * SAME
    sentence = f"each step ends where the next begins, its own end {lower} lower"
    assert [line.endswith(sentence) for line in caplog.messages if "each step" in line] == [True] * (lower is not None)


@pytest.mark.parametrize("clipped_noise, sampler", [(False, "ddim"), (True, DdimOptions())])
def test_pixels_are_those_of_the_ddim_pipeline(clipped_noise, sampler):
    steps = diffusers.DDIMScheduler(clip_sample=True)
    pipe = diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=steps)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(0),
                    use_clipped_model_output=clipped_noise, output_type="np").images
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = LatentDiffusion.from_pipeline(pipe).sample(latents=start, steps=6, sampler=sampler, output_type="np")
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("clip, tolerance", [(False, 1e-4), (True, 5e-3)])
def test_a_last_step_from_0_to_0_does_nothing_but_clip(clip, tolerance):
    steps = diffusers.DDIMScheduler(clip_sample=clip, set_alpha_to_one=False, steps_offset=0)
    pipe = diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=steps)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0),
                    output_type="np").images
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = LatentDiffusion.from_pipeline(pipe).sample(latents=start, steps=5, output_type="np")
    assert np.abs(found - expected).max() < tolerance


@pytest.mark.parametrize("most", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("clipped_noise, sampler", [(False, "ddim"), (True, DdimOptions())])
def test_pixels_are_thresholded_as_in_the_ddim_pipeline(clipped_noise, sampler, most):
    steps = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=most)
    pipe = diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=steps)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "use_clipped_model_output": clipped_noise, "output_type": "np"}
    expected = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), **options).images
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = LatentDiffusion.from_pipeline(pipe).sample(latents=start, steps=6, sampler=sampler, output_type="np")
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("kind, sampler, tolerance", [("DDIMScheduler", "ddim", SAME),
                                                      ("DPMSolverMultistepScheduler", "dpm-solver++", 1e-3)])
def test_latents_are_thresholded_as_in_stable_diffusion(kind, sampler, tolerance):
    pipe = prompted_pipeline(steps=scheduler(kind, thresholding=True, sample_max_value=2.0))
    expected = images(pipe, guidance_scale=2.0)
    found = ours(LatentDiffusion.from_pipeline(pipe), cfg_scale=2.0, sampler=sampler)
    assert relative_error(found, expected) < tolerance


def test_a_sampler_that_thresholds_does_so_in_place_of_the_scheduler():
    options = {"latents": noise((2, 3, 8, 8), 3), "steps": 4, "output_type": "latent",
               "sampler": DpmSolverOptions(solver_grid="chain", dynamic_threshold=0.9)}
    plain, *bounded = (LatentDiffusion.from_pipeline(diffusers.DDIMPipeline(pixel_unet(), steps)).sample(**options)
                       for steps in (diffusers.DDIMScheduler(clip_sample=False), diffusers.DDIMScheduler(),
                                     diffusers.DDIMScheduler(thresholding=True)))
    for images_of_one in bounded:
        assert torch.equal(images_of_one, plain)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_perturbed_attention_is_that_of_the_pag_pipeline(cfg_scale):
    unet = prompted_unet()
    theirs = prompted_pipeline("StableDiffusionPAGPipeline", unet, pag_applied_layers=["mid"])
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(unet=unet))
    guided = ours(latent, cfg_scale=cfg_scale, guidance=[PerturbedAttentionGuidance(latent.unet, ["middle"], 3.0)])
    assert relative_error(guided, images(theirs, guidance_scale=cfg_scale, pag_scale=3.0)) < SAME


@pytest.mark.parametrize("kind, options, own", [
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpm-solver++"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, DpmSolverOptions(solver_grid="chain", solver_order=3)),
    ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, UnipcOptions(solver_grid="chain", solver_order=3)),
])
def test_solvers_are_those_of_diffusers_at_the_same_steps(kind, options, own):
    pipe = prompted_pipeline(steps=scheduler(kind, **options))
    expected = images(pipe, guidance_scale=2.0)
    assert relative_error(ours(LatentDiffusion.from_pipeline(pipe), cfg_scale=2.0, sampler=own), expected) < 1e-3


def test_classes_have_independent_conditions_and_pixels_of_learned_variance():
    unet = pixel_unet(num_class_embeds=3, out_channels=6)
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    latent = LatentDiffusion.from_pipeline(pipe)
    options = {"labels": torch.tensor([0, 2]), "steps": 4, "sampler": "ddpm", "output_type": "latent"}
    plain = latent.sample(**options)
    guided = latent.sample(**options, guidance=[IndependentConditionGuidance(1.0, 3)])
    assert plain.shape == (2, 3, 8, 8) and (plain - guided).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.2), (torch.float16, 0.025)])
def test_half_precision_is_near_single_precision(latent, dtype, tolerance):
    pipe = prompted_pipeline(unet=prompted_unet().to(dtype))
    pipe.vae.to(dtype)
    half = LatentDiffusion.from_pipeline(pipe)
    found, expected = (ours(one, guidance=[one.self_attention_guidance(0.75)]) for one in (half, latent))
    # bfloat16 has 8 bits, float16 11; guidance of 7.5 multiplies their error, over six steps.
    assert found.dtype == torch.float32 and relative_error(found, expected) < tolerance
    assert np.isfinite(ours(half, steps=1, output_type="np")).all()


def test_sag_and_classifier_free_guidance_make_three_evaluations_a_step(latent):
    calls = []
    handle = latent.unet.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        ours(latent, guidance=[latent.self_attention_guidance(0.5), latent.self_attention_guidance(0.5, "up.0.0")])
        two_terms = len(calls)
        calls.clear()
        ours(latent, guidance=[latent.self_attention_guidance(0.5)])
    finally:
        handle.remove()
    assert (len(calls), two_terms) == (6 * 3, 6 * 4)


def test_one_network_that_says_v_and_one_that_says_eps_are_guided_alike():
    class Velocity(torch.nn.Module):
        """A network's eps, said as v."""

        def __init__(self, unet, abar):
            super().__init__()
            self.inner, self.abar = unet, abar
            self.down_blocks, self.mid_block, self.up_blocks = unet.down_blocks, unet.mid_block, unet.up_blocks
            self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

        def forward(self, x, t, **options):
            eps, = self.inner(x, t, **options)
            abar = self.abar[t].reshape(-1, 1, 1, 1)
            return ((eps - torch.sqrt(1 - abar) * x) / torch.sqrt(abar),)

    velocity = Velocity(prompted_unet(), scheduler().alphas_cumprod)
    pipes = [prompted_pipeline(),
             SimpleNamespace(unet=velocity, scheduler=scheduler(prediction_type="v_prediction"))]
    guided = [ours(latent, guidance=[latent.self_attention_guidance(0.75)])
              for latent in map(LatentDiffusion.from_pipeline, pipes)]
    assert relative_error(guided[1], guided[0]) < 1e-3


def test_an_image_depends_on_its_number_and_not_on_its_batch(latent):
    options = {"prompt_embeds": PROMPTS[:1], "negative_prompt_embeds": NO_PROMPTS[:1], "steps": 4, "seed": 7,
               "output_type": "latent", "sampler": DdimOptions(eta=1.0),
               "guidance": [latent.self_attention_guidance(0.75)]}
    together = latent.sample(numbers=[3, 5, 8], **options)
    alone = latent.sample(numbers=[5], **options)
    assert relative_error(alone[0], together[1]) < SAME
    assert relative_error(together[0], together[1]) > 0.1


def test_images_have_the_size_that_is_asked_for(latent):
    options = {"prompt_embeds": PROMPTS, "cfg_scale": 1.0, "steps": 2,
               "guidance": [latent.self_attention_guidance(0.75)]}
    pictures = latent.sample(height=16, width=24, **options)
    assert [picture.size for picture in pictures] == [(24, 16)] * 2
    arrays = latent.sample(output_type="np", **options)
    assert arrays.shape == (2, 16, 16, 3) and arrays.min() >= 0 and arrays.max() <= 1


def test_pixels_have_sizes_that_the_network_can_halve(latent):
    pixels = LatentDiffusion.from_pipeline(diffusers.DDIMPipeline(pixel_unet(), diffusers.DDIMScheduler()))
    assert pixels.sample(height=6, width=10, steps=2, output_type="np").shape == (1, 6, 10, 3)
    for options, words in [({"height": 7}, "height 7: must be a multiple of 2"), ({"width": 9}, "width 9: must be a"),
                           ({"latents": noise((1, 3, 8, 7), 0)}, "must be multiples of 2")]:
        with pytest.raises(UserError, match=words):
            pixels.sample(steps=2, **options)
    assert ours(latent, cfg_scale=1.0, steps=2, latents=noise((2, 4, 7, 9), 3)).shape == (2, 4, 7, 9)


def test_decoded_images_are_those_of_stable_diffusion(pipe, latent):
    expected = images(pipe, guidance_scale=2.0, output_type="np")
    assert np.abs(ours(latent, cfg_scale=2.0, output_type="np") - expected).max() < 1e-3


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_decoder_that_overflows_makes_no_black_image(monkeypatch, output_type, value):
    pipe = prompted_pipeline()
    latent, decode = LatentDiffusion.from_pipeline(pipe), pipe.vae.decode

    def overflowing(latents, **options):
        decoded, = decode(latents, **options)
        decoded[1, 0, 2, 3] = value
        return (decoded,)

    monkeypatch.setattr(pipe.vae, "decode", overflowing)
    with pytest.raises(NonFiniteError, match=r"^the decoder returned NaN or infinity for image 8; try float32$"):
        ours(latent, steps=1, numbers=[5, 8], output_type=output_type)
    assert ours(latent, steps=1, numbers=[5, 8]).isfinite().all()


@pytest.mark.parametrize("clip", [False, True])
def test_decoded_images_are_those_of_latent_diffusion(clip):
    """Unconditional pipelines keep their decoder by another name, scale its latents, and clip as the scheduler says."""
    pipe = diffusers.LDMPipeline(vqvae=vq_model(), unet=pixel_unet(), scheduler=scheduler(clip_sample=clip))
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = pipe(batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(0),
                    output_type="np").images
    latent = LatentDiffusion.from_pipeline(pipe)
    found = latent.sample(latents=start, steps=6, output_type="np")
    assert found.shape == (2, 16, 16, 3) and np.abs(found - expected).max() < 1e-4
    assert latent.sample(height=16, width=24, steps=1, output_type="np").shape == (1, 16, 24, 3)


def test_text_to_image_latent_diffusion_takes_embedded_prompts():
    parts = {"bert": torch.nn.Identity(), "tokenizer": text_parts()["tokenizer"]}
    pipe = diffusers.LDMTextToImagePipeline(vqvae=vae(), unet=prompted_unet(), scheduler=scheduler(), **parts)
    pipe.vqvae.register_to_config(scaling_factor=0.5)
    latent = LatentDiffusion.from_pipeline(pipe)
    latents = ours(latent, cfg_scale=2.0)
    with torch.no_grad():
        expected = pipe.vqvae.decode(latents / 0.5).sample.permute(0, 2, 3, 1) / 2 + 0.5
    found = ours(latent, cfg_scale=2.0, output_type="np")
    assert np.abs(found - expected.clamp(0, 1).numpy()).max() < 1e-5
    with pytest.raises(UserError, match="give prompt_embeds"):
        latent.sample("a cat")


@pytest.mark.parametrize("negative", [None, "dog"])
def test_prompts_are_encoded_by_the_pipeline(negative):
    pipe = prompted_pipeline(**text_parts())
    start = noise((2, 4, 8, 8), 3)
    options = {"prompt": ["a cat", "b"], "latents": start, "output_type": "latent"}
    negatives = {} if negative is None else {"negative_prompt": negative}
    with torch.no_grad():
        expected = pipe(num_inference_steps=3, guidance_scale=5.0, **options,
                        **({} if negative is None else {"negative_prompt": [negative] * 2})).images
    latent = LatentDiffusion.from_pipeline(pipe)
    assert relative_error(latent.sample(steps=3, cfg_scale=5.0, **options, **negatives), expected) < SAME
    one = latent.sample("a cat", steps=3, cfg_scale=5.0, latents=start[:1], output_type="latent", **negatives)
    assert relative_error(one, expected[:1]) < SAME


def test_prompts_that_do_not_fit_are_a_sentence():
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(**text_parts()))
    for options, words in [
            ({"prompt": ["a", 3]}, r"prompt \['a', 3\]: must be a text"), ({"prompt": 3}, "prompt 3: must be a text"),
            ({"prompt": "a", "negative_prompt": 3}, "negative_prompt 3: must be a text"),
            ({"prompt": "a", "negative_prompt": ["b", "c"]}, "negative_prompt: 2 of them for 1 prompts"),
            ({"prompt_embeds": PROMPTS[..., :15]}, r"prompt_embeds \(2, 5, 15\): the last must be 16"),
            ({"prompt_embeds": PROMPTS, "negative_prompt_embeds": NO_PROMPTS[..., :15]}, "negative_.*must be 16")]:
        with pytest.raises(UserError, match=words):
            latent.sample(**options)
    options = {"prompt": ["a", "b"], "steps": 2, "output_type": "latent"}
    assert torch.equal(latent.sample(negative_prompt=["c"], **options), latent.sample(negative_prompt="c", **options))


def test_sdxl_sees_its_further_conditions():
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=sdxl_unet(),
        scheduler=scheduler(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pooled = {"pooled_prompt_embeds": noise((2, 16), 4), "negative_pooled_prompt_embeds": noise((2, 16), 5)}
    # Without text encoders the pipeline asks for the width of the pooled embedding.
    pipe.text_encoder_2 = SimpleNamespace(config=SimpleNamespace(projection_dim=16), dtype=torch.float32)
    expected = images(pipe, guidance_scale=3.0, height=16, width=16, **pooled)
    latent = LatentDiffusion.from_pipeline(pipe)
    assert relative_error(ours(latent, cfg_scale=3.0, **pooled), expected) < SAME
    pipe.vae.register_to_config(latents_mean=[0.1, -0.4, 0.0, 1.0], latents_std=[1.0, 0.5, 2.0, 1.0])
    decoded = images(pipe, guidance_scale=3.0, height=16, width=16, output_type="np", **pooled)
    assert np.abs(ours(latent, cfg_scale=3.0, output_type="np", **pooled) - decoded).max() < 1e-3
    with pytest.raises(UserError, match="pooled_prompt_embeds: must be given"):
        ours(latent)
    with pytest.raises(UserError, match="do not make the 64 that the network takes"):
        ours(latent, pooled_prompt_embeds=noise((2, 8), 4), negative_pooled_prompt_embeds=noise((2, 8), 5))


def test_pooled_prompts_of_sdxl_that_do_not_fit_are_a_sentence():
    """Also where the pipeline encodes the other prompts, and in the pool of independent ones."""
    latent = LatentDiffusion.from_pipeline(diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=sdxl_unet(cross_attention_dim=32), scheduler=scheduler(), add_watermarker=False,
        **text_parts(projected=True)))
    embeds, pooled = noise((2, 5, 32), 1), noise((2, 16), 4)
    both = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": embeds}
    for options, words in [
            ({"prompt": ["a", "b"], "negative_prompt_embeds": embeds}, "pooled_prompt_embeds: must be given with"),
            ({"prompt": "a", "pooled_prompt_embeds": pooled}, "pooled_prompt_embeds: must be given with"),
            ({**both, "negative_pooled_prompt_embeds": noise((2, 8), 5)}, "negative_pooled_prompt_embeds: their 8"),
            ({**both, "negative_pooled_prompt_embeds": noise((2, 1, 16), 5)}, r"negative_pooled.* \(2, 1, 16\): m")]:
        with pytest.raises(UserError, match=f"^{words}"):
            latent.sample(steps=1, output_type="latent", **options)
    pool = noise((3, 5, 32), 7)
    for given, words in [({}, "must be given with prompt_embeds"),
                         ({"pooled_prompt_embeds": noise((1, 16), 8)}, r"are \[1, 3\], they must be as many")]:
        with pytest.raises(UserError, match=words):
            latent.independent_prompt_guidance(1.0, prompt_embeds=pool, **given)
    term = latent.independent_prompt_guidance(1.0, prompt_embeds=pool, pooled_prompt_embeds=noise((3, 16), 8))
    assert latent.sample(steps=1, output_type="latent", guidance=[term], negative_pooled_prompt_embeds=pooled,
                         **both).shape == (2, 4, 8, 8)


def test_latents_are_clipped_where_the_scheduler_of_sdxl_does():
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=sdxl_unet(cross_attention_dim=32), scheduler=scheduler(clip_sample=True), add_watermarker=False,
        **text_parts(projected=True))
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": ["a cat", "b"], "latents": noise((2, 4, 8, 8), 3), "output_type": "latent"}
    with torch.no_grad():
        expected = pipe(num_inference_steps=3, guidance_scale=5.0, height=16, width=16, **options).images
    latent = LatentDiffusion.from_pipeline(pipe)
    assert relative_error(latent.sample(steps=3, cfg_scale=5.0, **options), expected) < SAME


@pytest.mark.parametrize("negative, zeros", [(None, True), (None, False), ("dog", True)])
def test_prompts_of_sdxl_are_encoded_by_both_encoders(negative, zeros):
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=sdxl_unet(cross_attention_dim=32), scheduler=scheduler(), add_watermarker=False,
        force_zeros_for_empty_prompt=zeros, **text_parts(projected=True))
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": ["a cat", "b"], "negative_prompt": negative, "latents": noise((2, 4, 8, 12), 3),
               "output_type": "latent"}
    with torch.no_grad():
        expected = pipe(num_inference_steps=2, guidance_scale=5.0, height=16, width=24, **{
            **options, "negative_prompt": negative and [negative] * 2}).images
    found = LatentDiffusion.from_pipeline(pipe).sample(steps=2, cfg_scale=5.0, **options)
    assert relative_error(found, expected) < SAME


@pytest.mark.parametrize("size, cfg_scale", [((8, 12), 7.5), ((12, 8), 1.0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_sag_is_that_of_the_sag_pipeline_at_any_size(size, cfg_scale, prediction):
    unet, start, steps = prompted_unet(), noise((2, 4, *size), 3), scheduler(prediction_type=prediction)
    theirs = prompted_pipeline("StableDiffusionSAGPipeline", unet, steps=steps)
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(unet=unet, steps=steps))
    sag = latent.self_attention_guidance(0.75, of_output=prediction != "epsilon")
    found = ours(latent, cfg_scale=cfg_scale, guidance=[sag], latents=start)
    expected = images(theirs, guidance_scale=cfg_scale, sag_scale=0.75, latents=start, height=2 * size[0],
                      width=2 * size[1])
    assert relative_error(found, expected) < SAME


def test_the_example_of_the_documentation_runs():
    block, = (block for block in in_language(REPOSITORY / "docs" / "diffusers.md", "python")
              if "extra diffusers" in block.why)
    names = {}
    exec(compile(block.text, str(block), "exec"), names)
    assert len(names["images"]) == 2


def test_parts_that_images_depend_on_are_refused_and_those_that_look_at_them_said(caplog):
    unet = prompted_unet()
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    adapter = diffusers.T2IAdapter(channels=(8, 16), num_res_blocks=1, downscale_factor=2)
    for kind, name, part in [("StableDiffusionControlNetPipeline", "controlnet", control),
                             ("StableDiffusionAdapterPipeline", "adapter", adapter)]:
        with pytest.raises(UserError, match=f"^{kind}: its {name} would have no effect here"):
            LatentDiffusion.from_pipeline(prompted_pipeline(kind, unet, **{name: part}))
    pipe = prompted_pipeline(unet=unet)
    LatentDiffusion.from_pipeline(pipe)
    assert not caplog.messages
    pipe.safety_checker = torch.nn.Identity()
    LatentDiffusion.from_pipeline(pipe)
    assert caplog.messages == ["StableDiffusionPipeline: not called: safety_checker"]


def test_what_does_not_fit_is_a_sentence(latent):
    for options, words in [
            ({"prompt_embeds": PROMPTS}, "no text encoder"), ({}, "one of prompt and prompt_embeds"),
            ({"prompt": "a cat"}, "no text encoder"), ({"sampler": "euler"}, "must be one of ddpm, ddim"),
            ({"output_type": "jpg"}, "must be one of pil"), ({"prompt_embeds": PROMPTS, "cfg_scale": 1.0,
                                                             "numbers": [1, 2, 3]}, "must be as many"),
            ({"prompt_embeds": PROMPTS, "cfg_scale": 1.0, "height": 9}, "multiple of 2"),
            ({"prompt_embeds": PROMPTS, "cfg_scale": 1.0, "latents": noise((2, 3, 8, 8), 0)}, r"must be \(N, 4"),
            ({"prompt_embeds": PROMPTS[:, :0], "cfg_scale": 1.0}, r"prompt_embeds \(2, 0, 16\): must be \(N, T, E\)"),
            ({"prompt_embeds": PROMPTS, "negative_prompt": "b", "negative_prompt_embeds": NO_PROMPTS},
             "negative_prompt: is given beside negative_prompt_embeds"),
            ({"prompt_embeds": PROMPTS[0], "cfg_scale": 1.0}, r"prompt_embeds \(5, 16\): must be \(N, T, E\)"),
            ({"prompt_embeds": PROMPTS, "cfg_scale": 1.0, "numbers": [0, -1]}, r"numbers \[0, -1\]: must be whole"),
            ({"prompt_embeds": PROMPTS, "cfg_scale": 1.0, "height": 16.0}, "multiple of 2"),
            ({"cfg_scale": float("nan")}, "finite number"),
            ({"cfg_scale": 0.0}, "^LatentDiffusion cfg_scale 0.0: must be at least 1, which is off"),
            ({"cfg_scale": 0.99}, "^LatentDiffusion cfg_scale 0.99: must be at least 1")]:
        with pytest.raises(UserError, match=words):
            latent.sample(**options)
    classes = LatentDiffusion.from_pipeline(diffusers.DDPMPipeline(pixel_unet(num_class_embeds=3), scheduler()))
    for options, words in [({"labels": torch.tensor([3])}, r"labels \[3\]: must be classes from 0 to 2"),
                           ({"labels": torch.tensor([0.5])}, r"labels \(1,\) torch.float32: must be a tensor"),
                           ({"labels": [0]}, r"labels \[0\]: must be a tensor"),
                           ({"labels": torch.tensor([True])}, r"labels \(1,\) torch.bool: must be a tensor"),
                           ({"labels": torch.tensor([0]), "negative_prompt": "b"},
                            "negative_prompt: the pipeline's network takes none"),
                           ({"labels": torch.tensor([0]), "pooled_prompt_embeds": PROMPTS},
                            "pooled_prompt_embeds: the pipeline's network takes none")]:
        with pytest.raises(UserError, match=words):
            classes.sample(**options)
    with pytest.raises(UserError, match="with a unet"):
        LatentDiffusion.from_pipeline(object())
    with pytest.raises(UserError, match="inpainting"):
        LatentDiffusion.from_pipeline(prompted_pipeline(unet=prompted_unet(in_channels=9)))


EMBEDDED = {"prompt_embeds": PROMPTS, "negative_prompt_embeds": NO_PROMPTS}


@pytest.mark.parametrize("options, sentence", [
    ({"guidance": None}, "guidance None: must be a list of terms"), ({"guidance": 1}, "guidance 1: must be a list of"),
    ({"guidance": ["pag"]}, "guidance: 'pag' is no term"), ({"seed": None}, "seed None: must be a whole number, at l"),
    ({"seed": 1.5}, "seed 1.5: must be a whole number"), ({"seed": True}, "seed True: must be a whole number"),
    ({"latents": [[1.0]]}, r"latents \[\[1.0\]\]: must be a tensor of floating-point numbers, or such an array"),
    ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.complex64)}, r"latents \(2, 4, 8, 8\) torch.complex64: must be a"),
    ({"latents": np.array("x")}, r"latents \(\) <U1: must be a tensor"),
    ({"latents": torch.full((2, 4, 8, 8), float("nan"))}, r"latents \(2, 4, 8, 8\) torch.float32: hold NaN or inf"),
    ({"prompt_embeds": [1]}, r"prompt_embeds \[1\]: must be a tensor"),
    ({"negative_prompt_embeds": "x"}, "negative_prompt_embeds 'x': must be a tensor"),
    ({"pooled_prompt_embeds": PROMPTS[:, 0]}, "pooled_prompt_embeds: the pipeline's network takes none"),
    ({"negative_pooled_prompt_embeds": PROMPTS[:, 0]}, "negative_pooled_prompt_embeds: the pipeline's network takes"),
    ({"prompt_embeds": None, "prompt": np.array(["a", "b"])}, "prompt array.*: must be a text"),
    ({"prompt_embeds": None, "prompt": []}, r"prompt \[\]: must be a text"),
    ({"prompt_embeds": None, "prompt": "a", "pooled_prompt_embeds": PROMPTS[:, 0]}, "pooled_.*network takes none"),
    ({"numbers": 3}, "numbers 3: must be whole numbers from 0 up"), ({"steps": None}, "steps None: must be a whole"),
    ({"sampler": 3}, "sampler 3: must be one of ddpm, ddim"), ({"sampler": DdimOptions}, "sampler <class .*: must be"),
    ({"height": "16"}, "height '16': must be a multiple of 2"),
    ({"batch_contrasts": "no"}, "batch_contrasts 'no': must be True or False"),
    ({"on_step": None}, "on_step None: must be a function")])
def test_arguments_of_other_kinds_are_named_before_anything_is_evaluated(options, sentence, monkeypatch):
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(**text_parts()))
    monkeypatch.setattr(latent.unet, "forward", lambda *args, **kwargs: pytest.fail("the network is evaluated"))
    with pytest.raises(UserError, match=f"^{sentence}"):
        latent.sample(**{**EMBEDDED, "steps": 2, "output_type": "latent", **options})


def test_arguments_of_other_methods_are_named_too(latent):
    for wrong, sentence in [(lambda: latent.check(sampler="euler"), "sampler 'euler': must be one of"),
                            (lambda: latent.process(steps=None), "steps None: must be a whole number"),
                            (lambda: latent.decoded(noise((1, 3, 8, 8), 0)), r"latents \(1, 3, 8, 8\) torch.float32:"),
                            (lambda: latent.decoded(np.zeros((1, 4, 8, 8))), r"latents \(1, 4, 8, 8\) float64: must"),
                            (lambda: latent.self_attention_guidance(1.0, None), "None is no attention block"),
                            (lambda: latent.self_attention_guidance(1.0, blur_sigma="x"), "blur_sigma 'x': must be a"),
                            (lambda: latent.classifier_guidance(None, 1.0), "classifier None: must be a function"),
                            (lambda: latent.depth_guidance(None, 1.0), "predictors None: must be DepthPredictors"),
                            (lambda: ours(latent, guidance=[AutoGuidance(prompted_unet(), 1.0)]),
                             "the network returned a UNet2DConditionOutput, must be a tensor")]:
        with pytest.raises(UserError, match=f"^{sentence}"):
            wrong()


def test_arrays_and_numbers_of_numpy_are_taken(latent):
    expected = ours(latent, steps=2, numbers=[3, 4], seed=5, cfg_scale=2.0)
    start = noise((2, 4, 8, 8), 3).numpy()
    found = ours(latent, steps=np.int64(2), numbers=np.array([3, 4]), seed=np.int64(5), cfg_scale=np.float64(2.0),
                 latents=start.astype(">f4"), prompt_embeds=PROMPTS.numpy(), negative_prompt_embeds=NO_PROMPTS.numpy())
    assert torch.equal(found, expected)
    classes = LatentDiffusion.from_pipeline(diffusers.DDPMPipeline(pixel_unet(num_class_embeds=3), scheduler()))
    options = {"steps": 2, "output_type": "latent"}
    assert torch.equal(classes.sample(labels=np.array([2, 0]), **options),
                       classes.sample(labels=torch.tensor([2, 0]), **options))


def test_what_stands_for_no_prompt_is_said_to_have_no_effect_without_classifier_free_guidance(caplog):
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(**text_parts()))
    options = {"prompt": "a", "steps": 1, "output_type": "latent"}
    plain = latent.sample(cfg_scale=1.0, **options)
    latent.sample(cfg_scale=2.0, negative_prompt="b", **options)
    assert not caplog.messages
    for _ in range(2):
        assert torch.equal(latent.sample(cfg_scale=1, negative_prompt="b", **options), plain)
    latent.sample(cfg_scale=1.0, negative_prompt_embeds=NO_PROMPTS[:1], **options)
    assert caplog.messages == [f"without effect: {name} (cfg_scale is 1)"
                               for name in ("negative_prompt", "negative_prompt_embeds")]


def test_guidance_may_be_walked_through_once(latent):
    def terms():
        yield PerturbedAttentionGuidance(latent.unet, ["middle"], 1.0)

    assert torch.equal(ours(latent, steps=2, guidance=terms()), ours(latent, steps=2, guidance=list(terms())))
