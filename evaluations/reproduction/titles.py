"""The rows of a table in words: settings that most rows have are said once, and titles say what else there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guided_diffusion.guidance import GUIDANCE, GuidanceOptions
from guided_diffusion.runs.sample import SamplingRun

from .tables import Row, Table


def title(row: Row, table: Table) -> str:
    """Returns a row's guidance and sampler, like "SAG s = 0.25, psi = 1.3", without what `usual` says.

    Where an earlier row of one of its sections has the same title, its name is added.
    """
    beside = {name for section in table.sections if row.name in section.rows for name in section.rows}
    earlier = [other for name, other in table.rows.items() if name in beside]
    earlier = earlier[:[other.name for other in earlier].index(row.name)] if row.name in beside else []
    words = _words(row.run, table)
    return f"{words} ({row.name})" if words in [_words(other.run, table) for other in earlier] else words


def usual(table: Table) -> str:
    """Returns what holds where a row's title says nothing else."""
    runs = [row.run for row in table.rows.values()]
    parts = [_most_frequent([sampler(run) for run in runs]),
             f"seed {_most_frequent([run.sample.seed for run in runs])}"]
    for method in GUIDANCE:
        if details := _usual_details(table, method):
            parts.append(f"{method.short}: {', '.join(details.values())}")
    return "; ".join(parts)


def sampler(run: SamplingRun) -> str:
    """Returns the sampler and its steps, like "DDPM, 250 steps"."""
    return f"{run.sampler.title}, {run.num_steps} steps"


def heads(run: SamplingRun) -> str:
    """Returns how attention is split into heads, by the first method that is on and reads it, or that could."""
    return next((method.heads for method in (*run.active, *run.guidance) if method.heads), "")


def _words(run: SamplingRun, table: Table) -> str:
    words = " + ".join(method.title(_usual_details(table, type(method))) for method in run.active) or "no guidance"
    common = _most_frequent([sampler(row.run) for row in table.rows.values()])
    return words if sampler(run) == common else f"{words}, {sampler(run)}"


def _usual_details(table: Table, kind: type[GuidanceOptions]) -> dict[str, str]:
    """Returns the most frequent details of a method among the rows that have it; none where none has."""
    details = [method.details() for row in table.rows.values() for method in row.run.active if type(method) is kind]
    return {name: _most_frequent([one[name] for one in details]) for name in details[0]} if details else {}


def _most_frequent(values: Sequence[Any]) -> Any:
    """Returns the most frequent value, the first of those that are equally frequent."""
    return max(dict.fromkeys(values), key=values.count)
