"""How this process takes memory from the system, and gives it back."""

from __future__ import annotations

import ctypes
import os

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
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, -1))
