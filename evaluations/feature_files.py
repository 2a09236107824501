"""Files of features: how they are laid out, filled by several ranks, checked, and mapped.

A folder holds `pooled.npy`, `spatial.npy` and `probabilities.npy`, (N, D) float32 each, and `features.json`, which says
what they were made of and with, and the sizes and SHA-256 of the three.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import open_own, reason, write_json
from guided_diffusion.foreign import read_json, reading
from guided_diffusion.npz import read_npy

RECORD = "features.json"


class Features(NamedTuple):
    """The features of N images; float32 arrays."""

    pooled: np.ndarray              # (N, D), averages over the last feature map: FID, precision, recall
    spatial: np.ndarray             # (N, ...), a few channels of an earlier map with their places: sFID
    probabilities: np.ndarray       # (N, classes), sum 1: Inception Score


def create(folder: Path, like: Features, total: int) -> None:
    """Makes the three files for `total` images, and reserves their space, so that no later write finds the disk full.

    like: features of some images, (n, D) each. Raises UserError where there is no room.
    """
    for name, values in zip(Features._fields, like, strict=True):
        header = _header((total, values.shape[1]))
        size = len(header) + total * _row_bytes(values)
        try:
            descriptor = open_own(folder / f"{name}.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with os.fdopen(descriptor, "wb") as file:
                file.write(header)
                file.flush()
                _reserve(descriptor, size)
        except OSError as error:
            raise _unwritable(folder, error, total * sum(map(_row_bytes, like))) from None


def write_rows(folder: Path, features: Features, start: int, total: int) -> None:
    """Writes the features (n, D) of the images from `start` on; raises UserError where the disk refuses.

    The files are closed after each call, so that the first rank sees what ranks on other machines wrote.
    """
    for name, values in zip(Features._fields, features, strict=True):
        try:
            with os.fdopen(open_own(folder / f"{name}.npy", os.O_WRONLY), "wb") as file:
                file.seek(len(_header((total, values.shape[1]))) + start * _row_bytes(values))
                file.write(np.ascontiguousarray(values, "<f4").data)
        except OSError as error:
            raise _unwritable(folder, error, total * sum(map(_row_bytes, features))) from None


def seal(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Writes what the features were made of and with, and the sizes and checksums of their files."""
    with reading(folder, "its features cannot be read back"):
        files = {name: _digest(folder / f"{name}.npy") for name in Features._fields}
    write_json(folder / RECORD, {"made_of": dict(made_of), "files": files})


def fault(folder: Path, made_of: Mapping[str, Any]) -> str:
    """Says what is wrong with features that were sealed, "" where nothing is: all their bytes are read."""
    try:
        record = read_json(folder / RECORD, lambda content: content["files"].keys() == set(Features._fields))
        if record.get("made_of") != dict(made_of):
            return f"{RECORD} is of others"
        for name, expected in record["files"].items():
            with reading(folder / f"{name}.npy", "cannot be read"):
                if _digest(folder / f"{name}.npy") != expected:
                    return f"{name}.npy is damaged"
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")
    return ""


def mapped(folder: Path) -> Features:
    """The features, as arrays that are mapped from their files."""
    return Features(*(read_npy(folder / f"{name}.npy") for name in Features._fields))


def _header(shape: tuple[int, int]) -> bytes:
    """The beginning of an .npy file of float32."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _row_bytes(values: np.ndarray) -> int:
    return 4 * values.shape[1]


def _reserve(descriptor: int, size: int) -> None:
    """Sets the size of a file; where the system can, its space is taken at once."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:                      # a system without it
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):       # a file system without it
            raise
        os.ftruncate(descriptor, size)


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _unwritable(folder: Path, error: OSError, size: int) -> UserError:
    return UserError(f"{folder.parent}: the features, {-(-size // 2**20)} MiB, cannot be written ({reason(error)}); "
                     "--cache names another folder for them")
