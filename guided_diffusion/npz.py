"""Sample files and reference batches (.npz), read and written as a stream: a few images in memory, whatever the size.

The format is that of guided-diffusion: `arr_0` holds images (N, H, W, 3) uint8, and `arr_1` their labels (N,) int64, if
they have any. A reference batch may also hold the statistics `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s`
(spatial features) of a larger set of images. Written files are not compressed; the same arrays give the same bytes.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from .errors import UserError
from .fetch import sha256_of
from .files import prepare, write

MAX_SIDE = 8192
MAX_RATIO = 200                 # of a member's size to its compressed size; images hardly reach 20
SMALL = 2**30                   # members up to this many bytes may be compressed better than that
BLOCK = 2**22                   # bytes read at a time where nothing else says how many

# What a missing, truncated, damaged or wrong .npz file makes zipfile and NumPy raise.
READ_ERRORS = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, SyntaxError, zlib.error,
               NotImplementedError, RuntimeError, zipfile.BadZipFile)

Chunk = tuple[np.ndarray, np.ndarray | None]          # images (n, H, W, 3) uint8, and labels (n,) int64 or None


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
        """Width and height of the images in words: "32x32"."""
        return f"{self.shape[2]}x{self.shape[1]}"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal."""
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
        except READ_ERRORS as error:
            detail = " ".join(str(error).split())[:100]
            raise UserError(f"{self.path}: {otherwise}{f' ({detail})' if detail else ''}") from None

    @contextmanager
    def _array(self, name: str) -> Iterator[tuple[io.BufferedIOBase, tuple[int, ...], np.dtype]]:
        """The bytes of an array after its header, its shape and its type."""
        with self._opened(f"{name} is damaged") as archive, archive.open(self.members[name]) as stream:
            shape, fortran_order, dtype = _header(stream)
            if dtype.hasobject or fortran_order:
                kind = "holds pickled objects" if dtype.hasobject else "is in Fortran order"
                raise UserError(f"{self.path}: {name} {kind}, it must be a plain array in C order")
            if math.prod(shape) * dtype.itemsize > self.members[name].file_size:
                raise UserError(f"{self.path}: {name} is damaged (shorter than its header says)")
            yield cast(io.BufferedIOBase, stream), shape, dtype

    def read(self, name: str) -> np.ndarray:
        """A whole array by its name, for statistics: images are read in parts."""
        with self._array(name) as (stream, shape, dtype):
            return _rows(stream, shape, dtype)

    def pieces(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array (N, ...) by its name, from front to back, `size` rows at a time."""
        with self._array(name) as (stream, shape, dtype):
            for start in range(0, shape[0], size):
                yield _rows(stream, (min(size, shape[0] - start), *shape[1:]), dtype)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array."""
        with self._array(name) as (_, shape, dtype):
            return shape, dtype

    def value(self, name: str) -> Any:
        """A single stored word or number by its name, None where the file has none of that name."""
        return self.read(name).item() if name in self.members else None

    def batches(self, batch_size: int, ours: slice = slice(None), num_images: int | None = None,
                ) -> Iterator[tuple[int, np.ndarray]]:
        """The images in batches, as pairs of the index of the first image and the images (n, H, W, 3).

        ours: the batches to give, as a slice of their indices. num_images: how many of the first images to read; None:
        all. The file is read once, from front to back. Raises UserError where the first batch is black.
        """
        total = len(self) if num_images is None else num_images
        ranges = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)][ours]
        for indices, images in zip(ranges, self.images(ranges), strict=True):
            if indices.start == 0 and images.max() <= 1:
                raise UserError(f"{self.path}: the first {len(indices)} images hold nothing above 1: pixels must "
                                "be 0 to 255, not 0 to 1")
            yield indices.start, images

    def images(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The images (n, H, W, 3) of each range of indices; the ranges must rise. Nothing else is kept in memory."""
        with self._array("arr_0") as (stream, shape, dtype):
            size, position = math.prod(shape[1:]), 0
            for indices in ranges:
                _skip(stream, (indices.start - position) * size)
                position = indices.stop
                yield _rows(stream, (len(indices), *shape[1:]), dtype)

    def first(self, count: int) -> np.ndarray:
        """The first images (at most `count`, H, W, 3), without reading the rest."""
        return next(self.images([range(min(count, len(self)))]))

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """The images at these indices, (n, H, W, 3), in the order given."""
        rising = sorted(set(indices))
        found = dict(zip(rising, self.images(range(index, index + 1) for index in rising), strict=True))
        return np.concatenate([found[index] for index in indices])

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels (N,), None where the file has none."""
        return self.read("arr_1") if "arr_1" in self.members else None

    def statistics(self, suffix: str = "") -> Statistics | None:
        """The stored statistics, as float64, None where there are none.

        suffix: "" for those of pooled features, mu and sigma, "_s" for those of spatial ones, mu_s and sigma_s. Raises
        UserError where they are incomplete, of other shapes or not finite.
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


def read_arrays(path: str | Path, names: Sequence[str], otherwise: str) -> list[np.ndarray | None]:
    """The arrays of these names in any .npz file, None for those that it does not have.

    Raises UserError, beginning with `otherwise`, where it is no such file, is damaged or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file.get(name) for name in names]
    except READ_ERRORS as error:
        raise UserError(f"{otherwise} ({error})") from None


def read_checked(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a small .npz file by name, every byte of which agrees with its checksum.

    Raises FileNotFoundError, or another of READ_ERRORS where the file is damaged or holds pickled objects.
    """
    with zipfile.ZipFile(path) as archive:          # reading a member to its end checks its checksum
        return {name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                for name in archive.namelist()}


def is_whole(path: Path, shape: tuple[int, int, int, int]) -> bool:
    """Whether a sample file holds images of that shape, and every byte of it agrees with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    found, _, dtype = _header(stream)
                    size = 0
                    while block := stream.read(BLOCK):
                        size += len(block)
                    if name == "arr_0.npy" and (found, dtype, size) != (shape, np.uint8, math.prod(shape)):
                        return False
    except READ_ERRORS:
        return False
    return True


def write_batch(path: str | Path, arrays: dict[str, np.ndarray], images: Iterable[np.ndarray] | None = None,
                shape: tuple[int, ...] = ()) -> None:
    """Writes a .npz of `arrays` and, as `arr_0`, of images (n, H, W, 3) that come in pieces, `shape` in all.

    The file appears whole or not at all; raises UserError where it cannot be written.
    """
    def save(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with _member(archive, name) as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
            if images is not None:
                _write_images(archive, images, shape)

    write(path, save)


def prepare_samples(chunks: Iterable[Chunk], shape: tuple[int, int, int, int], path: Path) -> Path:
    """Writes images and labels, chunk by chunk, to a temporary file beside `path`, checks it and returns it.

    shape: (N, H, W, 3) of all images together, uint8. A rename then makes it the sample file. Raises UserError, with no
    file left, where it cannot be written or reads back damaged.
    """
    labels: list[np.ndarray] = []

    def images() -> Iterator[np.ndarray]:
        for chunk, chunk_labels in chunks:
            yield chunk
            if chunk_labels is not None:
                labels.append(chunk_labels)

    def save(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_images(archive, images(), shape)
            if labels:
                with _member(archive, "arr_1") as stream:
                    np.lib.format.write_array(stream, np.concatenate(labels).astype("<i8"), allow_pickle=False)

    temporary = prepare(path, save, sync=True,
                        ending=f"the images are kept in {path.parent}: start the same command again to go on")
    if not is_whole(temporary, shape):
        temporary.unlink()
        raise UserError(f"{temporary}: reads back otherwise than it was written; the disk may be failing")
    return temporary


def _write_images(archive: zipfile.ZipFile, pieces: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    with _member(archive, "arr_0") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece, np.uint8).data)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new array of the archive, to be written; ZipInfo has a fixed date, so that the bytes depend on nothing else."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran order, and type of an array, from the header at the beginning of its file."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](stream)


def _rows(stream: io.BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next array of this shape; raises EOFError where the file ends too early."""
    data = bytearray(math.prod(shape) * dtype.itemsize)
    view, done = memoryview(data), 0
    while done < len(data):
        got = stream.readinto(view[done:])
        if not got:
            raise EOFError("it ends too early")
        done += got
    return np.frombuffer(data, dtype).reshape(shape)


def _skip(stream: io.BufferedIOBase, count: int) -> None:
    while count:
        got = len(stream.read(min(count, BLOCK)))
        if not got:
            raise EOFError("it ends too early")
        count -= got


def _shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
