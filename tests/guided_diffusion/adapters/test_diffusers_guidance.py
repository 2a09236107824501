"""Guidance of diffusers' networks: any list of methods, evaluations in one batch, prompts drawn, further networks."""

import itertools
from contextlib import ExitStack, contextmanager

import pytest
import torch
from golden import noise, relative_error
from tiny_diffusers import (
    NO_PROMPTS,
    PROMPTS,
    diffusers,
    ours,
    pixel_unet,
    prompted_pipeline,
    prompted_unet,
    scheduler,
    sdxl_unet,
)

from guided_diffusion.adapters.diffusers import DiffusersUNet, LatentDiffusion, process_of
from guided_diffusion.capture import perturb_embedding
from guided_diffusion.depth.predictor import DepthPredictors
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    AutoGuidance,
    CleanClassifierGuidance,
    ContrastGuidance,
    Inputs,
    Networks,
    PerturbedAttentionGuidance,
    ProjectedGuidance,
    Rescale,
    SmoothedEnergyGuidance,
    TimestepGuidance,
    TsgOptions,
)
from guided_diffusion.rng import image_generator
from guided_diffusion.sampling import sample_step
from guided_diffusion.unet import EncoderUNetModel

OTHERS = noise((3, 5, 16), 6)
SAME = 1e-4             # of the largest value: batches of other sizes are rounded otherwise


@pytest.fixture(scope="module")
def latent():
    return LatentDiffusion.from_pipeline(prompted_pipeline(steps=scheduler(timestep_spacing="trailing")))


@pytest.fixture(scope="module")
def terms(latent):
    """Every method whose changes of eps are added, by its name."""
    network = latent.unet
    return {"SAG": latent.self_attention_guidance(0.75), "SAG again": latent.self_attention_guidance(0.5, "up.0.0"),
            "PAG": PerturbedAttentionGuidance(network, ["down.1.0"], 1.0),
            "SEG": SmoothedEnergyGuidance(network, ["middle"], 1.0), "TSG": TimestepGuidance(network, 1.0, 0.5),
            "ICG": latent.independent_prompt_guidance(1.0, prompt_embeds=OTHERS),
            "autoguidance": AutoGuidance(DiffusersUNet(prompted_unet(norm_eps=0.1)), 1.0)}


def changed(latent, guidance, **options):
    """What a single step makes of the noise, in which every change of eps enters linearly."""
    return ours(latent, **{"steps": 1, "cfg_scale": 3.0, "guidance": guidance, **options})


@pytest.mark.parametrize("together", [False, True])
def test_contrasts_in_any_list_add_up(latent, terms, together):
    plain = changed(latent, [], cfg_scale=1.0)
    alone = {name: changed(latent, [term]) - changed(latent, []) for name, term in terms.items()}
    free = changed(latent, []) - plain
    assert all(change.abs().max() > 1e-3 for change in [*alone.values(), free])
    for names in [("SAG", "ICG"), ("SAG again", "PAG"), ("SEG", "TSG"), ("autoguidance", "SAG"), tuple(terms),
                  tuple(reversed(terms))]:
        found = changed(latent, [terms[name] for name in names], batch_contrasts=together) - plain
        assert relative_error(found, free + sum(alone[name] for name in names)) < 1e-3, names


def test_time_step_guidance_leaves_out_blocks_that_see_no_step():
    from diffusers.models.resnet import ResnetBlock2D

    class WithoutStep(ResnetBlock2D):
        def forward(self, x, temb):
            return super().forward(x, None)

    unet = pixel_unet()
    usual = unet.mid_block.resnets[0]
    unet.mid_block.resnets[0] = WithoutStep(in_channels=usual.in_channels, temb_channels=None,
                                            groups=usual.norm1.num_groups)
    model = DiffusersUNet(unet)
    with pytest.raises(UserError, match=r"does not reach middle\.0; it reaches: down\.0\.0, "):
        TimestepGuidance(model, 1.0, 0.5, blocks=["middle.0"])
    with pytest.raises(UserError, match=r"--tsg_blocks middle\.0: the embedding of the step does not reach middle\.0"):
        TsgOptions(tsg_scale=1.0, tsg_blocks="middle.0").build(Networks(model, torch.device("cpu"), 0))
    latent = LatentDiffusion.from_pipeline(diffusers.DDIMPipeline(unet=unet, scheduler=scheduler()))
    plain, guided = (latent.sample(latents=noise((2, 3, 8, 8), 3), guidance=guidance, steps=3, output_type="latent")
                     for guidance in ([], [TimestepGuidance(latent.unet, 20.0, 0.5)]))
    assert (guided - plain).abs().max() > 1e-3


def test_the_embedding_is_perturbed_where_blocks_are_given_it_by_name():
    class ByName(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.feature_blocks = torch.nn.ModuleDict({"block": unet.mid_block.resnets[0]})

        def forward(self, x, emb):
            return self.feature_blocks["block"](x, temb=emb)

    network, x, emb = ByName(pixel_unet()), noise((2, 16, 4, 4), 1), noise((2, 32), 2)
    with perturb_embedding(network, ["block"], lambda emb: emb + 1) as reached:
        found = network(x, emb)
    assert reached == ["block"] and torch.equal(found, network(x, emb + 1)) and not torch.equal(found, network(x, emb))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++", "unipc"])
def test_every_sampler_takes_all_methods_at_once(latent, terms, sampler):
    every = [*terms.values(), ProjectedGuidance(norm_threshold=5.0), Rescale(0.5)]
    options = {"sampler": sampler, "cfg_scale": 3.0, "steps": 3}
    separate = ours(latent, guidance=every, **options)
    different = [ours(latent, **options), ours(latent, guidance=every[:-2], **options),
                 ours(latent, guidance=every[:-1], **options), separate]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(different, 2))
    assert relative_error(ours(latent, guidance=every, batch_contrasts=True, **options), separate) < SAME


@pytest.mark.parametrize("names, batches", [
    ([], [4]), (["SAG"], [4, 2]), (["SAG", "SAG again"], [4, 4]), (["SAG", "ICG"], [6, 2]),
    (["ICG", "PAG"], [6, 2]), (["SAG", "SAG again", "ICG", "PAG"], [6, 4, 2])])
def test_what_needs_no_other_evaluation_is_one_batch(latent, terms, names, batches):
    sizes = []
    handle = latent.unet.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with outputs_of(latent, ["down.0.0"]) as outputs:
        changed(latent, [terms[name] for name in names], batch_contrasts=True)
    handle.remove()
    assert sorted(sizes) == sorted(batches)
    assert len(outputs) == len(sizes) - ("PAG" in names)        # which begins where its block does


def test_sdxl_and_pixels_in_one_batch():
    latent = LatentDiffusion.from_pipeline(prompted_pipeline(unet=sdxl_unet()))
    pooled = {"pooled_prompt_embeds": noise((2, 16), 4), "negative_pooled_prompt_embeds": noise((2, 16), 5)}
    every = [latent.self_attention_guidance(0.75), latent.independent_prompt_guidance(
        1.0, prompt_embeds=OTHERS, pooled_prompt_embeds=noise((3, 16), 7))]
    separate, together = (ours(latent, guidance=every, steps=2, batch_contrasts=batch, **pooled)
                          for batch in (False, True))
    assert relative_error(together, separate) < SAME

    pipe = diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=scheduler())
    pixels = LatentDiffusion.from_pipeline(pipe)
    every = [pixels.self_attention_guidance(0.75), pixels.self_attention_guidance(0.5, "up.0.1")]
    separate, together = (pixels.sample(latents=noise((2, 3, 8, 8), 3), guidance=every, steps=2, batch_contrasts=batch,
                                        output_type="latent") for batch in (False, True))
    assert relative_error(together, separate) < SAME


def test_prompts_of_other_lengths_make_no_batch(latent):
    with pytest.raises(UserError, match="make no batch"):
        ours(latent, negative_prompt_embeds=noise((2, 7, 16), 2), batch_contrasts=True)
    assert ours(latent, negative_prompt_embeds=noise((2, 7, 16), 2), steps=1).shape == (2, 4, 8, 8)


def test_a_drawn_prompt_depends_on_seed_image_and_step_and_is_another_one(latent):
    pool = torch.cat([PROMPTS[:1], OTHERS, PROMPTS[:1] + 1e-4])
    seen = {}

    class Watched(torch.nn.Module):
        def forward(self, x, t, encoder_hidden_states):
            seen[int(t[0])] = encoder_hidden_states
            return x

    term = latent.independent_prompt_guidance(1.0, prompt_embeds=pool, seed=5)
    for step in (3, 11):
        denoise = process_of(scheduler(), 20).denoiser(Watched(), clip_denoised=False,
                                            model_kwargs={"encoder_hidden_states": PROMPTS[:1].expand(3, -1, -1)})
        sample_step(lambda ctx, pred, grad, noise_of: (pred.mean, pred.pred_xstart), denoise, noise((3, 4, 8, 8), 0),
                    torch.full((3,), step), lambda: None, [term], torch.tensor([7, 8, 40]))
    for step, drawn in zip((3, 11), seen.values(), strict=True):
        expected = [int(image_generator(5, image, step, "independent label").integers(3)) for image in (7, 8, 40)]
        assert torch.equal(drawn, OTHERS[expected])
    together = ours(latent, guidance=[term], numbers=[3, 4], steps=2)
    alone = ours(latent, guidance=[term], numbers=[4], steps=2, prompt_embeds=PROMPTS[1:],
                 negative_prompt_embeds=NO_PROMPTS[1:], latents=noise((2, 4, 8, 8), 3)[1:])
    assert relative_error(alone[0], together[1]) < SAME


def test_without_another_prompt_independent_conditions_are_refused(latent):
    own = latent.independent_prompt_guidance(1.0, prompt_embeds=PROMPTS[:1])
    with pytest.raises(UserError, match="no prompt to draw but the image's own"):
        ours(latent, guidance=[own])
    pixels = LatentDiffusion.from_pipeline(diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=scheduler()))
    with pytest.raises(UserError, match="takes no prompts"):
        pixels.independent_prompt_guidance(1.0, ["a", "b"])


@pytest.fixture(scope="module")
def classifier():
    """A classifier of noisy latents with three classes."""
    torch.manual_seed(0)
    network = EncoderUNetModel(8, 4, 32, 3, 1, (), channel_mult=(1,), num_head_channels=32)
    torch.nn.init.normal_(network.out[3].weight)
    return network.eval()


def test_a_classifier_of_latents_guides_by_its_gradient(latent, classifier):
    labels, x = torch.tensor([0, 2]), noise((2, 4, 8, 8), 3)
    guided = changed(latent, [latent.classifier_guidance(classifier, 2.0)], labels=labels, sampler="ddim")
    process = process_of(latent.pipe.scheduler, 1)
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        logits = classifier(at, torch.full((2,), int(process.timestep_map[0])))
        gradient, = torch.autograd.grad(logits.log_softmax(1).gather(1, labels[:, None]).sum(), at)
    abar, last = process.alphas_cumprod[0], process.alphas_cumprod_prev[0]
    # eps -= sqrt(1 - abar) g (2105.05233, algorithm 2), in one step of DDIM
    change = -2.0 * (1 - abar)**0.5 * gradient
    expected = changed(latent, [], sampler="ddim") + change * ((1 - last)**0.5 - (last * (1 - abar) / abar)**0.5)
    assert change.abs().max() > 1e-3 and relative_error(guided, expected) < SAME


def test_a_classifier_of_images_guides_through_the_decoder(latent):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    term = CleanClassifierGuidance(lambda x: network(latent.decoded(x)), 5.0)
    labels = torch.tensor([1, 2])
    assert (changed(latent, [term], labels=labels) - changed(latent, [])).abs().max() > 1e-3


def test_classifiers_and_labels_that_do_not_fit_are_sentences(latent, classifier):
    pixels = LatentDiffusion.from_pipeline(diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=scheduler()))
    with pytest.raises(UserError, match="takes 4 channels, and the network samples 3"):
        pixels.classifier_guidance(classifier, 1.0)
    with pytest.raises(UserError, match="no classifier is among the guidance"):
        pixels.sample(labels=torch.tensor([1]), output_type="latent")
    with pytest.raises(UserError, match="needs labels"):
        ours(latent, guidance=[latent.classifier_guidance(classifier, 1.0)])


@contextmanager
def outputs_of(latent, names):
    """What blocks give in the `with` block, in turn, with their names."""
    outputs = []
    with ExitStack() as stack:
        for name in names:
            handle = latent.unet.feature_blocks[name].register_forward_hook(
                lambda module, inputs, output, name=name: outputs.append((name, output)))
            stack.callback(handle.remove)
        yield outputs


def predictors(size=8, channels=16):
    """Predictors that read two blocks of the tiny network, and one."""
    torch.manual_seed(0)
    return DepthPredictors({"strong": {"middle.1": channels, "up.0.1": 16}, "weak": {"up.0.1": 16}}, size, "image", "0")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_depth_guidance_goes_down_the_gradient_through_the_network(latent, reduction):
    read = predictors()
    term = latent.depth_guidance(read, 40.0, reduction=reduction)
    x, t = noise((2, 4, 8, 8), 3), torch.full((2,), int(process_of(latent.pipe.scheduler, 1).timestep_map[0]))
    with torch.enable_grad(), outputs_of(latent, read.blocks) as outputs:
        at = x.clone().requires_grad_()
        latent.unet(at, t, encoder_hidden_states=PROMPTS)
        depth = read(dict(outputs), t)
        squares = ((depth["strong"].detach() - depth["weak"]) ** 2).flatten(1)
        gradient, = torch.autograd.grad((squares.mean(1) if reduction == "mean" else squares.sum(1)).sum(), at)
    plain = changed(latent, [latent.self_attention_guidance(0.5)])
    guided = changed(latent, [term, latent.self_attention_guidance(0.5)], batch_contrasts=True)
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(guided, plain - 40 * gradient, rtol=1e-4, atol=1e-4)
    assert torch.is_grad_enabled()


def test_the_graph_of_depth_guidance_ends_at_the_last_block_that_is_read(latent):
    with outputs_of(latent, ["middle.0", "up.0.1", "up.1.0"]) as outputs:
        changed(latent, [latent.depth_guidance(predictors(), 40.0)], cfg_scale=1.0)
    assert [(name, output.requires_grad) for name, output in outputs] == [
        ("middle.0", True), ("up.0.1", True), ("up.1.0", False)]


def test_depth_predictors_of_another_network_are_refused(latent):
    with pytest.raises(UserError, match="for images of 16 pixels, and the network's have 8"):
        latent.depth_guidance(predictors(size=16), 1.0)
    with pytest.raises(UserError, match=r"read 32 channels from block 'middle\.1', which has 16"):
        latent.depth_guidance(predictors(channels=32), 1.0)


def test_a_contrast_of_the_users_own_is_evaluated_with_the_others(latent):
    class Half(ContrastGuidance):
        """Guidance away from a fainter image."""

        def weaker(self, ctx, pred):
            return Inputs(ctx.x_t / 2, ctx.t)

    separate, together = (changed(latent, [Half(1.0)], batch_contrasts=batch) for batch in (False, True))
    assert relative_error(together, separate) < SAME
