"""Class accuracy: the share of samples that a classifier of clean images names as the class asked for.

A sample file holds arr_0, (N, 32, 32, 3) uint8, and arr_1, (N,) the classes asked for. CLASSIFIERS lists what there is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guided_diffusion.classes import ClassNames
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable, write_json
from guided_diffusion.image_datasets import named_labels
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, option
from guided_diffusion.runs.comparison import names_of_samples, say_once

from .extractors import EXTRACTORS
from .extractors.base import IMAGE_SIZE
from .image_sets import check_named_once, open_images

AT_A_TIME = 1000        # images that are read together


class Classifier(Protocol):
    """A classifier of clean images (N, 32, 32, 3), which took no part in sampling.

    test_accuracy: the share of real test images that it names rightly.
    """

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, in order."""

    @property
    def test_accuracy(self) -> float:
        """See above."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The class of each image, (N,) int64."""


def _classifier_of_clothes() -> Classifier:
    from .extractors.fashion_mnist import load_fashion_mnist

    return load_fashion_mnist()


def _classifier_of_icons() -> Classifier:
    from .extractors.icons import IconsClassifier, load_layer

    layer = load_layer()
    EXTRACTORS["photo"].check()
    return IconsClassifier(layer, EXTRACTORS["photo"].load(device="cpu"))


CLASSIFIERS: dict[str, Callable[[], Classifier]] = {"fashion_mnist": _classifier_of_clothes,
                                                   "icons": _classifier_of_icons}


@dataclass(frozen=True)
class ClassAccuracyOptions(Options):
    """The measurement."""

    classifier: str = option("fashion_mnist", "what names the classes: fashion_mnist, of clothes; icons, of category "
                             "and drawing style, which needs the extra `photo`", choices=tuple(CLASSIFIERS),
                             old_names=("judge",))
    json: str = option("", "also write the figures to this file")


def read_labelled_samples(path: str | Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads images (N, 32, 32, 3) uint8 and labels (N,) int64, in the numbers of `class_names`, of a sample file.

    Raises UserError where it holds anything else, and as `read_labels_by_name`.
    """
    file, labels = _open_labelled_samples(path, class_names)
    return _all_images(file), labels


def _open_labelled_samples(path: str | Path, class_names: Sequence[str]) -> tuple[BatchFile, np.ndarray]:
    """As `read_labelled_samples`, the images unread."""
    file = open_images(path)
    if len(file) == 0:
        raise UserError(file.without_images)
    labels = read_labels_by_name(file, class_names)
    if file.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(f"{path}: arr_0 is {file.shape}, must be (N, 32, 32, 3) uint8")
    return file, labels


def _all_images(file: BatchFile) -> np.ndarray:
    return np.concatenate([images for _, images in file.batches(AT_A_TIME)])


def read_labels_by_name(file: BatchFile, class_names: Sequence[str], num_images: int | None = None) -> np.ndarray:
    """Reads the labels of the first `num_images` (None: of all) of a sample file, in the numbers of `class_names`.

    Returns (num_images,) int64.
    Where the file names its classes, or the network of the sampling run does, those of the same names are meant; else
    the numbers are, which is said where it has other names alone. Raises UserError where it holds no labels, and for a
    class that is none of them.
    """
    labels = read_labels(file, num_images)
    _, stored = named_labels(file.path, labels, where=str(file.path))
    stated = stored or names_of_samples(file.path)
    if stated is not None:
        if set(stated.names) & set(class_names):
            known = ClassNames(tuple(class_names), source="the classifier")
            return known.renumbered(_below(labels, len(stated), file.path), stated, file.path)
        say_once(f"{file.path}: has {stated}; the classifier calls none of its classes so, their numbers are compared",
                 logging.INFO)
    return _below(labels, len(class_names), file.path)


def read_labels(file: BatchFile, num_images: int | None = None) -> np.ndarray:
    """Reads the labels (num_images,) int64 of the first images of a sample file; num_images: None for all.

    Raises UserError where it holds none.
    """
    path = file.path
    if "arr_1" not in file.members:
        raise UserError(f"{path}: has no labels, arr_1 must be (N,), as samples of a network with classes have")
    labels = file.read("arr_1")
    if labels.shape != (len(file),) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: arr_1 is {labels.shape} {labels.dtype}, must be ({len(file)},) whole numbers")
    labels = labels[:num_images]
    if labels.max() > np.iinfo(np.int64).max:
        raise UserError(f"{path}: arr_1 has the label {labels.max()}, which is none of a class")
    return labels.astype(np.int64)


def _below(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """Returns the labels; raises UserError where they are not all from 0 to below `classes`."""
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: arr_1 has labels {labels.min()} to {labels.max()}, must be 0 to {classes - 1}")
    return labels


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The bounds of Wilson's score interval of a share (Wilson 1927); z = 1.96 gives the 95 % interval."""
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure_class_accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Measures the class accuracy with its 95 % interval, over all images and for each class that was asked for.

    images: (N, 32, 32, 3) uint8. labels: (N,), the classes asked for. `correct` counts the images that the
    classifier names as the class asked for, and `share` is the accuracy.
    """
    right = classifier.predict(images) == labels
    classes = {classifier.class_names[number]: _accuracy(right[labels == number]) for number in np.unique(labels)}
    return {**_accuracy(right), "classes": classes}


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    """The accuracy in results; right: (N,) bool."""
    correct, images = int(right.sum()), len(right)
    return {"images": images, "correct": correct, "share": correct / images,
            "interval95": wilson_interval(correct, images)}


def accuracy_table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each file: its number of images, its accuracy and the interval; then a line for each class."""
    width = max(len("file"), *map(len, results))
    lines = [f"{'file':{width}}  images    accuracy  95 % interval"]
    for name, result in results.items():
        low, high = result["interval95"]
        lines.append(f"{name:{width}}  {result['images']:6d}  {result['share']:10.1%}  {low:.1%} to {high:.1%}")
    lines += ["", f"{'class':{width}}  images    accuracy"]
    for name, result in results.items():
        lines.append(name)
        for class_name, share in result["classes"].items():
            lines.append(f"{'  ' + class_name:{width}}  {share['images']:6d}  {share['share']:10.1%}")
    return "\n".join(lines)


def class_accuracy(samples: Sequence[str], options: ClassAccuracyOptions) -> str:
    """Measures sample files; returns their table, and how good the classifier is on real images.

    Raises UserError, before the first image is classified, for a file that is no sample file with labels or is named
    twice, and where --json cannot be written.
    """
    check_named_once(samples)
    check_writable("--json", options.json, read=samples)
    classifier = CLASSIFIERS[options.classifier]()
    opened = {name: _open_labelled_samples(name, classifier.class_names) for name in samples}
    results = {name: measure_class_accuracy(classifier, _all_images(file), labels)
               for name, (file, labels) in opened.items()}
    if options.json:
        write_json(options.json, {"classifier": options.classifier, "test_accuracy": classifier.test_accuracy,
                                  "files": results})
    return (f"{accuracy_table(results)}\n\nThe classifier of clean images is right on {classifier.test_accuracy:.1%} "
            "of the real test images; it took no part in sampling.")
