"""Work on all cores: in order, and not ended by a signal that reaches its workers."""

import os
import signal

import pytest

from guided_diffusion.cores import on_all_cores
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
