"""Moving averages of the weights: by a rate, and by power functions, of which other widths can be had after training.

An average after step t weighs the weights of step s by its profile p(s), which falls towards the past. By a rate the
profile is exponential. By a power function (Karras et al., EDM2, 2312.02696, section 3) it is, on 0 <= s <= t,

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1)

so that it grows with the length of the training. Its width is sigma_rel, its standard deviation as a part of t:

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)

Averages of a few widths, kept at many steps, span nearly all profiles of other widths. The weights by any of them are
a linear combination of what was kept, by least squares between the profiles (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import UserError
from ..late import Tensor, no_grad, torch

WIDEST = 0.28               # sigma_rel; a profile that is the same for all steps (gamma = 0) has 12^(-1/2) = 0.2887
NARROWEST = 0.001
FACT = "sigma_rel"          # of a file's metadata
ROUNDING = 2.0**-24         # of weights in float32, relative


class Profile(Protocol):
    """How an average weighs the weights of each step."""

    @property
    def name(self) -> str:
        """The name of its file, without suffix."""

    @property
    def facts(self) -> dict[str, str]:
        """What its file states of it in its metadata."""

    @property
    def counts_overflow(self) -> bool:
        """Whether a step that float16 left out counts as well."""

    def decay(self, step: int, warms_up: bool) -> float:
        """What the average is multiplied with after a step (from 0): average = decay average + (1 - decay) weights.

        warms_up: whether the random start shall be forgotten soon.
        """


@dataclass(frozen=True)
class RateProfile:
    """An exponential profile: the average is multiplied with the same rate, between 0 and 1, after each step."""

    rate: float

    counts_overflow = False

    @property
    def facts(self) -> dict[str, str]:
        """Nothing: the name says all."""
        return {}

    @property
    def name(self) -> str:
        """ema_RATE."""
        return f"ema_{self.rate:g}"

    def decay(self, step: int, warms_up: bool) -> float:
        """The rate; in a warm-up at most (1 + step) / (10 + step)."""
        return min(self.rate, (1 + step) / (10 + step)) if warms_up else self.rate


@dataclass(frozen=True)
class PowerProfile:
    """A power function of the width sigma_rel (EDM2, section 3.1). Raises UserError outside NARROWEST to WIDEST."""

    width: float

    counts_overflow = True

    def __post_init__(self) -> None:
        if not NARROWEST <= self.width <= WIDEST:
            raise UserError(f"width {self.width:g}: must be from {NARROWEST:g} to {WIDEST:g}")

    @property
    def name(self) -> str:
        """ema_power_WIDTH."""
        return f"ema_power_{self.width:g}"

    @property
    def facts(self) -> dict[str, str]:
        """The width, as FACT."""
        return {FACT: f"{self.width:g}"}

    @property
    def exponent(self) -> float:
        """gamma: the one positive root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1."""
        s = self.width**-2
        return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())

    def decay(self, step: int, warms_up: bool) -> float:
        """beta(t) = (1 - 1 / t)^(gamma + 1) at t = step + 1 (EDM2, section 3.1), which forgets the start by itself."""
        return float((1 - 1 / (step + 1)) ** (self.exponent + 1))


@no_grad
def update_ema(average: list[Tensor], params: Sequence[Tensor], rate: float) -> None:
    """Moves each average a step towards its parameter, in place: average = rate * average + (1 - rate) * param."""
    torch._foreach_lerp_(average, [param.detach() for param in params], 1 - rate)


def sampled(profiles: Sequence[Profile]) -> Profile | None:
    """The profile whose average a training's folder is sampled with, as `model_folders.best_weights` chooses it."""
    rates = [profile for profile in profiles if isinstance(profile, RateProfile)]
    widths = [profile for profile in profiles if isinstance(profile, PowerProfile)]
    if rates:
        return max(rates, key=lambda profile: profile.rate)
    return min(widths, key=lambda profile: profile.width, default=None)


def parse_widths(flag: str, text: str) -> tuple[PowerProfile, ...]:
    """The profiles of widths that a user gave with commas. Raises UserError, naming the flag, for anything else."""
    try:
        widths = [float(word) for word in text.split(",")] if text else []
        profiles = tuple(PowerProfile(width) for width in widths)
    except (ValueError, UserError):
        profiles = ()
    if len({profile.name for profile in profiles}) < (text.count(",") + 1 if text else 0):
        raise UserError(f"--{flag} {text}: must be different widths from {NARROWEST:g} to {WIDEST:g}, with commas")
    return profiles


# Least squares between profiles


class Kept(NamedTuple):
    """An average that was kept: the step t after which, and its profile."""

    step: int
    profile: PowerProfile


class Combination(NamedTuple):
    """What comes nearest to a profile. factors: (K,), of what was kept, with the sum 1.

    error: the norm of the difference of the profiles, relative to that of the wanted one.
    """

    factors: np.ndarray
    error: float


def products(first: Sequence[Kept], second: Sequence[Kept]) -> np.ndarray:
    """Integrals of the products of profiles, (A, B) float64 (EDM2, appendix C).

    Of the profiles (t, g) and (T, G) with t <= T: (g + 1) (G + 1) / (g + G + 1) (t / T)^G / T.
    """
    t, g = _columns(first)
    T, G = (column.T for column in _columns(second))
    exponent_of_later = np.where(t <= T, G, g)
    end = np.maximum(t, T)
    return (g + 1) * (G + 1) / (g + G + 1) * (np.minimum(t, T) / end) ** exponent_of_later / end


def _columns(kept: Sequence[Kept]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and exponents, (K, 1) each."""
    return (np.array([[float(one.step)] for one in kept]), np.array([[one.profile.exponent] for one in kept]))


def combine(kept: Sequence[Kept], wanted: Kept) -> Combination:
    """The factors of the averages that were kept, whose sum comes nearest to the wanted one.

    What was kept with that very profile is taken as it is. Else the squared difference of the profiles is least, with
    as much of the squared factors added as float32 has rounded what was kept: nearly equal profiles would else get
    large factors of both signs.
    """
    if wanted in kept:
        factors = np.zeros(len(kept))
        factors[kept.index(wanted)] = 1
        return Combination(factors, 0.0)
    gram, right = products(kept, kept), products(kept, [wanted])[:, 0]
    square = float(products([wanted], [wanted])[0, 0])
    norms = np.sqrt(np.diag(gram))
    scaled = gram / np.outer(norms, norms)
    factors = np.linalg.solve(scaled + ROUNDING**2 * np.eye(len(kept)), right / norms) / norms
    factors /= factors.sum()
    error = square - 2 * factors @ right + factors @ gram @ factors
    return Combination(factors, float(np.sqrt(max(0.0, error / square))))
