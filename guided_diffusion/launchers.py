"""What launchers say of this process: its rank, the number of ranks, and its rank on this node. Loads no torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from .errors import UserError

# (rank, number of ranks, rank on this node) as launchers export them: torchrun, Hydra (MPICH, Intel), Open MPI, Slurm.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
SINGLE_STEPS = 4294967290                   # from here on steps of Slurm are the shells and scripts of an allocation
STEP_TASKS = "SLURM_STEP_NUM_TASKS"         # of a step of Slurm, where SLURM_NTASKS may be that of the whole allocation


class Launched(NamedTuple):
    """Where a process stands among those that a launcher started."""

    rank: int
    size: int
    local_rank: int


def launched() -> Launched:
    """Reads the environment; (0, 1, 0) where there is no launcher. An empty variable counts as one that is not set.

    An allocation of Slurm also sets SLURM_NTASKS: only a job step also has SLURM_STEP_ID, and that of a shell or a
    batch script is one process. Raises UserError where a variable is no number, or the numbers do not fit together.
    """
    for rank_name, size_name, local_name in LAUNCHERS:
        if rank_name.startswith("SLURM"):
            if not _set("SLURM_STEP_ID") or (not _set(STEP_TASKS) and _is_single_step()):
                continue
            size_name = STEP_TASKS if _set(STEP_TASKS) else size_name
        if _set(rank_name) and _set(size_name):
            rank, size = _number(rank_name, 0), _number(size_name, 1)
            if rank >= size:
                raise UserError(f"{rank_name} {rank}: must be less than {size_name}, which is {size}")
            return Launched(rank, size, _number(local_name, 0) if _set(local_name) else rank)
    return Launched(0, 1, 0)


def _is_single_step() -> bool:
    step = os.environ["SLURM_STEP_ID"].strip()
    return step.isdecimal() and int(step) >= SINGLE_STEPS


def _set(name: str) -> bool:
    return bool(os.environ.get(name, "").strip())


def _number(name: str, least: int) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UserError(f"{name} {text[:100]!r}: must be a whole number of at least {least}, as a launcher sets it")
    return int(text)


def rank() -> int:
    """The number of this process among the ranks, from 0."""
    return launched().rank


def world_size() -> int:
    """The number of ranks; 1 where there is no launcher."""
    return launched().size


def is_main() -> bool:
    """Whether this is rank 0: the one rank that writes files and shows progress."""
    return rank() == 0
