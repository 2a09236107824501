"""The progress of work on one rank: a bar with rate and time left, redrawn rarely where nobody watches."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:
    """A bar of `total` units, of which `initial` are done."""
    return tqdm(total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)
