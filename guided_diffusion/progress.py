"""The progress of work: a bar with rate and time left, on rank 0 alone, redrawn rarely where nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from .launchers import is_main


def progress_bar(total: int | None, what: str, unit: str, initial: int = 0, enabled: bool = True,
                 **options: Any) -> Any:
    """A tqdm of `total` units (None: unknown), of which `initial` are done; other ranks than 0 show nothing.

    what: in words, before the bar. unit: what is counted. enabled: False shows nothing. options: further ones of tqdm,
    such as unit_scale, or an iterable to loop over.
    """
    from tqdm import tqdm  # here, as networks and samplers run without this package

    return tqdm(total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True,
                disable=not (enabled and is_main()), mininterval=0.5 if sys.stderr.isatty() else 10, **options)
