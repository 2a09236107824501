"""Verdicts: what a measured number says of the published one.

A number counts as *reproduced* where the published one lies within its 95 % interval, widened by the square root of
two, as the published number is of a random sample too, and by half a unit of its last digit; else it *differs*. It is
*not comparable* where it is of another number of images, another reference, another evaluator, another network than
Inception or other attention heads than the published one, or where one of these is not known of the published one.
There is *no word* on a number without an interval.

The numbers of a row are judged together: of five numbers that are each right in 95 % of all cases, one would differ
in 23 % of all rows that reproduce exactly. The correction of Holm (1979, Scandinavian Journal of Statistics 6, 65)
lets a row differ in at most 5 %, however its numbers depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..metrics import METRICS
from .tables import DECIMALS, Row

REPRODUCED, DIFFERS, NOT_COMPARABLE, NOT_RUN = "reproduced", "differs", "not comparable", "not run here"
NO_WORD = "no word"
HALF_UNIT = 0.5 * 10.0**-DECIMALS
QUANTILE = 1.959963984540054        # of the normal distribution, at 97.5 %
LEVEL = 0.05                        # of the verdicts: how often what reproduces exactly may be said to differ


class Verdict(str):
    """A verdict on one number, taken alone, as a word.

    p_value: how often what reproduces exactly would lie as far away; None where nothing was compared.
    """

    p_value: float | None

    def __new__(cls, word: str, p_value: float | None = None) -> Verdict:
        """Takes the word."""
        verdict = super().__new__(cls, word)
        verdict.p_value = p_value
        return verdict


def verdict(value: float | None, bounds: Sequence[float] | None, published: float | None, reasons: Sequence[str],
            ) -> Verdict:
    """Returns what a measured number, taken alone, says of the published one, "" where there is none.

    bounds: the 95 % interval of `value`. reasons: why the two cannot be compared, if they cannot. `jointly` and
    `overall` judge several numbers of a row.
    """
    if published is None:
        return Verdict("")
    if value is None:
        return Verdict(NOT_RUN)
    if reasons:
        return Verdict(NOT_COMPARABLE)
    if bounds is None:
        return Verdict(NO_WORD)
    bound = bounds[1] if published > value else bounds[0]
    distance = max(0.0, abs(published - value) - HALF_UNIT)
    allowed = math.sqrt(2) * abs(bound - value)
    if distance == 0:
        return Verdict(REPRODUCED, 1.0)
    p_value = math.erfc(QUANTILE * distance / allowed / math.sqrt(2)) if allowed else 0.0
    return Verdict(REPRODUCED if distance <= allowed else DIFFERS, p_value)


def jointly(verdicts: Sequence[str]) -> list[str]:
    """Returns the verdicts on the numbers of one row, corrected by Holm for how many they are.

    The smallest p-value counts times the number of those that were compared, the next one times one less, and so on;
    from the first one on that is above 5 %, the numbers are reproduced. A word without a p-value stays as it is.
    """
    p_values = {index: word.p_value for index, word in enumerate(verdicts)
                if isinstance(word, Verdict) and word.p_value is not None}
    corrected = [str(word) for word in verdicts]
    differs = True
    for step, (index, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        differs = differs and p_value * (len(p_values) - step) <= LEVEL
        corrected[index] = DIFFERS if differs else REPRODUCED
    return corrected


def overall(verdicts: Sequence[str]) -> str:
    """Returns the verdict on a row: the worst of those on its numbers, judged `jointly`."""
    order = (NOT_COMPARABLE, DIFFERS, REPRODUCED, NO_WORD, NOT_RUN)
    corrected = jointly(verdicts)
    return next((word for word in order if word in corrected), "")


def not_comparable(row: Row, images: int, changed: Sequence[str]) -> list[str]:
    """Returns why the numbers of a row cannot be compared with the published ones; nothing where they can.

    images: how many were evaluated. changed: what is not as the row's file has it, in words.
    """
    spec, reasons = row.evaluation, list(changed)
    if spec.images is None:
        reasons.append("the number of images of the published number is not known")
    elif images != spec.images:
        reasons.append(f"{images:,} images, published with {spec.images:,}")
    seen = [METRICS[word] for word in row.published if METRICS[word].needs_network or METRICS[word].needs_depth]
    if seen and not (spec.kind and spec.kind.is_inception):
        reasons.append(f"backend {spec.backend} is not the Inception of the official evaluator")
    if spec.evaluator:
        reasons.append(f"published with {spec.evaluator}: not comparable with the official evaluator to the last digit")
    used = {method.heads for method in row.run.active if method.heads is not None}
    if spec.heads and used - {spec.heads}:
        reasons.append(f"attention heads {', '.join(used)}, published with {spec.heads}")
    return reasons


def versus(word: str, low: float | None, high: float | None) -> str:
    """Returns what the interval of the difference of a metric says of a row, like "better"; of none it says no word."""
    if low is None or high is None:
        return NO_WORD
    return METRICS[word].direction.verdict(low, high)
