"""DPM-Solver++ and UniPC: recorded runs of three codes, DDIM as their first order, their orders, guidance in them."""

import json
import math
import re

import numpy as np
import pytest
import torch
from golden import cases
from mixture import Mixture
from networks import TINY, TINY_CLASSIFIER, normal, with_random_weights
from networks import TINY_SHAPE as SHAPE

from guided_diffusion import sampling
from guided_diffusion.errors import UserError
from guided_diffusion.grids import GridProcess, log_snr
from guided_diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CleanClassifierGuidance,
    IndependentConditionGuidance,
    PerturbedAttentionGuidance,
    ProjectedGuidance,
    Rescale,
    SelfAttentionGuidance,
    SmoothedEnergyGuidance,
    TimestepGuidance,
)
from guided_diffusion.process import DiffusionProcess, dynamically_thresholded
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model_and_diffusion
from guided_diffusion.solvers import DEFAULT_STEPS, solver_options
from guided_diffusion.terms import LossGuidance

# The recorded runs are in float64, or in float32 on chains: 3e-5 was seen.
RECORDED = 2e-4
CASES = [(path, number) for path in cases("solvers_*.npz")
         for number in range(len(json.loads(str(np.load(path)["cases"]))))]
# Recorded runs


@pytest.mark.parametrize(("path", "number"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_recorded_runs(path, number, monkeypatch):
    recorded = np.load(path)
    case = json.loads(str(recorded["cases"]))[number]
    mixture, seen, y = Mixture(seed=case["mixture"]), [], torch.arange(4)
    diffusion = create_gaussian_diffusion(timestep_respacing=case.get("respacing", ""))
    x_T = torch.from_numpy(np.random.default_rng(case["seed"]).standard_normal((4, 3, 4, 4))).float()
    draws = iter(range(case["seed"] * 100 + 1, case["seed"] * 100 + 100))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.from_numpy(
        np.random.default_rng(next(draws)).standard_normal(x.shape, dtype=np.float32)))

    def model(x, t):
        seen.append(t[0].item())
        return mixture.eps(x, t)

    x0 = diffusion.solver_sample_loop(
        model, x_T.shape, solver=case["solver"], order=case["order"], variant=case.get("variant", "bh2"),
        steps=case.get("steps", 20), grid=case.get("grid", "chain").lower().replace("_", "-"),
        eta=case.get("eta", 0.0), noise=x_T, clip_denoised=False,
        dynamic_threshold=0.995 if case.get("dynamic") else None,
        cond_fn=(lambda x, t: case["cg"] * mixture.grad(x, t, y)) if case["cg"] else None)
    np.testing.assert_allclose(x0, recorded[f"x0_{number}"], rtol=0, atol=RECORDED)
    np.testing.assert_allclose(seen, recorded[f"t_{number}"], rtol=0, atol=1e-3)


# Orders


@pytest.mark.parametrize("grid", ["chain", "time-uniform"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_first_order_is_ddim(network, grid, eta):
    model, diffusion = network
    kwargs = {"model_kwargs": {"y": torch.tensor([0, 1])}, "noise": normal(0)}
    process = diffusion if grid == "chain" else GridProcess(diffusion, grid, 10)
    denoise = process.denoiser(model, model_kwargs=kwargs["model_kwargs"])
    step = sampling.DdimOptions(eta=eta).step()
    torch.manual_seed(0)
    ddim = list(sampling.sample_chain(step, denoise, kwargs["noise"], lambda index: torch.randn(2, *SHAPE)))
    torch.manual_seed(0)
    solver = list(diffusion.solver_sample_loop_progressive(
        model, (2, *SHAPE), order=1, steps=10, grid=grid, eta=eta, **kwargs))
    assert len(solver) == len(ddim) == 10
    for one, other in zip(solver, ddim, strict=True):
        assert torch.equal(one["sample"], other["sample"])


def process_at(lambdas):
    """The linear schedule of 1,000 steps at these lambda, which fall from where the chain ends to where it begins."""
    base = create_gaussian_diffusion()
    abar = 1 / (1 + np.exp(-2 * lambdas))
    process = DiffusionProcess(
        betas=1 - abar[1:] / abar[:-1], model_mean_type=base.model_mean_type, model_var_type=base.model_var_type,
        loss_type=base.loss_type, last_alphas_cumprod=float(abar[0]))
    process.timestep_map = np.interp(-np.log(abar[1:]), -np.log(base.alphas_cumprod), np.arange(1000))
    return process


def at_order(solver, order, steps):
    """Images (4, 3, 4, 4) of the analytic model, by so many steps of the same length in lambda.

    A multistep solver begins with lower orders, whose errors would hide the third: so the first step is cut.
    """
    lambdas = np.linspace(*log_snr(create_gaussian_diffusion().alphas_cumprod[[0, -1]]), steps + 1)
    cuts = lambdas[-1] + (lambdas[0] - lambdas[1]) * 2.0 ** -np.arange(1, 9)
    process, mixture = process_at(np.concatenate([lambdas[:-1], cuts, lambdas[-1:]])), Mixture(seed=3)
    options = solver_options(solver, order, "bh2", DEFAULT_STEPS, "chain", 0.0, None)
    x_T = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    denoise = process.denoiser(lambda x, t: mixture.eps(x, t), clip_denoised=False)
    return sampling.last(sampling.sample_chain(options.step(), denoise, x_T.double(), lambda index: x_T))["sample"]


@pytest.fixture(scope="module")
def thousand_steps():
    return at_order("unipc", 2, 1000)


# The official third order of DPM-Solver++ halves the second difference: it is better than the second, but no third.
@pytest.mark.parametrize(("solver", "order", "measured"), [
    ("dpm-solver++", 1, 1), ("dpm-solver++", 2, 2), ("dpm-solver++", 3, 2.4), ("unipc", 2, 2), ("unipc", 3, 3)])
def test_orders_of_convergence(solver, order, measured, thousand_steps):
    coarse, fine = (float((at_order(solver, order, steps) - thousand_steps).square().mean()) ** 0.5
                    for steps in (20, 40))
    assert math.log2(coarse / fine) > measured - 0.2


# Grids


@pytest.mark.parametrize("grid", ["time-uniform", "logsnr", "time-quadratic"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_grids_go_from_the_last_step_to_step_0(schedule, grid):
    base = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing="50")
    whole = create_gaussian_diffusion(noise_schedule=schedule)
    process = GridProcess(base, grid, 12)
    assert process.num_timesteps == 12
    assert process.alphas_cumprod_prev[0] == whole.alphas_cumprod[0]
    places = process.timestep_map
    assert (np.diff(places) > 0).all() and places[0] > 0
    # Of the cosine schedule the noisiest steps are left out, as in the official codes.
    last = int((log_snr(whole.alphas_cumprod) >= -5.1).sum()) - 1
    assert places[-1] == last == (999 if schedule == "linear" else 995)
    np.testing.assert_allclose(process.alphas_cumprod[-1], whole.alphas_cumprod[last])
    log_abar = np.interp(places, np.arange(1000), np.log(whole.alphas_cumprod))
    np.testing.assert_allclose(np.log(process.alphas_cumprod), log_abar)
    uniform = {"time-uniform": places, "time-quadratic": np.sqrt(places + 1), "logsnr": log_snr(process.alphas_cumprod)}
    steps = np.diff(uniform[grid])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


def test_rescaled_steps_are_fractions_too():
    process = GridProcess(create_gaussian_diffusion(steps=500, rescale_timesteps=True), "time-uniform", 4)
    np.testing.assert_allclose(process.model_timesteps(torch.arange(4)), 2 * process.timestep_map)


# x0 and guidance


def test_dynamic_thresholding_by_hand():
    x = torch.stack([scale * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)) for scale in (0.1, 1, 4)])
    for quantile in (0.5, 0.9, 0.995, 1.0):
        limit = x.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1)[:, None, None, None]
        expected = torch.minimum(torch.maximum(x, -limit), limit) / limit
        np.testing.assert_allclose(dynamically_thresholded(x, quantile), expected, rtol=1e-6)


class Pull(LossGuidance):
    """Adds a constant to the next state."""

    def loss(self, ctx, pred):
        return self.scale * (ctx.x_t + 0 * pred.eps).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_what_losses_take_from_the_state_is_missing_in_the_corrected_one_too(variant):
    """Two steps of UniPC by hand: predicted, corrected by half the change of x0, and the last one."""
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    (first, second), x_T = list(diffusion.solver_sample_loop_progressive(
        lambda x, t: 0.3 * x * (t[0] / 1000 + 0.1), (2, *SHAPE), solver="unipc", variant=variant, steps=2,
        grid="time-uniform", noise=normal(0), clip_denoised=False, guidance=[Pull(0.5)], device="cpu")), normal(0)
    process = GridProcess(diffusion, "time-uniform", 2)
    alpha, sigma = np.sqrt(process.alphas_cumprod), np.sqrt(1 - process.alphas_cumprod)
    end, lambdas = process.alphas_cumprod_prev[0], log_snr(process.alphas_cumprod)
    eps = [0.3 * (process.timestep_map[i] / 1000 + 0.1) for i in range(2)]

    def x0(x, i):
        return (x - sigma[i] * eps[i] * x) / alpha[i]

    h = lambdas[0] - lambdas[1]
    predicted = sigma[0] / sigma[1] * x_T - alpha[0] * np.expm1(-h) * x0(x_T, 1) - 0.5
    np.testing.assert_allclose(first["sample"], predicted, rtol=1e-4, atol=1e-3)
    scale = -h if variant == "bh1" else np.expm1(-h)
    corrected = predicted - alpha[0] * scale * 0.5 * (x0(predicted, 0) - x0(x_T, 1))
    h = log_snr(end) - lambdas[0]
    last = np.sqrt(1 - end) / sigma[0] * corrected - np.sqrt(end) * np.expm1(-h) * x0(predicted, 0) - 0.5
    np.testing.assert_allclose(second["sample"], last, rtol=1e-4, atol=1e-3)


def test_the_guided_x0_is_clipped():
    """A gradient that leads far out ends in the corners, and so does a contrast."""
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    for out in diffusion.solver_sample_loop_progressive(
            lambda x, t: x, (2, *SHAPE), steps=4, noise=normal(0), cond_fn=lambda x, t: torch.full_like(x, 1e3)):
        assert (out["pred_xstart"] == 1).all()


@pytest.mark.parametrize("options", [
    {"solver": "dpm-solver++", "order": 3, "steps": 4}, {"solver": "unipc", "order": 2, "steps": 4, "grid": "logsnr"},
    {"solver": "dpm-solver++", "eta": 1.0, "grid": "chain"}], ids=lambda options: "-".join(map(str, options.values())))
def test_every_term_composes_at_fractional_steps(network, options):
    model, diffusion = network
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER)).requires_grad_(False)
    guidance = [SelfAttentionGuidance(model, "output.1", 0.5, 1.0, mask="random"),
                PerturbedAttentionGuidance(model, ["middle"], 0.5, start=3), ClassifierGuidance(classifier, 1.0),
                Pull(0.01, stop=1)]
    kwargs = {"noise": normal(0), "model_kwargs": {"y": torch.tensor([0, 1])}, **options}

    def sample(terms):
        torch.manual_seed(0)
        return diffusion.solver_sample_loop(model, (2, *SHAPE), guidance=terms, **kwargs)

    plain, samples = sample([]), [sample(guidance), *(sample([term]) for term in guidance)]
    assert all(one.isfinite().all() and not torch.equal(one, plain) for one in samples)
    assert torch.equal(plain, sample([Pull(0.0)]))


class Counted(torch.nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *inputs, **conditions):
        self.calls += 1
        return self.network(*inputs, **conditions)


@pytest.mark.parametrize("options", [
    {"solver": "dpm-solver++"}, {"solver": "unipc"}, {"solver": "dpm-solver++", "eta": 1.0}],
                         ids=["DPM-Solver++", "UniPC", "SDE-DPM-Solver++"])
def test_terms_of_labels_embeddings_and_other_networks_compose_in_solvers_too(options):
    model, diffusion = create_model_and_diffusion(**TINY, null_class=True)
    with_random_weights(model, seed=1).requires_grad_(False)
    sampled, weak, clean = Counted(model), Counted(lambda x, t, y: model(x / 2, t, y)), Counted(
        lambda x: x.flatten(1)[:, :2])

    def terms(scale):
        return [SmoothedEnergyGuidance(model, ["output.0"], 20 * scale), TimestepGuidance(model, scale, 0.5),
                IndependentConditionGuidance(scale, 2, seed=1), ClassifierFreeGuidance(scale, model.null_label),
                AutoGuidance(weak, scale), CleanClassifierGuidance(clean, scale)]

    def sample(guidance):
        torch.manual_seed(0)
        sampled.calls = weak.calls = clean.calls = 0
        return diffusion.solver_sample_loop(sampled, (2, *SHAPE), guidance=guidance, steps=3, noise=normal(0),
                                            model_kwargs={"y": torch.tensor([0, 1])}, device="cpu", **options)

    plain, evaluations = sample([]), sampled.calls
    transforms = [ProjectedGuidance(0.2, 5.0, -0.5), Rescale(0.7)]
    assert torch.equal(sample([*terms(0.0), *transforms]), plain)
    assert (sampled.calls, weak.calls, clean.calls) == (evaluations, 0, 0)
    contrast = terms(0.5)[3]
    alone = [sample([term]) for term in terms(0.5)]
    guided = sample([contrast])
    changed = [sample([contrast, term]) for term in transforms]
    assert all(one.isfinite().all() and not torch.equal(one, plain) for one in [*alone, *changed])
    assert not any(torch.equal(one, guided) for one in changed)
    everything = sample([*terms(0.5), *transforms])
    assert (sampled.calls, weak.calls, clean.calls) == (5 * evaluations, evaluations, evaluations)
    assert everything.isfinite().all() and not any(torch.equal(everything, one) for one in [plain, *alone, *changed])


def test_chains_do_not_know_each_other(network):
    """Steps of two chains in turn are those of each alone, also of one that was broken off before."""
    model, diffusion = network

    def chain(seed):
        return diffusion.solver_sample_loop_progressive(
            model, (2, *SHAPE), solver="unipc", order=3, steps=5, noise=normal(seed),
            model_kwargs={"y": torch.tensor([0, 1])})

    one, other = list(chain(0)), list(chain(1))
    next(chain(2))
    for first, second, (a, b) in zip(chain(0), chain(1), zip(one, other, strict=True), strict=True):
        assert torch.equal(first["sample"], a["sample"]) and torch.equal(second["sample"], b["sample"])


def test_a_step_used_again_forgets_the_chain_before(network):
    model, diffusion = network
    options = solver_options("unipc", 2, "bh2", 4, "logsnr", 0.0, None)
    denoise = options.process(diffusion).denoiser(model, model_kwargs={"y": torch.tensor([0, 1])})
    step = options.step()
    one, other = (sampling.last(sampling.sample_chain(step, denoise, normal(0), normal))["sample"] for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="all images of a batch through the same steps"):
        sampling.sample_step(step, denoise, normal(0), torch.tensor([0, 1]), lambda: normal(1))


# What is refused


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "heun"}, "solver 'heun': must be one of dpm-solver++, unipc"),
    ({"order": 4}, "--solver_order 4: must be one of 1, 2, 3"),
    ({"order": 3, "steps": 2}, "--sampling_steps 2: must be at least 3, the --solver_order"),
    ({"grid": "karras"}, "--solver_grid karras: must be one of chain, time-uniform, logsnr, time-quadratic"),
    ({"solver": "unipc", "eta": 1.0}, "eta 1.0: is an option of DPM-Solver++, and the solver is unipc"),
    ({"variant": "bh1"}, "variant bh1: is an option of UniPC, and the solver is dpm-solver++"),
    ({"solver": "unipc", "variant": "bh3"}, "--solver_variant bh3: must be one of bh1, bh2"),
    ({"eta": 0.5}, "--solver_eta 0.5: must be one of"),
    ({"eta": 1.0, "order": 3}, "has the orders 1 and 2"),
    ({"steps": 10**6}, "--sampling_steps 1000000: must be at most 100000"),
    ({"steps": 0}, "--sampling_steps 0: must be at least 1"),
    ({"steps": 9, "grid": "chain"}, "--sampling_steps 9: with --solver_grid chain it must be the number of steps"),
    ({"dynamic_threshold": 1.5}, "--dynamic_threshold 1.5: must be at most 1"),
])
def test_refused(options, message):
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    with pytest.raises(UserError, match=re.escape(message)):
        diffusion.solver_sample_loop_progressive(lambda x, t: x, (2, *SHAPE), **options)
