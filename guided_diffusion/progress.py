"""The progress of work on one rank: a bar with rate and time left, redrawn rarely where nobody watches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int | None, what: str, unit: str, initial: int = 0, enabled: bool = True,
                 **options: Any) -> tqdm:
    """A bar of `total` units, of which `initial` are done; nothing is shown where not `enabled`.

    options: further ones of tqdm, such as unit_scale.
    """
    from tqdm import tqdm  # here, as networks and samplers run without this package

    return tqdm(total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True, disable=not enabled,
                mininterval=0.5 if sys.stderr.isatty() else 10, **options)
