"""The reliability of sampling: jobs are killed at random moments and restarted, and their files are compared.

Ranks are started by hand, as `srun` does, so that a killed rank takes no other with it and the others have to notice.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.options import Options, option, seed_option
from guided_diffusion.places import command_file
from guided_diffusion.runs.shards import Shards

from ..memory import MIB, process_peak

PATIENCE = 120          # seconds for a job to end


@dataclass(frozen=True)
class ReliabilityOptions(Options):
    """The trial."""

    kills: int = option(20, "number of kills", minimum=1)
    ranks: int = option(2, "ranks of each job", minimum=1)
    seed: int = seed_option("seed of the moments and of the ranks that are killed")
    out: str = option("runs/reliability", "folder for the runs")
    model: str = option("fmnist32", "a bundled model")
    num_samples: int = option(96, "number of images", minimum=1)
    batch_size: int = option(4, "images in a chunk", minimum=1)
    timestep_respacing: str = option("10", "steps of each image")
    pack_images: int = option(0, "instead of kills: pack so many random images of 128x128 and tell the peak memory",
                              minimum=0)


@dataclass(frozen=True)
class Kill:
    """The outcome of one kill."""

    victim: str             # a rank, or all
    moment: float           # seconds after the start
    after: str              # what the job had done: "starting", "N images", "finished"
    seconds_to_end: float   # until the last rank was gone
    images_redone: int      # finished before the kill, and made again
    equal: bool             # whether the restarted run gave the same file


def reliability(options: ReliabilityOptions) -> list[Kill]:
    """Kills `options.kills` jobs by SIGKILL, one rank or all in turn, and restarts each until it is finished.

    Raises UserError where a restarted job fails.
    """
    chance, out = random.Random(options.seed), Path(options.out)
    whole = out / "whole"
    _finish(_start(options, whole, overwrite=True))
    sha256 = sha256_of(_samples(whole))
    return [_kill_job(options, out / f"kill{index:02d}", sha256, chance, None if index % 2 else
                      chance.randrange(options.ranks)) for index in range(options.kills)]


def npz_writing_trial(options: ReliabilityOptions) -> str:
    """Writes the file of samples of random shards; tells the peak memory of this process, before and after."""
    run = Shards(Path(options.out) / "packing", {
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


def kills_table(kills: Sequence[Kill]) -> str:
    """The kills as a table in Markdown, and their sum."""
    rows = ["| kill | killed | after s | had done | job gone after s | finished images redone | file equal |",
            "|---|---|---|---|---|---|---|"]
    rows += [f"| {index} | {kill.victim} | {kill.moment:.1f} | {kill.after} | {kill.seconds_to_end:.1f} | "
             f"{kill.images_redone} | {'yes' if kill.equal else 'NO'} |"
             for index, kill in enumerate(kills, 1)]
    rows += ["", f"{len(kills)} kills tried, {sum(kill.images_redone for kill in kills)} finished images redone, "
             f"{sum(kill.equal for kill in kills)} of {len(kills)} files equal."]
    return "\n".join(rows)


def _kill_job(options: ReliabilityOptions, out: Path, sha256: str, chance: random.Random, victim: int | None,
              ) -> Kill:
    """Kills a job, restarts it, and says what came of it.

    sha256: that of the file of an undisturbed job. victim: the rank to kill; None: all of them.
    """
    began, ranks = time.monotonic(), _start(options, out, overwrite=True)
    _await_moment(options, out, chance, ranks[0])
    moment = time.monotonic() - began
    for rank in ranks if victim is None else [ranks[victim]]:
        rank.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for rank in ranks:
        rank.communicate(timeout=PATIENCE)
    seconds = time.monotonic() - killed
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.npz")}
    finished = bool(list(out.glob("samples_*.npz"))) and not before

    restarted = _start(options, out, "--keep_shards", "True")
    _finish(restarted)
    redone = 0 if finished else sum(path.stat().st_mtime_ns != stamp for path, stamp in before.items())
    images = min(len(before) * options.batch_size, options.num_samples)
    after = "finished" if finished else f"{images} images" if images else "no image"
    return Kill("all" if victim is None else f"rank {victim}", moment, after, seconds, redone * options.batch_size,
                sha256_of(_samples(out)) == sha256)


def _await_moment(options: ReliabilityOptions, out: Path, chance: random.Random, job: subprocess.Popen) -> None:
    """Waits for a random number of chunks, and a random while more."""
    count, pause = chance.randint(0, -(-options.num_samples // options.batch_size)), chance.uniform(0, 0.5)
    while job.poll() is None and not (
            (out / "shards" / "run.json").exists() and len(list((out / "shards").glob("*.npz"))) >= count):
        time.sleep(0.002)
    time.sleep(pause)


def _start(options: ReliabilityOptions, out: Path, *words: str, overwrite: bool = False) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(command_file("image_sample")), "--model", options.model, "--out", str(out),
               "--overwrite", str(overwrite), *words]
    for name in ("num_samples", "batch_size", "timestep_respacing"):
        command += [f"--{name}", str(getattr(options, name))]
    several = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", **(several if options.ranks > 1 else {}), "RANK": str(rank),
        "LOCAL_RANK": str(rank)}) for rank in range(options.ranks)]


def _finish(ranks: Sequence[subprocess.Popen]) -> None:
    errors = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    for rank, error in zip(ranks, errors, strict=True):
        if rank.returncode:
            message = re.findall(r"error: .*", error) or error.splitlines()[-1:]
            raise UserError(f"a restarted job ended with exit code {rank.returncode}: {' '.join(message)}")


def _samples(out: Path) -> Path:
    path, = out.glob("samples_*.npz")
    return path
