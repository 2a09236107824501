"""Whether a device computes what the CPU computes, in every type and compiled, and how fast it is.

Networks of the released shapes, with seeded weights, are evaluated in float32 on the CPU, with contiguous feature
maps: that is the reference. On the device they are evaluated in float32, and in other types and compiled, which are
compared with float32 there. What is compared are an evaluation, the image that a short guided chain ends in, and the
gradient of a depth loss through the network.

Deviations are relative and quadratic means, |a - b| / |b|. Their tolerance follows from u, the largest relative error
of one rounding (2^-24 in float32, 2^-11 in float16 and in TF32, 2^-8 in bfloat16). In the short types sums are in
float32, so that a layer's output has an error of u; in float32 the K sums of a layer wander, to u sqrt(K). The errors
of L layers are independent, and add up to sqrt(L) times that. ROOM is for norms, which make errors larger. The image of
a chain has the errors of STEPS evaluations, of which guidance takes differences: sqrt(4) times 2. A gradient passes
twice the layers, and its loss is the difference of two predictions: also 4 at most.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.dtypes import exact_convolutions, with_dtype
from guided_diffusion.execution import compile_blocks, explained_compilation
from guided_diffusion.guidance import (
    GUIDANCE,
    DepthConsistencyGuidance,
    Guidance,
    GuidanceOptions,
    LossGuidance,
    Networks,
)
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.options import Options, option, option_fields, options_from
from guided_diffusion.places import command_file
from guided_diffusion.presets import find_preset
from guided_diffusion.progress import progress_bar
from guided_diffusion.sampling import ddim_step, last, sample_chain
from guided_diffusion.terms import StepContext

from .against import seeded_weights
from .setting import Setting, contiguous_copy
from .speed import CallCost, at_last_block, built_terms, measure_calls

if TYPE_CHECKING:
    from guided_diffusion.depth.predictor import DepthPredictors
    from guided_diffusion.unet import UNetModel

UNIT = {"float32": 2.0**-24, "TF32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ROOM = 2.0
FURTHER = 4.0                   # what a chain and a gradient may deviate, in evaluations
STEPS = 4                       # of the guided chain
CHAINED = ("SAG", "PAG", "CG")  # the methods that guide it: their networks have seeded weights
LOSS_SCALE = 2.0**12            # small gradients would be 0 in float16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceOptions(Options):
    """The check of a device."""

    small: bool = option(False, "small networks and batches, which any CPU computes in seconds")
    compile: bool | None = option(None, "check compiled networks, too; unset: the first network on GPUs, as it takes "
                                  "minutes")
    ranks: int = option(2, "ranks whose images are compared with those of one; 1: none", minimum=1)
    rounds: int = option(5, "times that everything is timed, in turn", minimum=1)
    out: str = option("device_report", "folder for report.md and report.json")


@dataclass(frozen=True)
class Case:
    """A network that is checked: its flags, images of an evaluation that is compared, and of one that is timed."""

    name: str
    flags: Mapping[str, Any]
    batch: int
    timed: int


@dataclass(frozen=True)
class Check:
    """A comparison: what of, and the deviation that was found and is allowed."""

    network: str
    what: str
    compared: str
    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the deviation is allowed; NaN is not."""
        return self.deviation <= self.tolerance


@dataclass(frozen=True)
class Report:
    """All that was found.

    costs: by network, type and call; notes: what was left out, and why; parts: the seconds of each part of the work.
    """

    device: Mapping[str, str]
    checks: Sequence[Check]
    costs: Mapping[str, Mapping[str, CallCost]]
    notes: Sequence[str]
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.holds]


SMALL = {"image_size": 16, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
         "num_heads": 2, "attention_resolutions": "8", "class_cond": True, "num_classes": 4, "learn_sigma": True,
         "resblock_updown": True, "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,2",
         "classifier_attention_resolutions": "8", "classifier_num_head_channels": 32}


def cases(small: bool, device: torch.device) -> list[Case]:
    """The networks that are checked on a device."""
    if small:
        return [Case("16x16, 32 channels", SMALL, 2, 2)]
    on_gpu = device.type == "cuda"
    return [_released("128x128_diffusion", 1, 8 if on_gpu else 1),
            _released("256x256_diffusion_uncond", 1, 2 if on_gpu else 1)]


def _released(name: str, batch: int, timed: int) -> Case:
    preset = find_preset(name)
    classifier = find_preset(preset.classifier).options if preset.classifier else {}
    flags = {flag: value for flag, value in classifier.items() if flag.startswith("classifier_")}
    return Case(name, {**flags, **preset.guidance, **preset.options}, batch, timed)


def verify(options: DeviceOptions) -> Report:
    """Checks everything on the device of this process, and then times everything."""
    began, device = time.monotonic(), dist_util.dev()
    networks = cases(options.small, device)
    compiled = _compiled(networks, options.compile, device)
    parts = Parts()
    subjects = [Subject(case, device, parts) for case in networks]
    notes: list[str] = []
    if skipped := [case.name for case in networks if case not in compiled]:
        notes.append(f"compiled networks were not checked ({', '.join(skipped)}): that takes minutes, --compile True "
                     "does it")
    checks: list[Check] = []
    costs: dict[str, Mapping[str, CallCost]] = {}
    with progress_bar(2 * len(networks), "checking and timing", "network") as progress:
        for subject in subjects:
            progress.note(subject.case.name)
            checks += subject.checks(subject.case in compiled)
            progress.update()
        for subject in subjects:
            progress.note(f"{subject.case.name}, timing")
            costs |= subject.costs(options.rounds)
            notes += subject.notes
            progress.update()
    with parts.part("ranks"):
        checks += ranks_checks(options, device, notes)
    return Report(described(device), checks, costs, list(dict.fromkeys(notes)), time.monotonic() - began, parts.seconds)


def _compiled(networks: Sequence[Case], asked: bool | None, device: torch.device) -> Sequence[Case]:
    """The networks that are also checked compiled."""
    if asked is None:
        return networks[:1] if device.type == "cuda" else []
    return networks if asked else []


class Parts:
    """The seconds of each part of the work, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that counts as a part."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


def described(device: torch.device) -> dict[str, str]:
    """The device and the versions that matter, in words."""
    words = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
             "torch": str(torch.__version__), "CPU cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()),
             "CPU instructions": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        words |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()),
                  "GPUs": str(torch.cuda.device_count())}
    return words


# One network


class Subject:
    """A network of a case on the device, and the same one on the CPU, with what guides them."""

    def __init__(self, case: Case, device: torch.device, parts: Parts) -> None:
        self.case, self.device, self.parts = case, device, parts
        self.notes: list[str] = []
        self.options, self.process = self._options(ModelOptions, DiffusionOptions)
        self.source = seeded_weights(build_model(self.options))
        self.products = [module.weight[0].numel() for module in self.source.modules()
                         if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]        # of a sum in each layer

    def _options(self, *classes: type) -> list[Any]:
        names = {field.name for cls in classes for field in option_fields(cls)}
        return options_from({name: value for name, value in self.case.flags.items() if name in names}, *classes)

    def _predictors(self, device: torch.device) -> DepthPredictors:
        """Depth predictors with seeded weights, which read blocks of the decoder's middle."""
        from guided_diffusion.depth.features import feature_channels
        from guided_diffusion.depth.predictor import DepthPredictors

        blocks = [name for name in self.source.feature_blocks if name.startswith("output.")]
        middle = blocks[len(blocks) // 3:max(len(blocks) // 3 + 1, 2 * len(blocks) // 3)]
        channels = feature_channels(self.source, middle)
        weak = {middle[0]: channels[middle[0]]}
        predictors = DepthPredictors({"strong": channels, "weak": weak}, self.options.image_size, "image", "0" * 64)
        return checkpoint.ready(seeded_weights(predictors, 1), device)

    def network(self, dtype: str = "float32", compiled: bool = False) -> UNetModel:
        """The network on the device, in that type."""
        with torch.device("meta"):
            model = build_model(with_dtype(self.options, dtype))
        model.to_empty(device=self.device).load_state_dict(self.source.state_dict())
        checkpoint.ready(model, self.device)
        if compiled:
            compile_blocks(model)
        return model

    def reference(self) -> UNetModel:
        """The network on the CPU, with contiguous feature maps."""
        return contiguous_copy(self.source).eval().requires_grad_(False)

    def setting(self, model: UNetModel, batch: int) -> Setting:
        """The network at a step of a process of STEPS steps."""
        steps = DiffusionOptions(**{**asdict(self.process), "timestep_respacing": str(STEPS)})
        return Setting.of(model, build_diffusion(steps), batch, self.options.num_classes)

    def terms(self, model: UNetModel) -> dict[str, list[Guidance]]:
        """What each method guides by, by its name, with seeded weights where a method has a network of its own."""
        methods: list[GuidanceOptions] = self._options(*GUIDANCE)
        if self.case.flags is SMALL:
            methods = [at_last_block(method, model) for method in methods]
        device = next(model.parameters()).device
        depth = DepthConsistencyGuidance(model, self._predictors(device), 1.0)
        terms = built_terms(methods, _SeededNetworks(model, device, random_weights=True), "", self.notes.append)
        return {**terms, "DCG": [depth]}

    def checks(self, compiled: bool) -> Iterator[Check]:
        """Every comparison of this network."""
        expected = self._outputs(self.reference(), "the CPU")
        with exact_convolutions(self.device):
            here = self._outputs(self.network(), "float32")
        yield from self._compared("float32 with the CPU", "float32", here, expected)
        if self.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            yield from self._compared("float32 with TF32, as it runs, with the CPU", "TF32",
                                      self._outputs(self.network(), "TF32"), expected)
        for dtype in ("float16", "bfloat16"):
            yield from self._compared(f"{dtype} with float32", dtype, self._outputs(self.network(dtype), dtype), here)
        if compiled:
            with explained_compilation(), exact_convolutions(self.device):
                found = self._outputs(self.network(compiled=True), "compiled")
            yield from self._compared("compiled with float32", "float32", found, here)

    def _outputs(self, model: UNetModel, part: str) -> dict[str, Tensor]:
        """What is compared, by name, on the CPU; it counts as that part of the work."""
        with self.parts.part(f"{self.case.name}, {part}"):
            here, terms = self.setting(model, self.case.batch), self.terms(model)
            with torch.no_grad():
                found = {"evaluation": here.evaluation(), f"guided chain of {STEPS} steps": _chain(here, terms)}
            for name, guidance in terms.items():
                if isinstance(guidance[0], LossGuidance):
                    found[f"gradient of {name}"] = _gradient(here, guidance[0])
            return {name: tensor.float().cpu() for name, tensor in found.items()}

    def _compared(self, compared: str, unit: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor],
                  ) -> Iterator[Check]:
        terms = sum(self.products) if unit == "float32" else len(self.products)
        tolerance = ROOM * UNIT[unit] * math.sqrt(terms)
        for what, tensor in found.items():
            allowed = tolerance if what == "evaluation" else FURTHER * tolerance
            yield Check(self.case.name, what, compared, relative(tensor, expected[what]), allowed)

    def costs(self, rounds: int) -> dict[str, dict[str, CallCost]]:
        """Time and memory of an evaluation in every type, and of each method's step in float32 and in float16.

        On a CPU steps are timed in float32 alone.
        """
        found = {}
        for dtype in ("float32", "float16", "bfloat16"):
            model = self.network(dtype)
            here = self.setting(model, self.case.timed)
            calls: dict[str, Callable[[], Any]] = {"evaluation": here.evaluation}
            if dtype == "float32" or (dtype == "float16" and self.device.type == "cuda"):
                calls |= here.steps(self.terms(model))
            name = f"{self.case.name}, {self.case.timed} images, {dtype}"
            try:
                with self.parts.part(f"{self.case.name}, timing"):
                    found[name] = measure_calls(calls, rounds, [model])
            except torch.OutOfMemoryError:
                self.notes.append(f"{self.case.name} in {dtype} was not timed: memory does not hold it")
        return found


class _SeededNetworks(Networks):
    """Networks whose files are not given have seeded weights, the same on every device."""

    def load(self, network: Any, path: str, flags: Mapping[str, Any], entry: str | None = None) -> Any:
        """As `Networks.load`."""
        if not path:
            seeded_weights(network, 2)
        return super().load(network, path, flags, entry)


def _chain(here: Setting, terms: Mapping[str, Sequence[Guidance]]) -> Tensor:
    """The image of a DDIM chain that the methods of CHAINED guide, as far as they are there."""
    guidance = [term for name in CHAINED for term in terms.get(name, ())]
    return last(sample_chain(ddim_step, here.denoise, here.x, lambda step: here.noise, guidance))["sample"]


def _gradient(here: Setting, term: LossGuidance) -> Tensor:
    """The gradient at x_t of a loss, through the evaluation of the network."""
    with torch.enable_grad():
        x = here.x.detach().clone().requires_grad_()
        ctx = StepContext(here.denoise, x, here.t, torch.arange(len(x)))
        with term.observe() as observed:
            ctx.observed[term] = observed
            pred = here.denoise(x, here.t)
        return torch.autograd.grad(LOSS_SCALE * term.loss(ctx, pred).sum(), x)[0] / LOSS_SCALE


def relative(found: Tensor, expected: Tensor) -> float:
    """The deviation |found - expected| / |expected|, of all elements together."""
    return float((found - expected).norm() / expected.norm())


# Ranks


def ranks_checks(options: DeviceOptions, device: torch.device, notes: list[str]) -> list[Check]:
    """The images of a short run on one rank and on several, which must be the same to the bit."""
    if options.ranks == 1:
        notes.append("ranks were not compared: --ranks 1")
        return []
    environment = dict(os.environ)
    if 0 < torch.cuda.device_count() < options.ranks:
        notes.append(f"ranks were compared on the CPU: {options.ranks} ranks need as many GPUs")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        images = [_sampled(Path(folder) / str(ranks), ranks, environment) for ranks in (1, options.ranks)]
    difference = float(np.abs(images[0].astype(int) - images[1]).max())
    return [Check("fmnist32", "images", f"{options.ranks} ranks with one", difference, 0.0)]


def _sampled(out: Path, ranks: int, environment: Mapping[str, str]) -> np.ndarray:
    """Eight images of the bundled model by so many ranks. Raises CalledProcessError where the command fails."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(command_file("image_sample")), "--model", "fmnist32", "--num_samples", "8",
               "--batch_size", "2", "--timestep_respacing", "3", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={"OMP_NUM_THREADS": "1", **environment})
    with np.load(out / "samples_8x32x32x3.npz") as file:
        return file["arr_0"]
