"""A file server on this machine that fails in the ways real ones do."""

import contextlib
import http.server
import re
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Served:
    """A file as the server sends it."""

    content: bytes
    tag: str = '"1"'                # entity tag; "": none
    modified: str = ""              # date of the last change; "": none
    ranges: bool = True             # answers requests for a part of the file
    strict: bool = True             # heeds If-Range
    length: int | bool = True       # the Content-Length it says: that of the content, none, or another
    type: str = "application/octet-stream"
    redirect: str = ""              # sends the client to that address
    statuses: list[int] = field(default_factory=list)        # of its first answers, which are errors
    cuts: list[int] = field(default_factory=list)            # bytes after which its first answers break off
    pause: float = 0                # seconds between pieces
    piece: int = 1 << 16            # bytes
    headers: dict[str, str] = field(default_factory=dict)    # instead of its own


class Server(http.server.ThreadingHTTPServer):
    """Sends `files`, by their path, and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str, str | None]] = []          # method, path, Range

    def add(self, path, content=b"", **how):
        """Serves a file and returns its address."""
        self.files[path] = Served(content, **how)
        return self.url + path

    @property
    def ranges(self):
        """The Range header of each GET so far."""
        return [asked for method, _, asked in self.requests if method == "GET"]

    def handle_error(self, request, client_address):
        pass          # clients may leave


@contextlib.contextmanager
def serving():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, with_content):
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, asked))
        file = self.server.files.get(path)
        status = file.statuses.pop(0) if file and file.statuses and with_content else 0
        if file is None or status:
            return self.send_error(status or 404)
        if file.redirect:
            self.send_response(302)
            self.send_header("Location", file.redirect)
            return self.end_headers()
        start = self._start(file, asked)
        if start >= len(file.content) > 0:
            return self.send_error(416)
        self._head(file, start)
        return self._send(file, start) if with_content else None

    def _start(self, file, asked):
        condition = self.headers.get("If-Range")
        if not asked or not file.ranges or (file.strict and condition not in (None, file.tag, file.modified)):
            return 0
        return int(re.fullmatch(r"bytes=(\d+)-", asked)[1])

    def _head(self, file, start):
        whole = len(file.content)
        length = whole - start if file.length is True else file.length
        headers = {"Content-Type": file.type, "ETag": file.tag, "Last-Modified": file.modified,
                   "Content-Length": "" if length is False else str(length),
                   "Content-Range": f"bytes {start}-{whole - 1}/{whole}" if start else "", **file.headers}
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _send(self, file, start):
        end = start + file.cuts.pop(0) if file.cuts else len(file.content)
        with contextlib.suppress(ConnectionError):
            for first in range(start, min(end, len(file.content)), file.piece):
                self.wfile.write(file.content[first:min(first + file.piece, end)])
                time.sleep(file.pause)

    def log_message(self, *_):
        pass
