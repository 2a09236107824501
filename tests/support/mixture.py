"""The analytic model of the solvers' golden cases: everything about a mixture of Gaussians is known exactly."""

import numpy as np
import torch

LOG_ALPHA = 0.5 * np.log(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))


class Mixture:
    """Images (4 components, 3x4x4) under the linear schedule of 1,000 steps, at steps that may be fractions.

    x_0 is drawn from sum_k w_k N(mu_k, s_k^2 I), log alpha is linear between steps, and classes are the components.
    """

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.means = torch.from_numpy(random.uniform(-0.8, 0.8, (4, 3, 4, 4))).flatten(1)
        self.deviations = torch.from_numpy(random.uniform(0.1, 0.35, 4))
        self.weights = torch.from_numpy(random.dirichlet(np.full(4, 3.0)))

    def _components(self, x, t):
        """Of x (N, 3, 4, 4): the score of each component (N, 4, 48), their posterior (N, 4, 1), and sigma (N, 1)."""
        alpha = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), LOG_ALPHA)))[:, None]
        variance = (alpha * self.deviations) ** 2 + 1 - alpha**2
        away = x.double().flatten(1)[:, None] - alpha[:, :, None] * self.means
        log = self.weights.log() - 0.5 * (away**2).sum(2) / variance - 0.5 * away.shape[2] * variance.log()
        return -away / variance[:, :, None], log.softmax(1)[:, :, None], (1 - alpha**2).sqrt()

    def eps(self, x, t):
        """The noise in x (N, 3, 4, 4) at steps t (N,)."""
        scores, posterior, sigma = self._components(x, t)
        return (-sigma * (posterior * scores).sum(1)).reshape(x.shape).to(x.dtype)

    def grad(self, x, t, y):
        """The gradient at x of the log-probability of the classes y (N,)."""
        scores, posterior, _ = self._components(x, t)
        return (scores[torch.arange(len(x)), y] - (posterior * scores).sum(1)).reshape(x.shape).to(x.dtype)
