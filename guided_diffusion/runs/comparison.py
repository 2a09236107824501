"""Several finished runs beside each other: the same image numbers under several settings."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..classes import ClassNames, stored_names
from ..errors import UserError
from ..fetch import sha256_of
from ..files import check_ending
from ..foreign import read_json
from ..options import Options, image_numbers, option, required
from ..pictures import distinct_names, save_comparison
from ..places import find_bundled
from .pairing import ComparedRun, differences, false_pairs, read_run
from .record import num_steps

LOG = logging.getLogger(__name__)

MOST_COMPARED = 1000            # images of each run
NUMBER, CHANGE = "number", "change"
PAGE_ENDINGS = (".html", ".htm")
STEPS = ("timestep_respacing", "steps")         # the flags of their number, in runs of pipelines the second


@dataclass(frozen=True)
class ComparisonOptions(Options):
    """The comparison."""

    out: str = required("file to write: a PNG picture, or an HTML page where its name ends in .html")
    page: str = option("", "HTML page to write beside the picture")
    num_images: int = option(40, "images of each run, the first ones", minimum=1, maximum=MOST_COMPARED)
    images: str = option("", "in place of the first ones, numbers of images, like 0:8 (0 to 7) or 3,5,12")
    sort: str = option(NUMBER, "order of the images: number, or change, where those come first that differ most from "
                       "the first run", choices=(NUMBER, CHANGE))
    labels: bool = option(False, "write number and class below each image of the picture")
    zoom: int | None = option(None, "times that the picture enlarges a pixel; unset: as often as makes an image 64 "
                              "pixels wide", minimum=1, maximum=64)
    columns: int = option(10, "images side by side in the picture", minimum=1, maximum=MOST_COMPARED)
    allow_different: bool = option(False, "compare runs of different seeds or labels too, whose images of one number "
                                   "begin with other noise or are of other classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, path, endings in (("--out", self.out, (".png", *PAGE_ENDINGS)), ("--page", self.page, PAGE_ENDINGS)):
            if path:
                check_ending(flag, path, *endings)

    @property
    def pages(self) -> list[Path]:
        """The pages to write."""
        return [Path(name) for name in dict.fromkeys((self.out, self.page)) if name.lower().endswith(PAGE_ENDINGS)]

    @property
    def pictures(self) -> list[Path]:
        """The pictures to write."""
        return [path for path in [Path(self.out)] if path not in self.pages]


@dataclass(frozen=True)
class Comparison:
    """The same images under R settings.

    names: of the settings, R different ones: folder and title. image_ids: n numbers, in the order in which they are
    shown. labels: their classes in words, empty where there are none. images: (R, n, H, W, 3) uint8. notes: sentences
    on what is not the same or was made so.
    """

    names: tuple[str, ...]
    image_ids: tuple[int, ...]
    labels: tuple[str, ...]
    images: np.ndarray
    notes: tuple[str, ...] = ()

    def changes(self, first: int) -> np.ndarray:
        """How much the images of each run differ from those of run number `first`: (R, n), from 0 to 255.

        It is the root mean square of the differences of all pixels and channels.
        """
        return np.array([[np.sqrt(((image - base.astype(np.float32))**2).mean())
                          for image, base in zip(images, self.images[first], strict=True)] for images in self.images])

    def sorted_by_change(self) -> Comparison:
        """With those images first of which one run differs most from the first one."""
        order = np.argsort(-self.changes(0).max(axis=0), kind="stable")
        return replace(self, images=self.images[:, order], image_ids=tuple(self.image_ids[i] for i in order),
                       labels=tuple(self.labels[i] for i in order) if self.labels else ())

    def draw(self, path: Path, options: ComparisonOptions) -> None:
        """Writes the picture. Raises UserError where it cannot be written."""
        captions = [f"{number}: {label}" for number, label in zip(self.image_ids, self.labels, strict=True)] \
            if self.labels else [str(number) for number in self.image_ids]
        told = options.labels or options.sort != NUMBER
        save_comparison(dict(zip(self.names, self.images, strict=True)), path, columns=options.columns,
                        zoom=options.zoom, captions=captions if told else None)


def class_names_of(configuration: Mapping[str, Any]) -> ClassNames | None:
    """The classes of a recorded run's network; None where that is gone, or has no names."""
    network = _network_of(configuration)
    with suppress(UserError):
        return stored_names(network) if network.is_file() else None
    return None


def _network_of(configuration: Mapping[str, Any]) -> Path:
    """The weights that a recorded run names, of a bundled network wherever they are installed."""
    return Path(find_bundled(str(configuration.get("model_path", ""))))


def names_of_samples(path: Path) -> ClassNames | None:
    """The classes of the network that made a file of samples, None where nothing beside it says them.

    That is where the record beside it is of this file, and the weights that it names are still those it was made with;
    where they are not, that is said.
    """
    record = path.parent / "run.json"
    if not record.is_file():
        return None
    try:
        content = read_json(record, lambda content: isinstance(content["configuration"], dict))
    except UserError:                   # of somebody else
        return None
    configuration, sha256 = content["configuration"], dict(content.get("sha256") or {}).get("model")
    if content.get("samples", path.name) != path.name:
        return None
    network = _network_of(configuration)
    if not network.is_file() or sha256 not in (None, sha256_of(network)):
        say_once(f"{path}: its network {network} is not there, or another one by now, so that its classes go by their "
                 "numbers")
        return None
    return class_names_of(configuration)


@functools.cache
def say_once(line: str, level: int = logging.WARNING) -> None:
    """Says a line in the first of the places that read the same file."""
    LOG.log(level, line)


def class_words(configuration: Mapping[str, Any], labels: Iterable[int]) -> tuple[str, ...]:
    """The labels of images of a recorded run in words: by name where its network is still there and has names."""
    names = class_names_of(configuration)
    known = (*names.names, "no class") if names else ()         # the last is the null class
    return tuple(known[label] if label < len(known) else f"class {label}" for label in labels)


def read_comparison(folders: Sequence[str], options: ComparisonOptions) -> Comparison:
    """The runs in these folders, of which some may be folders of tables, as the options say.

    Raises UserError for a folder without a finished run, and for runs without common images, of different seeds, base
    images or labels (unless the options allow it), or of sizes of which none is a whole multiple of all others. What
    else differs beside the guidance is logged.
    """
    runs = [read_run(folder) for name in folders for folder in _runs_in(Path(name))]
    image_ids = _image_ids(runs, options)
    labels = [run.file.labels for run in runs]
    notes = [*false_pairs(runs, image_ids), *_labels(runs, labels, image_ids)]
    if notes and not options.allow_different:
        raise UserError(f"{notes[0]}; pass --allow_different True to compare them all the same")
    pictures, resized = _of_one_size(runs, [run.file.pick(image_ids) for run in runs])
    steps = list(_steps(runs))
    notes += [*steps, *differences(runs, STEPS if steps else []), *resized]
    for note in notes:
        LOG.warning(note)
    words = () if labels[0] is None or any(part is None for part in labels) else class_words(
        runs[0].configuration, labels[0][image_ids])
    found = Comparison(_names(runs), tuple(image_ids), words, pictures, tuple(notes))
    return found.sorted_by_change() if options.sort == CHANGE else found


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder of a run, or those of the rows of the table, or of a bench's reported table, that is there."""
    for table in (folder / "table.json", folder / "report" / "table.json"):
        if table.is_file() and not (folder / "run.json").exists():
            rows = read_json(table, lambda found: all(isinstance(row, dict) for row in found["rows"].values()))
            found = [table.parent / Path(str(row["samples"])).parent for row in rows["rows"].values()
                     if row.get("samples")]
            if not found:
                raise UserError(f"{folder}: no row of this table was run here")
            yield from found
            return
    yield folder


def _names(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    """Folder and title of each run, all different."""
    return tuple(distinct_names((f"{run.folder.resolve().name}: {run.title}", f"{run.folder}: {run.title}")
                                for run in runs))


def _image_ids(runs: Sequence[ComparedRun], options: ComparisonOptions) -> list[int]:
    """The numbers of the images; UserError where a run has no image of a number that is asked for."""
    fewest = min(runs, key=lambda run: len(run.file))
    common = len(fewest.file)
    if not options.images:
        if common < options.num_images and len({len(run.file) for run in runs}) > 1:
            LOG.info("images 0 to %d are compared, as %s has no more", common - 1, fewest.folder)
        return list(range(min(common, options.num_images)))
    asked = image_numbers(options.images, MOST_COMPARED)
    if asked[-1] >= common:
        raise UserError(f"--images {options.images}: {fewest.folder} has the images 0 to {common - 1} alone, so that "
                        f"number {asked[-1]} is no common one")
    return asked


def _labels(runs: Sequence[ComparedRun], labels: Sequence[np.ndarray | None], image_ids: Sequence[int],
            ) -> Iterator[str]:
    """A sentence where the classes of an image differ: by name, where all networks name theirs, else by number."""
    known = [(run, part[list(image_ids)]) for run, part in zip(runs, labels, strict=True) if part is not None]
    named = all(class_names_of(run.configuration) is not None for run, _ in known)
    told: list[Sequence[Any]] = [
        class_words(run.configuration, part) if named else part.tolist() for run, part in known]
    for (run, _), words in list(zip(known, told, strict=True))[1:]:
        for number, word, base in zip(image_ids, words, told[0], strict=True):
            if word != base:
                yield (f"image {number} is of class {word} in {run.folder} and of class {base} in "
                       f"{known[0][0].folder}")
                return


def _steps(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """A sentence where the numbers of steps differ, from which the noise follows too, or how the first is drawn."""
    shared = [str(run.folder) for run in runs if run.configuration.get("shared_start")]
    if 0 < len(shared) < len(runs):
        yield (f"--shared_start is True of {', '.join(shared)} alone, so that images of the same number begin with "
               "different noise")
    if shared:
        return
    steps = {run.folder: count for run in runs if (count := num_steps(run.configuration)) is not None}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"{folder} {count}" for folder, count in steps.items())
        yield (f"the runs have different numbers of steps ({told}), so that images of the same number begin with "
               "different noise")


def _of_one_size(runs: Sequence[ComparedRun], images: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """The images (R, n, H, W, 3), small ones enlarged by a whole number, and a sentence for each that was."""
    largest = max(images, key=lambda one: one.shape[1] * one.shape[2])
    height, width = largest.shape[1:3]
    result, notes = [], []
    for run, one in zip(runs, images, strict=True):
        factor = height // one.shape[1]
        if factor < 1 or (factor * one.shape[1], factor * one.shape[2]) != (height, width):
            raise UserError(f"{run.folder}: has images of {one.shape[2]}x{one.shape[1]}, which cannot be enlarged by a "
                            f"whole number to the {width}x{height} of other runs")
        if factor > 1:
            notes.append(f"the images of {run.folder} are {one.shape[2]}x{one.shape[1]}, enlarged {factor} times to "
                         f"{width}x{height}")
        result.append(one.repeat(factor, axis=1).repeat(factor, axis=2))
    return np.stack(result), notes
