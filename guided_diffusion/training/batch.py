"""The batch of a training step, and the functions that a training is given: data, networks and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..late import Tensor, torch


@dataclass(frozen=True)
class TrainingBatch:
    """The images that one rank computes losses of in a step.

    images, noise: (N, C, H, W), in [-1, 1] and standard normal. t: (N,), original step indices. weights: (N,), what
    the losses are multiplied with. cond: {"y": (N,)} or nothing.
    """

    images: Tensor
    noise: Tensor
    t: Tensor
    weights: Tensor
    cond: dict[str, Tensor]

    def split(self, size: int) -> list[TrainingBatch]:
        """Parts of at most `size` images; -1: the whole."""
        size = len(self.t) if size == -1 else size
        return [self._part(slice(start, start + size)) for start in range(0, len(self.t), size)]

    def _part(self, images: slice) -> TrainingBatch:
        return self._map(lambda x: x[images])

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainingBatch:
        cond = {name: function(value) for name, value in self.cond.items()}
        return TrainingBatch(images=function(self.images), noise=function(self.noise), t=function(self.t),
                             weights=function(self.weights), cond=cond)


Data = Callable[[int, int], Iterator[tuple[Tensor, dict[str, Tensor]]]]     # first batch, images before it -> batches
DropLabels = Callable[[Tensor, int, int], Tensor]       # labels (N,) of a rank, step, rank -> labels (N,)
Network = Callable[..., Tensor]          # of the training, compiled or not
Losses = Callable[[Network, TrainingBatch], dict[str, Tensor]]
