import numpy as np
import pytest
import torch
from scipy import integrate, stats

from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl

LEVELS = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1


@pytest.mark.parametrize(("mean1", "logvar1", "mean2", "logvar2"), [
    (0.3, -1.0, -0.2, 0.5), (0.0, 2.0, 1.0, -1.0), (0.4, 0.1, 0.4, 0.1)])
def test_kl_is_the_integral_it_stands_for(mean1, logvar1, mean2, logvar2):
    p, q = stats.norm(mean1, np.exp(logvar1 / 2)), stats.norm(mean2, np.exp(logvar2 / 2))
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean1 - 40, mean1 + 40, limit=200)
    values = (torch.tensor(v, dtype=torch.float64) for v in (mean1, logvar1, mean2, logvar2))
    assert normal_kl(*values).item() == pytest.approx(expected, abs=1e-7)


def test_kl_broadcasts():
    mean = torch.zeros(2, 3)
    assert normal_kl(mean, torch.zeros(1, 3), torch.zeros(()), torch.zeros(())).shape == (2, 3)
    assert normal_kl(mean, mean, 0.0, 0).equal(mean)


def test_approximate_cdf_is_close_to_the_normal_one():
    x = np.linspace(-6, 6, 241)
    np.testing.assert_allclose(approx_standard_normal_cdf(torch.from_numpy(x)), stats.norm.cdf(x), atol=3e-4)


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999])
@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 1.0])
def test_probabilities_of_the_256_levels_sum_to_one(mean, log_scale):
    log_p = discretized_gaussian_log_likelihood(
        LEVELS, means=torch.full_like(LEVELS, mean), log_scales=torch.full_like(LEVELS, log_scale))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_probability_of_a_level_is_the_mass_of_its_bin():
    mean, scale = 0.1, 0.2
    log_p = discretized_gaussian_log_likelihood(
        LEVELS.float(), means=torch.full((256,), mean), log_scales=torch.full((256,), np.log(scale)))
    edges = np.concatenate([[-np.inf], (LEVELS[1:] - 1 / 255).numpy(), [np.inf]])
    np.testing.assert_allclose(log_p.exp(), np.diff(stats.norm(mean, scale).cdf(edges)), atol=3e-5)


def test_impossible_levels_have_a_finite_log_probability():
    log_p = discretized_gaussian_log_likelihood(
        torch.tensor([-1.0, 0.0, 1.0]), means=torch.full((3,), 50.0), log_scales=torch.full((3,), -5.0))
    np.testing.assert_allclose(log_p, [np.log(1e-12), np.log(1e-12), 0], rtol=1e-5, atol=1e-6)
