"""The hours of a bench: counted over all starts of the command, and what a piece of work is expected to take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from guided_diffusion.files import write_json
from guided_diffusion.foreign import read_json

FILE = "hours.json"


class Hours:
    """Counts the time of finished pieces of work in a file of the bench's folder.

    limit: hours that all starts together may take; None for any. first_rate: seconds of an evaluation of one image on
    all ranks together, until it is measured.
    """

    def __init__(self, folder: Path, limit: float | None, first_rate: float) -> None:
        self.path, self.limit, self.first_rate = folder / FILE, limit, first_rate
        known: dict[str, Any] = {"seconds": 0.0, "evaluations": 0.0, "done": []}
        if self.path.is_file():
            known = read_json(self.path, lambda found: found.keys() >= known.keys())
        self.seconds, self.evaluations, self.done = known["seconds"], known["evaluations"], list(known["done"])
        self.reserve = 0.0
        self._began = time.monotonic()

    @property
    def rate(self) -> float:
        """Seconds of an evaluation of one image, on all ranks together and with all that is around it."""
        return self.seconds / self.evaluations if self.evaluations else self.first_rate

    @property
    def left(self) -> float:
        """Seconds that are left for sampling; `reserve` of them are kept for the evaluation at the end."""
        limit = float("inf") if self.limit is None else 3600 * self.limit
        return limit - self.seconds - self.reserve - (time.monotonic() - self._began)

    def expected(self, evaluations: float) -> float:
        """Returns the seconds that so many evaluations will take."""
        return evaluations * self.rate

    def finish(self, key: str, evaluations: float) -> None:
        """Counts the time since the last piece, of which so many evaluations were made."""
        now = time.monotonic()
        if key not in self.done:
            self.seconds += now - self._began
            self.evaluations += evaluations
            self.done.append(key)
            write_json(self.path, {"seconds": self.seconds, "evaluations": self.evaluations, "done": self.done})
        self._began = now
