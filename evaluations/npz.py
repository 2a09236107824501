"""Sample files and reference batches, read as a stream: a few images in memory, whatever the file's size.

The format is that of guided-diffusion: `arr_0`, images (N, H, W, 3) uint8; a reference batch may also hold the
statistics `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial features) of a larger set of images.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import write

MAX_SIDE = 8192
MAX_RATIO = 200                 # of a member's size to its compressed size; images hardly reach 20
SMALL = 2**30                   # members up to this many bytes may be compressed better than that

_READ_ERRORS = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, SyntaxError, zlib.error,
                NotImplementedError, RuntimeError, zipfile.BadZipFile)


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features."""

    mean: np.ndarray
    covariance: np.ndarray


class BatchFile:
    """A sample file or a reference batch.

    Opening reads headers only, and raises UserError, naming the file, where it is no .npz, where `arr_0` holds
    anything but (N, H, W, 3) uint8, where an array is pickled, or where the archive would unpack to far more than
    images can. Damage further in shows when it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._statistics: dict[str, Statistics | None] = {}
        if not self.path.is_file():
            raise UserError(f"{path}: there is no such file")
        with self._opened("is not an .npz file") as archive:
            self.members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name, info in self.members.items():
            if info.file_size > SMALL and info.file_size > MAX_RATIO * max(1, info.compress_size):
                raise UserError(f"{path}: {name} unpacks {info.compress_size} bytes to {info.file_size}, "
                                "which no images do")
        self.shape = self._image_shape() if "arr_0" in self.members else (0, 0, 0, 3)

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0]

    @property
    def resolution(self) -> str:
        return f"{self.shape[2]}x{self.shape[1]}"

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    def _image_shape(self) -> tuple[int, int, int, int]:
        shape, dtype = self.header("arr_0")
        where = f"{self.path}: arr_0 is {_shown(shape)} {dtype}"
        if dtype != np.uint8:
            hint = " from 0 to 255, also where they were 0 to 1" if dtype.kind == "f" else ""
            raise UserError(f"{where}: images must be uint8{hint}")
        if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise UserError(f"{where}: images must be (N, H, W, 3), RGB, at least one")
        if max(shape[1:3]) > MAX_SIDE:
            raise UserError(f"{where}: images may have {MAX_SIDE} pixels a side at most")
        return shape

    @contextmanager
    def _opened(self, otherwise: str) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except UserError:
            raise
        except _READ_ERRORS as error:
            detail = " ".join(str(error).split())[:100]
            raise UserError(f"{self.path}: {otherwise}{f' ({detail})' if detail else ''}") from None

    @contextmanager
    def _array(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The bytes of an array after its header, its shape and its type."""
        with self._opened(f"{name} is damaged") as archive, archive.open(self.members[name]) as stream:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = read[version](stream)
            if dtype.hasobject or fortran_order:
                kind = "holds pickled objects" if dtype.hasobject else "is in Fortran order"
                raise UserError(f"{self.path}: {name} {kind}, it must be a plain array in C order")
            if int(np.prod(shape, dtype=object)) * dtype.itemsize > self.members[name].file_size:
                raise UserError(f"{self.path}: {name} is damaged (shorter than its header says)")
            yield stream, shape, dtype

    def read(self, name: str) -> np.ndarray:
        """A whole array: for statistics, not for images."""
        with self._array(name) as (stream, shape, dtype):
            return np.frombuffer(_exactly(stream, int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

    def pieces(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array (N, ...) from front to back, `size` rows at a time."""
        with self._array(name) as (stream, shape, dtype):
            row = int(np.prod(shape[1:])) * dtype.itemsize
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                yield np.frombuffer(_exactly(stream, count * row), dtype).reshape(count, *shape[1:])

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array."""
        with self._array(name) as (_, shape, dtype):
            return shape, dtype

    def value(self, name: str) -> Any:
        """A single stored word or number, or None where there is none of that name."""
        return self.read(name).item() if name in self.members else None

    def batches(self, batch_size: int, ours: slice = slice(None), num_images: int | None = None,
                ) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first image, images (n, H, W, 3)) for those batches of the first `num_images` images whose
        index is in the slice `ours`; the file is read once, from front to back.
        """
        total = len(self) if num_images is None else num_images
        starts = range(0, total, batch_size)
        mine = range(len(starts))[ours]
        with self._array("arr_0") as (stream, shape, _):
            size = int(np.prod(shape[1:]))
            for index in range(len(starts)):
                start = starts[index]
                count = min(batch_size, total - start)
                if index in mine:
                    images = np.frombuffer(_exactly(stream, count * size), np.uint8).reshape(count, *shape[1:])
                    if index == 0 and images.max() <= 1:
                        raise UserError(f"{self.path}: the first {count} images hold nothing above 1: pixels must "
                                        "be 0 to 255, not 0 to 1")
                    yield start, images
                elif mine and index < mine[-1]:
                    _skip(stream, count * size)

    def pick(self, numbers: list[int]) -> np.ndarray:
        """The images of these numbers, (n, H, W, 3), in the order given."""
        found = {}
        for number, image in self.batches(1):
            if number in numbers:
                found[number] = image[0]
            if len(found) == len(set(numbers)):
                break
        return np.stack([found[number] for number in numbers])

    def statistics(self, suffix: str = "") -> Statistics | None:
        """Those stored under mu and sigma, or with suffix "_s" under mu_s and sigma_s, as float64; None if neither is.
        """
        if suffix not in self._statistics:
            self._statistics[suffix] = self._read_statistics(suffix)
        return self._statistics[suffix]

    def _read_statistics(self, suffix: str) -> Statistics | None:
        mean, covariance = f"mu{suffix}", f"sigma{suffix}"
        if mean not in self.members and covariance not in self.members:
            return None
        for name in (mean, covariance):
            if name not in self.members:
                raise UserError(f"{self.path}: has no {name}, though it has the other of {mean} and {covariance}")
        shapes = [self.header(name)[0] for name in (mean, covariance)]
        dimension = shapes[0][0] if shapes[0] else 0
        if shapes != [(dimension,), (dimension, dimension)] or dimension < 1:
            raise UserError(f"{self.path}: {mean} is {_shown(shapes[0])} and {covariance} {_shown(shapes[1])}, "
                            "they must be (D,) and (D, D)")
        arrays = [self.read(name) for name in (mean, covariance)]
        for name, array in zip((mean, covariance), arrays, strict=True):
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise UserError(f"{self.path}: {name} must be finite floating-point numbers")
        return Statistics(*(array.astype(np.float64) for array in arrays))


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done:])
        if not got:
            raise EOFError("it ends too early")
        done += got
    return data


def _skip(stream: IO[bytes], count: int) -> None:
    while count:
        got = len(stream.read(min(count, 2**22)))
        if not got:
            raise EOFError("it ends too early")
        count -= got


def _shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def write_batch(path: str | Path, arrays: dict[str, np.ndarray], images: Iterator[np.ndarray] | None = None,
                shape: tuple[int, ...] = ()) -> None:
    """Writes a .npz of `arrays` and, as `arr_0`, of images (n, H, W, 3) that come in pieces, `shape` in all."""
    def save(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
            if images is not None:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                    np.lib.format.write_array_header_1_0(
                        stream, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
                    for piece in images:
                        stream.write(np.ascontiguousarray(piece, np.uint8).data)

    write(path, save)
