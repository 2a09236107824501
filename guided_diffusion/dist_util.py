"""The ranks of a job: which one this process is, how many there are, and which device it uses.

One process is the default. Under `mpiexec`, `torchrun` or `srun` the launcher's environment says which rank a process
is, and torch.distributed connects the ranks: by nccl where there are GPUs, else by gloo. CUDA_VISIBLE_DEVICES is
respected.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint
from .errors import LostRankError, PeerError, UserError

__all__ = ["LostRankError", "PeerError", "barrier", "dev", "is_main", "load_state_dict", "rank", "setup_dist",
           "shutdown", "store", "sync_params", "together", "world_size"]

# (rank, number of ranks, rank on this node) as launchers export them: torchrun, Hydra (MPICH, Intel), Open MPI, Slurm.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)

PATIENCE = timedelta(days=2)            # of a collective: one rank may compute for hours while the others wait for it
ASSEMBLY = timedelta(minutes=10)        # within which all ranks must have started

_meeting: dist.Store | None = None      # the store of keys and values that connects the ranks


def _launched() -> tuple[int, int, int]:
    """Reads (rank, number of ranks, local rank) from the environment; (0, 1, 0) where there is no launcher.

    An interactive Slurm allocation also sets SLURM_NTASKS: only a job step also has SLURM_STEP_ID.
    """
    for names in LAUNCHERS:
        if all(name in os.environ for name in names[:2]):
            if names[0].startswith("SLURM") and os.environ.get("SLURM_STEP_ID") is None:
                continue
            this, size = (int(os.environ[name]) for name in names[:2])
            return this, size, int(os.environ.get(names[2], this))
    return 0, 1, 0


def setup_dist() -> None:
    """Connects the ranks that the launcher started; does nothing for one process, or when called again.

    Raises UserError where the ranks cannot find each other, and LostRankError where not all of them start.
    """
    this, size, _ = _launched()
    if size == 1 or dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(dev())
    global _meeting
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        _meeting, *_ = next(dist.rendezvous("env://", this, size))
    else:
        _meeting = _store_over_mpi(this, size)
    _await_all(_meeting, this, size)
    dist.init_process_group(backend, store=dist.PrefixStore("group", _meeting), rank=this, world_size=size,
                            timeout=PATIENCE)


def store(name: str) -> dist.Store:
    """A store of keys and values that all ranks share, separate from the stores of other names.

    A single process has a store of its own.
    """
    return dist.HashStore() if _meeting is None else dist.PrefixStore(name, _meeting)


def _await_all(meeting: dist.Store, this: int, size: int) -> None:
    """Waits for all ranks to start, which on a busy file system takes minutes, but not for one that never does."""
    meeting.set(f"here {this}", "")
    try:
        meeting.wait([f"here {rank}" for rank in range(size)], ASSEMBLY)
    except RuntimeError:
        raise LostRankError(f"not all of the {size} ranks started within {ASSEMBLY}") from None


def _store_over_mpi(this: int, size: int) -> dist.TCPStore:
    """The store where the ranks meet: rank 0 listens on a port that the system picks, and sends it over MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("running on several ranks with mpiexec needs mpi4py: install the extra `mpi`, or use "
                        "torchrun") from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise UserError(f"the launcher started {size} ranks but mpi4py sees {comm.Get_size()}: mpi4py and mpiexec "
                        "must come from the same MPI")
    one_node = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == size
    if this == 0:
        host = "127.0.0.1" if one_node else _own_address()
        meeting = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        comm.bcast((host, meeting.port))
        return meeting
    host, port = comm.bcast(None)
    return dist.TCPStore(host, port, size, is_master=False)


def _own_address() -> str:
    """An address of this host that other nodes can reach."""
    try:
        return socket.gethostbyname(socket.getfqdn())
    except OSError:
        raise UserError(f"the host name {socket.getfqdn()!r} does not resolve: set MASTER_ADDR and "
                        "MASTER_PORT") from None


def rank() -> int:
    """The number of this process among the ranks, from 0."""
    return _launched()[0]


def world_size() -> int:
    """The number of ranks; 1 where there is no launcher."""
    return _launched()[1]


def is_main() -> bool:
    """Whether this is rank 0: the one rank that writes files and shows progress."""
    return rank() == 0


def dev() -> torch.device:
    """The device of this rank: the GPU with the number of the rank on its node, or the CPU where there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", _launched()[2] % torch.cuda.device_count())
    return torch.device("cpu")


def load_state_dict(path: str | Path, map_location: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name (see `checkpoint.load_state_dict`).

    Every rank maps the file into memory, so that a node reads it once.
    """
    return checkpoint.load_state_dict(path, map_location)


def barrier() -> None:
    """Waits until all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave the `with` block when the last one is through it, and if one of them failed in it, all fail.

    Of the ranks that failed, the one with the lowest number raises its own exception; all others raise PeerError, so
    that none waits for a rank that will never come. LostRankError is raised where a rank was killed. No rank may wait
    for others inside the block.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    first = world_size() if failure is None else rank()
    if dist.is_initialized():
        shared = torch.tensor(first, device=dev())
        try:
            dist.all_reduce(shared, dist.ReduceOp.MIN)
        except RuntimeError:
            if failure is None:
                raise LostRankError("a rank is gone: it was killed, or its node is down") from None
            raise failure from None
        first = int(shared)
    if failure is not None and first == rank():
        raise failure
    if first < world_size():
        raise PeerError(f"rank {first} failed") from failure


def sync_params(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every rank with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            with torch.no_grad():
                dist.broadcast(tensor, 0)


def shutdown() -> None:
    """Disconnects the ranks; does nothing for one process."""
    global _meeting
    if dist.is_initialized():
        dist.destroy_process_group()
    _meeting = None
