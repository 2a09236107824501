"""Work on all cores that this process may use: in several processes, or in threads that read files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from .errors import LostRankError
from .progress import progress_bar

GLANCE = 1.0                    # seconds between looks of a worker at the process that it works for
MOST_READING = 8                # threads; more of them only wait for the disk

Piece = TypeVar("Piece", bound=Sized)
Result = TypeVar("Result")


def usable_cores() -> int:
    """The number of cores that this process may use: fewer than there are where a scheduler or launcher says so."""
    if hasattr(os, "sched_getaffinity"):            # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reading_threads() -> ThreadPoolExecutor:
    """Threads that read and decode files, one for each core that this process may use, at most MOST_READING."""
    return ThreadPoolExecutor(min(MOST_READING, usable_cores()))


def on_all_cores(function: Callable[[Piece], Result], pieces: Sequence[Piece], what: str, unit: str) -> list[Result]:
    """Returns what the function gives of each piece, in their order, and shows the progress.

    what, unit: as of `progress_bar`, which counts what the pieces hold. An exception, also that of a signal, ends the
    work when the pieces under way are done. Workers leave signals to this process, as Ctrl-C in a terminal reaches all
    of them: a worker that died of one would leave this process waiting. They end with it, however it ends. Raises
    LostRankError where one is killed.
    """
    results, count = [], min(len(pieces), usable_cores())
    with (ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(),)) as pool,
          progress_bar(sum(map(len, pieces)), what, unit) as progress):
        try:
            for piece, result in zip(pieces, pool.map(function, pieces), strict=True):
                results.append(result)
                progress.update(len(piece))
        except BrokenProcessPool:
            raise LostRankError(f"{what}: a process is gone that worked on it: it was killed, as where memory is not "
                                "enough") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _begin(parent: int) -> None:
    """Prepares a worker."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(GLANCE)
    os._exit(1)
