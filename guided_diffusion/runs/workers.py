"""The ranks of one job share its work: whoever is free takes the next index, and all of them see one end.

Launchers and torch.distributed give the ranks their numbers and connect them. This file adds four things: a work queue,
values that one rank puts and others get, signs of life with the amount of work done, and the end of the job. All of it
goes through the key-value store that connects the ranks (`dist_util.store`). There is no collective operation, so that
no rank waits for a slower one.

The keys of the store, where R is a rank:

    key          value          written by                                read by
    -----------  -------------  ----------------------------------------  -----------------------------------------
    value NAME   JSON           the rank that puts it, once               every rank that gets it, which waits for it
    taken        a count        every rank, +1 for each index it takes    the same addition, which gives the index
    finished     a count        every rank, +1 for each index it is       rank 0
                                finished with
    sign R       "BEATS WORK"   rank R, at each beat                      rank 0; that of rank 0: all others
    end          "KIND RANK"    the first rank that knows it (below),     all ranks, at each beat
                                once: it never changes
    seen R       ""             rank R, at the beat at which it reads     the rank that wrote `end`; rank 0 where
                                `end`                                     another rank is lost
    left R       ""             rank R, as it leaves a job that it ended  all others, where rank R failed

In each rank a thread beats every BEAT seconds: it writes `sign`, watches the signs of others and reads `end`. The main
thread, which works, learns of the end from `check()`, which it calls often. The end of a job of the ranks 0, 1 and 2:

    all is done     1, 2    come to the end of their blocks and wait for `end`.
                    rank 0  comes to the end of its block: end = "done 0"; waits for `seen 1` and `seen 2`; writes
                            `left 0`; leaves.
                    1, 2    read `end`; write `seen`; leave.

    rank 1 fails    rank 1  end = "failed 1"; waits for `seen 0` and `seen 2`; writes `left 1`; raises its exception.
                    0, 2    read `end`; write `seen`; `check()` raises PeerError, which leaves the block after `left 1`
                            and LAST_WORDS. So a launcher hears first from the rank that knows what happened.

    rank 1 is lost  rank 1  writes no `sign` any more.
                    rank 0  meets SILENCE beats without a new one: end = "lost 1"; `check()` raises LostRankError, which
                            leaves the block after `seen 2`.
                    rank 2  reads `end`; writes `seen`; `check()` raises PeerError, which leaves the block after
                            LAST_WORDS.

    rank 0 is lost  1, 2    cannot reach the store any more, which rank 0 keeps, and end for themselves with "lost 0";
                            or, where it still answers, meet SILENCE beats without a new `sign 0`: end = "lost 0".
                            `check()` raises LostRankError, which leaves the block after LAST_WORDS.

Every wait for `seen` and `left` ends after LINGER seconds, so that no rank hangs on one that is lost as well.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Self, TypeVar

from .. import dist_util
from ..errors import LostRankError, PeerError
from ..late import dist

BEAT = 0.5          # seconds between signs of life
SILENCE = 40        # beats without one, after which a rank counts as lost
LINGER = 10.0       # seconds that a rank which ends the job waits for the others to see it, and they for it to leave
LAST_WORDS = 1.0    # seconds for it to say why: a launcher may end it as soon as any other rank leaves

Answer = TypeVar("Answer")

_queues = itertools.count()


class EndKind(Enum):
    """The three ways in which a job ends."""

    DONE = "done"           # rank 0 left the block
    FAILED = "failed"       # a rank raised an exception in the block
    LOST = "lost"           # a rank gives no sign of life


@dataclass(frozen=True)
class End:
    """How a job ended.

    rank: the rank that ended it (0 where all is done), that failed, or that is lost.
    """

    kind: EndKind
    rank: int

    def encode(self) -> str:
        """The end as it stands in the store, like "failed 3"."""
        return f"{self.kind.value} {self.rank}"

    @classmethod
    def decode(cls, text: str) -> Self:
        """The end that `encode` wrote."""
        kind, rank = text.split()
        return cls(EndKind(kind), int(rank))


RANK_0_LOST = End(EndKind.LOST, 0)


class _Board:
    """The keys in the table above, each written and read in one place.

    Every method raises RuntimeError where rank 0, which keeps the store, is lost.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def put(self, name: str, value: Any) -> None:
        self._store.set(f"value {name}", json.dumps(value))

    def get(self, name: str) -> Any:
        return json.loads(self._store.get(f"value {name}"))

    def take(self) -> int:
        """The next index, from 0, that no rank has taken."""
        return self._store.add("taken", 1) - 1

    def finish(self) -> None:
        self._store.add("finished", 1)

    def finished(self) -> int:
        return self._store.add("finished", 0)

    def sign(self, rank: int, beats: int, work: float) -> None:
        self._store.set(f"sign {rank}", f"{beats} {work}")

    def signed(self, rank: int) -> tuple[int, float] | None:
        """The last sign of a rank, (beats, work); None where it has given none."""
        if not self._store.check([f"sign {rank}"]):
            return None
        beats, work = self._store.get(f"sign {rank}").split()
        return int(beats), float(work)

    def end_with(self, end: End) -> End:
        """Ends the job, unless it has ended; returns the end that counts."""
        return End.decode(self._store.compare_set("end", "", end.encode()).decode())

    def end(self) -> End | None:
        return End.decode(self._store.get("end").decode()) if self._store.check(["end"]) else None

    def see(self, rank: int) -> None:
        self._store.set(f"seen {rank}", "")

    def all_have_seen(self, ranks: Iterable[int]) -> bool:
        return self._store.check([f"seen {rank}" for rank in ranks])

    def leave(self, rank: int) -> None:
        self._store.set(f"left {rank}", "")

    def has_left(self, rank: int) -> bool:
        return self._store.check([f"left {rank}"])


class WorkQueue:
    """The work of one job as each of its ranks sees it. All ranks make it, in the same order as other queues.

    In the `with` block each rank takes indices until they are used up. The block ends on all ranks when rank 0 leaves
    it, or when any rank fails in it: that rank raises its own exception and the others raise PeerError, or
    LostRankError where a rank was killed.

        queue = WorkQueue()
        with queue:
            while (index := queue.next_index()) < count:
                make(index)                                 # calls queue.check() and queue.report(work) now and then
                queue.finish_index()
            while queue.rank == 0 and queue.finished() < count:
                queue.check()
                time.sleep(0.05)
    """

    def __init__(self) -> None:
        self.rank, self.size = dist_util.rank(), dist_util.world_size()
        self._board = _Board(dist_util.store(f"queue{next(_queues)}"))
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._signs: dict[int, tuple[int, float]] = {}      # the last sign of each rank that this one watches
        self._work = 0.0
        self._end: End | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def put(self, name: str, value: Any) -> None:
        """Gives a value, which JSON can hold, to all ranks under a name; once for each name."""
        self._board.put(name, value)

    def get(self, name: str) -> Any:
        """The value that a rank has put under that name; waits for it."""
        return self._ask(lambda: self._board.get(name))

    def next_index(self) -> int:
        """The next index, from 0, that no rank has taken; raises what `check` raises."""
        self.check()
        return self._ask(self._board.take)

    def finish_index(self) -> None:
        """Counts one more index as finished."""
        self._ask(self._board.finish)

    def finished(self) -> int:
        """The number of indices that all ranks have finished."""
        return self._ask(self._board.finished)

    def report(self, work: float) -> None:
        """Says how much work this rank has done so far, in any unit; the others hear of it at the next beat."""
        self._work = work

    def work(self) -> float:
        """On rank 0: how much work all ranks have done, as far as they have reported it."""
        return self._work + sum(work for _, work in self._signs.values())

    def alive(self) -> int:
        """On rank 0: the number of ranks that have given a sign of life."""
        return 1 + len(self._signs)

    def check(self) -> None:
        """Raises PeerError where another rank failed, and LostRankError where one is lost."""
        if self._end is None or self._end.kind is EndKind.DONE:
            return
        rank = self._end.rank
        if self._end.kind is EndKind.FAILED:
            raise PeerError(f"rank {rank} failed")
        if self.rank != 0 and rank != 0:
            raise PeerError(f"rank {rank} is gone")         # rank 0 says so
        raise LostRankError(f"rank {rank} is gone: it was killed, or its node is down; start the same command again "
                            "to go on")

    def __enter__(self) -> Self:
        if self.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.size == 1:
            return
        try:
            if error is None and self.rank != 0:
                self._wait(lambda: self._end is not None)
                self.check()
            elif not isinstance(error, (PeerError, LostRankError)):
                self._end_job(End(EndKind.DONE if error is None else EndKind.FAILED, self.rank), error)
        except (PeerError, LostRankError) as peer:
            error = peer
            raise
        finally:
            if isinstance(error, (PeerError, LostRankError)) and self._end is not None:
                self._wait_for_those_who_speak(self._end)
            self._stopping.set()
            self._thread.join(LINGER)

    def _end_job(self, end: End, error: BaseException | None) -> None:
        """Ends the job; where it had ended elsewhere, raises what the other ranks raise."""
        try:
            self._end = self._board.end_with(end)
            if self._end == end:
                self._wait(lambda: self._board.all_have_seen(self._others), LINGER)
                self._board.leave(self.rank)
        except RuntimeError:
            return          # rank 0 is lost, and what happened here is worth more
        if self._end != end:
            try:
                self.check()
            except PeerError as peer:
                raise peer from error

    def _wait_for_those_who_speak(self, end: End) -> None:
        """Waits, in a job that ended elsewhere, for the ranks that are to say why or to hear it."""
        lost_here = end.kind is EndKind.LOST and self.rank == 0
        try:
            if end.kind is EndKind.FAILED:
                self._wait(lambda: self._board.has_left(end.rank), LINGER)
            elif self.rank == 0:
                hearers = [rank for rank in self._others if rank != end.rank]
                self._wait(lambda: self._board.all_have_seen(hearers), LINGER)
        except RuntimeError:
            pass            # it was rank 0, and has left
        if not lost_here:
            time.sleep(LAST_WORDS)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The store's answer; where it has none, rank 0 is lost."""
        try:
            return question()
        except RuntimeError:
            self._end = self._end or RANK_0_LOST
            self.check()
            raise

    @staticmethod
    def _wait(condition: Callable[[], bool], seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            time.sleep(BEAT / 5)

    def _live(self) -> None:
        """What the thread does: it beats until this rank leaves or rank 0 is lost."""
        silent = dict.fromkeys(self._others if self.rank == 0 else [0], 0)      # beats without a new sign
        try:
            for beats in itertools.count():
                self._board.sign(self.rank, beats, self._work)
                self._watch(silent)
                end = self._board.end()
                if end is not None:
                    self._end = end
                    self._board.see(self.rank)
                if self._stopping.wait(BEAT):
                    return
        except RuntimeError:
            self._end = self._end or RANK_0_LOST

    def _watch(self, silent: dict[int, int]) -> None:
        """Reads the signs of the ranks that this one watches, and ends the job where one is silent for too long."""
        for rank in silent:
            sign = self._board.signed(rank)
            silent[rank] = silent[rank] + 1 if sign == self._signs.get(rank) else 0
            if sign is not None:
                self._signs[rank] = sign
            if silent[rank] > SILENCE:
                self._board.end_with(End(EndKind.LOST, rank))
