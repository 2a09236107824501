"""Where a whole job stands, on rank 0, which hears it from all ranks."""

from __future__ import annotations

from .. import dist_util
from ..progress import progress_bar
from .workers import WorkQueue


class RunProgress:
    """Where the whole job stands, on rank 0: a bar, or plain lines every `log_every` images; doing: what it does."""

    def __init__(self, queue: WorkQueue, num_samples: int, todo: int, log_every: int, doing: str = "sampling") -> None:
        self.queue, self.todo, self.before = queue, todo, num_samples - todo
        self.progress = progress_bar(num_samples, doing, "image", self.before, every=log_every)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.show(finished=kind is None)
        self.progress.close()

    def show(self, finished: bool = False) -> None:
        """Tells how far it is."""
        if dist_util.is_main():
            done = self.before + (self.todo if finished else int(min(self.queue.work(), self.todo)))
            self.progress.note(f"{self.queue.alive()} of {self.queue.size} ranks")
            self.progress.update(done - self.progress.done)
