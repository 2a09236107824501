"""The folder of a training as a model: which of its files is sampled, and the classifier beside it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .checkpoint import read_metadata
from .errors import UserError
from .stated import PROCESS, Statement, statement_of

SUFFIX = ".safetensors"
NAMES = "class_names"           # of classes, in metadata
CONFIG, GUIDANCE_KEY = "config.json", "guidance"        # of a folder, and what it says of guidance that suits the model


def best_weights(folder: Path) -> Path:
    """The weights to sample from: the moving average with the largest rate, else the latest weights.

    Without a rate, the narrowest average by a power function comes first. Raises UserError where the folder holds none
    of these.
    """
    rates, widths = _averages(folder, "ema_"), _averages(folder, "ema_power_")
    if rates or widths:
        return rates[max(rates)] if rates else widths[min(widths)]
    latest = folder / f"model{SUFFIX}"
    if latest.is_file():
        return latest
    raise UserError(f"--model {folder}: holds no weights of a training, neither ema_RATE{SUFFIX} nor {latest.name}")


def _averages(folder: Path, prefix: str) -> dict[float, Path]:
    """The files of moving averages by the number after the prefix; those with another word there are left out."""
    found = {}
    for path in folder.glob(f"{prefix}*{SUFFIX}"):
        with contextlib.suppress(ValueError):
            found[float(path.stem.removeprefix(prefix))] = path
    return found


def guidance_in(folder: Path) -> dict[str, Any]:
    """The flags of guidance that suit the model of an exported folder; none where its config.json names none.

    Raises UserError where they are no numbers and texts by name.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}               # the weights state the network, and need no such file
    found = content.get(GUIDANCE_KEY, {}) if isinstance(content, dict) else {}
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        raise UserError(f"{path}: its {GUIDANCE_KEY} must be values by the names of flags")
    return found


def classifiers_beside(model: Statement, folder: Path) -> list[Path]:
    """The weights of the classifier that belongs to the model of a training's folder: one file, or none.

    It lies in that folder, in a folder in it, or in one beside it, and was trained for images of the same size and
    noise, and for classes of the same names as far as both state these; one that states clean images is left out. Where
    several fit, the one named like the folder (runs/x, runs/x_classifier) is meant, or the one that lies within. Where
    that leaves it open, all of these are returned.
    """
    folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    inside = [*_files(folder), *(path for inner in _folders(folder) for path in _files(inner))]
    beside = [path for near in _folders(folder.parent) if near.name != folder.name for path in _files(near)]
    named = [path for path in beside if path.parent.name in _names(folder.name)]
    for found in (inside, named, beside):
        fitting = [path for path in found if _fits(model, path)]
        if fitting:
            return fitting
    return []


def is_own(classifier: Path, folder: Path) -> bool:
    """Whether a classifier lies in the folder of a training, at any depth, or in one beside it that is named like it.

    Any other that `classifiers_beside` finds may be of another training, of images and classes of its own.
    """
    inner, outer = Path(os.path.abspath(classifier)), Path(os.path.abspath(folder))
    return inner.is_relative_to(outer) or (inner.parent.parent == outer.parent
                                           and inner.parent.name in _names(outer.name))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    """What may be the weights of a classifier in a folder: those of a training of it, or a file named so."""
    return [path for name in ("model", "classifier") if (path := folder / f"{name}{SUFFIX}").is_file()]


def _names(name: str) -> list[str]:
    return [f"{name}_classifier", f"{name}-classifier", f"classifier_{name}"]


def _fits(model: Statement, path: Path) -> bool:
    classifier = statement_of(path, "classifier")
    if classifier is None or classifier.noised is False:
        return False
    shared = ["image_size", "in_channels", *PROCESS, *(["num_classes"] if model.facts.get("class_cond") else [])]
    names = [read_metadata(one).get(NAMES) for one in (model.path, path)]
    return (all(model.facts.get(name) == classifier.facts.get(name) for name in shared)
            and (None in names or names[0] == names[1]))
