"""Writing files in the safetensors format, byte for byte as its library does, and never any other file.

The library writes a file of its own beside the one that it is given, under a name that nobody else knows, and renames
it: what a kill leaves of that stays for ever. Nor does it write metadata in the same order each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .errors import UserError
from .files import write
from .late import Tensor, torch

# In the order of the library, whose files begin with the last of these.
TYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
         "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32",
         "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64"}
ALIGNED = 8             # bytes of which the header is a multiple


def write_tensors(stream: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors on the CPU, and the metadata in the order of their names.

    Raises UserError for a type of tensors that such files cannot hold.
    """
    places = {kind: place for place, kind in enumerate(TYPES)}
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if unknown := sorted(set(kinds.values()) - TYPES.keys()):
        raise UserError(f"safetensors files hold no tensors of {unknown[0]}, name a file that ends in .pt")
    names = sorted(tensors, key=lambda name: (-places[kinds[name]], name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": TYPES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, sync: bool = False,
                 parents: bool = False) -> None:
    """Writes a file of contiguous tensors on the CPU, whole or not at all; the same ones give the same bytes.

    sync, parents, and the UserError where it cannot be written: as `files.write`; also as `write_tensors`.
    """
    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            write_tensors(stream, tensors, metadata)

    write(path, save, sync=sync, parents=parents)
