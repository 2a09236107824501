import functools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from networks import TINY_SHAPE as SHAPE
from networks import normal, with_random_weights

from guided_diffusion import sampling
from guided_diffusion.errors import NonFiniteError, UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ProjectedGuidance,
    Rescale,
    SelfAttentionGuidance,
)
from guided_diffusion.process import Denoiser
from guided_diffusion.rng import image_labels, image_noise
from guided_diffusion.sampling import sample_chain, sample_step
from guided_diffusion.schedules import get_named_beta_schedule
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion
from guided_diffusion.terms import (
    ContrastGuidance,
    FunctionGuidance,
    GradientGuidance,
    Guidance,
    Inputs,
    LossGuidance,
    StepContext,
    TransformGuidance,
)


def half(x, t, **kwargs):
    """A network without weights: eps is half of x."""
    return x / 2


# One step


@pytest.mark.parametrize("step", [0, 1, 6])
def test_ddpm_step_by_hand(step):
    diffusion = create_gaussian_diffusion(timestep_respacing="10", sigma_small=True)
    x, noise, t = normal(0), normal(1), torch.full((2,), step)
    out = diffusion.p_sample(half, x, t, noise=noise)
    abar, before = diffusion.alphas_cumprod[step], np.append(1.0, diffusion.alphas_cumprod)[step]
    beta = 1 - abar / before
    x0 = ((x - math.sqrt(1 - abar) * x / 2) / math.sqrt(abar)).clamp(-1, 1)
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - abar)
    deviation = math.sqrt(beta * (1 - before) / (1 - abar))
    np.testing.assert_allclose(out["pred_xstart"], x0, atol=1e-5)
    np.testing.assert_allclose(out["sample"], mean + deviation * noise, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("schedule", "steps"), [("linear", "10"), ("cosine", "7")])    # of which it is the noisiest
def test_ddim_step_by_hand(schedule, steps, eta):
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=steps)
    x, noise, t = normal(0), normal(1), torch.full((2,), 6)
    out = diffusion.ddim_sample(half, x, t, noise=noise, eta=eta)
    abar, before = diffusion.alphas_cumprod[6], diffusion.alphas_cumprod[5]
    x = x.double()
    x0 = ((x - math.sqrt(1 - abar) * x / 2) / math.sqrt(abar)).clamp(-1, 1)
    eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    sigma = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
    expected = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps + sigma * noise
    np.testing.assert_allclose(out["sample"], expected, atol=1e-5)


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
def test_no_noise_at_the_last_step_of_each_image(sampler):
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    options = {"eta": 1.0} if sampler == "ddim_sample" else {}
    one, other = (getattr(diffusion, sampler)(half, normal(0), torch.tensor([0, 5]), noise=noise, **options)["sample"]
                  for noise in (normal(1), normal(2)))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
def test_a_batch_of_several_steps_is_each_image_at_its_own(network, sampler):
    model, diffusion = network
    x, noise, t, y = normal(0, 3), normal(1, 3), torch.tensor([9, 0, 4]), torch.tensor([0, 1, 1])
    together = getattr(diffusion, sampler)(model, x, t, noise=noise, model_kwargs={"y": y})
    for i in range(3):
        i = slice(i, i + 1)
        alone = getattr(diffusion, sampler)(model, x[i], t[i], noise=noise[i], model_kwargs={"y": y[i]})
        np.testing.assert_allclose(together["sample"][i], alone["sample"], atol=1e-5)


def test_noise_is_drawn_where_it_is_not_given():
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    x, t = normal(0), torch.full((2,), 6)
    torch.manual_seed(3)
    drawn = diffusion.p_sample(half, x, t)["sample"]
    torch.manual_seed(3)
    assert torch.equal(drawn, diffusion.p_sample(half, x, t, noise=torch.randn_like(x))["sample"])


# Chains


def test_the_chain_runs_through_all_steps_and_the_network_sees_original_ones():
    diffusion = create_gaussian_diffusion(timestep_respacing="ddim5")
    seen, asked = [], []

    def network(x, t):
        seen.append(t.tolist())
        return x / 2

    def noise_at(index):
        asked.append(index)
        return normal(index)

    out = list(sample_chain(sampling.ddpm_step, Denoiser(diffusion, network), normal(9), noise_at))
    assert seen == [[step, step] for step in (800, 600, 400, 200, 0)]
    assert len(out) == 5 and asked == [4, 3, 2, 1, 0]
    asked.clear()
    list(sample_chain(sampling.ddim_step, Denoiser(diffusion, network), normal(9), noise_at))
    assert not asked


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", "9"), ("linear", "2")])
def test_ddim_with_all_noise_survives_rounding_at_the_noisiest_step(schedule, steps):
    """There sigma squared is 1 - abar of the step before but for a rounding, which may go either way."""
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=steps)
    assert diffusion.ddim_sample_loop(half, (1, 1, 2, 2), normal(0)[:1, :1, :2, :2], eta=1.0).isfinite().all()


@pytest.mark.parametrize("flags", [{}, {"predict_v": True}, {"predict_xstart": True}], ids=["eps", "v", "x0"])
def test_a_contrast_of_zero_changes_no_bit_at_the_noisiest_step(flags):
    """There x0 of eps has the rounding of eps 20,000 times."""
    class Zero(ContrastGuidance):
        def delta(self, ctx, pred):
            return torch.zeros_like(pred.eps)

    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="9", **flags)
    x, t = normal(0), torch.tensor([8, 8])
    plain, guided = (diffusion.ddim_sample(half, x, t, clip_denoised=False, guidance=guidance)
                     for guidance in ([], [Zero(1.0)]))
    assert torch.equal(guided["pred_xstart"], plain["pred_xstart"])
    assert torch.equal(guided["sample"], plain["sample"])


@pytest.mark.parametrize("transforms", [[], [Rescale(0.7)], [ProjectedGuidance(0.0, 0.5)]], ids=["", "rescale", "APG"])
@pytest.mark.parametrize("flag", ["predict_xstart", "predict_v"])
def test_guidance_of_networks_that_predict_no_eps_keeps_the_digits_of_x0(flag, transforms):
    """At the noisiest step of the cosine schedule an eps made of x0 has lost them: abar is 2.4e-9 there."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", **{flag: True})
    abar, x, t = float(diffusion.alphas_cumprod[-1]), normal(0).double(), torch.full((2,), 999)
    said = {label: normal(1 + label).double() / 10 for label in (0, 1)}         # x0 of each label

    def output(x0):
        return x0 if flag == "predict_xstart" else (math.sqrt(abar) * x - x0) / math.sqrt(1 - abar)

    def network(x_t, t, y):
        return output(said[int(y[0])]).float()

    denoise = Denoiser(diffusion, network, model_kwargs={"y": torch.tensor([0, 0])})
    found = sample_step(sampling.ddpm_step, denoise, x.float(), t, lambda: normal(3),
                        [ClassifierFreeGuidance(3.0, 1), *transforms])
    change = 3 * (said[0] - said[1])
    if transforms and isinstance(transforms[0], ProjectedGuidance):
        norms = [value.flatten(1).norm(dim=1).reshape(2, 1, 1, 1) for value in (change, said[0])]
        change, direction = change * 0.5 / norms[0], said[0] / norms[1]
        change = change - (change * direction).sum((1, 2, 3), keepdim=True) * direction
    expected = output(said[0] + change)
    if transforms and isinstance(transforms[0], Rescale):
        deviations = [value.flatten(1).std(dim=1).reshape(2, 1, 1, 1) for value in (output(said[0]), expected)]
        expected = expected * (0.3 + 0.7 * deviations[0] / deviations[1])
    x0 = expected if flag == "predict_xstart" else math.sqrt(abar) * x - math.sqrt(1 - abar) * expected
    np.testing.assert_allclose(found["pred_xstart"], x0.clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop", "solver_sample_loop"])
def test_a_start_in_half_precision_goes_on_in_float32(sampler, dtype):
    diffusion = create_gaussian_diffusion(timestep_respacing="5")
    start = normal(0).to(dtype)
    found, expected = (getattr(diffusion, sampler)(half, None, noise=x, guidance=[zero_contrast()])
                       for x in (start, start.float()))
    if sampler == "p_sample_loop":                      # which draws noise of its own
        assert found.dtype == torch.float32
    else:
        assert torch.equal(found, expected)


def test_conditioning_by_hand_is_what_samplers_do(network):
    model, diffusion = network
    x, t, kwargs = normal(0), torch.tensor([3, 7]), {"y": torch.tensor([0, 1])}
    seen = []

    def cond_fn(x, t, y):
        seen.append(t)
        return 0.1 * torch.tanh(x) * (1 + y[:, None, None, None])

    options = {"clip_denoised": False, "model_kwargs": kwargs}
    with torch.no_grad():
        plain = diffusion.p_mean_variance(model, x, t, **options)
        ddpm = diffusion.p_sample(model, x, t, noise=torch.zeros_like(x), cond_fn=cond_fn, **options)
        ddim = diffusion.ddim_sample(model, x, t, cond_fn=cond_fn, **options)
        mean = diffusion.condition_mean(cond_fn, plain, x, t, kwargs)
        score = diffusion.condition_score(cond_fn, plain, x, t, kwargs)
    assert torch.allclose(mean, ddpm["sample"], atol=1e-5) and not torch.allclose(mean, plain["mean"], atol=1e-3)
    assert torch.allclose(score["pred_xstart"], ddim["pred_xstart"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(score["mean"], diffusion.posterior_mean(ddim["pred_xstart"], x, t), rtol=1e-4, atol=1e-4)
    assert torch.equal(score["variance"], plain["variance"])
    assert len(seen) == 4 and all(torch.equal(one, diffusion.model_timesteps(t)) for one in seen)


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
def test_loops_are_their_steps_in_turn(network, sampler, capfd):
    model, diffusion = network
    kwargs, x_T = {"y": torch.tensor([0, 1])}, normal(0)
    torch.manual_seed(1)
    options = {"clip_denoised": False, "denoised_fn": lambda x: 0.9 * x, "cond_fn": lambda x, t, y: 0.1 * x,
               "model_kwargs": kwargs}
    x = x_T
    steps = []
    for index in reversed(range(10)):
        with torch.no_grad():
            x = getattr(diffusion, sampler)(model, x, torch.full((2,), index), **options)["sample"]
        steps.append(x)
    torch.manual_seed(1)
    loop = getattr(diffusion, f"{sampler}_loop_progressive")(model, x_T.shape, x_T, **options)
    for expected, out in zip(steps, loop, strict=True):
        assert torch.equal(out["sample"], expected)
    torch.manual_seed(1)
    last = getattr(diffusion, f"{sampler}_loop")(model, x_T.shape, noise=x_T, device="cpu", progress=True, **options)
    assert torch.equal(last, steps[-1]) and not last.requires_grad
    torch.manual_seed(1)
    placed = getattr(diffusion, f"{sampler}_loop")(model, x_T.shape, x_T, *options.values())
    assert torch.equal(placed, last)
    assert "10 of 10 steps" in capfd.readouterr().err


def test_loop_draws_its_start_and_says_nothing_unless_asked(network, capfd):
    model, diffusion = network
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(diffusion.ddim_sample_loop(model, (1, *SHAPE), model_kwargs={"y": torch.tensor([1])}))
    assert results[0].shape == (1, *SHAPE)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert capfd.readouterr() == ("", "")


# Images by number


@pytest.mark.parametrize(("step", "mask"), [(sampling.ddpm_step, "self-attention"), (sampling.ddim_step, "random")])
def test_an_image_is_a_function_of_seed_and_number_alone(network, tiny_classifier_flags, step, mask):
    model, _ = network
    diffusion = create_gaussian_diffusion(timestep_respacing="4", learn_sigma=True)
    classifier = with_random_weights(create_classifier(**tiny_classifier_flags), seed=1)
    guidance = [SelfAttentionGuidance(model, "output.0", 0.5, 2.0, mask=mask), ClassifierGuidance(classifier, 2.0)]

    def sample(numbers):
        denoise = Denoiser(diffusion, model, model_kwargs={"y": image_labels(7, numbers, 2)})
        chain = sample_chain(step, denoise, image_noise(7, numbers, 4, SHAPE),
                             lambda index: image_noise(7, numbers, index, SHAPE), guidance, torch.tensor(numbers))
        return sampling.last(chain)["sample"]

    together = sample([0, 1, 2])
    assert torch.equal(sample([0, 1, 2]), together)
    np.testing.assert_allclose(sample([2, 0]), together[[2, 0]], atol=1e-4)


def test_last_counts_the_steps():
    ticks = []
    out = sampling.last(iter([{"sample": 1}, {"sample": 2}]), lambda: ticks.append(1))
    assert out == {"sample": 2} and len(ticks) == 2


# NaN


@pytest.mark.parametrize("step", [sampling.ddpm_step, sampling.ddim_step])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_by_step_and_image(value, step):
    diffusion = create_gaussian_diffusion(timestep_respacing="10")

    def network(x, t):
        out = x / 2
        if t[0] < 500:
            out[1, 0, 3, 4] = out[2, 0, 0, 0] = value
        return out

    chain = sample_chain(step, Denoiser(diffusion, network), normal(0, 4), lambda index: normal(index, 4),
                         image_ids=torch.tensor([20, 21, 22, 23]))
    for _ in range(5):                              # original steps 999, 888, ..., 555
        next(chain)
    with pytest.raises(NonFiniteError, match=r"step 4.*image 21, 22$"):
        next(chain)


def test_loops_raise_for_nan_too():
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    with pytest.raises(NonFiniteError, match=r"step 9.*image 0, 1"):
        diffusion.p_sample_loop(lambda x, t: x * math.nan, (2, *SHAPE), device="cpu")


# Terms that are not right


class Returns(GradientGuidance):
    def gradient(self, ctx, pred):
        return self.value(ctx.x_t)


class Loss(LossGuidance):
    def loss(self, ctx, pred):
        return self.value(pred.pred_xstart)


class Contrast(ContrastGuidance):
    def delta(self, ctx, pred):
        return self.value(ctx.x_t)


class Transform(TransformGuidance):
    def transform(self, ctx, pred, delta):
        return self.value(delta)


@pytest.mark.parametrize(("kind", "what", "shape"), [
    (Returns, "gradient", "(3, 2, 4, 4)"), (Loss, "loss", "(3,)"), (Contrast, "delta", "(3, 2, 4, 4)"),
    (Transform, "transform", "(3, 2, 4, 4)")])
@pytest.mark.parametrize("value", [lambda x: x.square().sum(), lambda x: x[:1], lambda x: x.flatten(1)[:, :1],
                                   lambda x: 0.5])
def test_a_term_must_return_a_value_for_each_image(kind, what, shape, value):
    term = kind(1.0)
    term.value = value
    terms = [term] if kind is not Transform else [zero_contrast(), term]
    with pytest.raises(UserError, match=re.escape(f"{kind.__name__}.{what}: gave ")) as error:
        sampled(terms)
    assert re.search(r"must be (one|a tensor) of (.*)", str(error.value))[2] == shape


@pytest.mark.parametrize(("kind", "what", "window"), [
    (Returns, "gradient", {}), (Loss, "loss", {}), (Contrast, "delta", {"start": 1}), (Transform, "transform", {})])
@pytest.mark.parametrize(("change", "said"), [
    (lambda x: x.double(), "gave a tensor of float64, must be one of float32"),
    (lambda x: x > 0, "gave a tensor of bool, must be one of "), (lambda x: None, "gave a NoneType, must be a tensor"),
    (lambda x: x.to(torch.complex64), "gave a tensor of complex64, must be one of "),
    (lambda x: x.to("meta"), "gave a tensor of meta, must be one of cpu"),
    (lambda x: x.to_sparse(), "gave a tensor of sparse_coo, must be one of strided"),
    (lambda x: x.detach().numpy(), "gave a ndarray, must be a tensor of")])
def test_a_term_must_return_numbers_like_those_of_the_images(kind, what, window, change, said):
    term = kind(1.0, **window)
    term.value = (lambda x: change(x.mean(dim=(1, 2, 3)))) if kind is Loss else change
    terms = [term] if kind is not Transform else [zero_contrast(), term]
    if kind is Loss and "float64" in said:              # whose gradient has the type of the images
        assert sampled(terms).dtype == torch.float32
        return
    with pytest.raises(UserError, match=f"^{kind.__name__}\\.{what}: {said}"):
        sampled(terms)


@pytest.mark.parametrize(("change", "said"), [
    (lambda mean, x0: (mean[:1], x0), ", x_(t-1): gave a tensor of (1, 2, 4, 4), must be one of (3, 2, 4, 4)"),
    (lambda mean, x0: (mean, x0.double()), ", x0: gave a tensor of float64, must be one of float32"),
    (lambda mean, x0: (mean.half(), x0), ", x_(t-1): gave a tensor of float16, must be one of float32"),
    (lambda mean, x0: (mean, None), ", x0: gave a NoneType, must be a tensor of (3, 2, 4, 4)"),
    (lambda mean, x0: mean, ": gave a Tensor, must give a pair of tensors, x_(t-1) and x0"),
    (lambda mean, x0: None, ": gave a NoneType, must give a pair of tensors, x_(t-1) and x0")])
def test_a_step_must_return_two_images_like_those_it_was_given(change, said):
    def mean_step(ctx, pred, grad, noise):
        return change(pred.mean, pred.pred_xstart)

    denoise = Denoiser(create_gaussian_diffusion(timestep_respacing="10"), lambda x, t: x / 2)
    x, t = torch.zeros(3, 2, 4, 4), torch.full((3,), 9)
    for step in (mean_step, functools.partial(mean_step)):
        with pytest.raises(UserError, match=re.escape(f"the sampler's step mean_step{said}") + "$"):
            sample_step(step, denoise, x, t, lambda: x)


def zero_contrast():
    term = Contrast(1.0)
    term.value = torch.zeros_like
    return term


def sampled(guidance, model=half, **options):
    process = GaussianDiffusion(betas=get_named_beta_schedule("linear", 30), model_mean_type=ModelMeanType.EPSILON,
                                model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)
    return process.p_sample_loop(model, (3, 2, 4, 4), guidance=guidance, **options)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1, 4, 4), (3, 2, 4, 4)])
def test_the_gradient_of_the_official_interface_may_be_one_number_for_each_image(shape):
    def sample(shape):
        return sampled([FunctionGuidance(lambda x, t: torch.full(shape, 0.5))], noise=torch.zeros(3, 2, 4, 4))

    torch.manual_seed(0)
    found = sample(shape)
    torch.manual_seed(0)
    assert torch.equal(found, sample((3, 2, 4, 4)))
    with pytest.raises(UserError, match=r"cond_fn: gave a tensor of \(1, 1, 1, 1\), must be one of \(3, 2, 4, 4\)"):
        sample((1, 1, 1, 1))


def test_who_returned_nan_is_told():
    term = Returns(1.0)
    term.value = lambda x: x * float("nan")
    with pytest.raises(NonFiniteError, match="step 29: guidance returned NaN or infinity for image 0, 1, 2"):
        sampled([term])
    term.value = lambda x: x * 1e30
    with pytest.raises(NonFiniteError, match=r"the network, at images that guidance has made as large as .*e\+30, "
                                             "returned NaN or infinity"):
        sampled([term], model=lambda x, t: (x * 1e20) / 1e20)


def test_what_is_no_term_is_told():
    class Sideways(ContrastGuidance):
        def weaker(self, ctx, pred):
            return ctx.x_t

    class Idle(Guidance):
        def delta(self, ctx, pred):
            return ctx.x_t

    for guidance in ([Returns], [Idle(1.0)], "SAG"):
        with pytest.raises(UserError, match="is no term, which is an object of a class below ContrastGuidance"):
            sampled(guidance)
    with pytest.raises(UserError, match="must be a list of terms, and Returns is one of them"):
        sampled(Returns(1.0))
    with pytest.raises(UserError, match=r"Sideways\.weaker: gave a Tensor, must be Inputs"):
        sampled([Sideways(1.0)])


def test_terms_may_come_from_anything_that_is_walked_through_once():
    term = zero_contrast()
    term.value = torch.ones_like
    noise = torch.randn(3, 2, 4, 4)
    found = []
    for guidance in ([term], iter([term])):
        torch.manual_seed(0)
        found.append(sampled(guidance, noise=noise))
    assert torch.equal(*found)


# What a method of a term is asked for, and which of the things that it is given it may write in by mistake.
METHODS = {
    "gradient": (GradientGuidance, lambda ctx: torch.zeros_like(ctx.x_t)),
    "loss": (LossGuidance, lambda ctx: ctx.x_t.mean(dim=(1, 2, 3))),
    "delta": (ContrastGuidance, lambda ctx: torch.zeros_like(ctx.x_t)),
    "weaker": (ContrastGuidance, lambda ctx: Inputs(ctx.x_t / 2, ctx.t)),
    "transform": (TransformGuidance, lambda ctx: torch.zeros_like(ctx.x_t))}
WRITTEN = {
    "x_t": lambda ctx, pred, delta: ctx.x_t.detach(),
    "t": lambda ctx, pred, delta: ctx.t,
    "y": lambda ctx, pred, delta: ctx.model_kwargs["y"][:1],
    "pred.pred_xstart": lambda ctx, pred, delta: pred.pred_xstart.detach(),
    "the eps of an evaluation": lambda ctx, pred, delta: ctx.evaluate(ctx.x_t, ctx.t, y=None).eps.detach(),
    "delta": lambda ctx, pred, delta: delta}


def writing(method, write):
    kind, given = METHODS[method]

    def function(self, ctx, pred, delta=None):
        write(ctx, pred, delta)
        return given(ctx)
    return type("Own", (kind,), {method: function})(1.0)


@pytest.mark.parametrize(("method", "name"), [
    (method, name) for method in METHODS for name in WRITTEN if name != "delta" or method == "transform"])
def test_a_term_that_writes_in_place_in_what_it_is_given_is_told(method, name):
    terms = [*([zero_contrast()] if method == "transform" else []),
             writing(method, lambda *given: WRITTEN[name](*given).add_(1))]
    with pytest.raises(UserError, match=f"^Own.{method}: changed {name} in place, must work on a copy"):
        sampled(terms, model_kwargs={"y": torch.zeros(3, dtype=torch.int64)})
    sampled([*terms[:-1], writing(method, lambda *given: WRITTEN[name](*given).clone().add_(1))],
            model_kwargs={"y": torch.zeros(3, dtype=torch.int64)})


def test_a_condition_that_a_term_puts_another_in_place_of_is_told():
    term = writing("gradient", lambda ctx, pred, delta: ctx.model_kwargs.update(y=torch.ones(3)))
    with pytest.raises(UserError, match=r"^Own.gradient: changed y in place"):
        sampled([term], model_kwargs={"y": torch.zeros(3)})


def test_what_is_evaluated_beforehand_and_the_step_of_a_sampler_are_asked_too():
    class Own(ContrastGuidance):
        def beforehand(self, ctx):
            return Inputs(ctx.x_t.mul_(0.9), ctx.t)

    def own_step(ctx, pred, grad, noise):
        return ctx.x_t.mul_(0.9), pred.pred_xstart

    denoise = Denoiser(create_gaussian_diffusion(timestep_respacing="10"), half, batch_contrasts=True)
    for terms, step, who in [([Own(1.0)], sampling.ddpm_step, r"Own\.beforehand"),
                             ([], own_step, "the sampler's step own_step")]:
        with pytest.raises(UserError, match=f"^{who}: changed x_t in place, must work on a copy"):
            sample_step(step, denoise, torch.ones(3, 2, 4, 4), torch.full((3,), 9), lambda: torch.zeros(1), terms)


def test_terms_guide_under_inference_mode_as_elsewhere():
    noise, term = torch.ones(3, 2, 4, 4), writing("gradient", lambda ctx, pred, delta: None)
    torch.manual_seed(0)
    usual = sampled([term], noise=noise)
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(sampled([term], noise=noise), usual)


@pytest.mark.parametrize(("inputs", "said"), [
    (lambda x, t, y: Inputs(x[:1], t[:1], {"y": y[:1]}), "x of (1, 2, 4, 4), must be (3, 2, 4, 4) as x_t"),
    (lambda x, t, y: Inputs(x.numpy(), t), "x that is a ndarray, must be (3, 2, 4, 4) as x_t"),
    (lambda x, t, y: Inputs(x, t[:1]), "t of (1,), must be (3,), a step for each image"),
    (lambda x, t, y: Inputs(x, 3), "t that is a int, must be (3,), a step for each image"),
    (lambda x, t, y: Inputs(x, t, {"y": y[:1]}), "y of (1,), must have 3 rows, one an image"),
    (lambda x, t, y: Inputs(x, t - 30), "t [-1, -1, -1]: must be whole numbers from 0 to 29, the steps of the chain"),
    (lambda x, t, y: Inputs(x, t + 1), "t [30, 30, 30]: must be whole numbers from 0 to 29, the steps of the chain"),
    (lambda x, t, y: Inputs(x, t / 2), "t [14.5, 14.5, 14.5]: must be whole numbers from 0 to 29, the steps of the "
                                       "chain"),
    (lambda x, t, y: Inputs(x, t, {"y": y + 7}), "y: has the label 7, must be labels from 0 to 4, which the network "
                                                 "knows")])
def test_inputs_that_are_not_of_the_step_are_told(inputs, said):
    def network(x, t, y=None):
        return x / 2

    class Weaker(ContrastGuidance):
        def weaker(self, ctx, pred):
            return inputs(ctx.x_t, ctx.t, ctx.model_kwargs["y"])

    class Asks(ContrastGuidance):
        def delta(self, ctx, pred):
            asked = inputs(ctx.x_t, ctx.t, ctx.model_kwargs["y"])
            return pred.eps - ctx.evaluate(asked.x, asked.t, **asked.changes).eps

    class Together(Asks):
        def delta(self, ctx, pred):
            ctx.evaluate_together([Inputs(ctx.x_t / 2, ctx.t), inputs(ctx.x_t, ctx.t, ctx.model_kwargs["y"])])

    class Before(ContrastGuidance):
        def beforehand(self, ctx):
            return inputs(ctx.x_t, ctx.t, ctx.model_kwargs["y"])

    network.label_count = 5
    denoise = Denoiser(create_gaussian_diffusion(timestep_respacing="30"), network,
                       model_kwargs={"y": torch.zeros(3, dtype=torch.int64)})
    for kind, method, together in [(Weaker, "weaker", False), (Weaker, "weaker", True), (Asks, "delta", False),
                                   (Together, "delta", False), (Before, "beforehand", True)]:
        with pytest.raises(UserError, match=re.escape(f"{kind.__name__}.{method}: asks for {said}") + "$"):
            sample_step(sampling.ddpm_step, replace(denoise, batch_contrasts=together), torch.ones(3, 2, 4, 4),
                        torch.full((3,), 29), lambda: torch.zeros(1), [kind(1.0)])


def test_whether_inputs_are_of_the_step_is_not_asked_of_a_device():
    def network(x, t, y=None):
        return x / 2

    network.label_count = 5
    x, t = torch.ones(3, 2, 4, 4), torch.full((3,), 29)
    ctx = StepContext(Denoiser(create_gaussian_diffusion(timestep_respacing="30"), network), x, t, torch.arange(3))
    nobody_reads = torch.empty(3, dtype=torch.int64, device="meta")
    ctx.check(Inputs(x, nobody_reads, {"y": nobody_reads}))


@pytest.mark.parametrize("remembers", [True, False])
def test_what_a_term_leaves_for_the_next_step_is_not_forgotten_in_silence(remembers):
    class Running(TransformGuidance):
        def transform(self, ctx, pred, delta):
            ctx.memory[self] = delta + ctx.memory.get(self, 0)
            return ctx.memory[self]

    Running.remembers = remembers
    diffusion, x, t = create_gaussian_diffusion(timestep_respacing="3"), torch.ones(3, 2, 4, 4), torch.full((3,), 2)
    with pytest.raises(UserError, match=r"^Running: goes on from what it left at the step before: give all steps of a "
                                        r"chain the same dict as memory$"):
        diffusion.p_sample(half, x, t, guidance=[zero_contrast(), Running(1.0)])
    memory = {}
    diffusion.p_sample(half, x, t, guidance=[zero_contrast(), Running(1.0)], memory=memory)
    assert len(memory) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_term_that_does_not_give_what_its_kind_asks_is_told(method):
    kind = METHODS[method][0]
    misspelt = type("Own", (kind,), {f"{method}s": lambda self, *given: given[0].x_t})(1.0)
    with pytest.raises(UserError, match=f"^Own: has no method .*{method}.*, which a {kind.__name__} must give$"):
        sampled([misspelt])


def test_terms_that_are_not_whole_are_told():
    class Empty(Returns):
        def __init__(self):
            self.value = torch.zeros_like

    @dataclass
    class Compared(Returns):
        factor: float = 1.0

        def __post_init__(self):
            super().__init__(self.factor)

    class Nothing(ContrastGuidance):
        def weaker(self, ctx, pred):
            return None

    for term, said in [(Empty(), r"Empty: has no scale or no window of steps; its __init__ must call super"),
                       (Compared(), r"Compared: has no hash, .* a dataclass needs @dataclass\(eq=False\)"),
                       (Nothing(1.0), r"Nothing\.weaker: gave None, and the term has no delta of its own")]:
        with pytest.raises(UserError, match=f"^{said}"):
            sampled([term])
