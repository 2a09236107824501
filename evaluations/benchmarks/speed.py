"""The speed of a model: time and memory of evaluations and guided steps, measured in turn and compared as ratios."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.capture import override_attention
from guided_diffusion.dtypes import AUTO, dtype_name, dtype_option, with_dtype
from guided_diffusion.errors import UserError
from guided_diffusion.execution import choose_dtype, timed
from guided_diffusion.guidance import Guidance, GuidanceOptions, Networks
from guided_diffusion.late import Tensor, nn, no_grad, torch
from guided_diffusion.options import Options, batch_option, comma_separated, entry_option, option
from guided_diffusion.progress import progress_bar

from ..memory import peak_memory
from .setting import Setting, contiguous_copy

if TYPE_CHECKING:
    from guided_diffusion.unet import Encoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The benchmark."""

    model: str = option("fmnist32", "a model by name: a bundled one, or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network; unset: random weights")
    checkpoint_entry: str = entry_option()
    together: str = option("SAG + CG", "methods that are also timed together, like SAG + CG; several with commas")
    batch_size: int = batch_option(64, "images at a time")
    dtype: str = dtype_option()
    rounds: int = option(15, "times that everything is measured, in turn", minimum=1)


@dataclass(frozen=True)
class CallCost:
    """What a call costs."""

    milliseconds: list[float]       # of each round
    memory: float                   # peak above what was there before, MiB
    forward: int                    # passes through the network
    backward: int

    @property
    def median(self) -> float:
        """The median of the milliseconds."""
        return statistics.median(self.milliseconds)

    def ratio(self, other: CallCost) -> float:
        """The median over the rounds of this call's time divided by the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.milliseconds, other.milliseconds, strict=True))


def benchmark(options: BenchmarkOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
              methods: Sequence[GuidanceOptions]) -> str:
    """Measures everything in one run, and returns the table as Markdown.

    methods: an instance of each class of GUIDANCE. Raises UserError for files that are missing or do not fit.
    """
    device = dist_util.dev()
    if options.dtype == AUTO:
        choice = choose_dtype(model_options, options.batch_size, device)
        _log.info(choice.line())
        model_options = with_dtype(model_options, choice.dtype)
    model_options = with_dtype(model_options, options.dtype)
    nets = Networks(build_model(model_options), device, random_weights=True)
    model = nets.load(nets.model, options.model_path, asdict(model_options), options.checkpoint_entry)
    here = Setting.of(model, build_diffusion(diffusion_options), options.batch_size, model_options.num_classes)
    plain = here.with_model(contiguous_copy(model))

    def plain_evaluation() -> Tensor:
        with override_attention(plain.model, plain.model.attention_blocks, explicit_attention):
            return plain.evaluation()

    terms = built_terms(methods, nets, options.together)
    functions = {"network evaluation": here.evaluation, "unguided step": here.step(),
                 "plain evaluation": plain_evaluation, **here.steps(terms)}
    measured = measure_calls(functions, options.rounds, [model, plain.model])
    return cost_table(measured, options.batch_size, str(device), dtype_name(asdict(model_options)))


def built_terms(methods: Sequence[GuidanceOptions], nets: Networks, together: str,
                say: Callable[[str], object] = _log.info) -> dict[str, list[Guidance]]:
    """The terms that are timed, by name: those of each method's variants, and of `together` as --together says.

    methods: an instance of each class of GUIDANCE; those that lack a file are left out. say: is told of methods that
    are off and not for this network.
    """
    built: dict[str, list[Guidance]] = {}
    for method in methods:
        try:
            terms = {name: variant.build(nets) for name, variant in _variants(method).items()}
            built |= {name: each for name, each in terms.items() if each}
        except UserError as error:
            if method.active or any(getattr(method, flag) for flag in method.remedies):
                raise
            say(f"{method.short} is not timed: {error}")
    for name in comma_separated(together):
        parts = name.split(" + ")
        if all(part in built for part in parts):
            built[name] = [term for part in parts for term in built[part]]
    return built


def at_last_block(method: GuidanceOptions, model: Encoder) -> GuidanceOptions:
    """A method that acts at one attention block, at the network's last one; any other method as it is."""
    return method if method.attention_block is None else list(method.at_blocks(model).values())[-1]


def _variants(method: GuidanceOptions) -> dict[str, GuidanceOptions]:
    """The variants of a method for which there are files.

    Raises UserError where files are given, and there is no variant that these are enough for.
    """
    variants: dict[str, GuidanceOptions] = dict(method.variants())
    files = {flag: getattr(method, flag) for flag in method.remedies}
    if not variants and any(files.values()):
        missing = next(flag for flag, path in files.items() if not path)
        raise UserError(f"--{missing} is not given: {method.need(missing)}")
    return variants


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (N, heads, T, C) that holds its whole (T, T) map, as that of the official code does."""
    scale = q.shape[-1] ** -0.25
    weights = ((q * scale) @ (k * scale).transpose(2, 3)).float().softmax(dim=-1)
    return weights.to(v.dtype) @ v


@no_grad
def measure_calls(functions: Mapping[str, Callable[[], object]], rounds: int, networks: Sequence[nn.Module],
                  ) -> dict[str, CallCost]:
    """Calls each function `rounds` times, in turn, so that a drift of the machine's speed meets all of them.

    networks: those whose passes are counted.
    """
    passes = {name: count_passes(function, networks) for name, function in functions.items()}
    memory = {name: peak_memory(function, warm=True) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    with progress_bar(rounds, "timing", "round") as progress:
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(1000 * timed(function))
            progress.update()
    return {name: CallCost(times[name], memory[name], *passes[name]) for name in functions}


def count_passes(function: Callable[[], object], networks: Sequence[nn.Module]) -> tuple[int, int]:
    """Counts forward and backward passes through the networks in a call, backward ones where they reach the input.

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


def cost_table(measured: dict[str, CallCost], batch: int, device: str, dtype: str) -> str:
    """Times and ratios as a table in Markdown."""
    one, plain = measured["network evaluation"], measured["plain evaluation"]
    lines = [f"batch {batch} on {device} in {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}", "",
             "| | milliseconds | peak MiB | / network evaluation | network passes, forward + backward |",
             "|---|---|---|---|---|"]
    for name, value in measured.items():
        lines.append(f"| {name} | {value.median:.1f} | {value.memory:.1f} | {value.ratio(one):.3f} | "
                     f"{value.forward} + {value.backward} |")
    lines += ["", f"unguided step / network evaluation: {measured['unguided step'].ratio(one):.3f}"]
    lines += [f"{name} / {value.forward} network evaluations: {value.ratio(one) / value.forward:.3f}"
              for name, value in measured.items() if value.forward > 1 and not value.backward]
    lines += [f"throughput / plain contiguous execution: {plain.ratio(one):.2f}"]
    return "\n".join(lines)
