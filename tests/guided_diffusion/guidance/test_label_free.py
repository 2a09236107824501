"""Contrasts, clean-classifier guidance and transforms against their formulas, written out here in float64."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import TINY, in_float64, with_random_weights
from torch import nn
from torch.nn import functional as F

from guided_diffusion import sampling
from guided_diffusion.capture import override_grid_attention
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    CleanClassifierGuidance,
    ContrastGuidance,
    IndependentConditionGuidance,
    PerturbedAttentionGuidance,
    ProjectedGuidance,
    Rescale,
    SelfAttentionGuidance,
    SmoothedEnergyGuidance,
    StepContext,
    TimestepGuidance,
)
from guided_diffusion.guidance.clean_classifier import at_step_0
from guided_diffusion.guidance.smoothed_energy import smoothed
from guided_diffusion.process import Denoiser, ModelMeanType
from guided_diffusion.rng import image_generator
from guided_diffusion.script_util import create_gaussian_diffusion, create_model_and_diffusion

# Convolutions in float64 take long.
SMALL = {**TINY, "image_size": 8, "channel_mult": "1,1", "attention_resolutions": "4", "null_class": True}
BLOCKS = ["middle", "output.0"]
# The network computes in float64; the tables of the process, and the weights of a blur, are float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(scope="module")
def case():
    """A network with a null class, its process, and one step of three images."""
    model, diffusion = create_model_and_diffusion(**SMALL, timestep_respacing="10")
    in_float64(with_random_weights(model, seed=1).requires_grad_(False))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return SimpleNamespace(model=model, diffusion=diffusion, x=x, t=torch.tensor([6, 6, 6]),
                           ids=torch.tensor([4, 0, 9]), y=torch.tensor([1, 0, 1]))


def context(case, **changes):
    denoise = Denoiser(case.diffusion, case.model, clip_denoised=False, model_kwargs={"y": case.y})
    return StepContext(denoise, case.x, case.t, case.ids, **changes)


def delta_of(case, term, **changes):
    ctx = context(case, **changes)
    with term.observe() as ctx.observed[term]:
        pred = ctx.denoise(ctx.x_t, ctx.t)
    return term.delta(ctx, pred)


def eps(case, y=None, model=None):
    """The network's eps at the step, with other labels or by another network."""
    steps = torch.from_numpy(case.diffusion.timestep_map)[case.t]
    return (model or case.model)(case.x, steps, case.y if y is None else y)[:, :1]


def check(actual, expected):
    assert expected.abs().max() > 1e-3                  # else the test could not fail
    torch.testing.assert_close(actual, expected, **CLOSE)


# Contrasts


def test_classifier_free_guidance_compares_with_the_null_label(case):
    null = torch.full_like(case.y, case.model.null_label)
    check(delta_of(case, ClassifierFreeGuidance(1.5, case.model.null_label)), 1.5 * (eps(case) - eps(case, null)))


def test_independent_condition_guidance_compares_with_a_label_by_seed_image_and_step(case):
    drawn = torch.tensor([image_generator(1, i, 6, "independent label").integers(2) for i in case.ids.tolist()])
    check(delta_of(case, IndependentConditionGuidance(0.8, 2, seed=1)), 0.8 * (eps(case) - eps(case, drawn)))


def test_labels_of_independent_condition_guidance_are_uniform():
    term, draws = IndependentConditionGuidance(1.0, 5, seed=3), 2000
    ctx = SimpleNamespace(model_kwargs={"y": torch.zeros(draws, dtype=torch.long)}, x_t=None,
                          image_ids=torch.arange(draws), t=torch.full((draws,), 4))
    counts = torch.bincount(term.weaker(ctx, None).changes["y"], minlength=5)
    assert len(counts) == 5 and (counts - draws / 5).abs().max() < 5 * math.sqrt(draws * 0.16)


def test_autoguidance_compares_with_another_network(case):
    weak, _ = create_model_and_diffusion(**{**SMALL, "num_res_blocks": 2})
    in_float64(with_random_weights(weak, seed=5).requires_grad_(False))
    check(delta_of(case, AutoGuidance(weak, 0.6)), 0.6 * (eps(case) - eps(case, model=weak)))


def test_time_step_guidance_adds_noise_to_the_embedding(case):
    model, noise = case.model, 0.7
    fraction = int(case.diffusion.timestep_map[6]) / case.diffusion.original_num_steps
    draws = torch.from_numpy(np.stack([
        image_generator(2, i, 6, "embedding").standard_normal(128, dtype=np.float32) for i in case.ids.tolist()]))
    # The sum of both embeddings is what blocks see.
    handle = model.label_emb.register_forward_hook(lambda module, args, emb: emb + noise * fraction**2 * draws)
    perturbed = eps(case)
    handle.remove()
    actual = delta_of(case, TimestepGuidance(model, 0.9, noise, power=2.0, seed=2))
    assert (actual - 0.9 * (eps(case) - perturbed)).abs().max() < 1e-5 < actual.abs().max() / 100   # float32 embedding


def test_time_step_guidance_perturbs_the_blocks_that_it_names(case):
    def delta(blocks):
        return delta_of(case, TimestepGuidance(case.model, 1.0, 0.5, blocks=blocks))

    everywhere = delta(list(case.model.feature_blocks))
    assert torch.equal(delta(None), everywhere)
    assert not torch.equal(delta(["middle"]), everywhere) and delta(["middle"]).abs().max() > 1e-4
    # The first block is a convolution, which sees no embedding.
    assert torch.equal(delta(["input.0", "middle"]), delta(["middle"]))
    with pytest.raises(UserError, match=r"the embedding of the step does not reach input\.0; it reaches: input\.1, "):
        delta(["input.0"])


def test_more_noise_in_the_embedding_moves_further(case):
    sizes = [float(delta_of(case, TimestepGuidance(case.model, 1.0, noise)).norm()) for noise in (0.0, 0.1, 0.3, 1.0)]
    assert sizes[0] == 0 and all(one < other for one, other in itertools.pairwise(sizes))


def smoothed_by_hand(q, grid, sigma):
    """Queries (N, heads, T, d), blurred by the whole kernel at once."""
    if math.isinf(sigma):
        return q.mean(dim=2, keepdim=True) + torch.zeros_like(q)
    taps = min(2 * math.floor(math.ceil(6 * sigma) / 2) + 1, min(grid) - (min(grid) % 2 - 1))
    offsets = torch.arange(taps).double() - taps // 2
    line = torch.exp(-offsets**2 / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    maps = q.permute(0, 1, 3, 2).reshape(-1, 1, *grid)
    padded = F.pad(maps, [taps // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel.to(q)[None, None]).reshape(*q.shape[:2], q.shape[3], -1).permute(0, 1, 3, 2)


@pytest.mark.parametrize("sigma", [0.4, 1.0, math.inf])
def test_smoothed_energy_guidance_blurs_the_queries(case, sigma):
    def attend(q, k, v, grid):
        weights = smoothed_by_hand(q, grid, sigma) @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return weights.softmax(dim=-1) @ v

    plain = eps(case)
    with override_grid_attention(case.model, BLOCKS, attend):
        expected = 1.2 * (plain - eps(case))
    assert expected.abs().max() > 1e-6
    actual = delta_of(case, SmoothedEnergyGuidance(case.model, BLOCKS, 1.2, sigma))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


@pytest.mark.parametrize(("sigma", "grid"), [(0.5, (8, 8)), (1.0, (8, 8)), (3.0, (8, 8)), (1.0, (7, 9)), (2.0, (4, 6))])
def test_the_blur_of_queries_is_that_of_the_reference(sigma, grid):
    q = torch.randn(2, 3, grid[0] * grid[1], 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(smoothed(q, grid, sigma), smoothed_by_hand(q, grid, sigma), rtol=0, atol=1e-6)


def test_every_sigma_of_smoothed_energy_guidance_acts_and_more_moves_further(case):
    sizes = [float(delta_of(case, SmoothedEnergyGuidance(case.model, BLOCKS, 1.0, sigma)).norm())
             for sigma in (0.3, 0.6, 1.2, math.inf)]
    assert all(0 < one < other for one, other in itertools.pairwise(sizes))
    assert sizes[-1] == float(delta_of(case, SmoothedEnergyGuidance(case.model, BLOCKS, 1.0, 9999.0)).norm())


# Clean-classifier guidance


class Clean(nn.Sequential):
    """A classifier of clean images of 8 x 8 with a ReLU."""

    def __init__(self, inplace=False):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace), nn.Linear(8, 2))
        with_random_weights(self, seed=3).requires_grad_(False).double()


@pytest.mark.parametrize("options", [
    {}, {"temperature": 2.0}, {"margin_temperature": 0.2}, {"gamma": 0.3}, {"softplus_beta": None},
    {"mean": [0.4], "std": [0.2]}], ids=str)
def test_clean_classifier_guidance_is_the_gradient_at_the_predicted_image(case, options):
    classifier = Clean()
    tau_1 = options.get("temperature", 1.0)
    tau_2 = options.get("margin_temperature", tau_1 / 2)
    abar = case.diffusion.alphas_cumprod[6]
    x0 = ((case.x - math.sqrt(1 - abar) * eps(case)) / math.sqrt(abar)).requires_grad_()
    seen = ((x0 + 1) / 2 - 0.4) / 0.2 if "mean" in options else x0
    hidden = classifier[1](seen.flatten(1))
    beta = options.get("softplus_beta", 3.0)
    logits = classifier[3](torch.log1p(torch.exp(beta * hidden)) / beta if beta else hidden.clamp(min=0))
    odds = torch.log(torch.exp(tau_1 * logits[range(3), case.y]) / torch.exp(tau_2 * logits).sum(dim=1))
    gradient, = torch.autograd.grad(odds.sum(), x0)
    fraction = int(case.diffusion.timestep_map[6]) / case.diffusion.original_num_steps
    expected = 3.0 * (1 + options.get("gamma", 0) * math.sin(math.pi * fraction)) * gradient
    ctx = context(case)
    actual = CleanClassifierGuidance(classifier, 3.0, **options).gradient(ctx, ctx.denoise(ctx.x_t, ctx.t))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)          # the weight and logits are float32
    assert classifier[2](torch.tensor(-1.0)) == 0                               # the ReLU is one again


def test_relus_that_overwrite_their_input_are_softplus_too(case):
    ctx = context(case)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    plain, inplace = (CleanClassifierGuidance(Clean(inplace), 3.0).gradient(ctx, pred) for inplace in (False, True))
    assert plain.abs().max() > 1e-3
    assert torch.equal(plain, inplace)


def test_relus_of_a_classifier_from_a_file_are_softplus_too(case):
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.ReLU())
    with_random_weights(head, seed=3).requires_grad_(False).double()
    head.forward = lambda x, t: nn.Sequential.forward(head, x)
    ctx = context(case)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    smooth, sharp = (CleanClassifierGuidance(classifier, 1.0, softplus_beta=beta).gradient(ctx, pred)
                     for classifier, beta in ((at_step_0(head), 3.0), (head, None)))
    assert (smooth - sharp).abs().max() > 1e-3


def test_clean_classifier_sees_images_of_its_own_size(case):
    sizes = []

    def classifier(x):
        sizes.append(tuple(x.shape))
        return x.flatten(1)[:, :2]

    ctx = context(case)
    for size in (6, 8, 12, None):
        term = CleanClassifierGuidance(classifier, 1.0, image_size=size)
        assert term.gradient(ctx, ctx.denoise(ctx.x_t, ctx.t)).shape == case.x.shape
    assert sizes == [(3, 1, 6, 6), (3, 1, 8, 8), (3, 1, 12, 12), (3, 1, 8, 8)]


def test_the_gradient_of_a_clean_classifier_grows_with_its_temperature(case):
    """In proportion, where the logits of other classes do not count."""
    ctx = context(case)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    one, other = (CleanClassifierGuidance(Clean(), 1.0, temperature, 0.0).gradient(ctx, pred)
                  for temperature in (1.0, 2.5))
    check(other, 2.5 * one)


# Transforms


@pytest.mark.parametrize("options", [{}, {"eta": 0.3}, {"norm_threshold": 0.5}, {"norm_threshold": 1e3}, {"eta": 1.0},
                                     {"momentum": -0.5, "norm_threshold": 2.0}], ids=str)
def test_projected_guidance_projects_the_change_of_x0(case, options):
    change, before = (torch.randn(case.x.shape, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    abar = case.diffusion.alphas_cumprod[6]
    ratio = math.sqrt((1 - abar) / abar)
    term, memory = ProjectedGuidance(**options), {}
    if "momentum" in options:
        memory[term] = before
    ctx = context(case, memory=memory)
    actual = term.transform(ctx, ctx.denoise(ctx.x_t, ctx.t), change)
    for i in range(3):
        x0 = ((case.x[i] - math.sqrt(1 - abar) * eps(case)[i]) / math.sqrt(abar)).flatten()
        d = -ratio * change[i].flatten()
        if "momentum" in options:
            d = d - 0.5 * before[i].flatten()
            torch.testing.assert_close(memory[term][i].flatten(), d, **CLOSE)
        d = d * min(1, options.get("norm_threshold", math.inf) / float(d.norm()))
        parallel = (d @ x0) / (x0 @ x0) * x0
        d = d - parallel + options.get("eta", 0.0) * parallel
        check(actual[i].flatten(), -d / ratio)


def test_more_eta_a_higher_threshold_and_more_phi_act_more(case):
    ctx = context(case)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    change = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).double()

    def moved(term):
        return term.transform(ctx, pred, change)

    def rising(values):
        return all((one < other).all() for one, other in itertools.pairwise(values))

    norms = [moved(ProjectedGuidance(eta)).flatten(1).norm(dim=1) for eta in (0.0, 0.3, 0.6, 1.0)]
    assert rising(norms)
    torch.testing.assert_close(moved(ProjectedGuidance(1.0)), change, **CLOSE)
    abar = case.diffusion.alphas_cumprod[6]
    in_x0 = change.flatten(1).norm(dim=1) * math.sqrt((1 - abar) / abar)
    norms = [moved(ProjectedGuidance(1.0, share * float(in_x0.min()))).flatten(1).norm(dim=1)
             for share in (0.1, 0.5, 0.9)]
    assert rising(norms)
    torch.testing.assert_close(moved(ProjectedGuidance(1.0, 1.1 * float(in_x0.max()))), change, **CLOSE)
    norms = [(moved(Rescale(phi)) - change).flatten(1).norm(dim=1) for phi in (0.0, 0.2, 0.6, 1.0)]
    assert rising(norms) and norms[0].max() < 1e-6


def test_transforms_are_applied_in_the_order_of_the_list(case):
    contrast = PerturbedAttentionGuidance(case.model, BLOCKS, 20.0)
    project, rescale = ProjectedGuidance(0.2, 3.0), Rescale(0.8)
    ctx = context(case)
    with contrast.observe() as ctx.observed[contrast]:
        pred = ctx.denoise(ctx.x_t, ctx.t)
    delta = contrast.delta(ctx, pred)
    results = {}
    for order in ((project, rescale), (rescale, project)):
        changed = delta
        for term in order:
            changed = term.transform(ctx, pred, changed)
        with torch.no_grad():
            out = sampling.sample_step(sampling.ddim_step, ctx.denoise, case.x, case.t, lambda: None,
                                       [contrast, *order], case.ids)
        check(out["eps"], pred.eps + changed)
        results[order[0]] = changed
    assert (results[project] - results[rescale]).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
def test_momentum_goes_on_from_step_to_step_in_a_loop_of_ones_own(case, sampler):
    """As in the loop of the library; without a memory for it a sentence says so, in place of another image."""
    def looped(memory, momentum=-0.9):
        guidance = [PerturbedAttentionGuidance(case.model, ["middle"], 5.0), ProjectedGuidance(momentum=momentum)]
        if memory is None:
            return getattr(case.diffusion, f"{sampler}_loop")(case.model, case.x.shape, guidance=guidance,
                                                              noise=case.x, model_kwargs={"y": case.y})
        torch.manual_seed(3)
        x = case.x
        for index in reversed(range(case.diffusion.num_timesteps)):
            x = getattr(case.diffusion, sampler)(case.model, x, torch.full((len(x),), index), guidance=guidance,
                                                 model_kwargs={"y": case.y}, **memory)["sample"]
        return x

    with torch.no_grad():
        torch.manual_seed(3)
        expected = looped(None)
        assert torch.equal(looped({"memory": {}}), expected)
        assert not torch.equal(looped({}, momentum=0.0), expected)
        with pytest.raises(UserError, match="ProjectedGuidance: goes on from what it left at the step before"):
            looped({})


def test_rescaled_guidance_has_the_deviation_of_the_unguided_prediction(case):
    ctx = context(case)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    change = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).double()
    whole = pred.eps + Rescale(1.0).transform(ctx, pred, change)
    torch.testing.assert_close(whole.flatten(1).std(dim=1), pred.eps.flatten(1).std(dim=1), **CLOSE)
    guided = pred.eps + change
    expected = 0.4 * guided * (pred.eps.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)).reshape(-1, 1, 1, 1)
    check(pred.eps + Rescale(0.4).transform(ctx, pred, change), expected + 0.6 * guided)


@pytest.mark.parametrize("kind", [ModelMeanType.VELOCITY, ModelMeanType.START_X])
def test_rescaling_and_latent_sag_act_on_what_the_network_predicts(case, kind):
    """Of the velocity or x0, by the formulas of Lin et al. (2305.08891) and of diffusers' pipeline."""
    process = copy.copy(case.diffusion)
    process.model_mean_type = kind
    other = SimpleNamespace(**{**vars(case), "diffusion": process})
    abar = float(process.alphas_cumprod[case.t[0]])
    a, b = math.sqrt(abar), math.sqrt(1 - abar)

    def output(x, eps):
        x0 = (x - b * eps) / a
        return x0 if kind is ModelMeanType.START_X else a * eps - b * x0

    ctx = context(other)
    pred = ctx.denoise(ctx.x_t, ctx.t)
    change = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).double()
    plain, guided = output(case.x, pred.eps), output(case.x, pred.eps + change)
    ratio = plain.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
    assert (ratio - 1).abs().min() > 0.02
    expected = guided * (0.4 * ratio + 0.6).reshape(-1, 1, 1, 1)
    new = Rescale(0.4).transform(ctx, pred, change)
    torch.testing.assert_close(output(case.x, pred.eps + new), expected, rtol=1e-4, atol=1e-5)

    sag = SelfAttentionGuidance(case.model, "output.0", 0.7, 1.0, of_output=True)
    with sag.observe() as ctx.observed[sag]:
        pred = ctx.denoise(ctx.x_t, ctx.t)
    x_bar = sag.degraded(ctx, pred)
    weaker = output(x_bar, ctx.denoise(x_bar, ctx.t).eps)
    expected = plain + 0.7 * (plain - weaker)
    torch.testing.assert_close(output(case.x, pred.eps + sag.delta(ctx, pred)), expected, rtol=1e-4, atol=1e-5)
    in_eps = SelfAttentionGuidance(case.model, "output.0", 0.7, 1.0)
    ctx.observed[in_eps] = ctx.observed[sag]
    assert (in_eps.delta(ctx, pred) - sag.delta(ctx, pred)).abs().max() > 1e-2


def every_term(model, scale=1.0, **window):
    """A term of each kind that is new beside self-attention guidance."""
    return [SelfAttentionGuidance(model, "output.0", scale, 1.0, **window),
            PerturbedAttentionGuidance(model, ["middle"], scale, **window),
            SmoothedEnergyGuidance(model, ["output.0"], scale, 1.0, **window),
            ClassifierFreeGuidance(scale, model.null_label, **window),
            IndependentConditionGuidance(scale, 2, **window),
            TimestepGuidance(model, scale, 0.5, **window),
            AutoGuidance(lambda x, t, y: model(x / 2, t, y), scale, **window),
            CleanClassifierGuidance(lambda x: x.flatten(1)[:, :2], scale, **window)]


def samples(case, guidance, sampler, ids=(4, 9)):
    """Images of a chain of three steps, by number."""
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="3")
    x = torch.stack([torch.from_numpy(image_generator(0, i, 10).standard_normal((1, 8, 8))) for i in ids])
    labels = torch.tensor([i % 2 for i in ids])
    denoise = Denoiser(diffusion, case.model, model_kwargs={"y": labels})

    def noise(step):
        return torch.stack([torch.from_numpy(image_generator(0, i, step).standard_normal((1, 8, 8))) for i in ids])

    step = sampling.SAMPLERS[sampler]().step()
    return sampling.last(sampling.sample_chain(step, denoise, x, noise, guidance, torch.tensor(ids)))["sample"]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_any_list_composes_and_images_do_not_depend_on_the_batch(case, sampler):
    guidance = [*every_term(case.model, 0.3), ProjectedGuidance(0.5, 3.0, -0.3), Rescale(0.5)]
    together = samples(case, guidance, sampler)
    assert not torch.allclose(together, samples(case, guidance[:-2], sampler), atol=1e-3)
    alone = torch.cat([samples(case, guidance, sampler, ids=(i,)) for i in (4, 9)])
    # The embedding is float32, and the first step multiplies its rounding by 157: up to 4e-6 was seen.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_scale_0_and_closed_windows_are_unguided_bit_for_bit(case):
    plain = samples(case, [], "ddpm")
    for terms in (every_term(case.model, 0.0), every_term(case.model, 1.0, sigma_min=1e6),
                  [ProjectedGuidance(), Rescale(1.0)]):
        assert torch.equal(samples(case, terms, "ddpm"), plain)


def test_a_stronger_scale_moves_the_image_further(case):
    plain = samples(case, [], "ddim")
    for weak, strong in zip(every_term(case.model, 0.05), every_term(case.model, 0.2), strict=True):
        near, far = ((samples(case, [term], "ddim") - plain).norm() for term in (weak, strong))
        assert 0 < near < far, type(weak).__name__


def test_transforms_apply_where_their_window_is_open_only(case):
    class Nothing(ContrastGuidance):
        def delta(self, ctx, pred):
            return torch.ones_like(pred.eps)

    def guided(*transforms):
        return samples(case, [Nothing(0.1), *transforms], "ddim")

    assert torch.equal(guided(), guided(ProjectedGuidance(start=0), Rescale(1.0, start=0)))
    assert not torch.equal(guided(), guided(ProjectedGuidance(start=2)))
    assert not torch.equal(guided(ProjectedGuidance(start=2)), guided(ProjectedGuidance()))


@pytest.mark.parametrize("make", [
    lambda model: ClassifierFreeGuidance(1.0, -1), lambda model: IndependentConditionGuidance(1.0, 0),
    lambda model: TimestepGuidance(model, 1.0, -0.1), lambda model: TimestepGuidance(model, 1.0, 1.0, math.nan),
    lambda model: TimestepGuidance(model, 1.0, 1.0, blocks=["output.9"]),
    lambda model: TimestepGuidance(model, 1.0, 1.0, blocks=[]),
    lambda model: TimestepGuidance(model, 1.0, 1.0, blocks="middle"),
    lambda model: SmoothedEnergyGuidance(model, ["input.0"], 1.0), lambda model: SmoothedEnergyGuidance(model, [], 1.0),
    lambda model: SmoothedEnergyGuidance(model, ["middle"], 1.0, 0.0),
    lambda model: CleanClassifierGuidance(Clean(), 1.0, math.inf),
    lambda model: CleanClassifierGuidance(Clean(), 1.0, mean=[0.5]),
    lambda model: ProjectedGuidance(norm_threshold=0.0), lambda model: ProjectedGuidance(momentum=1.0),
    lambda model: Rescale(0.5, start=5, stop=5), lambda model: Rescale(0.5, start=4, stop=5),
    lambda model: Rescale(1.5)])
def test_wrong_arguments_are_refused(case, make):
    with pytest.raises(UserError):
        make(case.model)


def test_methods_of_labels_refuse_a_network_without(case):
    ctx = StepContext(Denoiser(case.diffusion, case.model), case.x, case.t, case.ids)
    for term in (ClassifierFreeGuidance(1.0, 2), IndependentConditionGuidance(1.0, 2)):
        with pytest.raises(UserError, match="needs labels"):
            term.weaker(ctx, None)
    with pytest.raises(UserError, match="needs labels"):
        CleanClassifierGuidance(Clean(), 1.0).gradient(ctx, None)
