"""What a row of a table costs, before it is begun: evaluations, arithmetic, disk and weights.

Evaluations are counted by the windows of the guidance terms that a row has, and by what each term says that a guided
step costs (`terms.Passes`); one that begins inside the network is the part of an evaluation that its operations are,
and so is such a gradient.
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
from guided_diffusion.capture import capture_features, capture_prefix, end_graph, first_block
from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.terms import Passes

from .missing import MissingFile, missing_files
from .tables import Row

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

Network = TypeVar("Network", bound="nn.Module")

_Loss = tuple[GuidanceOptions, frozenset[tuple[str, bool]]]     # whose it is, and what it reads, see `Passes.readers`


@dataclass(frozen=True)
class RowPasses:
    """Passes through the networks for one image, from noise to sample.

    forward: evaluations of the diffusion network, parts included. backward: gradients through them, each of which may
    be a part. gradients: operations of these and of the networks that read feature maps for them, over those of an
    evaluation. others: evaluations of further networks by name, each with its gradient. plain: those without one.
    """

    steps: int
    forward: float
    backward: int
    others: Mapping[str, int]
    plain: Mapping[str, int] = field(default_factory=dict)
    gradients: float = 0.0

    def __str__(self) -> str:
        """Like "40", "34.8", or "40 + 20 back + 20 of the classifier"."""
        parts = [(self.backward, "back"), *((count, f"of the {name}") for name, count in self.others.items()),
                 *((count, f"of the {name}, no gradient") for name, count in self.plain.items())]
        return " + ".join([f"{round(self.forward, 1):.10g}", *(f"{count} {word}" for count, word in parts if count)])


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of an evaluation of one image; others: of the networks that can be counted."""

    forward: int
    others: Mapping[str, int]


@dataclass(frozen=True)
class RowCost:
    """What a whole row costs.

    images: those that are evaluated, as a last batch is filled up. disk: bytes at most, of samples, chunks and
    features. weights: bytes of the networks. undescribed: names of further networks that nothing describes, each of
    which counts as the diffusion network.
    """

    passes: RowPasses
    images: int
    flops: int
    disk: int
    weights: int
    missing: tuple[MissingFile, ...]
    undescribed: tuple[str, ...] = ()

    def hours(self, seconds_per_flop: float, ranks: int) -> float:
        """Returns the hours of sampling on so many ranks."""
        return self.flops * seconds_per_flop / ranks / 3600


def cost(row: Row, references: str | Path, inception: str = "") -> RowCost:
    """Returns what a row costs. references: folder of reference batches; inception: as `--inception`."""
    run, count, one = row.run, passes(row.run), flops(row.run)
    images = math.ceil(row.images / run.sample.batch_size) * run.sample.batch_size
    undescribed = tuple(name for name in {**count.others, **count.plain} if name not in one.others)
    network = row.evaluation.kind
    disk = row.images * (2 * 3 * run.model.image_size**2 + (network.feature_bytes if network else 0))
    missing = tuple(missing_files(row, references, inception))
    weights = _weights(run) + len(undescribed) * _model_bytes(run.model)
    return RowCost(count, images, round(images * _equivalent(count, one) * one.forward), disk, weights, missing,
                   undescribed)


def passes(run: SamplingRun) -> RowPasses:
    """Returns the passes of a run, by the scales and windows of its guidance."""
    t, process = torch.arange(run.num_steps), run.process()
    forward: float = run.num_steps
    others, plain = Counter[str](), Counter[str]()
    losses: list[set[_Loss]] = [set() for _ in range(run.num_steps)]       # of each step, whose gradient is one pass
    for method in run.active:
        for term, step in method.schedule():
            window = term.window(t, process)
            guided = int(window.sum())
            if guided and step.forward:
                forward += step.forward * guided * evaluation_part(run.model, tuple(step.begins_at))
            if step.backward:
                loss = _loss(method, step)
                for place in window.nonzero().flatten().tolist():
                    losses[place].add(loss)
            others.update({name: count * guided for name, count in step.others.items() if guided})
            plain.update({name: count * guided for name, count in step.plain.items() if guided})
    steps = Counter(frozenset(of_step) for of_step in losses if of_step)
    gradients = sum(count * gradient_part(run.model, of_step) for of_step, count in steps.items())
    return RowPasses(run.num_steps, forward, steps.total(), dict(others), dict(plain), gradients)


def flops(run: SamplingRun) -> Flops:
    """Returns the operations of an evaluation; a multiplication and an addition count as two."""
    forward, _ = network_flops(run.model, run.model.image_size)
    plain = {name for method in run.active for _, step in method.schedule() for name in step.plain}
    # How strong a method is changes no network of it: each is counted once for all its scales.
    others = {name: _other_flops(replace(method, **method.switched_on), name, run.model.in_channels,
                                 run.model.image_size, name not in plain)
              for method in run.active for name in method.networks()}
    return Flops(forward, others)


def equivalent_evaluations(run: SamplingRun) -> float:
    """Returns what an image costs in evaluations of the diffusion network: the operations of all passes over its own.

    Another network whose operations are not known, as only its file describes it, counts as the diffusion network.
    """
    return _equivalent(passes(run), flops(run))


def _equivalent(count: RowPasses, one: Flops) -> float:
    """Returns the operations of these passes over those of an evaluation of the diffusion network."""
    others = sum(number * one.others.get(name, one.forward) for name, number in {**count.others, **count.plain}.items())
    return count.forward + count.gradients + others / one.forward


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


def gradient_part(options: ModelOptions, losses: frozenset[_Loss]) -> float:
    """Returns the operations of one gradient of these losses at x_t, over those of an evaluation.

    Those of the networks that read feature maps for them count, too. Where a loss reads the evaluation itself, or a
    network that cannot be built, that is the gradient through the whole evaluation. Raises UserError for networks that
    read blocks which this one does not have.
    """
    options = replace(options, use_fp16=False, use_bf16=False)
    forward, backward = _network_flops(options, options.image_size)
    readers = dict[tuple[GuidanceOptions, str], bool]()
    for method, read in losses:
        if not read or any(name not in method.readers() for name, _ in read):
            return backward / forward
        for name, differentiated in read:
            readers[method, name] = readers.get((method, name), False) or differentiated
    return _readers_flops(options, frozenset(readers.items())) / forward


def _loss(method: GuidanceOptions, step: Passes) -> _Loss:
    """Returns what the gradient of a term's loss depends on: nothing of how strong the method is."""
    return replace(method, **method.switched_on), frozenset(step.readers.items())


@lru_cache
def _readers_flops(options: ModelOptions, readers: frozenset[tuple[tuple[GuidanceOptions, str], bool]]) -> int:
    """Returns the operations of networks on feature maps, and of the gradient at x_t through some of them."""
    model, inputs = _network_on_meta(options, options.image_size)
    with torch.device("meta"):
        built = [(method.readers()[name]().requires_grad_(False), through) for (method, name), through in readers]
    ends = {block for reader, through in built if through for block in reader.blocks}
    with capture_features(model, {block for reader, _ in built for block in reader.blocks}, graph=True) as maps:
        with end_graph(model, ends):
            model(*inputs)

        def differentiated() -> None:
            with torch.no_grad():
                for reader, through in built:
                    if not through:
                        reader(maps, inputs[1])
            torch.stack([reader(maps, inputs[1]).sum() for reader, through in built if through]).sum().backward()

        return _counted(differentiated)


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
    model = _on_meta(lambda: build_model(options))
    return model, _inputs(model, options.in_channels, size)


@lru_cache
def _other_flops(method: GuidanceOptions, name: str, channels: int, size: int, gradient: bool) -> int:
    """Returns the operations of an evaluation of another network of a guidance method, with its gradient or without."""
    from guided_diffusion.unet import Encoder

    model = _on_meta(method.networks()[name])
    if isinstance(model, Encoder):          # which sees images of its own size, as x_t is resized for it
        channels, size = model.config.in_channels, model.image_size
    inputs = _inputs(model, channels, size)
    with reading(name, "its operations cannot be counted"), torch.set_grad_enabled(gradient):
        return _counted(lambda: model(*inputs).sum().backward() if gradient else model(*inputs))


def _on_meta(build: Callable[[], Network]) -> Network:
    """Returns a network without weights."""
    from guided_diffusion.unet import Encoder

    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
        if isinstance(model, Encoder):
            model.convert_to_fp32()
        _leave_out_norms(model)
        return model


def _inputs(model: nn.Module, channels: int, size: int) -> list[Tensor]:
    """Returns an image, a step and, where the network takes one, a label for it, where it is."""
    with torch.device(getattr(model, "device", "meta")):           # a network of the user's has its weights
        inputs = [torch.zeros(1, channels, size, size, requires_grad=True), torch.zeros(1, dtype=torch.long)]
        return inputs + [torch.zeros(1, dtype=torch.long)] * (getattr(model, "num_classes", None) is not None)


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
    """Returns the bytes of the weights of all networks of a run that something describes."""
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
