"""Folders of unfinished work: gone with their process, or with the next run."""

import os

import pytest

from guided_diffusion.scratch import OWNER, disown, publish, remove_abandoned, scratch_folder

NAME = r"work-[0-9]"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def left_behind(folder, host=None, age=0):
    """A folder as a killed process leaves it."""
    folder.mkdir()
    (folder / "half").write_text("half")
    if host is not None:
        (folder / OWNER).write_text(host)
    for path in (folder / "half", folder / OWNER, folder):
        if path.exists():
            now = path.stat().st_mtime
            os.utime(path, (now - age, now - age))


def test_a_scratch_folder_goes_with_its_block_and_is_left_in_peace_before(tmp_path):
    with scratch_folder(tmp_path / "work-1") as folder:
        (folder / "x").write_text("x")
        remove_abandoned(tmp_path, NAME)
        assert (folder / "x").exists() and names(tmp_path) == ["work-1"]
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "work-1"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_is_published_stays(tmp_path):
    with scratch_folder(tmp_path / "work-1") as folder:
        (folder / "x").write_text("x")
        publish(folder, tmp_path / "done")
    assert names(tmp_path) == ["done"] and names(tmp_path / "done") == ["x"]


def test_a_kill_within_the_publication_leaves_nothing(tmp_path, monkeypatch):
    def killed(done):
        raise KeyboardInterrupt

    monkeypatch.setattr("guided_diffusion.scratch.disown", killed)
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "work-1") as folder:
        (folder / "x").write_text("x")
        publish(folder, tmp_path / "done")
    monkeypatch.undo()
    disown(tmp_path / "done")
    assert names(tmp_path) == ["done"] and names(tmp_path / "done") == ["x"]


def test_a_kill_within_the_removal_leaves_what_is_removed_later(tmp_path, monkeypatch):
    def killed(path, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "work-1") as folder:
        (folder / "x").mkdir()
        monkeypatch.setattr("shutil.rmtree", killed)
    monkeypatch.undo()
    remove_abandoned(tmp_path, NAME)
    assert names(tmp_path) == []


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    here = os.uname().nodename
    left_behind(tmp_path / "work-1", here)
    left_behind(tmp_path / "work-2", "elsewhere", age=60)
    left_behind(tmp_path / "work-3", "elsewhere", age=8 * 86400)
    left_behind(tmp_path / "work-4", age=60)
    left_behind(tmp_path / "work-5", age=2 * 86400)
    left_behind(tmp_path / "work-6.new", here)
    left_behind(tmp_path / "work-7.new", "")            # the folder has its owner's file, and that no name yet
    (tmp_path / "work-8.new").mkdir()
    left_behind(tmp_path / ".config", here, age=10**7)
    left_behind(tmp_path / "work-7x", here, age=10**7)
    (tmp_path / "elsewhere").mkdir()
    left_behind(tmp_path / "elsewhere" / "precious", here)
    (tmp_path / "work-8").symlink_to(tmp_path / "elsewhere" / "precious")
    (tmp_path / "work-9").write_text("a file")
    remove_abandoned(tmp_path, NAME)
    assert names(tmp_path) == [".config", "elsewhere", "work-2", "work-4", "work-7x", "work-8", "work-9"]
    assert (tmp_path / "elsewhere" / "precious" / "half").exists()
    remove_abandoned(tmp_path / "missing", NAME)
