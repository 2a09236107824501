"""What every command shares: a mistake ends it with one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from . import dist_util
from .errors import LostRankError, NonFiniteError, PeerError, UserError


def run_script(main: Callable[[], None]) -> None:
    """`main()`; a user's mistake ends the process with one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, NonFiniteError, PeerError) as error:
        if not isinstance(error, PeerError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist_util.shutdown()        # else its threads may abort the process on its way out
        sys.exit(2)
    except LostRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)                 # the usual way out waits for the rank that is gone
