"""Ranks at work: the next piece for whoever is free, signs of life, and an end that all of them see.

Everything goes through the store that connects the ranks. There is no collective, so that none waits for a slower one.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from .. import dist_util
from ..errors import LostRankError, PeerError

BEAT = 0.5          # seconds between signs of life
SILENCE = 40        # beats without one, after which a rank counts as gone
LINGER = 10.0       # seconds that a rank which ends the job waits for the others to see it, and they for it to leave
LAST_WORDS = 1.0    # seconds for it to say why: a launcher may end it as soon as any other rank leaves

_count = itertools.count()


class Crew:
    """All ranks of one job, as each of them sees it. Made by all ranks in the same order.

    In the `with` block each rank takes tickets until they are used up. It ends on all ranks when rank 0 leaves it, or
    when one fails in it: that rank raises its own exception and the others PeerError, or LostRankError where a rank
    was killed.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist_util.rank(), dist_util.world_size()
        self._store = dist_util.store(f"crew{next(_count)}")
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._signs: dict[int, bytes] = {}          # the last sign of life of each rank that this one watches
        self._work = 0.0
        self._end = ""                              # "done", "failed RANK" or "gone RANK"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def tell(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def told(self, name: str) -> Any:
        """What a rank told before; waits for it."""
        return json.loads(self._asked(lambda: self._store.get(name)))

    def ticket(self) -> int:
        """The next number, from 0, that no rank has had."""
        self.check()
        return self._counted("tickets", 1)

    def finish_ticket(self) -> None:
        self._counted("finished", 1)

    def finished_tickets(self) -> int:
        return self._counted("finished", 0)

    def _counted(self, name: str, step: int) -> int:
        return self._asked(lambda: self._store.add(name, step)) - step

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The store's answer; where it has none, rank 0, which keeps it, is gone."""
        try:
            return question()
        except RuntimeError:
            self._end = self._end or "gone 0"
            self.check()
            raise

    def report(self, work: float) -> None:
        """How much this rank has done so far."""
        self._work = work

    def work(self) -> float:
        """On rank 0: how much all ranks have done, as far as they have told."""
        return self._work + sum(float(sign.split()[1]) for sign in self._signs.values())

    def alive(self) -> int:
        """On rank 0: the number of ranks that have given a sign of life."""
        return 1 + len(self._signs)

    def check(self) -> None:
        """Raises PeerError where another rank failed, LostRankError where one is gone."""
        what, _, rank = self._end.partition(" ")
        if what == "failed":
            raise PeerError(f"rank {rank} failed")
        if what == "gone":
            if self.rank != 0 and rank != "0":
                raise PeerError(f"rank {rank} is gone")         # rank 0 says so
            raise LostRankError(f"rank {rank} is gone: it was killed, or its node is down; start the same command "
                                "again to go on")

    def __enter__(self) -> Crew:
        if self.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.size == 1:
            return
        try:
            if error is None and self.rank != 0:
                self._await(lambda: bool(self._end))
                self.check()
            elif not isinstance(error, (PeerError, LostRankError)):
                self._end_job("done" if error is None else f"failed {self.rank}", error)
        except (PeerError, LostRankError) as peer:
            error = peer
            raise
        finally:
            if isinstance(error, (PeerError, LostRankError)):
                self._part(*self._end.split())
            self._stopping.set()
            self._thread.join(LINGER)

    def _end_job(self, end: str, error: BaseException | None) -> None:
        try:
            self._end = self._store.compare_set("end", "", end).decode()
            if self._end == end:
                self._await(lambda: self._store.check([f"seen {rank}" for rank in self._others]), LINGER)
                self._store.set(f"left {self.rank}", "")
        except RuntimeError:
            return          # rank 0 is gone, and what happened here is worth more
        if self._end != end:
            try:
                self.check()
            except PeerError as peer:
                raise peer from error

    def _part(self, what: str, rank: str) -> None:
        """Leaves a job that ended elsewhere, not before those who are to say or to hear why."""
        heard = [f"seen {other}" for other in self._others if str(other) != rank]
        try:
            if what == "failed":
                self._await(lambda: self._store.check([f"left {rank}"]), LINGER)
            elif self.rank == 0:
                self._await(lambda: self._store.check(heard), LINGER)
        except RuntimeError:
            pass            # it was rank 0, and has left
        if not (what == "gone" and self.rank == 0):
            time.sleep(LAST_WORDS)

    @staticmethod
    def _await(condition: Callable[[], bool], seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            time.sleep(BEAT / 5)

    def _live(self) -> None:
        silent = dict.fromkeys(self._others, 0)
        try:
            for beat in itertools.count():
                self._store.set(f"sign {self.rank}", f"{beat} {self._work}")
                for rank in self._others if self.rank == 0 else [0]:
                    sign = self._store.get(f"sign {rank}") if self._store.check([f"sign {rank}"]) else None
                    silent[rank] = silent[rank] + 1 if sign == self._signs.get(rank) else 0
                    if sign is not None:
                        self._signs[rank] = sign
                    if silent[rank] > SILENCE:
                        self._store.compare_set("end", "", f"gone {rank}")
                if self._store.check(["end"]):
                    self._end = self._store.get("end").decode()
                    self._store.set(f"seen {self.rank}", "")
                if self._stopping.wait(BEAT):
                    return
        except RuntimeError:
            self._end = self._end or "gone 0"
