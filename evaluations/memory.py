"""Measuring memory: of a call, of a block of code, and of the whole process."""

from __future__ import annotations

import math
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path

from guided_diffusion.allocator import give_freed_memory_back
from guided_diffusion.late import torch

MIB = 2**20                     # bytes
PAUSE = 0.005                   # seconds between two looks at the resident memory


def peak_memory(function: Callable[[], object], warm: bool = False) -> float:
    """The most memory in MiB that PyTorch holds during a call, above what it held before.

    On a CPU this follows from the events of the allocator, and tensors that were there before do not count. A first
    call, which may set up what later ones keep, is not measured, and not made where `warm` says that there was one.
    """
    if not warm:
        function()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / MIB


class ResidentMemoryPeak:
    """Within the block, a thread looks at the resident memory of the process every few milliseconds.

    Example: `with ResidentMemoryPeak() as memory: work()`, after which `memory.peak` is the peak.
    """

    def __enter__(self) -> ResidentMemoryPeak:
        give_freed_memory_back()        # else what the process kept would serve the block, and count for nothing
        self._start = self._highest = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(PAUSE):
            self._highest = max(self._highest, _resident_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak(self) -> float:
        """Bytes above those at the start of the block; NaN where the system does not say."""
        return self._highest - self._start


def _resident_bytes() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * float(resource.getpagesize())
    except OSError:
        return math.nan


def process_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
    except OSError:
        found = None
    if found:                       # getrusage would also count the process that started this one
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
