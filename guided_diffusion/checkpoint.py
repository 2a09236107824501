"""Checkpoints: safe loading and saving.

A checkpoint is a flat mapping of parameter names to tensors, in a safetensors file or one of `torch.save`, on this
machine or at an address, which is fetched once.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .entries import check_weights, taken_in, weights_in
from .errors import UserError
from .facts import check_options
from .fetch import is_address, local
from .files import stamp, write
from .functions import is_function, source_of
from .late import Tensor, nn, torch
from .places import find_bundled
from .tensor_files import save_tensors

SUFFIXES = (".safetensors", ".pt", ".pth")          # of the files that `save_state` writes
_LARGEST_HEADER = 100_000_000          # bytes; the limit of the safetensors format


def locate(path: str | Path) -> str | Path:
    """Where a checkpoint is on this machine: see `on_disk`, and an address (see `fetch.local`) in the cache.

    Raises UserError where it cannot be fetched, or what came is no checkpoint.
    """
    return local(on_disk(path), check=damage)


def on_disk(path: str | Path) -> str | Path:
    """The file that an option names: of a network in MODULE:FUNCTION the module's, any other path as it is.

    A bundled file is also found by its path in a checkout, see `places.find_bundled`. What is not there, and an
    address, is returned as it is.
    """
    return (source_of(str(path)) or path) if is_function(str(path)) else find_bundled(path)


def check_there(flag: str, path: str) -> None:
    """Raises UserError, naming the option, where a file that it names does not exist; an address may yet be fetched."""
    if path and not is_address(path) and not os.path.lexists(on_disk(path)):
        raise UserError(f"--{flag} {path}: there is no such file")


def stamps(files: Mapping[str, str]) -> dict[str, tuple[int, int, int] | None]:
    """What differs once files were replaced or written, by option: the `stamp` of each.

    files: paths by option. None stands for a file that is not there, and for an address, whose file stays as it came.
    """
    return {flag: None if is_address(path) else stamp(on_disk(path)) for flag, path in files.items()}


def check_unchanged(files: Mapping[str, str], before: Mapping[str, object]) -> None:
    """Raises UserError where one of these files has another of the `stamps` than before."""
    for flag, now in stamps(files).items():
        if now != before[flag]:
            raise UserError(f"--{flag} {files[flag]}: was replaced while it was read; start the command again")


def damage(path: Path) -> str | None:
    """Why a file is no whole checkpoint, as far as that shows without its tensors, in words that follow its name."""
    try:
        if _format(path) == "zip" and not zipfile.is_zipfile(path):
            return "is truncated or damaged"
        read_metadata(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def load_state_dict(path: str | Path, device: str | torch.device = "cpu", entry: str | None = None,
                    ) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on `device`; the format is told by the content, not by the suffix.

    path: a file, or an address as `locate` takes it. entry: of a file that holds several, as `entries.weights_in`
    takes it.

    Nothing but plain tensors and numbers is ever unpickled, and where the format allows it, the file is mapped, not
    read: on a CPU its tensors take memory when they are touched. Raises UserError, one sentence that names the file,
    where it can't be read, is truncated, is no checkpoint, or holds something else than plain tensors by name.
    """
    path = locate(path)
    return {name: value.detach().to(device) for name, value in weights_in(_load(path), path, entry).items()}


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint: safetensors where `path` ends in .safetensors, `torch.save` where it ends in .pt or .pth.

    The file appears whole or not at all, and the same tensors and metadata give the same bytes. Only safetensors files
    keep `metadata`. Raises UserError for another
    suffix, for metadata in a .pt file, and where the file can't be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the name of a checkpoint must end in .safetensors, .pt or .pth")
    if metadata and path.suffix != ".safetensors":
        raise UserError(f"{path}: metadata is kept in .safetensors files only")
    separate = _separate(tensors)
    if path.suffix == ".safetensors":
        save_tensors(path, separate, metadata or {}, sync=True)
        return

    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:          # given a name, torch writes it into the file
            try:
                torch.save(separate, stream)
            except RuntimeError as error:             # a full disk, in the words of torch
                raise OSError(str(error).splitlines()[0]) from None

    write(path, save, sync=True)


def taken_entry(path: str | Path, entry: str = "") -> str:
    """The place of the entry that `load_state_dict` takes of a file, "" where the file wraps none; errors as there."""
    path = locate(path)
    return taken_in(_load(path), path, entry)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; {} for a file of `torch.save`. Raises UserError."""
    path = locate(path)
    if _format(path) != "safetensors":
        return {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception:          # a damaged header makes the library fail in several ways
        raise UserError(f"{path}: is truncated or damaged") from None


def check_name(path: str | Path, flag: str = "") -> None:
    """Raises UserError, naming the flag (with its dashes), for a name that the libraries of checkpoints cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{f'{flag} ' if flag else ''}{path}: is no name in UTF-8, and the libraries that read "
                        "checkpoints open no other; rename it") from None


def _format(path: str | Path) -> str:
    """One of "safetensors", "zip" (what `torch.save` writes) and "pickle" (what it wrote before PyTorch 1.6)."""
    check_name(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:          # a NUL among its characters
        raise UserError(f"{str(path)!r}: is no name of a file") from None
    if not stat.S_ISREG(mode):          # a pipe would be waited on for ever
        kind = "folder" if stat.S_ISDIR(mode) else "device"
        raise UserError(f"{path}: is a {kind}, not a checkpoint file{checkpoints_in(Path(path))}")
    if not head:
        raise UserError(f"{path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise UserError(f"{path}: is no checkpoint, neither of safetensors nor of torch.save")


def checkpoints_in(folder: Path) -> str:
    """The checkpoints of a folder, of which one may have been meant, as the end of a sentence; "" for none."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError:
        return ""
    return f"; it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def _load(path: str | Path) -> Any:
    """What a file holds, as `entries.weights_in` takes it; where the format allows it, mapped."""
    format = _format(path)
    return _load_safetensors(path) if format == "safetensors" else _load_pickled(path, mappable=format == "zip")


def _load_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception:          # a damaged header makes the library fail in several ways
        raise UserError(f"{path}: is truncated or damaged") from None


def load_pickled(path: str | Path) -> Any:
    """What `torch.save` wrote: plain tensors, numbers and text in lists and dicts, such as the state of an optimiser.

    Numbers of NumPy become those of Python. Nothing else is unpickled. Raises UserError where the file cannot be read,
    is damaged or holds something else.
    """
    format = _format(path)
    if format == "safetensors":
        raise UserError(f"{path}: is a safetensors file, not one of torch.save")
    return _load_pickled(path, mappable=format == "zip")


class _BoundedReader(io.BufferedReader):
    """An open file of which no more is asked for than it holds: damaged lengths would take as much memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any open file."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _load_pickled(path: str | Path, mappable: bool) -> Any:
    # torch.load maps only a file that it is given by name, and believes a name that ends in .safetensors.
    mapped = mappable and Path(path).suffix != ".safetensors"
    try:
        with _BoundedReader(io.FileIO(path)) as file, warnings.catch_warnings(), _numpy_numbers():
            warnings.simplefilter("ignore")          # what torch warns of here ends in one of the sentences below
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:          # a damaged pickle makes the unpickler fail in any way there is
        foreign = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if foreign:
            raise UserError(f"{path}: holds foreign objects ({foreign[1] or foreign[2]}), and only plain tensors are "
                            "loaded") from None
        raise UserError(f"{path}: is truncated, damaged or no checkpoint of plain tensors") from None


class _NumberType:
    """Stands for numpy.dtype in what is unpickled, and takes no more than the types of plain numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("b1|[iuf][1248]", code):
            raise ValueError(f"{code} is no type of plain numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


class _Number:
    """Stands for NumPy's function that makes a number, in what is unpickled; gives one of Python."""

    def __new__(cls, kind: _NumberType, content: bytes) -> Any:
        """The number in some bytes."""
        return np.frombuffer(content, kind.order + kind.code, 1)[0].item()


# By the names that files call them by: torch compares nothing else.
_NUMPY_NUMBERS: list[Any] = [
    type("dtype", (_NumberType,), {"__module__": "numpy"}),
    *(type("scalar", (_Number,), {"__module__": module}) for module in ("numpy.core.multiarray",
                                                                        "numpy._core.multiarray"))]


def _numpy_numbers() -> contextlib.AbstractContextManager[Any]:
    """Within, torch also reads NumPy's numbers, such as a loss or a step beside weights, and runs no code of NumPy."""
    if not hasattr(torch.serialization, "safe_globals"):            # before PyTorch 2.5, which refuses them
        return contextlib.nullcontext()
    return torch.serialization.safe_globals(_NUMPY_NUMBERS)


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


def load_into(model: nn.Module, path: str | Path, options: Mapping[str, Any], entry: str | None = None) -> None:
    """Load the checkpoint `path` into `model`, built from `options`, in the types it has.

    options: of an ADM network, which the weights are held against (see `check_options`); none for any other module.
    path, entry: as `load_state_dict` takes them. A model that was built on the device "meta", without weights, gets
    those of the file, on the CPU; any other keeps its devices.

    Raises UserError as `load_state_dict`, `check_weights` and `check_options` do, and where any weight is still
    missing, left over or of another shape; the model is then as it was.
    """
    path = locate(path)
    state = load_state_dict(path, entry=entry)
    own = model.state_dict()
    counts = {name for name, value in own.items() if not value.is_floating_point()}         # as batch norms have them
    check_weights({name: value for name, value in state.items() if name not in counts}, path)
    if options:
        check_options(state, options, path)
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


AnyNetwork = TypeVar("AnyNetwork", bound="nn.Module")


def ready(network: AnyNetwork, device: torch.device | str) -> AnyNetwork:
    """A network for evaluation: on its device, in the faster memory order, frozen."""
    from .unet import Encoder

    network.to(device)
    if isinstance(network, Encoder):
        network.channels_last()
    return network.eval().requires_grad_(False)
