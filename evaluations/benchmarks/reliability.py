"""The reliability of long jobs: they are killed at random moments and restarted, and their files are compared.

Ranks are started by hand, as `srun` does, so that a killed rank takes no other with it and the others have to notice.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import check_folder
from guided_diffusion.options import option, seed_option
from guided_diffusion.runs.shards import Shards

from ..memory import MIB, process_peak
from .killed_jobs import JOBS, JobOptions, KilledJob

PATIENCE = 600          # seconds for a job that nobody killed to end
NOTICE = 120            # seconds for the ranks that were not killed to notice; after that the trial ends them, too
EARLY = 0.25            # share of the kills whose moment does not wait for any work to be done


@dataclass(frozen=True)
class ReliabilityOptions(JobOptions):
    """The trial."""

    what: str = option("sampling", "the jobs that are killed", choices=tuple(JOBS))
    kills: int = option(20, "number of kills", minimum=1)
    ranks: int = option(2, "ranks of each job", minimum=1)
    seed: int = seed_option("seed of the moments and of the ranks that are killed")
    out: str = option("runs/reliability", "folder for the jobs: each kind in a new folder there")
    pack_images: int = option(0, "instead of kills: pack so many random images of 128x128 and tell the peak memory",
                              minimum=0)


@dataclass(frozen=True)
class Kill:
    """The outcome of one kill."""

    victim: str             # a rank, or all
    moment: float           # seconds after the start
    after: str              # what the job had done: "nothing", "N images", "finished"
    seconds_to_end: float   # until the last rank was gone; infinite: the trial had to end those that were left
    redone: int             # of what was done before the kill, what was done again, in the job's unit
    litter: int             # files that an undisturbed job does not have
    equal: bool             # whether the restarted job gave the same files, byte by byte


def reliability(options: ReliabilityOptions) -> Iterator[Kill]:
    """Kills `options.kills` jobs by SIGKILL, one rank or all in turn, restarts each, and says what came of it.

    Raises UserError where a job that nobody killed fails, or where `options.out` holds an earlier trial.
    """
    yield from _Trial(options).kills()


def npz_writing_trial(options: ReliabilityOptions) -> str:
    """Writes the file of samples of random shards; tells the peak memory of this process, before and after."""
    run = Shards(Path(options.out) / "writing", {
        "num_samples": options.pack_images, "batch_size": 100, "image_size": 128, "labels": "balanced"}, {})
    run.out.mkdir(parents=True, exist_ok=True)
    run.prepare(overwrite=True)
    chance = np.random.default_rng(options.seed)
    for index, image_ids in enumerate(run.chunks):
        images = chance.integers(0, 256, (len(image_ids), *run.shape[1:]), dtype=np.uint8)
        run.save(index, images, np.asarray(image_ids) % 10)
    before, began = process_peak(), time.monotonic()
    packed, _ = run.pack()
    seconds, size = time.monotonic() - began, packed.stat().st_size
    packed.unlink()
    run.remove()
    return (f"{options.pack_images} images, {size / 2**30:.2f} GiB, packed and checked in {seconds:.0f} s; peak memory "
            f"{process_peak() / MIB:.0f} MiB, {before / MIB:.0f} MiB before")


def kills_table(kills: Iterable[Kill], what: str) -> Iterator[str]:
    """The lines of a table of kills of jobs of a kind, in Markdown, each as soon as it is known, and their sum."""
    unit, seen = JOBS[what].unit, []
    yield f"| kill | killed | after s | had done | job gone after s | {unit} made twice | litter | files equal |"
    yield "|---|---|---|---|---|---|---|---|"
    for kill in kills:
        seen.append(kill)
        ended = f"over {NOTICE}" if math.isinf(kill.seconds_to_end) else f"{kill.seconds_to_end:.1f}"
        yield (f"| {len(seen)} | {kill.victim} | {kill.moment:.1f} | {kill.after} | {ended} | "
               f"{kill.redone} | {kill.litter} | {'yes' if kill.equal else 'NO'} |")
    yield (f"\n{len(seen)} kills of {what} tried, {sum(kill.redone for kill in seen)} {unit} made twice, "
           f"{sum(kill.litter for kill in seen)} files left over, {sum(kill.equal for kill in seen)} of "
           f"{len(seen)} with equal files.")


class _Trial:
    """A job that is left alone, and jobs that are killed."""

    def __init__(self, options: ReliabilityOptions) -> None:
        self.options, self.out = options, Path(options.out) / options.what
        self.chance = random.Random(options.seed)
        self.job: KilledJob = JOBS[options.what](options, self.out)
        self.whole = self.out / "whole"
        check_folder("--out", options.out)
        if self.out.exists():
            raise UserError(f"--out {options.out}: holds {options.what} already, remove it or name another folder")
        self.out.mkdir()
        self.job.prepare()
        began = time.monotonic()
        _finish(self._start(self.whole))
        self.seconds = time.monotonic() - began

    def kills(self) -> Iterator[Kill]:
        """Kills one rank and all ranks, in turn."""
        for index in range(self.options.kills):
            victim = None if index % 2 else self.chance.randrange(self.options.ranks)
            yield self._kill(self.out / f"kill{index:02d}", victim)

    def _kill(self, out: Path, victim: int | None) -> Kill:
        """Kills a job, restarts it, and says what came of it. victim: the rank to kill; None: all of them."""
        job, began = self.job, time.monotonic()
        ranks = self._start(out)
        self._await_moment(out, ranks)
        moment = time.monotonic() - began
        for rank in ranks if victim is None else [ranks[victim]]:
            rank.send_signal(signal.SIGKILL)
        seconds = _seconds_to_end(ranks)

        finished, done, redone, stamps = job.finished(out), job.done(out), job.unsaved(out), job.stamps(out)
        _finish(self._start(out, again=True))
        if not finished:
            again = job.stamps(out)
            redone += sum(again.get(path) != stamp for path, stamp in stamps.items()) * job.piece
        return Kill("all" if victim is None else f"rank {victim}", moment,
                    "finished" if finished else f"{done} {job.unit}" if done else "nothing", seconds, redone,
                    len(self._names(out) - self._names(self.whole)), self._digests(out) == self._digests(self.whole))

    def _await_moment(self, out: Path, ranks: Sequence[subprocess.Popen]) -> None:
        """Waits for a random moment: of the time that the undisturbed job took, or of the work that it did."""
        job, chance = self.job, self.chance
        early, count, share = chance.random() < EARLY, chance.randint(0, job.total), chance.uniform(0, 1)
        if early or not job.total:
            time.sleep(share * self.seconds)
            return
        while ranks[0].poll() is None and job.done(out) < count:
            time.sleep(0.002)
        time.sleep(share * 0.5)

    def _names(self, out: Path) -> set[str]:
        names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        return {name for name in names if not self.job.aside or not name.startswith(f"{self.job.aside}/")}

    def _digests(self, out: Path) -> dict[str, str]:
        return {path.relative_to(out).as_posix(): sha256_of(path) for path in self.job.results(out)}

    def _start(self, out: Path, again: bool = False) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out.mkdir(exist_ok=True)
        count, command = self.options.ranks, [sys.executable, *self.job.command(out, again)]
        several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", **several, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]


def _seconds_to_end(ranks: Sequence[subprocess.Popen]) -> float:
    """Waits for all ranks to be gone, and ends those that stay: one waits for minutes for another that is to start."""
    began = time.monotonic()
    try:
        for rank in ranks:
            rank.communicate(timeout=max(0, began + NOTICE - time.monotonic()))
        return time.monotonic() - began
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
            rank.communicate()
        return math.inf


def _finish(ranks: Sequence[subprocess.Popen]) -> None:
    errors = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    for rank, error in zip(ranks, errors, strict=True):
        if rank.returncode:
            message = re.findall(r"error: .*", error) or error.splitlines()[-1:]
            raise UserError(f"a job that was left alone ended with exit code {rank.returncode}: {' '.join(message)}")
