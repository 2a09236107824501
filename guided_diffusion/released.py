"""The released checkpoints of guided-diffusion: which there are, what is to know of one, and fetching it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import checkpoint
from .checkpoint import Preset
from .errors import UserError
from .fetch import Download, sha256_of, size_of
from .options import nearest


def find_released(names: Sequence[str], every: bool = False) -> list[Preset]:
    """The released checkpoints of these names, or every one there is. Raises UserError for a name that is none."""
    known = checkpoint.released_names()
    if not (names or every):
        raise UserError(f"no NAME is given: name a checkpoint, there are {', '.join(known)}")
    for name in names:
        if name in checkpoint.preset_names() and name not in known:
            raise UserError(f"{name}: is shipped, there is nothing to fetch: pass --model {name}")
        if name not in known:
            raise UserError(f"{name}: is no released checkpoint{nearest(name, known)}, there are {', '.join(known)}")
    return [checkpoint.find_preset(name) for name in dict.fromkeys(names or known)]


def description(preset: Preset, ask: bool = True) -> str:
    """What is to know of a released checkpoint before it is fetched, in lines; `ask` the server for its size."""
    size = size_of(preset.url) if ask else None
    about = f"about {_readable(4 * preset.parameters)}"          # of float32, and next to nothing else
    guide = f", guided by {preset.classifier}" if preset.classifier else ""
    return (f"{preset.name}: {preset.kind}, {preset.parameters:,} parameters{guide}\n"
            f"    address: {preset.url}\n"
            f"    licence: {preset.licence}\n"
            f"    size:    {f'{size:,} bytes ({_readable(size)})' if size else about}")


def fetch_released(preset: Preset, folder: Path, sha256: str | None = None) -> str:
    """Has a released checkpoint in `folder`, as NAME.pt, and says so with its SHA-256; shows progress on stderr.

    Raises UserError where it cannot be had, or where another file has its name.
    """

    def misfit(path: Path) -> str | None:
        try:
            count = sum(value.numel() for value in checkpoint.load_state_dict(path).values())
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return f"holds {count:,} numbers instead of {preset.parameters:,}" if count != preset.parameters else None

    target = folder / f"{preset.name}.pt"
    done = "is there already" if target.exists() else "fetched"
    Download(preset.url, target, sha256=sha256, check=misfit).run()
    return f"{target}: {done}, {target.stat().st_size:,} bytes, SHA-256 {sha256_of(target)}"


def _readable(size: int) -> str:
    return tqdm.format_sizeof(size, "B", 1000)
