"""Which timesteps a training step looks at: uniformly, or by the size of their loss.

Every rank draws the timesteps of the whole global batch from the same numbers and keeps its own part, and every rank
is shown the losses of the whole global batch, so that samplers stay equal on all ranks.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from .errors import UserError
from .late import Tensor, torch

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class HasTimesteps(Protocol):
    """What a sampler asks of a diffusion process: the number of its timesteps."""

    num_timesteps: int


def create_named_schedule_sampler(name: str, diffusion: HasTimesteps) -> ScheduleSampler:
    """The sampler called `name` ("uniform" or "loss-second-moment"); raises UserError for any other."""
    if name == "uniform":
        return UniformSampler(diffusion.num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion.num_timesteps)
    raise UserError(f"--schedule_sampler {name}: must be one of {', '.join(SCHEDULE_SAMPLERS)}")


class ScheduleSampler:
    """A distribution over timesteps; importance weights keep the expected loss that of uniform timesteps.

    A subclass says `probabilities`, and, where they follow the losses, the three methods after `sample`.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def probabilities(self) -> np.ndarray:
        """The probability of each timestep: (num_timesteps,), float64, sums to 1."""
        raise NotImplementedError

    def sample(self, batch_size: int, rng: np.random.Generator | torch.device | str) -> tuple[Tensor, Tensor]:
        """Timesteps (batch_size,) int64 and the weights (batch_size,) float32 to multiply their losses with.

        rng: draws them, and they are on the CPU; or the device that they go to, as in the official code, which has
        NumPy's global generator draw them.
        """
        p = self.probabilities()
        draws, device = (rng, "cpu") if isinstance(rng, np.random.Generator) else (np.random, rng)
        t = draws.choice(len(p), size=batch_size, p=p)
        weights = torch.from_numpy(1 / (len(p) * p[t])).float()
        return torch.from_numpy(t).to(device), weights.to(device)

    def update_with_losses(self, t: Tensor, losses: Tensor) -> None:
        """Shows the sampler the unweighted losses (N,) of timesteps t (N,) of a global batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the sampler has learnt from losses, to be kept with the state of the training."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned."""


class UniformSampler(ScheduleSampler):
    """Draws every timestep with the same probability."""

    def probabilities(self) -> np.ndarray:
        """1 / num_timesteps each: (num_timesteps,), float64."""
        return np.full(self.num_timesteps, 1 / self.num_timesteps)


class LossSecondMomentResampler(ScheduleSampler):
    """Draws timesteps in proportion to sqrt(E[loss^2]) over their last losses (Improved DDPM, section 3.3, eq. 18).

    Uniform until each timestep has `history_per_term` losses. `uniform_prob` of the probability stays uniform, so
    that no timestep is forgotten.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self._history = np.zeros((num_timesteps, history_per_term))    # a row holds the last losses, newest last
        self._counts = np.zeros(num_timesteps, np.int64)

    def probabilities(self) -> np.ndarray:
        """The probability of each timestep by its last losses (Improved DDPM, eq. 18): (num_timesteps,), float64."""
        uniform = np.full(self.num_timesteps, 1 / self.num_timesteps)
        moments = np.sqrt((self._history**2).mean(axis=1))
        if self._counts.min() < self._history.shape[1] or moments.sum() == 0:
            return uniform
        return (1 - self.uniform_prob) * moments / moments.sum() + self.uniform_prob * uniform

    def update_with_losses(self, t: Tensor, losses: Tensor) -> None:
        """Keeps the unweighted losses (N,) of timesteps t (N,) of a global batch, the oldest ones give way.

        Losses that are not finite, of a step that float16 leaves out, say nothing.
        """
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self._history[step] = [*self._history[step, 1:], loss]
                self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The last losses of each timestep, and how many it has had."""
        return {"history": torch.from_numpy(self._history.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned."""
        self._history[:] = state["history"].numpy()
        self._counts[:] = state["counts"].numpy()
