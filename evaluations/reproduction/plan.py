"""The plan of a table, before it is begun: what its rows cost together, the hours on a device, and what is missing.

Hours follow from the time of one evaluation, which is measured on this device or told by the user.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from guided_diffusion import dist_util
from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.checkpoint import ready
from guided_diffusion.execution import timed
from guided_diffusion.late import torch
from guided_diffusion.progress import progress_bar

from ..memory import peak_memory
from .costs import RowCost, cost, network_flops
from .tables import Row, Table

PROBE_SECONDS = 5.0
MOST_CALLS = 20                 # in these seconds
SMALL = 64                      # pixels: larger images are not evaluated on a CPU

_Network = tuple[ModelOptions, int]     # a network, and the images that it evaluates at a time


@dataclass(frozen=True)
class Probe:
    """One evaluation of a row's network on this device.

    seconds: for an image. memory: bytes above the weights for an image.
    """

    device: str
    seconds: float
    memory: float


@dataclass(frozen=True)
class _Rate:
    """How fast a network is.

    seconds_per_flop: of an operation. memory: bytes of activations for an image, None where they are not known. said:
    where these numbers come from, a sentence.
    """

    seconds_per_flop: float
    memory: float | None
    said: str


def probe(row: Row) -> Probe:
    """Times evaluations of the row's network, with random weights, for a few seconds.

    A CPU would take minutes for large images: there, the network sees smaller ones, and time and memory follow from
    the operations and the pixels.
    """
    run, device = row.run, dist_util.dev()
    size, batch = run.model.image_size, run.sample.batch_size
    if device.type == "cpu" and size > SMALL:
        size, batch = SMALL, 1
    model = ready(build_model(run.model), device)
    inputs = [torch.randn(batch, run.model.in_channels, size, size, device=device),
              torch.full((batch,), 500, device=device)]
    if run.model.class_cond:
        inputs.append(torch.zeros(batch, dtype=torch.long, device=device))

    evaluate = partial(model, *inputs)
    with torch.no_grad():
        memory = peak_memory(evaluate)
        until = time.monotonic() + PROBE_SECONDS
        times = [timed(evaluate)]
        while time.monotonic() < until and len(times) < MOST_CALLS:
            times.append(timed(evaluate))
    whole, seen = (network_flops(run.model, pixels)[0] for pixels in (run.model.image_size, size))
    return Probe(str(device), min(times) / batch * whole / seen,
                 memory * 2**20 / batch * (run.model.image_size / size)**2)


def plan(table: Table, references: str | Path, inception: str, ranks: int, seconds: float | None) -> str:
    """Returns the plan of a table as Markdown.

    references: folder of reference batches. inception: as `--inception`. seconds: those of one evaluation of one image
    on the user's device; None where they are to be measured here.
    """
    costs = {name: cost(row, references, inception) for name, row in table.rows.items()}
    rates = _rates(table, seconds)
    ranks_word = f"{ranks} ranks that each have such a device" if ranks > 1 else "one rank"
    return "\n".join([
        f"{table.title}: what it costs", "", *_cost_lines(table, costs, rates, ranks), "",
        *(rate.said for rate in rates.values()), *_unknown_lines(table), *_undescribed_lines(costs),
        f"Hours are those of sampling on {ranks_word}. Memory is that of a rank; the graph that depth-aware "
        "guidance differentiates comes on top. Its gradient counts as one through the whole network where the file of "
        "its predictors is missing.",
        "", *_missing_lines(costs)])


def _cost_lines(table: Table, costs: Mapping[str, RowCost], rates: Mapping[_Network, _Rate], ranks: int) -> list[str]:
    """Returns the lines of the table of costs, the last of which is their sum."""
    lines = ["| row | images | steps | evaluations of an image | PFLOP | disk, GB | memory, GB | hours |",
             "|---|---|---|---|---|---|---|---|"]
    total_hours = 0.0
    for name, row in table.rows.items():
        one, rate = costs[name], rates[_network(row)]
        hours = one.hours(rate.seconds_per_flop, ranks)
        total_hours += hours
        memory = f"{one.weights / 1e9:.2g} of weights" if rate.memory is None else \
            f"{(one.weights + rate.memory * row.run.sample.batch_size) / 1e9:.2g}"
        lines.append(f"| {name} | {row.images} | {one.passes.steps} | {one.passes} | {_short(one.flops / 1e15)} | "
                     f"{_short(one.disk / 1e9)} | {memory} | {_short(hours)} |")
    flops, disk = sum(one.flops for one in costs.values()), sum(one.disk for one in costs.values())
    return [*lines, f"| together | | | | {_short(flops / 1e15)} | {_short(disk / 1e9)} | | {_short(total_hours)} |"]


def _unknown_lines(table: Table) -> list[str]:
    """Returns a line for each missing checkpoint whose network nothing describes."""
    unknown = dict.fromkeys(row.run.sample.model_path for row in table.rows.values()
                            if replace(row.run.model, use_fp16=False, use_bf16=False) == ModelOptions()
                            and not Path(row.run.sample.model_path).is_file())
    return [f"{path} is missing, and no option says what network it holds: its rows are counted with the default one, "
            f"of {ModelOptions().image_size}x{ModelOptions().image_size} images." for path in unknown]


def _undescribed_lines(costs: Mapping[str, RowCost]) -> list[str]:
    """Returns a line for each further network that nothing describes, with the rows that have it."""
    rows: dict[str, list[str]] = {}
    for name, one in costs.items():
        for network in one.undescribed:
            rows.setdefault(network, []).append(name)
    return [f"The {network} (of {', '.join(names)}) counts as the network that is sampled: nothing states how it is "
            "built." for network, names in rows.items()]


def _missing_lines(costs: Mapping[str, RowCost]) -> list[str]:
    """Returns a line for each file that is missing, with the rows that need it."""
    lacking: dict[str, list[str]] = {}
    for name, one in costs.items():
        for file in one.missing:
            lacking.setdefault(str(file), []).append(name)
    if not lacking:
        return ["nothing is missing"]
    return [f"missing ({len(lacking)}):", *(f"- {file}   (for {', '.join(names)})" for file, names in lacking.items())]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _network(row: Row) -> _Network:
    return row.run.model, row.run.sample.batch_size


def _rates(table: Table, seconds: float | None) -> dict[_Network, _Rate]:
    """Returns how fast each network of a table is. seconds: as in `plan`."""
    rows: dict[_Network, list[Row]] = {}
    for row in table.rows.values():
        rows.setdefault(_network(row), []).append(row)
    rates = {}
    with progress_bar(len(rows), "timing", "network", enabled=seconds is None) as progress:
        for network, same in rows.items():
            rates[network] = _rate(same, seconds)
            progress.update()
    return rates


def _rate(rows: list[Row], seconds: float | None) -> _Rate:
    """Returns how fast the network is that these rows share. seconds: as in `plan`."""
    operations = network_flops(rows[0].run.model, rows[0].run.model.image_size)[0]
    name = ", ".join(dict.fromkeys(row.run.sample.model or Path(row.run.sample.model_path).stem for row in rows))
    if seconds is not None:
        return _Rate(seconds / operations, None, f"{name}: {seconds:g} s for an evaluation of one image, as given.")
    found = probe(rows[0])
    return _Rate(found.seconds / operations, found.memory,
                 f"{name}: {found.seconds:.4g} s for an evaluation of one image, measured on {found.device} "
                 f"({operations / found.seconds / 1e12:.3g} TFLOP/s).")
