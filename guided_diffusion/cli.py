"""What every command shares: how it ends, logs and tells where its files are, and how an old name leads to the new."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

from .allocator import keep_freed_memory
from .errors import LostRankError, NonFiniteError, PeerError, UserError, notes_of
from .fetch import without_secrets
from .files import reason
from .launchers import is_main, launched, world_size
from .links import linked, open_in_browser, paths_in, takes_links, worth_showing
from .options import Options, Preset, switch
from .places import LOGDIR, command_file
from .progress import aside

SIGNALLED = 128                 # a process that a signal ends has this and the signal's number as its exit code
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)      # what a full disk says, and a pipe that nobody reads
GLANCE, FAREWELL = 1.0, 20.0    # seconds between looks at the launcher, and for a rank to end by itself without it

_log = logging.getLogger(__name__)


class Signalled(KeyboardInterrupt):
    """A signal asks the process to end. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run_script(main: Callable[[], None]) -> None:
    """Run `main()`; a user's mistake ends the process with one line on stderr and exit code 2.

    Ctrl-C ends it with one line and exit code 130, SIGTERM with 143, SIGHUP with 129; what is being written is removed
    first. The line says so where the same command goes on (`errors.resumable`). Where nobody reads stdout any more, as
    behind `| head`, it ends with 141, as other programs do.
    """
    _replace_closed_streams()
    _print_any_name()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")       # else its C++ adds warnings where a connection breaks
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")              # else torch's profiler writes lines of its own
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")      # twice as large: refused
    keep_freed_memory()
    try:
        with _signals_raised():
            _watch_torchrun()
            _run_and_print(main)
        _disconnect()               # else its threads may abort the process on its way out
    except KeyboardInterrupt as error:
        _end_signalled(error)
    except (UserError, NonFiniteError) as error:
        _has_last_word()            # so that ranks which the launcher ends now say nothing
        _end(str(error))
    except PeerError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            _end_signalled(error.__cause__, silent=True)
        _end()
    except OSError as error:
        if error.filename is None:
            raise
        _end(f"{error.filename}: {reason(error)}")
    except LostRankError as error:
        _say(f"error: {error}")
        os._exit(2)                 # the usual way out waits for the rank that is gone
    except (MemoryError, RuntimeError) as error:
        from .execution import is_out_of_memory  # here, as it takes long to load

        if not is_out_of_memory(error):
            raise
        _end(f"memory is not enough ({reason(error)[:200]}): ask for less at a time, such as a smaller --batch_size")


def _replace_closed_streams() -> None:
    """Opens nowhere in place of standard streams that are closed: else a file of data gets their number, and lines."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")       # noqa: SIM115  # until the end of the process
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _print_any_name() -> None:
    """Makes stdout escape what its encoding cannot show, as stderr does: a name of a file may hold anything."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run_and_print(main: Callable[[], None]) -> None:
    """Runs `main` and writes all that it has printed; raises UserError where a full disk does not take it."""
    try:
        main()
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        with contextlib.suppress(OSError):          # else what is left to be printed would fail once more, at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            _disconnect()
            sys.exit(SIGNALLED + signal.SIGPIPE)
        raise UserError(f"output cannot be written ({reason(error)})") from None


def _say(line: str) -> None:
    print(without_secrets(line), file=sys.stderr, flush=True)


def _end(message: str = "") -> None:
    if message:
        _say(f"error: {message}")
    _disconnect()
    if _is_one_of_several():        # else torch's threads may abort a rank on the usual way out
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def _is_one_of_several() -> bool:
    try:
        return world_size() > 1
    except UserError:               # the mistake that ends this process may be the launcher's
        return False


def _end_signalled(error: KeyboardInterrupt, silent: bool = False) -> None:
    number = error.number if isinstance(error, Signalled) else signal.SIGINT
    if _has_last_word() and not silent:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        _say(": ".join([word, *notes_of(error)]))
    _disconnect()
    sys.exit(SIGNALLED + number)


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Within, the first of Ctrl-C, SIGTERM and SIGHUP raises Signalled; those that follow do not cut its tidying short.

    A signal that is ignored, or has a handler of the caller, stays as it is.
    """
    usual: dict[int, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
        signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
        getattr(signal, "SIGHUP", signal.SIGTERM): signal.SIG_DFL}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) == handler]
    if threading.current_thread() is not threading.main_thread():
        ours = []

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Signalled(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def _watch_torchrun() -> None:
    """Ends this process where the torchrun that started it is killed, and could not end it any more."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(GLANCE)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(FAREWELL)
    _say("error: torchrun is gone")
    os._exit(2)                     # the main thread waits for it, in torch


def _has_last_word() -> bool:
    if "torch" not in sys.modules:          # then no rank is connected
        return True
    from . import dist_util

    return dist_util.has_last_word()


def _disconnect() -> None:
    if "torch" in sys.modules:
        from . import dist_util

        dist_util.shutdown()


class _AsideHandler(logging.StreamHandler):
    """Writes lines between the bars of the terminal, and not into them.

    Where lines can no longer be written, the command ends as it does where it prints (`run_script`).
    """

    def emit(self, record: logging.LogRecord) -> None:
        with aside():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:       # noqa: N802  # the name that logging calls
        error = sys.exception()
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise error
        super().handleError(record)


def log_to_stdout() -> None:
    """Show what the library logs, as plain lines on stdout."""
    _log_to(sys.stdout, logging.INFO)


def log_to_stderr(shown: bool = True) -> None:
    """Show what the library logs, as plain lines on stderr; not `shown`, as on ranks but the first: warnings alone."""
    _log_to(sys.stderr, logging.INFO if shown else logging.WARNING)


def _log_to(stream: TextIO, level: int) -> None:
    logging.basicConfig(level=level, format="%(message)s", handlers=[_AsideHandler(stream)])
    logging.getLogger("torch").setLevel(logging.WARNING)        # as torch does, unless it is ended while it is loaded


def with_logdir(preset: Preset) -> Preset:
    """A preset of a command that the official codes have: --out, where it is not given, is what OPENAI_LOGDIR names.

    A line says so; a variable that is empty names nothing.
    """
    def values(given: dict[str, Any]) -> dict[str, Any]:
        folder = os.environ.get(LOGDIR)
        if not folder or "out" in given:
            return preset(given)
        if is_main():
            _log.info("--out is not given: the folder is %s, as %s says", folder, LOGDIR)
        return {**preset(given), "out": folder}

    return values


@dataclass(frozen=True)
class ShowOptions(Options):
    """What is shown in the end."""

    open: bool = switch("open the page that was written, or else the picture, in the browser")


def tell(text: str, show: ShowOptions | None = None) -> None:
    """Print what a command has to say; paths of files, in lines like `page: path`, are links where the terminal can.

    show: whether the first page that the text names, or else the first picture, is opened in the browser, which the
    first rank does. Where that is impossible, a sentence on stderr says so, as the work itself is done.
    """
    if not text:
        return
    print(linked(text) if takes_links(sys.stdout) else text, flush=True)
    if show is None or not show.open or launched().rank:
        return
    path = worth_showing(paths_in(text))
    sentence = open_in_browser(path) if path else "--open: without effect, as no page and no picture was written"
    if sentence:
        _say(sentence)


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
