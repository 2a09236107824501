"""Divergences and likelihoods of Gaussians, in nats, and their mean."""

from __future__ import annotations

import math

from .late import Tensor, torch


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise over broadcast shapes and numbers."""
    mean1, logvar1, mean2, logvar2 = map(torch.as_tensor, (mean1, logvar1, mean2, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that the ADM losses were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of 8-bit images under a Gaussian, elementwise (Ho et al., 2006.11239, eq. 13).

    x: images in [-1, 1] whose values are multiples of 2/255. The bins at both ends reach to infinity.
    """
    inverse = torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse * (x - means + 1 / 255))
    lower = approx_standard_normal_cdf(inverse * (x - means - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)
