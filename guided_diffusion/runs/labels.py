"""Labels of a run's images: each a function of the seed and the index of its image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import UserError
from ..late import Tensor, torch
from ..npz import read_npy
from ..options import cut, whole_number
from ..rng import image_labels

ANY_LABELS = ("random", "balanced")
NONE = "none"                   # images of no class
Labels = Callable[[Sequence[int]], Tensor]          # indices of images -> (N,) int64


def make_labels(text: str, *, seed: int, num_classes: int, num_samples: int, null_class: bool = False) -> Labels:
    """Makes labels as `--labels` says: random, balanced, a class, or a .npy file of (num_samples,) classes or more.

    Where the network has a null class, "none" gives all images its label, num_classes.

    Raises UserError for anything else, for a class that there is not, and for a file that is too short.
    """
    if text == "random":
        return lambda image_ids: image_labels(seed, image_ids, num_classes)
    if text == "balanced":
        return lambda image_ids: torch.tensor(image_ids) % num_classes
    if text == NONE:
        if not null_class:
            raise UserError("--labels none: the network was not trained to do without a label (--label_dropout)")
        return lambda image_ids: torch.full((len(image_ids),), num_classes)
    if is_file(text):
        labels = _read(text, num_classes, num_samples)
        return lambda image_ids: labels[list(image_ids)]
    label = whole_number(text)
    if label is None or label >= num_classes:
        raise UserError(f"--labels {cut(text)}: must be a class from 0 to {num_classes - 1}")
    return lambda image_ids: torch.full((len(image_ids),), label)


def is_file(text: str) -> bool:
    """Whether `--labels` names a file of labels."""
    return text.lower().endswith(".npy")


def is_class(text: str) -> bool:
    """Whether `--labels` is the name or the number of a class: none of the words, no file."""
    return text not in (*ANY_LABELS, NONE) and not is_file(text)


def _read(path: str, num_classes: int, num_samples: int) -> Tensor:
    labels = read_npy(path, "is not a .npy file of whole numbers", flag="--labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"--labels {path}: must hold whole numbers, one for each image")
    if len(labels) < num_samples:
        raise UserError(f"--labels {path}: holds {len(labels)} labels, and image {num_samples - 1} needs one")
    labels = labels[:num_samples]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(f"--labels {path}: label {labels[wrong[0]]} of image {wrong[0]} must be a class from 0 to "
                        f"{num_classes - 1}")
    return torch.from_numpy(labels.astype(np.int64))
