"""What depth networks that were trained on generated images have shown: means, intervals, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.bootstrap import Replicates, resamplings
from ..metrics.verdicts import HIGHER, LOWER, Direction

# By name: the place among `depth_errors`, a factor, decimals, and which way is better.
METRICS: Mapping[str, tuple[int, float, int, Direction]] = {
    "delta": (2, 100.0, 2, HIGHER), "abs_rel": (1, 1.0, 4, LOWER)}
HEADINGS = {"delta": "delta < 1.25, %", "abs_rel": "AbsRel"}

Results = dict[str, dict[str, dict[str, Any]]]         # by row and metric


def results_of(errors: Mapping[str, np.ndarray], base: str, replicates: int) -> Results:
    """The numbers of each row: value, 95 % interval, by seed; and the difference to the row `base` with its verdict.

    errors: by row, (seeds, test images, 3) as `depth_errors`. Seeds and test images are resampled together, the same
    ones for all rows, so the intervals say nothing of other training images.
    """
    seeds, images, _ = next(iter(errors.values())).shape
    counts = resamplings(seeds, replicates, 1), resamplings(images, replicates, 0)
    found = {row: {metric: _replicates(values[..., place] * factor, counts)
                   for metric, (place, factor, _, _) in METRICS.items()} for row, values in errors.items()}
    results: Results = {}
    for row, numbers in found.items():
        for metric, number in numbers.items():
            place, factor, _, direction = METRICS[metric]
            entry: dict[str, Any] = {"value": number.estimate, "interval": number.interval,
                                     "seeds": [float(one) for one in errors[row][..., place].mean(axis=1) * factor]}
            if row != base:
                difference = number.minus(found[base][metric])
                low, high = difference.interval or (-np.inf, np.inf)
                entry |= {"difference": difference.estimate, "difference_interval": [low, high],
                          "verdict": direction.verdict(low, high)}
            results.setdefault(row, {})[metric] = entry
    return results


def _replicates(values: np.ndarray, counts: tuple[np.ndarray, np.ndarray]) -> Replicates:
    """values: (seeds, images); counts: of both, (replicates, seeds) and (replicates, images)."""
    of_seeds, of_images = (one.astype(np.float64) for one in counts)
    resampled = np.einsum("bs,sn,bn->b", of_seeds, values, of_images, optimize=True) / values.size
    return Replicates(float(values.mean()), resampled)


def table_of(results: Results, words: Mapping[str, str], published: Mapping[str, Mapping[str, float]], num_samples: int,
             num_test: int, num_seeds: int) -> str:
    """The table in Markdown. words: title, source and note of the study. published: by row and metric."""
    base = next(row for row, numbers in results.items() if "verdict" not in numbers["delta"])
    columns = ["trained on", *(f"{HEADINGS[metric]}{extra}" for metric in METRICS for extra in (
        ("", ", by seed", ", published") if published else ("", ", by seed")))]
    lines = [f"# {words['title']}", "", *filter(None, (words["source"], words["note"])), "",
             f"{num_samples} images a row, {num_test} test images, {num_seeds} seeds; 95 % intervals over seeds and "
             f"test images; *better* and *worse* than {base}, where the interval of the paired difference excludes 0.",
             "", _line(columns), _line(["---"] * len(columns))]
    for row, numbers in results.items():
        cells = [row.replace("_", " ")]
        for metric, entry in numbers.items():
            decimals = METRICS[metric][2]
            cells += [_number(entry, decimals), ", ".join(f"{one:.{decimals}f}" for one in entry["seeds"])]
            if published:
                value = published.get(row, {}).get(metric)
                cells.append("" if value is None else f"{value:g}")
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _number(entry: Mapping[str, Any], decimals: int) -> str:
    low, high = entry["interval"]
    verdict = entry.get("verdict", "")
    return f"{entry['value']:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f}){f', {verdict}' * bool(verdict)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
