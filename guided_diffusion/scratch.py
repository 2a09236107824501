"""Folders of unfinished work: they go when their process ends, and what a killed one left goes with the next run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from .files import open_own

OWNER = ".owner"                # a file in each folder: the name of the host, locked by the process that works there
DAY, WEEK = 86400, 7 * 86400    # seconds


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder and removes what is there under its name when the block ends.

    While the block runs, `remove_abandoned` of other processes leaves it in peace. Raises OSError where it cannot be
    made.
    """
    new = folder.with_name(f"{folder.name}.new")        # gets its name when it has an owner
    owner: int | None = None
    try:
        new.mkdir()
        owner = _owned(new)
        new.rename(folder)
        yield folder
    finally:
        if owner is not None:
            os.close(owner)
        for left in (new, folder):
            shutil.rmtree(left, ignore_errors=True)


def publish(folder: Path, done: Path) -> None:
    """Gives a scratch folder that is finished its lasting name; raises OSError."""
    (folder / OWNER).unlink(missing_ok=True)
    os.replace(folder, done)


def remove_abandoned(parent: Path, name: str) -> None:
    """Removes the scratch folders in `parent` whose process is gone.

    name: a regular expression that the whole name must match; nothing else is touched. A folder that another host made
    goes when nothing has changed in it for a week, as its process cannot be seen from here.
    """
    pattern = re.compile(rf"(?:{name})(?:\.new)?")
    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            if pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _owned(folder: Path) -> int:
    """Locks the owner's file of a new folder and returns its descriptor."""
    descriptor = open_own(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(descriptor, socket.gethostname().encode())
    with contextlib.suppress(OSError, ImportError):     # a file system without locks, Windows
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = open_own(folder / OWNER, os.O_RDWR)
    except FileNotFoundError:
        return _age(folder) > DAY
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as stream:
        if stream.read(1000) != socket.gethostname().encode():
            return _age(folder) > WEEK
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (OSError, ImportError):
            return _age(folder) > WEEK
    return True


def _age(folder: Path) -> float:
    """Seconds since something last changed in a folder; 0 where that cannot be seen."""
    try:
        return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0
