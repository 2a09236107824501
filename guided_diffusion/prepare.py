"""Image data of one size from what data sets come as: folders, .zip and .tar files, and LSUN's lmdb databases.

The result is an image folder, OUT/CLASS/NAME.png, or one .npz file with arr_0 (images), arr_1 (classes) and
class_names. Beside it lies a manifest, which names the source of every image. An image folder goes on where it was
stopped: files that are there already are kept, and refused where the data gives others now.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, NoReturn, Self

import numpy as np
from PIL import Image

from .classes import MANIFEST, natural_order
from .cores import reading_threads
from .errors import UserError, resumable
from .fetch import sha256_of
from .files import (
    LOCK,
    check_folder,
    check_writable,
    lies_in,
    only_job,
    open_own,
    reason,
    remove_leftovers,
    write_json,
    write_text,
)
from .foreign import read_json, reading
from .image_datasets import crop_square, resize_smaller_side
from .image_files import (
    MAX_PACKED,
    FoundPictures,
    NamedBytes,
    Resized,
    find_pictures,
    is_litter,
    read_image,
    zip_members,
)
from .npz import is_npz, write_batch
from .options import Options, option, required
from .pictures import save
from .progress import progress_bar

CROPS = ("adm", "box")
LABELS = ("folders", "prefix", "none")
AHEAD = 64              # pictures that are read before they are needed
RECORD = "sources.jsonl"        # rows of the manifest, each written before its image, until the manifest has them all
SETTINGS = ("image_size", "crop", "labels", "labels_file", "name")      # what the files of an image folder depend on
DEEPEST = 3             # archives within archives: ImageNet's training images are a .tar of .tar files
TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVE_SUFFIX = re.compile(r"\.(zip|tar|tar\.gz|tgz)$", re.IGNORECASE)
BOXES = re.compile(r"( \d+){4}( .*)?$")          # four numbers, and those of further objects


@dataclass(frozen=True)
class PrepareOptions(Options):
    """The images."""

    out: str = required("where to write: a folder, or a file that ends in .npz")
    image_size: int = option(256, "height and width in pixels", minimum=1, maximum=2**14)
    crop: str = option("adm", "how the centre is cut: adm, as the official training does it (halved, then bicubic); "
                       "box, as the official LSUN conversion does it (averaged)", choices=CROPS)
    labels: str = option("none", "how classes are told: folders (the one that a file lies in, or the archive within an "
                         "archive), prefix (of the file name, before the first _) or none", choices=LABELS)
    labels_file: str = option("", "text file of classes in place of --labels: a line NAME,CLASS for each image, or a "
                              "line CLASS for each in the order of their names")
    num_images: int = option(0, "only the first so many images; 0: all", minimum=0)
    name: str = option("", "name of the files: NAME_0000000.png and so on; unset: those that they have")
    skip_damaged: bool = option(False, "leave damaged images out, instead of ending with an error")


class Source(NamedTuple):
    """A picture that is not read yet. name: its path in the data. content: opens it."""

    name: str
    content: Callable[[], IO[bytes]]


class Member(NamedTuple):
    """A file of an archive. size: in bytes, unpacked. read: gives its content."""

    name: str
    size: int
    read: Callable[[], bytes]


# What there is


def sources(path: Path, found: FoundPictures) -> Iterator[Source]:
    """The pictures of a folder, a .zip or .tar file, or an lmdb database, in their order there; folders by name.

    found: counts what is left out. Raises UserError where there is no such thing, or where it cannot be read.
    """
    if (path / "data.mdb").is_file():
        yield from _lmdb(path)
    elif path.is_dir():
        there = find_pictures(path)
        found.left_out, found.examples = there.left_out, there.examples
        for file in there.files:
            yield Source(file.relative_to(path).as_posix(), partial(_read_file, file))
    elif not path.is_file():
        raise UserError(f"{path}: there is no such folder or file")
    else:
        with path.open("rb") as stream:
            yield from _archive(str(path), "", stream, 1, found)


def _read_file(file: Path) -> NamedBytes:
    return NamedBytes(str(file), file.read_bytes())


def _archive(where: str, inside: str, stream: IO[bytes], depth: int, found: FoundPictures) -> Iterator[Source]:
    """The pictures of an archive; inside: the folder that its name stands for, "" for the outermost."""
    if depth > DEEPEST:
        raise UserError(f"{where}: archives lie in archives {DEEPEST} deep at most")
    if where.lower().endswith(".zip"):
        with reading(where, "is no .zip file, or is damaged"), zipfile.ZipFile(stream) as archive:
            yield from _members(where, inside, _zipped(archive), depth, found)
    elif where.lower().endswith(TARS):
        with (reading(where, "is no .tar file, or is damaged"),
              tarfile.open(fileobj=stream, mode="r|*", tarinfo=WholeInfo) as tar):
            yield from _members(where, inside, (
                Member(info.name, info.size, partial(_extracted, tar, info)) for info in _files(tar, found)), depth,
                found)
    else:
        raise UserError(f"{where}: must be a folder, a .zip, .tar, .tar.gz or .tgz file, or an lmdb database")


def _zipped(archive: zipfile.ZipFile) -> list[Member]:
    return [Member(name, info.file_size, partial(archive.read, info)) for name, info in zip_members(archive)]


def _names_ahead(path: Path) -> list[str]:
    """The names of all pictures where these show before any is read, as in a folder and in a .zip file; else none."""
    if path.is_dir():
        return [] if (path / "data.mdb").is_file() else [source.name for source in sources(path, FoundPictures())]
    if not path.name.lower().endswith(".zip"):
        return []
    with reading(path, "is no .zip file, or is damaged"), zipfile.ZipFile(path) as archive:
        names = [member.name for member in _zipped(archive)]
    if any(name.lower().endswith((".zip", *TARS)) for name in names):
        return []
    unread = (Member(name, 0, bytes) for name in names)
    return [source.name for source in _members(str(path), "", unread, 1, FoundPictures())]


class WholeInfo(tarfile.TarInfo):
    """A header of a .tar file; one that is damaged or missing is an error, not the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block; a block of zeros is the end."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):
                raise
            raise tarfile.ReadError(f"{error}, before the mark of its end") from None


def _files(tar: tarfile.TarFile, found: FoundPictures) -> Iterator[tarfile.TarInfo]:
    """The files of an archive that have content; a second name of a file is a link, and has none."""
    for info in tar:
        if info.isfile():
            yield info
        elif not info.isdir():
            found.leave_out("link(s) or devices", Path(info.name))


def _extracted(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    member = tar.extractfile(info)
    return b"" if member is None else member.read()


def _members(where: str, inside: str, members: Iterable[Member], depth: int, found: FoundPictures) -> Iterator[Source]:
    for name, size, read in members:
        path = PurePosixPath(name)
        shown, place = f"{where}/{name}", str(PurePosixPath(inside) / path)
        if name.lower().endswith((".zip", *TARS)) and not is_litter(path):
            yield from _archive(shown, ARCHIVE_SUFFIX.sub("", place), io.BytesIO(read()), depth + 1, found)
        elif found.takes(path):
            yield Source(place, _read_now(shown, size, read))


def _read_now(shown: str, size: int, read: Callable[[], bytes]) -> Callable[[], IO[bytes]]:
    """What opens a picture of an archive, which is read from front to back; raises UserError then if it is damaged."""
    try:
        if size > MAX_PACKED:
            raise UserError(f"{shown}: unpacks to {size} bytes, more than {MAX_PACKED}")
        with reading(shown, "cannot be read"):
            return partial(NamedBytes, shown, read())
    except UserError as error:
        return partial(_refuse, error)


def _refuse(error: UserError) -> NoReturn:
    raise error


def _lmdb(path: Path) -> Iterator[Source]:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{path}: lmdb databases need the package lmdb: pip install 'guided-pixels[data]'") from None
    try:
        with lmdb.open(str(path), readonly=True, lock=False, max_readers=100) as database, database.begin() as view:
            for number, (key, value) in enumerate(view.cursor()):
                shown = f"{path}: entry {key[:60].decode(errors='replace')}"
                yield Source(f"{number:07d}", partial(NamedBytes, shown, value))
    except lmdb.Error as error:
        raise UserError(f"{path}: cannot be read as an lmdb database ({reason(error)})") from None


# One image


def cropped(image: Image.Image, size: int, crop: str) -> Image.Image:
    """The centre of a picture at size x size pixels, as `--crop` says."""
    if crop == "adm":
        return crop_square(resize_smaller_side(image, size), size)
    scale = size / min(image.size)
    sides = [round(scale * side) for side in image.size]
    return crop_square(image.resize((sides[0], sides[1]), Image.Resampling.BOX), size)


# All of them


class Prepared(NamedTuple):
    """An image that is done. name: of its source. label: its class, None where there is none."""

    name: str
    label: str | None
    pixels: np.ndarray


def prepare(path: str, options: PrepareOptions, say: Callable[[str], object]) -> None:
    """Writes the images of `path` as the options say; say: called with each line on what was found or left out.

    Raises UserError where there are none, for a damaged one unless it may be skipped, and where nothing can be written.
    """
    if not path:
        raise UserError("'': must name what is to be prepared, a folder, a .zip or .tar file, or an lmdb database")
    if "/" in options.name or options.name.startswith("."):
        raise UserError(f"--name {options.name}: must be the beginning of a file's name, without / and with no . at "
                        "first, which hides files")
    as_npz, out = is_npz(options.out), Path(options.out)
    if not as_npz and lies_in(out, path) and Path(path).is_dir():
        raise UserError(f"--out {out}: lies in {path}, so that its images would be among those that are prepared when "
                        "the command goes on; name another folder")
    left_out = FoundPictures()
    if next(sources(Path(path), left_out), None) is None:
        raise _no_pictures(path, [], left_out)
    lines = _label_lines(options.labels_file) if options.labels_file else []
    settings = {"source": path, **{name: getattr(options, name) for name in SETTINGS}}
    settings |= {"labels_sha256": sha256_of(options.labels_file)} if options.labels_file else {}
    if as_npz:
        check_writable("--out", out, parents=True, read=[path, options.labels_file])
        _check_manifest(out.with_suffix(".json"))
        _write(path, options, lines, settings, say)
        return
    with only_job(check_folder("--out", out)), resumable():
        _write(path, options, lines, settings, say)


def _no_pictures(path: str, damaged: Sequence[str], found: FoundPictures) -> UserError:
    return UserError(f"{path}: holds no pictures" + (f" that are whole, {len(damaged)} are damaged" if damaged else
                                                     f" (left out: {found})" if found.left_out else ""))


def _check_manifest(path: Path) -> None:
    """Raises UserError where a file stands in the place of the manifest beside an .npz file that is none."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        if not path.exists() or json.loads(path.read_bytes())["settings"]["source"]:
            return
    raise UserError(f"--out {path.with_suffix('.npz')}: the manifest beside it would replace {path}, which is "
                    "something else; name another file")


def _write(path: str, options: PrepareOptions, lines: Sequence[Sequence[str]], settings: Mapping[str, Any],
           say: Callable[[str], object]) -> None:
    """Writes the images and their manifest; lines: of --labels_file. settings: what the manifest says of them."""
    as_npz, out = is_npz(options.out), Path(options.out)
    kept = {} if as_npz else _begin(out, settings)
    labels = _labels(path, options, lines, say)
    if not as_npz and not options.skip_damaged:         # else two may share a name, of which one is left out
        _check_names(_names_ahead(Path(path)), options, labels())
    label_of = labels()
    damaged: list[str] = []
    found = FoundPictures()
    resized = Resized(options.image_size)
    images = _prepared(path, options, label_of, damaged, found, resized)
    rows = _write_npz(images, out, options.image_size) if as_npz else _write_folder(images, out, options.name, kept)
    if not rows:
        raise _no_pictures(path, damaged, found)
    classes = sorted({row["class"] for row in rows if row["class"] is not None}, key=natural_order)
    manifest = out.with_suffix(".json") if as_npz else out / MANIFEST
    write_json(manifest, {"settings": settings, "classes": classes, "images": rows, "damaged": damaged})
    if not as_npz:
        (out / RECORD).unlink(missing_ok=True)
    if found.left_out:
        say(f"left out: {found}")
    if enlarged := resized.line(path):
        say(enlarged)
    if damaged:
        say(f"left out {len(damaged)} damaged image(s), the first is {damaged[0]}")
    say(f"{len(rows)} images of {options.image_size}x{options.image_size}"
        + (f" in {len(classes)} classes" if classes else ""))


def _begin(out: Path, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Makes a folder ready, and returns the source of each image that it holds, None where no record names it.

    Raises UserError where it holds anything else than a part of the same images.
    """
    manifest, record = out / MANIFEST, out / RECORD
    remove_leftovers(out, f"{MANIFEST}.*")
    if all(file in (manifest, record, out / LOCK) for file in out.iterdir()):       # the settings at most were written
        write_json(manifest, {"settings": settings})
        record.unlink(missing_ok=True)
        return {}
    if not manifest.exists():
        raise UserError(f"--out {out}: holds other files; name a new folder")
    content = read_json(manifest, lambda content: isinstance(content["settings"], dict))
    for name, value in settings.items():
        before = content["settings"].get(name)
        if before != value and not (name == "source" and _same_path(before, value)):
            raise UserError(f"--out {out}: holds images with {name} {_shown(before)}, and now it is {_shown(value)}; "
                            "name another folder")
    with reading(manifest, "names no sources that can be used"):
        named = {row["file"]: str(row["source"]) for row in content.get("images", [])}
    named |= _recorded(record)
    files = (file.relative_to(out).as_posix() for file in find_pictures(out, frozenset((".png",))).files)
    return {file: named.get(file) for file in files}


def _same_path(before: Any, now: str) -> bool:
    return isinstance(before, str) and os.path.normpath(before) == os.path.normpath(now)


def _shown(value: Any) -> str:
    return "unset" if value in (None, "") else str(value)


def _recorded(record: Path) -> dict[str, str]:
    """The sources by file of a record; what a kill left of a last line is cut off."""
    if not record.exists():
        return {}
    with reading(record, "is no record of images that can be used"):
        text = record.read_text()
        whole = text[:text.rfind("\n") + 1]
        named = {row["file"]: str(row["source"]) for row in map(json.loads, whole.splitlines())}
    if whole != text:
        write_text(record, whole)
    return named


def _note(record: Path, row: dict[str, Any]) -> None:
    """Appends a row to the record."""
    try:
        with os.fdopen(open_own(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"{record}: cannot be written ({reason(error)})") from None


def _prepared(path: str, options: PrepareOptions, label_of: Callable[[int, str], str | None],
              damaged: list[str], left_out: FoundPictures, resized: Resized) -> Iterator[Prepared]:
    """The images, decoded by several threads, in the order of their sources."""
    def decode(source: Source) -> np.ndarray | UserError:
        try:
            image = read_image(source.content(), 3)
            resized.look(PurePosixPath(source.name), image)
            return np.asarray(cropped(image, options.image_size, options.crop))
        except UserError as error:
            return error

    found = itertools.islice(sources(Path(path), left_out), options.num_images or None)
    waiting: deque[tuple[int, Source, Future[np.ndarray | UserError]]] = deque()
    with ExitStack() as stack:
        pool = stack.enter_context(reading_threads())
        bar = stack.enter_context(progress_bar(None, "preparing", "image"))
        for number in itertools.count():
            source = next(found, None)
            if source is not None:
                waiting.append((number, source, pool.submit(decode, source)))
            if not waiting:
                return
            if source is not None and len(waiting) < AHEAD:
                continue
            place, first, future = waiting.popleft()
            pixels = future.result()
            bar.update()
            if not isinstance(pixels, UserError):
                yield Prepared(first.name, label_of(place, first.name), pixels)
            elif options.skip_damaged:
                damaged.append(str(pixels))
            else:
                for _, _, other in waiting:
                    other.cancel()
                raise UserError(f"{pixels}; --skip_damaged True leaves such images out")


def _place(source: str, label: str | None, number: int, name: str) -> str:
    """The file of an image in the folder; name: of --name."""
    stem = f"{name}_{number:07d}" if name else PurePosixPath(source).stem
    return "/".join(filter(None, [label, f"{stem}.png"]))


def _check_names(names: Sequence[str], options: PrepareOptions, label_of: Callable[[int, str], str | None]) -> None:
    """Raises UserError where two of the images that will be written would be one file."""
    seen: dict[str, str] = {}
    for number, source in enumerate(names[:options.num_images or None]):
        place = _place(source, label_of(number, source), number, options.name)
        if place in seen:
            raise UserError(f"{source}: another image, {seen[place]}, is {place} already; pass --name, which numbers "
                            "them")
        seen[place] = source


def _write_folder(images: Iterable[Prepared], out: Path, name: str, kept: Mapping[str, str | None],
                  ) -> list[dict[str, Any]]:
    """Writes images that are not there yet; kept: the source of each that is, as `_begin` returns them."""
    rows, seen = [], dict[str, str]()
    for number, image in enumerate(images):
        place = _place(image.name, image.label, number, name)
        if place in seen:
            raise UserError(f"{image.name}: another image, {seen[place]}, is {place} already; pass --name, which "
                            "numbers them, and another --out")
        seen[place] = image.name
        row = {"file": place, "source": image.name, "class": image.label}
        before = kept.get(place)
        if before not in (None, image.name):
            raise UserError(f"--out {out}: holds {place} made of {before}, and now it would be made of {image.name}; "
                            "the data has changed, name another folder")
        if place not in kept:
            if (out / place).exists():
                raise UserError(f"--out {out}: {image.name} would be {place}, which is there since now: another "
                                "command writes to this folder, or names that differ by case alone are one here; name "
                                "another folder, or pass --name, which numbers the files")
            _note(out / RECORD, row)
            save(Image.fromarray(image.pixels), out / place)
        elif not np.array_equal(np.asarray(read_image(out / place, 3)), image.pixels):
            raise UserError(f"--out {out}: holds {place} with other pixels than {image.name} gives now; the data has "
                            "changed, or another version of Pillow cuts it; name another folder")
        rows.append(row)
    surplus = [file for file in kept if file not in seen]
    if rows and surplus:
        raise UserError(f"--out {out}: holds {len(surplus)} image(s) that are not among the {len(rows)} of now, the "
                        f"first is {surplus[0]}; name another folder")
    return rows


def _write_npz(images: Iterable[Prepared], out: Path, size: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryFile(dir=out.parent) as pixels:          # how many there are shows at the end
        for image in images:
            pixels.write(image.pixels.tobytes())
            rows.append({"source": image.name, "class": image.label})
        pixels.seek(0)
        labels = [row["class"] for row in rows]
        names = sorted({label for label in labels if label is not None}, key=natural_order)
        numbers = {name: number for number, name in enumerate(names)}
        arrays = {"arr_1": np.array([numbers[label] for label in labels]), "class_names": np.array(names)} \
            if names else {}
        shape = (len(rows), size, size, 3)
        if rows:
            write_batch(out, arrays, (np.frombuffer(pixels.read(size * size * 3), np.uint8) for _ in rows), shape)
    return rows


# Classes


def _labels(path: str, options: PrepareOptions, lines: Sequence[Sequence[str]], say: Callable[[str], object],
            ) -> Callable[[], Callable[[int, str], str | None]]:
    """What begins to give each image its class, by its number and name, in their order.

    lines: of --labels_file. say: called with what is assumed of them. Raises UserError for lines that do not fit the
    images of `path`.
    """
    if options.labels_file:
        pairs = [(PurePosixPath(words[0]).stem, words[1]) for words in lines if len(words) > 1]
        if pairs:
            return partial(_by_name, options.labels_file, pairs)
        by_order = _by_order(path, options, [words[0] for words in lines], say)
        return lambda: by_order
    of_name = {"folders": _folder, "prefix": _prefix, "none": lambda name: None}[options.labels]
    return lambda: lambda number, name: of_name(name)


def _folder(name: str) -> str:
    folder = PurePosixPath(name).parent.name
    if not folder:
        raise UserError(f"{name}: lies in no folder, which --labels folders would take for its class")
    return folder


def _prefix(name: str) -> str:
    prefix, underscore, _ = PurePosixPath(name).name.partition("_")
    if not (prefix and underscore):
        raise UserError(f"{name}: has nothing before a _ in its name, where --labels prefix would find the class")
    return prefix


def _label_lines(path: str) -> list[list[str]]:
    """The words of each line, its name and class or its class alone; raises UserError for what cannot be a class."""
    with reading(path, "is no text file of classes", flag="--labels_file"):
        lines = [words for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if (words := _words(line))]
    for words in lines:
        if not words[-1] or "/" in words[-1] or words[-1].startswith("."):
            raise UserError(f"--labels_file {path}: {words[-1]!r} cannot be a class, which is the name of a folder")
    return lines


def _by_name(path: str, pairs: Sequence[tuple[str, str]]) -> Callable[[int, str], str]:
    named: dict[str, str] = {}
    left = Counter(stem for stem, _ in pairs)
    for stem, label in pairs:
        if named.setdefault(stem, label) != label:
            raise UserError(f"--labels_file {path}: says that {stem} is of the class {named[stem]}, and also of "
                            f"{label}; names must differ without their folders")

    def by_name(number: int, name: str) -> str:
        stem = PurePosixPath(name).stem
        if stem not in named:
            raise UserError(f"--labels_file {path}: has no line for {name}")
        if not left[stem]:
            raise UserError(f"--labels_file {path}: has fewer lines for {stem} than there are images called so, and "
                            f"{name} may be of another class; give each a line, or images names that differ without "
                            "their folders")
        left[stem] -= 1
        return named[stem]

    return by_name


def _by_order(path: str, options: PrepareOptions, labels: Sequence[str], say: Callable[[str], object],
              ) -> Callable[[int, str], str]:
    """Classes that no names stand beside: a line for each image, of all that there are or of the first --num_images.

    An archive is read once for that before the work: as many lines as images are all that tells that none is shifted.
    """
    where, found = f"--labels_file {options.labels_file}", FoundPictures()
    names: list[str] = []
    with progress_bar(None, "counting", "image") as bar:
        for source in sources(Path(path), found):
            names.append(source.name)
            bar.update()
    fits = len(labels) == len(names) or (len(labels) == options.num_images < len(names) and not found.left_out)
    if not fits:
        beside = f", and beside them {found}" if found.left_out else ""
        raise UserError(f"{where}: has {len(labels)} classes without names, and {path} has {len(names)} images"
                        f"{beside}; give a line for each image, or lines NAME,CLASS")
    pairs = list(itertools.pairwise(names[:len(labels)]))
    for before, name in pairs:
        if PurePosixPath(name) < PurePosixPath(before):
            raise UserError(f"{where}: has classes in the order of the images' names, and {name} comes after {before} "
                            "in the archive; give lines NAME,CLASS")
    if unlike := next((pair for pair in pairs if natural_order(pair[1]) < natural_order(pair[0])), None):
        say(f"{where}: its lines are taken for those of the images in the order of their names as text, where "
            f"{unlike[0]} comes before {unlike[1]}")

    def by_order(number: int, name: str) -> str:
        if names[number:number + 1] != [name]:
            raise UserError(f"{path}: has changed since its images were counted, {name} has another place now")
        return labels[number]

    return by_order


def _words(line: str) -> list[str]:
    """Name and class, or the class alone, in a line; boxes that follow a class, as in ImageNet's file, are left out."""
    if "," not in line:
        return line.split()[:2]
    words = [word.strip() for word in next(csv.reader([line]))[:2]]
    return [words[0], BOXES.sub("", words[1])]
