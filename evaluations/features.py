"""Features of the images of a file: computed once, by all ranks together, and kept in files that are mapped.

Memory holds one batch only: the features of 50,000 images take 1 GB on the disk.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, resumable
from guided_diffusion.files import check_folder, json_digest, reason
from guided_diffusion.late import torch
from guided_diffusion.npz import BatchFile
from guided_diffusion.progress import progress_bar
from guided_diffusion.scratch import disown, publish, remove_abandoned, scratch_folder
from guided_diffusion.version import __version__

from . import feature_files
from .feature_files import Features

__all__ = ["FeatureExtractor", "Features", "extract", "feature_folder", "first_features", "own_folder"]

PARTIAL = r"\.[0-9a-f]{32}-[0-9a-f]{32}-[0-9]+-[0-9a-f]+|\.own-[0-9a-f]{14}"      # folders of half-made features
TEMPORARY = "features-[0-9a-f]{14}"                             # and of the folder that stands in for --cache

_log = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """A network that turns images into features; `evaluations.extractors.EXTRACTORS` lists those that there are.

    `name` and `fingerprint` (SHA-256 of the weights) stand in every result. `caveat` is a sentence that readers of its
    numbers must know, or "".

    An extractor may also have `settings`, names and values of what its features depend on besides the weights and the
    versions of the libraries, like {"dtype": "bfloat16"}: features in --cache that were made with other ones are not
    used.
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

    What killed processes left there is removed. Raises UserError where `cache` cannot be written, and without it where
    the ranks are on several machines.
    """
    if cache:
        folder = check_folder("--cache", cache)
        if dist_util.is_main():
            remove_abandoned(folder, PARTIAL)
        with resumable():
            yield folder
        return
    folder = Path(tempfile.gettempdir()) / f"features-{_shared_token()}"
    with _made_by_main(folder):
        with dist_util.together():
            if not folder.is_dir():
                raise UserError("--cache is not given: the ranks are on several machines, so it must name a folder "
                                "that all of them share")
        yield folder
        dist_util.barrier()


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """A folder in that for features which this job alone uses, on all ranks, for the length of the block."""
    own = folder / f".own-{_shared_token()}"
    with _made_by_main(own):
        yield own


def extract(images: BatchFile, extractor: FeatureExtractor, folder: Path, batch_size: int,
            num_images: int | None = None) -> Features:
    """Computes the features of the first `num_images` images (None: of all), as arrays mapped from files in `folder`.

    Each rank takes one batch after another in turn. A file whose features `folder` already holds is not read again:
    they must be of the same extractor, settings and versions, and agree with their checksums, else they are made anew.
    Raises UserError for a damaged file, for one that changes meanwhile, and, naming the image, for features that are
    not finite.
    """
    total = len(images) if num_images is None else num_images
    made_of = _made_of(images, extractor, total)
    done = _place(images, folder, made_of)
    if not _is_known(done, made_of, images):
        partial = folder / f".{done.name}-{_shared_token()}"
        with _made_by_main(partial):
            _compute(images, extractor, partial, batch_size, total)
            with dist_util.together():
                images.check_unchanged()        # else they would be kept under the digest of others
                if dist_util.is_main():
                    feature_files.seal(partial, made_of)
                    _publish(partial, done, made_of)
    return feature_files.mapped(done)


def first_features(images: BatchFile, extractor: FeatureExtractor, folder: Path, num_images: int) -> Features:
    """The features of the first image, (1, D) each, for what can be refused before the others are read.

    They are those that `extract` left in `folder`, where it did. Raises UserError as that.
    """
    try:
        found = feature_files.mapped(_place(images, folder, _made_of(images, extractor, num_images)))
    except UserError:               # they are not there, or damaged, and will be made
        _, first = next(images.batches(1, num_images=1))
        return _checked_features(extractor, first, images, 0)
    return Features(*(values[:1] for values in found))


def _place(images: BatchFile, folder: Path, made_of: Mapping[str, Any]) -> Path:
    """The folder of features that were made of this and with this."""
    return folder / f"{images.sha256[:32]}-{json_digest(made_of)[:32]}-{made_of['num_images']}"


def _made_of(images: BatchFile, extractor: FeatureExtractor, total: int) -> dict[str, Any]:
    """All that the features depend on, as JSON has it."""
    return {"images": images.sha256, "num_images": total, "extractor": extractor.name,
            "weights": extractor.fingerprint, "settings": dict(getattr(extractor, "settings", {})),
            "versions": {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__}}


def _is_known(done: Path, made_of: Mapping[str, Any], images: BatchFile) -> bool:
    """Whether the features are there and whole, as the first rank sees it; it removes those that are not."""
    known = False
    with dist_util.together():
        if dist_util.is_main() and done.is_dir():
            disown(done)
            fault = feature_files.fault(done, made_of)
            known = not fault
            if fault:
                _log.warning(f"{done}: the features of {images.path.name} are damaged ({fault}) and are made again")
                shutil.rmtree(done, ignore_errors=True)
    return bool(_shared(int(known)))


@contextmanager
def _made_by_main(folder: Path) -> Iterator[None]:
    """A scratch folder that the first rank makes, for the length of the block; UserError where it cannot."""
    with ExitStack() as stack:
        with dist_util.together():
            if dist_util.is_main():
                remove_abandoned(folder.parent, PARTIAL if folder.name.startswith(".") else TEMPORARY)
                try:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(scratch_folder(folder))
                except OSError as error:
                    raise UserError(f"{folder.parent}: cannot be written ({reason(error)})") from None
        yield


def _publish(partial: Path, done: Path, made_of: Mapping[str, Any]) -> None:
    try:
        publish(partial, done)
    except OSError as error:
        if not done.is_dir() or feature_files.fault(done, made_of):         # else another evaluation was faster
            raise UserError(f"{done}: cannot be written ({reason(error)})") from None


def _compute(images: BatchFile, extractor: FeatureExtractor, folder: Path, batch_size: int, total: int) -> None:
    ranks, rank = dist_util.world_size(), dist_util.rank()
    batches = images.batches(batch_size, slice(rank, None, ranks), total)
    widths: list[int] = []
    with progress_bar(total, images.path.name, "image") as progress:
        for first in range(0, total, ranks * batch_size):
            features: Features | None = None
            with dist_util.together():
                start, batch = next(batches, (total, None))
                if batch is not None:
                    features = _checked_features(extractor, batch, images, start)
                    if start == 0:
                        feature_files.create(folder, features, total)
            with dist_util.together():
                if features is not None:
                    widths = widths or [values.shape[1] for values in feature_files.mapped(folder)]
                    _check_widths(features, widths, extractor, images, start)
                    feature_files.write_rows(folder, features, start, total)
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


def _check_widths(features: Features, widths: Sequence[int], extractor: FeatureExtractor, images: BatchFile,
                  start: int) -> None:
    """Raises UserError where a batch has other widths than the first one, by which the files were made."""
    for name, values, width in zip(Features._fields, features, widths, strict=True):
        if values.shape[1] != width:
            raise UserError(f"{images.path}: {extractor.name} gives {values.shape[1]} {name} features of image "
                            f"{start} and {width} of image 0: there must be equally many of each, whatever "
                            "images it sees together")


def _shared_token() -> str:
    """Draws a random word that is the same on all ranks."""
    return f"{_shared(secrets.randbits(56)):014x}"


def _shared(number: int) -> int:
    """The number that the first rank gives, below 2^63, on all ranks."""
    shared = torch.tensor(number, device=dist_util.dev())
    dist_util.sync_params([shared])
    return int(shared)
