"""The network here beside that of a clone of the official code: the same weights, in turn, compared as ratios.

The clone's own network is built by its own class, whose arguments and names of weights are those of this project. It
is evaluated in a process of its own, which handles memory as a process of the clone does: a command of this project
keeps the memory that it frees.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.capture import override_attention
from guided_diffusion.dtypes import exact_convolutions
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE, GuidanceOptions, Networks
from guided_diffusion.late import nn, no_grad, torch
from guided_diffusion.options import Options, comma_separated, option, options_from

from .elsewhere import Elsewhere
from .setting import Setting
from .speed import CallCost, at_last_block, built_terms, explicit_attention, measure_calls

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

AnyNetwork = TypeVar("AnyNetwork", bound="nn.Module")

ALIAS = "official_guided_diffusion"         # under which the clone's package is imported, beside this one
MATRIX = {"cpu": 1024, "cuda": 8192}        # rows and columns of the matrices whose product is timed
TARGETS = (1.5, 2.0, 0.7)                   # times as fast, evaluations a guided step, part of the matrix-product rate
AGREEMENT = 1e-4                            # relative, of float32 networks of hundreds of layers in two orders of sums

_ADM = {"num_head_channels": 64, "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True}


@dataclass(frozen=True)
class Shape:
    """A network that is compared, and the number of images of an evaluation."""

    flags: Mapping[str, Any]
    batch: int


SHAPES = {
    "32x32, 64 channels, batch 64": Shape(
        {**_ADM, "image_size": 32, "num_channels": 64, "num_res_blocks": 2, "channel_mult": "1,2,2",
         "attention_resolutions": "16,8", "num_head_channels": 32}, 64),
    "ADM-128 with 64 channels, batch 4": Shape(
        {**_ADM, "image_size": 128, "num_channels": 64, "num_res_blocks": 2, "attention_resolutions": "32,16,8"}, 4),
    "ADM-256, batch 1": Shape(
        {**_ADM, "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "attention_resolutions": "32,16,8"}, 1),
}
_METHOD = "SAG"                             # whose step is timed beside the evaluations


@dataclass(frozen=True)
class AgainstOptions(Options):
    """The comparison with the official code."""

    against: str = option("", "a clone of the official code, whose network is timed beside this one on three shapes; "
                          "unset: none")
    training: bool = option(False, "with --against: time steps of training, in place of evaluations")
    shapes: str = option("", f"which shapes, by number from 1 to {len(SHAPES)}, comma-separated; unset: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training and not self.against:
            raise UserError("--training True: needs --against, a clone of the official code to compare with")
        _ = self.chosen                 # which raises for what is not allowed

    @property
    def chosen(self) -> dict[str, Shape]:
        """The shapes by name."""
        numbers = comma_separated(self.shapes)
        names = {str(number): name for number, name in enumerate(SHAPES, 1)}
        for number in numbers:
            if number not in names:
                raise UserError(f"--shapes {self.shapes}: must be numbers from 1 to {len(SHAPES)}, comma-separated")
        return {name: SHAPES[name] for number, name in names.items() if not numbers or number in numbers}


def official_networks(clone: str | Path) -> ModuleType:
    """The module of networks of a clone, beside this package. Raises UserError where there is none to import."""
    folder = Path(clone) / "guided_diffusion"
    if not (folder / "unet.py").is_file():
        raise UserError(f"--against {clone}: is no clone of the official code, it has no guided_diffusion/unet.py")
    for name in [name for name in sys.modules if name.partition(".")[0] == ALIAS]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(ALIAS, folder / "__init__.py", submodule_search_locations=[
        str(folder)])
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is no package")
        package = importlib.util.module_from_spec(spec)
        sys.modules[ALIAS] = package
        spec.loader.exec_module(package)
        return importlib.import_module(f"{ALIAS}.unet")
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"--against {clone}: cannot be imported ({error})") from None


def official_copy(module: ModuleType, model: UNetModel, device: torch.device) -> nn.Module:
    """The clone's network of the same shape, with the same weights, ready for evaluation."""
    config = model.config
    network = module.UNetModel(
        image_size=config.image_size, in_channels=model.in_channels, model_channels=config.model_channels,
        out_channels=model.out_channels, num_res_blocks=config.num_res_blocks,
        attention_resolutions=tuple(config.attention_resolutions), dropout=config.dropout,
        channel_mult=tuple(config.channel_mult), num_classes=model.num_classes, use_checkpoint=False,
        num_heads=config.num_heads, num_head_channels=config.num_head_channels,
        num_heads_upsample=model.num_heads_upsample, use_scale_shift_norm=config.use_scale_shift_norm,
        resblock_updown=config.resblock_updown, use_new_attention_order=config.use_new_attention_order)
    network.load_state_dict(model.state_dict())
    return checkpoint.ready(network, device)


def seeded_weights(network: AnyNetwork, seed: int = 0) -> AnyNetwork:
    """Fills a network with weights that keep the size of what passes through it, and have no zeros.

    They are drawn on the CPU, so that they are the same on every device.

    Matrices and kernels are N(0, 1 / inputs), scales of norms 1 + N(0, 0.01), biases N(0, 0.01).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator))
            if parameter.ndim > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
            else:
                parameter.mul_(0.1).add_(float(name.endswith("weight")))
    return network


@dataclass(frozen=True)
class Against:
    """What was measured of a shape. costs: by name; operations: of an evaluation; rate: of matrix products, a second.

    deviation: of the two outputs, the largest, relative to the largest value.
    """

    batch: int
    costs: Mapping[str, CallCost]
    operations: float
    rate: float
    deviation: float

    @property
    def speedup(self) -> float:
        """How many times as fast an evaluation is as the clone's: the median over the rounds."""
        return self.costs["official evaluation"].ratio(self.costs["evaluation"])

    @property
    def step(self) -> float:
        """A step of the timed method in evaluations."""
        return self.costs[f"{_METHOD} step"].ratio(self.costs["evaluation"])

    @property
    def share(self) -> float:
        """The operations of an evaluation a second, as a part of those of matrix products in the same rounds."""
        return self.operations / (1e-3 * self.costs["evaluation"].median) / self.rate


def benchmark_against(options: AgainstOptions, rounds: int) -> str:
    """Measures every chosen shape, and returns the table as Markdown. Raises UserError where the clone is none."""
    official_networks(options.against)
    device = dist_util.dev()
    found = {name: compare(options.against, shape, rounds, device) for name, shape in options.chosen.items()}
    return against_table(found, str(device))


def compare(clone: str, shape: Shape, rounds: int, device: torch.device) -> Against:
    """Both networks of a shape in turn, `rounds` times, and matrix products between them.

    Raises UserError where their outputs differ by more than AGREEMENT.
    """
    here, methods = _setting(shape)
    checkpoint.ready(here.model, device)
    here = here.with_model(here.model)
    with Elsewhere(_official_evaluation, clone, shape, torch.get_num_threads()) as there:
        functions: dict[str, Callable[[], Any]] = {
            "evaluation": here.evaluation, "official evaluation": there.call,
            f"{_METHOD} step": here.step(_step_terms(methods, here.model, device)), "matrix product": _product(device)}
        with torch.no_grad(), exact_convolutions(device):
            one, two = here.evaluation().cpu(), torch.from_numpy(there.result(True))
        deviation = float((one - two).abs().max() / two.abs().max())
        if not deviation < AGREEMENT:
            raise UserError(f"--against: the clone's network differs by {deviation:.1e} of the largest value, at most "
                            f"{AGREEMENT:.0e} is rounding")
        costs = measure_calls(functions, rounds, [here.model])
        costs["official evaluation"] = replace(costs["official evaluation"], memory=there.peak_memory(), forward=1)
    side = MATRIX[device.type]
    rate = 2 * side**3 / (1e-3 * costs["matrix product"].median)
    return Against(shape.batch, costs, _operations(here), rate, deviation)


def _setting(shape: Shape) -> tuple[Setting, list[GuidanceOptions]]:
    """The network of a shape with its seeded weights on the CPU, what it is given, and an instance of each method."""
    model_options, diffusion_options, *methods = options_from(dict(shape.flags), ModelOptions, DiffusionOptions,
                                                              *GUIDANCE)
    model = seeded_weights(build_model(model_options))
    return Setting.of(model, build_diffusion(diffusion_options), shape.batch, 1), methods


def _official_evaluation(clone: str, shape: Shape, threads: int) -> Callable[[], Any]:
    """An evaluation of the clone's network on the device of this process, which returns an array.

    It takes whether convolutions are exact, as `exact_convolutions` makes them.
    """
    torch.set_num_threads(threads)
    here, device = _setting(shape)[0], dist_util.dev()
    network = official_copy(official_networks(clone), here.model, device)
    x, times = here.x.to(device), here.diffusion.model_timesteps(here.t.to(device))

    def evaluation(exact: bool = False) -> Any:
        with torch.no_grad(), exact_convolutions(device) if exact else nullcontext():
            output = network(x, times)
        return (output[0] if isinstance(output, tuple) else output).cpu().numpy()   # some clones also return attention

    return evaluation


def _step_terms(methods: list[GuidanceOptions], model: UNetModel, device: torch.device) -> list[Any]:
    method, = (at_last_block(method, model) for method in methods if method.short == _METHOD)
    return built_terms([method], Networks(model, device), "")[_METHOD]


def _product(device: torch.device) -> Callable[[], object]:
    side = MATRIX[device.type]
    one, two = torch.rand(2, side, side, device=device, generator=torch.Generator(device).manual_seed(0))
    return lambda: one @ two


@no_grad
def _operations(here: Setting) -> float:
    """The operations of an evaluation, two for a product and its sum, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    blocks = here.model.attention_blocks        # it does not count the products of fused attention
    with override_attention(here.model, blocks, explicit_attention), FlopCounterMode(display=False) as counter:
        here.evaluation()
    return float(counter.get_total_flops())


def against_table(found: Mapping[str, Against], device: str) -> str:
    """The comparison as Markdown: ratios first, then what they are made of."""
    lines = [f"float32 on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of the "
             f"ratios of interleaved rounds; targets {TARGETS[0]}, {TARGETS[1]:g}, {TARGETS[2]}", "",
             f"| shape | official / this evaluation | {_METHOD} step / evaluation | part of the matrix-product rate | "
             "peak MiB, official / this | outputs agree within |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        memory = " / ".join(f"{one.costs[each].memory:.0f}" for each in ("official evaluation", "evaluation"))
        lines.append(f"| {name} | {one.speedup:.2f} | {one.step:.2f} | {one.share:.2f} | {memory} | "
                     f"{one.deviation:.0e} |")
    lines += ["", f"| shape | evaluation, ms | official, ms | {_METHOD} step, ms | GFLOP/s | "
                  "matrix products, GFLOP/s |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        each = " | ".join(f"{one.costs[part].median:.0f}" for part in ("evaluation", "official evaluation",
                                                                       f"{_METHOD} step"))
        speed = one.operations / (1e-3 * one.costs["evaluation"].median)
        lines.append(f"| {name} | {each} | {speed / 1e9:.0f} | {one.rate / 1e9:.0f} |")
    return "\n".join(lines)
