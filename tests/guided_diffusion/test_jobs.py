"""The state of a job: what it does, how it ended, and whether it is still there."""

import json
import os
import shlex
import socket

import pytest
from commands import call

from guided_diffusion import jobs
from guided_diffusion.errors import UserError
from guided_diffusion.jobs import State, command_line, job, read_state
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.status import status_of


def test_a_running_job_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "EVERY", 0.0)
    (tmp_path / "row").mkdir()
    with job("table", tmp_path, "SAG"), progress_bar(2, "rows", "row") as rows:
        rows.note("sag")
        with job("sampling", tmp_path / "row"), progress_bar(8, "sampling", "image", initial=1) as images:
            images.update(3)
            outer, inner = read_state(tmp_path), read_state(tmp_path / "row")
    assert [(step.what, step.done, step.total) for step in outer.steps] == [("rows", 0, 2), ("sampling", 4, 8)]
    assert [step.what for step in inner.steps] == ["sampling"] and inner.steps[0].rate > 0
    assert outer.state is State.RUNNING and f"process {os.getpid()} on {socket.gethostname()}" in str(outer)
    assert "sampling: 4 of 8 images" in str(outer) and f"writes {tmp_path}" in str(outer)
    ended = read_state(tmp_path)
    assert ended.state is State.FINISHED and "table (SAG), finished" in str(ended)


@pytest.mark.parametrize(("error", "state", "words"), [
    (UserError("--lr 9: no, https://me:word@host/x?key=1"), State.STOPPED, "--lr 9: no, https://host/x"),
    (KeyboardInterrupt(), State.INTERRUPTED, "training, interrupted "),
])
def test_how_a_job_ended(error, state, words, tmp_path):
    with pytest.raises(type(error)), job("training", tmp_path), progress_bar(9, "training", "image") as bar:
        bar.update(4)
        raise error
    found = read_state(tmp_path)
    assert found.state is state and words in str(found) and "4 of 9 images" in str(found)


@pytest.mark.parametrize(("changes", "gone"), [
    ({}, False),
    ({"process": 2**22 + 1}, True),                     # larger than any
    ({"started": 1}, True),                             # another process has its number now
    ({"started": 0}, False),                            # of a system that does not tell
    ({"started": 0, "process": 2**22 + 1}, True),
    ({"host": "elsewhere"}, False),
    ({"host": "elsewhere", "written": 1.0}, True),
])
def test_a_job_that_was_killed_is_found_out(changes, gone, tmp_path):
    with job("training", tmp_path):
        content = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**content, **changes}))
    assert (read_state(tmp_path).state is State.GONE) == gone


@pytest.mark.parametrize("damage", [{"began": "noon"}, {"written": None}, {"process": "x", "started": 0}, {"steps": [
    {"what": "a", "unit": "b", "done": 1, "total": "all", "rate": 2, "note": ""}]}])
def test_a_state_with_values_of_other_types_is_damaged(damage, tmp_path):
    with job("training", tmp_path):
        content = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**content, **damage}))
    with pytest.raises(UserError, match=r"status\.json: is no JSON file that can be used"):
        read_state(tmp_path)


def test_a_job_that_had_done_all_is_marked_as_finished(tmp_path):
    jobs.mark_finished(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError), job("training", tmp_path), progress_bar(9, "training", "image"):
        raise UserError("no")
    before = read_state(tmp_path)
    jobs.mark_finished(tmp_path)
    after = read_state(tmp_path)
    assert after.state is State.FINISHED and not after.steps and not after.why
    assert (after.began, after.written) == (before.began, before.written)
    (tmp_path / "file.status.json").write_text((tmp_path / "status.json").read_text())
    jobs.mark_finished(tmp_path / "file")               # a file says enough
    assert not (tmp_path / "file.status.json").exists()


def test_other_ranks_write_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with job("training", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_job_that_writes_a_file_has_its_state_beside_it_as_long_as_it_runs(tmp_path):
    with job("evaluation", tmp_path / "result.json"):
        assert read_state(tmp_path / "result.json").job == "evaluation"
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError), job("evaluation", tmp_path / "result.json"):
        raise UserError("no")
    assert read_state(tmp_path / "result.json").why == "no"


def test_a_job_that_only_reads_has_its_state_beside_that_as_long_as_it_runs(tmp_path, caplog):
    caplog.set_level("INFO")
    pictures, file = tmp_path / "pictures", tmp_path / "samples.npz"
    pictures.mkdir()
    file.write_bytes(b"")
    for place in (pictures, file):
        with pytest.raises(UserError), job("evaluation", place, reads=True):
            assert "evaluation, running" in str(status_of(place)) and "writes" not in str(status_of(place))
            raise UserError("no")
    assert f"evaluation: its state is in {tmp_path / 'pictures.status.json'} until it ends" in caplog.messages
    assert sorted(tmp_path.rglob("*")) == [pictures, file]


def test_the_command_tells_of_several_jobs_and_of_what_is_none(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with job("training", tmp_path / name):
            pass
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "status.json").write_text("{}")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert call("run_status", one, two) == 0
    assert capsys.readouterr().out.count("training, finished ") == 2
    assert call("run_status", one, two, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {one, two} and found[two]["job"]["state"] == "finished"
    assert call("run_status", one, tmp_path, tmp_path / "none", tmp_path / "bad") == 2
    out, err = capsys.readouterr()
    assert "training, finished" in out
    assert f"{tmp_path}: holds no sampling run, and no state of another job" in err
    assert f"{tmp_path / 'none'}: there is no such folder or file" in err
    assert "status.json: is no JSON file that can be used" in err


def test_a_command_line_without_its_secrets_is_still_one():
    words = ["--data_dir", "https://me:word@host/photos.zip?token=1", "--out", "a b"]
    shown = command_line("scripts/image_train.py", words)
    assert shlex.split(shown) == ["python", "scripts/image_train.py", "--data_dir", "https://host/photos.zip",
                                  "--out", "a b"]


SHORT = ("--model", "fmnist32", "--timestep_respacing", 1)
INTO = [(("explore", *SHORT, "--images", 0), "explorer"),
        (("attention", *SHORT, "--images", 0, "--num_images", 2), "attention study")]


@pytest.mark.parametrize(("words", "what"), INTO, ids=[what for _, what in INTO])
@pytest.mark.parametrize("before", ["explorer", "training", "sampling"])
def test_the_folder_of_another_kind_of_job_is_left_as_it_is(words, what, before, tmp_path, capsys):
    def contents():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    out = tmp_path / "out"
    out.mkdir()
    with job(before, out):
        (out / "report.html").write_text("the page")
    there = contents()
    code, said = call(*words, "--out", out), capsys.readouterr().err
    if what == before:
        assert code == 0 and there.keys() < contents().keys()
    else:
        assert code == 2 and f"--out {out}: is the folder of a run ({before})" in said and contents() == there


@pytest.mark.parametrize("record", ["run.json", "shards/run.json"])
def test_a_run_without_a_state_is_left_as_it_is_too(record, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / record).write_text("{}")
    with pytest.raises(UserError, match="is the folder of a run, and"):
        jobs.job_folder("explorer", tmp_path)
    (tmp_path / record).unlink()
    (tmp_path / "status.json").write_text("{")
    assert jobs.job_folder("explorer", tmp_path) == tmp_path        # which a damaged state does not harm
