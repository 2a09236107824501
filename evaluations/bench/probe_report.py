"""What a probe says: a table, a chart and numbers, and how well they agree with the rows of a measured table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_folder, write, write_json, write_text
from guided_diffusion.foreign import read_json
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.options import option_fields

from ..metrics import METRICS
from ..reproduction.charts import COLOURS, PT, SHAPES, style_axes, styled_figure
from .probe import Probed, ProbeResult, rank_correlation

FEWEST_ROWS = 3
WIDTH, HEIGHT, LEGEND_LINE = 720, 420, 20


@dataclass(frozen=True)
class Agreement:
    """Rows of a table that a probe says something of.

    predicted: the parts of the error that are left. features_of: the network that gives the metric its name, if any.
    """

    metric: str
    rows: Sequence[str]
    predicted: Sequence[float]
    measured: Sequence[float]
    features_of: str = ""

    @property
    def correlation(self) -> float | None:
        """The rank correlation: 1 where the probe orders the rows as the metric does, from the best to the worst."""
        if len(self.rows) < FEWEST_ROWS:
            return None
        sign = 1 if METRICS[self.metric].direction.reading.startswith("lower") else -1
        return rank_correlation(self.predicted, [sign * value for value in self.measured])


def agreement(result: ProbeResult, path: str | Path, metric: str) -> Agreement:
    """Returns the rows of a table.json with no guidance, or one probed method at a probed block, in the table's order.

    Raises UserError for a file that is none, and for one without the flags of its rows.
    """
    table, values = _measured_table(path, metric)
    lefts = {name: left for name, row in table["rows"].items()
             if name in values and (left := _left(result.probed, row["flags"])) is not None}
    return Agreement(metric, list(lefts), list(lefts.values()), [values[name] for name in lefts],
                     table.get("features_of", ""))


def check_table(path: str | Path, metric: str) -> None:
    """Raises UserError for a file from which `agreement` could not be taken."""
    _measured_table(path, metric)


def _measured_table(path: str | Path, metric: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the content of a table.json, and its values of a metric."""
    table = read_json(Path(path), lambda found: _measured(found, metric) is not None and all(
        "flags" in row for row in found["rows"].values()), flag="--table")
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


def _left(probed: Sequence[Probed], flags: Mapping[str, Any]) -> float | None:
    """Returns what the probe says of a row with these flags of guidance; None where it says nothing."""
    if not flags:
        return 1.0
    for one in probed:
        names = {field.name for field in option_fields(type(one.options))}
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
        "model": options.model or Path(options.model_path).name, "images": options.num_images, "seed": options.seed,
        "levels": [{"step": step, "sigma": sigma} for step, sigma in zip(result.steps, result.sigmas, strict=True)],
        "contrasts": [{
            "method": one.options.short, "block": one.block, "ratios": one.moments.ratios,
            "best_scale": one.moments.scale, "best_scale95": list(one.moments.scale_interval()),
            "left": one.moments.left(one.moments.scale)} for one in result.probed],
        "proposed": [{"method": one.options.short, "block": one.block, "scale": one.moments.scale}
                     for one in result.best],
        "not_probed": dict(result.why),
        "table": None if found is None else {
            "metric": found.metric, "correlation": found.correlation,
            "rows": [{"row": name, "left": left, "measured": value} for name, left, value in
                     zip(found.rows, found.predicted, found.measured, strict=True)]}}


def _lines(result: ProbeResult, found: Agreement | None) -> Iterator[str]:
    """Yields the lines of probe.md."""
    options = result.options
    yield f"# Where contrasts point: {options.model or Path(options.model_path).name}"
    yield ""
    yield (f"{options.num_images:,} images, seed {options.seed}. A column is a noise level sigma, its number the scale "
           "that is best there on average; below 0 the contrast points away from the image. The best scale is one for "
           "all levels, with its 95 % interval; *error left* is the part of the squared error that is left at it.")
    yield ""
    yield f"| contrast | best scale | error left | {' | '.join(f'{sigma:.3g}' for sigma in result.sigmas)} |"
    yield f"|---|---|---|{'---|' * len(result.sigmas)}"
    for one in result.probed:
        low, high = one.moments.scale_interval()
        ratios = " | ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in one.moments.ratios)
        yield (f"| {one.title} | {one.moments.scale:.2f} ({low:.2f} to {high:.2f}) | "
               f"{one.moments.left(one.moments.scale):.4f} | {ratios} |")
    yield ""
    yield "Proposed: " + "; ".join(f"{one.title}, s = {one.moments.scale:.2f}" for one in result.best)
    for short, reason in result.why.items():
        yield f"not probed: {short}: {reason}"
    if found is not None:
        yield from _agreement_lines(found)


def _agreement_lines(found: Agreement) -> Iterator[str]:
    label = METRICS[found.metric].by(found.features_of).label
    yield ""
    if found.correlation is None:
        yield (f"No rank correlation: the table has {len(found.rows)} rows that the probe says something of, and "
               f"{FEWEST_ROWS} different ones are needed.")
    else:
        yield (f"Rank correlation (Spearman) of the error left and {label} over {len(found.rows)} rows: "
               f"{found.correlation:+.2f}; +1 would be the same order from the best to the worst.")
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
