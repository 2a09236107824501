"""Steps of a solver that lie between the steps that a network was trained on.

Time is continuous, as in the codes of DPM-Solver (Lu et al., 2211.01095) and UniPC (Zhao et al., 2302.04867): log alpha
is linear between the original steps, and the network sees fractions of them. A grid goes from the last original step
to step 0, where the chain ends, and is evaluated at each of its nodes but that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .errors import UserError
from .process import DiffusionProcess

CHAIN = "chain"                 # the steps of the respaced chain, which is no grid of its own
LEAST_LAMBDA = -5.1             # of log(alpha / sigma): steps with less are left out, as in the official codes


def log_snr(abar: float | np.ndarray) -> np.ndarray:
    """The logarithm lambda of alpha / sigma, float64, from abar = alpha^2 in (0, 1]; infinite where abar is 1."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(abar) - np.log1p(-np.asarray(abar, dtype=np.float64)))


def _time_uniform(abar: np.ndarray, steps: int) -> np.ndarray:
    return np.linspace(0, len(abar) - 1, steps + 1)


def _time_quadratic(abar: np.ndarray, steps: int) -> np.ndarray:
    # The official time of step i is (i + 1) / T.
    return np.linspace(1, len(abar) ** 0.5, steps + 1) ** 2 - 1


def _log_snr(abar: np.ndarray, steps: int) -> np.ndarray:
    lambdas = log_snr(abar)
    wanted = np.linspace(lambdas[0], lambdas[-1], steps + 1)
    log_alpha = -0.5 * np.log1p(np.exp(-2 * wanted))
    return np.interp(-log_alpha, -0.5 * np.log(abar), np.arange(len(abar)))


# By name: from abar (T,) of the original steps to steps + 1 rising fractions of them, the first of which is 0.
_PLACES: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "time-uniform": _time_uniform, "logsnr": _log_snr, "time-quadratic": _time_quadratic}

GRIDS = (CHAIN, *_PLACES)


class GridProcess(DiffusionProcess):
    """A process of its own on the nodes of a grid, from the original steps of another.

    grid: "time-uniform", "logsnr" (uniform in log(alpha / sigma)) or "time-quadratic" (uniform in the square root of
    time). steps: evaluations, from 1 up. `timestep_map` holds fractions of original steps. The chain ends at the noise
    of step 0. Raises UserError for another grid.
    """

    def __init__(self, process: DiffusionProcess, grid: str, steps: int) -> None:
        if grid not in _PLACES:
            raise UserError(f"grid {grid}: must be one of {', '.join(_PLACES)}")
        original = process.original_alphas_cumprod
        if len(original) < 2:
            raise UserError(f"grid {grid}: needs a process of at least 2 steps, this one has {len(original)}")
        original = original[:max(2, int((log_snr(original) >= LEAST_LAMBDA).sum()))]
        places = _PLACES[grid](original, steps)
        places[[0, -1]] = 0, len(original) - 1         # without the rounding of the ends
        abar = np.exp(np.interp(places, np.arange(len(original)), np.log(original)))
        super().__init__(
            betas=1 - abar[1:] / abar[:-1], model_mean_type=process.model_mean_type,
            model_var_type=process.model_var_type, loss_type=process.loss_type,
            rescale_timesteps=process.rescale_timesteps, last_alphas_cumprod=float(abar[0]))
        self.timestep_map = places[1:]
        self.original_num_steps = process.original_num_steps
        self.original_alphas_cumprod = process.original_alphas_cumprod
