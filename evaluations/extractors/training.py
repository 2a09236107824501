"""The training loop that the bundled extractors share: epochs, a log with a line for each, and rounded weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.files import write_text
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.progress import progress_bar


@dataclass(frozen=True)
class EpochTraining:
    """Everything that a training over epochs needs.

    losses: the losses of an epoch, each of the next batch, with its graph. steps: how many there are. measure: measures
    the network on held-out images after an epoch, and says in words what it found.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler           # of each step
    epochs: int
    steps: int
    losses: Callable[[], Iterable[Tensor]]
    measure: Callable[[], str]

    def run(self, log_file: Path, head: str) -> None:
        """Trains, and writes `head` and a line for each epoch to the log; the last epoch's weights are rounded."""
        from .bundled import round_convolutions

        started, log = time.monotonic(), head
        write_text(log_file, log)
        with progress_bar(self.epochs, "training", "epoch") as progress:
            for epoch in range(1, self.epochs + 1):
                mean_loss = self._epoch()
                if epoch == self.epochs:
                    round_convolutions(self.model)
                log += (f"epoch {epoch:2d}  train loss {mean_loss:.4f}  {self.measure()}  "
                        f"{time.monotonic() - started:.0f} s\n")
                write_text(log_file, log)
                progress.update()

    def _epoch(self) -> float:
        """Trains for one epoch, and returns the mean loss."""
        self.model.train()
        loss_sum = 0.0
        with progress_bar(self.steps, "one epoch", "batch") as progress:
            for loss in self.losses():
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                loss_sum += loss.item()
                progress.update()
        return loss_sum / self.steps


def learning_rate_factor(step: int, warm_up: int, total: int) -> float:
    """Rises linearly to 1 over the first `warm_up` steps, then falls to 0 at `total` as half a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
