"""What a probe says: a table, a chart and numbers, and how well they agree with the rows of a measured table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guided_diffusion.checkpoint import locate
from guided_diffusion.dist_util import say
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import check_folder, write, write_json, write_text
from guided_diffusion.foreign import read_json
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.options import option_fields

from ..metrics import METRICS
from ..reproduction.charts import COLOURS, PT, SHAPES, style_axes, styled_figure
from .probe import Probed, ProbeResult, rank_correlation

FEWEST_ROWS = 3
EVALUATIONS = re.compile(r"_(\d+)$")                    # in the name of a row of a bench
STEPS = re.compile(r"(?:[^,;]+, )?(\d+) steps")         # after the sampler, where it is said, see `titles`
WIDTH, HEIGHT, LEGEND_LINE = 720, 420, 20


@dataclass(frozen=True)
class Agreement:
    """Rows of a table that a probe says something of, and that differ in guidance alone.

    predicted: the parts of the error that are left. features_of: the network that gives the metric its name, if any.
    sampled: what the rows have in common, like "DDPM, 20 steps". left_out: how many rows are not compared, by reason.
    """

    metric: str
    rows: Sequence[str]
    predicted: Sequence[float]
    measured: Sequence[float]
    features_of: str = ""
    sampled: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def correlation(self) -> float | None:
        """The rank correlation: 1 where the probe orders the rows as the metric does, from the best to the worst."""
        if len(self.rows) < FEWEST_ROWS:
            return None
        sign = 1 if METRICS[self.metric].direction.lower_is_better else -1
        return rank_correlation(self.predicted, [sign * value for value in self.measured])


def agreement(result: ProbeResult, path: str | Path, metric: str) -> Agreement:
    """Returns the rows of a table.json with no guidance, or one probed method at a probed block, in the table's order.

    Of these, the rows of the sampler and the number of steps that most of them have, or of a bench, in which steps are
    part of the comparison, the number of evaluations. Raises UserError for a file that is none, and for one without the
    flags of its rows.
    """
    table, values = _measured_table(path, metric)
    rows = table["rows"]
    lefts = {name: left for name, row in rows.items()
             if name in values and (left := _left(result.probed, row["flags"])) is not None}
    sampled = _sampled(table)
    most = Counter(sampled[name] for name in lefts).most_common(1)
    common = most[0][0] if most else ""
    chosen = [name for name in lefts if sampled[name] == common]
    left_out = {"sampled otherwise": len(lefts) - len(chosen),
                "of which the probe says nothing": len(values) - len(lefts),
                "with another number of images, or without the metric": len(rows) - len(values)}
    return Agreement(metric, chosen, [lefts[name] for name in chosen], [values[name] for name in chosen],
                     table.get("features_of", ""), common, {why: count for why, count in left_out.items() if count})


def check_table(path: str | Path, metric: str, model_path: str | Path) -> None:
    """Raises UserError for a file from which `agreement` could not be taken, or which is of another network.

    A table that does not say of which network it is, as older ones, is taken, and a line says so.
    """
    table, _ = _measured_table(path, metric)
    known = {row["network_sha256"] for row in table["rows"].values() if row.get("network_sha256")}
    if not known:
        say(f"--table {path}: does not say of which network it is, and is taken as one of {model_path}")
    elif sha256_of(locate(model_path)) not in known:
        raise UserError(f"--table {path}: is of another network than {model_path}, which is probed")


def _measured_table(path: str | Path, metric: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the content of a table.json, and its values of a metric."""
    table = read_json(Path(path), lambda found: _measured(found, metric) is not None and _sampled(found) is not None
                      and all("flags" in row for row in found["rows"].values()), flag="--table")
    values = _measured(table, metric)
    if not values:
        raise UserError(f"--metric {metric}: no row of {path} has it")
    return table, values


def _measured(table: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Returns the metric of the rows of the number of images that most rows have, by their names."""
    counts = Counter(section["images"] for section in table["sections"] for _ in section["rows"])
    images = max(counts, key=counts.__getitem__)
    return {row["row"]: row["metrics"][metric]["value"] for section in table["sections"] if section["images"] == images
            for row in section["rows"] if row["metrics"].get(metric, {}).get("value") is not None}


def _sampled(table: Mapping[str, Any]) -> dict[str, str]:
    """Returns how each row was sampled, like "DDPM, 20 steps", of a bench like "DDPM, at most 20 evaluations".

    Rows of a bench are named by their evaluations. The number of steps stands in a row's title, or where most rows have
    it, in the settings of the table; the sampler as well in tables whose rows do not name it.
    """
    rows = table["rows"]
    allowed = {name: int(found[1]) for name in rows if (found := EVALUATIONS.search(name))}
    if all(row.get("work", math.inf) <= allowed.get(name, 0) for name, row in rows.items()):
        return {name: f"{row['sampler']}, at most {allowed[name]} evaluations" for name, row in rows.items()}
    said = {name: STEPS.search(row.get("title", "")) or STEPS.search(table.get("settings", ""))
            for name, row in rows.items()}
    return {name: "" if words is None else f"{rows[name]['sampler']}, {words[1]} steps" if "sampler" in rows[name]
            else words[0].strip() for name, words in said.items()}


def _left(probed: Sequence[Probed], flags: Mapping[str, Any]) -> float | None:
    """Returns what the probe says of a row with these flags of guidance; None where it says nothing."""
    if not flags:
        return 1.0
    for one in probed:
        names = {option.name for option in option_fields(type(one.options))}
        if not flags.keys() <= names:
            continue
        row = _with(one.options, flags)
        if replace(row, **one.options.switched_on) == one.options:
            (term, _), *_ = row.schedule()
            return one.moments.left(term.scale)
    return None


def _with(probed: GuidanceOptions, flags: Mapping[str, Any]) -> GuidanceOptions:
    """Returns a method with the flags of a row, and the files of the probe."""
    files = {flag: getattr(probed, flag) for flag in {**probed.files(), **probed.remedies}}
    return type(probed)(**{**files, **flags})


def write_probe(result: ProbeResult) -> str:
    """Writes probe.json, probe.md and chart.png into the folder of the options; returns probe.md.

    Raises UserError where they cannot be written.
    """
    folder = check_folder("--out", Path(result.options.out))
    found = agreement(result, result.options.table, result.options.metric) if result.options.table else None
    text = "\n".join(_lines(result, found))
    write_json(folder / "probe.json", described(result, found))
    write_text(folder / "probe.md", text + "\n")
    _write_chart(folder / "chart.png", result)
    return text


def described(result: ProbeResult, found: Agreement | None) -> dict[str, Any]:
    """Returns what probe.json holds. found: of a table, None where there is none."""
    options = result.options
    return {
        "model": options.model or Path(options.model_path).name,
        **({"checkpoint_entry": options.checkpoint_entry} if options.checkpoint_entry else {}),
        "images": options.num_images, "seed": options.seed,
        "levels": [{"step": step, "sigma": sigma} for step, sigma in zip(result.steps, result.sigmas, strict=True)],
        "contrasts": [{
            "method": one.options.short, "block": one.block, "ratios": one.moments.ratios,
            "best_scale": one.moments.scale, "best_scale95": list(one.moments.scale_interval()),
            "left": one.moments.left(one.moments.scale)} for one in result.probed],
        "proposed": [{"method": one.options.short, "block": one.block, "scale": one.moments.scale}
                     for one in result.proposed],
        "not_probed": dict(result.why),
        "table": None if found is None else {
            "metric": found.metric, "correlation": found.correlation, "sampled": found.sampled,
            "left_out": dict(found.left_out),
            "rows": [{"row": name, "left": left, "measured": value} for name, left, value in
                     zip(found.rows, found.predicted, found.measured, strict=True)]}}


def _lines(result: ProbeResult, found: Agreement | None) -> Iterator[str]:
    """Yields the lines of probe.md."""
    options = result.options
    yield f"# Where contrasts point: {options.model or Path(options.model_path).name}"
    yield ""
    yield (f"{options.num_images:,} images, drawn at random, seed {options.seed}. A column is a noise level sigma, its "
           "number the scale that is best there on average; below 0 the contrast points away from the image. The best "
           "scale is one for all levels, with its 95 % interval; *error left* is the part of the squared error that is "
           "left at it: of the images that chose it, so that it is never above 1.")
    yield ""
    yield f"| contrast | best scale | error left | {' | '.join(f'{sigma:.3g}' for sigma in result.sigmas)} |"
    yield f"|---|---|---|{'---|' * len(result.sigmas)}"
    for one in result.probed:
        low, high = one.moments.scale_interval()
        ratios = " | ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in one.moments.ratios)
        yield (f"| {one.title} | {one.moments.scale:.2f} ({low:.2f} to {high:.2f}) | "
               f"{one.moments.left(one.moments.scale):.4f} | {ratios} |")
    yield ""
    proposed = {one.title: f"{one.title}, s = {one.moments.scale:.2f}" for one in result.proposed}
    yield f"Proposed: {'; '.join(proposed.values()) or 'nothing'}"
    if others := [one.title for one in result.best if one.title not in proposed]:
        yield ("not proposed: " + "; ".join(others) + ": their best scale is not above 0 beyond chance, as the best of "
               "all blocks of the method")
    for short, reason in result.why.items():
        yield f"not probed: {short}: {reason}"
    if found is not None:
        yield from _agreement_lines(found)


def _agreement_lines(found: Agreement) -> Iterator[str]:
    label = METRICS[found.metric].by(found.features_of).label
    yield ""
    rows = f"{len(found.rows)} rows{f' of {found.sampled}' if found.sampled else ''}"
    if found.correlation is None:
        yield (f"No rank correlation: the table has {rows} that the probe says something of, and "
               f"{FEWEST_ROWS} different ones are needed.")
    else:
        yield (f"Rank correlation (Spearman) of the error left and {label} over {rows}: "
               f"{found.correlation:+.2f}; +1 would be the same order from the best to the worst.")
    if found.left_out:
        yield ""
        yield f"Left out: {', '.join(f'{count} {why}' for why, count in found.left_out.items())}."
    yield ""
    yield f"| row | error left | {label} |"
    yield "|---|---|---|"
    for name, left, value in zip(found.rows, found.predicted, found.measured, strict=True):
        yield f"| {name} | {left:.4f} | {value:.4g} |"


def _write_chart(path: Path, result: ProbeResult) -> None:
    """Writes R(t) against the noise level, a line for each method at its best block; linear from -1 to 1."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    description = "The best scale of each method at each noise level"
    with styled_figure(WIDTH, HEIGHT + LEGEND_LINE * len(result.best), description) as figure:
        axes = figure.add_subplot()
        for place, one in enumerate(result.best):
            points = [(sigma, ratio) for sigma, ratio in zip(result.sigmas, one.moments.ratios, strict=True)
                      if ratio is not None]
            axes.plot([sigma for sigma, _ in points], [ratio for _, ratio in points], "-" + SHAPES[place % len(SHAPES)],
                      color=COLOURS[place % len(COLOURS)], label=one.title)
        axes.axhline(0, color="#444444", linewidth=1)
        axes.set_xscale("log")
        if all(ratio is None for one in result.best for ratio in one.moments.ratios):
            axes.set_xlim(0.9 * min(result.sigmas), 1.1 * max(result.sigmas))       # a scale without points has no end
        axes.set_yscale("symlog", linthresh=1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        style_axes(axes, "noise level sigma", "best scale at that level")
        if result.best:
            figure.legend(loc="outside lower left", frameon=False)
        write(path, lambda file: figure.savefig(file, format="png", dpi=2 * PT, facecolor="#ffffff",
                                                metadata={"Software": None}))
