"""What a running or stopped job has done, from its folder alone; of a sampling run, also what is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..fetch import sha256_of
from ..files import reason
from ..jobs import JobState, read_state
from .record import READ_ERRORS, read_record
from .shards import DamagedError, Shards, holder

SAMPLING = "sampling"           # the job whose images are looked at one by one


@dataclass(frozen=True)
class RunStatus:
    """Images of a run and the files of what is no good."""

    num_samples: int
    done: int
    damaged: int
    files: tuple[str, ...]          # damaged ones, and those of other runs
    holder: str | None              # the job that works there
    samples: Path | None            # the file of samples, where it is finished

    @property
    def missing(self) -> int:
        """Images that are still to be sampled."""
        return self.num_samples - self.done - self.damaged

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, for JSON."""
        return {**asdict(self), "missing": self.missing, "samples": self.samples and str(self.samples)}

    def __str__(self) -> str:
        state = f"running: {self.holder}" if self.holder else "not running"
        lines = [f"{'finished' if self.samples else 'unfinished'}, {state}",
                 f"done     {self.done:>9} of {self.num_samples} images",
                 f"missing  {self.missing:>9}", f"damaged  {self.damaged:>9}"]
        return "\n".join([*lines, *(f"  {file}" for file in self.files)])


@dataclass(frozen=True)
class Status:
    """All that is known of the job that writes a place: the state that it keeps, and the images of a sampling run.

    reader: the job that reads the file of samples, an evaluation that writes no file.
    """

    place: Path
    job: JobState | None
    run: RunStatus | None
    reader: JobState | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, for JSON: what belongs to the run of samples, `job`, and `reader` where there is one."""
        return {**(self.run.as_dict() if self.run else {}), "job": self.job and self.job.as_dict(),
                **({"reader": self.reader.as_dict()} if self.reader else {})}

    def __str__(self) -> str:
        if self.run is None and self.job is None:
            return "finished: the file is there, and no job writes it (commands here name a file when it is whole)"
        return "\n".join(str(part) for part in (self.run, self.job, self.reader) if part is not None)


def status_of(place: Path) -> Status:
    """What is known of the job that writes a folder, or a file; changes nothing.

    Raises UserError where no job has written there.
    """
    state = read_state(place)
    begun = any(path.is_file() for path in (place / "run.json", place / "shards" / "run.json"))
    run = run_status(place) if (begun and state.job == SAMPLING if state else place.is_dir()) else None
    if state is None and run is None and not place.is_file():
        raise UserError(f"{place}: there is no such folder or file")
    return Status(place, state, run, read_state(run.samples) if run and run.samples else None)


def run_status(out: Path) -> RunStatus:
    """Reads every file of the run in the folder `out`, and changes none; UserError where there is no run."""
    unfinished = _run(out, out / "shards" / "run.json")
    if unfinished is not None:
        return _of_shards(unfinished)
    finished = _run(out, out / "run.json")
    if finished is None:
        raise UserError(f"{out}: holds no sampling run, and no state of another job")
    total, file = finished.num_samples, finished.samples
    if not file.exists():
        return RunStatus(total, 0, 0, (), holder(out), None)
    if sha256_of(file) != finished.sha256.get("samples"):
        return RunStatus(total, 0, total, (file.name,), holder(out), None)
    return RunStatus(total, total, 0, (), holder(out), file)


def unfinished_images(out: Path) -> int | None:
    """Images of the run that was begun in a folder and is not finished; None where there is none."""
    try:
        run = _run(out, out / "shards" / "run.json")
        return None if run is None or _is_packed(run) else run.num_samples
    except UserError:
        return None


def _is_packed(run: Shards) -> bool:
    """Whether a run whose chunks are there has its file of samples, and the record of it."""
    finished = run.recorded()
    return finished is not None and finished.num_samples == run.num_samples


def _run(out: Path, record: Path) -> Shards | None:
    try:
        content = read_record(record)
        return Shards(out, content["configuration"], content["sha256"])
    except FileNotFoundError:
        return None
    except READ_ERRORS as error:
        raise UserError(f"{record}: is no record of a sampling run ({reason(error)})") from None


def _of_shards(run: Shards) -> RunStatus:
    done, damaged, files = 0, 0, []
    for index in run.stored():
        try:
            done += run.count(index)
        except UserError as error:
            damaged += len(run.chunks[index])
            files.append(run.path(index).name + ("" if isinstance(error, DamagedError) else " (of another run)"))
    packed = run.samples if done == run.num_samples and _is_packed(run) else None
    return RunStatus(run.num_samples, done, damaged, tuple(files), holder(run.out), packed)
