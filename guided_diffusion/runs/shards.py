"""The finished chunks of a run as files: written whole or not at all, checked before they are used again.

    OUT/.lock                  held by the job that works there
    OUT/shards/run.json        what the images depend on; of a shorter run than the one before it, `longer`: that one's
    OUT/shards/000123.npz      one chunk: images, labels, numbers (the indices of the images), run, rank, seconds; base
    OUT/run.json               the record of the finished run
    OUT/run_500.json           that of another of this configuration, of 500 images, which was finished there before

`run` is the fingerprint of what the images depend on; rank and seconds say who made them, and how long it took. `base`
tells the images that they were upsampled from, where they were.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import files
from ..classes import KEY, ClassNames
from ..errors import UserError
from ..fetch import sha256_of
from ..npz import BatchFile, Chunk, prepare_samples
from ..pixels import file_channels
from .base_images import DIGEST, DIGESTS
from .chunk_files import REMEDY, ChunkFiles, DamagedError
from .chunks import Indices
from .record import READ_ERRORS, checked_record, difference, identity, read_record

__all__ = ["DamagedError", "Shards", "holder", "locked", "samples_file"]

LabelArrays = Callable[[Sequence[int]], "np.ndarray | None"]
PICTURE = "grid.png"            # of the first samples
Digests = Callable[[Sequence[int]], np.ndarray]

LOG = logging.getLogger(__name__)


def samples_file(out: Path, num_samples: int, image_size: int, in_channels: int) -> Path:
    """The file of all samples of a run; in_channels: of the network."""
    return out / f"samples_{num_samples}x{image_size}x{image_size}x{file_channels(in_channels)}.npz"


@dataclass(frozen=True)
class Shards(ChunkFiles):
    """The chunks of one sampling run in its folder."""

    FOLDER: ClassVar = "shards"
    CONTENT: ClassVar = "samples"

    labels: LabelArrays | None = None       # labels that the chunks must have; None: any
    base: Digests | None = None             # what tells the images that they must be upsampled from; None: any
    class_names: ClassNames | None = None   # of the labels, for the packed file; None: not known

    @property
    def _in_channels(self) -> int:
        return int(self.configuration.get("in_channels", 3))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (N, H, W, C) of all images together."""
        size = self.configuration["image_size"]
        return self.num_samples, size, size, file_channels(self._in_channels)

    @property
    def samples(self) -> Path:
        """The file of all samples."""
        return samples_file(self.out, self.num_samples, self.configuration["image_size"], self._in_channels)

    def identify(self, configuration: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
        """What the images of a run depend on, by flag name."""
        return identity(configuration, sha256)

    def is_whole(self, arrays: Mapping[str, np.ndarray], count: int) -> bool:
        """Whether these arrays are those of a chunk of `count` images."""
        images = arrays["images"]
        return (images.shape == (count, *self.shape[1:]) and images.dtype == np.uint8
                and ("labels" not in arrays or arrays["labels"].shape == (count,)))

    @property
    def record(self) -> Path:
        """The file that says of the finished run what its images depend on, and how they were made."""
        return self.out / "run.json"

    # One shard

    def save(self, index: int, images: np.ndarray, labels: np.ndarray | None, rank: int = 0,
             seconds: float = 0.0) -> None:
        """Writes a chunk, or its first images (n, H, W, C) uint8, labels (n,) int64; see `write`."""
        self.write(index, {"images": images, **({} if labels is None else {"labels": labels})}, rank, seconds)

    def write(self, index: int, arrays: Mapping[str, Any], rank: int = 0, seconds: float = 0.0) -> None:
        """As `ChunkFiles.write`, with what tells the images that they were upsampled from."""
        image_ids = self.chunks[index][:len(arrays["images"])]
        beside = {} if self.base is None else {DIGESTS: self.base(image_ids)}
        super().write(index, {**arrays, **beside}, rank, seconds)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk, as `ChunkFiles.read`; raises UserError also for other labels and bases."""
        arrays = super().read(index)
        path, image_ids = self.path(index), self.chunks[index][:len(arrays["numbers"])]
        if self.labels is not None and not _equal(self.labels(image_ids), arrays.get("labels")):
            raise UserError(f"{path}: has other labels than --labels {self.configuration['labels']} gives; {REMEDY}")
        self._check_base(path, image_ids, arrays.get(DIGESTS))
        return arrays

    def _check_base(self, path: Path, image_ids: Sequence[int], found: np.ndarray | None) -> None:
        """Raises UserError where images were upsampled from others than now, or with other noise; found: their digests.

        The digests of images that had been upsampled as often have as many bytes.
        """
        if self.base is None or _equal(expected := self.base(image_ids), found):
            return
        samples = f"--base_samples {self.configuration['base_samples']}"
        if found is not None and found.ndim == 2 and _equal(expected[:, :DIGEST], found[:, :DIGEST]):
            before = ", as by versions that gave upsamplers in a row the same" * (found.shape[1] == DIGEST)
            raise UserError(f"{path}: was upsampled with other noise{before}: it follows from how often the images of "
                            f"{samples} were upsampled before; {REMEDY}")
        raise UserError(f"{path}: was upsampled from other images than those of {samples}; {REMEDY}")

    # All of them

    def prepare(self, overwrite: bool) -> Indices | None:
        """Makes the folder ready and returns the chunks to sample; None where the run is finished.

        Keeps what this run, or a shorter or longer one, has finished. Raises UserError, having changed nothing,
        where the folder holds anything of another run or anything damaged.
        """
        earlier = None if overwrite else self.check()
        if earlier and earlier.num_samples == self.num_samples:
            if (record := self._aside(self.num_samples)).exists():
                self.set_record_aside()
                os.replace(record, self.record)
                (self.out / PICTURE).unlink(missing_ok=True)        # of the other run
            return None
        replaced = [*self.folder.glob("*"), *self._set_aside()] if overwrite else []
        missing = Indices.without(len(self.chunks), ()) if overwrite else self.missing()
        files.remove_leftovers(self.out, "samples_*.npz.*")         # they take space
        self._check_space(missing, sum(path.stat().st_size for path in replaced))
        if overwrite:
            self.remove()
            for path in self._set_aside():
                path.unlink()
        self.begin()
        if earlier:
            there = range(earlier.num_samples)
            candidates = itertools.takewhile(lambda index: self.chunks[index].start in there, missing)
            parts = {index: there[self.chunks[index].start:self.chunks[index].stop] for index in candidates}
            kept = {index: part for index, part in parts.items() if len(part) > self.count(index)}
            samples = BatchFile(earlier.samples, self.shape[3])
            for (index, part), images in zip(kept.items(), samples.images(kept.values()), strict=True):
                self.save(index, images, _cut(samples.labels, part))
            missing = self.missing()
        return missing

    def check(self) -> Shards | None:
        """A finished run in this folder, of this configuration; UserError where it holds another, or is damaged."""
        earlier = self.recorded()
        if earlier is not None:
            if sha256_of(earlier.samples) != earlier.sha256.get("samples"):
                raise UserError(f"{earlier.samples}: is damaged or was changed; {REMEDY}")
            self._check_labels(earlier)
        return earlier

    def recorded(self) -> Shards | None:
        """A finished run in this folder, of this configuration, by its record; UserError where one is of another.

        Of several, the one of as many images, else the longest.
        """
        self.check_begun()
        found = [run for record in (self.record, *self._set_aside()) if (run := self._of_record(record))]
        return max(found, key=lambda run: (run.num_samples == self.num_samples, run.num_samples), default=None)

    def _of_record(self, record: Path) -> Shards | None:
        """The finished run of a record; None where there is none, or its samples are gone."""
        if not record.exists():
            return None
        try:
            content = read_record(record)
            earlier = Shards(self.out, content["configuration"], content["sha256"], self.labels)
            different = difference(earlier.identity, self.identity)
            exists = different is None and earlier.samples.exists()
        except READ_ERRORS:
            different, exists = "", False
        if different is not None and self.begun() != self.identity:        # else its overwriting was allowed before
            raise UserError(f"--out {self.out}: holds samples of another configuration "
                            f"({f'{different} differs' if different else f'its {record.name} is unreadable'}); "
                            f"{REMEDY}")
        return earlier if exists else None

    def _aside(self, num_samples: int) -> Path:
        return self.out / f"run_{num_samples}.json"

    def _set_aside(self) -> list[Path]:
        """The records of runs of other numbers of images."""
        return sorted(path for path in self.out.glob("run_*.json") if re.fullmatch(r"run_[0-9]+\.json", path.name))

    def set_record_aside(self) -> None:
        """Makes room for the record of this run: one of another number of images is kept under another name."""
        other = self._of_record(self.record)
        if other is None or other.num_samples == self.num_samples:
            self.record.unlink(missing_ok=True)
        else:
            os.replace(self.record, self._aside(other.num_samples))

    def _check_labels(self, earlier: Shards) -> None:
        both = range(min(earlier.num_samples, self.num_samples))
        samples = BatchFile(earlier.samples, self.shape[3])
        base = samples.read(DIGESTS) if DIGESTS in samples.members else None
        self._check_base(earlier.samples, both, _cut(base, both))
        if self.labels is None or _equal(self.labels(both), _cut(samples.labels, both)):
            return
        raise UserError(f"{earlier.samples}: has other labels than --labels {self.configuration['labels']} gives; "
                        f"{REMEDY}")

    def _check_space(self, missing: Indices, freed: int = 0) -> None:
        """Raises UserError where the disk cannot hold the pixels of the missing chunks, and of all once more.

        The chunks stay until they are packed. freed: bytes of files that are removed before the first chunk is made.
        """
        needed = (self.chunks.images_in(missing) + self.num_samples) * math.prod(self.shape[1:]) - freed
        files.check_space(self.out, needed, f"--num_samples {self.num_samples}: {self.folder} cannot hold that",
                          "as chunks and packed")

    def pack(self) -> tuple[Path, list[dict[str, Any]]]:
        """A checked temporary file of all samples, and how each chunk was made; UserError where one is no good."""
        timing: list[dict[str, Any]] = []

        def arrays() -> Iterator[Chunk]:
            for index, image_ids in enumerate(self.chunks):
                try:
                    chunk = self.read(index)
                except FileNotFoundError:
                    raise UserError(f"{self.path(index)}: is gone; start the same command again") from None
                if len(chunk["numbers"]) != len(image_ids):
                    raise UserError(f"{self.path(index)}: was changed; start the same command again")
                timing.append({"first": image_ids.start, "images": len(image_ids), "rank": int(chunk["rank"]),
                               "seconds": round(float(chunk["seconds"]), 3)})
                yield chunk["images"], chunk.get("labels")
        beside = {} if self.base is None else {DIGESTS: self.base(range(self.num_samples))}
        if self.class_names is not None:
            beside[KEY] = np.array(self.class_names.to_json())
        return prepare_samples(arrays(), self.shape, self.samples, beside), timing

    # Longer runs, whose chunks are there too

    def manifest(self) -> dict[str, Any]:
        """What the folder says of the run whose chunks are there, and of a longer one that has some, too."""
        longer = self._longer()
        return {**super().manifest(), **({} if longer is None else {"longer": longer.manifest()})}

    def _longer(self) -> Shards | None:
        """The longest run of this configuration that was begun here, where it has more images; None else."""
        runs = []
        with suppress(*READ_ERRORS):
            before = json.loads((self.folder / "run.json").read_text())
            for content in (before, before.get("longer")):
                record = checked_record(content)
                run = Shards(self.out, record["configuration"], record["sha256"])
                if run.num_samples > self.num_samples and difference(run.identity, self.identity) is None:
                    runs.append(run)
        if not runs:
            count = max([len(self.chunks), *(number + 1 for number in self._numbered())]) * self.chunks.size
            longer = Shards(self.out, {**self.configuration, "num_samples": count}, self.sha256)
            if self._has_more(longer):                      # whose record is gone
                runs.append(longer)
        return max(runs, key=lambda run: run.num_samples, default=None)

    def _has_more(self, longer: Shards) -> bool:
        """Whether the chunks of a longer run hold images that are none of this one."""
        last = len(self.chunks) - 1
        if max(self._numbered(), default=0) > last:
            return True
        try:
            return bool(longer.read(last)["numbers"][-1] >= self.num_samples)
        except (FileNotFoundError, UserError):
            return False

    # The end

    def settle(self, keep: bool) -> bool:
        """Removes the chunks of the finished run, unless `keep`; returns whether a longer one has more of them.

        Then all stay, those of the longer one, which goes on with them.
        """
        longer = self._longer()
        if longer is not None and self._has_more(longer):
            longer.begin()
            if not keep:
                LOG.info("%s: its chunks stay, as a run of %d images has more of them", self.folder, longer.num_samples)
            return True
        if not keep:
            self.remove()
        return False

    def tidy(self) -> None:
        """Removes the folder of shards where none is finished."""
        if not any(self.folder.glob("*.npz")):
            self.remove()


def locked(out: Path) -> AbstractContextManager[None]:
    """Holds the folder of a run for one job; UserError where another works there. The lock ends with its process."""
    return files.only_job(out)


def holder(out: Path) -> str | None:
    """Who holds the folder, in words; None where no one does."""
    return files.lock_holder(out / files.LOCK)


def _cut(array: np.ndarray | None, indices: range) -> np.ndarray | None:
    return None if array is None else array[indices.start:indices.stop]


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)
