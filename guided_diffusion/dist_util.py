"""The ranks of a job: which one this process is, how many there are, and which device it uses.

One process is the default. Under `mpiexec`, `torchrun` or `srun` the launcher's environment says which rank a process
is, and torch.distributed connects the ranks: by nccl where each has a GPU of its own, else by gloo.
CUDA_VISIBLE_DEVICES is respected.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import LostRankError, PeerError, UserError
from .files import reason
from .late import Tensor, dist, torch
from .launchers import is_main, launched, rank, world_size

__all__ = ["LostRankError", "PeerError", "barrier", "collective", "connect", "dev", "device_name", "gathered",
           "has_last_word", "is_main", "load_state_dict", "one_process", "rank", "say", "setup_dist", "shutdown",
           "store", "sync_params", "together", "told_by_main", "world_size"]

PATIENCE = timedelta(days=2)            # of a collective: one rank may compute for hours while the others wait for it
LAST_TO_SPEAK = 3.0                     # seconds that other ranks wait with a sentence that the first one says
ASSEMBLY = timedelta(minutes=10)        # within which all ranks must have started
REMINDER = timedelta(seconds=30)        # after which, again and again, rank 0 says who is missing
ANSWER = timedelta(minutes=30)          # within which a value is put into the store that a rank asks for
LAUNCHER_ANSWERS = timedelta(seconds=30)        # within which the store of torchrun, which is there already, answers
LAST_WORD = timedelta(seconds=5)        # within which the store says whether a rank may speak

LOG = logging.getLogger(__name__)

_meeting: dist.Store | None = None      # the store of keys and values that connects the ranks


def setup_dist() -> None:
    """What official scripts call first: as `connect`, but one process, too, is in a group, by gloo, which they ask for.

    A group that is there stays. Raises what `connect` does.
    """
    connect()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def connect() -> None:
    """Connects the ranks that the launcher started; does nothing for one process, or when called again.

    So the process of who uses this as a library gets no group, which would be in the way of one of its own.
    Raises UserError where the ranks cannot find each other, and LostRankError where not all of them start.
    """
    this, size, _ = launched()
    if size == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    global _meeting
    try:
        if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
            meeting: dist.Store = _store_by_address(this, size)
        else:
            meeting = _store_over_mpi(this, size)
        _await_all(meeting, this, size)
        dist.init_process_group(_backend(meeting, this, size), store=dist.PrefixStore("group", meeting), rank=this,
                                world_size=size, timeout=PATIENCE)
    except (LostRankError, UserError):
        raise
    except RuntimeError as error:
        raise LostRankError(f"rank {this} cannot be connected with the others ({reason(error)[:200]}): a rank or its "
                            "launcher is gone") from None
    _meeting = meeting


def store(name: str) -> dist.Store:
    """A store of keys and values that all ranks share, separate from the stores of other names.

    A single process has a store of its own.
    """
    return dist.HashStore() if _meeting is None else dist.PrefixStore(name, _meeting)


def _await_all(meeting: dist.Store, this: int, size: int) -> None:
    """Waits for all ranks to start, which on a busy file system takes minutes, but not for one that never does.

    Rank 0 says every REMINDER who is missing.
    """
    meeting.set(f"here {this}", "")
    began = time.monotonic()
    missing = list(range(size))
    while missing:
        try:
            meeting.wait([f"here {rank}" for rank in missing], REMINDER)
        except dist.DistNetworkError:
            raise
        except RuntimeError:
            pass            # the time is up
        missing = [rank for rank in missing if not meeting.check([f"here {rank}"])]
        waited = timedelta(seconds=round(time.monotonic() - began))
        if missing and waited >= ASSEMBLY:
            raise LostRankError(f"not all of the {size} ranks started within {waited}: {_named(missing)} missing")
        if missing and this == 0:
            LOG.warning("waiting for ranks to start since %s: %s missing of %d", waited, _named(missing), size)


def _backend(meeting: dist.Store, this: int, size: int) -> str:
    """How ranks exchange tensors: by nccl, where each has a GPU of its own, else by gloo."""
    own = f"{socket.gethostname()} {dev()}" if dev().type == "cuda" else ""
    meeting.set(f"device {this}", own)
    devices = [meeting.get(f"device {rank}").decode() for rank in range(size)]
    if all(devices) and len(set(devices)) == size:
        return "nccl"
    if any(devices) and this == 0:
        LOG.info("ranks share a GPU, or have none: they exchange tensors by gloo")
    return "gloo"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown} are"


def _store_by_address(this: int, size: int) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun keeps, and rank 0 under other launchers."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT {port[:100]!r}: must be a port from 1 to 65535")
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if this == 0 and not kept_by_launcher:
        return _listening(_address_to_listen_on(host), int(port), size)
    return _connected(host, int(port), size, LAUNCHER_ANSWERS if kept_by_launcher else ASSEMBLY)


def _address_to_listen_on(host: str) -> str:
    """The address of MASTER_ADDR; "" for all, where a name stands for this host and not for one address of it.

    Many hosts have their own name at 127.0.1.1, while other nodes know it at an address that this one cannot tell.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:          # ValueError: a name that no host can have
        raise UserError(f"MASTER_ADDR {host[:100]}: is no address of this host ({reason(error)})") from None
    return "" if _is_loopback(address) and host not in (address, "localhost") else address


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _listening(address: str, port: int, size: int) -> dist.TCPStore:
    """A store that listens on one address alone (torch itself takes all of the host).

    address: "" for all. port: 0 for one that is free.
    """
    try:
        listener = _listener(address, port)
    except OSError as error:
        raise UserError(f"the port {port}, where the ranks are to meet, cannot be had ({reason(error)}): set another "
                        "MASTER_PORT") from None
    port = listener.getsockname()[1]
    return dist.TCPStore(address or "localhost", port, size, is_master=True, wait_for_workers=False, timeout=ANSWER,
                         master_listen_fd=listener.detach())


def _listener(address: str, port: int) -> socket.socket:
    ipv6 = ":" in address or (not address and socket.has_dualstack_ipv6())
    listener = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ipv6 and not address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if address and error.errno == errno.EADDRNOTAVAIL:          # others reach this host at an address that it lacks
            return _listener("", port)
        raise
    return listener


def _connected(host: str, port: int, size: int, patience: timedelta) -> dist.TCPStore:
    """The store that another process keeps; LostRankError where nobody listens there within that time.

    Every REMINDER it says what it waits for: rank 0, which would say who is missing, is not there.
    """
    began, reminders = time.monotonic(), 0
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()          # torch would fill pages with its tries
            break
        except ValueError as error:
            raise UserError(f"MASTER_ADDR {host[:100]}: is no address of a host ({reason(error)})") from None
        except OSError as error:
            waited = timedelta(seconds=time.monotonic() - began)
            if waited // REMINDER > reminders:
                reminders += 1
                LOG.warning("waiting for rank 0 at %s, port %d, since %s s", host[:100], port, waited.seconds)
            if waited > patience:
                raise LostRankError(f"nobody answers at {host[:100]}, port {port}, where the ranks are to meet "
                                    f"({reason(error)}): rank 0 or its launcher is gone") from None
            time.sleep(0.2)
    return dist.TCPStore(host, port, size, is_master=False, wait_for_workers=False, timeout=ANSWER)


def _store_over_mpi(this: int, size: int) -> dist.TCPStore:
    """The store where the ranks meet: rank 0 listens on a port that the system picks, and sends it over MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("running on several ranks with mpiexec needs mpi4py: pip install 'guided-pixels[mpi]', or "
                        "use torchrun") from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise UserError(f"the launcher started {size} ranks but mpi4py sees {comm.Get_size()}: mpi4py and mpiexec "
                        "must come from the same MPI; without MPI, set MASTER_ADDR and MASTER_PORT")
    one_node = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == size
    if this == 0:
        host = "127.0.0.1" if one_node else _own_address()
        meeting = _listening(host, 0, size)
        comm.bcast((host, meeting.port))
        return meeting
    host, port = comm.bcast(None)
    return _connected(host, port, size, ASSEMBLY)


def _own_address() -> str:
    """An address of this host that other nodes can reach: that of its name, else the one that it sends from."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.getfqdn())
        if not _is_loopback(address):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))            # nothing is sent: this only asks for the route
        return str(probe.getsockname()[0])
    raise UserError(f"the host name {socket.getfqdn()!r} does not resolve: set MASTER_ADDR and MASTER_PORT")


def dev() -> torch.device:
    """The device of this rank: the GPU with the number of the rank on its node, or the CPU where there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", launched().local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def device_name() -> str:
    """The device of this rank in words: the name of the GPU, or like "2 CPU cores, 1 thread a rank"."""
    device = dev()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    return f"{cores} CPU core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)} a rank"


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


def one_process(remedy: str = "") -> None:
    """Raises UserError where a launcher started several ranks for what one process is to do.

    The ranks do not connect, as in a shell that has a launcher's variables there is but one. All others than the first
    wait with the sentence, so that a launcher that ends them then spares it. remedy: what else one can do, as its end.
    """
    if (ranks := world_size()) > 1:
        if not is_main():
            time.sleep(LAST_TO_SPEAK)
        raise UserError(f"{ranks} ranks were started, and this is the work of one process: start the command without "
                        f"mpiexec, torchrun or srun, and without their variables, like WORLD_SIZE{remedy}")


def sync_params(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every rank with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            with torch.no_grad():
                dist.broadcast(tensor, 0)


@contextmanager
def collective() -> Iterator[None]:
    """Turns the failure of a collective operation in the block, and of nothing else, into LostRankError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not dist.is_initialized():
            raise
        raise LostRankError("a rank is gone: it was killed, or its node is down") from None


def gathered(tensor: Tensor) -> list[Tensor]:
    """The tensors that the ranks give, in their order, on the CPU; all must have one shape and type.

    Raises LostRankError where a rank was killed.
    """
    if world_size() == 1:
        return [tensor.cpu()]
    if dist.get_backend() == "nccl":
        tensor = tensor.to(dev())
    pieces = [torch.empty_like(tensor) for _ in range(world_size())]
    with collective():
        dist.all_gather(pieces, tensor.contiguous())
    return [piece.cpu() for piece in pieces]


def told_by_main(value: Any) -> Any:
    """What rank 0 gives, on every rank; JSON must hold it. Raises LostRankError where a rank was killed."""
    if not dist.is_initialized():
        return value
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=dev())
    size = torch.tensor(len(text), device=dev())
    with collective():
        dist.broadcast(size, 0)
        if not is_main():
            text = torch.empty(int(size), dtype=torch.uint8, device=dev())
        dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))


def say(line: str) -> None:
    """Logs a line, unless it is empty, on the first rank."""
    if line and is_main():
        LOG.info("%s", line)


def has_last_word() -> bool:
    """Whether no other rank has asked this before: the one that may say why the job ends.

    Without an answer of the store, which is then gone, rank 0 may.
    """
    if _meeting is None:
        return True
    try:
        _meeting.set_timeout(LAST_WORD)
        return _meeting.add("last word", 1) == 1
    except RuntimeError:
        return is_main()


def shutdown() -> None:
    """Disconnects the ranks; does nothing where there is no group."""
    global _meeting
    if dist.is_initialized():
        dist.destroy_process_group()
    _meeting = None
