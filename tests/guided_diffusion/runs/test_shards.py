"""Finished chunks as files: whole, of this run, or refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.runs import shards as module
from guided_diffusion.runs.shards import DamagedError, Shards, holder, locked
from guided_diffusion.runs.status import run_status

OPTIONS = {"num_samples": 7, "batch_size": 3, "image_size": 4, "seed": 0, "labels": "random", "model_path": "a.pt",
           "out": "out"}


def images_of(numbers):
    return np.stack([np.full((4, 4, 3), number, np.uint8) for number in numbers])


def labels_of(numbers):
    return np.asarray(numbers, np.int64) % 2


@pytest.fixture
def run(tmp_path):
    """Shards of the run in tmp_path, with changed options."""
    def make(**changes):
        return Shards(tmp_path, {**OPTIONS, **changes}, {"model": "1" * 64}, labels_of)
    return make


def fill(run, indices=None):
    for index in range(len(run.chunks)) if indices is None else indices:
        run.save(index, images_of(run.chunks[index]), labels_of(run.chunks[index]), rank=1, seconds=2.5)


def complete(run, indices):
    """Makes what these chunks lack; returns the images that were made."""
    made = []

    def make(numbers):
        made.extend(numbers)
        return {"images": images_of(numbers), "labels": labels_of(numbers)}

    for index in indices:
        run.complete(index, make)
    return sorted(set(made))


def finish(run):
    packed, _ = run.pack()
    os.replace(packed, run.samples)
    sha256 = {**run.sha256, "samples": module.sha256_of(run.samples)}
    record = {"configuration": run.configuration, "sha256": sha256}
    (run.out / "run.json").write_text(json.dumps(record))
    return run.settle(keep=False)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_chunks_are_not_done_again(run):
    assert list(run().prepare(overwrite=False)) == [0, 1, 2]
    fill(run(), [0, 2])
    assert list(run().prepare(overwrite=False)) == [1]
    assert list(run().prepare(overwrite=True)) == [0, 1, 2]


def test_what_no_image_depends_on_makes_no_other_run(run):
    run().prepare(overwrite=False)
    fill(run())
    same = run(out="elsewhere", model_path="moved.pt", log_every=3, keep_shards=True, auto_batch=True, overwrite=False)
    assert list(same.prepare(overwrite=False)) == []


@pytest.mark.parametrize("changes, flag", [({"seed": 1}, "seed"), ({"sha256": "2" * 64}, "model_path"),
                                           ({"batch_size": 4}, "batch_size"), ({"new": 3}, "new")])
def test_chunks_of_another_run_are_refused_and_stay(changes, flag, run, tmp_path):
    other = Shards(tmp_path, {**OPTIONS, **changes}, {"model": changes.get("sha256", "1" * 64)}, labels_of)
    run().prepare(overwrite=False)
    fill(run())
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"--{flag} differs.*--overwrite True"):
        other.prepare(overwrite=False)
    assert contents(tmp_path) == before
    finish(run())
    with pytest.raises(UserError, match=f"--{flag} differs.*--overwrite True"):
        other.prepare(overwrite=False)
    assert list(other.prepare(overwrite=True)) == list(range(len(other.chunks)))
    assert run().samples.exists()               # until others take their place
    fill(other, [0])
    assert list(other.prepare(overwrite=False)) == list(range(1, len(other.chunks)))
    with pytest.raises(UserError, match=f"--{flag} differs"):
        run().prepare(overwrite=False)


def test_single_shard_of_another_seed_is_refused(run, tmp_path):
    other = Shards(tmp_path / "other", {**OPTIONS, "seed": 1}, {"model": "1" * 64}, labels_of)
    other.out.mkdir()
    for each in (run(), other):
        each.prepare(overwrite=False)
        fill(each, [0, 1])
    shutil.copy(other.path(1), run().path(1))
    with pytest.raises(UserError, match=r"000001.npz: is of another run"):
        run().prepare(overwrite=False)
    shutil.copy(run().path(0), run().path(1))               # of this run, under the wrong name
    with pytest.raises(UserError, match=r"000001.npz: is of another run"):
        run().prepare(overwrite=False)


def test_other_labels_are_refused(run, tmp_path):
    run().prepare(overwrite=False)
    fill(run())
    ones = Shards(tmp_path, OPTIONS, run().sha256, lambda numbers: np.ones(len(numbers), np.int64))
    none = Shards(tmp_path, OPTIONS, run().sha256, lambda numbers: None)
    for other in (ones, none):
        with pytest.raises(UserError, match="has other labels"):
            other.prepare(overwrite=False)
    finish(run())
    for other in (ones, none):
        with pytest.raises(UserError, match="has other labels"):
            other.prepare(overwrite=False)


def test_flipped_bytes_are_found(run):
    run().prepare(overwrite=False)
    fill(run())
    path, good = run().path(1), run().path(1).read_bytes()
    arrays = run().read(1)
    refused = 0
    for at in range(0, len(good), 5):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1:])
        try:
            read = run().read(1)
        except DamagedError as error:
            assert "000001.npz: is damaged; delete it" in str(error)
            refused += 1
        else:                                               # dates and the like
            assert all((read[name] == arrays[name]).all() for name in arrays)
    assert refused > len(good) / 5 / 2
    for length in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedError, match=r"1 damaged \(000001.npz\); delete"):
            run().prepare(overwrite=False)
    path.unlink()
    assert list(run().prepare(overwrite=False)) == [1]


def test_arrays_of_other_shapes_are_damage(run):
    run().prepare(overwrite=False)
    run().save(0, images_of(range(2)), labels_of(range(3)))
    with pytest.raises(DamagedError):
        run().read(0)
    run().save(0, images_of(range(3)).astype(np.int64), labels_of(range(3)))
    with pytest.raises(DamagedError):
        run().read(0)


def test_packed_file_and_timing(run):
    run().prepare(overwrite=False)
    fill(run())
    packed, timing = run().pack()
    with np.load(packed) as file:
        assert (file["arr_0"] == images_of(range(7))).all() and (file["arr_1"] == labels_of(range(7))).all()
    assert timing[2] == {"first": 6, "images": 1, "rank": 1, "seconds": 2.5}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count, todo", [(20, [2, 3, 4, 5, 6]), (8, [2]), (4, []), (6, []), (3, []), (1, [])])
def test_longer_or_shorter_run_keeps_what_is_there(count, todo, packed, run, tmp_path):
    run().prepare(overwrite=False)
    fill(run())
    if packed:
        finish(run())
    before = {path: content for path, content in contents(tmp_path).items() if path.suffix == ".npz"}
    other = run(num_samples=count)
    assert list(other.prepare(overwrite=False)) == todo
    assert run_status(tmp_path).done == min(count, 7)
    assert before.items() <= contents(tmp_path).items()
    assert complete(other, todo) == list(range(7, count))
    result, _ = other.pack()
    with np.load(result) as file:
        assert (file["arr_0"] == images_of(range(count))).all() and (file["arr_1"] == labels_of(range(count))).all()


@pytest.mark.parametrize("counts", [[3], [6], [6, 3], [3, 6]], ids=str)
@pytest.mark.parametrize("record", ["whole", "lost"])
def test_shorter_run_leaves_the_chunks_of_a_longer_one(record, counts, run, tmp_path, caplog):
    caplog.set_level("INFO")
    run(num_samples=20).prepare(overwrite=False)
    fill(run(num_samples=20), [0, 1, 3])
    before = contents(tmp_path)
    if record == "lost":
        (tmp_path / "shards" / "run.json").unlink()
    for count in counts:
        assert list(run(num_samples=count).prepare(overwrite=False)) == []
        status = run_status(tmp_path)
        assert (status.num_samples, status.done) == (count, count)
    assert finish(run(num_samples=count))
    count = 20 if record == "whole" else 12             # as far as the last chunk
    assert caplog.messages == [f"{tmp_path / 'shards'}: its chunks stay, as a run of {count} images has more of them"]
    for _ in range(2):
        status = run_status(tmp_path)
        assert (status.num_samples, status.done, status.samples) == (count, 9, None)
        if record == "whole":
            assert contents(tmp_path / "shards") == before
        shorter = run(num_samples=counts[-1])
        assert shorter.prepare(overwrite=False) is None and shorter.settle(keep=False)
    assert list(run(num_samples=20).prepare(overwrite=False)) == [2, 4, 5, 6]
    fill(run(num_samples=20), [2, 4, 5, 6])
    assert run_status(tmp_path).done == 20 and run_status(tmp_path).samples is None     # not packed yet
    assert not finish(run(num_samples=20)) and not (tmp_path / "shards").exists()


@pytest.mark.parametrize("record", ["whole", "lost"])
def test_a_part_of_a_chunk_is_taken_and_the_whole_one_stays(record, run, tmp_path):
    longer, shorter = run(num_samples=20), run(num_samples=4)
    longer.prepare(overwrite=False)
    fill(longer, [0, 1])
    before = {index: longer.path(index).read_bytes() for index in (0, 1)}
    if record == "lost":
        (tmp_path / "shards" / "run.json").unlink()
    assert list(shorter.prepare(overwrite=False)) == []
    assert finish(shorter)
    with np.load(shorter.samples) as file:
        assert (file["arr_0"] == images_of(range(4))).all() and (file["arr_1"] == labels_of(range(4))).all()
    assert {index: longer.path(index).read_bytes() for index in (0, 1)} == before
    assert complete(longer, longer.prepare(overwrite=False)) == list(range(6, 20))


def test_a_chunk_grows_from_what_there_is_most_of(run):
    """Be that a chunk that an unfinished run has left, or a file of samples."""
    run(num_samples=7).prepare(overwrite=False)
    fill(run(num_samples=7))
    finish(run(num_samples=7))
    assert complete(run(num_samples=20), run(num_samples=20).prepare(overwrite=False).spans[0][:1]) == [7, 8]
    eight = run(num_samples=8)
    assert list(eight.prepare(overwrite=False)) == []
    assert finish(eight)
    (eight.folder / "000002.npz").unlink()
    assert complete(run(num_samples=9), run(num_samples=9).prepare(overwrite=False)) == [8]


def test_chunks_of_a_longer_run_go_when_it_has_no_more_of_them(run, tmp_path, caplog):
    caplog.set_level("INFO")
    run(num_samples=20).prepare(overwrite=False)
    fill(run(num_samples=20), [0])
    assert list(run(num_samples=6).prepare(overwrite=False)) == [1]
    fill(run(num_samples=6), [1])
    assert not finish(run(num_samples=6)) and not (tmp_path / "shards").exists() and not caplog.messages


def test_finished_run_is_checked_and_not_done_again(run):
    run().prepare(overwrite=False)
    fill(run())
    finish(run())
    assert run().prepare(overwrite=False) is None
    content = run().samples.read_bytes()
    run().samples.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    for count in (7, 9):
        with pytest.raises(UserError, match="is damaged or was changed"):
            run(num_samples=count).prepare(overwrite=False)
    run().samples.unlink()
    assert list(run().prepare(overwrite=False)) == [0, 1, 2]


def test_leftovers_of_killed_ranks_are_removed(run):
    run().prepare(overwrite=False)
    (run().folder / ".000001.npz.host.1.tmp").write_bytes(b"half")
    run().prepare(overwrite=False)
    assert {path.name for path in run().folder.iterdir()} == {"run.json"}
    run().tidy()
    assert not run().folder.exists()


def test_disk_that_fills_up_loses_nothing(run, monkeypatch):
    run().prepare(overwrite=False)
    fill(run(), [0])
    before = contents(run().out)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*start the same command again"):
            fill(run(), [1])
        assert contents(run().out) == before
    fill(run(), [1, 2])
    before = contents(run().out)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*start the same command again"):
        run().pack()
    assert contents(run().out) == before


def test_the_disk_must_hold_the_chunks_and_what_they_are_packed_into(run, monkeypatch):
    size, full = 4 * 4 * 3, "No space left on device"

    def prepared(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - sum(
            path.stat().st_size for path in run().out.glob(".samples*"))))
        return list(run().prepare(overwrite=False))

    with pytest.raises(UserError, match=rf"{full}: {14 * size} bytes are .*, {14 * size - 1} are free"):
        prepared(14 * size - 1)
    assert prepared(14 * size) == [0, 1, 2]
    fill(run(), [0, 1])
    with pytest.raises(UserError, match=rf"{8 * size} bytes are needed"):
        prepared(8 * size - 1)
    (run().out / f".{run().samples.name}.0.tmp").write_bytes(bytes(5 * size))        # left by a kill while packing
    assert prepared(8 * size) == [2]


def test_overwriting_that_is_refused_has_removed_nothing(run, monkeypatch):
    for count in (3, 6):
        run(num_samples=count).prepare(overwrite=False)
        fill(run(num_samples=count), [count // 3 - 1])
        run(num_samples=count).set_record_aside()
        finish(run(num_samples=count))
    run().prepare(overwrite=False)
    fill(run(), [2])
    before, size = contents(run().out), 2 * 7 * 4 * 4 * 3
    replaced = [*run().folder.iterdir(), run().out / "run_3.json"]
    needed = size - sum(path.stat().st_size for path in replaced)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="No space left on device"):
        run().prepare(overwrite=True)
    assert contents(run().out) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert list(run().prepare(overwrite=True)) == [0, 1, 2]
    assert not (run().out / "run_3.json").exists() and [path.name for path in run().folder.iterdir()] == ["run.json"]


HOLD = """
import sys, time
from pathlib import Path
from guided_diffusion.runs.shards import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_job_per_folder(tmp_path):
    with locked(tmp_path):
        assert str(os.getpid()) in holder(tmp_path)
        with pytest.raises(UserError, match=f"another job is working there \\(process {os.getpid()}"), locked(tmp_path):
            pass
        assert str(os.getpid()) in holder(tmp_path)
    assert not list(tmp_path.iterdir()) and holder(tmp_path) is None


def test_lock_ends_with_its_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid}"), locked(tmp_path):
            pass
        process.kill()
    assert (tmp_path / ".lock").exists() and holder(tmp_path) is None
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
