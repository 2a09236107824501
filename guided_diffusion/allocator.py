"""How this process takes memory from the system, and gives it back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3           # numbers of the options in glibc's malloc.h
LARGEST = 2**30                                     # bytes of an array that is kept


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the arrays to come; returns whether it does.

    glibc gives each array of more than 32 MiB back to the system as soon as it is freed, and the system fills the pages
    of the next one with zeros, one by one: up to a third of the time of an evaluation on a CPU. Arrays of more than
    LARGEST bytes go back as before. Numbers do not change by it. Where the C library is not glibc, or one of its
    variables MALLOC_... says otherwise, all stays as it is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = _glibc("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, -1))


def give_freed_memory_back() -> None:
    """Gives the system what was kept so far, so that what the process takes from now on can be measured."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where it has none of that name, as only glibc has these."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function
