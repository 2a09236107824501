import math

import numpy as np
import pytest
import torch
from scipy import stats

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from guided_diffusion.guidance import LossGuidance
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.schedules import get_named_beta_schedule

SHAPE = (3, 2, 4, 4)


def process(steps=50, mean=ModelMeanType.EPSILON, variance=ModelVarType.FIXED_SMALL, loss=LossType.MSE):
    return GaussianDiffusion(betas=get_named_beta_schedule("linear", steps), model_mean_type=mean,
                             model_var_type=variance, loss_type=loss)


class Marginals:
    """The tables of a process, computed again: a = 1 - beta, abar, and those of the step before."""

    def __init__(self, steps=50):
        self.b = get_named_beta_schedule("linear", steps)
        self.a = 1 - self.b
        self.abar = np.array([np.prod(self.a[:i + 1]) for i in range(steps)])
        self.abar_prev = np.array([np.prod(self.a[:i]) for i in range(steps)])

    def posterior(self, x0, x_t, t):
        """Mean and variance of q(x_{t-1} | x_t, x0), t > 0: precisions of prior and likelihood add up."""
        prior, likelihood = 1 / (1 - self.abar_prev[t]), self.a[t] / self.b[t]
        weighed = prior * math.sqrt(self.abar_prev[t]) * x0 + likelihood / math.sqrt(self.a[t]) * x_t
        return weighed / (prior + likelihood), 1 / (prior + likelihood)


class Oracle:
    """The best network for data N(mu, s^2): what it knows of the data given x_t is exact."""

    def __init__(self, diffusion, mu=0.2, s=0.3):
        self.kind, self.variance, self.mu, self.s = diffusion.model_mean_type, diffusion.model_var_type, mu, s
        self.tables = Marginals(diffusion.num_timesteps)

    def __call__(self, x, timesteps):
        i = int(timesteps[0])
        a, b, abar, before = (getattr(self.tables, n)[i] for n in ("a", "b", "abar", "abar_prev"))
        v, v_before = abar * self.s**2 + 1 - abar, before * self.s**2 + 1 - before
        centred = x - math.sqrt(abar) * self.mu
        eps = math.sqrt(1 - abar) / v * centred
        x0 = self.mu + math.sqrt(abar) * self.s**2 / v * centred
        values = {
            ModelMeanType.EPSILON: eps,
            ModelMeanType.START_X: x0,
            ModelMeanType.PREVIOUS_X: math.sqrt(before) * self.mu + math.sqrt(a) * v_before / v * centred,
            ModelMeanType.VELOCITY: math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0,
        }[self.kind]
        if self.variance is ModelVarType.LEARNED:
            return torch.cat([values, torch.full_like(x, math.log(v_before * b / v))], dim=1)
        return values


def images(seed, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(step, count=SHAPE[0]):
    return torch.full((count,), step)


# The process


@pytest.mark.parametrize("betas", [[], [0.0], [-0.1], [1.1], [float("nan")], [[0.1]]])
def test_betas_that_are_none_are_refused(betas):
    with pytest.raises(UserError, match="betas: must be"):
        GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
                          loss_type=LossType.MSE)


def test_marginal_is_what_the_single_steps_add_up_to():
    diffusion, betas = process(), get_named_beta_schedule("linear", 50)
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        got = diffusion.q_mean_variance(torch.full((1, 1, 1, 1), 0.7), at(step, 1))
        np.testing.assert_allclose([float(g) for g in got], [0.7 * mean, variance, math.log(variance)], rtol=2e-6)


def test_q_sample_has_the_marginal_and_uses_the_given_noise():
    diffusion, x0, noise, t = process(), images(0), normal(1), torch.tensor([0, 20, 49])
    abar = Marginals().abar[t][:, None, None, None]
    expected = np.sqrt(abar) * x0.numpy() + np.sqrt(1 - abar) * noise.numpy()
    np.testing.assert_allclose(diffusion.q_sample(x0, t, noise), expected, atol=1e-6)
    torch.manual_seed(5)
    drawn = diffusion.q_sample(torch.zeros(1, 1, 200, 200), at(30, 1))
    assert drawn.var().item() == pytest.approx(1 - Marginals().abar[30], rel=0.04)


@pytest.mark.parametrize("step", [1, 2, 25, 49])
def test_posterior_is_bayes_rule(step):
    m, x0, x_t = Marginals(), 0.3, -0.7
    grid = np.linspace(-6, 6, 200001)
    weights = (stats.norm.pdf(grid, math.sqrt(m.abar_prev[step]) * x0, math.sqrt(1 - m.abar_prev[step]))
               * stats.norm.pdf(x_t, math.sqrt(m.a[step]) * grid, math.sqrt(m.b[step])))
    weights /= weights.sum()
    mean = (weights * grid).sum()
    variance = (weights * (grid - mean) ** 2).sum()
    got = process().q_posterior_mean_variance(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x_t), at(step, 1))
    np.testing.assert_allclose([float(g) for g in got], [mean, variance, math.log(variance)], rtol=1e-5)


def test_posterior_of_the_last_step_is_the_image_with_a_clipped_log_variance():
    diffusion, x0 = process(), images(0)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, normal(1), at(0))
    np.testing.assert_allclose(mean, x0, atol=1e-5)
    assert (variance == 0).all()
    np.testing.assert_allclose(log_variance, math.log(diffusion.posterior_variance[1]), rtol=1e-6)


def test_predictions_undo_each_other():
    diffusion, x0, noise, t = process(), images(0), normal(1), torch.tensor([0, 20, 45])
    x_t = diffusion.q_sample(x0, t, noise)
    for actual, expected in ((diffusion.predict_xstart_from_eps(x_t, t, noise), x0),
                             (diffusion.predict_eps_from_xstart(x_t, t, x0), noise),
                             (diffusion._predict_xstart_from_eps(x_t, t, noise), x0),
                             (diffusion._predict_eps_from_xstart(x_t, t, x0), noise),
                             (diffusion.predict_xstart_from_xprev(x_t, t, diffusion.posterior_mean(x0, x_t, t)), x0),
                             (diffusion._predict_xstart_from_xprev(x_t, t, diffusion.posterior_mean(x0, x_t, t)), x0)):
        np.testing.assert_allclose(actual, expected, atol=2e-4)


# What the network's output says


@pytest.mark.parametrize("step", [0, 1, 20, 40])
def test_all_parametrisations_say_the_same(step):
    x_t, noise = normal(3), normal(4)
    results = []
    for kind in ModelMeanType:
        diffusion = process(mean=kind)
        oracle = Oracle(diffusion)
        pred = diffusion.p_mean_variance(oracle, x_t, at(step), clip_denoised=False)
        ddpm = diffusion.p_sample(oracle, x_t, at(step), clip_denoised=False, noise=noise)["sample"]
        ddim = diffusion.ddim_sample(oracle, x_t, at(step), clip_denoised=False)["sample"]
        results.append((pred["eps"], pred["pred_xstart"], pred["mean"], ddpm, ddim))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=1e-4)


def test_learned_range_goes_from_the_posterior_variance_to_beta():
    diffusion, m, t = process(variance=ModelVarType.LEARNED_RANGE), Marginals(), torch.tensor([1, 20, 49])
    smallest = np.log(m.b[t] * (1 - m.abar_prev[t]) / (1 - m.abar[t]))
    for value, expected in ((-1, smallest), (1, np.log(m.b[t])), (0.5, 0.25 * smallest + 0.75 * np.log(m.b[t]))):
        pred = diffusion.p_mean_variance(
            lambda x, t, value=value: torch.cat([x, torch.full_like(x, value)], dim=1), normal(0), t)
        np.testing.assert_allclose(pred["log_variance"][:, 0, 0, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(pred["variance"], pred["log_variance"].exp(), rtol=1e-5)


def test_learned_variance_is_the_output_itself():
    x_t, log_variance = normal(0), normal(1)
    pred = process(variance=ModelVarType.LEARNED).p_mean_variance(
        lambda x, t: torch.cat([x, log_variance], dim=1), x_t, at(7))
    assert torch.equal(pred["log_variance"], log_variance)


@pytest.mark.parametrize("step", [0, 1, 30])
def test_fixed_variances(step):
    m = Marginals()
    posterior = m.b * (1 - m.abar_prev) / (1 - m.abar)
    small, large = (process(variance=kind).p_mean_variance(lambda x, t: x, normal(0), at(step))
                    for kind in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE))
    clipped = posterior[max(step, 1)]
    assert small["variance"][0, 0, 0, 0].item() == pytest.approx(posterior[step])
    assert small["log_variance"][0, 0, 0, 0].item() == pytest.approx(math.log(clipped), rel=1e-5)
    assert large["variance"][0, 0, 0, 0].item() == pytest.approx(m.b[step] if step else clipped, rel=1e-5)
    assert large["log_variance"].shape == large["variance"].shape == SHAPE


@pytest.mark.parametrize("kind", [ModelMeanType.EPSILON, ModelMeanType.START_X])
def test_x0_is_processed_then_clipped_and_the_mean_follows(kind):
    diffusion, x_t, t = process(mean=kind), 3 * normal(0), at(30)
    free = diffusion.p_mean_variance(lambda x, t: x / 2, x_t, t, clip_denoised=False)
    assert free["pred_xstart"].abs().max() > 1
    clipped = diffusion.p_mean_variance(lambda x, t: x / 2, x_t, t)
    np.testing.assert_allclose(clipped["pred_xstart"], free["pred_xstart"].clamp(-1, 1), atol=1e-5)
    processed = diffusion.p_mean_variance(lambda x, t: x / 2, x_t, t, denoised_fn=lambda x: 0.5 * x + 0.1)
    np.testing.assert_allclose(processed["pred_xstart"], (0.5 * free["pred_xstart"] + 0.1).clamp(-1, 1), atol=1e-5)
    unclipped = diffusion.p_mean_variance(lambda x, t: x / 2, x_t, t, clip_denoised=False, denoised_fn=lambda x: 2 * x)
    np.testing.assert_allclose(unclipped["pred_xstart"], 2 * free["pred_xstart"], atol=1e-5)
    expected, _ = Marginals().posterior(processed["pred_xstart"].numpy(), x_t.numpy(), 30)
    np.testing.assert_allclose(processed["mean"], expected, atol=1e-5)
    np.testing.assert_allclose(processed["eps"], free["eps"], atol=1e-5)


@pytest.mark.parametrize(("variance", "said"), [
    (ModelVarType.FIXED_SMALL, "learn_sigma False it must return 2"),
    (ModelVarType.LEARNED_RANGE, "learn_sigma True it must return 4"),
])
def test_an_output_of_other_channels_is_named(variance, said):
    with pytest.raises(UserError, match=said):
        process(variance=variance).p_mean_variance(lambda x, t: torch.cat([x, x, x], dim=1), normal(0), at(3))


# Chains of an oracle


@pytest.mark.parametrize(("kind", "variance", "steps", "tolerance"), [
    (ModelMeanType.PREVIOUS_X, ModelVarType.LEARNED, 50, 0.0),
    (ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, 200, 0.05),
    (ModelMeanType.START_X, ModelVarType.FIXED_SMALL, 200, 0.12),
])
def test_ddpm_recovers_the_data_distribution(kind, variance, steps, tolerance):
    """The exact reverse step does so for any number of steps, fixed variances for many (tolerance: relative)."""
    torch.manual_seed(0)
    diffusion = process(steps, kind, variance)
    samples = diffusion.p_sample_loop(Oracle(diffusion), (1, 1, 128, 128), device="cpu").flatten().double()
    count = len(samples)
    assert abs(samples.mean() - 0.2) < 5 * 0.3 / math.sqrt(count)
    assert abs(samples.var() / 0.09 - 1) < 5 * math.sqrt(2 / count) + tolerance
    assert abs(stats.kurtosis(samples)) < 5 * math.sqrt(24 / count)


def test_ddim_keeps_the_distribution_and_its_reverse_returns_to_the_start():
    x, errors = 0.2 + 0.3 * normal(0, (1, 1, 16, 16)), []
    for steps in (50, 200):
        diffusion = process(steps)
        noise = diffusion.ddim_reverse_sample_loop(Oracle(diffusion), x, clip_denoised=False)
        back = diffusion.ddim_sample_loop(Oracle(diffusion), x.shape, noise, clip_denoised=False, device="cpu")
        errors.append((back - x).abs().max().item())
        # The flow of a Gaussian is the affine map between the two distributions.
        np.testing.assert_allclose(noise, (x - 0.2) / 0.3, atol=16 / steps)
    assert errors[1] < 0.06
    assert errors[1] < errors[0] / 2


def test_reverse_ddim_refuses_noise():
    with pytest.raises(UserError, match=r"eta 0\.5"):
        process().ddim_reverse_sample(lambda x, t: x, normal(0), at(3), eta=0.5)


@pytest.mark.parametrize("step", [0, 1, 30, 49])
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(step):
    diffusion, x_t, noise = process(), normal(0), normal(1)
    oracle = Oracle(diffusion)
    ddpm = diffusion.p_sample(oracle, x_t, at(step), noise=noise)["sample"]
    ddim = diffusion.ddim_sample(oracle, x_t, at(step), noise=noise, eta=1.0)["sample"]
    np.testing.assert_allclose(ddim, ddpm, atol=1e-5, rtol=1e-5)


def test_eta_scales_the_deviation():
    diffusion, x_t = process(), normal(0)
    quiet, noisy = (diffusion.ddim_sample(Oracle(diffusion), x_t, at(30), eta=0.4, noise=noise)["sample"]
                    for noise in (torch.zeros(SHAPE), torch.ones(SHAPE)))
    np.testing.assert_allclose(noisy - quiet, 0.4 * math.sqrt(diffusion.posterior_variance[30]), rtol=1e-4)


# Losses


def reference_vb(x0, x_t, t, mean, log_variance):
    """One term of the bound in bits per dimension, float64, for one image at step t."""
    m = Marginals()
    if t == 0:
        def cdf(z):
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        sd = np.exp(0.5 * log_variance)
        upper = np.where(x0 > 0.999, 1, cdf((x0 + 1 / 255 - mean) / sd))
        lower = np.where(x0 < -0.999, 0, cdf((x0 - 1 / 255 - mean) / sd))
        return -np.log(upper - lower).mean() / np.log(2)
    true_mean, true_variance = m.posterior(x0, x_t, t)
    kl = (log_variance - np.log(true_variance) - 1
          + (true_variance + (true_mean - mean) ** 2) / np.exp(log_variance)) / 2
    return kl.mean() / np.log(2)


def levels(seed, shape=SHAPE):
    """Images whose values are levels of 8 bits."""
    return ((images(seed, shape) + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("variance", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("kind", list(ModelMeanType))
@pytest.mark.parametrize("loss", list(LossType))
def test_training_losses(loss, kind, variance):
    diffusion, m = process(mean=kind, variance=variance, loss=loss), Marginals()
    learned = variance is ModelVarType.LEARNED_RANGE
    x0, noise, t = levels(0), normal(1), torch.tensor([0, 1, 30])
    x_t = diffusion.q_sample(x0, t, noise)
    abar = torch.from_numpy(m.abar).float()[t][:, None, None, None]
    truth = {ModelMeanType.EPSILON: noise, ModelMeanType.START_X: x0,
             ModelMeanType.PREVIOUS_X: diffusion.posterior_mean(x0, x_t, t),
             ModelMeanType.VELOCITY: abar.sqrt() * noise - (1 - abar).sqrt() * x0}[kind]
    # So far from the truth that every term is well above float32 rounding, and at t = 0 below the clamp of its log.
    off = torch.tensor([0.02, 0.1, 0.5])[:, None, None, None]
    values, fractions = truth + off * normal(2), 0.5 * normal(3)
    seen = {}

    def network(x, timesteps, y):
        seen.update(x=x, t=timesteps, y=y)
        return torch.cat([values, fractions], dim=1) if learned else values

    labels = torch.tensor([4, 5, 6])
    terms = diffusion.training_losses(network, x0, t, {"y": labels}, noise)
    assert torch.equal(seen["t"], t) and torch.equal(seen["y"], labels)
    np.testing.assert_allclose(seen["x"], x_t, atol=1e-5)

    mse = ((values - truth).double() ** 2).mean(dim=(1, 2, 3)).numpy()
    vb = []
    for i, step in enumerate(t.tolist()):
        image, noisy, out = (a[i].double().numpy() for a in (x0, x_t, values))
        clipped = math.log(diffusion.posterior_variance[max(step, 1)])
        log_beta = math.log(m.b[step])
        fraction = (fractions[i].double().numpy() + 1) / 2
        log_variance = (fraction * log_beta + (1 - fraction) * clipped if learned
                        else np.full_like(out, log_beta if step else clipped))
        xstart = {ModelMeanType.EPSILON: (noisy - math.sqrt(1 - m.abar[step]) * out) / math.sqrt(m.abar[step]),
                  ModelMeanType.VELOCITY: math.sqrt(m.abar[step]) * noisy - math.sqrt(1 - m.abar[step]) * out,
                  ModelMeanType.START_X: out, ModelMeanType.PREVIOUS_X: None}[kind]
        mean = out if xstart is None else m.posterior(xstart, noisy, step)[0] if step else xstart
        vb.append(reference_vb(image, noisy, step, mean, log_variance))
    vb = np.array(vb)
    expected = {LossType.KL: vb, LossType.RESCALED_KL: 50 * vb,
                LossType.MSE: mse + learned * vb, LossType.RESCALED_MSE: mse + learned * vb * 50 / 1000}[loss]
    np.testing.assert_allclose(terms["loss"], expected, rtol=2e-4)
    if not loss.is_vb():
        np.testing.assert_allclose(terms["mse"], mse, rtol=1e-4)
        assert ("vb" in terms) is learned


def test_with_mse_the_bound_trains_the_variance_alone():
    diffusion = process(variance=ModelVarType.LEARNED_RANGE)
    output = torch.cat([normal(0), 0.1 * normal(1)], dim=1).requires_grad_()
    terms = diffusion.training_losses(lambda x, t: output, levels(2), torch.tensor([0, 10, 40]), noise=normal(3))
    by_vb, = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    by_mse, = torch.autograd.grad(terms["mse"].sum(), output)
    assert (by_vb[:, :2] == 0).all() and (by_vb[:, 2:] != 0).any()
    assert (by_mse[:, :2] != 0).any() and (by_mse[:, 2:] == 0).all()


# Likelihood


def test_bound_of_the_optimal_network_is_the_entropy_of_its_data():
    """Exact reverse steps make the bound tight: the entropy of N(mu, s^2) in bins of 2/255, in bits."""
    torch.manual_seed(0)
    diffusion = process(50, ModelMeanType.PREVIOUS_X, ModelVarType.LEARNED)
    oracle = Oracle(diffusion, s=0.2)
    x0 = ((0.2 + 0.2 * torch.randn(4, 1, 48, 48) + 1) * 127.5).round() / 127.5 - 1
    result = diffusion.calc_bpd_loop(oracle, x0)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.2**2) + math.log2(255 / 2)
    assert result["total_bpd"].mean().item() == pytest.approx(entropy, abs=0.03)

    def biased(x, t):
        return oracle(x, t) + torch.cat([torch.full_like(x, 0.05), torch.zeros_like(x)], dim=1)

    assert diffusion.calc_bpd_loop(biased, x0)["total_bpd"].mean() > entropy + 0.1


def test_bound_has_a_column_for_each_step_and_sums_to_the_total():
    diffusion, x0, labels = process(), levels(0), torch.tensor([1, 2, 3])
    seen = []

    def network(x, t, y):
        seen.append(int(t[0]))
        assert torch.equal(y, labels)
        return Oracle(diffusion)(x, t)

    result = diffusion.calc_bpd_loop(network, x0, model_kwargs={"y": labels})
    assert seen == list(range(49, -1, -1))
    assert {name: tuple(value.shape) for name, value in result.items()} == {
        "total_bpd": (3,), "prior_bpd": (3,), "vb": (3, 50), "xstart_mse": (3, 50), "mse": (3, 50)}
    np.testing.assert_allclose(result["total_bpd"], result["vb"].sum(dim=1) + result["prior_bpd"], atol=1e-5)
    abar = Marginals().abar[-1]
    prior = (abar * x0.double().numpy() ** 2 - abar - np.log(1 - abar)).mean(axis=(1, 2, 3)) / 2 / np.log(2)
    np.testing.assert_allclose(result["prior_bpd"], prior, rtol=1e-2, atol=1e-7)


# What is built on the ancestor's classes

class Counting(SpacedDiffusion):
    """A step of its own, as the ancestor's subclasses have: it knows nothing of terms."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        self.steps = [*getattr(self, "steps", []), int(t[0])]
        out = super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                               noise=torch.zeros_like(x))
        return {**out, "sample": out["sample"] + 1}


def small(kind=SpacedDiffusion):
    return kind([0, 300, 999], betas=get_named_beta_schedule("linear", 1000), model_mean_type=ModelMeanType.EPSILON,
                model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE)


def halved(x, t, **kwargs):
    return x / 2


def test_a_step_of_a_subclass_is_taken_by_the_loop():
    own, noise = small(Counting), torch.randn(2, 3, 4, 4)
    found = own.p_sample_loop(halved, (2, 3, 4, 4), noise=noise)
    expected = noise
    for index in (2, 1, 0):
        t = torch.full((2,), index)
        expected = small().p_sample(halved, expected, t, noise=torch.zeros_like(noise))["sample"] + 1
    assert own.steps == [2, 1, 0] and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["p_mean_variance", "condition_mean", "condition_score", "q_posterior_mean_variance",
                                  "_predict_xstart_from_eps"])
def test_what_no_step_calls_is_told_and_not_ignored(name):
    own = small()
    setattr(own, name, lambda *words, **options: pytest.fail("is called"))
    for sample in (own.p_sample_loop, own.ddim_sample_loop, own.solver_sample_loop):
        with pytest.raises(UserError, match=rf"{name}: is never called"):
            sample(halved, (2, 3, 4, 4))


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
@pytest.mark.parametrize(("steps", "shown"), [
    ([1, -1], r"\[1, -1\]"), ([1, 3], r"\[1, 3\]"), ([1.0, 2.0], r"\[1.0, 2.0\]"), ([True, False], r"\[True, False\]")])
def test_steps_that_the_chain_does_not_have_are_refused(step, steps, shown):
    with pytest.raises(UserError, match=f"^t {shown}: must be whole numbers from 0 to 2, the steps of the chain$"):
        getattr(small(), step)(halved, torch.randn(2, 3, 4, 4), torch.tensor(steps))


def test_whether_steps_are_those_of_the_chain_is_not_asked_of_a_device():
    with pytest.raises(UserError, match=r"^t torch\.float32: must be whole numbers"):
        small().check_steps(torch.empty(2, device="meta"))
    small().check_steps(torch.empty(2, dtype=torch.int64, device="meta"))       # whose numbers nobody could read


def test_noise_of_another_shape_or_type_is_refused():
    noise = torch.randn(1, 3, 4, 4)
    sentence = r"^noise: has the shape \(1, 3, 4, 4\), and the images have \(2, 3, 4, 4\)$"
    for loop in ("p_sample_loop", "ddim_sample_loop", "solver_sample_loop"):
        with pytest.raises(UserError, match=sentence):
            getattr(small(), loop)(halved, [2, 3, 4, 4], noise=noise)
        with pytest.raises(UserError, match=r"^noise: is of int32, must be of a floating type$"):
            getattr(small(), loop)(halved, [1, 3, 4, 4], noise=noise.int())
    for step in ("p_sample", "ddim_sample"):
        with pytest.raises(UserError, match=sentence):
            getattr(small(), step)(halved, torch.randn(2, 3, 4, 4), torch.tensor([1, 1]), noise=noise)
        with pytest.raises(UserError, match=r"^noise: is of float64, must be of float32, as x$"):
            getattr(small(), step)(halved, noise, torch.tensor([1]), noise=noise.double())
    assert small().p_sample_loop(halved, None, noise=noise).shape == noise.shape


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "solver_sample_loop"])
def test_guidance_that_is_no_list_is_refused(loop):
    for guidance, sentence in ((None, "guidance None: must be a list of terms; leave it out for none"),
                               (1.5, "guidance 1.5: must be a list of terms; leave it out for none")):
        with pytest.raises(UserError, match=f"^{sentence}$"):
            getattr(small(), loop)(halved, (2, 3, 4, 4), guidance=guidance)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "solver_sample_loop"])
def test_random_guidance_follows_the_numbers_of_the_images(loop):
    numbers = []

    class Term(LossGuidance):
        def loss(self, ctx, pred):
            numbers.append(ctx.image_ids.tolist())
            return pred.pred_xstart.flatten(1).sum(dim=1)

    sample = getattr(small(), loop)
    for ids, expected in ((None, [0, 1]), (range(6, 8), [6, 7]), (torch.tensor([3, 1]), [3, 1])):
        numbers.clear()
        sample(lambda x, t: x / 2, (2, 3, 4, 4), guidance=[Term(1.0)], image_ids=ids)
        assert numbers and all(one == expected for one in numbers)
    with pytest.raises(UserError, match="image_ids: 3 numbers for 2 images"):
        sample(halved, (2, 3, 4, 4), image_ids=[1, 2, 3])
    for wrong in ([-1, 2], [0.5, 2], torch.tensor([0.0, 1.0]), [2**63, 0], ["1", "2"]):
        with pytest.raises(UserError, match=r"image_ids \[.*\]: must be whole numbers from 0 up, the places"):
            sample(halved, (2, 3, 4, 4), image_ids=wrong)
