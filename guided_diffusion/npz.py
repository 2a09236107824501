"""Sample files and reference batches (.npz), read and written as a stream: a few images in memory, whatever the size.

The format is that of guided-diffusion: `arr_0` holds images (N, H, W, 3) uint8, and `arr_1` their labels (N,) int64, if
they have any; `class_names` (K,) are the names of the classes, where they are known. A reference batch may also hold
the statistics `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial features) of a larger set of images.
Written files are not compressed; the same arrays give the same bytes.
"""

from __future__ import annotations

import math
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from .errors import UserError
from .fetch import sha256_of
from .files import prepare, stamp, write
from .foreign import reading

MAX_SIDE = 8192
MAX_RATIO = 200                 # of a member's size to its compressed size; images hardly reach 20
MAX_DEFLATE = 1040              # that ratio as deflate can reach it at most, rounded up
SMALL = 2**30                   # members up to this many bytes may be compressed better than MAX_RATIO
BLOCK = 2**22                   # bytes read at a time where nothing else says how many
ENCRYPTED = 1                   # bit of a member's flags
LISTED = 10                     # arrays that a sentence names
RANGE_KEY = "depth_range"       # in files of depth images, and in metadata of what was trained on them
_RANGE = re.compile(r"image|[-+.\deE]+,[-+.\deE]+")

# A damaged .npz file makes zipfile, zlib, tokenize and NumPy raise nearly anything.
READ_ERRORS: tuple[type[Exception], ...] = (Exception,)

Chunk = tuple[np.ndarray, np.ndarray | None]          # images (n, H, W, 3) uint8, and labels (n,) int64 or None


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features."""

    mean: np.ndarray
    covariance: np.ndarray


class ArrayFile:
    """The arrays of an .npz file, each read when it is asked for, in parts where that is wished.

    Opening reads the list of arrays only, and raises UserError, naming the file, where it is no .npz, or where the
    archive would unpack to far more than images can. Whatever is wrong further in is a UserError when it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with reading(path, "cannot be read"):
            _check_is_file(self.path)
            size = self.path.stat().st_size
        with self._opened("is not an .npz file") as archive:
            self.members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name, info in self.members.items():
            self._check_sizes(name, info, size)

    def _check_sizes(self, name: str, info: zipfile.ZipInfo, available: int) -> None:
        """Raises UserError where a member claims more bytes than the archive has, or unpacks to too many."""
        if info.compress_size > available or (info.compress_type == zipfile.ZIP_STORED
                                              and info.file_size > info.compress_size):
            raise UserError(f"{self.path}: {printable(name)} is damaged (the archive is shorter than its list says)")
        packed = max(1, info.compress_size)
        if info.file_size > MAX_DEFLATE * packed or (info.file_size > SMALL and info.file_size > MAX_RATIO * packed):
            raise UserError(f"{self.path}: {printable(name)} unpacks {info.compress_size} bytes to {info.file_size}, "
                            "which no images do")

    @contextmanager
    def _opened(self, otherwise: str) -> Iterator[zipfile.ZipFile]:
        with reading(self.path, otherwise), zipfile.ZipFile(self.path) as archive:
            yield archive

    @contextmanager
    def _array(self, name: str, fortran: bool = False) -> Iterator[tuple[IO[bytes], _Header]]:
        """The bytes of an array after its header, and the header. fortran: an array in Fortran order is welcome."""
        where = f"{self.path}: {printable(name)}"
        with self._opened(f"{printable(name)} is damaged") as archive:
            info = self.members[name]
            if info.flag_bits & ENCRYPTED:
                raise UserError(f"{where} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{where} is compressed by method {info.compress_type}, it must be stored or deflated, "
                                "as NumPy does")
            with archive.open(info) as stream:
                header = _read_header(stream)
                if header.dtype.hasobject or (header.fortran and not fortran):
                    kind = "holds pickled objects" if header.dtype.hasobject else "is in Fortran order"
                    raise UserError(f"{where} {kind}, it must be a plain array in C order")
                if header.size > info.file_size:
                    raise ValueError("shorter than its header says")
                yield stream, header

    def read(self, name: str) -> np.ndarray:
        """A whole array by its name, for statistics: images are read in parts."""
        with self._array(name, fortran=True) as (stream, header):
            array = _rows(stream, header.shape[::-1] if header.fortran else header.shape, header.dtype)
            if stream.read(1):                  # reading to the end also checks the checksum
                raise ValueError("longer than its header says")
            return array.T if header.fortran else array

    def pieces(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array (N, ...) by its name, from front to back, `size` rows at a time."""
        with self._array(name) as (stream, header):
            for start in range(0, header.shape[0], size):
                yield _rows(stream, (min(size, header.shape[0] - start), *header.shape[1:]), header.dtype)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array."""
        with self._array(name) as (_, header):
            return header.shape, header.dtype

    def value(self, name: str, kind: type = object) -> Any:
        """A single stored word or number by its name, None where the file has none of that name.

        kind: str or int. Raises UserError where the array holds anything else.
        """
        if name not in self.members:
            return None
        array = self.read(name)
        if array.size != 1 or not isinstance(array.item(), kind):
            expected = {str: "word", int: "whole number"}.get(kind, "value")
            raise UserError(f"{self.path}: {name} must be a single {expected}")
        return array.item()


class BatchFile(ArrayFile):
    """A sample file or a reference batch.

    Opening reads headers only, and raises UserError, naming the file, where it is no .npz, where `arr_0` holds
    anything but (N, H, W, channels) uint8, where an array is pickled, or where the archive would unpack to far more
    than images can. Damage further in shows when it is read.
    """

    def __init__(self, path: str | Path, channels: int = 3) -> None:
        self._before = self._stamps([Path(path)])
        super().__init__(path)
        self._statistics: dict[str, Statistics | None] = {}
        self.shape = (0, 0, 0, channels)
        if "arr_0" in self.members:
            self.shape = checked_image_shape(f"{self.path}: arr_0", *self.header("arr_0"), channels)

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
        with reading(self.path, "cannot be read"):
            return sha256_of(self.path)

    @staticmethod
    def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int, int] | None]:
        return {file: stamp(file) for file in files}

    def check_unchanged(self) -> None:
        """Raises UserError where a file of the set was replaced or written since the set was opened.

        What was read meanwhile may then be of neither version, and `sha256` of another one.
        """
        for file, now in self._stamps(self._before).items():
            if now != self._before[file]:
                raise UserError(f"{file}: was changed while it was read; start the command again")

    @property
    def array_names(self) -> str:
        """The arrays that there are, in words."""
        more = f" and {len(self.members) - LISTED} others" if len(self.members) > LISTED else ""
        return (", ".join(printable(name) for name in list(self.members)[:LISTED]) or "none") + more

    @property
    def without_images(self) -> str:
        """A sentence for a file in which there is no arr_0: it names the arrays that there are."""
        return f"{self.path}: has no images, arr_0 must be (N, H, W, 3) uint8; its arrays are: {self.array_names}"

    def batches(self, batch_size: int, ours: slice = slice(None), num_images: int | None = None,
                ) -> Iterator[tuple[int, np.ndarray]]:
        """The images in batches, as pairs of the index of the first image and the images (n, H, W, 3).

        ours: the batches to give, as a slice of their indices. num_images: how many of the first images to read; None:
        all. The file is read once, from front to back; where the first batch holds nothing above 1, all images are
        looked at first. Raises UserError where none of them does.
        """
        total = len(self) if num_images is None else num_images
        ranges = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)][ours]
        for indices, images in zip(ranges, self.images(ranges), strict=True):
            if indices.start == 0 and images.max() <= 1:
                self._check_brightness()
            yield indices.start, images

    def _check_brightness(self) -> None:
        """Raises UserError where no pixel of the whole file is above 1."""
        step = max(1, BLOCK // math.prod(self.shape[1:]))
        ranges = (range(start, min(start + step, len(self))) for start in range(0, len(self), step))
        if all(images.max() <= 1 for images in self.images(ranges)):
            raise _dark(str(self.path), f"{len(self)}")

    def images(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The images (n, H, W, 3) of each range of indices; the ranges must rise. Nothing else is kept in memory."""
        with self._array("arr_0") as (stream, header):
            size, position = math.prod(header.shape[1:]), 0
            for indices in ranges:
                _skip(stream, (indices.start - position) * size)
                position = indices.stop
                yield _rows(stream, (len(indices), *header.shape[1:]), header.dtype)

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


def checked_image_shape(where: str, shape: tuple[int, ...], dtype: np.dtype, channels: int = 3,
                        ) -> tuple[int, int, int, int]:
    """The shape of images (N, H, W, channels), uint8; UserError, which begins with `where`, for anything else."""
    where = f"{where} is {_shown(shape)} {dtype}"
    if dtype != np.uint8:
        hint = " from 0 to 255, also where they were 0 to 1" if dtype.kind == "f" else ""
        raise UserError(f"{where}: images must be uint8{hint}")
    if len(shape) != 4 or shape[3] != channels or min(shape) < 1:
        raise UserError(f"{where}: images must be (N, H, W, {channels}),{' RGB,' * (channels == 3)} at least one")
    if max(shape[1:3]) > MAX_SIDE:
        raise UserError(f"{where}: images may have {MAX_SIDE} pixels a side at most")
    count, height, width, _ = shape
    return count, height, width, channels


def check_brightness(where: str, images: np.ndarray) -> None:
    """Raises UserError, which begins with `where`, for images (N, ...) uint8 of which no pixel is above 1."""
    if images.max() <= 1:
        raise _dark(where, f"{len(images)}")


def check_brightest(where: str, count: str, brightest: int) -> None:
    """Raises UserError, which begins with `where`, for pictures in files whose brightest pixel is 1; 0 is black.

    count: of those that were looked at, like "9" or "first 9".
    """
    if brightest == 1:
        raise _dark(where, count)


def _dark(where: str, count: str) -> UserError:
    return UserError(f"{where}: its {count} images hold nothing above 1: pixels must be 0 to 255, not 0 to 1")


def read_arrays(path: str | Path, names: Sequence[str], otherwise: str) -> list[np.ndarray | None]:
    """The arrays of these names in any .npz file, None for those that it does not have.

    Raises UserError, beginning with `otherwise`, where it is no such file, is damaged or holds pickled objects.
    """
    try:
        file = ArrayFile(path)
        return [file.read(name) if name in file.members else None for name in names]
    except UserError as error:
        raise UserError(f"{otherwise} ({str(error).removeprefix(f'{path}: ')})") from None


def is_npz(path: str | os.PathLike) -> bool:
    """Whether the name says that a file holds NumPy arrays."""
    return Path(path).suffix.lower() == ".npz"


def stored_range(data: str) -> str:
    """The range that a file of depth images states, in the words of `--depth_range`; "" for any other data.

    An array of that name which is something else is that of other data, too.
    """
    if not is_npz(data) or not Path(data).is_file():
        return ""
    with suppress(UserError):
        if _RANGE.fullmatch(stated := ArrayFile(data).value(RANGE_KEY, str) or ""):
            return stated
    return ""


def read_npy(path: str | Path, otherwise: str = "is no .npy file that can be used", *, flag: str = "") -> np.ndarray:
    """The array of an .npy file, mapped, so that only what is looked at is read.

    flag: the option that named the file, with its dashes. Raises UserError where the file cannot be read, and, with
    the words `otherwise`, where it is no such file, is damaged or holds pickled objects.
    """
    with reading(path, "cannot be read", flag=flag):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise OSError("it is a folder" if Path(path).is_dir() else "it is no regular file")
        with Path(path).open("rb"):
            pass
    with reading(path, otherwise, flag=flag), Path(path).open("rb") as stream:
        header, start = _read_header(stream), stream.tell()
        if header.dtype.hasobject:
            raise ValueError("it holds pickled objects")
        if start + header.size > os.fstat(stream.fileno()).st_size:
            raise ValueError("it is shorter than its header says")
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        if not header.size:
            return np.empty(header.shape, header.dtype, order)
        return np.memmap(stream, header.dtype, "r", start, header.shape, order)


def read_checked(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a small .npz file by name, every byte of which agrees with its checksum.

    Raises FileNotFoundError, or another of READ_ERRORS where the file is damaged or holds pickled objects.
    """
    path.stat()                                     # raises FileNotFoundError
    file = ArrayFile(path)
    return {name: file.read(name) for name in file.members}


def is_whole(path: Path, shape: tuple[int, int, int, int]) -> bool:
    """Whether a sample file holds images of that shape, and every byte of it agrees with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    header = _read_header(stream)
                    size = 0
                    while block := stream.read(BLOCK):
                        size += len(block)
                    if name == "arr_0.npy" and (header.shape, header.dtype, size) != (shape, np.uint8,
                                                                                      math.prod(shape)):
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
                _write_array(archive, name, array)
            if images is not None:
                _write_images(archive, images, shape)

    write(path, save)


def prepare_samples(chunks: Iterable[Chunk], shape: tuple[int, int, int, int], path: Path,
                    beside: Mapping[str, np.ndarray] | None = None) -> Path:
    """Writes images and labels, chunk by chunk, to a temporary file beside `path`, checks it and returns it.

    shape: (N, H, W, 3) of all images together, uint8. beside: further arrays by name. A rename then makes it the sample
    file. Raises UserError, with no file left, where it cannot be written or reads back damaged.
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
                _write_array(archive, "arr_1", np.concatenate(labels).astype("<i8"))
            for name, array in (beside or {}).items():
                _write_array(archive, name, array)

    temporary = prepare(path, save, sync=True,
                        ending=f"the images are kept in {path.parent}: start the same command again to go on")
    if not is_whole(temporary, shape):
        temporary.unlink()
        raise UserError(f"{temporary}: reads back otherwise than it was written; the disk may be failing")
    return temporary


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _member(archive, name) as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


def _write_images(archive: zipfile.ZipFile, pieces: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    with _member(archive, "arr_0") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece, np.uint8).data)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new array of the archive, to be written; ZipInfo has a fixed date, so that the bytes depend on nothing else."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where a file is expected")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")


class _Header(NamedTuple):
    """What the beginning of an array's file says of it."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(stream: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version[0]}.{version[1]} of its format is unknown")
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    header = _Header(*read(stream))
    if any(side < 0 for side in header.shape) or not header.dtype.itemsize:
        raise ValueError(f"there is no array of shape {_shown(header.shape)[:60]} and type {str(header.dtype)[:60]}")
    return header


def _rows(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next array of this shape; raises EOFError where the file ends too early."""
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)        # takes memory only as it is filled
    view, done = data.data, 0
    while done < len(data):
        got = stream.readinto(view[done:done + BLOCK])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("it ends too early")
        done += got
    return data.view(dtype).reshape(shape)


def printable(name: str) -> str:
    """A name from an archive as a sentence can bear it."""
    return "".join(char if char.isprintable() else "?" for char in name[:60])


def _skip(stream: IO[bytes], count: int) -> None:
    while count:
        got = len(stream.read(min(count, BLOCK)))
        if not got:
            raise EOFError("it ends too early")
        count -= got


def _shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
