"""The words for a difference between two numbers of one metric."""

from __future__ import annotations

from dataclasses import dataclass

BETTER, WORSE, EQUAL = "better", "worse", "no difference"


@dataclass(frozen=True)
class Direction:
    """Which way a metric is better, in words.

    above, below: the verdicts on a difference above 0 and below 0. reading: how to read the numbers, "" where neither
    way is better.
    """

    above: str
    below: str
    reading: str = ""

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller number is better; False where a larger one is, and where neither way is better."""
        return self.below == BETTER

    def verdict(self, low: float, high: float) -> str:
        """Returns what the interval [low, high] of a difference says: that it is above 0, below 0, or neither."""
        if low > 0:
            return self.above
        return self.below if high < 0 else EQUAL


LOWER = Direction(above=WORSE, below=BETTER, reading="lower is better")
HIGHER = Direction(above=BETTER, below=WORSE, reading="higher is better")
