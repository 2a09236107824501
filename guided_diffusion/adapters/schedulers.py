"""The diffusion process that a scheduler of diffusers describes."""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import reason
from ..process import DiffusionProcess, LossType, ModelMeanType, ModelVarType

MEAN_TYPES = {"epsilon": ModelMeanType.EPSILON, "v_prediction": ModelMeanType.VELOCITY,
              "sample": ModelMeanType.START_X}
VARIANCE_TYPES = {"fixed_large": ModelVarType.FIXED_LARGE, "fixed_large_log": ModelVarType.FIXED_LARGE,
                  "learned_range": ModelVarType.LEARNED_RANGE}
PLACES = ("timestep_spacing", "steps_offset")       # what the places of steps follow from
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
CONSISTENCY = ("LCMScheduler", "TCDScheduler")
INVERSE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
SPACINGS = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
            "use_lu_lambdas": "Lu's", "use_flow_sigmas": "flow"}            # of noise levels, by what switches them on
LEAST_ABAR = 1e-12              # less than in any cosine schedule; without signal x0 is no function of eps


class ScheduledProcess(DiffusionProcess):
    """Some steps of a process with given abar, the last of which may end before abar is 1.

    alphas_cumprod: (T,) of the original steps. steps: those to use, rising. last_alphas_cumprod: abar where the chain
    ends. model_mean_type, model_var_type: what the network gives.
    """

    def __init__(self, alphas_cumprod: np.ndarray, steps: np.ndarray, last_alphas_cumprod: float,
                 model_mean_type: ModelMeanType, model_var_type: ModelVarType) -> None:
        abar = alphas_cumprod[steps]
        super().__init__(betas=1 - abar / np.append(last_alphas_cumprod, abar[:-1]), model_mean_type=model_mean_type,
                         model_var_type=model_var_type, loss_type=LossType.MSE,
                         last_alphas_cumprod=last_alphas_cumprod)
        self.timestep_map = steps
        self.original_num_steps = len(alphas_cumprod)
        self.original_alphas_cumprod = alphas_cumprod


def process_of(scheduler: Any, steps: int | None = None) -> DiffusionProcess:
    """Our process from a scheduler of diffusers that has betas: epsilon, v or sample prediction.

    steps: how many the scheduler takes of those it was trained with, at its own places (`timestep_spacing`,
    `steps_offset`); those of a `DDIMScheduler` with its configuration where its own are fractions, as Euler's, or more
    than so many, as the Runge-Kutta ones of a `PNDMScheduler`. None: all. Where the chain ends in abar of its first
    step, and that step is among them, it is left out, as nothing changes there but what is clipped. The scheduler
    itself is not changed.
    Raises UserError for a scheduler without betas, one of consistency models (LCM, TCD), one that inverts images, one
    with a zero terminal signal-to-noise ratio, another prediction or variances that are neither fixed nor in a range,
    and for a number of steps it cannot take.
    """
    name = type(scheduler).__name__
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        raise UserError(f"{name}: has no betas, and this project samples processes that have them; take for example a "
                        "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler")
    config = scheduler.config
    if name in CONSISTENCY:
        raise UserError(f"{name}: jumps from step to step by a consistency function, which no sampler here does; take "
                        "for example a DDIMScheduler, and a network that was not distilled for it")
    if name in INVERSE:
        raise UserError(f"{name}: goes from images to noise, which no sampler here does; take for example a "
                        "DDIMScheduler")
    prediction = getattr(config, "prediction_type", "epsilon")
    if prediction not in MEAN_TYPES:
        raise UserError(f"{name} prediction_type {prediction!r}: must be one of {', '.join(MEAN_TYPES)}")
    if getattr(config, "variance_type", None) == "learned":         # of the variance, and here of its logarithm
        raise UserError(f"{name} variance_type 'learned': must be learned_range, or a fixed one")
    abar = np.cumprod(1 - betas.double().cpu().numpy())
    if getattr(config, "rescale_betas_zero_snr", False) or abar[-1] < LEAST_ABAR:
        raise UserError(f"{name}: its last step has no signal left (zero terminal signal-to-noise ratio), so that x0 "
                        "is no function of eps there, which guidance changes; rescale_betas_zero_snr must be off")
    variance = VARIANCE_TYPES.get(getattr(config, "variance_type", None) or "", ModelVarType.FIXED_SMALL)
    last = _last_abar(scheduler, abar)
    used = np.arange(len(abar)) if steps is None else _steps_of(scheduler, steps)
    used = used[abar[used] < last]
    if not len(used):
        raise UserError(f"steps {steps}: none changes anything, as the chain of {name} ends where it begins; take more")
    return ScheduledProcess(abar, used, last, MEAN_TYPES[prediction], variance)


def departures(scheduler: Any, asked: int, process: DiffusionProcess) -> str:
    """In words how the steps that are made differ from those asked for, and from the scheduler's; "" where they do not.

    process: `process_of` the scheduler and the steps asked for. Steps of a spacing of noise levels are rounded to those
    of the training, where some may coincide. Those of a `DDIMScheduler` end as many original steps lower as there are
    for each, which is where the next begins only where its places are as far apart.
    """
    made, lower = process.num_timesteps, len(scheduler.betas) // asked
    words = [f"makes {made} of {asked} steps"] if made != asked else []
    ends = process.timestep_map - lower
    own = np.where(ends < 0, process.alphas_cumprod_prev[0], process.original_alphas_cumprod[ends.clip(0)])
    if type(scheduler).__name__ in DDIM and not np.allclose(own, process.alphas_cumprod_prev, rtol=1e-6, atol=0):
        words.append(f"each step ends where the next begins, its own end {lower} lower")
    words += [f"its {spacing} spacing is not followed" for flag, spacing in SPACINGS.items()
              if getattr(scheduler.config, flag, False)]
    return f"{type(scheduler).__name__}: {'; '.join(words)}" if words else ""


def _last_abar(scheduler: Any, abar: np.ndarray) -> float:
    """Abar where the scheduler's chain ends: 1, or that of its first original step."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    ends_before = (final is not None and float(final) < 1) or getattr(
        scheduler.config, "final_sigmas_type", None) == "sigma_min"
    return float(abar[0]) if ends_before else 1.0


def _steps_of(scheduler: Any, steps: int) -> np.ndarray:
    """The original steps that a scheduler takes, rising."""
    trained = len(scheduler.betas)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= trained:
        raise UserError(f"steps {steps!r}: must be a whole number from 1 to {trained}, the steps of the scheduler")
    steps = int(steps)
    times = None if _is_runge_kutta(scheduler) else _times(scheduler, steps)
    if times is None or (times != times.round()).any() or len(np.unique(times)) > steps:
        times = _times(_ddim_of(scheduler), steps)
    return np.unique(times.astype(np.int64).clip(0, trained - 1))


def _ddim_of(scheduler: Any) -> Any:
    """A `DDIMScheduler` whose places are those of the scheduler's configuration."""
    from diffusers import DDIMScheduler

    # Its `from_config` takes defaults of its own for what was left at the defaults of another class, unless that was
    # saved and loaded between: one pipeline would have two sets of steps.
    given = {name: getattr(scheduler.config, name) for name in PLACES if hasattr(scheduler.config, name)}
    return DDIMScheduler(num_train_timesteps=len(scheduler.betas), **given)


def _is_runge_kutta(scheduler: Any) -> bool:
    """Whether it is a `PNDMScheduler` that begins with Runge-Kutta steps; those cannot be fewer than four."""
    return getattr(scheduler.config, "skip_prk_steps", None) is False


def _times(scheduler: Any, steps: int) -> np.ndarray:
    """The scheduler's own places of so many steps. Raises UserError where it does not take so many."""
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(steps)
    except Exception as error:          # of any kind: some schedulers check the number, others fail with it
        raise UserError(f"steps {steps}: {type(scheduler).__name__} cannot take so many ({reason(error)})") from None
    return own.timesteps.double().cpu().numpy()
