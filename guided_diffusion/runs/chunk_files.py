"""The finished chunks of a run as files: written whole or not at all, checked before they are used again.

    OUT/FOLDER/run.json        what the results depend on
    OUT/FOLDER/000123.npz      one chunk: its arrays, numbers (the indices of the images), run, rank, seconds

`run` is the fingerprint of what the results depend on; rank and seconds say who made them, and how long it took. Every
other array has a row an image. So a shorter run takes the first rows of a chunk, and a longer one adds what it lacks.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import files
from ..errors import UserError
from ..npz import READ_ERRORS as NPZ_ERRORS
from ..npz import read_checked
from .chunks import Chunks, Indices
from .record import READ_ERRORS, difference

REMEDY = "name another folder, or pass --overwrite True"
ANEW = ", or pass --overwrite True to begin anew"


class DamagedError(UserError):
    """A file of a chunk cannot be read or holds something else than it should."""


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks of one run in its folder. Who extends this says what a chunk holds, and what it depends on.

    configuration: every option, by flag name. sha256: of the checkpoints in use, by the names of `record.name_of`.
    """

    out: Path
    configuration: Mapping[str, Any]
    sha256: Mapping[str, str]

    FOLDER: ClassVar[str]
    CONTENT: ClassVar[str]          # what the chunks hold, in words

    # What a chunk is

    def identify(self, configuration: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
        """What the results of a run depend on, by flag name; raises one of READ_ERRORS for a configuration of none."""
        raise NotImplementedError

    def is_whole(self, arrays: Mapping[str, np.ndarray], count: int) -> bool:
        """Whether these arrays are those of a chunk of `count` images."""
        raise NotImplementedError

    # What follows from it

    @property
    def folder(self) -> Path:
        """The folder of the finished chunks."""
        return self.out / self.FOLDER

    @property
    def num_samples(self) -> int:
        """Images of the run."""
        return self.configuration["num_samples"]

    @cached_property
    def chunks(self) -> Chunks:
        """The indices of the images of each chunk."""
        return Chunks(self.num_samples, self.configuration["batch_size"])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the results depend on, by flag name."""
        return self.identify(self.configuration, self.sha256)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, hexadecimal."""
        return files.json_digest(self.identity)

    def path(self, index: int) -> Path:
        """The file of a chunk, whether it is finished or not."""
        return self.folder / f"{index:06d}.npz"

    # One chunk

    def write(self, index: int, arrays: Mapping[str, Any], rank: int = 0, seconds: float = 0.0) -> None:
        """Writes the arrays of a chunk, or of its first images; rank and seconds tell how they were made."""
        numbers = np.asarray(self.chunks[index][:len(next(iter(arrays.values())))], np.int64)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, numbers=numbers, run=self.fingerprint, rank=rank, seconds=seconds)
        files.write(self.path(index), lambda file: file.write_bytes(buffer.getbuffer()), sync=True,
                    ending="finished chunks are kept: start the same command again to go on")

    def complete(self, index: int, make: Callable[[Sequence[int]], Mapping[str, Any]], rank: int = 0) -> None:
        """Makes the images that a chunk lacks, and writes them behind those that it has.

        make: gives the arrays of images by their numbers.
        """
        image_ids, began = self.chunks[index], time.monotonic()
        held = self._read_if_there(index)
        count = len(held["numbers"]) if held else 0
        # Fill stands for those that are there, so that each image has its place in the batch, as in a run without them.
        arrays = make([max(image_id, image_ids[count]) for image_id in image_ids])
        if held:
            arrays = {name: np.concatenate([held[name], array[count:]]) for name, array in arrays.items()}
            began -= float(held["seconds"])
        self.write(index, arrays, rank, time.monotonic() - began)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk.

        Raises FileNotFoundError; DamagedError where its bytes disagree with their checksums or shapes; UserError
        where it is of another run. A chunk of fewer images, from a shorter run, is read too, and of one of more, from
        a longer run, the first.
        """
        path, image_ids = self.path(index), self.chunks[index]
        try:
            arrays = read_checked(path)
            held = arrays["numbers"]
            whole = (len(held) > 0 and arrays["rank"].ndim == arrays["seconds"].ndim == 0
                     and self.is_whole(arrays, len(held)))
            run = str(arrays["run"])
        except FileNotFoundError:
            raise
        except NPZ_ERRORS as error:
            whole, run = False, str(error)
        if not whole:
            raise DamagedError(f"{path}: is damaged; delete it to have its images sampled again")
        if run != self.fingerprint or held[0] != image_ids.start or (np.diff(held) != 1).any():
            raise UserError(f"{path}: is of another run; {REMEDY}")
        return {name: array[:len(image_ids)] if array.ndim else array for name, array in arrays.items()}

    def _read_if_there(self, index: int) -> dict[str, np.ndarray] | None:
        try:
            return self.read(index)
        except FileNotFoundError:
            return None

    def count(self, index: int) -> int:
        """How many images of a chunk are there; raises as `read` does where it is no good."""
        held = self._read_if_there(index)
        return len(held["numbers"]) if held else 0

    # All of them

    def stored(self) -> list[int]:
        """The chunks of this run that have a file, whole or not."""
        return [index for index in self._numbered() if index < len(self.chunks)]

    def _numbered(self) -> list[int]:
        """The numbers of all files of chunks, also of those that only a longer run has."""
        stems = [path.stem for path in self.folder.glob("*.npz")]
        return sorted(int(stem) for stem in stems if re.fullmatch(r"[0-9]{6,12}", stem))

    def missing(self) -> Indices:
        """The chunks that are not finished; UserError for those of another run, and damaged ones."""
        finished, damaged = [], []
        for index in self.stored():
            try:
                if self.count(index) == len(self.chunks[index]):
                    finished.append(index)
            except DamagedError:
                damaged.append(self.path(index).name)
        if damaged:
            raise DamagedError(f"{self.folder}: {len(damaged)} damaged ({', '.join(damaged[:8])}); delete what is "
                               f"damaged to have it sampled again{ANEW}")
        return Indices.without(len(self.chunks), finished)

    def made_ready(self, overwrite: bool) -> Indices:
        """The chunks that are missing, with the folder ready for them. overwrite: all are, whatever was there.

        Raises UserError, having changed nothing, where the folder holds chunks of another run or damaged ones.
        """
        if overwrite:
            self.remove()
        self.check_begun()
        missing = self.missing()
        self.begin()
        return missing

    def begin(self) -> None:
        """Makes the folder ready, and says there of which run it is."""
        self.folder.mkdir(exist_ok=True)
        files.remove_leftovers(self.folder)
        files.write_text(self.folder / "run.json", json.dumps(self.manifest(), indent=2), sync=True,
                         ending="nothing was changed")

    def manifest(self) -> dict[str, Any]:
        """What the folder says of the run whose chunks are there."""
        return {"configuration": dict(self.configuration), "sha256": dict(self.sha256)}

    def begun(self) -> dict[str, Any] | None:
        """The identity of the run whose chunks are here; None where that cannot be read."""
        try:
            manifest = json.loads((self.folder / "run.json").read_text())
            return self.identify(dict(manifest["configuration"]), dict(manifest["sha256"]))
        except READ_ERRORS:
            return None

    def check_begun(self) -> None:
        """Raises UserError where the folder holds chunks of another run."""
        before = self.begun()           # without a record each chunk still says of which run it is
        if before is None or not any(self.folder.glob("*.npz")):
            return
        if different := difference(before, self.identity):
            unfinished = "" if (self.out / "run.json").exists() else "unfinished "
            raise UserError(f"--out {self.out}: holds {unfinished}{self.CONTENT} of another configuration "
                            f"({different} differs); {REMEDY}")

    def remove(self) -> None:
        """Removes the folder of chunks with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
