"""What every command shares: how it ends, how it logs, and how an old name leads to the new one."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Callable

from . import dist_util
from .errors import LostRankError, NonFiniteError, PeerError, UserError
from .places import command_file


def run_script(main: Callable[[], None]) -> None:
    """Run `main()`; a user's mistake ends the process with one line on stderr and exit code 2."""
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


def log_to_stdout() -> None:
    """Show what the library logs, as plain lines on stdout."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)


def log_to_stderr(shown: bool = True) -> None:
    """Show what the library logs, as plain lines on stderr; not `shown`, as on ranks but the first: warnings alone."""
    logging.basicConfig(level=logging.INFO if shown else logging.WARNING, format="%(message)s", stream=sys.stderr)


def run_renamed(old: str, new: str, *words: str) -> None:
    """Run a command under the name that it had before, and say the new name on stderr.

    old: how it was called. new: the name of its file. words: what the new command is given beside the arguments of
    this process.
    """
    shown = " ".join([f"scripts/{new}.py", *words])
    command = " ".join([new.replace("_", "-"), *words])
    print(f"{old} is now `python {shown}`, or `guided-pixels {command}`", file=sys.stderr, flush=True)
    sys.argv += words
    runpy.run_path(str(command_file(new)), run_name="__main__")
