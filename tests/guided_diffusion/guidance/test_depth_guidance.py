"""Depth-aware guidance against its formulas and against finite differences; what the sampler does with descents."""

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, in_float64, with_random_weights
from torch import nn
from torch.nn import functional as F

from guided_diffusion import sampling
from guided_diffusion.capture import capture_features
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    ClassifierGuidance,
    DepthConsistencyGuidance,
    DepthPriorGuidance,
    LossGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StepContext,
)
from guided_diffusion.process import Denoiser
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model_and_diffusion

STRONG, WEAK = ("output.0", "output.1", "output.2"), ("output.1",)
SAMPLERS = ["p_sample", "ddim_sample"]
# A step whose values reach 12 moves by 2.1e-5 from the kernels of one processor to those of another (AVX-512, AVX2,
# SSE4.1), and by 2.0e-5 from a batch of one to a batch of two.
ROUNDING = 1e-4


class Branch(nn.Module):
    """A small depth predictor: (N, 1, 16, 16) of some blocks' maps and the step."""

    def __init__(self, model, blocks):
        super().__init__()
        self.blocks = blocks
        x = torch.zeros(1, 1, 16, 16, dtype=model.dtype)
        with torch.no_grad(), capture_features(model, blocks) as maps:
            model(x, torch.zeros(1), **({"y": torch.tensor([0])} if model.num_classes else {}))
        self.layers = nn.ModuleList(nn.Conv2d(maps[name].shape[1], 8, 1) for name in blocks)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, maps, t):
        kind = self.out.weight.dtype
        hidden = sum(F.interpolate(layer(maps[name].to(kind)), (16, 16), mode="bilinear")
                     for name, layer in zip(self.blocks, self.layers, strict=True))
        return self.out(F.silu(hidden + t.to(kind).reshape(-1, 1, 1, 1) / 1000))


class Predictors(nn.Module):
    def __init__(self, model, **branches):
        super().__init__()
        self.branches = nn.ModuleDict({name: Branch(model, blocks) for name, blocks in branches.items()})
        self.blocks = tuple(dict.fromkeys(name for blocks in branches.values() for name in blocks))


class Prior:
    """A small model of depth maps of 8 x 8."""

    image_size = 8

    def __init__(self):
        self.diffusion = create_gaussian_diffusion()
        self.model = with_random_weights(nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)), seed=5).requires_grad_(False)

    def eps(self, d_tau, tau):
        return self.model(d_tau + tau.reshape(-1, 1, 1, 1) / 1000)


def build(**flags):
    """A network, its process, predictors, a prior, and one step of two images."""
    model, diffusion = create_model_and_diffusion(**{**TINY, "timestep_respacing": "10", **flags})
    with_random_weights(model, seed=1).requires_grad_(False)
    predictors = with_random_weights(Predictors(model, strong=STRONG, weak=WEAK), seed=4).requires_grad_(False)
    x, noise = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(model=model, diffusion=diffusion, predictors=predictors, prior=Prior(), x=x, noise=noise,
                           t=torch.tensor([4, 4]), kwargs={"y": torch.tensor([1, 0])} if model.num_classes else {})


def double(case):
    """The case in float64 where it depends on x."""
    in_float64(case.model)
    case.predictors.double()
    case.prior.model.double()
    case.x, case.noise = case.x.double(), case.noise.double()
    return case


@pytest.fixture(scope="module")
def case():
    return build()


@pytest.fixture(scope="module")
def exact():
    return double(build())


def terms(case, scales=(40.0, 40.0), **options):
    dcg, dpg = scales
    return {"dcg": DepthConsistencyGuidance(case.model, case.predictors, dcg, **options),
            "dpg": DepthPriorGuidance(case.model, case.predictors, case.prior, dpg, **options)}


def step(case, guidance=(), sampler="p_sample", model=None, t=None, **options):
    return getattr(case.diffusion, sampler)(model or case.model, case.x, case.t if t is None else t, noise=case.noise,
                                            model_kwargs=case.kwargs, guidance=guidance, **options)


def descent(case, guidance, sampler="p_sample", **options):
    """What the guidance took from x_{t-1}."""
    return (step(case, sampler=sampler, **options)["sample"]
            - step(case, guidance, sampler, **options)["sample"])


def close(actual, expected, relative):
    assert (actual - expected).norm() < relative * expected.norm()


# The formulas, by hand


def depths(case, x, labels=None):
    """d_S and d_W at images x (M, 1, 16, 16), all at the case's step."""
    t = torch.from_numpy(case.diffusion.timestep_map)[case.t[:1]].expand(len(x))
    with capture_features(case.model, STRONG, graph=True) as maps:
        case.model(x, t, y=case.kwargs["y"] if labels is None else labels)
    return case.predictors.branches["strong"](maps, t), case.predictors.branches["weak"](maps, t)


def dcg_loss(strong, weak, scale=40.0):
    return scale * ((strong - weak) ** 2).mean(dim=(1, 2, 3))


def shrunk(strong):
    """16 x 16 antialiased to 8 x 8: weights 1/8, 3/8, 3/8, 1/8, normalised at the border."""
    weights = torch.zeros(8, 16, dtype=strong.dtype)
    for i in range(8):
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 16:
                weights[i, j] = weight
    weights /= weights.sum(dim=1, keepdim=True)
    return weights @ strong @ weights.T


def eps_phi(case, small, tau, eta):
    """The prior's noise in d_tau; tau: one step."""
    abar = case.prior.diffusion.alphas_cumprod[tau]
    d_tau = math.sqrt(abar) * small + math.sqrt(1 - abar) * eta
    return case.prior.eps(d_tau, torch.full((len(d_tau),), tau))


def dpg_loss(case, strong, tau, eta, scale=40.0):
    """tau: one step."""
    return scale * ((eta - eps_phi(case, shrunk(strong), tau, eta)) ** 2).mean(dim=(1, 2, 3))


PIXELS = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:60]


@pytest.fixture(scope="module")
def moved(exact):
    """d_S and d_W of the first image, and of it with each of PIXELS moved up and down by 1e-5."""
    x, label = exact.x[:1], exact.kwargs["y"][:1]
    change = 1e-5 * torch.eye(256, dtype=x.dtype)[PIXELS].reshape(-1, 1, 16, 16)
    with torch.no_grad():
        return tuple(depths(exact, images, label.expand(len(images))) for images in (x, x + change, x - change))


def finite_differences(case, moved, names, stop_gradient=True):
    """Central differences of the first image's loss in PIXELS; the target of DCG stays where it is, if so asked."""
    (target, _), *sides = moved
    tau, eta = terms(case)["dpg"].draw(torch.tensor([0]), case.t[:1])
    loss = []
    for strong, weak in sides:
        dcg = dcg_loss(target if stop_gradient else strong, weak)
        dpg = dpg_loss(case, strong, int(tau), eta.to(strong))
        loss.append(("dcg" in names) * dcg + ("dpg" in names) * dpg)
    return (loss[0] - loss[1]) / 2e-5


def first(gradient):
    """A gradient of the batch in PIXELS of the first image."""
    return gradient[0].flatten()[PIXELS]


@pytest.mark.parametrize("names", [["dcg"], ["dpg"], ["dcg", "dpg"]], ids="+".join)
def test_gradient_is_that_of_finite_differences(exact, moved, names):
    expected = finite_differences(exact, moved, names)
    assert expected.norm() > 1e-3
    close(first(descent(exact, [terms(exact)[name] for name in names])), expected, 1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_score_distillation_is_the_error_of_the_prior_times_the_jacobian_of_depth(exact, moved, reduction):
    """(eps_phi - eta) d d_S / d x_t, the Jacobian by central differences."""
    (strong, _), (up, _), (down, _) = moved
    tau, eta = terms(exact)["dpg"].draw(torch.tensor([0]), exact.t[:1])
    error = eps_phi(exact, shrunk(strong), int(tau), eta.double()) - eta
    jacobian = (shrunk(up) - shrunk(down)) / 2e-5
    expected = 40 * (error * jacobian).flatten(1).sum(dim=1) / (64 if reduction == "mean" else 1)
    term = DepthPriorGuidance(exact.model, exact.predictors, exact.prior, 40.0, reduction, gradient="score")
    assert expected.norm() > 1e-3
    close(first(descent(exact, [term])), expected, 1e-4)
    full = first(descent(exact, [DepthPriorGuidance(exact.model, exact.predictors, exact.prior, 40.0, reduction)]))
    assert (full - expected).norm() > 0.1 * expected.norm()


def test_by_score_distillation_the_prior_records_no_graph(exact):
    seen = []

    class Watching(Prior):
        def eps(self, d_tau, tau):
            eps = super().eps(d_tau, tau)
            seen.append((d_tau.requires_grad, eps.requires_grad))
            return eps

    prior = Watching()
    prior.model.double()
    for gradient in ("full", "score"):
        term = DepthPriorGuidance(exact.model, exact.predictors, prior, 40.0, gradient=gradient)
        assert descent(exact, [term]).abs().max() > 1e-3
    assert seen == [(True, True), (False, False)]


def test_the_strong_depth_is_a_target_that_gets_no_gradient(exact, moved):
    class NoStop(DepthConsistencyGuidance):
        differentiated = ("strong", "weak")

        def loss(self, ctx, pred):
            return self.reduced((self.depth(ctx, "strong") - self.depth(ctx, "weak")) ** 2)

    right, wrong = (first(descent(exact, [kind(exact.model, exact.predictors, 40.0)]))
                    for kind in (DepthConsistencyGuidance, NoStop))
    without = finite_differences(exact, moved, ["dcg"], stop_gradient=False)
    assert (right - without).norm() > 0.1 * right.norm()
    close(wrong, without, 1e-4)


def test_one_gradient_of_the_sum_is_the_sum_of_the_gradients(exact):
    both, dcg, dpg = (descent(exact, guidance) for guidance in (
        list(terms(exact).values()), [terms(exact)["dcg"]], [terms(exact)["dpg"]]))
    torch.testing.assert_close(both, dcg + dpg, rtol=1e-9, atol=1e-12)


def test_reduction_and_scale_are_factors(exact):
    for name in ("dcg", "dpg"):
        mean = descent(exact, [terms(exact)[name]])
        pixels = 256 if name == "dcg" else 64
        torch.testing.assert_close(descent(exact, [terms(exact, reduction="sum")[name]]), pixels * mean)
        torch.testing.assert_close(descent(exact, [terms(exact, (-10.0, -10.0))[name]]), -mean / 4)


# Samplers and other terms


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_terms_compose_with_all_others(case, sampler):
    """x_{t-1} is that of the other terms minus the gradient; what contrasts and gradients see is unchanged."""
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=2).requires_grad_(False)
    others = [SelfAttentionGuidance(case.model, "output.0", 0.7, 2.0),
              PerturbedAttentionGuidance(case.model, ["middle"], 0.4), ClassifierGuidance(classifier, 3.0)]
    x = case.x.clone().requires_grad_()
    strong, weak = depths(case, x)
    draws = [terms(case)["dpg"].draw(torch.tensor([i]), case.t[:1]) for i in range(2)]
    loss = dcg_loss(strong.detach(), weak).sum() + sum(
        dpg_loss(case, strong[i:i + 1], int(draws[i][0]), draws[i][1]).sum() for i in range(2))
    gradient = torch.autograd.grad(loss, x)[0]
    assert gradient.abs().max() > 1e-3

    expected = step(case, others, sampler)
    for guidance in ([*terms(case).values(), *others], [*others, *reversed(terms(case).values())]):
        out = step(case, guidance, sampler)
        np.testing.assert_allclose(out["sample"], expected["sample"] - gradient, atol=2e-5)
        for name in ("pred_xstart", "pred_xstart_unguided", "eps"):
            np.testing.assert_allclose(out[name], expected[name], atol=2e-5)
        assert not any(value.requires_grad for value in out.values())


@pytest.mark.parametrize("solver", ["dpm-solver++", "unipc"])
def test_depth_terms_at_fractional_steps_of_a_solver(case, solver):
    """At the first step the gradient is taken from the state as in DDIM; the chain ends in other images."""
    def chain(guidance):
        return list(case.diffusion.solver_sample_loop_progressive(
            case.model, case.x.shape, solver=solver, steps=3, noise=case.x, model_kwargs=case.kwargs,
            guidance=guidance))

    plain, guided = chain([]), chain(list(terms(case).values()))
    assert all(out["sample"].isfinite().all() and not out["sample"].requires_grad for out in guided)
    # At the noisiest step x0 is 157 times as far off as eps.
    np.testing.assert_allclose(guided[0]["pred_xstart"], plain[0]["pred_xstart"], atol=1e-3)
    assert (guided[-1]["sample"] - plain[-1]["sample"]).abs().max() > 1e-3


def test_ddim_with_all_its_noise_is_ddpm_with_depth_guidance_too():
    case = build(learn_sigma=False, sigma_small=True)
    guidance = list(terms(case).values())
    np.testing.assert_allclose(step(case, guidance, "ddim_sample", eta=1.0)["sample"],
                               step(case, guidance)["sample"], atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_a_batch_are_guided_each_by_itself(case, sampler):
    denoise = {"ddim_sample": sampling.ddim_step, "p_sample": sampling.ddpm_step}[sampler]

    def sample(which):
        kwargs = {"y": case.kwargs["y"][which]}
        return sampling.sample_step(denoise, Denoiser(case.diffusion, case.model, model_kwargs=kwargs), case.x[which],
                                    case.t[which], lambda: case.noise[which], list(terms(case).values()),
                                    torch.tensor([3, 8])[which])["sample"]

    together = sample([0, 1])
    np.testing.assert_allclose(sample([1, 0]), together[[1, 0]], atol=ROUNDING)
    for i in range(2):
        np.testing.assert_allclose(sample([i]), together[[i]], atol=ROUNDING)


@pytest.mark.parametrize("name", ["dcg", "dpg"])
def test_in_a_batch_of_several_steps_only_images_in_the_window_are_guided(case, name):
    t = torch.tensor([8, 2])
    plain = step(case, t=t)["sample"]
    everywhere = step(case, [terms(case)[name]], t=t)["sample"]
    part = step(case, [terms(case, start=5)[name]], t=t)["sample"]
    np.testing.assert_allclose(part[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(part[1], everywhere[1], atol=1e-5)
    assert all((everywhere - plain)[i].abs().max() > 1e-3 for i in range(2))


def test_what_a_loss_is_outside_its_window_does_not_matter(case):
    class Broken(LossGuidance):
        def loss(self, ctx, pred):
            return pred.eps.sum(dim=(1, 2, 3)) * torch.where(ctx.t == 8, math.nan, 1.0)

    t = torch.tensor([8, 2])
    got = descent(case, [Broken(1.0, start=5)], t=t)
    np.testing.assert_allclose(got[0], 0, atol=1e-6)
    assert got[1].isfinite().all() and got[1].abs().max() > 1e-3


def test_windows_of_several_terms_hold_each_for_itself(case):
    t = torch.tensor([8, 2])
    early = DepthConsistencyGuidance(case.model, case.predictors, 40.0, stop=5)
    late = DepthPriorGuidance(case.model, case.predictors, case.prior, 40.0, start=5)
    got = descent(case, [early, late], t=t)
    one, other = (descent(case, [terms(case)[name]], t=t) for name in ("dcg", "dpg"))
    np.testing.assert_allclose(got[0], one[0], atol=1e-5)
    np.testing.assert_allclose(got[1], other[1], atol=1e-5)


class Watched:
    """A network that counts its calls, and tells whether each recorded a graph."""

    def __init__(self, model):
        self.model, self.graphs = model, []

    def __call__(self, x, t, **kwargs):
        out = self.model(x, t, **kwargs)
        self.graphs.append((x.requires_grad, out.requires_grad))
        return out


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("window", [None, {"start": 4}, {"stop": 5}, {"start": 0}])
def test_off_terms_change_no_bit_and_record_no_graph(case, sampler, window):
    plain = step(case, sampler=sampler)
    off = terms(case, (0, 0.0)) if window is None else terms(case, **window)
    model = Watched(case.model)
    out = step(case, list(off.values()), sampler, model)
    assert all(torch.equal(out[name], plain[name]) for name in plain)
    assert model.graphs == [(False, False)]


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_both_terms_need_one_evaluation_and_only_that_one_has_a_graph(case, outside, monkeypatch):
    model, backward, differentiate = Watched(case.model), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or differentiate(*a, **k))
    sag = SelfAttentionGuidance(case.model, "output.0", 0.7, 2.0)
    with outside():
        out = step(case, [sag, *terms(case).values()], model=model)
    assert model.graphs == [(True, False), (False, False)]          # and that only up to the last block that is read
    assert len(backward) == 1
    assert not any(value.requires_grad for value in out.values())


def test_weights_stay_frozen_unchanged_and_without_gradients(case):
    networks = nn.ModuleList([case.model, case.predictors, case.prior.model])
    before = copy.deepcopy(networks.state_dict())
    for frozen in (True, False):
        networks.requires_grad_(not frozen)
        try:
            step(case, list(terms(case).values()))
            assert all(p.grad is None and p.requires_grad != frozen for p in networks.parameters())
        finally:
            networks.requires_grad_(False)
    after = networks.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpointed_network_gives_the_same_gradient(case):
    checkpointed = build(use_checkpoint=True)
    assert any(getattr(module, "use_checkpoint", False) for module in checkpointed.model.modules())
    sag = [SelfAttentionGuidance(c.model, "output.0", 0.7, 2.0) for c in (case, checkpointed)]
    for extra in ([None, None], sag):
        samples = [step(c, [*terms(c).values(), *([term] if term else [])])["sample"]
                   for c, term in zip((case, checkpointed), extra, strict=True)]
        torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-6)


# Randomness


def test_tau_and_eta_follow_seed_number_and_step_alone(case):
    dpg = terms(case)["dpg"]
    tau, eta = dpg.draw(torch.tensor([3, 7, 7]), torch.tensor([4, 4, 5]))
    assert tau.shape == (3,) and eta.shape == (3, 1, 8, 8)
    again = dpg.draw(torch.tensor([7, 3]), torch.tensor([4, 4]))
    assert torch.equal(again[0], tau[[1, 0]]) and torch.equal(again[1], eta[[1, 0]])
    assert len(set(tau.tolist())) == 3 and len({float(e[0, 0, 0]) for e in eta}) == 3
    other = DepthPriorGuidance(case.model, case.predictors, case.prior, 1.0, seed=1)
    assert not torch.equal(other.draw(torch.tensor([3]), torch.tensor([4]))[1], eta[:1])


def test_tau_is_uniform_in_the_middle_or_a_fraction_of_the_chain(case):
    numbers, t = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    tau, eta = terms(case)["dpg"].draw(numbers, t)
    assert tau.min() >= 20 and tau.min() < 25 and tau.max() <= 979 and tau.max() > 974
    assert np.histogram(tau, 8, (20, 980))[0].min() > 400
    assert abs(float(eta.mean())) < 0.01 and abs(float(eta.std()) - 1) < 0.01
    for fraction, expected in ((0, 0), (0.25, 250), (1.0, 999)):
        fixed = DepthPriorGuidance(case.model, case.predictors, case.prior, 1.0, tau=fraction)
        tau, same = fixed.draw(numbers[:5], t[:5])
        assert tau.tolist() == [expected] * 5 and torch.equal(same, eta[:5])


@pytest.mark.parametrize("size", [16, 24])
def test_depth_is_given_to_the_prior_at_its_own_resolution(case, size):
    """Upsampling is plain bilinear interpolation, and depth of the right size stays as it is."""
    seen = []

    class Larger(Prior):
        image_size = size

        def eps(self, d_tau, tau):
            seen.append(d_tau)
            return super().eps(d_tau, tau)

    dpg = DepthPriorGuidance(case.model, case.predictors, Larger(), 1.0, tau=0.0)
    step(case, [dpg])
    abar = case.prior.diffusion.alphas_cumprod[0]
    depth = (seen[0].detach() - math.sqrt(1 - abar) * dpg.draw(torch.arange(2), case.t)[1]) / math.sqrt(abar)
    strong = depths(case, case.x)[0]
    expected = strong if size == 16 else F.interpolate(strong, (24, 24), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(depth, expected, atol=1e-5)


# Memory


def test_nothing_is_kept_over_many_steps(case):
    diffusion = create_gaussian_diffusion(timestep_respacing="30", learn_sigma=True)
    graphs, alive, tensors = [], [], []

    class Mark(torch.autograd.Function):
        """The identity, with a mark that lives as long as the graph."""

        @staticmethod
        def forward(ctx, x):
            ctx.mark = set()
            graphs.append(weakref.ref(ctx.mark))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def model(x, t, y):
        alive.append(sum(ref() is not None for ref in graphs))
        return case.model(Mark.apply(x), t, y=y)

    sag = SelfAttentionGuidance(case.model, "output.0", 0.1, 2.0, start=15)
    chain = diffusion.ddim_sample_loop_progressive(
        model, case.x[:1].shape, case.x[:1], model_kwargs={"y": torch.tensor([1])}, device="cpu",
        guidance=[sag, *terms(case, (1.0, 1.0)).values()])
    for index, out in enumerate(chain):
        assert not any(value.requires_grad for value in out.values())
        if index in (16, 29):
            gc.collect()
            tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert len(alive) == 45                      # 15 of them for SAG, after the graph of the same step
    assert set(alive) == {0}
    assert tensors[0] == tensors[1]


def test_hooks_are_gone_after_a_step_and_after_an_error(case):
    def broken(x, t, y):
        case.model(x, t, y=y)
        raise RuntimeError("broken")

    step(case, list(terms(case).values()))
    with pytest.raises(RuntimeError, match="broken"):
        step(case, list(terms(case).values()), model=broken)
    assert not any(block._forward_hooks for block in case.model.feature_blocks.values())


# Half precision


@pytest.fixture(scope="module")
def whole():
    """The gradient at scale 40 by the network in float32, and a network to be converted."""
    case = build()
    return descent(case, list(terms(case).values())), case


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_half_precision_networks_give_nearly_the_same_gradient(whole, dtype, tolerance):
    case = SimpleNamespace(**vars(whole[1]))
    case.model = copy.deepcopy(case.model).convert_to(dtype)
    got = descent(case, list(terms(case).values()))
    assert got.isfinite().all()
    close(got, whole[0], tolerance)


def test_scaling_the_loss_keeps_small_gradients_in_float16(monkeypatch):
    case = build()
    small = (1e-4, 1e-4)
    expected = descent_exactly(case, small)
    case.model.convert_to(torch.float16)
    close(descent_exactly(case, small), expected, 0.01)
    monkeypatch.setattr(sampling, "LOSS_SCALES", (1.0,))
    assert (descent_exactly(case, small) - expected).norm() > 0.1 * expected.norm()


def descent_exactly(case, scales=(40.0, 40.0)):
    """The gradient itself, (N, C, H, W), not its rounded difference to a sample."""
    active = [(term, torch.tensor([True, True])) for term in terms(case, scales).values()]
    denoise = Denoiser(case.diffusion, case.model, model_kwargs=case.kwargs)
    return sampling._evaluated_with_losses(StepContext(denoise, case.x, case.t, torch.arange(2)), active)[2]


def test_large_gradients_in_float16_are_scaled_less_for_each_image_alone(monkeypatch):
    case = build()
    case.kwargs, case.x[1] = {"y": torch.tensor([1, 1])}, case.x[0]
    factors = torch.tensor([1.0, 2e6])

    class Uneven(DepthConsistencyGuidance):
        def loss(self, ctx, pred):
            return super().loss(ctx, pred) * factors[ctx.image_ids]

    def gradient(numbers):
        denoise = Denoiser(case.diffusion, case.model, model_kwargs={"y": case.kwargs["y"][:len(numbers)]})
        ctx = StepContext(denoise, case.x[:len(numbers)], case.t[:len(numbers)], torch.tensor(numbers))
        active = [(Uneven(case.model, case.predictors, 1.0), torch.ones(len(numbers), dtype=torch.bool))]
        return sampling._evaluated_with_losses(ctx, active)[2]

    expected = gradient([0, 1])
    case.model.convert_to(torch.float16)
    got = gradient([0, 1])
    for i in range(2):
        close(got[i], expected[i], 0.01)
    close(gradient([0])[0], got[0], 0.005)
    monkeypatch.setattr(sampling, "LOSS_SCALES", sampling.LOSS_SCALES[:1])
    once = gradient([0, 1])
    assert torch.equal(once[0], got[0]) and not once[1].isfinite().all()


def test_scaling_the_loss_changes_no_bit_in_float32(case, monkeypatch):
    scaled = descent_exactly(case)
    monkeypatch.setattr(sampling, "LOSS_SCALES", (1.0,))
    assert torch.equal(descent_exactly(case), scaled)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gradient_that_stays_infinite_is_named_by_step_and_image(case, sampler):
    class Broken(LossGuidance):
        def loss(self, ctx, pred):
            return pred.eps.sum(dim=(1, 2, 3)) * torch.where(ctx.image_ids == 1, math.inf, 1.0)

    with pytest.raises(sampling.NonFiniteError, match=r"step 3.*image 1$"):
        getattr(case.diffusion, f"{sampler}_loop")(case.model, case.x.shape, case.x, model_kwargs=case.kwargs,
                                                   device="cpu", guidance=[Broken(1.0, start=4)])


# Mistakes


@pytest.mark.parametrize("name", ["dcg", "dpg"])
def test_guidance_by_another_network_than_the_one_sampled_is_refused(case, name):
    with pytest.raises(UserError, match=r"saw no evaluation of output\.0, output\.1.*network that is sampled"):
        step(case, [terms(case)[name]], model=copy.deepcopy(case.model))


def test_a_network_that_records_no_graph_is_refused(case):
    with pytest.raises(UserError, match="DepthConsistencyGuidance: the loss does not depend on x_t"):
        step(case, [terms(case)["dcg"]], model=torch.no_grad()(lambda x, t, y: case.model(x, t, y=y)))


@pytest.mark.parametrize(("options", "said"), [
    ({"reduction": "max"}, r"reduction 'max': must be one of mean, sum"),
    ({"scale": math.nan}, r"DepthPriorGuidance scale nan: must be a finite number"),
    ({"start": "all"}, r"start 'all': must be a finite number"),
    ({"tau": 1.5}, r"tau 1\.5: must be a fraction of the prior's chain from 0 to 1, or None"),
    ({"tau": -0.1}, r"tau -0\.1"), ({"tau": math.nan}, r"tau nan"), ({"tau": "0.5"}, r"tau '0\.5'"),
    ({"tau": True}, r"tau True"),
    ({"gradient": "half"}, r"gradient 'half': must be one of full, score"),
])
def test_bad_arguments_are_named(case, options, said):
    given = {"model": case.model, "predictors": case.predictors, "prior": case.prior, "scale": 1.0, **options}
    with pytest.raises(UserError, match=said):
        DepthPriorGuidance(**given)


def test_predictors_that_do_not_fit_are_refused(case):
    strong = Predictors(case.model, strong=STRONG)
    DepthPriorGuidance(case.model, strong, case.prior, 1.0)
    with pytest.raises(UserError, match="have no branch 'weak'; there are: strong"):
        DepthConsistencyGuidance(case.model, strong, 1.0)
    case.predictors.blocks, blocks = (*STRONG, "output.8"), case.predictors.blocks
    try:
        with pytest.raises(UserError, match=r"'output\.8' is no block of this network.*output\.3"):
            DepthConsistencyGuidance(case.model, case.predictors, 1.0)
    finally:
        case.predictors.blocks = blocks
