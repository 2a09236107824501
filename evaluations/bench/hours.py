"""The hours of a bench: counted over all starts of the command, and what a piece of work is expected to take."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from guided_diffusion.files import write_json
from guided_diffusion.foreign import read_json
from guided_diffusion.jobs import State, read_state

FILE = "hours.json"
NOTHING: dict[str, Any] = {"seconds": 0.0, "sampling": 0.0, "evaluations": 0.0, "done": []}


def count_killed(folder: Path) -> None:
    """Counts what a start that was killed took after it last counted, as far as its state tells.

    To be called before another job says its state in that folder. Raises UserError where one of the files is damaged.
    """
    state = read_state(folder)
    if state is None or state.state is not State.GONE:
        return
    path = folder / FILE
    known = _known(path)
    # Files of before did not say when they were written.
    counted = max(known.get("counted") or (path.stat().st_mtime if path.is_file() else 0.0), state.began)
    if state.written > counted:
        write_json(path, {**known, "seconds": known["seconds"] + state.written - counted, "counted": state.written})


def _known(path: Path) -> dict[str, Any]:
    return read_json(path, lambda found: found.keys() >= NOTHING.keys()) if path.is_file() else NOTHING


class Hours:
    """Counts the time of all starts of the command in a file of the bench's folder.

    limit: hours that all starts together may take; None for any. first_rate: seconds of an evaluation of one image on
    all ranks together, until it is measured. reserve: seconds that are kept for the evaluation at the end. evaluating:
    by rows in words, the seconds that their evaluation took when their features were not yet there.
    """

    def __init__(self, folder: Path, limit: float | None, first_rate: float) -> None:
        self.path, self.limit, self.first_rate = folder / FILE, limit, first_rate
        known = _known(self.path)
        self.seconds: float = known["seconds"]              # of everything
        self.sampling: float = known["sampling"]            # of rows alone, which made these evaluations
        self.evaluations: float = known["evaluations"]
        self.done: list[str] = list(known["done"])
        self.evaluating: dict[str, list[float]] = dict(known.get("evaluating", {}))     # not in older folders
        self.reserve = 0.0
        self._began = time.monotonic()

    @property
    def rate(self) -> float:
        """Seconds of an evaluation of one image, on all ranks together and with all that is around it."""
        return self.sampling / self.evaluations if self.evaluations else self.first_rate

    @property
    def left(self) -> float:
        """Seconds that are left for sampling; infinite where there is no limit."""
        if self.limit is None:
            return math.inf
        return 3600 * self.limit - self.seconds - self.reserve - (time.monotonic() - self._began)

    def expected(self, evaluations: float) -> float:
        """Returns the seconds that so many evaluations will take."""
        return evaluations * self.rate

    def count(self, key: str = "", evaluations: float = 0.0) -> None:
        """Counts the time since the last call, that of sampling where it made evaluations.

        key: of a piece of work that is finished with it.
        """
        passed, self._began = time.monotonic() - self._began, time.monotonic()
        self.seconds += passed
        if evaluations:
            self.sampling += passed
            self.evaluations += evaluations
        if key and key not in self.done:
            self.done.append(key)
        write_json(self.path, {"seconds": self.seconds, "sampling": self.sampling, "evaluations": self.evaluations,
                               "done": self.done, "evaluating": self.evaluating, "counted": time.time()})
