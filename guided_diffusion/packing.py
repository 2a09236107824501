"""The file of samples: an uncompressed .npz of arr_0 (images) and, where there are labels, arr_1.

It is written, checked and read as a stream, in the memory of a few images, whatever its size.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from .errors import UserError
from .files import prepare

BLOCK = 2**22          # bytes read at a time
READ_ERRORS = (OSError, EOFError, ValueError, KeyError, SyntaxError, NotImplementedError, RuntimeError,
               zipfile.BadZipFile)


def pack(chunks: Iterable[tuple[np.ndarray, np.ndarray | None]], shape: tuple[int, int, int, int],
         path: Path) -> Path:
    """Writes images and labels, chunk by chunk, to a temporary file beside `path`, checks it and returns it.

    shape: (N, H, W, 3) of all images together, uint8. The same samples are the same bytes. Raises UserError, with no
    file left, where it cannot be written or reads back damaged.
    """
    def save(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            _write(archive, chunks, shape)

    temporary = prepare(path, save, sync=True,
                        ending=f"the images are kept in {path.parent}: start the same command again to go on")
    if not is_whole(temporary, shape):
        temporary.unlink()
        raise UserError(f"{temporary}: reads back otherwise than it was written; the disk may be failing")
    return temporary


def _write(archive: zipfile.ZipFile, chunks: Iterable[tuple[np.ndarray, np.ndarray | None]],
           shape: tuple[int, int, int, int]) -> None:
    labels: list[np.ndarray] = []
    with _member(archive, "arr_0", shape, "|u1") as stream:
        for images, chunk_labels in chunks:
            stream.write(np.ascontiguousarray(images).data)
            if chunk_labels is not None:
                labels.append(chunk_labels)
    if labels:
        with _member(archive, "arr_1", shape[:1], "<i8") as stream:
            stream.write(np.concatenate(labels).astype("<i8").data)


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> IO[bytes]:
    stream = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)      # ZipInfo has a fixed date
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream


def is_whole(path: Path, shape: tuple[int, int, int, int]) -> bool:
    """Whether a sample file holds images of that shape and every byte agrees with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    header = _header(stream)
                    size = sum(len(block) for block in iter(lambda stream=stream: stream.read(BLOCK), b""))
                    if name == "arr_0.npy" and (header != (shape, np.uint8) or size != math.prod(shape)):
                        return False
    except READ_ERRORS:
        return False
    return True


def unpack(path: Path, chunks: Iterable[range]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Images (n, H, W, 3) and labels (n,) of each chunk of image numbers, in rising order."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        labels = read_labels(path)
        shape, dtype = _header(stream)
        at = 0
        for numbers in chunks:
            _read(stream, numbers.start - at, shape, dtype)
            at = numbers.stop
            yield (_read(stream, len(numbers), shape, dtype),
                   None if labels is None else labels[numbers.start:numbers.stop])


def read_labels(path: Path) -> np.ndarray | None:
    """The labels (N,) of a sample file, None where it has none."""
    with np.load(path, allow_pickle=False) as file:
        return file.get("arr_1")


def first_images(path: str | Path, count: int) -> np.ndarray:
    """The first images (N, H, W, 3) of a sample file, without reading the rest."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        shape, dtype = _header(stream)
        return _read(stream, min(count, shape[0]), shape, dtype)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _read(stream: IO[bytes], count: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = stream.read(count * dtype.itemsize * int(np.prod(shape[1:])))
    return np.frombuffer(data, dtype).reshape(count, *shape[1:])
