"""The chunks of a run, made by whichever rank is free, with progress and an end that all ranks see."""

from __future__ import annotations

import time
from collections.abc import Callable

from .. import dist_util
from .chunks import Chunks, Indices
from .progress import RunProgress
from .workers import WorkQueue

Make = Callable[[int, Callable[[float], None]], None]       # index of a chunk, called with the part of it that is done


def make_chunks(make: Make, chunks: Chunks, todo: Indices, queue: WorkQueue, log_every: int = 0,
                doing: str = "sampling") -> None:
    """Calls `make` for each chunk of `todo`, on whichever rank is free; all ranks call this, in the block of `queue`.

    Rank 0 comes back when all are made. log_every: images between two lines of progress; 0: a bar. doing: its word.
    """
    with RunProgress(queue, chunks.total, chunks.images_in(todo), log_every, doing) as progress:
        done = 0
        while (index := queue.next_index()) < len(todo):
            count = len(chunks[todo[index]])

            def on_step(part: float, before: int = done, count: int = count) -> None:
                queue.check()
                queue.report(before + part * count)
                progress.show()

            make(todo[index], on_step)
            done += count
            queue.report(done)
            queue.finish_index()
        while dist_util.is_main() and queue.finished() < len(todo):
            queue.check()
            progress.show()
            time.sleep(0.05)
