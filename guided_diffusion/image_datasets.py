"""Training images: folders of image files, IDX files (the format of MNIST and Fashion-MNIST) and files of samples.

Batch `b` of a run is a function of (seed, b, rank, world_size) alone, so a resumed run sees the batches that an
uninterrupted one would have seen, and two ranks with batch B see together what one rank with batch 2B sees. Where the
size of batches changes, the images go on behind those that were read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import itertools
import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from PIL import Image

from .classes import SHOWN, ClassNames
from .cores import reading_threads
from .dist_util import say
from .errors import UserError
from .files import reason
from .image_files import (
    BackgroundCheck,
    FoundPictures,
    OtherColours,
    Resized,
    count_decoded,
    damaged_error,
    damaged_pictures,
    find_pictures,
    read_image,
)
from .late import Tensor, torch
from .launchers import launched
from .npz import BLOCK, MAX_RATIO, SMALL, check_brightest, check_brightness, is_npz, read_arrays
from .pixels import file_channels, from_uint8
from .rng import stream_generator

_log = logging.getLogger(__name__)

FASHION_MNIST = "fashion-mnist"  # as a data_dir: the files that the Debian package installs
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_PREFIXES = {"train": "train", "test": "t10k"}
MIN_CROP_FRACTION = 0.8  # a random crop keeps at least this share of the smaller side

ImageBatch = tuple[Tensor, dict[str, Tensor]]          # images, and {"y": labels} or {}


def load_data(
    *, data_dir: str | os.PathLike, batch_size: int, image_size: int, class_cond: bool = False,
    deterministic: bool = False, random_crop: bool = False, random_flip: bool = True, in_channels: int = 3,
    split: str = "train", seed: int = 0, start_batch: int = 0, rank: int | None = None,
    world_size: int | None = None,
) -> Iterator[ImageBatch]:
    """Endless batches of (images, {"y": labels}), or (images, {}) without class_cond.

    images: (batch_size, in_channels, image_size, image_size), float32 in [-1, 1]; labels: (batch_size,), int64.

    data_dir: a folder that is searched for pictures (`image_files.IMAGE_SUFFIXES`) at any depth, whose classes
        `classes` explains; or a folder with IDX files; or "fashion-mnist" (or nothing): where Debian's package
        dataset-fashion-mnist puts them; or an .npz file of images of this size, as sampling runs and
        `scripts/scenes_render.py` write them: arr_0 (N, H, W, 3) uint8, arr_1 classes (N,), and
        class_names (K,) where the classes have names.
    deterministic: images in the order of their names (or of the IDX file), not shuffled anew in every epoch.
    random_crop: cut folder images at random instead of from the centre; others are never cropped.
    random_flip: mirror half of the images left to right.
    in_channels: 3, or 1 for grey; others need an .npz file with as many.
    split: "train" or "test" of the IDX files; an image folder has only "train".
    start_batch: index of the first batch, to go on where an interrupted run stopped.
    rank, world_size: which share of the images these batches are; None: that of this process in its job.

    The arguments, the names of the files and the headers of images are checked in this call, and whole images in the
    background: UserError.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    images = open_images(data_dir, (in_channels, image_size, image_size), split=split, class_cond=class_cond)
    images = images.without(images.damaged())
    job = launched()
    return images.batches(BatchPlan(
        images.count, batch_size=batch_size, seed=seed, shuffle=not deterministic, flip=random_flip, crop=random_crop,
        rank=job.rank if rank is None else rank, world_size=job.size if world_size is None else world_size),
        start_batch)


def open_images(data_dir: str | os.PathLike, frame: tuple[int, int, int], *, split: str = "train",
                class_cond: bool = False, classes: str = "", known: ClassNames | None = None,
                skip_damaged: bool | None = False) -> TrainingImages:
    """The images of `data_dir`, found as `load_data` says, and what a training must know of them.

    Pictures in files are not opened yet: `TrainingImages.damaged` looks for those that cannot be read.

    frame: channels, height and width in training. classes: the rule of `ClassNames.from_images`, and of `read`. known:
    the classes and their numbers, where they have been decided before. skip_damaged: leave damaged pictures of a folder
    out; None: the command has no such option, and its errors do not name it.
    """
    if min(frame[1:]) < 1:
        raise UserError(f"--image_size {min(frame[1:])}: must be at least 1")
    folder = find_data(data_dir)
    if frame[0] not in (1, 3) and not is_npz(folder):
        raise UserError(f"--in_channels {frame[0]}: pictures have 1 channel (grey) or 3; for others --data_dir must be "
                        f"an .npz file whose arr_0 is (N, H, W, {frame[0]}) uint8")
    labels: np.ndarray | None
    if holds_idx(folder):
        images, labels = load_arrays(folder, split)
        check_fits(images, frame[1])
        with contextlib.suppress(UserError):            # of a folder that cannot be read, and need not be
            if beside := len(find_pictures(folder).files):
                say(f"{data_dir}: its IDX files are read, and {beside} picture(s) beside them are not")
        return ArrayImages(data_dir, frame, labels if class_cond else None, images)
    if split != "train":
        kind = "an .npz file" if is_npz(folder) else "an image folder"
        raise UserError(f"--data_dir {folder}: {kind} has no {split} split, name one of its own for it")
    if is_npz(folder):
        images, labels = load_npz(folder, frame, class_cond)
        labels, names = (labels, None) if labels is None else named_labels(folder, labels, known)
        return ArrayImages(data_dir, frame, labels, images, names)
    files = list_images(folder)
    labels, names = None, None
    if class_cond:
        names, labels = (known or ClassNames.from_images(folder, files, classes)).read(folder, files, classes)
        if classes and names.rule != classes:
            say(f"--classes {classes}: does not tell the {names} in {data_dir}; there it is {names.rule}")
    return FolderImages(data_dir, frame, labels, files, names, skip_damaged, count_decoded(files))


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """Images of a data_dir that are found and checked.

    frame: channels, height and width in training. labels: (N,) int64, None where there are none.
    """

    data_dir: str | os.PathLike
    frame: tuple[int, int, int]
    labels: np.ndarray | None

    @property
    def count(self) -> int:
        """The number of images."""
        raise NotImplementedError

    @property
    def class_names(self) -> ClassNames | None:
        """The names of their classes; None where only numbers are known, or nothing."""
        return None

    def shared_with(self, others: TrainingImages) -> int:
        """How many of these images are among the others, too, as the same file, or in the same one."""
        here, there = os.path.realpath(self.data_dir), os.path.realpath(others.data_dir)
        return self.count if here == there and os.path.isfile(here) else 0

    def check_classes(self, num_classes: int, trained: bool = False, resumed: bool = False) -> None:
        """Raises UserError unless a network of so many classes fits; says what classes there are.

        trained: the network is, so that the images have to fit it. resumed: see `ClassNames.check`.
        """
        if self.class_names is not None:
            self.class_names.check(num_classes, self.data_dir, trained, resumed)
            say(f"{self.class_names}{f' (--classes {self.class_names.rule})' if self.class_names.rule else ''}")
        if self.labels is None:
            return
        greatest = int(self.labels.max())
        if greatest >= num_classes:
            if trained:
                raise UserError(f"--data_dir {self.data_dir}: has more classes than the network, which knows "
                                f"{num_classes}; the greatest is {greatest}, as they count from 0")
            raise UserError(f"--num_classes {num_classes}: {self.data_dir} has more classes, the greatest is "
                            f"{greatest}; pass --num_classes {greatest + 1}")
        if greatest + 1 < num_classes and self.class_names is None and not trained:
            say(f"{self.data_dir}: has classes from 0 to {greatest}, --num_classes is {num_classes}: the network "
                f"never sees the others and should not be asked for them; --num_classes {greatest + 1} fits")

    def without_images(self) -> str:
        """The classes with names that have no image, as a line of a log; "" where all have some."""
        if self.class_names is None or self.labels is None:
            return ""
        there = set(np.unique(self.labels).tolist())
        names = [f"{number} {name}" for number, name in enumerate(self.class_names.names) if number not in there]
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        return f"{self.data_dir}: has no image of {len(names)} of its classes: {shown}" if names else ""

    def damaged(self) -> dict[int, str]:
        """The images whose damage shows quickly: what is wrong, by index; raises UserError where all are too dark."""
        return {}

    def check_first(self, count: int) -> None:
        """Raises UserError where one of the first images is damaged, or all are too dark; reads each as a whole."""

    def without(self, damaged: Mapping[int, str]) -> TrainingImages:
        """Without these images; raises UserError unless they may be left out."""
        return self

    def batches(self, plan: BatchPlan, start_batch: int) -> Iterator[ImageBatch]:
        """Endless batches, from `start_batch` on."""
        raise NotImplementedError

    def at(self, indices: Sequence[int]) -> ImageBatch:
        """The images of these numbers as they are: in the middle of the frame, and not mirrored."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ArrayImages(TrainingImages):
    """Images in memory, (N, H, W), which are padded to the frame, or (N, H, W, C), which fill it."""

    images: np.ndarray
    names: ClassNames | None = None

    @property
    def class_names(self) -> ClassNames | None:
        """The names of their classes; None where only numbers are known."""
        return self.names

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.images)

    def batches(self, plan: BatchPlan, start_batch: int) -> Iterator[ImageBatch]:
        """Endless batches, from `start_batch` on."""
        for index in itertools.count(start_batch):
            indices, flips = plan.indices(index), plan.flips(plan.draws(index))
            chosen = self.images[indices]
            chosen[flips] = chosen[flips, :, ::-1]
            yield self._framed(chosen), _conditions(self.labels, indices)

    def at(self, indices: Sequence[int]) -> ImageBatch:
        """The images of these numbers."""
        rows = np.asarray(indices)
        return self._framed(self.images[rows]), _conditions(self.labels, rows)

    def _framed(self, images: np.ndarray) -> Tensor:
        if self.images.ndim == 3:
            return pad_to_frame(images, self.frame)
        pixels = grey(images) if self.frame[0] == 1 else images
        return torch.from_numpy(from_uint8(pixels)).movedim(3, 1)


@dataclasses.dataclass(frozen=True)
class FolderImages(TrainingImages):
    """Pictures in files, decoded as they are needed.

    A picture that turns out to be damaged ends the batches with a UserError; with `skip_damaged` the next one that is
    whole takes its place, so that batches stay a function of the files.

    decoded: how many of the first files have been decoded, so that they are known to be whole.
    """

    files: list[Path]
    names: ClassNames | None = None
    skip_damaged: bool | None = False
    decoded: int = 0
    said: dict[int, UserError] = dataclasses.field(default_factory=dict, init=False, compare=False)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.files)

    def shared_with(self, others: TrainingImages) -> int:
        """How many of these images are among the others, too: folders are searched at any depth."""
        here, there = (Path(os.path.realpath(images.data_dir)) for images in (self, others))
        if not isinstance(others, FolderImages) or not (here.is_relative_to(there) or there.is_relative_to(here)):
            return 0
        known = set(map(os.path.realpath, others.files))
        return sum(os.path.realpath(file) in known for file in self.files)

    @property
    def class_names(self) -> ClassNames | None:
        """The names of their classes; None where none were asked for."""
        return self.names

    def damaged(self) -> dict[int, str]:
        """The pictures whose damage shows quickly: what is wrong, by index.

        Says how many have other colour profiles, and how many are enlarged. Raises UserError where those that are
        decoded for that hold ones, and nothing brighter.
        """
        found = self._damaged_among(self.files, self.decoded)
        self._check_brightness([path for index, path in enumerate(self.files[:self.decoded]) if index not in found])
        return found

    def check_first(self, count: int) -> None:
        """Raises UserError where one of the first pictures is damaged, or all are too dark; decodes each of them.

        Says how many have other colour profiles, and how many are enlarged or reduced.
        """
        files = self.files[:count]
        if found := self._damaged_among(files, len(files), reduced=True):
            raise self._damaged(found.values())
        self._check_brightness(files)

    def _damaged_among(self, files: Sequence[Path], decoded: int, reduced: bool = False) -> dict[int, str]:
        """As `damaged_pictures`; says what is done to the colours and sizes of others. reduced: as in `Resized`."""
        colours, resized = OtherColours(), Resized(self.frame[1])

        def look(path: Path, image: Image.Image) -> None:
            colours.look(path, image)
            resized.look(path, image)

        found = damaged_pictures(files, decoded, look)
        say(colours.line(self.data_dir))
        say(resized.line(self.data_dir, reduced))
        return found

    def _check_brightness(self, files: Sequence[Path]) -> None:
        """Raises UserError where these pictures, which are whole, hold ones and nothing brighter.

        They are decoded up to the first one that is bright, which is the first one of all in nearly every folder.
        """
        brightest = 0
        for path in files:
            with contextlib.suppress(UserError):        # of what is found damaged only now, which training says
                brightest = max(brightest, int(np.asarray(read_image(path, 3)).max()))
            if brightest > 1:
                return
        count = f"{len(files)}" if len(files) == self.count else f"first {len(files)}"
        check_brightest(f"--data_dir {self.data_dir}", count, brightest)

    def without(self, damaged: Mapping[int, str]) -> FolderImages:
        """Without these pictures; raises UserError unless they may be skipped."""
        if not damaged:
            return self
        if not self.skip_damaged:
            raise self._damaged(damaged.values())
        if len(damaged) == self.count:
            raise UserError(f"--data_dir {self.data_dir}: all {self.count} images are damaged, the first is "
                            f"{damaged[0]}")
        say(f"{self.data_dir}: left out {len(damaged)} damaged image(s), the first is {next(iter(damaged.values()))}")
        kept = [index for index in range(self.count) if index not in damaged]
        labels = None if self.labels is None else self.labels[kept]
        return dataclasses.replace(self, files=[self.files[index] for index in kept], labels=labels,
                                   decoded=sum(index < self.decoded for index in kept))

    def batches(self, plan: BatchPlan, start_batch: int) -> Iterator[ImageBatch]:
        """Endless batches, from `start_batch` on; files that were not decoded before are, in the background."""
        check = BackgroundCheck([] if self.skip_damaged else self.files[self.decoded:][plan.rank::plan.world_size])
        with reading_threads() as pool, check:

            def begin(batch: int) -> list[Future]:
                return [pool.submit(self._decode, index, plan, draw)
                        for index, draw in zip(plan.indices(batch).tolist(), plan.draws(batch), strict=True)]

            following = begin(start_batch)
            for batch in itertools.count(start_batch + 1):
                decoding, following = following, begin(batch)
                decoded = [future.result() for future in decoding]
                if check.found:
                    raise self._damaged(check.found)
                yield self._batch(decoded)

    def at(self, indices: Sequence[int]) -> ImageBatch:
        """The images of these numbers, or those that take their places, cut from the centre."""
        plan = BatchPlan(self.count, batch_size=1, seed=0, shuffle=False, flip=False, crop=False, rank=0, world_size=1)
        return self._batch([self._decode(index, plan, np.ones(4)) for index in indices])

    def _batch(self, decoded: Sequence[tuple[int, np.ndarray]]) -> ImageBatch:
        """Decoded images, with the labels of the indices that they have after all."""
        indices = np.array([index for index, _ in decoded])
        return torch.from_numpy(np.stack([pixels for _, pixels in decoded])), _conditions(self.labels, indices)

    def _decode(self, index: int, plan: BatchPlan, draw: np.ndarray) -> tuple[int, np.ndarray]:
        """One augmented image, (C, H, W) float32 in [-1, 1], and the index that it has after all."""
        for other in itertools.chain(range(index, self.count), range(index)) if self.skip_damaged else [index]:
            try:
                image = read_image(self.files[other], self.frame[0])
                return other, augmented(image, self.frame, plan, draw)
            except UserError as error:
                if not self.skip_damaged:
                    raise self._damaged([str(error)]) from None
                if self.said.setdefault(other, error) is error:         # in one step, as threads decode
                    _log.warning("left out a damaged image: %s", error)
        raise UserError(f"--data_dir {self.data_dir}: all {self.count} images are damaged")

    def _damaged(self, found: Iterable[str]) -> UserError:
        return damaged_error(found, advise=self.skip_damaged is not None)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which images a rank sees in which batch, and the random numbers that each is augmented with.

    The epochs, each a permutation of all images, follow each other in one long row. Batch b of all ranks together is
    the b-th stretch of that row, so batches run on over the end of an epoch.

    moved: by how many images all stretches lie further on in the row, where batches before had another size.
    """

    num_images: int
    batch_size: int
    seed: int
    shuffle: bool
    flip: bool
    crop: bool
    rank: int
    world_size: int
    moved: int = 0

    def begun(self, batch: int, images: int) -> BatchPlan:
        """With that batch directly behind the first `images` images of the row."""
        return dataclasses.replace(self, moved=images - batch * self.world_size * self.batch_size)

    def indices(self, batch: int) -> np.ndarray:
        """Images of this rank's batch: (batch_size,), int64 in [0, num_images)."""
        first = self.moved + (batch * self.world_size + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.num_images)
        if not self.shuffle:
            return places
        pieces = [_epoch_order(self.seed, epoch, self.num_images)[places[epochs == epoch]]
                  for epoch in np.unique(epochs).tolist()]
        return np.concatenate(pieces)

    def draws(self, batch: int) -> np.ndarray:
        """(batch_size, 4), uniform in [0, 1): a row for each image's flip, crop size, crop top and crop left."""
        generator = stream_generator("augmentation", self.seed, batch)
        rows = generator.random((self.world_size * self.batch_size, 4))
        return rows[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]

    def flips(self, draws: np.ndarray) -> np.ndarray:
        """Which images to mirror: (batch_size,), bool."""
        return (draws[:, 0] < 0.5) & self.flip


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return stream_generator("order", seed, epoch).permutation(num_images)


@contextlib.contextmanager
def given_as(flag: str) -> Iterator[None]:
    """Within, errors that begin with --data_dir begin with the option that the data were given by, "" for none."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("--data_dir "):
            raise
        raise UserError(f"{flag} {text.removeprefix('--data_dir ')}".lstrip()) from None


# IDX files


def find_data(data_dir: str | os.PathLike) -> Path:
    """The folder or .npz file that `data_dir` names; raises UserError where there is none."""
    if str(data_dir) in ("", FASHION_MNIST):
        if DEBIAN_FASHION_MNIST.is_dir():
            return DEBIAN_FASHION_MNIST
        raise UserError(f"--data_dir {FASHION_MNIST}: not found in {DEBIAN_FASHION_MNIST}; run `apt-get install "
                        "dataset-fashion-mnist`, or name a folder with its four files (train-images-idx3-ubyte.gz, "
                        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz)")
    place = Path(data_dir)
    if not (place.is_dir() or (is_npz(data_dir) and place.is_file())):
        fault = "is neither a folder nor an .npz file" if place.exists() else "no such folder"
        raise UserError(f"--data_dir {data_dir}: {fault} (a folder of images or IDX files, an .npz file, or "
                        f"{FASHION_MNIST})")
    samples = next(place.glob("samples_*.npz"), None) if (place / "run.json").is_file() else None
    if samples:
        raise UserError(f"--data_dir {data_dir}: is the folder of a sampling run; name its file of samples, {samples}")
    return place


def holds_idx(folder: Path) -> bool:
    """Whether the folder holds IDX files under their usual names, plain or gzipped."""
    return any(folder.glob("*-idx[13]-ubyte")) or any(folder.glob("*-idx[13]-ubyte.gz"))


def load_arrays(data_dir: str | os.PathLike = FASHION_MNIST, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split of IDX files: (N, H, W) uint8 and (N,) int64.

    Raises UserError where files are missing, damaged, or don't belong together, or no pixel is above 1.
    """
    if split not in IDX_PREFIXES:
        raise UserError(f"split {split}: must be one of {', '.join(IDX_PREFIXES)}")
    folder, prefix = find_data(data_dir), IDX_PREFIXES[split]
    images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"--data_dir {folder}: {len(images)} {split} images but {len(labels)} labels, "
                        "the files don't belong together")
    if len(images) == 0:
        raise UserError(f"--data_dir {folder}: the {split} files hold no image")
    check_brightness(f"--data_dir {folder}", images)
    return images, labels.astype(np.int64)


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"--data_dir {folder}: has neither {name} nor {name}.gz")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file, plain or gzipped; raises UserError where it is damaged or of another shape.

    The header is 0, 0, type (8: uint8), number of dimensions, then each dimension as a big-endian int32.
    """
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(start)
            if len(head) < start or head[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(f"{path}: is not an IDX file of bytes with {dimensions} dimension(s)")
            shape = np.frombuffer(head, ">i4", offset=4).tolist()
            size = _idx_size(path, shape)
            content = bytearray()
            while len(content) <= size and (block := stream.read(min(BLOCK, size + 1 - len(content)))):
                content += block          # one byte more than there should be tells that the file is longer
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read, it is damaged or truncated ({reason(error)})") from None
    if len(content) < size:
        raise UserError(f"{path}: is truncated, it has {start + len(content)} bytes where its header says "
                        f"{start + size}")
    if len(content) > size:
        raise UserError(f"{path}: is damaged, it has more bytes than the {start + size} that its header says")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_size(path: Path, shape: Sequence[int]) -> int:
    """The bytes that an array takes; raises UserError for a shape that no images have."""
    size, stored = math.prod(shape), path.stat().st_size
    shown = " x ".join(map(str, shape))
    if shape[0] < 0 or min(shape[1:], default=1) < 1:
        raise UserError(f"{path}: is damaged, its header says {shown}")
    if size > SMALL and size > MAX_RATIO * stored:
        raise UserError(f"{path}: is damaged, its header says {shown}, which {stored} bytes do not hold")
    return size


def check_fits(images: np.ndarray, image_size: int) -> None:
    """Raises UserError unless the (N, H, W) images fit in a square of image_size pixels."""
    if max(images.shape[1:]) > image_size:
        raise UserError(f"--image_size {image_size}: must be at least {max(images.shape[1:])}, the size of the IDX "
                        "images, which are padded and never cut")


def pad_to_frame(images: np.ndarray, frame: tuple[int, int, int]) -> Tensor:
    """(N, H, W) uint8 in the middle of black frames: (N, *frame), float32 in [-1, 1], grey repeated over channels."""
    height, width = images.shape[1:]
    top, left = (frame[1] - height) // 2, (frame[2] - width) // 2
    framed = np.full((len(images), *frame), -1, np.float32)
    framed[:, :, top:top + height, left:left + width] = from_uint8(images)[:, None]
    return torch.from_numpy(framed)


# Files of samples


def load_npz(path: str | os.PathLike, frame: tuple[int, int, int], labelled: bool,
             ) -> tuple[np.ndarray, np.ndarray | None]:
    """All images of an .npz file, (N, H, W, C) uint8, and, if `labelled`, labels (N,) int64; C is 3 for grey.

    frame: channels, height and width in training. Raises UserError where the file is damaged, or its
    arrays are missing or of other shapes, or no pixel is above 1.
    """
    where = f"--data_dir {path}"
    images, *others = read_arrays(Path(path), ["arr_0", "arr_1"] if labelled else ["arr_0"],
                                  f"{where}: is not an .npz file of images, or is damaged")
    labels = others[0] if labelled else None
    expected = (*frame[1:], file_channels(frame[0]))
    if images is None or images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
        found = "is missing" if images is None else f"is {images.shape} {images.dtype}"
        raise UserError(f"{where}: arr_0 {found}, must be (N, {', '.join(map(str, expected))}) uint8")
    if labelled:
        labels = checked_classes(where, labels, len(images))
    check_brightness(where, images)
    return images, labels


def checked_classes(where: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    """The labels (N,) int64; raises UserError where they are not `count` classes."""
    if labels is None or labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: arr_1 must be the classes of the {count} images, as whole numbers")
    for extreme in (int(labels.min()), int(labels.max())):
        if not 0 <= extreme <= np.iinfo(np.int64).max:          # also what would wrap from uint64
            raise UserError(f"{where}: arr_1 has the class {extreme}, classes are from 0 up")
    return labels.astype(np.int64)


def named_labels(path: str | os.PathLike, labels: np.ndarray, known: ClassNames | None = None, where: str = "",
                 ) -> tuple[np.ndarray, ClassNames | None]:
    """The labels (N,) int64 in an .npz file and the names of their classes, None where it has none.

    known: the names and their numbers that have been decided before, in which the labels then are. where: how messages
    begin. Raises UserError where `class_names` is no list of names, or has too few, and for a class that is none of
    the known ones.
    """
    where = where or f"--data_dir {path}"
    stored, = read_arrays(Path(path), ["class_names"], f"{where}: is not an .npz file of images, or is damaged")
    if stored is None:
        return labels, None
    names = ClassNames.from_json(stored.tolist() if stored.dtype.kind == "U" and stored.ndim == 1 else None, where)
    names = dataclasses.replace(names, source="")
    wrong = labels[(labels < 0) | (labels >= len(names))]
    if len(wrong):
        raise UserError(f"{where}: arr_1 has the class {wrong[0]}, and its class_names are {names}")
    return (labels, names) if known is None else (known.renumbered(labels, names, where), known)


def grey(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 1) uint8 of (N, H, W, 3) uint8, as Pillow rounds its weights, in 65536ths, and their sums."""
    red, green, blue = (images[..., channel].astype(np.int32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[..., None]


# Image folders


def list_images(folder: Path) -> list[Path]:
    """The image files at any depth below the folder, in sorted order; raises UserError where there is none.

    Links to folders are followed, hidden and other files are left out, which is said.
    """
    found = _pictures(folder)
    say_left_out(found, folder)
    return found.files


def say_left_out(found: FoundPictures, folder: Path) -> None:
    """Logs on the first rank, in one line, what of a folder was left out; nothing where all of it was taken."""
    say(found.line(folder))


def _pictures(folder: Path) -> FoundPictures:
    found = find_pictures(folder)
    if not found.files:
        there = f" (left out: {found})" if found.left_out else ""
        raise UserError(f"--data_dir {folder}: holds neither image files (png, jpg, webp, bmp, tif, gif and the like) "
                        f"nor IDX files{there}")
    return found


def resize_smaller_side(image: Image.Image, size: int,
                        last: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Halved by averaging while both sides stay at least `size`, then by `last`, so that the smaller side is `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), last)


def crop_square(image: Image.Image, size: int, draws: tuple[float, float] | None = None) -> Image.Image:
    """A size x size part: the centre, or where `draws` (top, left), uniform in [0, 1), put it."""
    room_y, room_x = image.height - size, image.width - size
    y, x = (room_y // 2, room_x // 2) if draws is None else (int(draws[0] * (room_y + 1)), int(draws[1] * (room_x + 1)))
    return image.crop((x, y, x + size, y + size))


def augmented(image: Image.Image, frame: tuple[int, int, int], plan: BatchPlan, draw: np.ndarray) -> np.ndarray:
    """An image cut and mirrored as the plan says: (C, H, W), float32 in [-1, 1].

    frame: C, H and W, of which the last two are equal. draw: the image's row of `BatchPlan.draws`.
    """
    size = frame[1]
    if plan.crop:
        _, size_draw, top_draw, left_draw = draw.tolist()
        largest = math.ceil(size / MIN_CROP_FRACTION)
        resized = resize_smaller_side(image, size + int(size_draw * (largest - size + 1)))
        image = crop_square(resized, size, (top_draw, left_draw))
    else:
        image = crop_square(resize_smaller_side(image, size), size)
    pixels = np.asarray(image).reshape(size, size, frame[0])
    if plan.flips(draw[None])[0]:
        pixels = pixels[:, ::-1]
    return from_uint8(pixels).transpose(2, 0, 1)


def _conditions(labels: np.ndarray | None, indices: np.ndarray) -> dict[str, Tensor]:
    return {} if labels is None else {"y": torch.from_numpy(labels[indices])}
