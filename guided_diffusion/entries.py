"""The weights in what a checkpoint file holds: the entry of a wrapped file, plain names, plain tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .late import Tensor, torch

_log = logging.getLogger(__name__)

# Names of entries that hold weights in files of other code; a moving average first, as samples from it are better.
ENTRIES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict", "model", "model_state_dict", "net",
           "network", "module", "weights")
PREFIXES = ("module.", "_orig_mod.")          # of DistributedDataParallel and of torch.compile
AVERAGED = "n_averaged"                       # the counter that torch's AveragedModel keeps beside its module


def weights_in(content: Any, path: str | Path, entry: str = "") -> dict[str, Tensor]:
    """The tensors by name in what the file `path` holds.

    content: tensors by name, or a mapping that has such a mapping as an entry, beside what else it holds. entry: the
    one to take; "": the first of ENTRIES that is there, or the only one. Which one was taken is logged. The prefixes
    of DistributedDataParallel and torch.compile, which all names have or none, are left out.

    Raises UserError, one sentence that names the file, where there are no tensors by name, where the entry is not
    there or could be one of several, and for tensors that are no plain ones.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold tensors by name, not one {type(content).__name__}")
    if {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path}: is the state of an optimiser, and holds no weights")
    wrapped = {name: value for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)}
    if entry or wrapped:
        content = wrapped[_chosen(wrapped, path, entry)]
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: must hold tensors by name, but its entry {name!r} is a {type(value).__name__}")
        kind = _unusual_kind(value)
        if kind:
            raise UserError(f"{path}: its tensor {name} is {kind}, and only plain tensors are loaded")
    if not content:
        raise UserError(f"{path}: holds no tensors")
    return _without_prefixes(content)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _chosen(wrapped: Mapping[str, Any], path: str | Path, entry: str) -> str:
    """The name of the entry to take, which is logged."""
    there = ", ".join(wrapped)
    if entry and entry not in wrapped:
        has = f"has {there}" if wrapped else "has no entries of weights"
        raise UserError(f"--checkpoint_entry {entry}: {path} {has}")
    known = [name for name in ENTRIES if name in wrapped]
    if not (entry or known) and len(wrapped) > 1:
        raise UserError(f"{path}: holds several entries of weights, {there}: choose one with --checkpoint_entry")
    chosen = entry or (known or list(wrapped))[0]
    _log.info("%s: its entry %s is taken%s", path, chosen,
              f" of {there} (--checkpoint_entry chooses)" if len(wrapped) > 1 else "")
    return chosen


def _unusual_kind(tensor: Tensor) -> str | None:
    """What keeps a tensor from being a plain array of numbers, in words; None where nothing does."""
    if tensor.is_meta:
        return "a meta tensor, without its numbers"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point() and tensor.element_size() < 2:
        return f"of 8-bit floats ({tensor.dtype})"
    return None


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in state}
    if len(names) > 1 and all(name.startswith("module.") for name in names if name != AVERAGED):
        names.pop(AVERAGED, None)
    while prefix := next((prefix for prefix in PREFIXES if all(new.startswith(prefix) for new in names.values())), ""):
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
    return {new: state[name] for name, new in names.items()}


def check_weights(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError where tensors of the file `path` cannot be weights: the state of a training, whole numbers."""
    if "loop/step" in state:
        beside = sorted(file.name for file in Path(path).parent.glob("*.safetensors") if file.name != Path(path).name)
        named = " or ".join(beside) or "model.safetensors or ema_RATE.safetensors"
        raise UserError(f"{path}: is the state of a training; name {named} beside it")
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{path}: its tensor {name} is of {str(value.dtype).removeprefix('torch.')}, and weights "
                            "are floating-point numbers")
