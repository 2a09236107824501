"""Tiny seeded networks and pipelines of diffusers. Importing this skips a test module where diffusers is missing."""

import pytest

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

import torch  # noqa: E402
from golden import fill, noise  # noqa: E402

PROMPTS, NO_PROMPTS = noise((2, 5, 16), 1), noise((2, 5, 16), 2)


def prompted_unet(**changes):
    """A UNet2DConditionModel of two levels, with self-attention at down.1.0, middle, up.0.0 and up.0.1."""
    config = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4,
              "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16,
              "attention_head_dim": 2, "norm_num_groups": 4}
    return fill(diffusers.UNet2DConditionModel(**{**config, **changes}))


def pixel_unet(**changes):
    """A UNet2DModel of two levels, with self-attention at down.1.0, middle, up.0.0 and up.0.1."""
    config = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 3,
              "out_channels": 3, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, "norm_num_groups": 4}
    return fill(diffusers.UNet2DModel(**{**config, **changes}))


def scheduler(kind="DDIMScheduler", **changes):
    """A scheduler with the betas of Stable Diffusion."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if kind == "DDIMScheduler":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    return getattr(diffusers, kind)(**{**config, **changes})


def vae():
    """An AutoencoderKL that halves the sizes."""
    return fill(diffusers.AutoencoderKL(block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4,
                                        down_block_types=("DownEncoderBlock2D",) * 2,
                                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4))


def vq_model():
    """A VQModel that halves the sizes."""
    return fill(diffusers.VQModel(block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=3,
                                  num_vq_embeddings=16, down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4))


def text_parts(projected=False):
    """A text encoder of one layer, and a tokenizer of single letters; projected: both kinds of SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = {word: i for i, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>",
                                               "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=8)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=8, bos_token_id=words["<|startoftext|>"],
        eos_token_id=words["<|endoftext|>"])
    parts = {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}
    second = {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(config).eval()}
    return {**parts, **second} if projected else parts


def sdxl_unet(**changes):
    """A network with the further conditions of SDXL."""
    return prompted_unet(addition_embed_type="text_time", addition_time_embed_dim=8,
                         projection_class_embeddings_input_dim=6 * 8 + 16, **changes)


def prompted_pipeline(kind="StableDiffusionPipeline", unet=None, steps=None, **more):
    """A pipeline of Stable Diffusion, without text encoder unless one is given."""
    parts = {"vae": vae(), "text_encoder": None, "tokenizer": None, "unet": unet or prompted_unet(),
             "scheduler": steps or scheduler(), "safety_checker": None, "feature_extractor": None}
    pipe = getattr(diffusers, kind)(**{**parts, **more}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, **options):
    """The latents that a pipeline of diffusers makes of PROMPTS in six steps."""
    given = {"num_inference_steps": 6, "prompt_embeds": PROMPTS, "negative_prompt_embeds": NO_PROMPTS,
             "latents": noise((2, 4, 8, 8), 3), "output_type": "latent"}
    with torch.no_grad():
        return pipe(**{**given, **options}).images


def ours(latent, **options):
    """The same by `LatentDiffusion.sample`."""
    given = {"steps": 6, "prompt_embeds": PROMPTS, "negative_prompt_embeds": NO_PROMPTS,
             "latents": noise((2, 4, 8, 8), 3), "output_type": "latent"}
    return latent.sample(**{**given, **options})
