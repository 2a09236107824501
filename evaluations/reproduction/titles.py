"""The rows of a table in words: settings that most rows have are said once, and titles say what else there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_diffusion.guidance import GUIDANCE, GuidanceOptions
from guided_diffusion.options import option_fields
from guided_diffusion.runs.sample import SamplingRun

from .tables import Table

NO_GUIDANCE = "no guidance"


def titles(table: Table) -> dict[str, str]:
    """Returns the title of each row: its guidance, sampler and seed, without what `usual` says.

    Like "SAG s = 0.25, psi = 1.3". Where the rows of one of its sections have different labels, those of a row
    are said, and where an earlier row there has the same title, its name; the row that it compares with is one.
    """
    details = {method: _usual_details(table, method) for method in GUIDANCE}
    common, seed = _usual_sampler(table), _usual_seed(table)
    labelled = _labelled_apart(table)
    words = {name: _words(row.run, details, common) + f", seed {row.run.sample.seed}" * (row.run.sample.seed != seed)
             + (f", labels {labelled[name]}" if name in labelled else "") for name, row in table.rows.items()}
    together = [list(dict.fromkeys((*section.rows, section.base))) for section in table.sections]
    twice = {name for rows in together for place, name in enumerate(rows)
             if words[name] in [words[other] for other in rows[:place]]}
    return {name: f"{text} ({name})" if name in twice else text for name, text in words.items()}


def symbol(flag: str) -> tuple[str, float]:
    """Returns what titles call an option, with the value at which that is 0; another option is called by its flag."""
    return next((method.symbols[flag] for method in GUIDANCE if flag in method.symbols), (flag, 0.0))


def usual(table: Table) -> str:
    """Returns what holds where a row's title says nothing else."""
    parts = [*filter(None, [_usual_sampler(table)]), f"seed {_usual_seed(table)}"]
    for method in GUIDANCE:
        if details := _usual_details(table, method):
            parts.append(f"{method.short}: {', '.join(filter(None, details.values()))}")
    return "; ".join(parts)


def sampler(run: SamplingRun) -> str:
    """Returns the sampler and its steps, like "DDPM, 250 steps"."""
    return run.sampler.headline(run.num_steps)


def sampler_alone(run: SamplingRun) -> str:
    """Returns the sampler without its number of steps, like "DDPM"."""
    return sampler(run).replace(f", {run.num_steps} steps", "")


def guidance(run: SamplingRun) -> str:
    """Returns the short names of the guidance of a run, like "SAG + CG", and which has a window."""
    names = [method.short + " in a window" * any(getattr(method, flag) is not None for flag in method.bounds())
             for method in run.active]
    return " + ".join(names) or NO_GUIDANCE


def guidance_flags(run: SamplingRun) -> dict[str, Any]:
    """Returns the flags by value of the guidance that is on, but the names of files, as far as they are not default."""
    return {field.name: value for method in run.active for field in option_fields(type(method))
            if (value := getattr(method, field.name)) != field.default
            and field.name not in {**method.files(), **method.remedies}}


def heads(run: SamplingRun) -> str:
    """Returns how attention is split into heads, by the first method that is on and reads it, or that could."""
    return next((method.heads for method in (*run.active, *run.guidance) if method.heads), "")


def _labelled_apart(table: Table) -> dict[str, str]:
    """Returns the labels of the rows that stand in a section, or are compared there, with others of other labels."""
    labels = {name: Path(row.run.sample.labels).name for name, row in table.rows.items() if row.run.labelled}
    found: dict[str, str] = {}
    for section in table.sections:
        here = {name: labels[name] for name in (*section.rows, section.against_row) if name in labels}
        found |= here if len(set(here.values())) > 1 else {}
    return found


def _words(run: SamplingRun, details: Mapping[type[GuidanceOptions], Mapping[str, str]], common: str) -> str:
    """Returns what sets a run apart. details: the usual ones of each method. common: the usual sampler."""
    words = " + ".join(method.title(details[type(method)]) for method in run.active) or NO_GUIDANCE
    if common in (sampler(run), sampler_alone(run)):
        return words if common == sampler(run) else f"{words}, {run.num_steps} steps"
    return f"{words}, {sampler(run)}"


def _usual_sampler(table: Table) -> str:
    """Returns the most frequent sampler with its steps where at least half of the rows have it.

    Else the sampler alone, where it is the same of all rows; else "".
    """
    samplers = [sampler(row.run) for row in table.rows.values()]
    common = _most_frequent(samplers)
    if 2 * samplers.count(common) >= len(samplers):
        return str(common)
    without_steps = {sampler_alone(row.run) for row in table.rows.values()}
    return without_steps.pop() if len(without_steps) == 1 else ""


def _usual_seed(table: Table) -> int:
    """Returns the most frequent seed."""
    return int(_most_frequent([row.run.sample.seed for row in table.rows.values()]))


def _usual_details(table: Table, kind: type[GuidanceOptions]) -> dict[str, str]:
    """Returns the most frequent details of a method among the rows that have it; none where none has."""
    details = [method.details() for row in table.rows.values() for method in row.run.active if type(method) is kind]
    return {name: _most_frequent([one[name] for one in details if one[name]] or [""])
            for name in details[0]} if details else {}


def _most_frequent(values: Sequence[Any]) -> Any:
    """Returns the most frequent value, the first of those that are equally frequent."""
    return max(dict.fromkeys(values), key=values.count)
