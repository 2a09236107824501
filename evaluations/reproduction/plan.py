"""What a table costs before it is begun: evaluations, arithmetic, disk, memory, hours, and the files that are missing.

Evaluations are counted by the windows of the guidance terms that a row has, and by what each says a guided step costs
(`terms.Passes`). The arithmetic of each kind is counted on the networks themselves, without
weights; hours follow from the time of one evaluation, measured on this device or told by the user.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import dist_util
from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.checkpoint import ready
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.presets import find_preset, released_names
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.record import MODEL_FLAG
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.unet import Encoder

from ..benchmarks.speed import peak_memory
from ..extractors import find_extractor
from ..extractors.inception_graph import FILE_NAME, is_here
from ..references import find_reference, reference_names
from .tables import DFID, Row, Table

PROBE_SECONDS = 5.0
SMALL = 64                      # pixels: larger images are not evaluated on a CPU


@dataclass(frozen=True)
class RowPasses:
    """Passes through the networks for one image, from noise to sample.

    forward: evaluations of the diffusion network. backward: gradients through them. others: evaluations of further
    networks by name, each with its gradient.
    """

    steps: int
    forward: int
    backward: int
    others: Mapping[str, int]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of each pass for one image; others: of the networks that can be counted."""

    forward: int
    backward: int
    others: Mapping[str, int]


@dataclass(frozen=True)
class Missing:
    """A file that a row needs and has not, and what brings it. blocks: it is needed before the first image."""

    file: str
    remedy: str
    blocks: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.remedy}"


@dataclass(frozen=True)
class RowCost:
    """What a whole row costs."""

    passes: RowPasses
    images: int             # that are evaluated: a last batch is filled up
    flops: int              # without those of networks that only their file describes
    disk: int               # bytes at most, of samples, chunks and features
    weights: int            # bytes
    missing: tuple[Missing, ...]

    def hours(self, seconds_per_flop: float, ranks: int) -> float:
        return self.flops * seconds_per_flop / ranks / 3600


def passes(run: SamplingRun) -> RowPasses:
    """The passes of a run, by the scales and windows of its guidance."""
    t = torch.arange(run.num_steps)
    forward, backward, others = run.num_steps, torch.zeros_like(t, dtype=torch.bool), Counter[str]()
    for method in run.active:
        for term, cost in method.schedule():
            window = term.window(t)
            forward += cost.forward * int(window.sum())
            backward |= window & bool(cost.backward)          # one pass for all terms of a step
            others.update({name: count * int(window.sum()) for name, count in cost.others.items() if window.any()})
    return RowPasses(run.num_steps, forward, int(backward.sum()), dict(others))


def flops(run: SamplingRun) -> Flops:
    """The operations of each pass; a multiplication and an addition count as two."""
    forward, backward = _network_flops(_exact(run.model), run.model.image_size)
    others = {name: _other_flops(method, name, run.model.in_channels, run.model.image_size)
              for method in run.active for name in method.networks()}
    return Flops(forward, backward, others)


def _exact(options: ModelOptions) -> ModelOptions:
    return replace(options, use_fp16=False, use_bf16=False)


@lru_cache
def _network_flops(options: ModelOptions, size: int) -> tuple[int, int]:
    """Of an evaluation at an image of `size` pixels, and of the gradient through it."""
    model, inputs = _on_meta(lambda: build_model(options), options.in_channels, size)
    labels = [torch.zeros(1, dtype=torch.long, device="meta")] if options.class_cond else []
    with torch.no_grad():
        forward = _counted(lambda: model(*inputs, *labels))
    return forward, _counted(lambda: model(*inputs, *labels).sum().backward()) - forward


@lru_cache
def _other_flops(method: GuidanceOptions, name: str, channels: int, size: int) -> int:
    """Of an evaluation of another network of a guidance method, with its gradient."""
    model, inputs = _on_meta(method.networks()[name], channels, size)
    return _counted(lambda: model(*inputs).sum().backward())


def _on_meta(build: Callable[[], nn.Module], channels: int, size: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
        if isinstance(model, Encoder):
            model.convert_to_fp32()
        return model, (torch.empty(1, channels, size, size, requires_grad=True), torch.zeros(1, dtype=torch.long))


def _counted(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cost(row: Row, references: str | Path, inception: str = "") -> RowCost:
    """What a row costs. references: folder of reference batches; inception: as `--inception`."""
    run, count, one = row.run, passes(row.run), flops(row.run)
    images = math.ceil(row.images / run.sample.batch_size) * run.sample.batch_size
    each = count.forward * one.forward + count.backward * one.backward
    each += sum(number * one.others.get(name, 0) for name, number in count.others.items())
    disk = row.images * (2 * 3 * run.model.image_size**2 + find_extractor(row.judging.backend).feature_bytes)
    return RowCost(count, images, images * each, disk, _weights(run), tuple(missing(row, references, inception)))


def _weights(run: SamplingRun) -> int:
    with torch.device("meta"):
        networks = [build_model(run.model), *(build() for method in run.active for build in method.networks().values())]
    return sum(weight.numel() * weight.element_size() for network in networks for weight in network.parameters())


def missing(row: Row, references: str | Path, inception: str = "") -> list[Missing]:
    """What the row needs and has not."""
    run = row.run
    found = []
    for flag, path in run.checkpoints().items():
        if not path or ("://" not in path and not Path(path).is_file()):
            found.append(Missing(path or f"--{flag}", _remedy(run, flag, Path(path).stem)))
    word = row.judging.reference
    if word and find_reference(word, references) is None:
        fetch = (f"python -m evaluations.references {Path(word).stem} --out {references}"
                 if Path(word).stem in reference_names() else "name the folder that holds it with --references")
        found.append(Missing(str(Path(references) / word), fetch))
    needs_graph = find_extractor(row.judging.backend).is_inception and (word or DFID in row.published)
    if needs_graph and not is_here(inception or None):
        found.append(Missing(inception or FILE_NAME, "downloaded when the table is begun, or name it with --inception",
                             blocks=bool(inception)))
    if DFID in row.published:
        needed = [(depth_reference(row, references), "of real images"), (depth_maps(row), "of the samples")]
        found += [Missing(str(file), f"depth {what}, which a network of your choice estimates (evaluations.depth_fid)",
                          blocks=False) for file, what in needed if not file.is_file()]
    return found


def depth_reference(row: Row, references: str | Path) -> Path:
    """The file of depth maps of real images that a row's dFID compares with."""
    return Path(references) / f"{Path(row.run.sample.model_path).stem}_depth.npz"


def depth_maps(row: Row) -> Path:
    """The file of depth maps of a row's samples."""
    return row.run.out / "depth.npz"


def _remedy(run: SamplingRun, flag: str, stem: str) -> str:
    name = run.sample.model if flag == MODEL_FLAG and run.sample.model in released_names() else stem
    if name in released_names():
        return f"python scripts/fetch_models.py {find_preset(name).name}"
    made = next((method.remedies[flag] for method in run.active if flag in method.remedies), None)
    return made or "no such checkpoint was released: train one, or name yours in the row's file"


@dataclass(frozen=True)
class Probe:
    """One evaluation of a row's network on this device."""

    device: str
    seconds: float          # for an image
    memory: float           # bytes above the weights for an image


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

    def evaluate() -> None:
        model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        memory = peak_memory(evaluate)
        times, began = [], time.perf_counter()
        while not times or (time.perf_counter() - began < PROBE_SECONDS and len(times) < 20):
            start = time.perf_counter()
            evaluate()
            times.append(time.perf_counter() - start)
    whole, seen = (_network_flops(_exact(run.model), pixels)[0] for pixels in (run.model.image_size, size))
    return Probe(str(device), min(times) / batch * whole / seen,
                 memory * 2**20 / batch * (run.model.image_size / size)**2)


def plan(table: Table, references: str | Path, inception: str, ranks: int, seconds: float | None) -> str:
    """The plan of a table as Markdown. seconds: of one evaluation for one image on the user's device; None: probed."""
    costs = {name: cost(row, references, inception) for name, row in table.rows.items()}
    rates = _rates(table, seconds)
    lines = [f"{table.title}: what it costs", "",
             "| row | images | steps | evaluations of an image | PFLOP | disk, GB | memory, GB | hours |",
             "|---|---|---|---|---|---|---|---|"]
    hours = 0.0
    for name, row in table.rows.items():
        one, (rate, activations, _) = costs[name], rates[_key(row)]
        hours += one.hours(rate, ranks)
        memory = f"{one.weights / 1e9:.2g} of weights" if activations is None else \
            f"{(one.weights + activations * row.run.sample.batch_size) / 1e9:.2g}"
        lines.append(f"| {name} | {row.images} | {one.passes.steps} | {describe(one.passes)} | "
                     f"{_shown(one.flops / 1e15)} | {_shown(one.disk / 1e9)} | {memory} | "
                     f"{_shown(one.hours(rate, ranks))} |")
    total = sum(one.flops for one in costs.values()) / 1e15
    disk = sum(one.disk for one in costs.values()) / 1e9
    lines += [f"| together | | | | {_shown(total)} | {_shown(disk)} | | {_shown(hours)} |", ""]
    lines += [rates[key][2] for key in rates]
    ranks_word = f"{ranks} ranks that each have such a device" if ranks > 1 else "one rank"
    lines.append(f"Hours are those of sampling on {ranks_word}. Memory is that of a rank; the graph that depth-aware "
                 "guidance differentiates comes on top, and so do the evaluations of its prior.")
    lacking: dict[str, list[str]] = {}
    for name, one in costs.items():
        for thing in one.missing:
            lacking.setdefault(str(thing), []).append(name)
    lines += ["", *([f"missing ({len(lacking)}):"] if lacking else ["nothing is missing"])]
    lines += [f"- {thing}   (for {', '.join(names)})" for thing, names in lacking.items()]
    return "\n".join(lines)


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe(count: RowPasses) -> str:
    """`40`, or `40 + 20 back + 20 of the classifier`."""
    parts = [(count.backward, "back"), *((number, f"of the {name}") for name, number in count.others.items())]
    return " + ".join([str(count.forward), *(f"{number} {word}" for number, word in parts if number)])


def _key(row: Row) -> tuple[ModelOptions, int]:
    return row.run.model, row.run.sample.batch_size


def _rates(table: Table, seconds: float | None) -> Mapping[tuple[ModelOptions, int], tuple[float, float | None, str]]:
    """For each network: seconds of an operation, bytes of activations of an image, and a sentence about them."""
    kinds: dict[tuple[ModelOptions, int], list[Row]] = {}
    for row in table.rows.values():
        kinds.setdefault(_key(row), []).append(row)
    rates = {}
    for key, rows in progress_bar(len(kinds), "timing", "network", enabled=seconds is None, iterable=kinds.items()):
        row, operations = rows[0], flops(rows[0].run).forward
        name = ", ".join(dict.fromkeys(row.run.sample.model or Path(row.run.sample.model_path).stem for row in rows))
        if seconds is not None:
            rates[key] = (seconds / operations, None,
                          f"{name}: {seconds:g} s for an evaluation of one image, as given.")
            continue
        found = probe(row)
        rates[key] = (found.seconds / operations, found.memory,
                      f"{name}: {found.seconds:.4g} s for an evaluation of one image, measured on {found.device} "
                      f"({operations / found.seconds / 1e12:.3g} TFLOP/s).")
    return rates
