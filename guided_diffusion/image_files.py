"""Pictures in files: which files of a folder are pictures, and what their pixels are.

The one reader of training, depth pairs, reference batches and evaluation. A picture is read as a viewer shows it, but
for colour profiles, which the official code leaves out, too:
    colours         are the values as stored; embedded profiles are not applied, and CMYK is converted without its own
    orientation     what EXIF says is applied
    16 bits         grey of 16 bits is scaled to 8, so that 65535 is white
    transparency    is laid on white
    animations      are their first picture
Files are opened as the formats of FORMATS only, whatever their names say.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from .cores import reading_threads
from .errors import UserError
from .files import reason
from .progress import progress_bar

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM", "TGA", "QOI")
IMAGE_SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".jp2",
    ".j2k", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"))
LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))     # what systems leave in folders; else names with a dot
BACKGROUND = (255, 255, 255)
MAX_RATIO = 100                 # of the sides of a picture
MAX_PACKED = 2**28              # bytes of one picture in an archive
DECODED_AT_START = 2**26        # bytes of files that are decoded before the first step, beside all headers
LEVELS_APART = 8                # of 255, which two profiles for the same colours may be
AT_ONCE = 1024                  # files that a thread checks at a time

Source = Path | IO[bytes]
Look = Callable[[Path, Image.Image], None]

_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339         # of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2
_KEYS: dict[str, Callable[[int], int]] = {       # of PNG, by how its pixels lie in the file
    "L;2": lambda level: level % 4 * 85, "L;4": lambda level: level % 16 * 17, "RGB;16B": lambda level: level >> 8}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


# Folders and archives


@dataclass
class FoundPictures:
    """The pictures of a folder or an archive, in sorted order, and how many files of other kinds lie there.

    left_out, examples: by kind, how many there are and the name of the first.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, kind: str, path: PurePath) -> None:
        """Counts a file that is no picture."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, path.name)

    def takes(self, path: PurePath) -> bool:
        """Whether a file of an archive is a picture, by its path there; counts one that is none as left out."""
        if is_litter(path):
            self.leave_out("hidden or system file(s)", path)
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            self.leave_out("file(s) that are no pictures", path)
        else:
            return True
        return False

    def __str__(self) -> str:
        """What was left out, in one line; "" where nothing was."""
        return ", ".join(f"{count} {kind} ({'first ' if count > 1 else ''}{self.examples[kind]})"
                         for kind, count in sorted(self.left_out.items()))

    def line(self, folder: Path) -> str:
        """What was left out of the folder, as a line of a log; "" where nothing was."""
        return f"{folder}: {len(self.files)} images; left out: {self}" if self.left_out else ""


class NamedBytes(io.BytesIO):
    """The bytes of a picture with the name that sentences give it."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


def is_litter(path: PurePath) -> bool:
    """Whether a file is hidden or what systems leave behind, or lies in a folder that is."""
    return any(part.startswith(".") or part.lower() in LITTER for part in path.parts)


def zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    r"""The files of a .zip with their names, in which some programs of Windows write \ in place of /."""
    for info in archive.infolist():
        name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")
        if not name.endswith("/"):
            yield name, info


def find_pictures(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> FoundPictures:
    """The pictures at any depth below a folder, also behind links; a link that leads back is left out.

    suffixes: of what counts as a picture, in lower case. Raises UserError where a folder cannot be read.
    """
    found = FoundPictures()
    _search(folder, (), suffixes, found)
    found.files.sort()
    return found


def _search(folder: Path, above: tuple[tuple[int, int], ...], suffixes: frozenset[str], found: FoundPictures) -> None:
    """Looks into one folder; above: device and inode of the folders that it lies in."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.leave_out("link(s) that lead back", folder)
        return
    for entry in entries:
        path = folder / entry.name
        if is_litter(PurePath(entry.name)):
            found.leave_out("hidden or system file(s)", path)
        elif _leads(entry.is_dir):
            _search(path, (*above, here), suffixes, found)
        elif path.suffix.lower() not in suffixes:
            found.leave_out("file(s) that are no pictures", path)
        elif _leads(entry.is_file):
            found.files.append(path)
        else:
            found.leave_out("broken link(s) or devices", path)


def _leads(test: Callable[[], bool]) -> bool:
    """What a test of an entry of a folder says; False for a link that cannot be followed, as one to itself."""
    try:
        return test()
    except OSError:
        return False


# Pictures


def read_image(path: Source, in_channels: int) -> Image.Image:
    """The picture in a file, RGB (3 channels) or grey (1), of 8 bits: upright, opaque, and in the stored colours.

    path: of the file, or an open stream, whose `str` sentences name. Raises UserError where the file holds none, is
    damaged, or its sides are absurd.
    """
    with opened(path) as image:
        _scale_key(image)
        return _opaque(_upright(image), "RGB" if in_channels == 3 else "L")


def read_depth_image(path: Path) -> np.ndarray:
    """A grey picture of 8 or 16 bits, (H, W), upright and with its values as they are; raises UserError for others."""
    with opened(path) as image:
        if image.mode not in ("L", "I", "I;16", "I;16B", "I;16L"):
            raise UserError(f"{path}: has colour mode {image.mode}, a depth map must be grey, of 8 or 16 bits")
        _check_mode(image)
        return np.asarray(_upright(image))


def image_extent(path: Path) -> tuple[int, int]:
    """Width and height of the picture in a file as a viewer shows it; raises UserError as `read_image`."""
    with opened(path) as image:
        width, height = image.size
        # Pillow turns TIFF by itself, and says so already in its size
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def opened(path: Source) -> Iterator[Image.Image]:
    """A file as Pillow opens it, whose pixels are not read yet.

    Raises UserError, also for what goes wrong in the block: damaged files make decoders fail in any way there is.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            _check_sides(path, image.size)
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        formats = ", ".join(_formats())
        raise UserError(f"{path}: cannot be read as an image (its content is none of the formats {formats})") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read as an image ({reason(error)})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_sides(path: Source, size: tuple[int, int]) -> None:
    if max(size) > MAX_RATIO * min(size):
        raise UserError(f"{path}: cannot be read as an image (it has {size[0]}x{size[1]} pixels, one side may be "
                        f"{MAX_RATIO} times the other at most)")


def _scale_key(image: Any) -> None:
    """Scales the transparent colour of a PNG to 8 bits, as Pillow scales the pixels when they are read."""
    scale = _KEYS.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    key = image.info.get("transparency")
    if scale and key is not None:
        image.info["transparency"] = tuple(map(scale, key)) if isinstance(key, tuple) else scale(key)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:          # damaged EXIF says nothing, and the picture may be whole
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _check_mode(image: Image.Image) -> None:
    """Raises ValueError for pixels that are no colours, as far as the header tells."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which none is known to be white")
    if image.mode == "LAB":
        raise ValueError("its colours are of the mode LAB, save it as RGB")
    if image.format == "TIFF":
        _check_tiff(image)


def _check_tiff(image: Any) -> None:
    """Raises ValueError for levels of which Pillow's mode tells neither depth nor sign nor direction."""
    bits, kinds = (_values(image.tag_v2.get(tag, 1)) for tag in (_BITS, _SAMPLE_FORMAT))
    if bits - {1, 2, 4, 8, 16}:
        raise ValueError(f"its levels have {', '.join(map(str, sorted(bits)))} bits, save it with 8 or 16")
    if _SIGNED in kinds:
        raise ValueError("its levels have a sign, save it without")
    if 16 in bits and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ValueError("its level 0 is white, save it with black as 0")


def _values(tag: Any) -> set[int]:
    """Those of a tag, which holds one number, or one for each channel."""
    return set(tag) if isinstance(tag, tuple) else {tag}


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """The picture in 8 bits, RGB or L, on the background."""
    _check_mode(image)
    if image.mode.startswith("I"):
        image = _scaled(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image).convert("RGB")
    return image.convert(mode)


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 8 bits of one of 16."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its grey levels are {values.min()} to {values.max()}, and 16 bits are 0 to 65535")
    grey = (values * 255 + 32767) // 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = BACKGROUND[0]
    return Image.fromarray(grey.astype(np.uint8))


# Checks


def damage(path: Path, decode: bool = True, look: Look | None = None) -> str:
    """Why a file cannot be read as a picture, "" where it can.

    decode: read all of it; else its header. JPEG is decoded at an eighth of its size, which shows the same damage.
    look: is called with the path and the picture once its header is read.
    """
    try:
        with opened(path) as image:
            _check_mode(image)
            if look is not None:
                look(path, image)
            if decode:
                image.draft("L", (1, 1))
                image.load()
                if image.mode.startswith("I"):
                    _scaled(image)
    except UserError as error:
        return str(error)
    return ""


def count_decoded(files: Sequence[Path]) -> int:
    """How many of the first files have DECODED_AT_START bytes together: few enough to decode before the work."""
    return len(list(itertools.takewhile(lambda total: total <= DECODED_AT_START,
                                        itertools.accumulate(map(_size, files)))))


def damaged_pictures(files: Sequence[Path], decoded: int, look: Look | None = None) -> dict[int, str]:
    """The damaged ones among files: what is wrong by index; of those from index `decoded` on, by their headers.

    look: as in `damage`, from several threads.
    """
    found: dict[int, str] = {}
    pieces = [range(start, min(start + AT_ONCE, len(files))) for start in range(0, len(files), AT_ONCE)]
    with (reading_threads() as pool,
          progress_bar(len(files), "checking images", "image", enabled=len(pieces) > 1) as progress):
        for piece, damages in zip(pieces, pool.map(
                lambda piece: [damage(files[index], index < decoded, look) for index in piece], pieces), strict=True):
            found |= {index: words for index, words in zip(piece, damages, strict=True) if words}
            progress.update(len(piece))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class OtherColours:
    """Counts pictures whose embedded colour profile, which is not applied, would show other colours than sRGB."""

    def __init__(self) -> None:
        self._files: list[Path] = []

    def look(self, path: Path, image: Image.Image) -> None:
        """Counts a picture of which the header is read, where it is one of those; from any thread."""
        profile = image.info.get("icc_profile")
        if isinstance(profile, bytes) and _changes_colours(profile, image.mode):
            self._files.append(path)

    def line(self, folder: object) -> str:
        """How many there are in the folder, as a line of a log; "" where there is none."""
        if not self._files:
            return ""
        return (f"{folder}: {len(self._files)} image(s) have a colour profile other than sRGB, which is not applied "
                f"(first {min(self._files).name})")


class Resized:
    """Which pictures are enlarged, and which are reduced, so that their smaller side has `size` pixels."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._smaller: set[PurePath] = set()
        self._larger: set[PurePath] = set()

    def look(self, path: PurePath, image: Image.Image) -> None:
        """Notes a picture of which the header is read, where it is one of those; from any thread."""
        side = min(image.size)
        if side != self.size:
            (self._smaller if side < self.size else self._larger).add(path)

    def line(self, where: object, reduced: bool = False) -> str:
        """How many are enlarged there, as a line of a log, and with `reduced` also of those; "" where there is none."""
        kinds = [("enlarged", self._smaller), *([("reduced", self._larger)] if reduced else [])]
        said = [f"{len(names)} image(s) are {done} to {self.size} pixels (first {min(names).name})"
                for done, names in kinds if names]
        return f"{where}: {', '.join(said)}" if said else ""


@functools.lru_cache(maxsize=64)
def _changes_colours(profile: bytes, mode: str) -> bool:
    """Whether a profile shows colours of a mode otherwise than sRGB does, by more than LEVELS_APART.

    Not so where it cannot be read or is of other modes: viewers leave it out as well.
    """
    if mode == "CMYK":
        return True
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
    colours = Image.fromarray(grid[..., 0] if mode[0] in "LI" else grid)
    try:
        from PIL import ImageCms

        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        shown = ImageCms.profileToProfile(colours, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:          # of whatever kind; Pillow may also be built without what reads profiles
        return False
    apart = np.asarray(shown).astype(int) - np.asarray(colours.convert("RGB"))
    return bool(np.abs(apart).max() > LEVELS_APART)


class BackgroundCheck:
    """Decodes files in a thread, in their order, as long as the block lasts; `found` says which are damaged, and why.

    A daemon, so that it never keeps a process from ending.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.found: list[str] = []
        self._files, self._ended = files, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        for path in self._files:
            if self._ended.is_set():
                return
            if words := damage(path):
                self.found.append(words)


def damaged_error(found: Iterable[str], advise: bool = True) -> UserError:
    """What ends a command whose pictures are damaged, from what `damage` said of each.

    advise: name the option that leaves them out, which the command must have.
    """
    first, *others = found
    more = f", and {len(others)} more are damaged" if others else ""
    advice = ", or leave it out with --skip_damaged True" if advise else ""
    return UserError(f"{first}{more}; mend or remove what is damaged{advice}")
