"""How commands end: mistakes, signals, missing files, and a launcher that is gone."""

import errno
import io
import logging
import os
import signal
import sys

import pytest
from commands import execute
from launchers import usual_signals
from PIL import Image

from guided_diffusion import cli
from guided_diffusion.errors import KEPT, NonFiniteError, PeerError, UserError
from guided_diffusion.image_files import read_image
from guided_diffusion.jobs import job
from guided_diffusion.launchers import launched


@pytest.fixture(autouse=True)
def signals():
    """Signals as in a terminal, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    usual_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(main, capsys):
    """The exit code and what stderr says."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code = 0
    try:
        cli.run_script(main)
    except SystemExit as end:
        code = end.code
    assert {number: signal.getsignal(number) for number in before} == before
    return code, capsys.readouterr().err


def test_large_pictures_are_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    read_image(tmp_path / "x.png", 1)
    assert [warning.category for warning in recwarn] == [Image.DecompressionBombWarning]
    cli.run_script(lambda: read_image(tmp_path / "x.png", 1))
    assert len(recwarn) == 1


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize(("error", "code", "said"), [
    (UserError("--x 3: must be 4"), 2, "error: --x 3: must be 4\n"),
    (NonFiniteError("step 3"), 2, "error: step 3\n"),
    (UserError("--model_path https://me:secret@host/a.pt?token=secret is no file"), 2,
     "error: --model_path https://host/a.pt is no file\n"),
    (UserError("https:/me:secret@host/a.npz is no file"), 2, "error: https:/host/a.npz is no file\n"),     # of a Path
    (MemoryError("9 GiB"), 2,
     "error: memory is not enough (9 GiB): ask for less at a time, such as a smaller --batch_size\n"),
    (PeerError("rank 1 failed"), 2, ""), (KeyboardInterrupt(), 130, "interrupted\n"),
    (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "error: x.png: No such file or directory\n")])
def test_an_error_is_one_line(error, code, said, capsys):
    assert ended(raising(error), capsys) == (code, said)


def test_a_mistake_of_the_launcher_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = ended(launched, capsys)
    assert code == 2
    assert said == "error: RANK 'x': must be a whole number of at least 0, as a launcher sets it\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error), match="a bug"):
        cli.run_script(raising(error))


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")])
def test_a_signal_ends_with_one_line_after_what_is_to_be_removed(number, code, word, capsys, tmp_path):
    def main():
        path = tmp_path / "temporary"
        path.touch()
        try:
            signal.raise_signal(number)
        except Exception:
            pytest.fail("a signal is no error that a program handles")
        finally:
            signal.raise_signal(signal.SIGTERM)         # a second one does not cut the tidying short
            path.unlink()
    assert ended(main, capsys) == (code, f"{word}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("outer", "inner", "goes_on"), [
    ("explorer", "probe", False), ("table", "sampling", True), ("table", "probe", True), ("cascade", "sampling", True)])
def test_where_the_same_command_goes_on_the_line_says_so(rank, outer, inner, goes_on, capsys, tmp_path, monkeypatch):
    def main():
        with job(outer, tmp_path, resumes=outer == "table"), job(inner, tmp_path, resumes=inner == "sampling"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("guided_diffusion.jobs.is_main", lambda: rank == 0)
    assert ended(main, capsys) == (130, f"interrupted: {KEPT}\n" if goes_on else "interrupted\n")


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    cli.run_script(lambda: print("a 😀 \udce9"))
    assert written.getvalue() == b"a \\U0001f600 \\udce9\n"


@pytest.mark.parametrize(("number", "code", "said"), [
    (errno.EPIPE, 141, ""), (errno.ENOSPC, 2, "error: output cannot be written (No space left on device)\n")])
def test_a_stdout_that_takes_no_more_is_no_bug(number, code, said, capsys, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(number, os.strerror(number))

    def logs():
        cli.log_to_stdout()
        logging.getLogger("guided_diffusion").info("a line")
        pytest.fail("a log that nobody can read is not written on")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    for main in (lambda: print("a line"), lambda: print("a line", flush=True), logs):
        with pytest.raises(SystemExit) as end:
            cli.run_script(main)
        assert (end.value.code, capsys.readouterr().err) == (code, said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_files_take_no_place_of_a_closed_stream(closed, tmp_path):
    script = ("import sys; from pathlib import Path; from guided_diffusion import cli\n"
              "def main():\n    with open('data', 'w') as file:\n        cli.tell('picture: a.png')\n"
              "        print('a line', file=sys.stderr)\n        file.write(str(file.fileno()))\n"
              "cli.run_script(main)")
    done = execute("sh", "-c", f'cd "$2"; exec "$0" -c "$1" {closed}', sys.executable, script, str(tmp_path))
    assert done.returncode == 0 and int((tmp_path / "data").read_text()) > 2
    assert "Traceback" not in done.stdout + done.stderr


def test_torch_that_is_ended_while_it_is_loaded_says_nothing():
    script = ("import atexit, logging, signal; from guided_diffusion import cli\n"
              "def main():\n    cli.log_to_stderr()\n"
              "    atexit.register(logging.getLogger('torch._subclasses').info, 'cache stats')\n"
              "    signal.raise_signal(signal.SIGINT)\n"
              "cli.run_script(main)")
    done = execute(sys.executable, "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_signal_that_is_ignored_stays_so(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(lambda: signal.raise_signal(signal.SIGHUP), capsys) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_another_one_spoke_for_is_silent(capsys):
    def main():
        raise PeerError("rank 0 failed") from KeyboardInterrupt()
    assert ended(main, capsys) == (130, "")


def test_without_its_torchrun_a_rank_is_asked_to_end_and_then_ends(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(cli, "GLANCE", 0)
    monkeypatch.setattr(cli, "FAREWELL", 0)
    monkeypatch.setattr(os, "kill", lambda *call: done.append(call))
    monkeypatch.setattr(os, "_exit", done.append)
    cli._end_without(parent=-1)
    assert done == [(os.getpid(), signal.SIGTERM), 2]
    assert capsys.readouterr().err == "error: torchrun is gone\n"
