"""The chunks of a run, made by whichever rank is free, with progress and an end that all ranks see."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from .. import dist_util
from .chunk_files import ChunkFiles
from .chunks import Indices
from .progress import RunProgress
from .workers import WorkQueue


class Make(Protocol):
    """Gives the arrays of images by their numbers; on_step is called with the part of them that is done."""

    def __call__(self, image_ids: Sequence[int], on_step: Callable[[float], None]) -> Mapping[str, Any]:
        """The arrays, of one row an image each."""


def make_chunks(make: Make, files: ChunkFiles, todo: Indices, queue: WorkQueue, log_every: int = 0,
                doing: str = "sampling") -> None:
    """Completes each chunk of `todo`, on whichever rank is free; all ranks call this, in the block of `queue`.

    Rank 0 comes back when all are made. log_every: images between two lines of progress; 0: a bar. doing: its word.
    """
    chunks = files.chunks
    with RunProgress(queue, chunks.total, chunks.images_in(todo), log_every, doing) as progress:
        done = 0
        while (index := queue.next_index()) < len(todo):
            count = len(chunks[todo[index]])

            def on_step(part: float, before: int = done, count: int = count) -> None:
                queue.check()
                queue.report(before + part * count)
                progress.show()

            files.complete(todo[index], partial(make, on_step=on_step), dist_util.rank())
            done += count
            queue.report(done)
            queue.finish_index()
        while dist_util.is_main() and queue.finished() < len(todo):
            queue.check()
            progress.show()
            time.sleep(0.05)
