"""Files of icons: rendered, labelled, split by emoji, with a manifest that names the source of each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..classes import natural_order
from ..cores import on_all_cores
from ..errors import UserError
from ..files import LOCK, check_folder, only_job, remove_leftovers, write_json
from ..foreign import read_json
from ..npz import write_batch
from ..options import Options, option
from ..pictures import grid, save
from .sets import SETS, Drawing, drawings, fetch_packages, read_packages

LABELS = ("category-style", "category", "style")
FORMATS = ("folder", "npz")
SPLITS = {"train": 0.80, "validation": 0.05, "test": 0.15}          # shares of the items
CHUNK = 100                     # drawings that a process renders at a time
NEAR_SIZE = 16                  # side in pixels at which drawings are compared
NEAR = 8.0                      # root mean square difference, of 255, below which two are near duplicates
SHEET_COLUMNS = 16
MADE_OF = ("image_size", "label", "format")          # options that the files depend on
MANIFEST = "manifest.json"
SHEET = "sheet.png"
UNFINISHED = ".unfinished.json"     # in it until all is written: what the files are made of


@dataclass(frozen=True)
class IconOptions(Options):
    """Options that say which icons to render, and where to."""

    packages: str = option("", "folder of the unpacked npm packages; unset: fetched by the npm client")
    image_size: int = option(32, "height and width in pixels", minimum=8, maximum=1024)
    label: str = option("category-style", f"what a class is: {', '.join(LABELS)}", choices=LABELS)
    format: str = option("folder", "folder: an image folder per split, a folder for each class in it; npz: a file per "
                         "split, arr_0 RGB, arr_1 classes", choices=FORMATS)
    out: str = option("icons", "folder for the splits, the manifest and the contact sheet")


class Icons(NamedTuple):
    """Drawings as pictures: rgb (N, S, S, 3) uint8, the class of each by name, and the split of each."""

    drawings: list[Drawing]
    rgb: np.ndarray
    classes: list[str]
    splits: list[str]


def write_icons(options: IconOptions, say: Callable[[str], object]) -> None:
    """Renders all icons and writes their files, unless they are there; what a kill left of them is written again.

    say: called with each line on what was taken, left out or found. Raises UserError, before anything is rendered,
    where the renderer is missing, the packages are not the pinned ones, the folder holds anything else than a part of
    the same icons, or it cannot be written.
    """
    out = check_folder("--out", options.out)
    with only_job(out):
        if _is_finished(out, options):
            say(f"{out} has these icons already: there is nothing to do")
            return
        _begin(out, {name: getattr(options, name) for name in MADE_OF})
        _write(options, out, say)
        (out / UNFINISHED).unlink()


def _is_finished(out: Path, options: IconOptions) -> bool:
    """Whether the folder holds these icons; UserError where its manifest says so and files of it are gone."""
    manifest = out / MANIFEST
    if (out / UNFINISHED).exists() or not manifest.exists():
        return False
    made_of = read_json(manifest)
    batches = [f"{split}.npz" for split in SPLITS]
    if ((made_of.get("image_size"), made_of.get("label")) != (options.image_size, options.label)
            or any((out / name).exists() for name in batches) != (options.format == "npz")):
        return False
    try:
        pictures = [f"{icon['split']}/{icon['class']}/{_file_name(icon['item'], icon['style'], icon['name'])}"
                    for icon in made_of["icons"]]
    except (KeyError, TypeError):
        raise UserError(f"--out {out}: its {MANIFEST} is not one of icons; name a new folder") from None
    gone = [name for name in [*(batches if options.format == "npz" else pictures), SHEET]
            if not (out / name).is_file()]
    if gone:
        others = f" and {len(gone) - 1:,} more" * (len(gone) > 1)
        raise UserError(f"--out {out}: lacks {gone[0]}{others} of what its {MANIFEST} lists; name a new folder, or "
                        "delete this one")
    return True


def _begin(out: Path, made_of: Mapping[str, object]) -> None:
    """Notes in a new folder what its files are made of; UserError for any other one, unless they were begun there."""
    record = out / UNFINISHED
    remove_leftovers(out, f"{record.name}.*")
    if any(path.name not in (LOCK, UNFINISHED) for path in out.iterdir()):
        if not record.exists():
            raise UserError(f"--out {out}: is not empty; name a new folder")
        before = read_json(record, lambda content: content.keys() == made_of.keys())
        for name, value in made_of.items():
            if before[name] != value:
                raise UserError(f"--out {out}: holds a part of icons with {name} {before[name]}, and now it is "
                                f"{value}; name another folder")
    write_json(record, made_of)


def _write(options: IconOptions, out: Path, say: Callable[[str], object]) -> None:
    _renderer()
    found = drawings(read_packages(Path(options.packages)) if options.packages else fetch_packages())
    icons = Icons(found, render(found, options.image_size), [_class_of(d, options.label) for d in found],
                  [split_of(d.item) for d in found])
    for split in SPLITS:
        _write_split(icons, split, out, options.format)
    duplicates = near_duplicates(icons)
    write_json(out / MANIFEST, _manifest(icons, options, duplicates))
    save(contact_sheet(icons.rgb), out / SHEET)
    for line in _summary(icons, duplicates):
        say(line)


def split_of(item: str) -> str:
    """The split of an emoji, by its name alone: all its drawings go the same way, also in later versions of a set."""
    place = int.from_bytes(sha256(item.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    return next(reversed(SPLITS))


def _class_of(drawing: Drawing, label: str) -> str:
    return "-".join(getattr(drawing, part) for part in label.split("-"))


def _renderer() -> Callable[..., bytes]:
    try:
        import resvg_py
    except ImportError:
        raise UserError("rendering icons needs resvg: pip install 'guided-pixels[data]'") from None
    return resvg_py.svg_to_bytes


def render(found: Sequence[Drawing], size: int) -> np.ndarray:
    """(N, size, size, 3) uint8: the drawings on white, on all cores."""
    pieces = [[drawing.svg for drawing in found[start:start + CHUNK]] for start in range(0, len(found), CHUNK)]
    return np.concatenate(on_all_cores(partial(render_svgs, size=size), pieces, "rendering", "icon"))


def render_svgs(svgs: Sequence[str], size: int) -> np.ndarray:
    """(N, size, size, 3) uint8: SVG pictures on white, antialiased; what is not square is centred."""
    to_png = _renderer()
    images = []
    for svg in svgs:
        png = to_png(svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True)
        with Image.open(io.BytesIO(bytes(png)), formats=["PNG"]) as picture:
            image = Image.new("RGB", (size, size), "white")
            image.paste(picture.convert("RGB"), ((size - picture.width) // 2, (size - picture.height) // 2))
        images.append(np.asarray(image))
    return np.stack(images)


def _write_split(icons: Icons, split: str, out: Path, kind: str) -> None:
    index = [i for i, other in enumerate(icons.splits) if other == split]
    if kind == "npz":
        names = sorted(set(icons.classes), key=natural_order)
        write_batch(out / f"{split}.npz", {
            "arr_0": icons.rgb[index], "arr_1": np.array([names.index(icons.classes[i]) for i in index]),
            "class_names": np.array(names)})
        return
    for i in index:
        save(Image.fromarray(icons.rgb[i]), out / split / icons.classes[i] / _file_name(
            icons.drawings[i].item, icons.drawings[i].style, icons.drawings[i].name))


def _file_name(item: str, style: str, name: str) -> str:
    return f"{item}.{style}.{name}.png"


class Duplicates(NamedTuple):
    """Near duplicates between different emoji: the number of drawings that have one, and of test drawings in train."""

    anywhere: int
    test_in_train: int


def near_duplicates(icons: Icons) -> Duplicates:
    """How many drawings look like one of another emoji, at 16 x 16 pixels, by a root mean square of less than 8."""
    small = np.stack([np.asarray(Image.fromarray(image).resize((NEAR_SIZE, NEAR_SIZE), Image.Resampling.BOX))
                      for image in icons.rgb]).reshape(len(icons.rgb), -1).astype(np.float64)
    items = np.array([drawing.item for drawing in icons.drawings])
    splits = np.array(icons.splits)
    squares = (small**2).sum(axis=1)
    anywhere = test_in_train = 0
    for start in range(0, len(small), 1000):
        rows = slice(start, start + 1000)
        distance = squares[rows, None] + squares[None] - 2 * small[rows] @ small.T
        near = (distance < NEAR**2 * small.shape[1]) & (items[rows, None] != items[None])
        anywhere += int(near.any(axis=1).sum())
        test_in_train += int((near & (splits == "train")).any(axis=1)[splits[rows] == "test"].sum())
    return Duplicates(anywhere, test_in_train)


def _manifest(icons: Icons, options: IconOptions, duplicates: Duplicates) -> dict[str, object]:
    return {
        "image_size": options.image_size, "label": options.label, "background": "white",
        "classes": sorted(set(icons.classes), key=natural_order),
        "near_duplicates": duplicates._asdict(),
        "sources": [asdict(icon_set) for icon_set in SETS],
        "icons": [{"item": drawing.item, "style": drawing.style, "name": drawing.name, "class": cls, "split": split}
                  for drawing, cls, split in zip(icons.drawings, icons.classes, icons.splits, strict=True)],
    }


def _summary(icons: Icons, duplicates: Duplicates) -> list[str]:
    styles: Mapping[str, int] = Counter(drawing.style for drawing in icons.drawings)
    splits: Mapping[str, int] = Counter(icons.splits)
    items = {drawing.item for drawing in icons.drawings}
    return [
        f"{len(icons.rgb):,} drawings of {len(items):,} emoji; of skin tones the neutral one alone: "
        + ", ".join(f"{count:,} {style}" for style, count in styles.items()),
        f"{len(set(icons.classes))} classes; " + ", ".join(f"{splits[split]:,} {split}" for split in SPLITS),
        f"near duplicates of another emoji: {duplicates.anywhere:,} drawings, {duplicates.test_in_train:,} of the test "
        "split have one in the training split",
    ]


def contact_sheet(rgb: np.ndarray) -> Image.Image:
    """A square of icons, evenly spread over all."""
    index = np.linspace(0, len(rgb) - 1, min(SHEET_COLUMNS**2, len(rgb))).round().astype(int)
    return Image.fromarray(grid(rgb[index], SHEET_COLUMNS))
