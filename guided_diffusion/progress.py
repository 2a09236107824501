"""The progress of work: a bar on a terminal, a line now and then where there is none, on rank 0 alone.

One style everywhere: what is done, how much of it, how fast, how long it will still take. Whoever wants to know the
same, such as the state of a job that another shell reads, is called with the steps that are under way.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TYPE_CHECKING

from .launchers import is_main

if TYPE_CHECKING:
    from tqdm import tqdm

FIRST_LINE, NEXT_LINES = 10.0, 60.0     # seconds until the first line where there is no terminal, and between others
REDRAWN = 0.2                           # seconds between two drawings of a bar
WINDOW, MARKS = 60.0, 30                # seconds over which a rate is measured, and looks at the clock in them
BYTES = "B"                             # the unit that is shown in kB, MB and so on

Watcher = Callable[[Sequence["Progress"]], None]

_open: list[Progress] = []              # from the outermost to the innermost
_watchers: list[Watcher] = []


@dataclass(frozen=True)
class Step:
    """How far a step of a job is: `done` of `total` units (None: unknown).

    rate: units a second, None where nothing is known yet. note: what else is to say, or "".
    """

    what: str
    unit: str
    done: int
    total: int | None
    rate: float | None = None
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take, None where that is not known."""
        return None if self.total is None or not self.rate else max(0, self.total - self.done) / self.rate

    @property
    def part(self) -> str:
        """The part that is being done, as what is within it says it, like "row 2 of 9 (sag)"."""
        count = f"{min(self.done + 1, self.total)} of {self.total}" if self.total else str(self.done + 1)
        return f"{self.unit} {count}{f' ({self.note})' if self.note else ''}"

    def __str__(self) -> str:
        left = self.seconds_left
        words = [self._amount(), self._speed(), "" if left is None else f"{clock(left)} left", self.note]
        return f"{self.what}: {', '.join(word for word in words if word)}"

    def ended(self, seconds: float) -> str:
        """The same in words where the step has ended, after so many seconds."""
        words = [self._amount(), self._speed(), f"took {clock(seconds)}", self.note]
        return f"{self.what}: {', '.join(word for word in words if word)}"

    def _amount(self) -> str:
        if self.unit == BYTES:
            return in_bytes(self.done) if self.total is None else f"{in_bytes(self.done)} of {in_bytes(self.total)}"
        return f"{self.done if self.total is None else f'{self.done} of {self.total}'} {plural(self.unit)}"

    def _speed(self) -> str:
        if not self.rate:
            return ""
        if self.unit == BYTES:
            return f"{in_bytes(self.rate)}/s"
        return f"{self.rate:.3g} {plural(self.unit)}/s" if self.rate >= 0.1 else f"{1 / self.rate:.3g} s/{self.unit}"


def plural(unit: str) -> str:
    """The unit's name for several of them."""
    return unit + ("es" if unit.endswith("ch") else "s")


def clock(seconds: float) -> str:
    """A time in words, like 0:01:20."""
    return str(timedelta(seconds=round(seconds)))


def in_bytes(size: float) -> str:
    """A number of bytes in decimal units, like 1.02 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class Progress:
    """Work of `total` units (None: unknown), of which `initial` are done; close it, or use it in a `with` block.

    what: in words. unit: what is counted, for one of them; `BYTES` for bytes. enabled: False shows and tells nothing,
    as on ranks other than the first. every: units between two lines on stdout, in place of the bar; 0: a bar where
    there is a terminal, else a line now and then on stderr.
    """

    def __init__(self, total: int | None, what: str, unit: str, initial: int = 0, enabled: bool = True,
                 every: int = 0) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, initial
        self.enabled = enabled and is_main()
        self._note, self._began = "", time.monotonic()
        self._marks = deque([(self._began, initial)], maxlen=MARKS)
        self._shown: _Shown | None = None
        if self.enabled:
            nested = any(other._shown is not None for other in _open)
            self._shown = _Lines(sys.stdout, initial, every) if every else (
                _Bar(total, initial, nested) if _on_terminal() else _Lines(sys.stderr, initial, quick=nested))
            _open.append(self)
            self._tell()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """So many more units are done."""
        self.done += count
        if self.enabled:
            now = time.monotonic()
            if now - self._marks[-1][0] >= WINDOW / MARKS:
                self._marks.append((now, self.done))
            self._tell()

    def note(self, text: str) -> None:
        """Shows `text` beside the numbers, from the next drawing on."""
        self._note = text

    def close(self) -> None:
        """Ends it; the last line says what was done in what time."""
        if not self.enabled:
            return
        self.enabled = False
        within = self._outside()
        _open[:] = [other for other in _open if other is not self]
        if self._shown is not None:
            self._shown.end(within, self.step(), time.monotonic() - self._began)

    def step(self) -> Step:
        """How far it is."""
        began, before = self._marks[0]
        passed = time.monotonic() - began
        rate = (self.done - before) / passed if self.done > before and passed > 0 else None
        return Step(self.what, self.unit, self.done, self.total, rate, self._note)

    def _outside(self) -> str:
        """What this is a part of, as the beginning of a line."""
        outer = [other.step().part for other in _open[:_open.index(self)] if other.unit != BYTES]
        return "".join(f"{part}, " for part in outer)

    def _tell(self) -> None:
        if self._shown is not None:
            self._shown.draw(self)
        for watcher in _watchers:
            watcher(_open)


class _Shown:
    """Where a progress is shown."""

    def draw(self, progress: Progress) -> None:
        """Shows how far it is, where it is time for that."""

    def end(self, within: str, step: Step, seconds: float) -> None:
        """Shows how it ended. within: what it is a part of."""


class _Lines(_Shown):
    """Plain lines in a stream: now and then, or every so many units. quick: says nothing where it ends soon."""

    def __init__(self, stream: IO[str], initial: int, every: int = 0, quick: bool = False) -> None:
        self.stream, self.every, self.quick = stream, every, quick
        self.initial, self.shown, self.next, self.spoke = initial, initial, time.monotonic() + FIRST_LINE, False

    def draw(self, progress: Progress) -> None:
        """A line, where it is time for one."""
        due = progress.done >= self.shown + self.every if self.every else time.monotonic() >= self.next
        if not due or progress.done == progress.total:          # which the end says
            return
        self.next, self.shown, self.spoke = time.monotonic() + NEXT_LINES, progress.done, True
        self._print(f"{progress._outside()}{progress.step()}")

    def end(self, within: str, step: Step, seconds: float) -> None:
        """The last line; none where nothing was done."""
        if self.spoke or (step.done > self.initial and not self.quick):
            self._print(f"{within}{step.ended(seconds)}")

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):          # a pipe that nobody reads any more is no reason to stop
            print(line, file=self.stream, flush=True)


class _Bar(_Shown):
    """A bar on the terminal; one within another stands below it, and goes when it ends."""

    def __init__(self, total: int | None, initial: int, nested: bool) -> None:
        from tqdm import tqdm  # here, as networks and samplers run without this package

        shape = "{percentage:3.0f} % |{bar:16}| {desc}" if total else "{desc}"
        self.bar: tqdm = tqdm(total=total, initial=initial, bar_format=shape, dynamic_ncols=True, leave=not nested,
                              mininterval=0, file=sys.stderr)
        self.next = 0.0

    def draw(self, progress: Progress) -> None:
        """Draws it anew, where that was some time ago."""
        now = time.monotonic()
        if now >= self.next:
            self.next = now + REDRAWN
            self._set(progress.done, str(progress.step()))

    def end(self, within: str, step: Step, seconds: float) -> None:
        """Draws it for the last time."""
        self._set(step.done, step.ended(seconds))
        self.bar.close()

    def _set(self, done: int, text: str) -> None:
        self.bar.n = done
        self.bar.set_description_str(text)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(total: int | None, what: str, unit: str, initial: int = 0, enabled: bool = True,
                 every: int = 0) -> Progress:
    """The progress of work of `total` units; the arguments are those of `Progress`."""
    return Progress(total, what, unit, initial, enabled, every)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within, other lines can be written on the terminal: the bars are taken away, and drawn again below them."""
    if not any(isinstance(progress._shown, _Bar) for progress in _open):
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within, `watcher` is called with what is under way, from the outermost to the innermost, at each update."""
    inner = len(_open)

    def told(under_way: Sequence[Progress]) -> None:
        watcher(under_way[inner:])

    _watchers.append(told)
    try:
        yield
    finally:
        _watchers.remove(told)
