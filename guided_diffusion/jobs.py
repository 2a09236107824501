"""What a job does, for another shell: a small file in the job's folder, written whole every few seconds by rank 0.

A job whose process was killed cannot say so. Whoever reads its state finds out: on the same machine by the process, on
another one by the age of the state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import PeerError, UserError, resumable
from .fetch import without_secrets
from .files import check_folder, reason, write_json
from .foreign import read_json
from .launchers import is_main, world_size
from .progress import Progress, Step, clock, watched

STATE = "status.json"           # in the folder of a job; beside a FILE that a job writes or reads: FILE.status.json
EVERY = 5.0                     # seconds between two states
SILENT = 600.0                  # seconds without a word after which a job of another machine is taken to be gone
LONGEST = 300                   # characters of the reason for which a job stopped

RECORDS = ("run.json", "shards/run.json")      # of sampling runs

_log = logging.getLogger(__name__)
_running: list[str] = []        # the jobs of this process, from the outermost


def command_line(script: str = "", argv: Sequence[str] | None = None) -> str:
    """A command as a shell takes it, without what is secret in addresses.

    script: "" for the program of this process. argv: what follows it, None for the arguments of this process.
    """
    program = script or sys.argv[0]
    python = ["python"] if program.endswith(".py") else []          # else it is the installed command
    words = [*python, program, *(sys.argv[1:] if argv is None else argv)]
    return shlex.join(without_secrets(word) for word in words)          # before they are quoted, which hides their ends


class State(StrEnum):
    """How a job is."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"                 # by a mistake or a fault, which `why` says
    INTERRUPTED = "interrupted"         # by a signal
    GONE = "gone"                       # killed, or its machine went down; never in a file, but found by who reads it


def state_file(place: Path) -> Path:
    """Where the state of a job lies that writes the folder `place`, or the file of that name."""
    return place / STATE if place.is_dir() else state_beside(place)


def state_beside(place: Path) -> Path:
    """Where the state of a job lies that writes the file `place`, or that reads this folder or file."""
    place = Path(os.path.abspath(place))
    return place.with_name(f"{place.name or 'root'}.{STATE}")


@dataclass(frozen=True)
class JobState:
    """A state, as it is in the file: what the job is, and how far it was at that time.

    writes: "" where it writes nothing. began, written: seconds since 1970. started: of the process, in clock ticks
    since its machine started; 0 where the system does not say. steps: from the outermost to the innermost. command: the
    command line that started it.
    """

    job: str
    title: str
    writes: str
    state: State
    host: str
    process: int
    started: int
    ranks: int
    began: float
    written: float
    steps: tuple[Step, ...] = ()
    why: str = ""
    command: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, for JSON; the seconds that are left beside each step."""
        steps = [{**asdict(step), "seconds_left": step.seconds_left} for step in self.steps]
        return {**asdict(self), "state": str(self.state), "steps": steps}

    @classmethod
    def of(cls, content: dict[str, Any]) -> JobState:
        """The state that a file holds. Raises KeyError, TypeError or ValueError where it is none."""
        steps = tuple(Step(one["what"], one["unit"], int(one["done"]), one["total"], one["rate"], one["note"])
                      for one in content["steps"])
        return cls(**{**content, "state": State(content["state"]), "steps": steps})

    def now(self) -> JobState:
        """The same as it is now: a job that says it is running, and is not any more, is gone."""
        gone = self.state is State.RUNNING and self._is_gone()
        return JobState(**{**vars(self), "state": State.GONE}) if gone else self

    def _is_gone(self) -> bool:
        if self.host == socket.gethostname():
            return _started(self.process) != self.started if self.started else not _is_there(self.process)
        return time.time() - self.written > SILENT

    def __str__(self) -> str:
        who = f"process {self.process} on {self.host}" + (f" and {self.ranks - 1} more" if self.ranks > 1 else "")
        age = clock(max(0.0, time.time() - self.written))
        lasted = clock(self.written - self.began)
        words = {State.RUNNING: f"running for {clock(time.time() - self.began)}: {who}; last word {age} ago",
                 State.FINISHED: f"finished {age} ago, after {lasted}",
                 State.STOPPED: f"stopped {age} ago, after {lasted}: {self.why}",
                 State.INTERRUPTED: f"interrupted {age} ago, after {lasted}",
                 State.GONE: f"gone without a word: {who}; last heard of {age} ago"}
        lines = [f"{self.job}{f' ({self.title})' if self.title else ''}, {words[self.state]}"]
        if self.state is not State.FINISHED:
            lines += [f"  {step}" for step in self.steps]
        return "\n".join([*lines, *([f"  writes {self.writes}"] if self.writes else [])])


def read_state(place: Path) -> JobState | None:
    """The state of the job that writes a folder or a file, or else of one that reads it; None where there is none.

    It is the state as it is now. Raises UserError where the file of the state is damaged.
    """
    for path in (state_file(place), state_beside(place)):
        if path.is_file():
            return JobState.of(read_json(path, _can_be_told)).now()
    return None


def job_folder(what: str, path: str | Path) -> Path:
    """Makes the folder --out of a study or an export and returns it, as `check_folder` does.

    what: the job does, in the words that `job` takes. Raises UserError where the folder cannot be written, and where
    another kind of job has worked there: its page and its state would be hidden by those of this one. (Samples may lie
    in the folder of a training, as the official code has one folder for both.)
    """
    folder, other = check_folder("--out", path), ""
    if (folder / STATE).is_file():
        with contextlib.suppress(UserError):            # a damaged state harms no job
            other = JobState.of(read_json(folder / STATE, _can_be_told)).job
    kind = f" ({other})" if other not in ("", what) else ""
    if kind or any((folder / name).exists() for name in RECORDS):
        raise UserError(f"--out {folder}: is the folder of a run{kind}, and the files of another would stand among its "
                        "own; name another folder")
    return folder


def mark_finished(place: Path) -> None:
    """Says, on rank 0, of the last job that wrote a folder that it had done all, whatever ended it then.

    place: the folder; of a file the state is removed, as `job` does. It is for jobs that have ended. A folder without a
    state gets none, and a state that cannot be written stays.
    """
    path = state_file(place)
    if not is_main() or not path.is_file():
        return
    with contextlib.suppress(UserError, OSError):
        if not place.is_dir():
            path.unlink()
            return
        before = JobState.of(read_json(path, _can_be_told))
        if before.state is not State.FINISHED:
            write_json(path, replace(before, state=State.FINISHED, steps=(), why="").as_dict())


def _can_be_told(content: dict[str, Any]) -> bool:
    """Whether the values in a file are of such types that they can be shown; else raises what showing them does."""
    state = JobState.of(content).now()
    return all(map(str, state.steps)) and bool(str(state)) and bool(state.as_dict())


@contextlib.contextmanager
def job(what: str, place: str | Path, title: str = "", *, reads: bool = False, resumes: bool = False,
        ) -> Iterator[None]:
    """Keeps the state of a job up to date, on rank 0, as long as the block lasts, and says how it ended.

    what: it does, in a word or two. place: the folder that it writes, or the file. title: in words, or "". reads: it
    writes no file, and `place` is what it reads: its state lies beside that, and is removed at the end. A job that is
    no part of another one logs its place. resumes: the same command goes on where it was ended, see `resumable`, which
    is so on all ranks. A state that cannot be written, as on a full disk, harms no job.
    """
    with resumable() if resumes else contextlib.nullcontext():
        if not is_main():
            yield
            return
        with _kept_up_to_date(what, place, title, reads):
            yield


@contextlib.contextmanager
def _kept_up_to_date(what: str, place: str | Path, title: str, reads: bool) -> Iterator[None]:
    keeper = _Keeper(what, Path(place), title, reads)
    keeper.write(State.RUNNING)
    if not _running and not reads:
        _log.info("%s: writes %s", what, place)
    elif not _running and keeper.path.is_file():
        _log.info("%s: its state is in %s until it ends", what, keeper.path)
    _running.append(what)
    try:
        with watched(keeper.told):
            yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, PeerError) and isinstance(error.__cause__, KeyboardInterrupt))
        why = "" if interrupted else _in_a_sentence(error)
        keeper.stop(State.INTERRUPTED if interrupted else State.STOPPED, why)
        raise
    finally:
        _running.pop()
    keeper.finish()


class _Keeper:
    """Writes the state of a job."""

    def __init__(self, what: str, place: Path, title: str, reads: bool) -> None:
        self.reads, self.path = reads, state_beside(place) if reads else state_file(place)
        self.is_file = reads or not place.is_dir()
        self.facts: dict[str, Any] = {
            "job": what, "title": title, "writes": "" if reads else str(place.absolute()), "host": socket.gethostname(),
            "process": os.getpid(), "started": _started(os.getpid()), "ranks": world_size(), "began": time.time(),
            "command": command_line()}
        self.under_way: tuple[Progress, ...] = ()
        self.next = 0.0

    def told(self, under_way: Sequence[Progress]) -> None:
        """Writes what is under way, where the last state is old enough."""
        self.under_way = tuple(under_way)
        if time.monotonic() >= self.next:
            self.write(State.RUNNING)

    def write(self, state: State, why: str = "") -> None:
        """Writes the state; what a full disk does not take is left out."""
        self.next = time.monotonic() + EVERY
        steps = tuple(progress.step() for progress in self.under_way)
        content = JobState(**self.facts, state=state, written=time.time(), steps=steps, why=why).as_dict()
        for step in content["steps"]:
            del step["seconds_left"]
        with contextlib.suppress(UserError, OSError):
            write_json(self.path, content)

    def stop(self, state: State, why: str) -> None:
        """The end of a job that did not do all, which its state says from then on, unless it only reads."""
        if self.reads:
            self._remove()
        else:
            self.write(state, why)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The end of a job that did all: a folder keeps the state, a file that is there says enough."""
        if self.is_file:
            self._remove()
        else:
            self.under_way = ()
            self.write(State.FINISHED)


def _in_a_sentence(error: BaseException) -> str:
    words = without_secrets(reason(error))
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def _started(process: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 where it has ended, or nobody says."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return 0 if facts[0] == "Z" else int(facts[19])
    except (OSError, ValueError, IndexError):
        return 0


def _is_there(process: int) -> bool:
    """Whether there is a process, where no system tells when it started."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:             # of another user
        return True
    return True
