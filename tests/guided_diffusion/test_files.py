"""Files that appear whole or not at all, locks, and what is checked before the work."""

import errno
import json
import math
import os
import subprocess
import sys
import time

import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.files import (
    check_folder,
    check_writable,
    lock_holder,
    locked,
    only_job,
    open_own,
    prepare,
    remove_leftovers,
    write,
    write_csv,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path, sync):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def save(temporary):
        assert temporary.parent == tmp_path and path.read_text() == "old"
        assert list(tmp_path.glob("*.txt")) == [path]
        temporary.write_text("new")

    write(path, save, sync=sync)
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("wrong"),
                                   KeyboardInterrupt()])
def test_a_write_that_fails_keeps_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def save(temporary):
        temporary.write_text("half")
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        write(path, save, ending="the rest is kept")
    if expected is UserError:
        assert str(raised.value) == f"{path}: cannot be written (No space left on device); the rest is kept"
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    def outer(file):
        file.write_text("outer")
        write_text(tmp_path / "a.txt", "inner")
        assert file.read_text() == "outer" and (tmp_path / "a.txt").read_text() == "inner"

    write(tmp_path / "a.txt", outer)
    assert (tmp_path / "a.txt").read_text() == "outer" and names(tmp_path) == ["a.txt"]


def test_leftovers_go_by_the_name_of_what_they_would_have_become(tmp_path):
    left = prepare(tmp_path / "a.txt", lambda file: file.write_text("x"))
    (tmp_path / ".other").write_text("")
    remove_leftovers(tmp_path, "b.txt*")
    assert left.exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".other"]


@pytest.mark.parametrize("killed", [1, 2])
def test_what_killed_processes_left_of_a_file_goes_as_it_is_written_again(tmp_path, killed):
    def cut_off(depth):
        def save(file):
            file.write_text("half")
            if depth == killed:
                os._exit(137)
            write(tmp_path / "a.txt", cut_off(depth + 1))
        return save

    process = os.fork()
    if not process:
        try:
            write(tmp_path / "a.txt", cut_off(1))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 137
    assert len(names(tmp_path)) == killed
    write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


def test_a_written_file_has_the_rights_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_are_made_where_that_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No such file or directory\)$"):
        write_text(tmp_path / "b" / "a.txt", "x")
    write(tmp_path / "b" / "a.txt", lambda file: file.write_text("x"), parents=True)
    assert (tmp_path / "b" / "a.txt").read_text() == "x"
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "b", "x")
    assert names(tmp_path) == ["b"]


def test_contents(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    write_csv(tmp_path / "a.csv", [{"x": 1 / 3, "y": "word"}, {"x": math.nan, "y": 10**7}])
    assert (tmp_path / "a.csv").read_text() == "x,y\n0.333333,word\n,10000000\n"
    write_csv(tmp_path / "b.csv", [], ["x", "y"])
    assert (tmp_path / "b.csv").read_text() == "x,y\n"


def test_text_may_hold_names_that_are_no_text(tmp_path):
    write_text(tmp_path / "a.txt", "caf\udce9 é")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 é"


def test_what_cannot_be_written_is_refused_before(tmp_path):
    assert check_folder("--out", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/none"):
        with pytest.raises(UserError, match=f"^--out {path}: cannot be written \\("):
            check_folder("--out", path)
    check_writable("--json", "")
    check_writable("--json", tmp_path / "new.json")
    check_writable("--json", tmp_path / "c" / "new.json", parents=True)
    for path in (tmp_path / "a", tmp_path / "d" / "new.json"):
        with pytest.raises(UserError, match=f"^--json {path}: cannot be written \\("):
            check_writable("--json", path)
    assert names(tmp_path) == ["a", "c", "file"]


def test_links_that_others_planted_are_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.txt"
    victim.write_text("precious")
    (tmp_path / ".a.txt.0.tmp").symlink_to(victim)
    (tmp_path / ".a.txt.1.tmp").hardlink_to(victim)
    os.mkfifo(tmp_path / ".a.txt.2.tmp")
    write_text(path, "x")
    assert path.read_text() == "x" and victim.read_text() == "precious"
    path.unlink()
    path.symlink_to(victim)
    write_text(path, "x")
    assert not path.is_symlink() and path.read_text() == "x"
    lock = tmp_path / ".lock"
    lock.symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: cannot be locked \(it is a link, which is not followed"), \
            locked(lock, UserError):
        pass
    with pytest.raises(OSError, match="it is a link"), locked(lock):
        pass
    assert lock_holder(lock) is None and victim.read_text() == "precious"
    with pytest.raises(OSError, match="it is a link"):
        open_own(lock, os.O_WRONLY | os.O_TRUNC)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no ordinary file"):
        open_own(tmp_path / "pipe", os.O_RDWR)
    assert victim.read_text() == "precious"


def test_temporary_names_are_never_too_long(tmp_path):
    seen = []
    write(tmp_path / ("x" * 250), lambda file: (seen.append(file.name), file.write_text("x")))
    assert len(seen[0]) < 120


HOLD = """
import sys, time
from pathlib import Path
from guided_diffusion.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A lock file that another process holds until its input is closed."""
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield path, process


def test_a_lock_is_refused_to_others_by_the_name_of_its_holder(held):
    path, process = held
    assert str(process.pid) in lock_holder(path)
    with pytest.raises(UserError, match=f"busy: process {process.pid} on "), \
            locked(path, lambda who: UserError(f"busy: {who}")):
        pass
    process.kill()
    process.wait()
    with locked(path, lambda who: UserError(f"busy: {who}")):
        assert str(os.getpid()) in lock_holder(path)
    assert not path.exists() and lock_holder(path) is None


def test_a_second_job_is_told_what_to_do(held, tmp_path):
    lock, process = held
    for given, what in (([tmp_path], "folder"), ([tmp_path / "a.npz", lock], "file")):
        with pytest.raises(UserError) as error, only_job(*given):
            pass
        assert str(error.value).startswith(f"--out {given[0]}: another job is working there (process {process.pid} on ")
        assert str(error.value).endswith(f"); wait for it, or name another {what}")


def test_a_lock_is_waited_for(held):
    path, process = held
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        time.sleep(0.3)
        process.stdin.close()                   # the first one ends and removes the file
        assert second.stdout.readline() == b"held\n"
        assert str(second.pid) in lock_holder(path)
        second.stdin.close()
    assert not path.exists()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match=r"no locks \(Function not implemented\): see to it"), \
            locked(tmp_path / ".lock", UserError):
        pass
    with pytest.raises(OSError, match="not implemented"), locked(tmp_path / ".lock"):
        pass
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".b.txt.0.tmp").write_text("somebody may be writing this")
    write_text(tmp_path / "a" / "b.txt", "x")
    assert names(tmp_path / "a") == [".b.txt.0.tmp", "b.txt"] and (tmp_path / "a" / "b.txt").read_text() == "x"
