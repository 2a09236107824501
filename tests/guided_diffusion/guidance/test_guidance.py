"""Guidance against its formulas, computed here by hand: attention maps, blur and gradients are all written out."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, with_random_weights
from scipy import ndimage
from torch.nn import functional as F

from guided_diffusion import sampling
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import ModelMeanType
from guided_diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CleanClassifierGuidance,
    IndependentConditionGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StepContext,
)
from guided_diffusion.process import Denoiser
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model_and_diffusion

BLOCK = "output.0"
SAMPLERS = ["p_sample", "ddim_sample"]
# A few times what a step moves between the kernels of two processors (AVX-512, AVX2, SSE4.1): 9.2e-6 and 9e-5 to 2e-4.
ROUNDING = {"sample": 4e-5, "pred_xstart": 4e-4}


class Counted:
    """A function that counts its calls and remembers the steps it saw."""

    def __init__(self, function):
        self.function, self.calls, self.steps = function, 0, []

    def __call__(self, x, t, **kwargs):
        self.calls += 1
        self.steps.append(t.tolist())
        return self.function(x, t, **kwargs)


def build(**flags):
    model, diffusion = create_model_and_diffusion(**{**TINY, "timestep_respacing": "10", **flags})
    return with_random_weights(model, seed=1).requires_grad_(False), diffusion


@pytest.fixture(scope="module")
def case():
    """A network, its process, a classifier, and one step of two images."""
    model, diffusion = build()
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=2).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 1, 16, 16, generator=generator)
    return SimpleNamespace(model=model, diffusion=diffusion, classifier=classifier, x=x, noise=noise,
                           t=torch.tensor([4, 4]), kwargs={"y": torch.tensor([1, 0])})


def terms(case, scales=(0.7, 0.4, 3.0), **window):
    """One term of each kind."""
    sag, pag, cg = scales
    return {"sag": SelfAttentionGuidance(case.model, BLOCK, sag, 2.0, **window),
            "pag": PerturbedAttentionGuidance(case.model, ["middle"], pag, **window),
            "cg": ClassifierGuidance(case.classifier, cg, **window)}


def step(case, guidance=(), sampler="p_sample", model=None, t=None, **options):
    return getattr(case.diffusion, sampler)(model or case.model, case.x, case.t if t is None else t, noise=case.noise,
                                            model_kwargs=case.kwargs, guidance=guidance, **options)


def observed(case, term, numbers=(0, 1), t=None):
    """What a term sees in a step: its context and the prediction."""
    denoise = Denoiser(case.diffusion, case.model, model_kwargs=case.kwargs)
    ctx = StepContext(denoise, case.x, case.t if t is None else t, torch.tensor(numbers))
    with term.observe() as ctx.observed[term]:
        return ctx, denoise(ctx.x_t, ctx.t)


# The terms, by hand


def projections(model, name, *inputs, **kwargs):
    """The qkv projection (N, 3C, T) of a block, from its input and weights."""
    block, seen = model.attention_blocks[name], []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(*inputs, **kwargs)
    handle.remove()
    x = F.group_norm(seen[0], 32, block.norm.weight, block.norm.bias).flatten(2)
    return block.qkv.weight[:, :, 0] @ x + block.qkv.bias[:, None]


def received_by_hand(qkv, heads, new_order=False):
    n, width, tokens = qkv.shape
    if new_order:
        q, k, _ = qkv.reshape(n, 3, heads, width // 3 // heads, tokens).unbind(1)
    else:
        q, k, _ = qkv.reshape(n, heads, 3, width // 3 // heads, tokens).unbind(2)
    weights = torch.einsum("nhdq,nhdk->nhqk", q, k).div(math.sqrt(q.shape[2])).softmax(dim=-1)
    return weights.sum(dim=2).mean(dim=1)


def blur_by_hand(x, sigma):
    weights = np.exp(-np.arange(-15, 16) ** 2 / (2 * sigma**2))
    for axis in (2, 3):
        x = ndimage.correlate1d(x, weights / weights.sum(), axis=axis, mode="mirror")
    return x


def tables(case):
    """sqrt(abar) and sqrt(1 - abar) of the step."""
    abar = case.diffusion.alphas_cumprod[int(case.t[0])]
    return math.sqrt(abar), math.sqrt(1 - abar)


def network(case, x, model=None):
    """eps by the network at the original step."""
    steps = torch.from_numpy(case.diffusion.timestep_map)[case.t]
    return (model or case.model)(x, steps, **case.kwargs)[:, :1]


def sag_by_hand(case, mask):
    """eps(x_t) - eps(x_bar); mask: (N, 1, 16, 16)."""
    signal, spread = tables(case)
    eps = network(case, case.x)
    x0 = ((case.x - spread * eps) / signal).clamp(-1, 1)
    x0_bar = mask * blur_by_hand(x0.numpy(), 2.0) + (1 - mask) * x0.numpy()
    return eps - network(case, torch.as_tensor(signal * x0_bar + spread * eps.numpy(), dtype=torch.float32))


def attention_mask(case):
    steps = torch.from_numpy(case.diffusion.timestep_map)[case.t]
    received = received_by_hand(projections(case.model, BLOCK, case.x, steps, **case.kwargs), heads=2)
    return (received > 1).reshape(2, 1, 8, 8).numpy().repeat(2, axis=2).repeat(2, axis=3).astype(np.float32)


def pag_by_hand(case):
    """eps(x_t) - eps(x_t) of a copy whose middle block passes on its values."""
    perturbed = copy.deepcopy(case.model)
    block = perturbed.attention_blocks["middle"]

    def forward(x):
        normed = F.group_norm(x, 32, block.norm.weight, block.norm.bias).flatten(2)
        qkv = block.qkv.weight[:, :, 0] @ normed + block.qkv.bias[:, None]
        values = qkv.unflatten(1, (2, 3, -1))[:, :, 2].flatten(1, 2)
        return x + (block.proj_out.weight[:, :, 0] @ values + block.proj_out.bias[:, None]).reshape(x.shape)

    block.forward = forward
    return network(case, case.x) - network(case, case.x, perturbed)


def gradient_by_hand(case):
    x = case.x.clone().requires_grad_()
    steps = torch.from_numpy(case.diffusion.timestep_map)[case.t]
    log_p = case.classifier(x, steps).log_softmax(dim=1)
    return torch.autograd.grad(log_p[0, 1] + log_p[1, 0], x)[0]


@pytest.fixture(scope="module")
def parts(case):
    """Each term's part at scale 1."""
    return {"sag": sag_by_hand(case, attention_mask(case)), "pag": pag_by_hand(case), "cg": gradient_by_hand(case)}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "names", [names for n in (1, 2, 3) for names in itertools.combinations(["sag", "pag", "cg"], n)], ids="+".join)
def test_any_terms_compose_to_the_sum_of_their_parts(case, parts, names, sampler):
    scales = {"sag": 0.7, "pag": 0.4, "cg": 3.0}
    chosen = [terms(case)[name] for name in names]
    out = step(case, chosen, sampler)

    signal, spread = tables(case)
    plain = case.diffusion.p_mean_variance(case.model, case.x, case.t, model_kwargs=case.kwargs)
    eps = plain["eps"] + sum(scales[name] * parts[name] for name in names if name != "cg")
    grad = scales["cg"] * parts["cg"] if "cg" in names else torch.zeros(())
    x0 = ((case.x - spread * eps) / signal).clamp(-1, 1)
    if sampler == "p_sample":
        mean = case.diffusion.posterior_mean(x0, case.x, case.t) + plain["variance"] * grad
        expected = mean + plain["variance"].sqrt() * case.noise
    else:
        direction = (case.x - signal * x0) / spread - spread * grad
        x0 = (case.x - spread * direction) / signal
        before = case.diffusion.alphas_cumprod_prev[4]
        expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * direction
    np.testing.assert_allclose(out["sample"], expected, atol=2e-5)
    np.testing.assert_allclose(out["pred_xstart"], x0, atol=2e-5)
    np.testing.assert_allclose(out["pred_xstart_unguided"], plain["pred_xstart"], atol=1e-6)
    np.testing.assert_allclose(out["eps"], eps, atol=2e-5)
    unguided = step(case, sampler=sampler)
    assert (out["sample"] - unguided["sample"]).abs().max() > 1e-3


def test_a_term_given_twice_counts_twice(case, parts):
    sag = terms(case)["sag"]
    expected = network(case, case.x) + 2 * 0.7 * parts["sag"]
    np.testing.assert_allclose(step(case, [sag, sag])["eps"], expected, atol=2e-5)


@pytest.mark.parametrize("kind", [ModelMeanType.START_X, ModelMeanType.PREVIOUS_X, ModelMeanType.VELOCITY])
def test_guidance_does_not_depend_on_what_the_network_predicts(case, kind):
    """The same network, its eps rewritten as another quantity."""
    other = copy.copy(case.diffusion)
    other.model_mean_type = kind

    def model(x, t, y):
        eps, fraction = case.model(x, t, y=y).chunk(2, dim=1)
        x0 = other.predict_xstart_from_eps(x, case.t, eps)
        signal, spread = tables(case)
        values = {ModelMeanType.START_X: x0, ModelMeanType.PREVIOUS_X: other.posterior_mean(x0, x, case.t),
                  ModelMeanType.VELOCITY: signal * eps - spread * x0}[kind]
        return torch.cat([values, fraction], dim=1)

    guidance = list(terms(case).values())
    expected = step(case, guidance, clip_denoised=False)["sample"]
    got = other.p_sample(model, case.x, case.t, guidance=guidance, noise=case.noise, model_kwargs=case.kwargs,
                         clip_denoised=False)["sample"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


# What is off costs nothing and changes nothing


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("window", [None, {"start": 4}, {"stop": 5}, {"start": 0}])
def test_off_terms_change_no_bit_and_evaluate_nothing(case, sampler, window):
    plain = step(case, sampler=sampler)
    off = terms(case, (0, 0.0, 0)) if window is None else terms(case, **window)
    model, off["cg"].classifier = Counted(case.model), Counted(case.classifier)
    for guidance in ([], list(off.values())):
        model.calls = 0
        out = step(case, guidance, sampler, model)
        assert model.calls == 1 and off["cg"].classifier.calls == 0
        assert all(torch.equal(out[name], plain[name]) for name in ("sample", "pred_xstart", "pred_xstart_unguided"))
        assert torch.equal(out["pred_xstart"], out["pred_xstart_unguided"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_empty_list_leaves_a_chain_as_it_is(case, sampler):
    diffusion, chains = create_gaussian_diffusion(timestep_respacing="4", learn_sigma=True), []
    for guidance in ({}, {"guidance": []}, {"guidance": list(terms(case, (0, 0, 0)).values())}):
        torch.manual_seed(0)
        loop = getattr(diffusion, f"{sampler}_loop")
        chains.append(loop(case.model, case.x.shape, case.x, model_kwargs=case.kwargs, **guidance))
    assert torch.equal(chains[1], chains[0]) and torch.equal(chains[2], chains[0])


@pytest.mark.parametrize(("names", "evaluations"), [(["sag"], 2), (["pag"], 2), (["cg"], 1), (["sag", "pag", "cg"], 3)])
def test_cost_in_evaluations_and_the_original_step_that_all_networks_see(case, names, evaluations):
    chosen = terms(case)
    model, chosen["cg"].classifier = Counted(case.model), Counted(case.classifier)
    step(case, [chosen[name] for name in names], model=model)
    assert model.calls == evaluations
    assert chosen["cg"].classifier.calls == ("cg" in names)
    assert model.steps + chosen["cg"].classifier.steps == [[444, 444]] * (evaluations + ("cg" in names))


@pytest.mark.parametrize(("start", "stop", "active"), [
    (None, None, [0, 1, 2, 3, 4]), (2, None, [0, 1]), (None, 2, [2, 3, 4]), (4, 1, [1, 2, 3]),
    (0, None, [])])
def test_window_is_from_stop_up_to_below_start(case, start, stop, active):
    term = ClassifierGuidance(case.classifier, 1.0, start=start, stop=stop)
    assert term.window(torch.arange(5)).nonzero().flatten().tolist() == active
    term = ClassifierGuidance(case.classifier, 0.0, start=start, stop=stop)
    assert not term.window(torch.arange(5)).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["sag", "pag", "cg"])
def test_in_a_batch_of_several_steps_only_images_in_the_window_are_guided(case, name, sampler):
    t = torch.tensor([8, 2])
    plain = step(case, sampler=sampler, t=t)
    guided = step(case, [terms(case)[name]], sampler, t=t)
    part = step(case, [terms(case, start=5)[name]], sampler, t=t)
    for key in ("sample", "pred_xstart"):
        np.testing.assert_allclose(part[key][0], plain[key][0], atol=ROUNDING[key])
        np.testing.assert_allclose(part[key][1], guided[key][1], atol=ROUNDING[key])
    assert (part["sample"] - plain["sample"])[1].abs().max() > 1e-3
    assert (guided["sample"] - plain["sample"])[0].abs().max() > 1e-3


# Classifier guidance


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cond_fn_is_classifier_guidance(case, sampler):
    cg = terms(case)["cg"]

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = F.log_softmax(case.classifier(x, t), dim=-1)
            return torch.autograd.grad(log_p[range(len(y)), y].sum(), x)[0] * 3.0

    expected = step(case, [cg], sampler)["sample"]
    with torch.no_grad():
        np.testing.assert_allclose(step(case, sampler=sampler, cond_fn=cond_fn)["sample"], expected, atol=1e-6)
    both = step(case, [terms(case)["sag"]], sampler, cond_fn=cond_fn)["sample"]
    np.testing.assert_allclose(both, step(case, [terms(case)["sag"], cg], sampler)["sample"], atol=1e-6)


def test_classifier_guidance_needs_labels(case):
    with pytest.raises(UserError, match="needs labels"):
        case.diffusion.p_sample(lambda x, t: torch.cat([x, x], dim=1), case.x, case.t, guidance=[terms(case)["cg"]])


# Self-attention guidance


def masks(case, mask, threshold=1.0, numbers=(0, 1), t=None):
    """(N, 8, 8): the mask over tokens."""
    sag = SelfAttentionGuidance(case.model, BLOCK, 0.7, 2.0, mask=mask, threshold=threshold)
    ctx, pred = observed(case, sag, numbers, t)
    return sag.token_mask(ctx, pred, ctx.observed[sag][BLOCK]).unflatten(1, (8, 8))


@pytest.mark.parametrize("threshold", [1.0, 1.3])
@pytest.mark.parametrize("mask", ["square", "random", "high-frequency"])
def test_other_masks_have_as_many_tokens_as_the_attention_masks(case, mask, threshold):
    attended = masks(case, "self-attention", threshold)
    assert 0 < attended.sum() < attended.numel()
    other = masks(case, mask, threshold)
    assert other.sum(dim=(1, 2)).tolist() == attended.sum(dim=(1, 2)).tolist()
    assert not torch.equal(other, attended)


def test_random_mask_follows_the_image_number_and_step_not_the_place_in_the_batch(case):
    """Equal images, so that their masks have one size."""
    same = SimpleNamespace(**vars(case))
    same.x, same.kwargs = case.x[:1].repeat(2, 1, 1, 1), {"y": torch.tensor([1, 1])}
    first = masks(same, "random", numbers=(5, 9))
    assert torch.equal(masks(same, "random", numbers=(9, 5)), first.flip(0))
    assert not torch.equal(first[0], first[1])
    later = masks(same, "random", numbers=(5, 9), t=torch.tensor([3, 3]))
    assert not torch.equal(later[0], first[0])


def test_guided_sample_with_random_mask_follows_the_numbers(case):
    denoise = Denoiser(case.diffusion, case.model, model_kwargs=case.kwargs)
    guidance = [SelfAttentionGuidance(case.model, BLOCK, 0.7, 2.0, mask="random")]
    samples = [sampling.sample_step(sampling.ddim_step, denoise, case.x, case.t, lambda: None, guidance,
                                    torch.tensor(numbers))["sample"] for numbers in ([3, 4], [3, 5], [0, 1])]
    assert torch.equal(samples[0][0], samples[1][0]) and not torch.equal(samples[0][1], samples[1][1])
    assert torch.equal(step(case, guidance, "ddim_sample")["sample"], samples[2])        # numbers by default


@pytest.mark.parametrize("options", [
    {"mask": "global"}, {"threshold": -1.0}, {"mask": lambda ctx, pred: torch.ones(2, 1, 1, 1)}],
    ids=["global", "low threshold", "function"])
def test_blur_guidance_blurs_everywhere(case, options):
    eps = step(case, [SelfAttentionGuidance(case.model, BLOCK, 0.7, 2.0, **options)])["eps"]
    everywhere = np.ones((2, 1, 16, 16))
    np.testing.assert_allclose(eps, network(case, case.x) + 0.7 * sag_by_hand(case, everywhere), atol=2e-5)


def test_above_the_highest_threshold_nothing_is_blurred(case):
    eps = step(case, [SelfAttentionGuidance(case.model, BLOCK, 0.7, 2.0, threshold=64.0)])["eps"]
    nowhere = np.zeros((2, 1, 16, 16))
    np.testing.assert_allclose(eps, network(case, case.x) + 0.7 * sag_by_hand(case, nowhere), atol=2e-5)


def test_mask_can_be_a_function_of_any_resolution_and_strength(case):
    seen = []

    def mask(ctx, pred):
        seen.append((ctx.image_ids.tolist(), pred.pred_xstart.shape))
        return torch.tensor([[0.0, 0.5, 1.0, 0.0]]).expand(2, 1, 2, 4)

    eps = step(case, [SelfAttentionGuidance(case.model, BLOCK, 0.7, 2.0, mask=mask)])["eps"]
    expected = np.repeat([0.0, 0.5, 1.0, 0.0], 4) * np.ones((2, 1, 16, 1))
    np.testing.assert_allclose(eps, network(case, case.x) + 0.7 * sag_by_hand(case, expected), atol=2e-5)
    assert seen == [([0, 1], (2, 1, 16, 16))]


def test_every_block_works_on_images_that_are_not_square():
    """Two blocks per level, attention at both."""
    model, diffusion = build(num_res_blocks=2, attention_resolutions="16,8", channel_mult="1,1", class_cond=False)
    x, t = torch.randn(1, 1, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([4])
    plain = diffusion.ddim_sample(model, x, t)["sample"]
    seen = {}

    class Watched(SelfAttentionGuidance):
        def pixel_mask(self, ctx, pred):
            seen[self.block] = super().pixel_mask(ctx, pred)
            return seen[self.block]

    assert len(model.attention_blocks) == 11
    for block in model.attention_blocks:
        sample = diffusion.ddim_sample(model, x, t, guidance=[Watched(model, block, 0.5, 2.0)])["sample"]
        qkv = projections(model, block, x, torch.tensor([444]))
        height = 16 if qkv.shape[2] == 384 else 8
        tokens = (received_by_hand(qkv, heads=2) > 1).float().reshape(1, 1, height, -1)
        assert torch.equal(seen[block], tokens.repeat_interleave(16 // height, 2).repeat_interleave(16 // height, 3))
        assert sample.isfinite().all() and not torch.equal(sample, plain)


@pytest.mark.parametrize("new_order", [False, True])
def test_official_heads_split_the_map_as_the_official_code_does(new_order):
    """It believes in `num_heads` heads in legacy order, whatever the block has."""
    model, diffusion = build(num_head_channels=8, use_new_attention_order=new_order)
    case = SimpleNamespace(model=model, diffusion=diffusion, t=torch.tensor([4, 4]), kwargs={"y": torch.tensor([0, 1])},
                           x=torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)))
    qkv = projections(model, BLOCK, case.x, torch.tensor([444, 444]), **case.kwargs)
    by_heads = {}
    for heads, expected in (("exact", received_by_hand(qkv, 4, new_order)), ("official", received_by_hand(qkv, 2))):
        sag = SelfAttentionGuidance(model, BLOCK, 0.7, 2.0, heads=heads)
        ctx, pred = observed(case, sag)
        np.testing.assert_allclose(ctx.observed[sag][BLOCK].received, expected, rtol=1e-4)
        by_heads[heads] = sag.pixel_mask(ctx, pred)
    assert not torch.equal(by_heads["exact"], by_heads["official"])


# Mistakes


@pytest.mark.parametrize("name", ["sag", "pag"])
def test_guidance_by_another_network_than_the_one_sampled_is_refused(case, name):
    other = copy.deepcopy(case.model)
    with pytest.raises(UserError, match="must be given the network that is sampled"):
        step(case, [terms(case)[name]], model=other)


@pytest.mark.parametrize(("options", "said"), [
    ({"mask": "dino"}, r"mask 'dino': must be a function or one of self-attention, global, high-frequency, random, sq"),
    ({"heads": "legacy"}, r"heads 'legacy': must be one of exact, official"),
    ({"blur_sigma": 0}, r"blur_sigma 0: must be greater than 0"),
    ({"blur_sigma": -2.0}, r"blur_sigma -2\.0: must be greater than 0"),
    ({"blur_sigma": math.nan}, r"blur_sigma nan"),
    ({"threshold": math.nan}, r"threshold nan"),
    ({"scale": math.nan}, r"scale nan: must be a finite number"),
    ({"scale": math.inf}, r"scale inf: must be a finite number"),
    ({"scale": "0.1"}, r"scale '0\.1': must be a finite number"),
    ({"start": "all"}, r"start 'all': must be a finite number"),
    ({"stop": math.nan}, r"stop nan: must be a finite number"),
    ({"block": "output.8"}, r"'output\.8' is no attention block.*there are: input\.3, middle, output\.0, output\.1"),
    ({"block": "input.0"}, r"'input\.0' is no attention block"),
])
def test_bad_arguments_are_named(case, options, said):
    with pytest.raises(UserError, match=said):
        SelfAttentionGuidance(**{"model": case.model, "block": BLOCK, "scale": 0.1, "blur_sigma": 3.0, **options})


@pytest.mark.parametrize("blocks", [["middle", "output.8"], [], "middle"])
def test_bad_blocks_are_named(case, blocks):
    with pytest.raises(UserError, match=r"output\.8.*there are: input\.3|must be a list of attention blocks"):
        PerturbedAttentionGuidance(case.model, blocks, 1.0)


def few_logits(x, *t):
    """The logits of a classifier of three classes."""
    return x.flatten(1)[:, :3]


@pytest.mark.parametrize("y, guidance, sentence", [
    ([1, 99], [], "y: has the label 99, must be labels from 0 to 9, which the network knows"),
    ([-1, 3], [], "y: has the label -1, must be labels from 0 to 9"),
    ([1.0, 2.0], [], r"y: is \(2,\) torch.float32, must be a tensor \(N,\) of whole numbers"),
    ([[1], [2]], [], r"y: is \(2, 1\) torch.int64, must be a tensor \(N,\)"),
    ([1, 2], [ClassifierFreeGuidance(1.0, 99, sigma_max=1.0)],
     "null_label 99: must be a label from 0 to 9, which the network knows"),
    ([1, 2], [IndependentConditionGuidance(1.0, 50)],
     "num_classes 50: must be at most 10, as many labels as the network knows"),
    ([5, 9], [ClassifierGuidance(few_logits, 1.0)], r"classifier guidance: the classifier gives logits \(2, 3\) for 2 "
     r"images with labels from 5 to 9, it must give \(N, classes\), all labels among them"),
    ([5, 9], [CleanClassifierGuidance(few_logits, 1.0)],
     r"clean-classifier guidance: the classifier gives logits \(2, 3\)"),
    ([1, 2], [CleanClassifierGuidance(lambda x: x.flatten(1)[:, 0], 1.0)],
     r"clean-classifier guidance: the classifier gives logits \(2,\)"),
])
def test_labels_that_a_network_does_not_know_are_named(case, y, guidance, sentence):
    model, diffusion = build(num_classes=10, timestep_respacing="2")
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        with pytest.raises(UserError, match=f"^{sentence}"):
            loop(model, case.x.shape, guidance=guidance, model_kwargs={"y": torch.tensor(y)})
    if not guidance:
        with pytest.raises(UserError, match=f"^{sentence}"):
            diffusion.calc_bpd_loop(model, case.x, model_kwargs={"y": torch.tensor(y)})
        with pytest.raises(UserError, match=f"^{sentence}"):
            diffusion.ddim_reverse_sample_loop(model, case.x, model_kwargs={"y": torch.tensor(y)})


def test_the_null_label_is_known_and_other_networks_are_asked_nothing(case):
    model, diffusion = build(num_classes=10, null_class=True, timestep_respacing="2")
    y, guidance = torch.tensor([10, 9]), [ClassifierFreeGuidance(1.0, 10), IndependentConditionGuidance(1.0, 11)]
    assert diffusion.p_sample_loop(model, case.x.shape, guidance=guidance, model_kwargs={"y": y}).isfinite().all()
    known = model.label_count
    network = Counted(lambda x, t, y: model(x, t, y % known))
    network.num_classes = 1000                  # of others, nobody knows what they mean by it
    diffusion.p_sample_loop(network, case.x.shape, guidance=[ClassifierFreeGuidance(1.0, 99)],
                            model_kwargs={"y": torch.tensor([50, -1])})
    assert network.calls == 4


def test_numpy_numbers_are_numbers(case):
    term = ClassifierGuidance(case.classifier, np.float32(0.5), start=np.int64(3))
    assert term.window(torch.arange(5)).tolist() == [True, True, True, False, False]


def test_the_network_is_left_as_it_was_also_after_an_error(case):
    def broken(x, t, y):
        case.model(x, t, y=y)
        raise RuntimeError("broken")

    for term in (terms(case)["sag"], terms(case)["pag"]):
        with pytest.raises(RuntimeError, match="broken"):
            step(case, [term], model=broken)
        step(case, [term])
    assert all(not block.observers and block.override is None for block in case.model.attention_blocks.values())
