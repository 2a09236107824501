"""The images that a run upsamples: image i of the run begins with image i of a file of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ..classes import ClassNames
from ..dist_util import say
from ..errors import UserError
from ..image_datasets import checked_classes, grey, named_labels
from ..late import Tensor, torch
from ..npz import BatchFile
from ..pixels import from_uint8
from .comparison import names_of_samples
from .labels import Labels
from .record import samples_of

OF_BASE = "base"        # as --labels: the classes of these images
DIGESTS = "base"        # the array in a file of samples that tells what they were upsampled from
DIGEST = 16             # bytes that tell an image from all others
AT_A_TIME = 64          # images that are read together


class BaseImages:
    """The images of `--base_samples`, by number; after the last one they begin again, as in the official code.

    path: a file of samples (.npz, images in arr_0, classes in arr_1), or the output folder of a finished run. size: the
    height and width that they must have. channels: 3, or 1 for grey. Raises UserError for anything else.

    stage: how often they were upsampled themselves, as the digests say that an upsampling run leaves with its images.
    """

    def __init__(self, path: str, size: int, channels: int) -> None:
        where = f"--base_samples {path}"
        if channels not in (1, 3):
            raise UserError(f"{where}: its images are RGB, and the network upsamples images of {channels} channels")
        if not path:
            raise UserError("--base_samples is not given: name the file of the images to upsample, or the output "
                            "folder of a sampling run")
        try:
            self.file = BatchFile(samples_of(Path(path)) if Path(path).is_dir() else path)
            self.stage = _times_upsampled(self.file)
        except UserError as error:
            raise UserError(f"--base_samples {error}") from None
        if not len(self.file):
            raise UserError(f"--base_samples {self.file.without_images}")
        if self.file.shape[1:3] != (size, size):
            raise UserError(f"{where}: its images are {self.file.resolution}, and the network upsamples images of "
                            f"--small_size {size}")
        self.path, self.channels = path, channels

    def __len__(self) -> int:
        """Number of images in the file."""
        return len(self.file)

    def say_repeated(self, count: int) -> None:
        """Says on the first rank where a run makes more images than there are here."""
        if count > len(self):
            say(f"--num_samples {count}: --base_samples holds {len(self)} images, which begin again after the last")

    def low_res(self, image_ids: Sequence[int]) -> Tensor:
        """The images of these numbers as the network sees them, (N, C, h, w) float32 in [-1, 1]."""
        pixels = self.file.pick([image_id % len(self) for image_id in image_ids])
        return torch.from_numpy(from_uint8(grey(pixels) if self.channels == 1 else pixels)).movedim(3, 1).contiguous()

    def check_all(self) -> None:
        """Reads all images; raises UserError where some cannot be read, or hold no 8-bit values."""
        try:
            _ = self._digests
        except UserError as error:
            raise UserError(f"--base_samples {error}") from None

    def digests(self, image_ids: Sequence[int]) -> np.ndarray:
        """What tells each of these images from others: (N, DIGEST) uint8, one more where `stage` is not 0, which it is.

        So the same images, upsampled with the noise of another stage, are others.
        """
        return self._digests[np.asarray(image_ids) % len(self)]

    @cached_property
    def _digests(self) -> np.ndarray:
        stage = bytes([self.stage]) if self.stage else b""
        found = [hashlib.blake2b(image.tobytes(), digest_size=DIGEST).digest() + stage
                 for _, images in self.file.batches(AT_A_TIME) for image in images]
        return np.frombuffer(b"".join(found), np.uint8).reshape(len(self), -1)

    def labels(self, num_classes: int, known: ClassNames | None = None) -> Labels:
        """The classes of the images.

        known: the classes of the network that upsamples. Where those of the images have names as well, from the file or
        from the network that made it, the same names are meant; else the same numbers are. Raises UserError where the
        file has no classes, or others than there are.
        """
        labels, where = self.file.labels, f"--labels base: {self.file.path}"
        if labels is None:
            raise UserError(f"{where} holds no classes (arr_1); pass others, like --labels random")
        labels, names = named_labels(self.file.path, checked_classes(where, labels, len(self)), known, where)
        made_with = names_of_samples(self.file.path) if names is None and known is not None else None
        found = torch.from_numpy(taken_labels(labels, num_classes, made_with, known, where))
        return lambda image_ids: found[[image_id % len(self) for image_id in image_ids]]


def _times_upsampled(file: BatchFile) -> int:
    """How often the images of a file were upsampled, 0 where no upsampling run left it."""
    if DIGESTS not in file.members:
        return 0
    shape, dtype = file.header(DIGESTS)
    if dtype != np.uint8 or shape not in ((len(file), DIGEST), (len(file), DIGEST + 1)):
        return 0                        # something else by that name
    return 1 + int(file.read(DIGESTS)[:, DIGEST:].max(initial=0))


def taken_labels(labels: np.ndarray, num_classes: int, made_with: ClassNames | None, known: ClassNames | None,
                 where: str) -> np.ndarray:
    """The classes of images, (N,) int64, by the numbers of the network that upsamples them, which has `num_classes`.

    made_with, known: the names of the classes for the network that made them, and for this one; None where there are
    none. Raises UserError, beginning with `where`, for a class that this network has not.
    """
    most = num_classes if made_with is None or known is None else len(made_with)
    wrong = np.flatnonzero((labels < 0) | (labels >= most))
    if len(wrong):
        raise UserError(f"{where}: class {labels[wrong[0]]} of image {wrong[0]} must be from 0 to {most - 1}")
    return labels if made_with is None or known is None else known.renumbered(labels, made_with, where)
