"""Sampling runs as jobs: kills, restarts, several at once, full disks; the same file from all of them."""

import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PATIENCE, REPOSITORY, call, execute, flags, samples_in
from crashes import content_of
from launchers import needs_mpi, usual_signals
from networks import TINY

from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import named_labels
from guided_diffusion.rng import image_labels
from guided_diffusion.runs import sample, sampler
from guided_diffusion.runs.shards import locked
from guided_diffusion.runs.status import run_status

BIN = Path(sys.executable).parent
CHUNKS = 6
COUNT = 2 * CHUNKS


@pytest.fixture(scope="module")
def line(tiny_checkpoints):
    """The command line of a run of 6 chunks, long enough to be killed, into a folder; `changes` are flags."""
    def words(out, **changes):
        return flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 5,
                      "num_samples": COUNT, "batch_size": 2, "guide_scale": 1.2, "sel_attn_depth": 1, "blur_sigma": 3,
                      "out": out, **changes})
    return words


@pytest.fixture(scope="module")
def expected(line, tmp_path_factory):
    """SHA-256 of the samples of one undisturbed process."""
    out = tmp_path_factory.mktemp("plain")
    assert call("image_sample", *line(out)) == 0
    return digest(out)


def digest(out):
    path, = Path(out).glob("samples_*.npz")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def start(python):
    """Starts ranks that no launcher watches, with the names of environment variables that tell each who it is."""
    return functools.partial(started, python)


def started(python, line, ranks=1, names=("RANK", "WORLD_SIZE", "LOCAL_RANK")):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    several = {names[1]: str(ranks), "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(several if ranks > 1 else {})}
    return [subprocess.Popen(
        [python, "scripts/image_sample.py", *map(str, line)], cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**environment, names[0]: str(rank), names[2]: str(rank)},
        preexec_fn=usual_signals) for rank in range(ranks)]


def await_shards(out, count, process):
    """Waits until a run has made so many chunks, or all."""
    until = time.monotonic() + PATIENCE
    while len(list((out / "shards").glob("[0-9]*.npz"))) < count:
        if process.poll() == 0:
            return                      # on a busy machine, the run may be over before this is seen
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def stamps(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("[0-9]*.npz")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks, victims, chunks", [(1, [0], 1), (2, [0, 1], 3), (2, [0], 2), (2, [1], 3)],
                         ids=["plain process", "both ranks", "rank 0", "rank 1"])
def test_killed_run_goes_on_with_the_same_file(ranks, victims, chunks, start, line, expected, tmp_path):
    for attempt in range(10):
        out = tmp_path / str(attempt)
        processes = start(line(out), ranks)
        await_shards(out, chunks, processes[0])
        time.sleep(0.05 / 2**attempt)   # rather within the next chunk than just after this one, on a fast machine too
        for rank in victims:
            processes[rank].send_signal(signal.SIGKILL)
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        if len(stamps(out)) < CHUNKS and not list(out.glob("samples_*.npz")):
            break               # else all chunks were made, as the victim was between two of them: another job
    else:
        pytest.fail("no job of ten was killed within a chunk")
    for rank, error in enumerate(errors):
        if rank not in victims:
            assert processes[rank].returncode == 2
            assert f"error: rank {victims[0]} is gone" in error

    status = run_status(out)
    before = stamps(out)
    assert chunks <= len(before) < CHUNKS
    assert (status.done, status.missing) == (2 * len(before), COUNT - 2 * len(before))
    assert status.damaged == 0 and status.holder is None
    assert call("image_sample", *line(out, keep_shards=True)) == 0
    assert digest(out) == expected
    assert before.items() <= stamps(out).items()               # none of them was made again


@pytest.mark.slow
@pytest.mark.parametrize("ranks, number, code", [(1, signal.SIGINT, 130), (1, signal.SIGTERM, 143),
                                                 (2, signal.SIGTERM, 143)],
                         ids=["interrupt", "terminate", "terminate two ranks"])
def test_signalled_run_says_so_in_one_line_and_goes_on(ranks, number, code, start, line, expected, tmp_path):
    for _ in range(10):
        processes = start(line(tmp_path, log_every=1000, overwrite=True), ranks)
        await_shards(tmp_path, 2, processes[0])
        for process in processes:
            process.send_signal(number)
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        if any(process.returncode for process in processes):
            break                       # else the run was over before the signal came
    assert [process.returncode for process in processes] == [code] * ranks
    said = [text for error in errors for text in error.splitlines() if not text.startswith("sampling: writes ")]
    assert len(said) == 1 and "what was finished is kept" in said[0], errors
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    assert call("image_sample", *line(tmp_path)) == 0
    assert digest(tmp_path) == expected


@pytest.mark.slow
@needs_mpi
def test_rank_killed_under_mpiexec_ends_the_job(python, line, expected, tmp_path):
    words = ("scripts/image_sample.py", *line(tmp_path))
    with subprocess.Popen([BIN / "mpiexec", "-n", "2", python, *words], cwd=REPOSITORY,
                          stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as job:
        await_shards(tmp_path, 2, job)
        ranks = ranks_working_in(tmp_path)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert job.wait(PATIENCE) != 0
    assert not ranks_working_in(tmp_path)
    until = time.monotonic() + PATIENCE
    while run_status(tmp_path).holder is not None:         # a fork ends a moment after what mpiexec killed
        assert time.monotonic() < until
        time.sleep(0.01)
    ended = execute(BIN / "mpiexec", "-n", 3, python, *words)
    assert ended.returncode == 0, ended.stderr
    assert digest(tmp_path) == expected


def ranks_working_in(out):
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"mpiexec" not in words[0] and b"hydra" not in words[0]:
            found.append(int(entry.name))
    return sorted(found)


@pytest.mark.slow
def test_ranks_of_slurm_give_the_same_file(start, line, expected, tmp_path):
    processes = start(line(tmp_path), 2, ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    for process in processes:
        assert process.wait(PATIENCE) == 0, process.communicate()
    assert digest(tmp_path) == expected
    chunks = json.loads((tmp_path / "run.json").read_text())["timing"]["chunks"]
    assert {chunk["rank"] for chunk in chunks} == {0, 1}


@pytest.mark.slow
def test_two_jobs_started_at_once_in_one_folder(start, line, expected, tmp_path):
    jobs = [start(line(tmp_path))[0] for _ in range(2)]
    errors = [job.communicate(timeout=PATIENCE)[1] for job in jobs]
    codes = [job.returncode for job in jobs]
    assert sorted(codes) in ([0, 2], [0, 0])        # the second may look when the first has just finished
    for refused in [error for code, error in zip(codes, errors, strict=True) if code]:
        assert re.fullmatch(rf"error: --out {tmp_path}: another job is working there \([^\n]+\n", refused)
    assert digest(tmp_path) == expected


def test_folder_of_another_job_is_left_alone(line, tmp_path, capsys):
    with locked(tmp_path):
        assert call("image_sample", *line(tmp_path, overwrite=True)) == 2
        assert "another job is working there" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


SHORT = {"timestep_respacing": 3, "num_samples": 5}


@pytest.fixture
def mounted(tmp_path):
    """A file system of one's own, of 200 kB; read-only after mounted.read_only()."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_disk_that_fills_up_loses_nothing(mounted, line, tmp_path, capsys):
    assert call("image_sample", *line(tmp_path / "plain", **SHORT)) == 0
    filler = mounted / "filler"
    capsys.readouterr()
    refused = set()
    for free in range(0, 200_000, 4096):            # every place where a disk can fill up
        space = os.statvfs(mounted)
        filler.write_bytes(b"0" * max(0, space.f_bavail * space.f_frsize - free))
        before = stamps(mounted / "out")
        if call("image_sample", *line(mounted / "out", **SHORT)) == 0:
            break
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and "No space left on device" in error, error
        assert before.items() <= stamps(mounted / "out").items()
        refused.add(re.search(r"out/(shards|\.?samples|grid|run)", error)[1])
        filler.unlink()
    assert digest(mounted / "out") == digest(tmp_path / "plain")
    assert len(refused) >= 2, refused


def test_read_only_folder_is_refused(mounted, line, capsys):
    (mounted / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    assert call("image_sample", *line(mounted / "out", **SHORT)) == 2
    assert capsys.readouterr().err == f"error: --out {mounted / 'out'}: cannot be written (Read-only file system)\n"


def test_damaged_shard_and_shard_of_another_seed_are_refused(line, tmp_path, capsys):
    for seed in (0, 1):
        assert call("image_sample", *line(tmp_path / str(seed), seed=seed, keep_shards=True, **SHORT)) == 0
    for name in ("run.json", "samples_5x16x16x3.npz"):
        (tmp_path / "0" / name).unlink()
    shard, good = tmp_path / "0" / "shards" / "000001.npz", (tmp_path / "0" / "shards" / "000001.npz").read_bytes()
    again = line(tmp_path / "0", **SHORT)
    for content, words in ((good[:400] + b"\xff" + good[401:], "1 damaged (000001.npz)"), (
            (tmp_path / "1" / "shards" / "000001.npz").read_bytes(), "000001.npz: is of another run")):
        shard.write_bytes(content)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert call("image_sample", *again) == 2
        assert words in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert call("run_status", tmp_path / "0") == 0
        printed = capsys.readouterr().out
        assert "000001.npz" in printed and re.search(r"done +3 of 5.*\nmissing +0\ndamaged +2\n", printed)
    shard.unlink()
    assert call("image_sample", *again) == 0


@pytest.mark.parametrize("keep_shards", [False, True])
def test_longer_run_keeps_the_images_of_the_shorter(keep_shards, line, tmp_path, monkeypatch):
    short = {**SHORT, "keep_shards": keep_shards}
    assert call("image_sample", *line(tmp_path / "grown", **short)) == 0
    made = []
    images = sampler.ImageSampler.images
    monkeypatch.setattr(sampler.ImageSampler, "images", lambda self, numbers, *rest: (
        made.extend(numbers), images(self, numbers, *rest))[1])
    assert call("image_sample", *line(tmp_path / "grown", **{**short, "num_samples": 9})) == 0
    assert made == [5, 5, 6, 7, 8]                  # chunk 2 was cut short: fill stands in the place of image 4
    assert call("image_sample", *line(tmp_path / "fresh", **{**short, "num_samples": 9})) == 0
    grown, fresh = (tmp_path / name / "samples_9x16x16x3.npz" for name in ("grown", "fresh"))
    assert grown.read_bytes() == fresh.read_bytes()
    with np.load(tmp_path / "grown" / "samples_5x16x16x3.npz") as shorter, np.load(grown) as longer:
        assert (longer["arr_0"][:5] == shorter["arr_0"]).all() and (longer["arr_1"][:5] == shorter["arr_1"]).all()

    made.clear()
    pictures = {}
    for count in (9, 5, 9, 4, 9, 5):
        assert call("image_sample", *line(tmp_path / "grown", **{**short, "num_samples": count})) == 0
        assert json.loads((tmp_path / "grown" / "run.json").read_text())["samples"] == f"samples_{count}x16x16x3.npz"
        assert made == []                           # none of the finished ones is forgotten, nor sampled again
        picture = (tmp_path / "grown" / "grid.png").read_bytes()
        assert pictures.setdefault(count, picture) == picture
    assert len(set(pictures.values())) == 3


def test_shorter_run_takes_what_a_killed_one_left_and_leaves_it_there(line, tmp_path, monkeypatch):
    made, images = [], sampler.ImageSampler.images
    whole = {**SHORT, "num_samples": 7, "batch_size": 3}

    def killed_after_two_chunks(self, numbers, *rest):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.extend(numbers)
        return images(self, numbers, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sampler.ImageSampler, "images", killed_after_two_chunks)
        assert call("image_sample", *line(tmp_path / "out", **whole)) == 130
        kept = stamps(tmp_path / "out")
        assert call("image_sample", *line(tmp_path / "out", **{**whole, "num_samples": 4})) == 0
        assert stamps(tmp_path / "out") == kept
        made.clear()
        assert call("image_sample", *line(tmp_path / "out", **whole)) == 0
        assert made == [6]
    assert call("image_sample", *line(tmp_path / "fresh", **whole)) == 0
    out, fresh = (tmp_path / name / "samples_7x16x16x3.npz" for name in ("out", "fresh"))
    assert out.read_bytes() == fresh.read_bytes()
    with np.load(out.with_name("samples_4x16x16x3.npz")) as four, np.load(out) as seven:
        assert (four["arr_0"] == seven["arr_0"][:4]).all() and (four["arr_1"] == seven["arr_1"][:4]).all()


def test_overwriting_whose_network_cannot_be_compiled_has_removed_nothing(line, tmp_path, capsys, monkeypatch):
    assert call("image_sample", *line(tmp_path, keep_shards=True, **SHORT)) == 0
    before = content_of(tmp_path)

    def refused(*_):
        raise UserError("--compile True: the network can't be compiled here, leave it off (no compiler)")
    monkeypatch.setattr(sample, "compile_for", refused)
    assert call("image_sample", *line(tmp_path, compile=True, overwrite=True, **SHORT)) == 2
    assert "leave it off" in capsys.readouterr().err
    assert content_of(tmp_path) == before


def test_labels_of_the_run(line, tmp_path, capsys):
    np.save(tmp_path / "labels.npy", np.array([1, 1, 0, 1, 0, 0]))
    for labels, wanted in (("1", [1] * 5), (tmp_path / "labels.npy", [1, 1, 0, 1, 0]), ("balanced", [0, 1, 0, 1, 0]),
                           ("random", image_labels(0, range(5), 2).tolist())):
        out = tmp_path / Path(labels).name
        out = out.with_name(f"out_{out.name}")
        assert call("image_sample", *line(out, labels=labels, **SHORT)) == 0
        assert samples_in(out)[1].tolist() == wanted
    np.save(tmp_path / "labels.npy", np.array([1, 1, 0, 0, 0, 0]))
    capsys.readouterr()
    assert call("image_sample", *line(tmp_path / "out_labels.npy", labels=tmp_path / "labels.npy", **SHORT)) == 2
    assert "has other labels" in capsys.readouterr().err
    for labels, words in (("2", "from 0 to 1"), ("even", "must be random"), ("/nowhere.npy", "cannot be read")):
        assert call("image_sample", *line(tmp_path / "new", labels=labels, **SHORT)) == 2
        assert f"--labels {labels}" in (message := capsys.readouterr().err) and words in message
        assert not (tmp_path / "new").exists()
    assert call("image_sample", *line(tmp_path / "new", labels=1, class_cond=False, **SHORT)) == 2
    assert "has no classes" in capsys.readouterr().err


def test_samples_state_the_names_of_their_classes(line, tiny_checkpoints, tmp_path):
    plain, named = tiny_checkpoints / "model.safetensors", tmp_path / "named.safetensors"
    save_state(named, load_state_dict(plain), {**read_metadata(plain), "class_names": '["cat", "dog"]'})
    for path, expected in ((named, ["cat", "dog"]), (plain, None)):
        assert call("image_sample", *line(tmp_path / path.stem, **{**SHORT, "model_path": path})) == 0
        with np.load(tmp_path / path.stem / "samples_5x16x16x3.npz") as file:
            assert file.get("class_names", np.array(None)).tolist() == expected
    assert named_labels(tmp_path / "named" / "samples_5x16x16x3.npz", np.arange(2))[1].names == ("cat", "dog")


def test_lines_of_progress_and_record(line, tmp_path, capsys):
    assert call("image_sample", *line(tmp_path, log_every=2, keep_shards=True, **SHORT)) == 0
    out, err = capsys.readouterr()
    lines = [each for each in out.splitlines() if " images, " in each]
    assert [each.split()[1] for each in lines] == ["2", "4", "5"] and err == ""
    assert re.fullmatch(r"sampling: 5 of 5 images, [\d.e+]+ images/s, took 0:00:\d\d, 1 of 1 ranks", lines[-1])
    record = json.loads((tmp_path / "run.json").read_text())
    chunks = record["timing"]["chunks"]
    assert [(chunk["first"], chunk["images"], chunk["rank"]) for chunk in chunks] == [(0, 2, 0), (2, 2, 0), (4, 1, 0)]
    assert all(0 < chunk["seconds"] < record["timing"]["seconds"] for chunk in chunks)
    assert len(record["fingerprint"]) == 64 and record["sha256"].keys() == {"samples", "model"}
    with np.load(tmp_path / "shards" / "000001.npz", allow_pickle=False) as shard:
        assert shard["images"].shape == (2, 16, 16, 3) and shard["numbers"].tolist() == [2, 3]
        assert shard["labels"].shape == (2,)


def test_status_of_a_finished_run(line, tmp_path, capsys):
    assert call("image_sample", *line(tmp_path / "out", **SHORT)) == 0
    status = run_status(tmp_path / "out")
    assert (status.done, status.missing, status.damaged) == (5, 0, 0) and status.samples is not None
    capsys.readouterr()
    assert call("run_status", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("job")["state"] == "finished"
    assert told == {
        "num_samples": 5, "done": 5, "damaged": 0, "missing": 0, "files": [], "holder": None,
        "samples": str(tmp_path / "out" / "samples_5x16x16x3.npz")}
    with locked(tmp_path / "out"):
        assert str(os.getpid()) in str(run_status(tmp_path / "out"))
    (tmp_path / "out" / "samples_5x16x16x3.npz").write_bytes(b"")
    assert run_status(tmp_path / "out").damaged == 5
    (tmp_path / "out" / "samples_5x16x16x3.npz").unlink()
    assert run_status(tmp_path / "out").missing == 5
    capsys.readouterr()
    assert call("run_status", tmp_path / "nowhere") == 2
    assert "there is no such folder or file" in capsys.readouterr().err


@pytest.mark.parametrize("limit, auto, code", [(2, True, 0), (2, False, 2), (1, True, 0), (0, True, 2)])
def test_out_of_memory(limit, auto, code, line, tmp_path, capsys, monkeypatch):
    sizes = []
    piece = sampler.ImageSampler._piece

    def limited(self, numbers, *rest):
        sizes.append(len(numbers))
        if len(numbers) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return piece(self, numbers, *rest)
    monkeypatch.setattr(sampler.ImageSampler, "_piece", limited)
    options = {**SHORT, "batch_size": 5, "auto_batch": auto}
    assert call("image_sample", *line(tmp_path / "out", **options)) == code
    if code:
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: --batch_size 5") and "out of memory" in error and "--auto_batch True" in error
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["status.json"]
        return
    assert sizes == ([5, 3, 2, 2, 2] if limit == 2 else [5, 3, 2] + [1] * 5)
    monkeypatch.undo()
    assert call("image_sample", *line(tmp_path / "whole", **options)) == 0
    assert np.abs(samples_in(tmp_path / "out")[0].astype(int) - samples_in(tmp_path / "whole")[0]).max() <= 1


@pytest.mark.slow
def test_packing_takes_the_memory_of_a_chunk(python, tmp_path):
    ended = execute(python, "scripts/reliability.py", "--pack_images", 1500, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    after, before = map(int, re.search(r"peak memory (\d+) MiB, (\d+) MiB before", ended.stdout).groups())
    assert after - before < 30 and after < 1000         # the images are 70 MiB
