"""The results of a table as they are written to table.json: its rows in words, and its sections with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import read_json

from ..metrics import METRICS, Replicates
from .costs import equivalent_evaluations, passes
from .measurements import EvaluationSettings, Measurements, section_images
from .missing import needs_depth_maps
from .tables import DFID, Row, Section, Table
from .titles import guidance, guidance_flags, heads, sampler_alone, titles, usual
from .verdicts import NOT_RUN, jointly, not_comparable, overall, verdict, versus

NOTHING = {"network": None, "reference": None}          # of a row that was not evaluated


@dataclass(frozen=True)
class _Evaluated:
    """What the results of the sections follow from. why: of rows that were not run, the reason."""

    table: Table
    numbers: Measurements
    why: Mapping[str, str]
    settings: EvaluationSettings


def results(table: Table, numbers: Measurements, why: Mapping[str, str], settings: EvaluationSettings,
            ) -> dict[str, Any]:
    """Returns what table.json holds. why: of rows that were not run, the reason."""
    evaluated = _Evaluated(table, numbers, why, settings)
    return {
        "table": table.name, "title": table.title, "source": table.source, "note": table.note,
        "settings": usual(table), "chart": table.chart and asdict(table.chart),
        "bootstrap": settings.bootstrap, "precision_recall": table.precision_recall,
        # Of the first row, as they stood before each row had its own.
        **next((numbers.by_row[name] for name in table.rows if name in numbers.by_row), NOTHING),
        **({"features_of": network} if (network := features_of(table)) else {}),
        "rows": {name: {**_row(table.rows[name], title, why.get(name, "")),
                        **numbers.by_row.get(name, NOTHING)}
                 for name, title in titles(table).items()},
        "sections": [_section(section, evaluated) for section in table.sections],
        "warnings": list(numbers.warnings),
    }


def features_of(table: Table) -> str:
    """Returns the network that the names of the table's metrics say, "" where they say none.

    Raises UserError where rows differ in it, and where such a row has published numbers, which are Inception's.
    """
    networks = {name: kind.network if (kind := row.evaluation.kind) else "" for name, row in table.rows.items()}
    if len(set(networks.values())) > 1:
        said = ", ".join(f"{name} {table.rows[name].evaluation.backend}" for name in networks)
        raise UserError(f"{table.name}: mixes networks whose numbers have different names ({said}): evaluate all rows "
                        "with one backend")
    for name, row in table.rows.items():
        if row.published and networks[name]:
            raise UserError(f"backend {row.evaluation.backend} of row {name} in {row.file}: its numbers stand beside "
                            "no published ones, leave these out or pass another backend")
    return next(iter(networks.values()), "")


def _row(row: Row, title: str, why: str) -> dict[str, Any]:
    """Returns what is said of a row in all sections. why: the reason where it was not run."""
    count = passes(row.run)
    described = {"title": title, "guidance": guidance(row.run), "sampler": sampler_alone(row.run),
                 "state": NOT_RUN if why else "measured", "why": why,
                 "images": row.images, "seed": row.run.sample.seed, "samples": None, "sha256": None,
                 "network_sha256": None, "heads": heads(row.run), "dtype": row.run.configuration()["dtype"],
                 "evaluations": round(count.forward, 2), "gradients": count.backward + sum(count.others.values()),
                 "work": round(equivalent_evaluations(row.run), 2), "flags": guidance_flags(row.run),
                 "seconds": None, "images_per_second": None, "device": None, "ranks": None,
                 "published_source": row.evaluation.source,
                 "note": row.evaluation.note}
    if why:
        return described
    record = read_json(row.run.out / "run.json", lambda found: "chunks" in found["timing"] and "sha256" in found)
    chunks = [chunk for chunk in record["timing"]["chunks"] if chunk["seconds"]]
    seconds = sum(chunk["seconds"] for chunk in chunks)
    speed = sum(chunk["images"] for chunk in chunks) / seconds if seconds else None
    return {**described, "samples": f"{row.name}/{row.run.samples.name}", "sha256": record["sha256"]["samples"],
            "network_sha256": record["sha256"].get("model"), "seconds": round(seconds, 1),
            "images_per_second": speed and round(speed, 3), "device": record.get("device"),
            "ranks": record.get("ranks")}


def _section(section: Section, evaluated: _Evaluated) -> dict[str, Any]:
    """Returns a section with the numbers of its rows."""
    table = evaluated.table
    sampled = [name for name in table.rows if name not in evaluated.why]
    count = section_images(table, section, sampled)
    rows = []
    for name in section.rows:
        row = table.rows[name]
        reasons = [] if name in evaluated.why or not row.published else \
            not_comparable(row, count, _changed(name, evaluated))
        alike = _are_alike(row, table.rows[section.base])
        base = evaluated.numbers.replicates.get((section.base, count), {}) if alike and name != section.base else {}
        metrics = _metrics(row, evaluated.numbers.replicates.get((name, count), {}), base, reasons)
        if needs_depth_maps(row):
            depth = evaluated.numbers.depth.get(name, {})
            metrics[DFID] = _compared(depth.get("value"), depth.get("interval95"), row.published[DFID], reasons)
            if "why" in depth:
                reasons = [*reasons, f"dFID: {depth['why']}"]
        if not alike and name in sampled:
            reasons = [*reasons, f"no difference from row {section.base}, which has another reference or backend"]
        for number, word in zip(metrics.values(), jointly([number["verdict"] for number in metrics.values()]),
                                strict=True):
            number["verdict"] = word
        rows.append({"row": name, "against": _set_apart(row, section.against) if section.against else None,
                     "verdict": overall([number["verdict"] for number in metrics.values()]), "reasons": reasons,
                     "metrics": metrics})
    return {"title": section.title, "images": count, "against": section.against, "against_row": section.base,
            **({"images_seen": section.images_seen} if section.images_seen else {}), "rows": rows}


def _changed(name: str, evaluated: _Evaluated) -> list[str]:
    """Returns what is not as in a row's file, in words, and where its network is not the file that others have."""
    caveat = evaluated.numbers.by_row.get(name, {}).get("network", {}).get("caveat", "")
    return [*evaluated.settings.changed.get(name, ()), *filter(None, [caveat])]


def _are_alike(row: Row, other: Row) -> bool:
    """Whether two rows are evaluated by one network against one reference, so that their numbers can be compared."""
    return (row.evaluation.reference, row.evaluation.backend) == (other.evaluation.reference, other.evaluation.backend)


def _set_apart(row: Row, flag: str) -> Any:
    """Returns the value of an option of a row; None where it belongs to a method that is off, like the blur of SAG.

    Where the option itself switches the method on, its value says that it is off.
    """
    off = [method for method in row.run.guidance if method not in row.run.active]
    idle = any(flag in asdict(method) and flag not in method.switched_on for method in off)
    return None if idle else row.run.configuration()[flag]


def _metrics(row: Row, measured: Mapping[str, Replicates], base: Mapping[str, Replicates], reasons: Sequence[str],
             ) -> dict[str, dict[str, Any]]:
    """Returns the numbers of a row by the words of the metrics. base: of the row that it is compared with."""
    words = [*row.evaluation.words, *(word for word in row.published if word not in row.evaluation.words)]
    return {word: _number(word, measured.get(word), row.published.get(word), reasons, base.get(word))
            for word in words if word in measured or word in row.published}


def _number(word: str, measured: Replicates | None, published: float | None, reasons: Sequence[str],
            base: Replicates | None) -> dict[str, Any]:
    """Returns a number beside the published one, and its difference from that of the row it is compared with."""
    value, bounds = (None, None) if measured is None else (measured.estimate, METRICS[word].bounds(measured))
    described = _compared(value, bounds and list(bounds), published, reasons)
    if measured is not None and base is not None:
        difference = measured.minus(base)
        bounds = difference.interval
        described["versus"] = {"difference": difference.estimate, "interval95": bounds and list(bounds),
                               "verdict": versus(word, *(bounds or (None, None)))}
    return described


def _compared(value: float | None, bounds: list[float] | None, published: float | None, reasons: Sequence[str],
              ) -> dict[str, Any]:
    """Returns a number beside the published one."""
    difference = None if value is None or published is None else value - published
    return {"value": value, "interval95": bounds, "published": published, "difference": difference,
            "verdict": verdict(value, bounds, published, reasons), "versus": None}
