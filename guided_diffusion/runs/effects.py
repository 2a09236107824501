"""Which of the flags that a user gave have no effect on a run, in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..build import NetworkOptions
from ..dtypes import dtype_flags
from ..guidance import ContrastGuidance, GuidanceOptions, TransformGuidance
from ..late import Tensor, torch
from ..options import option_fields
from ..process import DiffusionProcess
from ..sampling import SAMPLERS
from .sample import SamplingRun


def without_effect(run: SamplingRun, given: Collection[str]) -> str:
    """One line on the flags among `given` that no image of the run depends on; "" where there is none.

    Those are options of a guidance method that is off, unless they are what switches it off, of a sampler that is not
    used, of a method whose window holds no step, or none with a contrast to change, bounds of windows that leave out no
    step, or none that counts, what other options make useless, labels where nothing takes any, what --dtype says in
    another way, and --batch_contrasts where there is nothing to batch.
    """
    used = (run.sample, run.model, run.diffusion, run.sampler, *run.active)
    shared = {field.name for options in used for field in option_fields(type(options))}
    idle = {flag: why for flag, why in _switched_off(run).items() if flag not in shared}      # why, by flag
    idle |= useless_in_network(run.model)
    idle |= idle_methods(run.active, run.process()) if run.active else {}
    if not run.labelled and run.sample.labels in run.LABELS:       # others are refused
        idle["labels"] = "nothing takes classes"
    if run.sample.dtype:
        idle |= dict.fromkeys(dtype_flags(run.sample.dtype), f"--dtype {run.sample.dtype} counts")
    if run.sample.batch_contrasts:
        idle |= idle_batches(run.active)
    return in_words(idle, given)


def in_words(idle: Mapping[str, str], given: Collection[str]) -> str:
    """One line on the flags among `given` that are idle, "" where there is none; idle: the reason by flag."""
    found: dict[str, list[str]] = {}
    for flag in given:
        if flag in idle:
            found.setdefault(idle[flag], []).append(f"--{flag}")
    words = "; ".join(f"{', '.join(flags)} ({why})" for why, flags in found.items())
    return f"without effect: {words}" if words else ""


def idle_batches(active: Sequence[GuidanceOptions]) -> dict[str, str]:
    """--batch_contrasts, and why, where no two evaluations of a step can be one batch; active: the methods that are on.

    Those can be that two terms make, or the step's own and one beside it.
    """
    evaluations = [passes for method in active if method.can_batch for term, passes in method.schedule()
                   if term.scale and passes.forward]
    if len(evaluations) > 1 or any(method.beside_the_step for method in active):
        return {}
    return {"batch_contrasts": "nothing makes two evaluations that differ in their inputs alone"}


def _switched_off(run: SamplingRun) -> dict[str, str]:
    """The flags of samplers and methods that are not used, and why."""
    idle: dict[str, str] = {}
    for name, sampler in zip(SAMPLERS, run.samplers, strict=True):
        if name != run.sample.sampler_name:
            idle |= {field.name: f"the sampler is {run.sample.sampler_name}" for field in option_fields(type(sampler))}
    return idle | methods_off(run.guidance)


def methods_off(guidance: Iterable[GuidanceOptions]) -> dict[str, str]:
    """The flags of methods that are not used, and why."""
    return {field.name: f"{method.short} is off" for method in guidance if not method.active
            for field in option_fields(type(method)) if not _switches(method, field.name)}


def idle_methods(active: Sequence[GuidanceOptions], process: DiffusionProcess) -> dict[str, str]:
    """The flags of methods that are on, among each other, which change no image of a process, and why.

    active: all of them. process: whose steps the sampler walks through.
    """
    idle: dict[str, str] = {}
    for method in active:
        idle |= method.useless()
        idle |= _idle_bounds(method, active, process)
    for method, why in _idle_methods(active, process):
        idle |= method.all_useless(why)
    return idle


def useless_in_network(network: NetworkOptions) -> dict[str, str]:
    """The flags that others of a network make useless, and why."""
    idle: dict[str, str] = {}
    if network.num_head_channels != -1:
        idle |= dict.fromkeys(("num_heads", "num_heads_upsample"),
                              f"--num_head_channels {network.num_head_channels} counts")
    if network.learn_sigma:
        idle["sigma_small"] = "the network predicts the variance"
    return idle


def _idle_bounds(method: GuidanceOptions, active: Sequence[GuidanceOptions], process: DiffusionProcess,
                 ) -> dict[str, str]:
    """The flags of a method's window that leave out no step, or none that would change an image, and why.

    Each is asked beside those alone that are not idle: of two that leave out the same steps, the second counts.
    """
    idle: dict[str, str] = {}
    for flag in method.bounds():
        if getattr(method, flag) is None:
            continue
        without = replace(method, **{flag: None})
        left_out = _steps_held(without, process) & ~_steps_held(method, process)
        if not left_out.any():
            idle[flag] = f"every step of the window of {method.short} is within"
        elif issubclass(method.kind, TransformGuidance) and not (left_out & _steps_of_contrasts(active, process)).any():
            idle[flag] = f"no contrast acts at a step that it keeps from {method.short}"
        method = without if flag in idle else method
    return idle


def _steps_held(method: GuidanceOptions, process: DiffusionProcess) -> Tensor:
    """(terms, T) bool: the steps of the chain at which each term of a method acts."""
    return torch.stack([term.window(torch.arange(process.num_timesteps), process) for term, _ in method.schedule()])


def _steps_of_contrasts(active: Sequence[GuidanceOptions], process: DiffusionProcess) -> Tensor:
    """(T,) bool: the steps of the chain at which any contrast acts."""
    held = [_steps_held(method, process).any(dim=0) for method in active if issubclass(method.kind, ContrastGuidance)]
    return torch.stack(held).any(dim=0) if held else torch.zeros(process.num_timesteps, dtype=torch.bool)


def _idle_methods(active: Sequence[GuidanceOptions], process: DiffusionProcess,
                  ) -> Iterator[tuple[GuidanceOptions, str]]:
    """Methods that are on and yet change no image, and why."""
    contrasts = any(issubclass(method.kind, ContrastGuidance) for method in active)
    for method in active:
        held = _steps_held(method, process)
        if not held.any():
            yield method, f"no step lies in the window of {method.short}"
        elif issubclass(method.kind, TransformGuidance) and not contrasts:
            yield method, f"there is no contrast that {method.short} could change"
        elif issubclass(method.kind, TransformGuidance) and not (held & _steps_of_contrasts(active, process)).any():
            yield method, f"no contrast acts at a step of the window of {method.short}"


def _switches(method: GuidanceOptions, flag: str) -> bool:
    """Whether a flag switches the method on, or its value here is what switches it off."""
    on = replace(type(method)(), **method.switched_on)
    return flag in method.switched_on or not replace(on, **{flag: getattr(method, flag)}).active
