"""Where a whole job stands, on rank 0: a bar, or plain lines."""

from __future__ import annotations

import time
from datetime import timedelta

from .. import dist_util
from ..progress import progress_bar
from .workers import WorkQueue


class RunProgress:
    """Where the whole job stands, on rank 0: a bar, or plain lines every `log_every` images; doing: what it does."""

    def __init__(self, queue: WorkQueue, num_samples: int, todo: int, log_every: int, doing: str = "sampling") -> None:
        self.queue, self.num_samples, self.before, self.log_every = queue, num_samples, num_samples - todo, log_every
        self.began, self.logged = time.monotonic(), num_samples - todo
        self.bar = progress_bar(num_samples, doing, "image", initial=self.before,
                                enabled=dist_util.is_main() and not log_every)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.show(finished=kind is None)
        self.bar.close()

    def show(self, finished: bool = False) -> None:
        """Draws the bar anew, or prints a line where it is time for one."""
        if not dist_util.is_main():
            return
        todo = self.num_samples - self.before
        made = todo if finished else min(self.queue.work(), todo)
        done = self.before + int(made)
        ranks = f"{self.queue.alive()} of {self.queue.size} ranks"
        if not self.log_every:
            self.bar.set_postfix_str(ranks, refresh=False)
            self.bar.update(done - self.bar.n)
        elif done >= self.logged + self.log_every or (done == self.num_samples > self.logged):
            self.logged = done
            rate = made / max(1e-9, time.monotonic() - self.began)
            left = timedelta(seconds=round((self.num_samples - done) / rate)) if rate else "unknown"
            print(f"{done} of {self.num_samples} images, {rate:.3g} images/s, {left} left, {ranks}", flush=True)
