"""Noise schedules, and reading float64 tables at step indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .errors import UserError
from .late import Tensor, torch

SCHEDULES = ("linear", "cosine")


def get_named_beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """The (num_steps,) float64 betas of a named schedule.

    "linear": 1e-4 to 2e-2 at 1000 steps, scaled by 1000 / num_steps (Ho et al., 2006.11239). "cosine": offset 0.008,
    capped at 0.999 (Nichol & Dhariwal, 2102.09672, eq. 17).
    """
    if num_steps < 1:
        raise UserError(f"--diffusion_steps {num_steps}: must be at least 1")
    if name == "linear":
        scale = 1000 / num_steps
        if scale * 2e-2 >= 1:
            raise UserError(f"--diffusion_steps {num_steps}: must be more than 20 with --noise_schedule linear, whose "
                            "last beta would reach 1")
        return np.linspace(scale * 1e-4, scale * 2e-2, num_steps, dtype=np.float64)
    if name == "cosine":
        return _cosine_betas(num_steps).copy()
    raise UserError(f"--noise_schedule {name}: must be one of {', '.join(SCHEDULES)}")


@lru_cache
def _cosine_betas(num_steps: int) -> np.ndarray:
    return betas_for_alpha_bar(num_steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def betas_for_alpha_bar(num_steps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> np.ndarray:
    """Betas whose cumulative product of (1 - beta) follows `alpha_bar`, a function on [0, 1]."""
    values = np.array([alpha_bar(i / num_steps) for i in range(num_steps + 1)])
    return np.minimum(1 - values[1:] / values[:-1], max_beta)


def gather(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """table[t] in float32, shaped (N, 1, ...) to broadcast with `like`."""
    values = torch.from_numpy(table).to(t.device)[t].float()
    return values.reshape(-1, *[1] * (like.ndim - 1))
