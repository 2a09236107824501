"""The weights in what a checkpoint file holds: the entry of a wrapped file, plain names, plain tensors."""

from __future__ import annotations

import logging
import re
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
FIRST = "input_blocks.0.0.weight"             # of every network here, so that what stands before it is a prefix
OPTIMISER = {"state", "param_groups"}         # what its state holds
LAYERS = 3                                    # of mappings in which weights may lie
CONVERT = "scripts/convert_checkpoint.py --checkpoint_entry"


def weights_in(content: Any, path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors by name in what the file `path` holds.

    content: tensors by name, or a mapping that has such a mapping as an entry, or as an entry of an entry, beside what
    else it holds. A network with a prefix before its names, beside tensors of others, is an entry of the prefix's name:
    model and ema_model, where names begin with model. and ema_model. (Lightning). entry: the one to take; "": the first
    of ENTRIES that is there, or the only one; None: the same, where the user has no option that chooses. Which one was
    taken is logged. The prefixes of DistributedDataParallel and torch.compile, which all names have or none, are left
    out, and so is any other before a network of this project.

    Raises UserError, one sentence that names the file, where there are no tensors by name, where the entry is not
    there or could be one of several, and for tensors that are no plain ones.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold tensors by name, not one {type(content).__name__}")
    if content.keys() >= OPTIMISER:
        raise UserError(f"{path}: is the state of an optimiser, and holds no weights")
    wrapped = _entries(content)
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
    return _without_prefixes(content, path)


def taken_in(content: Any, path: str | Path, entry: str) -> str:
    """The place of the entry that `weights_in` takes, "" where the file wraps none; arguments and errors are its."""
    wrapped = _entries(content) if isinstance(content, Mapping) else {}
    return _chosen(wrapped, path, entry) if entry or wrapped else ""


def _entries(content: Mapping[Any, Any], layers: int = LAYERS) -> dict[str, Mapping[str, Tensor]]:
    """The mappings of tensors in a mapping, by their places in it, like "ema" and "state/ema".

    What lies deeper counts below the names of ENTRIES, and everywhere where there is nothing else.
    """
    if _holds_tensors(content):
        return _networks(content)
    direct = {name: value for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)}
    deeper: dict[str, Mapping[str, Tensor]] = {}
    for name, value in content.items():
        opens = layers > 1 and name not in direct and (name in ENTRIES or not direct)
        if opens and isinstance(name, str) and isinstance(value, Mapping) and not value.keys() >= OPTIMISER:
            deeper |= {f"{name}/{place}": found for place, found in _entries(value, layers - 1).items()}
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, value in direct.items():
        networks = {f"{name}/{prefix}": network for prefix, network in _networks(value).items()}
        found |= networks or {name: value}
    return found | deeper


def _networks(state: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """The networks of this project among tensors that have other names besides, by their prefixes without the dot."""
    prefixes = sorted((name.removesuffix(FIRST) for name in state if name.endswith(f".{FIRST}")), key=len, reverse=True)
    if FIRST in state or (len(prefixes) == 1 and all(name.startswith((prefixes[0], AVERAGED)) for name in state)):
        return {}
    found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in sorted(prefixes)}
    for name, value in state.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                found[prefix][name.removeprefix(prefix)] = value
                break
    return {prefix.removesuffix("."): network for prefix, network in found.items()}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _chosen(wrapped: Mapping[str, Any], path: str | Path, entry: str | None) -> str:
    """The name of the entry to take, which is logged."""
    there = ", ".join(wrapped)
    named = [name for name in wrapped if not entry or entry in (name, *name.split("/"))]
    if not named:
        has = f"has {there}" if wrapped else "has no entries of weights"
        raise UserError(f"--checkpoint_entry {entry}: {path} {has}")
    best = [name for name in named if _rank(name) == min(map(_rank, named))]
    if len(best) > 1:
        chooses = CONVERT if entry is None else "--checkpoint_entry"
        raise UserError(f"{path}: holds several entries of weights, {there}: choose one with {chooses}")
    chooses = f"{CONVERT} makes a file of another" if entry is None else "--checkpoint_entry chooses"
    _log.info("%s: its entry %s is taken%s", path, best[0], f" of {there} ({chooses})" if len(wrapped) > 1 else "")
    return best[0]


def _rank(name: str) -> list[int]:
    """The places in ENTRIES of an entry and of those that it lies in, the first of all first; behind them for others.

    So model comes before classifier, in state_dict as elsewhere.
    """
    return sorted(ENTRIES.index(part) if part in ENTRIES else len(ENTRIES) for part in re.split("[/.]", name))


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


def _without_prefixes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    names = {name: name for name in state}
    if len(names) > 1 and all(name.startswith("module.") for name in names if name != AVERAGED):
        names.pop(AVERAGED, None)
    while prefix := next((prefix for prefix in PREFIXES if all(new.startswith(prefix) for new in names.values())), ""):
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
    first = next((new for new in names.values() if new.endswith(f".{FIRST}")), FIRST)
    prefix = first.removesuffix(FIRST)
    if prefix and all(new.startswith(prefix) for new in names.values()):
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
        _log.info("%s: the prefix %s of its names is left out", path, prefix)
    return {new: state[name] for name, new in names.items()}


def check_weights(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError where tensors of the file `path` cannot be weights: the state of a training, whole numbers."""
    check_no_state(state, path)
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{path}: its tensor {name} is of {str(value.dtype).removeprefix('torch.')}, and weights "
                            "are floating-point numbers")


def check_no_state(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError where tensors of the file `path` are the state of a training, which holds more than weights."""
    if any(name.startswith("predictors/") for name in state):        # of scripts/depth_train.py
        weights = Path(path).name.replace(".state.safetensors", ".safetensors")
        raise UserError(f"{path}: is the state of a training of depth predictors; {weights} is written at its end")
    if "loop/step" in state:
        beside = sorted(file.name for file in Path(path).parent.glob("*.safetensors") if file.name != Path(path).name)
        named = " or ".join(beside) or "model.safetensors or ema_RATE.safetensors"
        raise UserError(f"{path}: is the state of a training; name {named} beside it")
