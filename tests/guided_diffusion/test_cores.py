"""Work on all cores: in order, on no more than it may use, and not ended by a signal that reaches its workers."""

import os
import signal
import threading
import time

import pytest

from guided_diffusion.cores import on_all_cores, reading_threads
from guided_diffusion.errors import LostRankError


def doubled(piece):
    return [2 * value for value in piece]


def signalled(piece):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return piece


def failing(piece):
    raise ValueError(f"a mistake in {piece}")


@pytest.mark.parametrize(("function", "results"), [(doubled, [[0, 2, 4], [6]]), (signalled, [[0, 1, 2], [3]])])
def test_results_are_in_the_order_of_the_pieces_whatever_signals_the_workers_get(function, results):
    assert on_all_cores(function, [[0, 1, 2], [3]], "doubling", "number") == results


def killed(piece):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_missed_in_a_sentence():
    with pytest.raises(LostRankError, match="rendering: a process is gone that worked on it"):
        on_all_cores(killed, [[0]], "rendering", "scene")


def test_an_error_ends_the_work():
    with pytest.raises(ValueError, match="a mistake in"):
        on_all_cores(failing, [[0]] * 100, "failing", "number")


def worker(piece):
    time.sleep(0.05)
    return [os.getpid(), threading.get_ident()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes choose no cores here")
def test_a_process_that_may_use_one_core_starts_one_worker(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with reading_threads() as pool:
            threads = list(pool.map(worker, range(4)))
        processes = on_all_cores(worker, [[1]] * 4, "working", "number")
    finally:
        os.sched_setaffinity(0, cores)
    assert len({thread for _, thread in threads}) == len({process for process, _ in processes}) == 1
