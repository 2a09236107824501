"""Classes by name: which number each has is decided once, and kept with the weights.

The classes of an image folder are found by one of two rules:
    prefix     the file name before the first underscore, as the official code reads it: cat_001.png, n01440764_10.JPEG
    folders    the folder below the data folder: cat/001.png, dog/001.png
Unless a rule is given, it is prefix, but folders where there are several of them and the file names tell no classes
apart: where all have the same prefix, or one has none. In a folder that prepare_images.py wrote with classes it is
folders. Where both rules tell several classes, and others, a line says so.

Names are numbered in natural order: as text, except that digits in them count as numbers, so that kind2 comes before
kind10. The official code sorts as text; for ImageNet's names, and all whose digits are equally many, that is the same.

A training stores its names in config.json and in the metadata of its weights, as a list under "class_names".
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from . import checkpoint
from .dist_util import say
from .errors import UserError
from .fetch import without_secrets
from .functions import is_function
from .options import cut, nearest

CLASS_RULES = ("folders", "prefix")
MANIFEST = "manifest.json"      # of scripts/prepare_images.py, in the folder of its images
KEY = "class_names"             # in config.json and in metadata
SHOWN = 8                       # names that messages show; of more, the first ones and the last

_log = logging.getLogger(__name__)


def natural_order(name: str) -> tuple[list[Any], str]:
    """The key that sorts names as text, but the digits in them as numbers."""
    parts: list[Any] = re.split("([0-9]+)", name)
    for place in range(1, len(parts), 2):
        digits = parts[place].lstrip("0")
        parts[place] = (len(digits), digits)
    return parts, name


@dataclass(frozen=True)
class ClassNames:
    """The names of classes; the place of a name is its number.

    rule: how they were found, one of CLASS_RULES; "" where that is not known. source: the file or folder that has
    decided them, for messages; "" for the data at hand.
    """

    names: tuple[str, ...]
    rule: str = ""
    source: str = field(default="", compare=False)

    @classmethod
    def from_images(cls, root: Path, files: Sequence[Path], rule: str = "") -> Self:
        """The classes of image files below the folder `root`.

        rule: one of CLASS_RULES; "": the one that fits. Raises UserError where a file has no class by that rule.
        """
        if not rule:
            rule, doubt = _fitting_rule(root, files)
            say(doubt)
        found = _by_prefix(files) if rule == "prefix" else next(_by_folders(root, files), None)
        if found is None:
            raise _without_class(root, files, rule)
        return cls(tuple(sorted(set(found), key=natural_order)), rule)

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        """The names that `to_json` gave; raises UserError, beginning with `source`, for anything else."""
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value) \
                or len(set(value)) < len(value):
            raise UserError(f"{source}: its {KEY} must be a list of different names")
        return cls(tuple(value), source=source)

    def to_json(self) -> list[str]:
        """The names in the order of their numbers."""
        return list(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """The names and their numbers, like "3 classes: 0 ant, 1 bee, 2 cow"; of many, some."""
        shown = [f"{number} {name}" for number, name in enumerate(self.names)]
        if len(shown) > SHOWN:
            shown = [*shown[:SHOWN - 2], "...", shown[-1]]
        return f"{len(self)} class{'es' if len(self) > 1 else ''}: {', '.join(shown)}"

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, name: str) -> int:
        """The number of a class; raises UserError where there is none of that name."""
        if name not in self._number_of:
            raise UserError(f"{name}: is none of the {self}{self._of_source}{nearest(name, self.names)}")
        return self._number_of[name]

    def called(self, name: str) -> str:
        """The number of a class in words, for a name that may be taken for something else."""
        return f"the class called {name} has the number {self.number(name)}"

    @property
    def _of_source(self) -> str:
        return f" (of {self.source})" if self.source else ""

    def renumbered(self, labels: np.ndarray, others: ClassNames, data_dir: object) -> np.ndarray:
        """Labels (N,) that number the classes of `others`, in the numbers that the same names have here.

        data_dir: where they are from. Raises UserError for a class that is none of these.
        """
        there = np.unique(labels).tolist()
        for number in there:
            if others.names[number] not in self._number_of:
                raise UserError(f"{data_dir}: has images of the class {others.names[number]}, which is none of the "
                                f"{self}{self._of_source}")
        numbers = np.zeros(len(others), np.int64)
        numbers[there] = [self._number_of[others.names[number]] for number in there]
        return numbers[labels]

    def numbers(self, root: Path, files: Sequence[Path]) -> np.ndarray:
        """The class of each image file below the folder `root`: (N,) int64; see `read`."""
        return self.read(root, files)[1]

    def read(self, root: Path, files: Sequence[Path], rule: str = "") -> tuple[Self, np.ndarray]:
        """The class of each image file below the folder `root`, (N,) int64, and these names with the rule that told it.

        rule: what counts first; "": that of the names, and where they have none the one that fits. The files may lie
        otherwise than those that the names are from: by prefix there and by folders here. Raises UserError for a file
        of another class.
        """
        rule = rule or self.rule or _fitting_rule(root, files)[0]
        readings = list(_readings(root, files, rule))
        for found, names in readings:
            if set(names) <= self._number_of.keys():
                return replace(self, rule=found), np.array([self._number_of[name] for name in names], np.int64)
        if not readings:
            raise _without_class(root, files, rule)
        path, name = next((path, name) for path, name in zip(files, readings[0][1], strict=True)
                          if name not in self._number_of)
        raise UserError(f"{path}: is of the class {name}, which is none of the {self}{self._of_source}")

    def check(self, num_classes: int, data_dir: object, trained: bool = False, resumed: bool = False) -> None:
        """Raises UserError unless a network of `num_classes` fits them; data_dir: where they are from.

        trained: the network is, so that its number of classes is given. resumed: its training goes on, and its classes
        may be more: official networks always have 1,000 labels, of which the first are those of the images.
        """
        if trained and (num_classes < len(self) or (num_classes > len(self) and not resumed)):
            which = ("" if num_classes < len(self) else
                     "; an .npz file whose labels, arr_1, are its numbers says which of them these are")
            raise UserError(f"--data_dir {data_dir}: has {self}, and the network knows {num_classes}{which}")
        if trained and num_classes > len(self):
            order = ("" if list(self.names) == sorted(self.names) else
                     "; digits in them count as numbers, and the official code sorts them as text")
            say(f"{data_dir}: has {len(self)} class{'es' * (len(self) > 1)}, and the network knows {num_classes}: they "
                "are taken for its first ones, as if it was trained on them; it never sees the others and should not "
                f"be asked for them{order}")
        elif num_classes != len(self):
            raise UserError(f"--num_classes {num_classes}: {data_dir} has {self}; pass --num_classes {len(self)}")


# How the names of files tell classes


def _fitting_rule(root: Path, files: Sequence[Path]) -> tuple[str, str]:
    """The rule that fits, and a line of a log where the other one tells several classes as well; "" else."""
    if _prepared_in_folders(root):
        return "folders", ""
    prefixes, levels = _by_prefix(files), _by_folders(root, files)
    first = next(levels, None)
    if first is None or len(there := set(first)) == 1:
        return "prefix", ""
    if prefixes is None or len(told := set(prefixes)) == 1:
        return "folders", ""
    if any(len(told) == len(set(level)) == len(set(zip(prefixes, level, strict=True))) for level in (first, *levels)):
        return "prefix", ""
    return "prefix", (f"{root}: its file names tell {len(told)} classes, and its {len(there)} folders others; those of "
                      "the names are taken (--classes prefix), not those of the folders (--classes folders)")


def _prepared_in_folders(root: Path) -> bool:
    """Whether the manifest of scripts/prepare_images.py says that the folders are classes."""
    try:
        settings = json.loads((root / MANIFEST).read_bytes())["settings"]
        return bool(settings["labels_file"] or settings["labels"] != "none")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):      # there is none, or one of something else
        return False


def _readings(root: Path, files: Sequence[Path], rule: str) -> Iterator[tuple[str, list[str]]]:
    """The classes that files may have, each with the rule that tells them, by `rule` first."""
    by_prefix = [("prefix", names) for names in [_by_prefix(files)] if names is not None]
    if rule == "prefix":
        yield from by_prefix
    yield from (("folders", names) for names in _by_folders(root, files))
    if rule != "prefix":
        yield from by_prefix


def _by_prefix(files: Iterable[Path]) -> list[str] | None:
    """What stands before the first underscore; None where one has none."""
    prefixes = [_prefix(path) for path in files]
    return prefixes if all(prefixes) else None


def _prefix(path: Path) -> str:
    """What stands before the first underscore of a file's name; empty where it has none."""
    prefix, underscore, _ = path.name.partition("_")
    return prefix if underscore else ""


def _by_folders(root: Path, files: Iterable[Path]) -> Iterator[list[str]]:
    """The folders that files lie in, for each level at which all lie in one: first the highest with several."""
    parts = [path.relative_to(root).parts[:-1] for path in files]
    levels = range(min(map(len, parts), default=0))
    telling = [level for level in levels if any(part[level] != parts[0][level] for part in parts)]
    first = telling[:1] or list(levels)[-1:]
    for level in [*first, *(level for level in levels if level not in first)]:
        yield [part[level] for part in parts]


def _without_class(root: Path, files: Iterable[Path], rule: str) -> UserError:
    if rule == "folders":
        path = next(path for path in files if path.parent == root)
        return UserError(f"{path}: has no class, with --classes folders it must lie in a folder of its class below "
                         f"{root}")
    path = next(path for path in files if not _prefix(path))
    return UserError(f"{path}: has no class, its name must be CLASS_anything{path.suffix}, or all images must lie in "
                     "folders of their classes (--classes folders)")


# Names that are stored


def names_of_run(folder: Path) -> ClassNames | None:
    """The classes that the training in a folder has; None where there is none, or it stored no names.

    Its config.json and its state say them, and either may be gone. Raises UserError where they contradict each other,
    or the state is damaged.
    """
    path, state = folder / "config.json", folder / "state.safetensors"
    saved = stored_names(state) if state.exists() else None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return saved
    if not isinstance(record, dict) or KEY not in record:
        return saved
    names = ClassNames.from_json(record[KEY], str(path))
    if saved is not None and saved.names != names.names:
        raise UserError(f"{path}: has {names}, and {state.name} beside it was trained on {saved}; put the right file "
                        "back")
    return names


def stored_names(path: str | Path) -> ClassNames | None:
    """The classes that a checkpoint states; None where it states none. Raises UserError as `read_metadata`."""
    metadata = checkpoint.read_metadata(path)
    if KEY not in metadata:
        return None
    try:
        value = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        value = None
    return ClassNames.from_json(value, str(path))


def label_number(text: str, files: Iterable[str], words: Sequence[str]) -> str:
    """`--labels` with the number of a class in place of its name.

    text: a name, or a number: of the class that has it, unless there is none and a class is called so. files: the
    checkpoints, of which the first that states names counts. words: what else may be given, beside a file. Raises
    UserError for a name where none does, and for another name.
    """
    is_number = text.isascii() and text.isdigit()
    names = first_names(files) if is_number else first_names(files, stored_names)
    if is_number:
        return text if names is None or text not in names.names else _meant(text, names)
    if names is not None and text in names.names:
        return str(names.number(text))
    classes = "a class by its number, as the checkpoint states no names" if names is None else f"one of the {names}"
    near = nearest(text, [*words, *(() if names is None else names.names)])
    raise UserError(f"--labels {cut(text)}: must be {', '.join(words)}, a .npy file, or {classes}{near}")


def _meant(text: str, names: ClassNames) -> str:
    """The number that a word means that is the name of a class, and may be the number of another one; says which."""
    called = names.number(text)
    if len(text) > len(str(len(names))) or int(text) >= len(names):
        return str(called)
    if int(text) != called:
        _log.info("--labels %s: is the number of the class %s; %s", text, names.names[int(text)], names.called(text))
    return text


def class_called(text: str, files: Iterable[str]) -> str:
    """Which number has the class whose name is a word that `--labels` takes in another way; "" where there is none.

    files: the checkpoints, of which the first that states names counts.
    """
    names = first_names(files)
    return "" if names is None or text not in names.names else names.called(text)


def _names_in(path: str) -> ClassNames | None:
    """The classes that a file states, where it is a checkpoint at all; guidance methods may have other files."""
    return stored_names(path) if checkpoint.damage(Path(checkpoint.locate(path))) is None else None


def first_names(files: Iterable[str], read: Callable[[str], ClassNames | None] = _names_in) -> ClassNames | None:
    """The classes that the first of these checkpoints states which states any; None where none does.

    read: what gives the classes of a file. "" is no file, and a function states nothing.
    """
    return next((names for path in files if path and not is_function(path) and (names := read(path)) is not None), None)


def check_same_names(files: Mapping[str, str], images: ClassNames | None = None) -> None:
    """Raises UserError where two checkpoints, given by flag, call the same numbers by other names.

    images: the classes of training images, which the checkpoints must have as well.
    """
    first = None if images is None else ("the training images have", images)
    for flag, path in files.items():
        names = _names_in(path)
        if names is None:
            continue
        if first is not None and names.names != first[1].names:
            raise UserError(f"--{flag} {without_secrets(path)}: has {names}, and {first[0]} {first[1]}; they must be "
                            "trained on the same ones")
        first = first or (f"--{flag} {without_secrets(path)} has", names)
