"""From sampled rows to numbers and verdicts.

A number counts as *reproduced* where the published one lies within its 95 % bootstrap interval, widened by the square
root of two, as the published number is of a random sample too, and by half a unit of its last digit; else it *differs*.
It is *not comparable* where it is of another number of images, another reference or other attention heads than the
published one, or where one of these is not known of the published one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE, GuidanceOptions
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.sample import SamplingRun

from ..depth.fid import DepthFidOptions, DepthFile, depth_fid
from ..evaluation import Evaluation, EvaluatorOptions, ExtractorOptions, load_extractor_once
from ..metrics import METRICS as KNOWN_METRICS
from ..metrics import Comparison, FileFeatures, Replicates
from ..references import find_reference
from .costs import passes
from .missing import depth_maps, depth_reference
from .tables import DECIMALS, DFID, METRICS, EvaluationSpec, Row, Section, Table, smallest

REPRODUCED, DIFFERS, NOT_COMPARABLE, NOT_RUN = "reproduced", "differs", "not comparable", "not run here"
BETTER, WORSE, EQUAL = "better", "worse", "no difference"
HALF_UNIT = 0.5 * 10.0**-DECIMALS
# The direction in which a number is better.
GOOD = {"fid": -1, "sfid": -1, "is": 1, "precision": 1, "recall": 1, DFID: -1}


@dataclass(frozen=True)
class Circumstances:
    """How the rows are judged. changed: by row, what of that is not as the row's file has it, in words."""

    references: Path                    # folder of reference batches
    network: ExtractorOptions           # without its backend, which the rows name
    bootstrap: int
    changed: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Numbers:
    """Of the rows that were sampled: by row and number of images, by the words of the metrics."""

    replicates: Mapping[tuple[str, int], Mapping[str, Replicates]]
    depth: Mapping[str, Mapping[str, Any]]          # dFID: value and interval95, or why there is none
    reference: Mapping[str, Any] | None             # of the first row: file, images, sha256
    network: Mapping[str, Any] | None


def measure(table: Table, sampled: Sequence[str], how: Circumstances, features: Path) -> Numbers | None:
    """Sees every sample file once and computes all numbers of all sections; None on ranks other than the first.

    sampled: names of the rows that there are samples of. features: folder that keeps what the networks saw.
    """
    wanted = _wanted(table, sampled)
    groups: dict[EvaluationSpec, list[str]] = {}
    for name in sampled:
        spec = table.rows[name].evaluation
        if spec.reference:
            key = EvaluationSpec(reference=spec.reference, backend=spec.backend)
            groups.setdefault(key, []).append(name)
    replicates: dict[tuple[str, int], dict[str, Replicates]] = {}
    networks: dict[str, Any] = {}
    first: tuple[Any, Any] = (None, None)
    with progress_bar(len(wanted), "evaluating", "row", enabled=dist_util.is_main()) as progress:
        for spec, names in groups.items():
            options = replace(how.network, backend=spec.backend)
            if spec.backend not in networks:
                networks[spec.backend] = load_extractor_once(options)
            network = networks[spec.backend]
            chosen = EvaluatorOptions(metrics=",".join(METRICS), bootstrap=how.bootstrap)
            with dist_util.together():
                evaluation = Evaluation(str(find_reference(spec.reference, how.references)),
                                        [str(table.rows[name].run.samples) for name in names], options, chosen,
                                        extractor=network)
            reference, sides = evaluation.features(features)
            if not dist_util.is_main():
                continue
            if first[0] is None:
                first = (_described(reference), {"name": network.name, "sha256": network.fingerprint})
            for name, side in zip(names, sides, strict=True):
                for count in wanted[name]:
                    comparison = Comparison(reference, side.first(count), chosen.settings)
                    replicates[name, count] = _replicates(comparison, how.bootstrap)
                progress.update()
    depth = {name: _dfid(table.rows[name], how) for name in sampled if DFID in table.rows[name].published}
    return Numbers(replicates, depth, *first) if dist_util.is_main() else None


def _wanted(table: Table, sampled: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of images that each row is evaluated with: as many as the smallest row of each section has."""
    wanted: dict[str, list[int]] = {name: [] for name in sampled}
    for section in table.sections:
        count = section_images(table, section, sampled)
        for name in section.rows:
            if name in wanted and count not in wanted[name]:
                wanted[name].append(count)
    return wanted


def section_images(table: Table, section: Section, sampled: Sequence[str]) -> int:
    rows = [table.rows[name] for name in section.rows]
    return smallest([row for row in rows if row.name in sampled] or rows)


def _described(reference: FileFeatures) -> dict[str, Any]:
    described = reference.description()
    return {"file": Path(described["file"]).name, "images": described["images"], "sha256": described["sha256"]}


def _replicates(comparison: Comparison, count: int) -> dict[str, Replicates]:
    """By the words of METRICS, without an Inception Score that is not a number."""
    found = {word: KNOWN_METRICS[word].replicates(comparison, count) for word in METRICS}
    return {word: number for word, number in found.items() if math.isfinite(number.estimate)}


def _dfid(row: Row, how: Circumstances) -> dict[str, Any]:
    """DFID of the depth maps that the user has estimated of a row's samples, or why there is none."""
    samples, reference = depth_maps(row), depth_reference(row, how.references)
    absent = [str(path) for path in (reference, samples) if not path.is_file()]
    if absent:
        return {"why": f"estimate depth with one network for the reference and the samples, into {' and '.join(absent)}"
                       " (evaluations.depth_fid says how such a file looks)"}
    with dist_util.together():
        if (count := DepthFile(str(samples)).shape[0]) != row.images:
            raise UserError(f"{samples}: holds {count} depth maps, the row has {row.images} images")
    found = depth_fid(str(reference), [str(samples)], replace(how.network, backend=row.evaluation.backend),
                      DepthFidOptions(bootstrap=how.bootstrap))
    return {"value": found[0]["metrics"][DFID], "interval95": list(found[0]["intervals95"][DFID])} if found else {}


# What stands in the table


def results(table: Table, numbers: Numbers, why: Mapping[str, str], how: Circumstances) -> dict[str, Any]:
    """The table as it is written to table.json. why: of rows that were not run, the reason."""
    sampled = [name for name in table.rows if name not in why]
    return {
        "table": table.name, "title": table.title, "source": table.source, "note": table.note,
        "settings": usual(table),
        "bootstrap": how.bootstrap, "network": numbers.network, "reference": numbers.reference,
        "rows": {name: _row(table, name, why.get(name, "")) for name in table.rows},
        "sections": [_section(table, section, numbers, why, how, section_images(table, section, sampled))
                     for section in table.sections],
    }


def _row(table: Table, name: str, why: str) -> dict[str, Any]:
    row = table.rows[name]
    count = passes(row.run)
    described = {"title": title(row.run, table), "state": NOT_RUN if why else "measured", "why": why,
                 "images": row.images, "samples": None, "sha256": None, "heads": heads(row.run),
                 "evaluations": count.forward, "gradients": count.backward + sum(count.others.values()),
                 "seconds": None, "images_per_second": None, "published_source": row.evaluation.source,
                 "note": row.evaluation.note}
    if why:
        return described
    record = json.loads((row.run.out / "run.json").read_text())
    chunks = [chunk for chunk in record["timing"]["chunks"] if chunk["seconds"]]
    seconds = sum(chunk["seconds"] for chunk in chunks)
    speed = sum(chunk["images"] for chunk in chunks) / seconds if seconds else None
    return {**described, "samples": f"{name}/{row.run.samples.name}", "sha256": record["sha256"]["samples"],
            "seconds": round(seconds, 1), "images_per_second": speed and round(speed, 3)}


def _section(table: Table, section: Section, numbers: Numbers, why: Mapping[str, str], how: Circumstances,
             count: int) -> dict[str, Any]:
    base = numbers.replicates.get((section.rows[0], count), {})
    rows = []
    for name in section.rows:
        row = table.rows[name]
        reasons = [] if name in why or not row.published else not_comparable(row, count, how.changed.get(name, ()))
        measured = numbers.replicates.get((name, count), {})
        described = {word: _number(word, measured.get(word), row.published.get(word), reasons,
                                   base.get(word) if name != section.rows[0] else None)
                     for word in METRICS if word in measured or word in row.published}
        if DFID in row.published:
            depth = numbers.depth.get(name, {})
            described[DFID] = _compared(depth.get("value"), depth.get("interval95"), row.published[DFID], reasons)
            if "why" in depth:
                reasons = [*reasons, f"dFID: {depth['why']}"]
        rows.append({"row": name, "against": row.run.configuration()[section.against] if section.against else None,
                     "verdict": overall([number["verdict"] for number in described.values()]), "reasons": reasons,
                     "metrics": described})
    return {"title": section.title, "images": count, "against": section.against, "rows": rows}


def _number(word: str, measured: Replicates | None, published: float | None, reasons: Sequence[str],
            base: Replicates | None) -> dict[str, Any]:
    value, bounds = (None, None) if measured is None else (measured.estimate, list(measured.interval))
    described = _compared(value, bounds, published, reasons)
    if measured is not None and base is not None:
        difference = measured.minus(base)
        described["versus"] = {"difference": difference.estimate, "interval95": list(difference.interval),
                               "verdict": versus(word, *difference.interval)}
    return described


def _compared(value: float | None, bounds: list[float] | None, published: float | None, reasons: Sequence[str],
              ) -> dict[str, Any]:
    difference = None if value is None or published is None else value - published
    return {"value": value, "interval95": bounds, "published": published, "difference": difference,
            "verdict": verdict(value, bounds, published, reasons), "versus": None}


def verdict(value: float | None, bounds: Sequence[float] | None, published: float | None, reasons: Sequence[str],
            ) -> str:
    """What a measured number says of the published one; nothing where none was published. See the module."""
    if published is None:
        return ""
    if value is None or bounds is None:
        return NOT_RUN
    if reasons:
        return NOT_COMPARABLE
    low, high = (value + math.sqrt(2) * (bound - value) for bound in bounds)
    return REPRODUCED if low - HALF_UNIT <= published <= high + HALF_UNIT else DIFFERS


def overall(verdicts: Sequence[str]) -> str:
    """Of a row: the worst of its numbers' verdicts."""
    order = (NOT_COMPARABLE, DIFFERS, REPRODUCED, NOT_RUN)
    return next((word for word in order if word in verdicts), "")


def not_comparable(row: Row, images: int, changed: Sequence[str]) -> list[str]:
    """Why the row's numbers cannot be held against the published ones; empty where they can."""
    spec, reasons = row.evaluation, list(changed)
    if spec.images is None:
        reasons.append("the number of images of the published number is not known")
    elif images != spec.images:
        reasons.append(f"{images:,} images, published with {spec.images:,}")
    used = {method.heads for method in row.run.active} - {None}
    if spec.heads and used - {spec.heads}:
        reasons.append(f"attention heads {', '.join(used)}, published with {spec.heads}")
    return reasons


def versus(word: str, low: float, high: float) -> str:
    """What the interval of a difference says."""
    low, high = sorted((GOOD[word] * low, GOOD[word] * high))
    return BETTER if low > 0 else WORSE if high < 0 else EQUAL


# A row in words: settings that most rows have are said once


def title(run: SamplingRun, table: Table) -> str:
    """A row's guidance and sampler, like `SAG s = 0.25, psi = 1.3`, without what `usual` says."""
    words = " + ".join(method.title(_usual_details(table, type(method))) for method in run.active) or "no guidance"
    common = _usual([sampler(row.run) for row in table.rows.values()])
    return words if sampler(run) == common else f"{words}, {sampler(run)}"


def usual(table: Table) -> str:
    """What holds where a row's title says nothing else."""
    rows = list(table.rows.values())
    parts = [_usual([sampler(row.run) for row in rows]), f"seed {_usual([row.run.sample.seed for row in rows])}"]
    for method in GUIDANCE:
        if details := _usual_details(table, method):
            parts.append(f"{method.short}: {', '.join(details.values())}")
    return "; ".join(parts)


def _usual_details(table: Table, kind: type[GuidanceOptions]) -> dict[str, str]:
    """The most frequent details of a method among the rows that have it; none where none has."""
    details = [method.details() for row in table.rows.values() for method in row.run.active if type(method) is kind]
    return _usual(details) if details else {}


def sampler(run: SamplingRun) -> str:
    """Like `DDPM, 250 steps`."""
    return f"{run.sampler.title}, {run.num_steps} steps"


def _usual(values: Sequence[Any]) -> Any:
    """The most frequent value; of dicts, by each name."""
    if isinstance(values[0], dict):
        return {name: _usual([value[name] for value in values]) for name in values[0]}
    return max(dict.fromkeys(values), key=values.count)


def heads(run: SamplingRun) -> str:
    """How attention is split into heads, by the first method that is on and reads it, or that could."""
    return next((method.heads for method in (*run.active, *run.guidance) if method.heads), "")
