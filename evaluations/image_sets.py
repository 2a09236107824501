"""What is evaluated: files of samples, single arrays, folders and archives of pictures, and folders of sampling runs.

Each is opened as a `BatchFile`, and read as a stream: a few images in memory, whatever the size.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.cores import reading_threads
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import is_address, sha256_of
from guided_diffusion.foreign import reading
from guided_diffusion.image_datasets import say_left_out
from guided_diffusion.image_files import (
    IMAGE_SUFFIXES,
    MAX_PACKED,
    FoundPictures,
    NamedBytes,
    find_pictures,
    read_image,
    zip_members,
)
from guided_diffusion.npz import ENCRYPTED, MAX_SIDE, BatchFile, checked_image_shape, printable, read_npy
from guided_diffusion.runs.record import samples_of
from guided_diffusion.runs.shards import PICTURE
from guided_diffusion.runs.status import unfinished_images

SAMPLES = "samples_*.npz"           # the file of a sampling run in its folder
NUMPY, ZIP = b"\x93NUMPY", b"PK"    # how such files begin

_log = logging.getLogger(__name__)


def open_images(word: str | Path) -> BatchFile:
    """Opens what `word` names as a set of images.

    It may be an .npz in the official layout, an .npy of images (N, H, W, 3) uint8, a folder of pictures at any depth,
    a .zip of pictures, or the output folder of a sampling run, whose file of samples is taken: of several, as a run
    that was extended leaves them, the one that its run.json names. Raises UserError for anything else, and as
    `BatchFile`.
    """
    if not str(word):
        raise UserError("the name of a file or folder of images is empty")
    if is_address(word):
        raise UserError(f"{word}: is an address; fetch the file first, and name it where it then lies")
    path = Path(word)
    with reading(path, "cannot be read"):
        if path.is_dir():
            return _open_folder(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is neither a file nor a folder")
        start = _beginning(path) if path.is_file() else b""
    suffix = path.suffix.lower()
    named_array = suffix == ".npy" and path.exists() and not start.startswith(ZIP)
    if named_array or (start.startswith(NUMPY) and suffix != ".npz"):
        return SingleArray(path)
    if start.startswith(ZIP) and suffix != ".npz":
        with reading(path, "is not a .zip of pictures"), zipfile.ZipFile(path) as archive:
            arrays = any(name.endswith(".npy") for name in archive.namelist())
        return BatchFile(path) if arrays else Pictures(path, _packed_pictures(path))
    return BatchFile(path)


def check_named_once(words: Sequence[str]) -> None:
    """Raises UserError where a word stands for two rows, which would be one."""
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: is named more than once, and each row is called by its file")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(NUMPY))


def _open_folder(folder: Path) -> BatchFile:
    samples = sorted(folder.glob(SAMPLES))
    if samples:
        taken = samples[0] if len(samples) == 1 else _recorded(folder, samples)
        if dist_util.is_main():
            _say_taken(folder, taken, samples)
        return BatchFile(taken)
    found = find_pictures(folder)
    if not found.files:
        raise UserError(f"{folder}: the folder holds neither pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) nor the "
                        f"{SAMPLES} of a finished sampling run")
    say_left_out(found, folder)
    return Pictures(folder, [_LoosePicture(path, folder) for path in found.files])


def _recorded(folder: Path, samples: Sequence[Path]) -> Path:
    """That one of several files of samples which the folder's run.json names; UserError where it names none."""
    try:
        taken = samples_of(folder)
    except UserError:
        taken = None
    if taken is None or taken not in samples:
        raise UserError(f"{folder}: holds several files of samples, name one of them: "
                        f"{', '.join(path.name for path in samples[:10])}")
    return taken


def _say_taken(folder: Path, taken: Path, samples: Sequence[Path]) -> None:
    """Logs which file of a folder is taken, where it holds other images as well, or a run there makes more."""
    left = [path.name for path in samples if path != taken]
    named = ", which its run.json names," * bool(left)
    with contextlib.suppress(UserError):            # a folder beside it that may not be read is none of its business
        count = sum(path != folder / PICTURE for path in find_pictures(folder).files)
        left += [f"{count} picture{'s' * (count > 1)}"] if count else []
    begun = unfinished_images(folder)
    if left or begun:
        leaves = f"{named} and leaves {', '.join(left)}" if left else ""
        under_way = f"; a run of {begun} images there is not finished" if begun else ""
        _log.info("%s: takes %s%s%s", folder, taken.name, leaves, under_way)


class SingleArray(BatchFile):
    """An .npy file of images (N, H, W, 3) uint8, mapped."""

    def __init__(self, path: Path) -> None:
        self.path, self.members, self._statistics, self._before = path, {}, {}, self._stamps([path])
        self._array_of_images = read_npy(path)
        self.shape = checked_image_shape(f"{path}: the array", self._array_of_images.shape,
                                         self._array_of_images.dtype)

    def images(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The images (n, H, W, 3) of each range of indices."""
        for indices in ranges:
            yield np.array(self._array_of_images[indices.start:indices.stop], order="C")


class Picture(Protocol):
    """A picture that has not been read yet."""

    @property
    def name(self) -> str:
        """Its name within the set."""

    @property
    def file(self) -> Path:
        """The file that it lies in."""

    def pixels(self) -> np.ndarray:
        """The picture, read as all are (`image_files`), (H, W, 3) uint8; raises UserError where it cannot be read."""

    def digest(self) -> str:
        """What changes when its file does."""


class _LoosePicture:
    """A picture in a file of its own."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.file, self.name = path, str(path.relative_to(folder))

    def pixels(self) -> np.ndarray:
        return np.asarray(read_image(self.file, 3))

    def digest(self) -> str:
        with reading(self.file, "cannot be read"):
            return sha256_of(self.file)


class _PackedPicture:
    """A picture in an archive."""

    def __init__(self, file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
        self.file, self._archive, self._info, self.name = file, archive, info, name

    def pixels(self) -> np.ndarray:
        where = f"{self.file}: {printable(self.name)}"
        if self._info.flag_bits & ENCRYPTED:
            raise UserError(f"{where}: is encrypted")
        if self._info.file_size > MAX_PACKED:
            raise UserError(f"{where}: unpacks to {self._info.file_size} bytes, more than {MAX_PACKED}")
        with reading(where, "cannot be read"):
            return np.asarray(read_image(NamedBytes(where, self._archive.read(self._info)), 3))

    def digest(self) -> str:
        return f"{self._info.CRC:08x} {self._info.file_size}"


def _packed_pictures(path: Path) -> list[Picture]:
    """The pictures in a .zip, in the order in which a folder has them; UserError where there is none.

    What else lies there is left out, which is said.
    """
    found = FoundPictures()
    with reading(path, "is not a .zip of pictures"):
        archive = zipfile.ZipFile(path)
        members = [(Path(name), info) for name, info in zip_members(archive) if found.takes(Path(name))]
    if not members:
        held = ", ".join(printable(info.filename) for info in archive.infolist()[:10]) or "nothing"
        raise UserError(f"{path}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), but {held}")
    members.sort(key=lambda member: member[0])
    found.files = [name for name, _ in members]
    say_left_out(found, path)
    return [_PackedPicture(path, archive, info, str(name)) for name, info in members]


class Pictures(BatchFile):
    """Pictures of one size in the order of their names. Each is decoded when it is asked for, by a few threads."""

    def __init__(self, path: Path, pictures: Sequence[Picture]) -> None:
        self.path, self.members, self._statistics = path, {}, {}
        self._before = self._stamps(picture.file for picture in pictures)
        self._pictures = pictures
        first = pictures[0].pixels()
        self.shape = (len(pictures), *first.shape[:2], 3)
        if max(first.shape) > MAX_SIDE:
            raise UserError(f"{path}: {pictures[0].name} is {self.resolution}: images may have {MAX_SIDE} pixels a "
                            "side at most")

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the names and contents of the pictures, hexadecimal; of an archive, that of its file."""
        with reading(self.path, "cannot be read"):
            if self.path.is_file():
                return sha256_of(self.path)
        digest = hashlib.sha256()
        for picture in self._pictures:
            digest.update(f"{picture.name}\0{picture.digest()}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def images(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The images (n, H, W, 3) of each range of indices."""
        with reading_threads() as pool:
            for indices in ranges:
                yield np.stack(list(pool.map(self._pixels, indices)))

    def _pixels(self, index: int) -> np.ndarray:
        picture = self._pictures[index]
        pixels = picture.pixels()
        if pixels.shape != self.shape[1:]:
            raise UserError(f"{self.path}: {picture.name} is {pixels.shape[1]}x{pixels.shape[0]}, the first picture "
                            f"{self.resolution}: they must have one size")
        return pixels
