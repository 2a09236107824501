"""Features of the images of a file: computed once, by all ranks together, and kept in files that are mapped.

Memory holds one batch only: the features of 50,000 images take 1 GB on the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_folder
from guided_diffusion.npz import BatchFile
from guided_diffusion.progress import progress_bar


class Features(NamedTuple):
    """The features of N images; float32 arrays."""

    pooled: np.ndarray              # (N, D), averages over the last feature map: FID, precision, recall
    spatial: np.ndarray             # (N, ...), a few channels of an earlier map with their places: sFID
    probabilities: np.ndarray       # (N, classes), sum 1: Inception Score


class FeatureExtractor(Protocol):
    """A network that turns images into features; `evaluations.extractors.EXTRACTORS` lists those that there are.

    `name` and `fingerprint` (SHA-256 of the weights) stand in every result. `caveat` is a sentence that readers of its
    numbers must know, or "".
    """

    @property
    def name(self) -> str:
        """The name in words."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, in hexadecimal digits."""

    @property
    def caveat(self) -> str:
        """What readers of the numbers must know, or ""."""

    def features(self, images: np.ndarray) -> Features:
        """Features of images (N, H, W, 3), uint8."""


@contextmanager
def feature_folder(cache: str | Path | None) -> Iterator[Path]:
    """The folder for features: `cache`, made where it is missing, or a temporary one for the length of the block.

    Raises UserError where `cache` cannot be written, and without it where the ranks are on several machines.
    """
    if cache:
        yield check_folder("--cache", cache)
        return
    folder = Path(tempfile.gettempdir()) / f"features-{_shared_token()}"
    with dist_util.together():
        if dist_util.is_main():
            folder.mkdir()
    with dist_util.together():
        if not folder.is_dir():
            raise UserError("--cache is not given: the ranks are on several machines, so it must name a folder that "
                            "all of them share")
    try:
        yield folder
        dist_util.barrier()
    finally:
        if dist_util.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def extract(images: BatchFile, extractor: FeatureExtractor, folder: Path, batch_size: int,
            num_images: int | None = None) -> Features:
    """Computes the features of the first `num_images` images (None: of all), as arrays mapped from files in `folder`.

    Each rank takes one batch after another in turn. A file whose features `folder` already holds is not read again.
    Raises UserError for a damaged file, and, naming the image, for features that are not finite.
    """
    total = len(images) if num_images is None else num_images
    done = folder / f"{images.sha256[:32]}-{extractor.fingerprint[:32]}-{total}"
    with dist_util.together():
        known = done.is_dir()
    if not known:
        partial = folder / f".{done.name}-{_shared_token()}"
        try:
            _compute(images, extractor, partial, batch_size, total)
            with dist_util.together():
                if dist_util.is_main() and not done.is_dir():
                    os.replace(partial, done)
        finally:
            if dist_util.is_main():
                shutil.rmtree(partial, ignore_errors=True)
    return Features(*(np.load(done / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Features._fields))


def _compute(images: BatchFile, extractor: FeatureExtractor, folder: Path, batch_size: int, total: int) -> None:
    ranks, rank = dist_util.world_size(), dist_util.rank()
    batches = images.batches(batch_size, slice(rank, None, ranks), total)
    with progress_bar(total, images.path.name, "img") as progress:
        for first in range(0, total, ranks * batch_size):
            features: Features | None = None
            with dist_util.together():
                start, batch = next(batches, (total, None))
                if batch is not None:
                    features = _checked_features(extractor, batch, images, start)
                    if start == 0:
                        _create_files(folder, features, total)
            with dist_util.together():
                if features is not None:
                    _write_rows(folder, features, start)
            progress.update(min(ranks * batch_size, total - first))


def _checked_features(extractor: FeatureExtractor, batch: np.ndarray, images: BatchFile, start: int) -> Features:
    """Features of a batch, each flattened to (n, D), checked to be finite."""
    try:
        features = extractor.features(batch)
    except UserError as error:
        raise UserError(f"{images.path}: {error}") from None
    flat = Features(*(values.reshape(len(values), -1) for values in features))
    for name, values in zip(Features._fields, flat, strict=True):
        good = np.isfinite(values).all(axis=1)
        if not good.all():
            raise UserError(f"{images.path}: the {name} features of image {start + int(good.argmin())} are not finite")
    return flat


def _create_files(folder: Path, features: Features, total: int) -> None:
    folder.mkdir()
    for name, values in zip(Features._fields, features, strict=True):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (total, values.shape[1]))


def _write_rows(folder: Path, features: Features, start: int) -> None:
    for name, values in zip(Features._fields, features, strict=True):
        rows = np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
        rows[start:start + len(values)] = values


def _shared_token() -> str:
    """Draws a random word that is the same on all ranks."""
    token = torch.tensor(int.from_bytes(os.urandom(7)), device=dist_util.dev())
    dist_util.sync_params([token])
    return f"{int(token):x}"
