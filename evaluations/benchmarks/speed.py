"""Time and memory of network evaluations and guided steps, measured in turn in one run and compared as ratios."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.capture import override_attention
from guided_diffusion.depth.options import DagOptions
from guided_diffusion.guidance import ClassifierGuidance, Guidance
from guided_diffusion.options import Options, option
from guided_diffusion.runs.sample import OPTION_CLASSES, preset_values
from guided_diffusion.script_util import PagOptions, build_classifier, build_diffusion, build_model
from guided_diffusion.unet import UNetModel

__all__ = ["OPTION_CLASSES", "BenchmarkOptions", "benchmark", "preset_values"]


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The benchmark."""

    model: str = option("fmnist32", "a model by name: a shipped one, or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network; unset: random weights")
    classifier_path: str = option("", "checkpoint of the classifier; unset: random weights")
    batch_size: int = option(64, "images at a time", minimum=1)
    rounds: int = option(15, "times that everything is measured, in turn", minimum=1)


@dataclass(frozen=True)
class Measured:
    """Milliseconds of each round, peak memory above what was there before in MiB, and passes through the network."""

    milliseconds: list[float]
    memory: float
    forward: int
    backward: int

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def ratio(self, other: Measured) -> float:
        """Median over the rounds of this time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.milliseconds, other.milliseconds, strict=True))


def benchmark(options: BenchmarkOptions, model_options: Options, diffusion_options: Options,
              classifier_options: Options, sag_options: Options, pag_options: PagOptions, dag_options: DagOptions,
              ) -> str:
    """The table of one run, as Markdown."""
    device = dist_util.dev()
    model, diffusion = build_model(model_options), build_diffusion(diffusion_options)
    if options.model_path:
        checkpoint.load_into(model, options.model_path, asdict(model_options))
    model = model.to(device).channels_last().eval().requires_grad_(False)
    plain_model = _without_care(model)
    classifier = build_classifier(classifier_options)
    if options.classifier_path:
        checkpoint.load_into(classifier, options.classifier_path, asdict(classifier_options))
    classifier = classifier.to(device).channels_last().eval().requires_grad_(False)

    size, batch = model_options.image_size, options.batch_size
    x = torch.randn(batch, model_options.in_channels, size, size, device=device)
    noise = torch.randn_like(x)
    t = torch.full((batch,), diffusion.num_timesteps // 2, device=device)
    y = torch.arange(batch, device=device) % model_options.num_classes
    labels = {"y": y} if model_options.class_cond else {}
    sag = sag_options.build(model)
    sag.scale = sag.scale or 0.1
    pag = replace(pag_options, pag_scale=pag_options.pag_scale or 1.0).build(model)
    guided = ClassifierGuidance(classifier, 1.0)
    network = model if model_options.class_cond else (lambda x, t, y: model(x, t))

    def step(*guidance: Guidance) -> Callable[[], object]:
        return lambda: diffusion.p_sample(network, x, t, model_kwargs={"y": y}, guidance=guidance, noise=noise)

    def evaluation() -> Tensor:
        return model(x, diffusion.model_timesteps(t), **labels)

    def plain() -> Tensor:
        with override_attention(plain_model, plain_model.attention_blocks, explicit_attention):
            return plain_model(x, diffusion.model_timesteps(t), **labels)

    functions = {"network evaluation": evaluation, "unguided step": step(), "SAG step": step(sag),
                 "PAG step": step(pag), "SAG + CG step": step(sag, guided), "plain evaluation": plain}
    for name, terms in depth_guidance(model, dag_options).items():
        functions[f"{name} step"] = checkpointed(model, step(*terms), False)
        functions[f"{name} step, checkpointed"] = checkpointed(model, step(*terms), True)
    return table(measure(functions, options.rounds, [model, plain_model]), batch, str(device))


def depth_guidance(model: UNetModel, options: DagOptions) -> dict[str, list[Guidance]]:
    """The terms of depth-aware guidance that files are given for, alone and together, at any step."""
    if not (options.depth_predictor or options.depth_prior):
        return {}
    always = replace(options, dag_start=None, dag_stop=None)
    dcg = replace(always, dcg_scale=1.0, dpg_scale=0.0).build(model, seed=0)
    if not options.depth_prior:
        return {"DCG": dcg}
    dpg = replace(always, dcg_scale=0.0, dpg_scale=1.0).build(model, seed=0)
    return {"DCG": dcg, "DPG": dpg, "DCG + DPG": dcg + dpg}


def checkpointed(model: UNetModel, function: Callable[[], object], enabled: bool) -> Callable[[], object]:
    """`function`, during which the blocks of the network recompute their activations in a backward pass, or not."""
    blocks = [module for module in model.modules() if hasattr(module, "use_checkpoint")]

    def call() -> object:
        before = [block.use_checkpoint for block in blocks]
        try:
            for block in blocks:
                block.use_checkpoint = enabled
            return function()
        finally:
            for block, value in zip(blocks, before, strict=True):
                block.use_checkpoint = value
    return call


def _without_care(model: UNetModel) -> UNetModel:
    """A copy of the network with contiguous feature maps."""
    plain = copy.deepcopy(model)
    plain.memory_format = torch.contiguous_format
    return plain.to(memory_format=torch.contiguous_format)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that holds its whole (T, T) map."""
    scale = q.shape[-1] ** -0.25
    weights = ((q * scale) @ (k * scale).transpose(2, 3)).float().softmax(dim=-1)
    return weights.to(v.dtype) @ v


@torch.no_grad()
def measure(functions: dict[str, Callable[[], object]], rounds: int, networks: Sequence[nn.Module],
            ) -> dict[str, Measured]:
    """Each function `rounds` times, in turn, so that a drift of the machine's speed meets all of them.

    networks: those whose passes are counted.
    """
    memory = {name: peak_memory(function) for name, function in functions.items()}
    passes = {name: count_passes(function, networks) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in tqdm(range(rounds), unit="round", disable=not dist_util.is_main()):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: Measured(times[name], memory[name], *passes[name]) for name in functions}


def count_passes(function: Callable[[], object], networks: Sequence[nn.Module]) -> tuple[int, int]:
    """Forward and backward passes through the networks in a call, backward ones where they reach the input.

    Blocks that a checkpoint computes again in the backward pass count as part of it.
    """
    forward = backward = 0

    def called(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal forward
        forward += 1
        if inputs[0].requires_grad:
            inputs[0].register_hook(differentiated)

    def differentiated(gradient: Tensor) -> None:
        nonlocal backward
        backward += 1

    handles = [network.register_forward_pre_hook(called) for network in networks]
    try:
        function()
    finally:
        for handle in handles:
            handle.remove()
    return forward, backward


def peak_memory(function: Callable[[], object]) -> float:
    """MiB that a call needs above what it found, by the allocator's own events."""
    function()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(measured: dict[str, Measured], batch: int, device: str) -> str:
    """Times and ratios as Markdown."""
    one, plain = measured["network evaluation"], measured["plain evaluation"]
    lines = [f"batch {batch} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}", "",
             "| | milliseconds | peak MiB | / network evaluation | network passes, forward + backward |",
             "|---|---|---|---|---|"]
    for name, value in measured.items():
        lines.append(f"| {name} | {value.median:.1f} | {value.memory:.1f} | {value.ratio(one):.3f} | "
                     f"{value.forward} + {value.backward} |")
    sag = statistics.median(a / (2 * b) for a, b in zip(
        measured["SAG step"].milliseconds, one.milliseconds, strict=True))
    lines += ["", f"unguided step / network evaluation: {measured['unguided step'].ratio(one):.3f}",
              f"SAG step / two network evaluations: {sag:.3f}",
              f"throughput / plain contiguous float32 execution: {plain.ratio(one):.2f}"]
    return "\n".join(lines)
