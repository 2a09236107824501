"""What a row of a table costs, before it is begun: evaluations, arithmetic, disk and weights.

Evaluations are counted by the windows of the guidance terms that a row has, and by what each term says that a guided
step costs (`terms.Passes`); one that begins inside the network is the part of an evaluation that its operations are.
The arithmetic of each kind is counted on the networks themselves, without weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.capture import capture_prefix, first_block
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.runs.sample import SamplingRun

from .missing import MissingFile, missing_files
from .tables import Row

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

Network = TypeVar("Network", bound="nn.Module")


@dataclass(frozen=True)
class RowPasses:
    """Passes through the networks for one image, from noise to sample.

    forward: evaluations of the diffusion network, parts included. backward: gradients through them. others: evaluations
    of further networks by name, each with its gradient. plain: those without one.
    """

    steps: int
    forward: float
    backward: int
    others: Mapping[str, int]
    plain: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Like "40", "34.8", or "40 + 20 back + 20 of the classifier"."""
        parts = [(self.backward, "back"), *((count, f"of the {name}") for name, count in self.others.items()),
                 *((count, f"of the {name}, no gradient") for name, count in self.plain.items())]
        return " + ".join([f"{round(self.forward, 1):.10g}", *(f"{count} {word}" for count, word in parts if count)])


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of each pass for one image; others: of the networks that can be counted."""

    forward: int
    backward: int
    others: Mapping[str, int]


@dataclass(frozen=True)
class RowCost:
    """What a whole row costs.

    images: those that are evaluated, as a last batch is filled up. flops: without those of networks that only their
    file describes. disk: bytes at most, of samples, chunks and features. weights: bytes of the networks.
    """

    passes: RowPasses
    images: int
    flops: int
    disk: int
    weights: int
    missing: tuple[MissingFile, ...]

    def hours(self, seconds_per_flop: float, ranks: int) -> float:
        """Returns the hours of sampling on so many ranks."""
        return self.flops * seconds_per_flop / ranks / 3600


def cost(row: Row, references: str | Path, inception: str = "") -> RowCost:
    """Returns what a row costs. references: folder of reference batches; inception: as `--inception`."""
    run, count, one = row.run, passes(row.run), flops(row.run)
    images = math.ceil(row.images / run.sample.batch_size) * run.sample.batch_size
    each = count.forward * one.forward + count.backward * one.backward
    each += sum(number * one.others.get(name, 0) for name, number in {**count.others, **count.plain}.items())
    network = row.evaluation.kind
    disk = row.images * (2 * 3 * run.model.image_size**2 + (network.feature_bytes if network else 0))
    missing = tuple(missing_files(row, references, inception))
    return RowCost(count, images, round(images * each), disk, _weights(run), missing)


def passes(run: SamplingRun) -> RowPasses:
    """Returns the passes of a run, by the scales and windows of its guidance."""
    t, process = torch.arange(run.num_steps), run.process()
    forward: float = run.num_steps
    backward, others, plain = torch.zeros_like(t, dtype=torch.bool), Counter[str](), Counter[str]()
    for method in run.active:
        for term, step in method.schedule():
            window = term.window(t, process)
            guided = int(window.sum())
            if guided and step.forward:
                forward += step.forward * guided * evaluation_part(run.model, tuple(step.begins_at))
            backward |= window & bool(step.backward)          # one pass for all terms of a step
            others.update({name: count * guided for name, count in step.others.items() if guided})
            plain.update({name: count * guided for name, count in step.plain.items() if guided})
    return RowPasses(run.num_steps, forward, int(backward.sum()), dict(others), dict(plain))


def flops(run: SamplingRun) -> Flops:
    """Returns the operations of each pass; a multiplication and an addition count as two."""
    forward, backward = network_flops(run.model, run.model.image_size)
    plain = {name for method in run.active for _, step in method.schedule() for name in step.plain}
    # How strong a method is changes no network of it: each is counted once for all its scales.
    others = {name: _other_flops(replace(method, **method.switched_on), name, run.model.in_channels,
                                 run.model.image_size, name not in plain)
              for method in run.active for name in method.networks()}
    return Flops(forward, backward, others)


def equivalent_evaluations(run: SamplingRun) -> float:
    """Returns what an image costs in evaluations of the diffusion network: the operations of all passes over its own.

    Another network whose operations are not known, as only its file describes it, counts as the diffusion network.
    """
    count, one = passes(run), flops(run)
    others = sum(number * one.others.get(name, one.forward) for name, number in {**count.others, **count.plain}.items())
    return count.forward + (count.backward * one.backward + others) / one.forward


def steps_within(run: SamplingRun, evaluations: float) -> SamplingRun:
    """Returns the run with as many steps as an image can have for so many evaluations, all networks counted.

    Raises UserError where not even one step can be had.
    """
    for steps in range(int(evaluations), 0, -1):
        try:
            changed = run.changed(**run.sampler.in_steps(steps))
            if equivalent_evaluations(changed) <= evaluations:
                return changed
        except UserError as error:
            raise UserError(f"{evaluations:g} evaluations: {run.title()} cannot have {steps} steps: {error}") from None
    raise UserError(f"{evaluations:g} evaluations: are too few for a step of {run.title()}")


def network_flops(options: ModelOptions, size: int) -> tuple[int, int]:
    """Returns the operations of an evaluation at an image of `size` pixels, and of the gradient through it.

    They are those of float32, whatever the precision of the network.
    """
    return _network_flops(replace(options, use_fp16=False, use_bf16=False), size)


def evaluation_part(options: ModelOptions, begins_at: tuple[str, ...]) -> float:
    """Returns the part of an evaluation's operations that lies behind the first of these attention blocks.

    It is 1 where there is none. Raises UserError for an unknown block.
    """
    return _part(replace(options, use_fp16=False, use_bf16=False), begins_at) if begins_at else 1


@lru_cache
def _part(options: ModelOptions, begins_at: tuple[str, ...]) -> float:
    model, inputs = _network_on_meta(options, options.image_size)
    with torch.no_grad():
        with capture_prefix(model, first_block(model, begins_at)) as prefixes:
            whole = _counted(lambda: model(*inputs))
        return _counted(lambda: model.resume(prefixes[0])) / whole


@lru_cache
def _network_flops(options: ModelOptions, size: int) -> tuple[int, int]:
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = _network_on_meta(options, size)
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def _network_on_meta(options: ModelOptions, size: int) -> tuple[UNetModel, list[Tensor]]:
    """Returns the diffusion network without weights, and what it is called with for one image."""
    return _on_meta(lambda: build_model(options), options.in_channels, size)


@lru_cache
def _other_flops(method: GuidanceOptions, name: str, channels: int, size: int, gradient: bool) -> int:
    """Returns the operations of an evaluation of another network of a guidance method, with its gradient or without."""
    model, inputs = _on_meta(method.networks()[name], channels, size)
    if gradient:
        return _counted(lambda: model(*inputs).sum().backward())
    with torch.no_grad():
        return _counted(lambda: model(*inputs))


def _on_meta(build: Callable[[], Network], channels: int, size: int) -> tuple[Network, list[Tensor]]:
    """Returns a network without weights, and an image, a step and, where it takes one, a label for it."""
    from guided_diffusion.unet import Encoder

    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
        if isinstance(model, Encoder):
            model.convert_to_fp32()
        _leave_out_norms(model)
        inputs = [torch.empty(1, channels, size, size, requires_grad=True), torch.zeros(1, dtype=torch.long)]
        return model, inputs + [torch.zeros(1, dtype=torch.long)] * (getattr(model, "num_classes", None) is not None)


def _leave_out_norms(model: nn.Module) -> None:
    """Takes norms and activations from a network: none of their operations count, and they take half of the time."""
    from guided_diffusion.nn import SiLU

    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.GroupNorm | nn.SiLU | SiLU):
                setattr(parent, name, nn.Identity())


def _counted(function: Callable[[], object]) -> int:
    """Returns the operations that a call makes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _weights(run: SamplingRun) -> int:
    """Returns the bytes of the weights of all networks of a run."""
    return _model_bytes(run.model) + sum(_other_bytes(method, name) for method in run.active
                                         for name in method.networks())


@lru_cache
def _model_bytes(options: ModelOptions) -> int:
    return _bytes(lambda: build_model(options))


@lru_cache
def _other_bytes(method: GuidanceOptions, name: str) -> int:
    return _bytes(method.networks()[name])


def _bytes(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(weight.numel() * weight.element_size() for weight in build().parameters())
