"""Weights that were converted once: safetensors files in the cache folder, which say what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from guided_diffusion.errors import UserError
from guided_diffusion.late import Tensor
from guided_diffusion.tensor_files import save_tensors

FORMAT, CONTENT = "format", "content_sha256"        # names in the metadata


def read_conversion(path: Path, expected: str, otherwise: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata that `write_conversion` wrote.

    expected: the format. Raises UserError where the file is missing, and, with the words `otherwise`, where it is
    damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = metadata[FORMAT] == expected and metadata[CONTENT] == _content_sha256(tensors)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path}: {otherwise}")
    return tensors, metadata


def write_conversion(path: Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors with their format and the SHA-256 of their values, which `read_conversion` checks.

    Missing folders are made. Raises UserError where the file cannot be written.
    """
    said = {FORMAT: format, **metadata, CONTENT: _content_sha256(tensors)}
    save_tensors(path, tensors, said, parents=True)


def _content_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
