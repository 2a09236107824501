"""Checkpoints: safe loading and saving.

A checkpoint is a flat mapping of parameter names to tensors, in a safetensors file or one of `torch.save`, on this
machine or at an address, which is fetched once.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import UserError
from .facts import check_options
from .fetch import local
from .files import write
from .places import find_bundled
from .unet import Encoder

_LARGEST_HEADER = 100_000_000          # bytes; the limit of the safetensors format


def locate(path: str | Path) -> str | Path:
    """Where a checkpoint is on this machine: a path as it is, an address (see `fetch.local`) in the cache.

    A bundled file is also found by its path in a checkout, see `places.find_bundled`.

    Raises UserError where it cannot be fetched, or what came is no checkpoint.
    """
    return local(find_bundled(path), check=damage)


def damage(path: Path) -> str | None:
    """Why a file is no whole checkpoint, as far as that shows without its tensors, in words that follow its name."""
    try:
        if _format(path) == "zip" and not zipfile.is_zipfile(path):
            return "is truncated or damaged"
        read_metadata(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def load_state_dict(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on `device`; the format is told by the content, not by the suffix.

    path: a file, or an address as `locate` takes it.

    Nothing but plain tensors is ever unpickled, and where the format allows it, the file is mapped, not read: on a
    CPU its tensors take memory when they are touched. Raises UserError, one sentence that names the file, where it
    can't be read, is truncated, is no checkpoint, or holds something else than tensors by name.
    """
    path = locate(path)
    format = _format(path)
    state = _load_safetensors(path) if format == "safetensors" else _load_pickled(path, mappable=format == "zip")
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: must hold tensors by name, not one {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: must hold tensors by name, but its entry {name!r} is a {type(value).__name__}")
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return {name: value.detach().to(device) for name, value in state.items()}


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint: safetensors where `path` ends in .safetensors, `torch.save` where it ends in .pt or .pth.

    The file appears whole or not at all. Only safetensors files keep `metadata`. Raises UserError for another
    suffix, for metadata in a .pt file, and where the file can't be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"{path}: the name of a checkpoint must end in .safetensors, .pt or .pth")
    if metadata and path.suffix != ".safetensors":
        raise UserError(f"{path}: metadata is kept in .safetensors files only")
    from safetensors import SafetensorError  # here, as networks and samplers run without this package
    from safetensors.torch import save_file

    separate = _separate(tensors)

    def save(temporary: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                save_file(separate, temporary, metadata=dict(metadata or {}))
            else:
                torch.save(separate, temporary)
        except (RuntimeError, SafetensorError) as error:          # a full disk, in the words of either library
            raise OSError(str(error).splitlines()[0]) from None

    write(path, save, sync=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; {} for a file of `torch.save`. Raises UserError."""
    path = locate(path)
    if _format(path) != "safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        raise UserError(f"{path}: is truncated or damaged") from None


def _format(path: str | Path) -> str:
    """One of "safetensors", "zip" (what `torch.save` writes) and "pickle" (what it wrote before PyTorch 1.6)."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a checkpoint file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise UserError(f"{path}: is no checkpoint, neither of safetensors nor of torch.save")


def _load_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError:
        raise UserError(f"{path}: is truncated or damaged") from None


def load_pickled(path: str | Path) -> Any:
    """What `torch.save` wrote: plain tensors, numbers and text in lists and dicts, such as the state of an optimiser.

    Nothing else is unpickled. Raises UserError where the file cannot be read, is damaged or holds something else.
    """
    format = _format(path)
    if format == "safetensors":
        raise UserError(f"{path}: is a safetensors file, not one of torch.save")
    return _load_pickled(path, mappable=format == "zip")


def _load_pickled(path: str | Path, mappable: bool) -> Any:
    # torch.load maps only a file that it is given by name, and believes a name that ends in .safetensors.
    mapped = mappable and Path(path).suffix != ".safetensors"
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what torch warns of here ends in one of the sentences below
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:          # a damaged pickle makes the unpickler fail in any way there is
        foreign = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if foreign:
            raise UserError(f"{path}: holds foreign objects ({foreign[1] or foreign[2]}), and only plain tensors are "
                            "loaded") from None
        raise UserError(f"{path}: is truncated, damaged or no checkpoint of plain tensors") from None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory and view no larger tensor, which would be saved with them."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


def load_into(model: Encoder, path: str | Path, options: Mapping[str, Any]) -> None:
    """Load the checkpoint `path` into `model`, built from `options`, in the types it has.

    path: a file, or an address as `locate` takes it. A model that was built on the device "meta", without weights, gets
    those of the file, on the CPU; any other keeps its devices.

    Raises UserError as `load_state_dict` and `check_options` do, and where any weight is still missing, left over or
    of another shape; the model is then as it was.
    """
    path = locate(path)
    state = load_state_dict(path)
    check_options(state, options, path)
    own = model.state_dict()
    misfits = [f"{name} is missing" for name in own.keys() - state.keys()]
    misfits += [f"{name} is not in the network" for name in state.keys() - own.keys()]
    misfits += [f"{name} is {_size(state[name])}, not {_size(own[name])}" for name in own.keys() & state.keys()
                if state[name].shape != own[name].shape]
    if misfits:
        named = ", ".join(sorted(misfits)[:3])
        raise UserError(f"{path} does not fit the network in {len(misfits)} of its weights: {named}"
                        + (", ..." if len(misfits) > 3 else ""))
    if any(weight.is_meta for weight in own.values()):
        # A copy: what the file maps would change with it.
        state = {name: value.to(own[name].dtype, copy=True) for name, value in state.items()}
        model.load_state_dict(state, assign=True)
    else:
        model.load_state_dict(state)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def ready(network: AnyNetwork, device: torch.device | str) -> AnyNetwork:
    """A network for evaluation: on its device, in the faster memory order, frozen."""
    network.to(device)
    if isinstance(network, Encoder):
        network.channels_last()
    return network.eval().requires_grad_(False)
