"""Files from the network: fetched once, resumed where a download broke off, checked, and there whole or not at all.

Addresses begin with https:// or http://, or with gs:// or az://, which need the package blobfile. Processes that want
the same file at the same time, such as the ranks of a node, wait for the one that fetches it.

Why not pooch or huggingface_hub: checkpoints here are up to 2 GB and lie on plain web servers and in blob storage. A
download that breaks off must go on where it stopped, in the next run as well, and only if the server still has the same
file; ranks must not fetch a file twice; and a file is checked for its size, its SHA-256 and its content before any
other process sees it. Of these, pooch has the SHA-256 alone, and huggingface_hub serves its own hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from .errors import UserError, resumable
from .files import locked, open_own, reason, write_text
from .progress import BYTES, progress_bar

TIMEOUT = 60          # seconds without a byte
TRIES = 5             # in a row that bring nothing new
PAUSE = 1.0           # seconds after the first of them, doubled after each further one

_WEB, _BLOBS = ("https://", "http://"), ("gs://", "az://")
_PIECE, _BLOB_PIECE = 1 << 20, 1 << 24          # bytes; a piece of a blob is a request
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)          # HTTP statuses of a server that may do better later


def default_cache() -> Path:
    """$XDG_CACHE_HOME/guided-pixels, or ~/.cache/guided-pixels."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "guided-pixels"


def is_address(path: str | Path) -> bool:
    """Whether `path` is an address that can be fetched, and not the path of a local file."""
    return isinstance(path, str) and path.lower().startswith(_WEB + _BLOBS)


def without_secrets(text: str) -> str:
    """`text` without what may be secret in the addresses in it: user, password and query."""
    return re.sub(r"(\w+:/+)(?:[^/\s]*@)?([^\s?#]*)(?:\?[^\s#]*)?", r"\1\2", text)


def public_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options by name, without what is secret in addresses."""
    return {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}


def _is_blob(url: str) -> bool:
    return url.lower().startswith(_BLOBS)


def local(path: str | Path, cache: str | Path | None = None,
          check: Callable[[Path], str | None] | None = None) -> str | Path:
    """Where a file is on this machine: a path as it was given, an address in the cache, fetched on its first use.

    path: an address may end in #sha256=HEX, which the file is then compared with at each use.
    cache: folder; None is the folder checkpoints in `default_cache()`.
    check: as in `Download`.
    """
    if not is_address(path):
        return path
    url, _, fragment = str(path).partition("#")
    if fragment and not fragment.startswith("sha256="):
        raise UserError(f"{without_secrets(url)}: only #sha256= and the SHA-256 of the file can follow an address")
    folder = Path(cache) if cache is not None else default_cache() / "checkpoints"
    return Download(url, folder / _digest(url)[:16] / _name_in(url), sha256=fragment.removeprefix("sha256=") or None,
                    check=check, otherwise=", or give its path in place of the address").run()


def _name_in(url: str) -> str:
    """The file name at the end of an address, as any file system takes it."""
    last = Path(urllib.parse.unquote(url.partition("?")[0])).name.lstrip(".")
    name = "".join(char if char.isprintable() else "_" for char in last)
    return name.encode()[-100:].decode(errors="ignore") or "file"


def size_of(url: str) -> int | None:
    """Bytes of the file at an address, where the server says so without sending it."""
    try:
        if _is_blob(url):
            return _blob_storage(url).stat(url).size
        with _request(url, method="HEAD") as response:
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdecimal() else None
    except Exception:          # what is wrong shows when the file is fetched
        return None


def check_sha256(what: str, digits: str) -> None:
    """Raises UserError, which begins with `what`, where these are not the digits of a SHA-256."""
    if not re.fullmatch("[0-9a-fA-F]{64}", digits):
        raise UserError(f"{what} {digits}: must be 64 hexadecimal digits")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Failure(Exception):
    """What went wrong, in words that follow the address."""


class _Unreachable(_Failure):
    """There is no network, or no such host: worth another try only where it worked a moment ago."""


class _Broken(_Failure):
    """The other side failed in a way that another try may mend."""


class _Changed(_Broken):
    """The file became another one while it was read."""


@dataclass(frozen=True)
class Download:
    """A file to have from an address: `run()` fetches it, unless it is there."""

    url: str
    target: Path
    size: int | None = None          # bytes, where known
    sha256: str | None = None        # hexadecimal, where known
    check: Callable[[Path], str | None] | None = None          # what else is wrong with a file, like "is truncated"
    otherwise: str = ""              # ends the advice of what to do by hand

    def __post_init__(self) -> None:
        if self.sha256 is not None:
            check_sha256("SHA-256", self.sha256)

    def run(self) -> Path:
        """The target, whole and checked; shows progress on stderr.

        Raises UserError where it cannot be had, with where to put the file by hand, or where what is there already is
        not what it should be. What came of a broken download is kept for the next run, beside the target.
        """
        fetched = False
        try:
            lock, part = self.target.with_name(f".{self.target.name}.lock"), _Part(self.target, self.url)
            if not self.target.exists():
                self.target.parent.mkdir(parents=True, exist_ok=True)
                with locked(lock), resumable():
                    if not self.target.exists():          # as another process may have been first
                        self._fetch(part)
                        fetched = True
            elif lock.exists() or part.is_there():        # a kill came when the file was there
                with contextlib.suppress(OSError), locked(lock):
                    part.remove()
            problem = None if fetched else self._problem(self.target)
        except _Failure as failure:
            raise UserError(f"{self._shown} {failure}: {self._by_hand}") from None
        except OSError as error:
            raise UserError(f"the download of {self._shown} to {self.target} failed ({reason(error)}): "
                            f"{self._by_hand}") from None
        if problem:
            raise UserError(f"{self.target}: {problem}, delete it to have it downloaded again")
        return self.target

    @property
    def _shown(self) -> str:
        return without_secrets(self.url)

    @property
    def _by_hand(self) -> str:
        return f"download {self._shown} elsewhere and put it at {self.target}{self.otherwise}"

    def _fetch(self, part: _Part) -> None:
        try:
            for _ in range(2):
                resumed = self._receive(part)
                problem = self._problem(part.path)
                if problem is None:
                    os.replace(part.path, self.target)
                    _sync_folder(self.target.parent)
                    return
                part.remove()
                if not resumed:          # else its pieces may not belong together, in spite of what the server said
                    break
            raise _Failure(f"gave a file that {problem}")
        finally:
            part.tidy()

    def _receive(self, part: _Part) -> bool:
        """Receives the whole file; True where it is made of the answers to several requests."""
        furthest, failed, received = part.size(), 0, False
        while not part.is_whole():
            try:
                resumed = self._receive_more(part)
            except _Failure as failure:
                if isinstance(failure, _Changed):
                    part.remove()
                came = part.size()
                received |= came > furthest
                failed = 1 if came > furthest else failed + 1
                furthest = max(came, furthest)
                if not (isinstance(failure, _Broken) or (received and isinstance(failure, _Unreachable))):
                    raise
                if failed == TRIES:
                    kept = f", and the next run goes on after {came:,} bytes" if part.start()[0] else ""
                    raise _Failure(f"{failure}, {TRIES} times in a row{kept}") from None
                time.sleep(PAUSE * 2 ** (failed - 1))
            else:
                return resumed
        return True

    def _receive_more(self, part: _Part) -> bool:
        """One request: receives what is missing, or all where that cannot be; True in the first case."""
        answer = _ask(self.url, *part.start())
        total = answer.total if answer.total is not None else self.size
        with contextlib.closing(answer.pieces):
            if self.size is not None and total != self.size:
                raise _Failure(f"gave {total:,} bytes instead of {self.size:,}")
            _check_space(self.target.parent, (total or 0) - answer.start)
            part.begin(answer)
            done = answer.start
            bar = progress_bar(total, f"downloading {self.target.name}", BYTES, done)
            with open(part.path, "ab") as file, bar as progress:
                for piece in answer.pieces:
                    file.write(piece)
                    progress.update(len(piece))
                    done += len(piece)
                    if total is not None and done > total:
                        break
                file.flush()
                os.fsync(file.fileno())
        if total is not None and done < total:
            raise _Broken(f"broke off after {done:,} of {total:,} bytes")
        if total is not None and done > total:
            part.remove()
            raise _Failure(f"gave more than {total:,} bytes")
        return answer.start > 0

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a file, in words that follow its name."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size:,} bytes instead of {self.size:,}"
        with open(path, "rb") as file:
            if re.match(rb"\s*<(!doctype )?html", file.read(1000), re.IGNORECASE):
                return "is a web page"
        if self.sha256 is not None and (found := sha256_of(path)) != self.sha256.lower():
            return f"has the SHA-256 {found} instead of {self.sha256.lower()}"
        return self.check(path) if self.check is not None else None


class _Part:
    """What has come of a file, in a file beside it, and in another one what it is a part of."""

    def __init__(self, target: Path, url: str) -> None:
        self.path = target.with_name(f".{target.name}.part")
        self._record = target.with_name(f".{target.name}.part.json")
        self._url = _digest(url)          # as the address itself may hold a secret

    def is_there(self) -> bool:
        return self.path.exists() or self._record.exists()

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def start(self) -> tuple[int, str]:
        """The bytes there are and their version; (0, "") where the rest cannot be fetched without them."""
        version = self._recorded().get("version")
        return (self.size(), version) if version and self.size() else (0, "")

    def is_whole(self) -> bool:
        return self.start()[0] > 0 and self.start()[0] == self._recorded().get("total")

    def begin(self, answer: _Answer) -> None:
        """Cuts off what the answer sends anew, and notes what it sends."""
        with os.fdopen(open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.truncate(answer.start)
        write_text(self._record, json.dumps({"url": self._url, "version": answer.version, "total": answer.total}))

    def remove(self) -> None:
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Keeps what the next run can go on from, and nothing else."""
        if not self.start()[0]:
            self.remove()

    def _recorded(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) and record.get("url") == self._url else {}


@dataclass(frozen=True)
class _Answer:
    """What a server sends: the file from byte `start` on."""

    pieces: Generator[bytes, None, None]
    start: int
    total: int | None          # bytes of the whole file, where known
    version: str               # what changes when the file does; "" where nothing tells


def _ask(url: str, start: int, version: str) -> _Answer:
    """The file from byte `start` on where it is still of that version, else the whole file. Raises _Failure."""
    return (_ask_blobs if _is_blob(url) else _ask_web)(url, start, version)


def _ask_web(url: str, start: int, version: str) -> _Answer:
    try:
        response = _request(url, {"Range": f"bytes={start}-", "If-Range": version} if start else {})
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _ask_web(url, 0, "")
        kind = _Broken if error.code in _TRANSIENT else _Failure
        raise kind(f"cannot be downloaded (HTTP {error.code} {reason(error.reason)})") from None
    except urllib.error.URLError as error:
        raise _Unreachable(f"cannot be reached ({reason(error.reason)})") from None
    except (http.client.InvalidURL, ValueError):
        raise _Failure("is no address to fetch from") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"gives no answer ({reason(error)})") from None
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise _Failure("gave a web page instead of a file")
    if response.status != http.client.PARTIAL_CONTENT:
        return _Answer(_web_pieces(response), 0, response.length, _version(response.headers))
    content = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", response.headers.get("Content-Range", ""))
    if start and content and int(content[1]) == start and _version(response.headers) == version:
        return _Answer(_web_pieces(response), start, int(content[2]), version)
    response.close()
    if not start:
        raise _Broken("gave a part of the file only")
    return _ask_web(url, 0, "")


def _request(url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "guided-pixels", **(headers or {})}, method=method)
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web addresses, but not from https to http."""

    def redirect_request(self, request: urllib.request.Request, answer: IO[bytes], code: int, message: str,
                         headers: http.client.HTTPMessage, address: str) -> urllib.request.Request | None:
        if not address.lower().startswith(_WEB):
            scheme = urllib.parse.urlsplit(address).scheme
            raise urllib.error.HTTPError(request.full_url, code, f"redirect to {scheme[:20] or 'no web address'}",
                                         headers, answer)
        if request.type == "https" and not address.lower().startswith("https:"):
            raise urllib.error.HTTPError(request.full_url, code, "redirect away from https", headers, answer)
        return super().redirect_request(request, answer, code, message, headers, address)


def _version(headers: Message) -> str:
    """What a request for the rest of a file can name with If-Range: an entity tag that is not weak, else a date."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _web_pieces(response: http.client.HTTPResponse) -> Generator[bytes, None, None]:
    left = sys.maxsize if response.length is None else response.length
    with response:
        while left:          # as a server may keep the connection open after the last byte
            try:
                piece = response.read1(min(_PIECE, left))
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"broke off ({reason(error)})") from None
            if not piece:
                return
            left -= len(piece)
            yield piece


def _blob_storage(url: str) -> Any:
    try:
        import blobfile
    except ImportError:
        raise _Failure("needs the package blobfile: pip install 'guided-pixels[blob]' or pip install blobfile, or "
                       "without it") from None
    return blobfile.create_context(retry_limit=TRIES, connect_timeout=TIMEOUT, read_timeout=TIMEOUT,
                                   log_callback=lambda message: None)


def _ask_blobs(url: str, start: int, version: str) -> _Answer:
    storage = _blob_storage(url)
    with _blob_errors():
        stat = storage.stat(url)
        start = start if version == _blob_version(stat) else 0
        file = storage.BlobFile(url, "rb", streaming=True)
        file.seek(start)
    return _Answer(_blob_pieces(storage, url, file, stat), start, stat.size, _blob_version(stat))


def _blob_version(stat: Any) -> str:
    return f"{stat.version or stat.mtime}, {stat.size} bytes"


def _blob_pieces(storage: Any, url: str, file: Any, stat: Any) -> Generator[bytes, None, None]:
    with _blob_errors(), file:
        while piece := file.read1(_BLOB_PIECE):
            yield piece
        if _blob_version(storage.stat(url)) != _blob_version(stat):
            raise _Changed("changed while it was read")


@contextlib.contextmanager
def _blob_errors() -> Iterator[None]:
    """Any error of blobfile as a _Failure; it has tried again by itself."""
    try:
        yield
    except _Failure:
        raise
    except FileNotFoundError:
        raise _Failure("cannot be downloaded (there is no such file)") from None
    except Exception as error:
        raise _Unreachable(f"cannot be reached ({reason(getattr(error, 'message', error))})") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _Failure(f"does not fit into {folder} ({needed:,} bytes are needed, {free:,} are free)")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
