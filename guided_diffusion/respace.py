"""Sampling with fewer steps than a network was trained with (Nichol & Dhariwal, 2102.09672, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion
from .options import whole_number


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The original steps to use.

    section_counts: "ddimN" is the first whole stride that gives exactly N steps; else one count per section, as a
    list or like "10,20,30": the chain is cut into equal sections, each gets that many evenly spaced steps, its first
    and, of several, its last among them; a section may have none.
    """
    return set(_spaced(num_timesteps, section_counts if isinstance(section_counts, str) else tuple(section_counts)))


@lru_cache
def _spaced(num_timesteps: int, section_counts: str | tuple[int, ...]) -> frozenset[int]:
    """What `space_timesteps` returns: plans ask for the same steps thousands of times."""
    shown = f"--timestep_respacing {section_counts if isinstance(section_counts, str) else list(section_counts)}"
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return frozenset(_ddim_steps(num_timesteps, section_counts.removeprefix("ddim"), shown))
    try:
        counts = [int(count) for count in
                  (section_counts.split(",") if isinstance(section_counts, str) else section_counts)]
    except ValueError:
        counts = []
    if not any(counts):
        raise UserError(f"{shown}: must be counts like 250 or 10,20,30, or like ddim25")
    size, extra = divmod(num_timesteps, len(counts))
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        section = size + (i < extra)
        if not 0 <= count <= section:
            raise UserError(f"{shown}: a section of {section} steps cannot give {count}")
        stride = (section - 1) / (count - 1) if count > 1 else 1
        # Multiplied out one at a time, so that ties round as they did for the published samples.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += section
    return frozenset(steps)


def _ddim_steps(num_timesteps: int, text: str, shown: str) -> range:
    wanted = whole_number(text) or 0
    for stride in range(1, num_timesteps + 1):
        steps = range(0, num_timesteps, stride)
        if len(steps) == wanted:
            return steps
    raise UserError(f"{shown}: no whole stride through {num_timesteps} steps gives that many")


class SpacedDiffusion(GaussianDiffusion):
    """A process that uses some steps of a base process; the network still sees the original indices.

    use_timesteps: original step indices. betas and the rest: of the base process, as in `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: Sequence[float] | np.ndarray, **kwargs: Any) -> None:
        base = GaussianDiffusion(betas=betas, **kwargs)
        kept = np.array(sorted(set(use_timesteps)))
        abar = base.alphas_cumprod[kept]
        super().__init__(betas=1 - abar / np.append(1.0, abar[:-1]), **kwargs)
        self.timestep_map = kept
        self.original_num_steps = base.num_timesteps
        self.original_alphas_cumprod = base.alphas_cumprod
