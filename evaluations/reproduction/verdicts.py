"""Verdicts: what a measured number says of the published one.

A number counts as *reproduced* where the published one lies within its 95 % bootstrap interval, widened by the square
root of two, as the published number is of a random sample too, and by half a unit of its last digit; else it *differs*.
It is *not comparable* where it is of another number of images, another reference or other attention heads than the
published one, or where one of these is not known of the published one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..metrics import METRICS
from .tables import DECIMALS, Row

REPRODUCED, DIFFERS, NOT_COMPARABLE, NOT_RUN = "reproduced", "differs", "not comparable", "not run here"
HALF_UNIT = 0.5 * 10.0**-DECIMALS


def verdict(value: float | None, bounds: Sequence[float] | None, published: float | None, reasons: Sequence[str],
            ) -> str:
    """Returns what a measured number says of the published one, "" where there is none.

    bounds: the 95 % interval of `value`. reasons: why the two cannot be compared, if they cannot.
    """
    if published is None:
        return ""
    if value is None or bounds is None:
        return NOT_RUN
    if reasons:
        return NOT_COMPARABLE
    low, high = (value + math.sqrt(2) * (bound - value) for bound in bounds)
    return REPRODUCED if low - HALF_UNIT <= published <= high + HALF_UNIT else DIFFERS


def overall(verdicts: Sequence[str]) -> str:
    """Returns the verdict on a row: the worst of those on its numbers."""
    order = (NOT_COMPARABLE, DIFFERS, REPRODUCED, NOT_RUN)
    return next((word for word in order if word in verdicts), "")


def not_comparable(row: Row, images: int, changed: Sequence[str]) -> list[str]:
    """Returns why the numbers of a row cannot be compared with the published ones; nothing where they can.

    images: how many were evaluated. changed: what is not as the row's file has it, in words.
    """
    spec, reasons = row.evaluation, list(changed)
    if spec.images is None:
        reasons.append("the number of images of the published number is not known")
    elif images != spec.images:
        reasons.append(f"{images:,} images, published with {spec.images:,}")
    used = {method.heads for method in row.run.active if method.heads is not None}
    if spec.heads and used - {spec.heads}:
        reasons.append(f"attention heads {', '.join(used)}, published with {spec.heads}")
    return reasons


def versus(word: str, low: float, high: float) -> str:
    """Returns what the interval of the difference of a metric says of a row, like "better"."""
    return METRICS[word].direction.verdict(low, high)
