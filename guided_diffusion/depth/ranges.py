"""Depth ranges: the two depths, NEAR and FAR, that become -1 and 1, and the ways from one scale to the other."""

from __future__ import annotations

import math
from typing import TypeGuard, TypeVar

import numpy as np

from ..errors import UserError
from ..late import Tensor

OWN_RANGE = "image"

Depth = TypeVar("Depth", np.ndarray, Tensor)


def parse_depth_range(text: str) -> tuple[float, float] | None:
    """NEAR and FAR from the words of `--depth_range`; None for "image", where each map has its own.

    Raises UserError for anything else.
    """
    if text == OWN_RANGE:
        return None
    try:
        near, far = map(float, text.split(","))
    except ValueError:
        near = far = 0.0
    if not (math.isfinite(near) and math.isfinite(far) and near < far):
        raise UserError(f"--depth_range {text}: must be {OWN_RANGE}, or NEAR,FAR, two numbers of which the first is "
                        "the smaller one")
    return near, far


def has_ratios(limits: tuple[float, float] | None) -> TypeGuard[tuple[float, float]]:
    """Whether depths of a range have ratios, as relative errors need: it has units, and NEAR is above 0."""
    return limits is not None and limits[0] > 0


def to_fraction(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth as a fraction of the way from NEAR (0) to FAR (1); what lies beyond them is clamped."""
    return np.clip((depth - near) / (far - near), 0, 1)


def to_unit_range(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth from NEAR to FAR as -1 to 1; what lies beyond them is clamped."""
    return to_fraction(depth, near, far) * 2 - 1


def from_unit_range(depth: Depth, near: float, far: float) -> Depth:
    """Depth from -1 to 1 in the units of NEAR and FAR (metres for scenes); what lies beyond is not clamped."""
    return near + (depth + 1) / 2 * (far - near)
