"""A run cut into chunks, and some of them, both without a list: a run may have billions of images."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self


@dataclass(frozen=True)
class Chunks:
    """The indices of the images of each chunk: `chunks[index]` is a range.

    total: images of the run. size: images of a chunk; the last one may have fewer.
    """

    total: int
    size: int

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __getitem__(self, index: int) -> range:
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        return range(index * self.size, min((index + 1) * self.size, self.total))

    def __iter__(self) -> Iterator[range]:
        return (self[index] for index in range(len(self)))

    def images_in(self, indices: Indices) -> int:
        """How many images these chunks have together."""
        last = len(self) - 1
        return len(indices) * self.size - (last in indices) * (len(self) * self.size - self.total)


@dataclass(frozen=True)
class Indices:
    """Increasing whole numbers, held as spans (first, one after the last)."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, spans: Iterable[Sequence[int]]) -> Self:
        """Those of spans that another rank told, as JSON holds them: lists in place of pairs."""
        return cls(tuple((first, end) for first, end in spans))

    @classmethod
    def without(cls, count: int, others: Iterable[int]) -> Self:
        """Those from 0 below `count` that are not among the others."""
        edges = [-1, *sorted(set(others)), count]
        gaps = ((before + 1, after) for before, after in itertools.pairwise(edges))
        return cls(tuple((first, end) for first, end in gaps if first < end))

    @cached_property
    def _before(self) -> list[int]:
        """How many numbers lie before each span."""
        return list(itertools.accumulate((end - first for first, end in self.spans), initial=0))

    def __len__(self) -> int:
        return self._before[-1]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise IndexError(f"number {place} of {len(self)}")
        span = bisect_right(self._before, place) - 1
        return self.spans[span][0] + place - self._before[span]

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(range(first, end) for first, end in self.spans)

    def __contains__(self, number: object) -> bool:
        return any(isinstance(number, int) and first <= number < end for first, end in self.spans)
