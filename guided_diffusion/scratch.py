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
from typing import IO

from .files import PAUSE, hold, is_same_file, open_own

OWNER = ".owner"                # a file in each folder: the name of the host, locked by the process that works there
DAY, WEEK = 86400, 7 * 86400    # seconds


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder and removes what is there under its name when the block ends.

    While the block runs, `remove_abandoned` of other processes leaves it in peace. Raises OSError where it cannot be
    made.
    """
    new = folder.with_name(f"{folder.name}.new")        # gets its name when it has an owner
    owner: IO[str] | None = None
    try:
        owner = _made(new)
        new.rename(folder)
        yield folder
    finally:
        if owner is not None:
            owner.close()
        for left in (new, folder):
            _remove(left)


def publish(folder: Path, done: Path) -> None:
    """Gives a scratch folder that is finished its lasting name; raises OSError."""
    os.replace(folder, done)
    disown(done)


def disown(done: Path) -> None:
    """Removes from a folder that was published what a kill left there, where that can be done."""
    with contextlib.suppress(OSError):
        (done / OWNER).unlink()


def remove_abandoned(parent: Path, name: str) -> None:
    """Removes the scratch folders in `parent` whose process is gone.

    name: a regular expression that the whole name must match; nothing else is touched. A folder that another host made
    goes when nothing has changed in it for a week, as its process cannot be seen from here.
    """
    pattern = re.compile(rf"(?:{name})(?:\.new)?")
    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            if pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and _is_abandoned(folder):
                _remove(folder)


def _made(folder: Path) -> IO[str]:
    """Makes a new folder with its owner's file, and returns that, locked."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):        # another process has just taken it for one that was left
            owner = os.fdopen(open_own(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+")
            if hold(owner) is not False and is_same_file(owner, folder / OWNER):
                owner.write(socket.gethostname())
                owner.flush()
                return owner
            owner.close()
            time.sleep(PAUSE)


def _remove(folder: Path) -> None:
    """Removes a folder, its owner's file last, so that what a kill leaves still tells whose it was."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNER:
                path.unlink(missing_ok=True)
        disown(folder)
        folder.rmdir()


def _is_abandoned(folder: Path) -> bool:
    try:
        owner = os.fdopen(open_own(folder / OWNER, os.O_RDWR), "rb")
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            folder.rmdir()                      # nothing is in it where a kill came before it had an owner
        return _age(folder) > DAY
    except OSError:
        return False
    with owner:
        if owner.read(1000) not in (socket.gethostname().encode(), b""):        # b"": a kill came before it was written
            return _age(folder) > WEEK
        held = hold(owner)
        return held or (held is None and _age(folder) > WEEK)


def _age(folder: Path) -> float:
    """Seconds since something last changed in a folder; 0 where that cannot be seen."""
    try:
        return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0
