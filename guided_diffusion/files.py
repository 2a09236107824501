"""Files and folders that commands write: whole or not at all, under a lock, and checked before the work begins."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import UserError

LOCK = ".lock"                 # of a folder in which a job works
TRIES, PAUSE = 5, 0.2          # of taking a lock that is not waited for, and the seconds between them

MAX_HOLDER = 300               # characters that are read of who holds a lock
NAME_KEPT = 60                 # characters of a file's name that its temporary file bears too
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def reason(error: object) -> str:
    """What went wrong, in the words of the operating system where it has any, on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())


# Checks before the work


def check_writable(flag: str, path: str | Path, parents: bool = False, read: Iterable[str | Path] = ()) -> None:
    """Raises UserError, naming the flag (with its dashes), where the file `path` could not be written; "" is fine.

    parents: make the folder of `path` first. read: files that the command reads or writes otherwise, which `path` would
    replace.
    """
    if not path:
        return
    if any(other and Path(other).resolve() == Path(path).resolve() for other in read):
        raise UserError(f"{flag} {path}: is another file of this command, which would be lost; name another one")
    folder = Path(path).parent
    try:
        if parents:
            folder.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(0, "is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({reason(error)})") from None


def check_ending(flag: str, path: str | Path, *endings: str) -> None:
    """Raises UserError, naming the flag (with its dashes), where a name ends in none of these, like ".png"."""
    if not str(path).lower().endswith(endings):
        raise UserError(f"{flag} {path}: must end in {', '.join(endings)}")


def check_space(folder: Path, needed: int, cannot: str, what: str) -> None:
    """Raises UserError, which begins with `cannot`, where the disk of a folder has fewer than `needed` bytes left.

    what: the bytes are, in words.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{cannot} (No space left on device: {needed:,} bytes are needed, {what}, {free:,} are free)")


def check_folder(flag: str, path: str | Path) -> Path:
    """Makes the folder `path`, writes a file in it as a test, and returns it.

    Raises UserError, naming the flag (with its dashes, like --out), where either is impossible.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({reason(error)})") from None
    return Path(path)


def stamp(path: str | Path) -> tuple[int, int, int] | None:
    """What differs once a file was replaced or written: its inode, time and size; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):          # who reads it says so
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, which need not exist, is a folder or lies in it, at any depth and behind any links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


# Files that appear whole or not at all


def write(path: str | Path, save: Callable[[Path], object], *, sync: bool = False, ending: str = "",
          parents: bool = False) -> None:
    """Calls `save(temporary)`, then renames the temporary file to `path`.

    parents: make the folder of `path` first. Other arguments and errors are those of `prepare`.
    """
    with contextlib.ExitStack() as held:
        temporary = _prepare(Path(path), save, held, sync, ending, parents)
        try:
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(path, error, ending) from None


def prepare(path: str | Path, save: Callable[[Path], object], *, sync: bool = False, ending: str = "") -> Path:
    """Calls `save(temporary)` and returns the temporary file, which a rename then turns into `path`.

    The temporary file lies beside `path`, under a name that no other process uses, and is made anew: no link that
    others planted is followed. It ends in .tmp, so that whoever lists files by their suffix finds whole ones alone:
    `save` must be told the format, and must write this very file, not another in its place. The file has the access
    rights of any new one. What a killed process left of such a file is removed by the next one that writes `path`;
    until the rename, see to it that no other does.

    sync: have the data on the disk before the rename, so that a power cut leaves the old file or the new one.
    ending: what comforts the user, at the end of the sentence, like "finished chunks are kept".

    Raises UserError where the operating system refuses. Whatever `save` raises, no temporary file is left.
    """
    with contextlib.ExitStack() as held:
        return _prepare(Path(path), save, held, sync, ending)


def _prepare(path: Path, save: Callable[[Path], object], held: contextlib.ExitStack, sync: bool, ending: str,
             parents: bool = False) -> Path:
    """As `prepare`; held: at its end, others may take the file for one that a killed process left."""
    temporary: Path | None = None
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary, stream = _made_anew(path)
        held.callback(stream.close)
        save(temporary)
        if sync:
            _sync(temporary)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, error, ending) from None
        raise
    return temporary


def _made_anew(path: Path) -> tuple[Path, IO[bytes]]:
    """Makes the temporary file of `path`, and returns it with the open file, by which this process holds it.

    It has the first name that is free; what is there, and held by no process, was left by one that was killed.
    """
    names = (path.with_name(f".{path.name[:NAME_KEPT]}.{number}.tmp") for number in itertools.count())
    for temporary in names:
        _remove_left(temporary)
        try:
            stream = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666), "wb")
        except FileExistsError:
            continue
        ours = hold(stream)
        if ours and is_same_file(stream, temporary):
            while _remove_left(next(names)):
                pass
            return temporary, stream
        stream.close()
        if ours is None:                  # Windows renames no open file
            return temporary, stream
        # Else another process has just taken it for one that was left.
    raise AssertionError


def _remove_left(temporary: Path) -> bool:
    """Removes a temporary file that no process holds; on a file system without locks, none. Says whether it did."""
    try:
        with os.fdopen(open_own(temporary, os.O_WRONLY), "wb") as stream:
            left = bool(hold(stream)) and is_same_file(stream, temporary)
            if left:
                temporary.unlink()
            return left
    except OSError:                         # there is none, or it is another user's
        return False


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes the temporary files that killed processes left in a folder, where no process may be writing now.

    name: of the files that they would have become, as a pattern.
    """
    for left in folder.glob(f".{name}.tmp"):
        left.unlink(missing_ok=True)


def _unwritable(path: str | Path, error: OSError, ending: str) -> UserError:
    return UserError(f"{path}: cannot be written ({reason(error)}){f'; {ending}' if ending else ''}")


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def write_text(path: str | Path, text: str, *, sync: bool = False, ending: str = "") -> None:
    r"""Writes a text file in UTF-8, whole or not at all; arguments and errors as `prepare`.

    Of names of files that are no text, the bytes stand as stdout shows them, like \udce9.
    """
    content = text.encode(errors="backslashreplace")
    write(path, lambda file: file.write_bytes(content), sync=sync, ending=ending)


def write_json(path: str | Path, content: Any, *, sync: bool = False, ending: str = "") -> None:
    """Writes a JSON file, whole or not at all; arguments and errors as `prepare`."""
    write_text(path, json.dumps(content, indent=2) + "\n", sync=sync, ending=ending)


def json_digest(content: Any) -> str:
    """The SHA-256, hexadecimal, of what a JSON file can hold, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Writes a CSV file, whole or not at all: floats with six digits, NaN left empty. Errors as `prepare`.

    columns: in their order; None: the names in the first row, of which there must then be at least one.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if columns is None else columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _csv_value(value) for name, value in row.items()})
    write_text(path, text.getvalue())


def _csv_value(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def open_own(path: str | Path, flags: int) -> int:
    """Opens the file of this name itself, never one to which a link leads, and returns its descriptor.

    flags: as of `os.open`; a new file has the access rights of any other. Raises OSError, also where the name is that
    of a link, a folder or a pipe.
    """
    try:
        descriptor = os.open(path, flags | NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and Path(path).is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is not followed: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return descriptor


# Locks


def hold(stream: IO[Any]) -> bool | None:
    """Holds an open file by a lock, until it is closed; False: another process does; None: there are no locks here."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None
    return True


def is_same_file(stream: IO[Any], path: Path) -> bool:
    """Whether `path` is this open file; opened anew, as a network file system may remember what was there before."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY)) as now:
            return os.path.samestat(os.fstat(now.fileno()), os.fstat(stream.fileno()))
    except OSError:
        return False


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str | None], Exception] | None = None) -> Iterator[None]:
    """Holds the lock file `path` for this process, against others on this machine and on those that share the folder.

    The lock ends with its process, however that ends; the file is removed when the work is done.

    busy: makes, of the words that say who holds the lock, the exception to raise where another process keeps it for a
        second; None: wait for as long as it takes.

    A file system without locks is warned of where `busy` is given, as the work is then as safe as its user makes it;
    whoever waits needs the lock, and gets the OSError.
    """
    stream = _acquired(path, busy)
    try:
        with contextlib.suppress(OSError):              # a full disk
            stream.seek(0)
            stream.truncate()
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            stream.close()


def only_job(out: Path, lock: Path | None = None) -> contextlib.AbstractContextManager[None]:
    """Holds what --out names for one job; raises UserError where another works there. The lock ends with its process.

    lock: the lock file of a file `out`; None: `out` is a folder, in which it lies.
    """
    what = "folder" if lock is None else "file"
    return locked(lock or out / LOCK, lambda who: UserError(
        f"--out {out}: another job is working there ({who}); wait for it, or name another {what}"))


def lock_holder(path: Path) -> str | None:
    """Who holds a lock file, in words; None where no one does."""
    import fcntl  # not on Windows

    try:
        with os.fdopen(open_own(path, os.O_RDONLY)) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return stream.read(MAX_HOLDER) or "just started"
    except OSError:
        pass
    return None


def _acquired(path: Path, busy: Callable[[str | None], Exception] | None) -> IO[str]:
    """The open lock file, locked (see `locked`)."""
    import fcntl  # not on Windows

    attempts = 0
    while True:
        stream = _lock_file(path, busy is None)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            pass
        except OSError as error:
            if busy is None:
                stream.close()
                raise
            warnings.warn(f"{path.parent}: this file system has no locks ({reason(error)}): see to it that no two jobs "
                          "work there", stacklevel=4)
            return stream
        else:
            if is_same_file(stream, path):          # else who had the lock before has removed its file
                return stream
        stream.close()
        attempts += 1
        if busy is not None:
            if attempts == TRIES:
                raise busy(lock_holder(path))
            time.sleep(PAUSE)


def _lock_file(path: Path, waits: bool) -> IO[str]:
    """The open lock file; raises OSError to who waits for it, to others UserError, where it cannot be opened."""
    try:
        return os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+")
    except OSError as error:
        if waits:
            raise
        raise UserError(f"{path}: cannot be locked ({reason(error)})") from None
